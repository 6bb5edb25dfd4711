"""The report's section of rows: the first training rows as the winner's base sees them."""

import logging

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.data.segments import segments_of
from finetune.files.run_folder import RunFolder
from finetune.run.cached import Cached
from finetune.run.load import read_run_config
from finetune.run.preview import ShownExample, first_examples
from finetune.run.resources import SharedResources
from sweeps.answer.report_section import Section, ShownRow

log = logging.getLogger(__name__)

COUNT = 3

_shown: Cached[object, list[ShownExample]] = Cached(frees_memory=False)
"""Kept, because the report of a running study is written again and again."""


def rows_section(run: RunFolder | None) -> Section:
    """Show the first training rows of a run; nothing where its rows can't be read any more."""
    title = "Rows as the model sees them"
    if run is None or not run.identity.exists():
        return Section("rows", title)
    try:
        config = read_run_config(run.path)
        key = (config.dataset, config.model)
        examples = _shown.get(key, lambda: _first_examples(config))
    # Of any kind, because other libraries read rows and tokenizers too.
    except Exception as error:
        log.info("report: its rows are not shown: %s", summary_line(error))
        return Section("rows", title)
    shown = []
    for example in examples:
        segments = segments_of(example.tokens, special=False)
        shown.append(ShownRow(example.place, segments))
    return Section("rows", title, shown_rows=shown)


def _first_examples(config: RunConfig) -> list[ShownExample]:
    resources = SharedResources()
    rows = resources.rows(config.dataset)
    tokenizer = resources.tokenizer(config.model)
    return first_examples(config, tokenizer, "train", rows.train, COUNT)
