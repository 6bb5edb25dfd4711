"""The report's section of rows: format, counts, and the first rows as the base sees them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import DatasetSettings
from finetune.console import summary_line
from finetune.data.rows import Rows
from finetune.data.segments import segments_of
from finetune.files.run_folder import RunFolder
from finetune.run.cached import Cached
from finetune.run.load import read_run_config
from finetune.run.preview import ShownExample, first_examples
from finetune.run.resources import SharedResources
from sweeps.answer.report_section import Section, ShownRow

log = logging.getLogger(__name__)

COUNT = 3

PARTS = {"train": "training", "eval": "evaluation", "test": "test"}
"""The names of the parts in `result.json`, and on the page."""


@dataclass(frozen=True)
class _ReadRows:
    """What is shown of rows that can be read."""

    formats: list[str]
    """Lines that say the format, which column is what, and which are not used."""
    counts: Mapping[str, Any]
    """Rows by part, and rows that were left out by reason, as in `result.json`."""
    examples: list[ShownExample]


_shown: Cached[object, _ReadRows] = Cached(frees_memory=False)
"""Kept, because the report of a running study is written again and again."""


def rows_section(run: RunFolder, result: Mapping[str, Any]) -> Section:
    """Describe the rows of a run, and show the first training rows.

    Args:
        run: the run's folder.
        result: the content of its `result.json`; empty if it has none.

    Returns:
        The section: only the run's counts where its rows can't be read any more.
    """
    read = _read_rows(run)
    counts = result.get("rows") or (read.counts if read else {})
    figures = []
    for part, name in PARTS.items():
        if part in counts:
            figures.append((f"{counts[part]:,}", f"{name} rows"))
    lines = list(read.formats) if read else []
    if counts:
        lines += _left_out_lines(counts) + list(counts.get("notes", ()))
    shown = []
    for example in read.examples if read else ():
        segments = segments_of(example.tokens, special=False)
        shown.append(ShownRow(example.place, segments))
    return Section("rows", "Rows", figures=figures, lines=lines, shown_rows=shown)


def _left_out_lines(counts: Mapping[str, Any]) -> list[str]:
    """Say how many rows were left out and why, and name the first that could not be read."""
    lines = []
    for reason, count in counts.get("dropped", {}).items():
        lines.append(f"left out {count:,} {reason}")
    for part, count in counts.get("left_out", {}).items():
        if count:
            reason = (
                "too long, nothing to learn within dataset.max_length, or not encodable"
            )
            lines.append(f"left out {count:,} {PARTS[part]} rows: {reason}")
    for row in counts.get("skipped", ()):
        lines.append(f"skipped {row['source']}: row {row['number']}: {row['reason']}")
    return lines or ["no rows were left out"]


def _read_rows(run: RunFolder) -> _ReadRows | None:
    """Read the rows of a run; None where they, or the base's tokenizer, can't be read any more."""
    if not run.identity.exists():
        return None
    try:
        config = read_run_config(run.path)
        key = (config.dataset, config.model)
        return _shown.get(key, lambda: _read(config))
    # Of any kind, because other libraries read rows and tokenizers too.
    except Exception as error:
        log.info("report: its rows are not shown: %s", summary_line(error))
        return None


def _read(config: RunConfig) -> _ReadRows:
    resources = SharedResources()
    rows = resources.rows(config.dataset)
    tokenizer = resources.tokenizer(config.model)
    examples = first_examples(config, tokenizer, "train", rows.train, COUNT)
    formats = rows.formats or [_named_format(config.dataset, rows)]
    return _ReadRows(formats, rows.counts, examples)


def _named_format(settings: DatasetSettings, rows: Rows) -> str:
    """Say the format where the config names it, or its columns, so that none was detected."""
    line = f"format {', '.join(rows.train.format_names)}"
    columns = [f"{purpose}: {name}" for purpose, name in settings.columns.items()]
    return f"{line} ({', '.join(columns)})" if columns else line
