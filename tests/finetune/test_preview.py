"""`python -m finetune.preview`: rows as the model sees them, and what becomes of all rows."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import ROWS, Case, Workplace, each, lines, matches
from support.commands import Station
from support.documents import described_keys
from support.models import CHATML
from support.rows import chat
from support.runs import write_jsonl

from finetune import preview
from finetune.data.segments import segments_of, tokens_of
from finetune.run.preview_text import histogram

NOTHING_HELD_OUT = ("dataset.eval_fraction=0", "dataset.test_fraction=0")
FORGETS_THOUGHTS = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Renders earlier answers without what was thought, as Qwen 3's template does."""
THOUGHTFUL = chat(
    "1 + 1?", "<think>Easy</think>Two.", "2 + 2?", "<think>Hm</think>Four."
)


class Preview:
    """Runs the command in this process."""

    def __init__(
        self, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        self._base, self._monkeypatch, self._capsys = base, monkeypatch, capsys

    def text(self, data: Path, *arguments: str, base: Path | None = None) -> str:
        overrides = [f"model.name_or_path={base or self._base}", f"dataset.path={data}"]
        self._monkeypatch.setattr("sys.argv", ["preview", *overrides, *arguments])
        preview.main()
        return str(self._capsys.readouterr().out)

    def json(
        self, data: Path, *arguments: str, base: Path | None = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            self.text(data, "--json", *arguments, base=base)
        )
        return content


@pytest.fixture
def shown(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Preview:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return Preview(tiny_base, monkeypatch, capsys)


@pytest.fixture(scope="module")
def forgetful_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a template that renders earlier answers otherwise."""
    base = shutil.copytree(tiny_base, tmp_path_factory.mktemp("forgetful") / "base")
    (base / "chat_template.jinja").write_text(FORGETS_THOUGHTS)
    return base


def chats(folder: Path, count: int = 5) -> Path:
    return write_jsonl(
        folder / "rows.jsonl", [chat(f"Q{n}?", f"A{n}.") for n in range(count)]
    )


def trained_text(row: dict[str, Any]) -> str:
    return "".join(
        text
        for text, is_trained in zip(row["tokens"], row["trained"], strict=True)
        if is_trained
    )


def test_json_has_what_the_model_sees(shown: Preview, tmp_path: Path) -> None:
    data = chats(tmp_path)
    content = shown.json(data, *NOTHING_HELD_OUT, "--rows", "2")

    assert content.keys() == described_keys("PREVIEW")
    first, second = content.pop("rows")
    assert content == {
        "format": "chat",
        "parts": {"train": 5, "eval": 0, "test": 0},
        "examples": 5,
        "left_out": {},
        "cut": 0,
        "shortened": 0,
        "unlearnt": {},
        "notes": [f"dataset.path={data}: format chat (messages)"],
    }
    assert list(first) == ["part", "source", "number", "tokens", "ids", "trained"]
    assert (first["part"], first["source"]) == ("train", str(data))
    assert (first["number"], second["number"]) == (1, 2)
    assert len(first["tokens"]) == len(first["ids"]) == len(first["trained"])
    assert "".join(first["tokens"]) == (
        "<|im_start|>user\nQ0?<|im_end|>\n<|im_start|>assistant\nA0.<|im_end|>\n"
    )
    assert trained_text(first) == "A0.<|im_end|>\n"
    assert trained_text(second) == "A1.<|im_end|>\n"


def test_the_first_rows_of_a_part_are_shown_in_the_order_of_the_file(
    shown: Preview, tmp_path: Path
) -> None:
    data = chats(tmp_path, 40)
    numbers = {}
    for part in ("train", "eval", "test"):
        content = shown.json(data, "--part", part, "--rows", "99")
        numbers[part] = [row["number"] for row in content["rows"]]
        assert numbers[part] == sorted(numbers[part])
        assert {row["part"] for row in content["rows"]} == {part}
        assert len(numbers[part]) == content["parts"][part]

    assert sorted(number for part in numbers.values() for number in part) == list(
        range(1, 41)
    )
    assert [row["number"] for row in shown.json(data)["rows"]] == numbers["train"][:3]


def test_a_row_that_becomes_several_examples_is_shown_as_several(
    shown: Preview, forgetful_base: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [THOUGHTFUL, chat("Q?", "A.")])
    content = shown.json(data, *NOTHING_HELD_OUT, "--rows", "1", base=forgetful_base)

    assert (content["parts"]["train"], content["examples"]) == (2, 3)
    assert [row["number"] for row in content["rows"]] == [1, 1]
    assert list(map(trained_text, content["rows"])) == [
        "<think>Easy</think>Two.<|im_end|>\n",
        "<think>Hm</think>Four.<|im_end|>\n",
    ]
    assert any(
        note.startswith("3 train examples of 2 rows") for note in content["notes"]
    )
    text = shown.text(data, *NOTHING_HELD_OUT, base=forgetful_base)
    assert f"-- train {data}: row 1, example 2 of 2\n4 turns" in text


def test_counts_what_is_left_out_and_cut_in_all_parts(
    shown: Preview, tmp_path: Path
) -> None:
    train = [
        chat("Q?", "A."),
        chat("Q? " * 50, "A."),
        chat("Q?", "B " * 50),
        chat("Q?", " "),
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", train)
    held_out = write_jsonl(
        tmp_path / "held_out.jsonl",
        [train[0], train[1], chat("R?", "C " * 50), chat("S?", "D.")],
    )
    arguments = (
        f"dataset.eval_path={held_out}",
        "dataset.test_fraction=0",
        "dataset.max_length=40",
    )
    content = shown.json(data, *arguments, "--rows", "9")

    assert content["parts"] == {"train": 3, "eval": 2, "test": 0}
    assert content["examples"] == 2
    assert content["left_out"] == {
        f"rows of {data} with nothing to learn from": 1,
        "eval rows that also stand in training or twice": 2,
        "rows with no answer within dataset.max_length": 1,
    }
    assert content["cut"] == 2
    assert [row["number"] for row in content["rows"]] == [1, 3]
    assert len(content["rows"][1]["ids"]) == 40
    assert (
        "cut 1 of 3 train rows to dataset.max_length=40: their end is lost"
        in content["notes"]
    )
    assert (
        "left out 1 train rows with no answer within dataset.max_length"
        in content["notes"]
    )

    text = shown.text(data, *arguments)
    shown_row = text[text.index(f"{data}: row 3") :]
    is_cut = re.search(r"(\d+) tokens, (\d+) trained, (\d+) cut\n", shown_row)
    assert is_cut
    assert int(is_cut[1]) == 40 + int(is_cut[3])
    assert re.search(r"assistant\n⟦(B )+B?⟧⟪ ?B.*<\|im_end\|>\n⟫", shown_row)
    for line in (
        "left out    4 rows",
        "cut         2 examples",
        "not learnt  0 answers",
    ):
        assert f"\n{line}\n" in text


def test_notes_are_the_lines_that_a_run_logs(
    shown: Preview, tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from support.models import load_tokenizer
    from support.rows import tokenize

    from finetune.app import compose_run
    from finetune.data.rows import load_rows

    rows_written = [chat(f"Q{n}?", f"A{n} " * 40) for n in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows_written)
    overrides = [
        f"model.name_or_path={tiny_base}",
        f"dataset.path={data}",
        "dataset.limit=4",
    ]
    config = compose_run([*overrides, "dataset.max_length=40"])
    caplog.set_level("INFO", "finetune.data")
    rows = load_rows(config.dataset)
    for part, part_rows in (
        ("train", rows.train),
        ("eval", rows.evaluation),
        ("test", rows.test),
    ):
        tokenize(part, part_rows, load_tokenizer(config), config.dataset)
    logged = [record.getMessage().removeprefix("data: ") for record in caplog.records]

    assert "training on 4 of 9 rows (dataset.limit)" in logged
    assert any(line.startswith("cut 4 of 4 train rows") for line in logged)
    content = shown.json(data, "dataset.limit=4", "dataset.max_length=40")
    assert content["notes"] == logged


TEXTS = {
    "characters of several tokens": "Grüße 👩‍👩‍👧 变量 ✓ 🦜",
    "replacement character": "a \ufffd b \ufffd\ufffd c",
    "white space": "  two\n\n\tlines   end  ",
    "a special token": "It ends with <|im_end|> inside.",
    "accents of their own": "e\u0301 is not é",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_texts_of_tokens_are_the_row(
    text: str, shown: Preview, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text}])
    (row,) = shown.json(data, *NOTHING_HELD_OUT)["rows"]

    assert "".join(row["tokens"]) == f"{text}<|im_end|>"
    assert len(row["tokens"]) == len(row["ids"])


def test_tokens_that_drop_a_space_at_the_beginning_keep_it_within(
    tiny_base: Path,
) -> None:
    """As SentencePiece's: each token alone is decoded without its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finetune.data.encoding import Encoded

    words = Tokenizer(
        models.WordLevel({"▁one": 0, "▁two": 1, "</s>": 2}, unk_token="</s>")
    )
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    tokens = tokens_of(Encoded([0, 1, 0, 2], [-100, 1, 0, 2]), tokenizer, 3)

    assert [token.text for token in tokens] == ["one", " two", " one", "</s>"]
    assert [
        (s.text, s.kind.trained, s.kind.cut, s.kind.special)
        for s in segments_of(tokens)
    ] == [
        ("one", False, False, False),
        (" two one", True, False, False),
        ("</s>", False, True, True),
    ]


def in_terminal(tiny_base: Path, data: Path, columns: int, **environment: str) -> str:
    """What the command writes to a terminal."""
    main, terminal = pty.openpty()
    overrides = [
        f"model.name_or_path={tiny_base}",
        f"dataset.path={data}",
        *NOTHING_HELD_OUT,
    ]
    variables = {
        **os.environ,
        "COLUMNS": str(columns),
        "TERM": "xterm-256color",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune.preview", *overrides, "dataset.max_length=60"],
        stdout=terminal,
        env=variables,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(main)
    assert process.wait() == 0
    return written.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_colours_and_no_line_is_too_long(
    columns: int, tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / ("a_long_name_" * 9)
    folder.mkdir()
    data = write_jsonl(folder / "rows.jsonl", [chat("Why? \x1b[2J", "So it is. " * 30)])
    written = in_terminal(tiny_base, data, columns)

    assert re.search(r"\x1b\[1m\x1b\[32m|\x1b\[1;32m", written)  # trained
    assert "\x1b[9;90m" in written  # cut
    assert "\x1b[2J" not in written
    plain = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert max(map(len, plain.splitlines())) <= columns
    assert "rows.jsonl: row 1" in plain
    assert "⟦" not in plain


def test_without_colours_a_terminal_shows_brackets(
    tiny_base: Path, tmp_path: Path
) -> None:
    written = in_terminal(tiny_base, chats(tmp_path), 80, NO_COLOR="1")

    assert "assistant\n⟦A0.<|im_end|>\n⟧" in re.sub(r"\x1b\[[0-9;]*m", "", written)


@pytest.mark.parametrize(
    "sizes",
    [
        [7],
        [1] * 9,
        list(range(1, 2000)),
        [*range(20, 60), 90_000],
        [10**6, 10**6 + 1],
        [3, 4000],
    ],
    ids=str,
)
def test_the_histogram_counts_every_size_and_fits_80_columns(sizes: list[int]) -> None:
    bars = histogram(sizes, 78)

    matched = [
        re.fullmatch(r" *(\d+)(-\d+| and more|) +([\d,]+)( █+)?", bar) for bar in bars
    ]
    assert all(matched)
    counts = [int(bar[3].replace(",", "")) for bar in matched if bar]
    assert sum(counts) == len(sizes)
    assert counts[0]
    assert counts[-1]
    assert len(bars) <= 12
    assert max(map(len, bars)) <= 80
    for bar, count in zip(matched, counts, strict=True):
        assert bar
        low = int(bar[1])
        high = int(bar[2][1:] or low) if bar[2] != " and more" else sizes[-1]
        assert count == sum(low <= size <= high for size in sizes)


def test_only_far_outliers_share_the_last_bar() -> None:
    assert "and more" not in "".join(histogram([89, 92, 92, 98, 98, 101], 78))
    *bars, last = histogram([*range(20, 60), 90_000], 78)
    assert len(bars) > 4
    assert " and more" in last


def test_names_the_longest_and_shortest_rows(shown: Preview, tmp_path: Path) -> None:
    rows = [chat("Q?", "word " * (20 if n == 3 else 0) + f"A{n}") for n in range(9)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    text = shown.text(data, *NOTHING_HELD_OUT)

    longest = [line for line in text.splitlines() if line.startswith("longest")]
    assert longest[0].endswith(": row 4")
    assert len(longest) == 3
    assert "tokens of 9 train examples: median" in text


def test_only_the_cache_is_written_and_torch_is_not_imported(
    tiny_base: Path, tmp_path: Path, light_station: Station
) -> None:
    cwd, cache = tmp_path / "cwd", tmp_path / "cache"
    cwd.mkdir()
    data = chats(tmp_path)
    before = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = light_station.run(
        f"model.name_or_path={tiny_base}",
        f"dataset.path={data}",
        *NOTHING_HELD_OUT,
        cwd=cwd,
        module="finetune.preview",
        before=before,
        environment={"FINETUNE_CACHE": str(cache)},
    )

    assert done.returncode == 0, done.stderr
    assert "⟦A0.<|im_end|>\n⟧" in done.stdout
    assert done.stderr == "False\n"
    assert list(cwd.iterdir()) == []
    # The rows and tokens that a run will need are kept.
    assert {path.name for path in cache.iterdir()} == {"rows", "splits", "tokens"}


REFUSED = [
    Case("rows-zero", "--rows 0", "--rows=0: must be at least 1"),
    Case("rows-negative", "--rows=-2", "--rows=-2: must be at least 1"),
    Case(
        "rows-text",
        "--rows all",
        "--rows=all: must be a whole number",
    ),
    Case("part", "--part x", "--part=x: allowed: eval, test, train"),
    Case(
        "part-validation",
        "--part validation",
        "--part=validation: allowed: eval, test, train",
    ),
    Case(
        "no-eval-rows",
        "--part eval dataset.eval_fraction=0",
        "--part=eval: has no rows: dataset.eval_fraction=0.0, dataset.eval_path=null, and no file…",
    ),
    Case(
        "no-test-rows",
        "--part test dataset.test_fraction=0",
        "--part=test: has no rows: dataset.test_fraction=0.0, dataset.test_path=null, and no file…",
    ),
    Case("flag", "--frobnicate", "unrecognized arguments: --frobnicate; see --help"),
    Case("key", "dataset.frobnicate=1", "dataset.frobnicate: no such key; …"),
    Case("value", "dataset.max_length=0", "dataset.max_length=0: …"),
    Case(
        "sweep",
        "lora=r8,r16",
        "lora=r8,r16: several values need python -m finetune -m…",
    ),
    Case(
        "no-file",
        "dataset.path=no.jsonl",
        "dataset.path=no.jsonl: no such file or folder; …",
    ),
    Case("bad-row", "dataset.path=bad.jsonl", "…bad.jsonl: row 2…"),
    Case(
        "too-short",
        "dataset.path=long.jsonl dataset.max_length=9",
        "dataset.max_length=9: leaves no …",
    ),
    Case(
        "too-long",
        "dataset.max_length=3 dataset.on_too_long=refuse",
        "rows.jsonl: row …: has … tokens; dataset.max_length=3 (dataset.on_too_long=refuse)",
    ),
    Case(
        "no-base",
        "model.name_or_path=./no",
        "model.name_or_path=./no: no such folder; allowed: …",
    ),
]


@each(REFUSED)
def test_bad_input_ends_in_one_line(
    case: Case, workplace: Workplace, tiny_base: Path
) -> None:
    bad = lines({"messages": chat("Q?", "A.")["messages"]}, {"messages": 3})
    long = lines(*(chat(f"{n} " * 50, "A.") for n in range(20)))
    workplace.write({"rows.jsonl": ROWS, "bad.jsonl": bad, "long.jsonl": long})
    before = workplace.files()
    given = case.arguments.split()
    for default in (f"model.name_or_path={tiny_base}", "dataset.path=rows.jsonl"):
        if not any(word.startswith(default.partition("=")[0]) for word in given):
            given.append(default)

    outcome = workplace.call(*given, module="finetune.preview")

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.stdout == ""
    assert workplace.files() == before
    assert not outcome.torch_imported


def test_a_template_that_is_given_is_the_one_that_is_shown(
    shown: Preview, tmp_path: Path, tiny_base: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHATML.replace("im_start", "start"))
    (row, *_) = shown.json(chats(tmp_path), *NOTHING_HELD_OUT, base=base)["rows"]

    assert "".join(row["tokens"]).startswith("<|start|>user")


def test_names_the_rows_of_tokens_that_another_data_set_has_cached(
    shown: Preview, tmp_path: Path
) -> None:
    """The same held-out rows, below many or few training rows."""
    held_out = write_jsonl(
        tmp_path / "eval.jsonl", [chat("Q?", "A" * (9 - n)) for n in range(5)]
    )
    overrides = [f"dataset.eval_path={held_out}", "dataset.test_fraction=0"]
    for count in (9, 3, 30):
        folder = tmp_path / str(count)
        folder.mkdir()
        data = chats(folder, count)
        text = shown.text(data, "--part", "eval", *overrides)
        longest = [line for line in text.splitlines() if line.startswith("longest")]
        assert longest[0].endswith("eval.jsonl: row 1")


def test_counts_the_examples_of_rows_that_have_several(
    shown: Preview, tmp_path: Path, forgetful_base: Path
) -> None:
    """Two rows of two answers each; only the first answers fit."""
    rows = [
        chat(f"{n}?", "<think>Easy</think>Two.", "Or?", "<think>Hm</think>Four.")
        for n in range(2)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole = shown.json(data, *NOTHING_HELD_OUT, base=forgetful_base)
    lengths = [len(example["ids"]) for example in whole["rows"]]
    assert lengths[0] == lengths[2] < lengths[1] == lengths[3]

    limit = f"dataset.max_length={lengths[0]}"
    overrides = [*NOTHING_HELD_OUT, limit, "dataset.on_too_long=drop"]
    dropped = shown.json(data, *overrides, base=forgetful_base)
    assert dropped["examples"] == 2
    reason = "examples longer than dataset.max_length"
    assert dropped["left_out"] == {reason: 2}
    assert f"left out 2 train {reason}" in dropped["notes"]
    text = shown.text(data, *overrides, base=forgetful_base)
    assert "left out    0 rows, 2 examples\n" in text

    limit = f"dataset.max_length={lengths[0] - 1}"
    cut = shown.json(data, *NOTHING_HELD_OUT, limit, base=forgetful_base)
    assert cut["cut"] == 4
    assert f"cut 4 of 4 train examples to {limit}: their end is lost" in cut["notes"]
    shortened = (
        "left out the oldest turns of 2 train examples, to keep the answer within"
    )
    assert any(note.startswith(shortened) for note in cut["notes"])
