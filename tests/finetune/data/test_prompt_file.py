"""Prompts of files and of standard input."""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune.data.prompt_file import read_prompts
from finetune.data.types import Prompt
from finetune.errors import ConfigError

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "f"}}
ANSWER = {"role": "assistant", "content": "Hello"}


def prompts(path: Path, text: str, system: str | None = None) -> list[Prompt]:
    path.write_bytes(text.encode())
    return read_prompts("--prompts", str(path), system)


def test_a_text_file_has_one_prompt_a_line(tmp_path: Path) -> None:
    text = "\ufeffHi there\r\n\n{not JSON\u2028still\n"
    expected = [
        Prompt("Hi there", "Be brief."),
        Prompt("{not JSON\u2028still", "Be brief."),
    ]
    assert prompts(tmp_path / "p.txt", text, "Be brief.") == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, Prompt("Hi")),
        ({"prompt": "Hi", "system": "Be brief."}, Prompt("Hi", "Be brief.")),
        ({"prompt": "Hi", "id": 7, "messages": None, "tools": None}, Prompt("Hi")),
        ({"messages": [USER]}, Prompt("Hi", messages=[USER])),
        ({"prompt": [SYSTEM, USER]}, Prompt("Hi", messages=[SYSTEM, USER])),
        ({"messages": [USER, ANSWER]}, Prompt("Hi", messages=[USER])),
        (
            {
                "messages": [
                    {"role": "human", "content": [{"type": "text", "text": "Hi"}]}
                ]
            },
            Prompt("Hi", messages=[USER]),
        ),
        (
            {"messages": [USER], "tools": [{"name": "f"}]},
            Prompt("Hi", tools=[TOOL], messages=[USER]),
        ),
    ],
)
def test_json_lines_have_prompts_or_messages(
    row: dict[str, Any], expected: Prompt, tmp_path: Path
) -> None:
    assert prompts(tmp_path / "p.jsonl", json.dumps(row) + "\n") == [expected]


def test_the_system_turn_of_the_command_is_that_of_rows_without_one(
    tmp_path: Path,
) -> None:
    other = {"role": "system", "content": "Rhyme."}
    rows = [
        {"messages": [USER]},
        {"messages": [other, USER]},
        {"prompt": "Hi", "system": None},
        {"prompt": "Hi", "system": ""},
    ]
    text = "\n".join(map(json.dumps, rows))
    first, second, third, fourth = prompts(tmp_path / "p.JSONL", text, "Be brief.")
    assert first.messages == [SYSTEM, USER]
    assert second.messages == [other, USER]
    assert third.system == "Be brief."
    assert fourth.system is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\nb\n", ["a", "b"]), ('\ufeff{"prompt": "a"}\r\n', ["a"])],
)
def test_standard_input_is_recognised_by_its_first_line(
    text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    read = read_prompts("--prompts", "-", None)
    assert [prompt.text for prompt in read] == expected


def test_pipe_of_the_shell_is_read_as_standard_input(tmp_path: Path) -> None:
    """As in `--prompts <(command)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_text, '{"prompt": "a"}')
        assert read_prompts("--prompts", str(pipe), None) == [Prompt("a")]


@pytest.mark.parametrize(
    ("stdin", "reason"),
    [
        (io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00")), "must be UTF-8 text"),
        (None, "standard input is closed"),
    ],
)
def test_standard_input_without_text_is_refused(
    stdin: io.TextIOWrapper | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(ConfigError, match=f"--prompts=-: {reason}"):
        read_prompts("--prompts", "-", None)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.txt", "\n \n", "has no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt', "line 2: "),
        ("p.jsonl", '["a"]', "line 1: must be an object with prompt or messages"),
        ("p.jsonl", '{"text": "a"}', "line 1: must be an object with prompt"),
        ("p.jsonl", '{"prompt": ""}', "line 1: prompt must be a text or a list"),
        ("p.jsonl", '{"prompt": 7}', "line 1: prompt must be a text or a list"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: each message must"),
        ("p.jsonl", '{"messages": [{"role": "robot", "content": "a"}]}', "role=robot"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": 7}]}', "message 1"),
        ("p.jsonl", json.dumps({"messages": [ANSWER]}), "has no message to answer"),
        ("p.jsonl", json.dumps({"messages": [SYSTEM]}), "has no message to answer"),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": " "}]}',
            "line 1: the last message, of role user, is empty; its content must be a text",
        ),
        (
            "p.jsonl",
            json.dumps({"prompt": [USER, ANSWER, USER | {"content": None}, ANSWER]}),
            "line 1: the last message, of role user, is empty",
        ),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
        ("p.jsonl", json.dumps({"prompt": "a", "messages": [USER]}), "one of them"),
        ("p.jsonl", '{"prompt": "a", "system": 7}', "line 1: system must be a text"),
        ("p.jsonl", '{"prompt": "a", "tools": "x"}', "line 1: tools"),
        (
            "p.json",
            '[{"prompt": "a"}]',
            ".json is not read; must be text with a prompt",
        ),
        ("p.CSV", "a,b\n", ".csv is not read"),
        ("p.jsonl.gz", "a", ".gz is not read"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--prompts=") as refused:
        prompts(tmp_path / name, text)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_prompts("--prompts", str(tmp_path / "none.txt"), None)
    with pytest.raises(ConfigError, match="is a folder"):
        read_prompts("--prompts", str(tmp_path), None)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        read_prompts("--prompts", str(tmp_path / "p.txt"), None)
