"""The rows that a run reads."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from finetune.config.data_folder import has_evaluation_files
from finetune.config.sections.section import Section
from finetune.errors import did_you_mean, refusal

COLUMN_PURPOSES = ("prompt", "completion", "system", "messages", "tools", "history")
"""Names that `dataset.columns` accepts."""

AUTO_FRACTIONS = {"eval": 0.1, "test": 0.15}
"""The shares of the rows that `auto` holds out, by split."""

AUTO_HELD_OUT_ROWS = 1000
"""With `auto` no more rows are held out: more would only make every evaluation slower. The standard
error of a mean loss over 1,000 rows is a few hundredths of a row's deviation."""

MAXIMUM_WEIGHT = 1000
"""Bounds the length of an epoch: a weight is a number of repetitions."""


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """One of several sources in `dataset.path`."""

    path: str
    """What `dataset.path` may be as one text."""

    weight: float = 1.0
    """How often its training rows come in an epoch; with 0.5 half of them come, drawn by
    `split_seed`."""


@dataclass(frozen=True, kw_only=True)
class DatasetSettings(Section):
    """The rows: where they are, how they are formatted and split."""

    section = "dataset"

    path: str | list[str | SourceSettings]
    """A hub id, a .jsonl .json .csv .tsv .txt (also .gz .zst) .parquet .arrow .feather file, the
    URL of such a file in object storage (s3://…, gs://…, hf://…), a folder of such files (its
    train, validation and test files are recognised by their names), a folder that `save_to_disk`
    wrote, or `python_docs`; or a list of such sources, each also as `{path: …, weight: 2}`: its
    training rows come twice in an epoch."""

    name: str | None
    """Name of a configuration of a data set on the hub; null: its only one."""

    split: str
    """The split of a data set on the hub that is read."""

    format: Literal["auto", "text", "chat", "prompt_completion", "alpaca"]
    """Format of the rows; auto: detected from their fields."""

    text_field: str
    """The field that holds the text of a row of format `text`."""

    max_length: int | None
    """Tokens of a row; longer rows are cut. null: no limit."""

    packing: bool
    """Whether several rows are joined to one sequence of `max_length` tokens. Refused where
    TRL trains and the base would let them see each other."""

    limit: int | None
    """Train on at most this many rows; null: all; auto: 240 of `python_docs` alone, all of any
    other."""

    eval_fraction: float | Literal["auto"]
    """Share of the rows held out for evaluation, where no file has them; 0: none; auto: 0.1, at
    most 1,000 rows."""

    eval_path: str | None
    """A file of rows for evaluation; null: `eval_fraction` of the rows."""

    test_fraction: float | Literal["auto"]
    """Share of the rows held out for the final test, where no file has them; 0: none; auto: 0.15,
    at most 1,000 rows. No choice of a study uses these rows."""

    test_path: str | None
    """A file of rows for the final test; null: `test_fraction` of the rows."""

    split_seed: int
    """Seed of the choice of held-out rows. Apart from `seed`, so that trials are comparable."""

    # The defaults below are for run folders that were written before these keys existed.

    revision: str | None = None
    """Branch, tag or commit of a data set on the hub; null: the default branch."""

    encoding: str | None = None
    """Character encoding of text files, for example cp1252; null: UTF-8. A byte order mark (of
    UTF-8, UTF-16, UTF-32) wins over it."""

    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns that hold a row's `prompt`, `completion`, `system`, `messages`, `tools`
    or `history`, for example `{prompt: question, completion: answer}`."""

    template: str | None = None
    """One line of Jinja over a row's columns that makes the prompt, for example
    `{{title}}: {{body}}`."""

    ignore: list[str] = field(default_factory=list)
    """Fields of rows that are left out, for example `[reasoning]`, where the chat template can't
    render them."""

    loss_on: Literal["assistant", "last_answer", "all"] = "assistant"
    """Which tokens are learnt: every answer of a chat, its last answer, or all tokens. Of plain
    text all tokens are learnt."""

    on_too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What happens to a row of more than `max_length` tokens."""

    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Whether a row that can't be read ends the run, or is left out, counted and listed."""

    group_by: str | None = None
    """The column that says which rows belong together (a conversation, a document); such rows are
    never divided between training and held-out rows. null in a row: it belongs to no other."""

    def __post_init__(self) -> None:
        self._check_sources()
        for name, minimum in (("max_length", 2), ("limit", 1)):
            value = getattr(self, name)
            is_valid = value is None or value >= minimum
            allowed = f"must be a whole number of at least {minimum}, or null"
            self.require(name, is_valid, allowed)
        for split in AUTO_FRACTIONS:
            allowed = "must be auto, or at least 0 and below 1 (0: no such rows)"
            fraction = self.held_out_fraction(split)
            self.require(f"{split}_fraction", 0 <= fraction < 1, allowed)
        allowed = "must be a text encoding that Python knows, as utf-8, utf-16 or cp1252, or null"
        self.require("encoding", _is_text_encoding(self.encoding), allowed)
        reason = f"with eval_fraction={self.eval_fraction} leaves no rows to train on"
        self.require("test_fraction", self._trained_fraction > 0, reason)
        can_pack = not self.packing or self.max_length is not None
        self.require("packing", can_pack, "needs dataset.max_length")
        self._check_columns()
        reason = "a message's role can't be left out"
        self.require("ignore", "role" not in self.ignore, reason)

    def _check_columns(self) -> None:
        for purpose, column in self.columns.items():
            key = f"dataset.columns.{purpose}"
            if purpose not in COLUMN_PURPOSES:
                allowed = did_you_mean(str(purpose), COLUMN_PURPOSES)
                raise refusal(key, column, f"no such purpose; {allowed}")
            if not isinstance(column, str) or not column:
                raise refusal(key, column, "must be the name of a column")
            if list(self.columns.values()).count(column) > 1:
                raise refusal(key, column, "each column can serve one purpose only")
        has_pair = not self.columns.keys().isdisjoint({"prompt", "completion"})
        has_messages = "messages" in self.columns
        if has_messages and (has_pair or self.template is not None):
            reason = "not with prompt, completion or dataset.template"
            raise refusal("dataset.columns.messages", self.columns["messages"], reason)
        if self.template is None:
            return
        has_prompt = "prompt" in self.columns
        reason = "makes the prompt; not with dataset.columns.prompt"
        self.require("template", not has_prompt, reason)
        self.require("template", bool(self.template.strip()), "must be text, or null")

    def _check_sources(self) -> None:
        allowed = "must be a hub id, a file, a folder, or python_docs"
        self.require("path", bool(self.path), allowed)
        if isinstance(self.path, str):
            return
        paths: set[str] = set()
        for index, source in enumerate(self.sources):
            key = f"dataset.path[{index}]"
            if not source.path:
                raise refusal(key, source.path, allowed)
            if source.path in paths:
                repeated = f"{{path: {source.path}, weight: 2}}"
                reason = f"stands twice; {repeated} repeats its rows"
                raise refusal(key, source.path, reason)
            paths.add(source.path)
            if not 0 < source.weight <= MAXIMUM_WEIGHT:
                reason = f"must be a number above 0, at most {MAXIMUM_WEIGHT}"
                raise refusal(f"{key}.weight", f"{source.weight:g}", reason)

    @property
    def sources(self) -> list[SourceSettings]:
        """The sources that `path` names, with their weights."""
        items = [self.path] if isinstance(self.path, str) else self.path
        sources = []
        for item in items:
            source = SourceSettings(path=item) if isinstance(item, str) else item
            sources.append(source)
        return sources

    def of_other(self, key: str, path: str) -> "DatasetSettings":
        """Return the settings for all rows of other data, each row by itself.

        Args:
            key: What error messages call the path.
            path: A file, a folder or a hub id.

        Raises:
            ConfigError: The path is empty.
        """
        if not path:
            raise refusal(key, path, "must be a file, a folder or a hub id")
        return dataclasses.replace(self, path=path, packing=False)

    @property
    def path_text(self) -> str:
        """All paths as one text, for messages."""
        return ", ".join(source.path for source in self.sources)

    @property
    def source_names(self) -> dict[str, str]:
        """The names of several sources in metrics, by their paths; empty with a single source.

        A file is named without its folder and its type; equal names are numbered.
        """
        paths = [source.path for source in self.sources]
        if len(paths) < 2:
            return {}
        names: dict[str, str] = {}
        for path in paths:
            # `partition`, because `.jsonl.gz` are two types.
            stem = PurePath(path).name.partition(".")[0] or "source"
            count = 1
            name = stem
            while name in names.values():
                count += 1
                name = f"{stem}-{count}"
            names[path] = name
        return names

    def held_out_fraction(self, split: str) -> float:
        """Return the share of the rows of `path` that `eval` or `test` takes."""
        fraction: float | str = getattr(self, f"{split}_fraction")
        return AUTO_FRACTIONS[split] if isinstance(fraction, str) else fraction

    def held_out_limit(self, split: str) -> int | None:
        """Return the most rows that the share of `eval` or `test` takes; None: no limit."""
        is_auto = getattr(self, f"{split}_fraction") == "auto"
        return AUTO_HELD_OUT_ROWS if is_auto else None

    @property
    def _trained_fraction(self) -> float:
        """Share of the rows of `path` that are trained on."""
        evaluation = 0.0 if self.eval_path else self.held_out_fraction("eval")
        test = 0.0 if self.test_path else self.held_out_fraction("test")
        return 1 - evaluation - test

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        if self.eval_path is not None or self.held_out_fraction("eval") > 0:
            return True
        return any(
            has_evaluation_files(source.path, self.test_path) for source in self.sources
        )


def _is_text_encoding(name: str | None) -> bool:
    """Whether Python has a codec of this name from bytes to text; None is allowed too."""
    # A LookupError also comes from codecs between bytes, such as zlib; a ValueError from a name
    # with a null character.
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError):
        return False
    return name != ""
