"""Which rows belong together, that no part of the split divides them, and that this takes linear
time."""

import logging
import random
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.rows import Settings, chat, marks, texts
from support.runs import write_jsonl

from finetune.data.duplicates import Ties, find_ties, group_key
from finetune.data.rows import load_rows
from finetune.data.split import take_groups
from finetune.data.types import Row
from finetune.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_cache")

VOCABULARY = [
    f"word{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{n // 676}x" for n in range(2000)
]
LONG_ANSWER = "The harbour office opens at nine and closes before three."


def sentence(seed: object, count: int) -> str:
    return " ".join(random.Random(str(seed)).choices(VOCABULARY, k=count))


def fillers(count: int) -> list[dict[str, Any]]:
    """Chats that belong to no other."""
    return [
        chat(f"question {sentence(n, 6)}?", f"answer {sentence(-n - 1, 4)}")
        for n in range(count)
    ]


def ties_of(rows: list[dict[str, Any]], groups: list[str | None] | None = None) -> Ties:
    keys = array("Q", map(group_key, groups or [None] * len(rows)))
    return find_ties([Row(row) for row in rows], keys)


def groups_of(
    rows: list[dict[str, Any]], groups: list[str | None] | None = None
) -> list[list[int]]:
    """The groups of several rows, by their numbers."""
    ties = ties_of(rows, groups)
    members = defaultdict(list)
    for number, group in enumerate(ties.groups(len(rows))):
        members[group].append(number)
    return sorted(numbers for numbers in members.values() if len(numbers) > 1)


def changed_words(text: str, *positions: int) -> str:
    """A text with other words at some positions."""
    words = text.split()
    for position in positions:
        words[position] = "replaced"
    return " ".join(words)


LONG = sentence("long", 60)
THINKING = {
    "role": "assistant",
    "content": LONG_ANSWER,
    "reasoning_content": "First a thought.",
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (chat("What is it?", "Red."), chat("What is it?", "Blue.")),
        (chat("What is it?", "Red."), chat("  WHAT — is\n\nit!", "Blue.")),
        (chat("Don't I know “this”?", "Yes."), chat("dont i know this", "No.")),
        (chat("Straße in Köln", "a"), chat("STRASSE in Ko\u0308ln", "b")),
        (chat("何ですか!", "a"), chat("何 ですか", "b")),
        (chat("Is `x` **bold**?", "a"), chat("is x bold", "b")),
        (chat("When?", LONG_ANSWER), chat("At what time?", LONG_ANSWER.upper() + "!!")),
        (
            chat("When?", LONG_ANSWER),
            {"messages": [*chat("Open?", "x")["messages"][:1], THINKING]},
        ),
        (chat("When?", LONG_ANSWER), chat("Hi", "Hello.", "And?", LONG_ANSWER)),
        (
            chat("When?", LONG_ANSWER),
            chat("When?", LONG_ANSWER, "And on Sunday?", "Never."),
        ),
        (chat(LONG, "a"), chat(changed_words(LONG, 30), "b")),
        (chat("one", LONG), chat("two", changed_words(LONG, 5, 50))),
        (chat(LONG, "a"), chat("Please: " + LONG + " Thanks a lot.", "b")),
        ({"text": LONG}, {"text": changed_words(LONG, 20)}),
        ({"text": "short text"}, {"text": "Short text."}),
        (chat("Was ist 1 + 1?", "2"), chat("was ist 1+1", "zwei")),
    ],
)
def test_rows_that_belong_together(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert groups_of([first, *fillers(8), second]) == [[0, 9]]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (chat("What is it?", "positive"), chat("Who is it?", "positive")),
        (chat("When?", "One two three four five six seven."),
         chat("Why?", "One two three four five six seven.")),
        (chat("hello", "Hi.", "What is it?", "Red."), chat("hello", "Hi.", "Who is it?", "Ana.")),
        (chat("What is 1 + 1?", "2"), chat("What is 1 - 1?", "0")),
        (chat("What is 3 * 4?", "12"), chat("What is 3 / 4?", "0.75")),
        (chat("Add 3 and 5", "8"), chat("Add 35", "?")),
        (chat("Add 11 1", "12"), chat("Add 1 11", "12")),
        (chat("", "Once upon a time."), chat("", "Long ago.")),
        (chat("???", "Once."), chat("!", "Long ago.")),
        (chat("🙂", "a"), chat("🙃", "b")),
        (chat("की", "a"), chat("का", "b")),
        (chat(LONG, "a"), chat(changed_words(LONG, *range(0, 60, 6)), "b")),
        (chat(LONG, "a"), chat("say it", LONG)),
        ({"text": LONG}, {"text": sentence("other", 60)}),
    ],
)  # fmt: skip
def test_rows_that_do_not_belong_together(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert groups_of([first, *fillers(8), second]) == []


@pytest.mark.parametrize("suffix", ["", " " + sentence("suffix", 30)])
@pytest.mark.parametrize("count", [8, 60, 500])
def test_a_shared_instruction_ties_nothing_together(count: int, suffix: str) -> None:
    instruction = sentence("instruction", 60)
    rows = [
        chat(f"{instruction} {sentence(n, 3)}{suffix}", "yes" if n % 2 else "no")
        for n in range(count)
    ]
    assert groups_of(rows) == []


def test_a_shared_system_turn_ties_nothing_together() -> None:
    system = {"role": "system", "content": sentence("system", 60)}
    rows = [
        {"messages": [system, *chat(f"Who is number {n}?", f"Ana {n}.")["messages"]]}
        for n in range(50)
    ]
    assert groups_of(rows) == []
    assert groups_of([*rows, rows[7]]) == [[7, 50]]


def test_a_question_or_an_answer_of_most_rows_is_an_instruction_or_a_label() -> None:
    poems = [chat("Write a poem.", sentence(n, 20)) for n in range(60)]
    labels = [
        chat(f"Sort {sentence(n, 3)}", LONG_ANSWER + " Yes." * (n % 2))
        for n in range(200)
    ]
    assert groups_of(poems) == groups_of(labels) == []
    assert ties_of(poems).common_texts == 1
    assert ties_of(labels).common_texts == 2
    assert groups_of([*poems, poems[3]]) == [[3, 60]]


def test_near_twins_of_a_repeated_row_are_tied_to_it() -> None:
    rows = [chat(LONG, "a")] * 30 + [chat(changed_words(LONG, 30), "b")] + fillers(40)
    assert groups_of(rows) == [list(range(31))]


def many_groups(seed: int) -> list[dict[str, Any]]:
    """Rows by themselves, and groups of two to five of each kind."""
    draw = random.Random(seed)
    rows = fillers(60)
    for group in range(12):
        text = sentence(f"{seed} {group}", 50)
        for copy in range(draw.randint(2, 5)):
            short = f"{group} {copy}"
            rows.append(
                [
                    chat(f"The same {sentence(group, 3)}?", sentence(short, 5)),
                    chat(sentence(short, 5), text + "!" * copy),
                    chat(changed_words(text, 10 + 9 * copy), sentence(short, 5)),
                ][group % 3]
            )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided_and_the_order_of_rows_does_not_matter(
    seed: int, settings: Settings, tmp_path: Path
) -> None:
    rows = many_groups(seed)
    groups = groups_of(rows)
    assert len(groups) == 12
    shuffled = random.Random(seed).sample(range(len(rows)), len(rows))
    assert (
        sorted(
            sorted(shuffled[number] for number in group)
            for group in groups_of([rows[number] for number in shuffled])
        )
        == groups
    )
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    split = load_rows(
        settings(path=str(file), eval_fraction=0.2, test_fraction=0.2, split_seed=seed)
    )
    parts = [split.train, split.evaluation, split.test]
    numbers = [{row.number - 1 for row in rows} for rows in parts]
    for group in groups:
        assert sum(bool(part & set(group)) for part in numbers) == 1
    wanted = round(0.2 * len(rows))
    assert len(split.test) == len(split.evaluation) == wanted
    assert not split.dropped


def test_work_grows_linearly_with_the_rows() -> None:
    def comparisons(count: int) -> int:
        instruction = sentence("instruction", 30)
        texts_of_rows = [
            changed_words(sentence(n // 3, 40), n % 3 * 19) for n in range(count)
        ]
        rows = [Row(chat(f"{instruction} {text}", "yes")) for text in texts_of_rows]
        ties = ties_of(rows)
        assert len(set(ties.groups(count))) == count // 3
        return ties.comparisons

    few, many = comparisons(600), comparisons(2400)
    assert few > 600
    assert few * 3.5 < many < few * 4.5


def test_of_long_texts_a_sample_of_phrases_is_compared() -> None:
    text = sentence("very long", 2000)
    near = changed_words(text, *range(0, 2000, 100))
    far = changed_words(text, *range(0, 2000, 7))
    # More words than one batch holds, so that the twins are hashed apart.
    between = [chat(sentence(n, 1500), "yes") for n in range(720)]
    rows = [chat(text, "a"), *between, chat(near, "b"), chat(far, "c")]
    assert groups_of(rows) == [[0, 721]]


def test_the_split_of_rows_without_groups_is_as_before_groups_existed(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(20))
    rows = load_rows(settings(path=str(file), eval_fraction=0.2, test_fraction=0.25))
    assert [row.number - 1 for row in rows.train] == [
        19,
        12,
        18,
        9,
        16,
        13,
        1,
        11,
        8,
        7,
        15,
    ]
    assert [row.number - 1 for row in rows.evaluation] == [0, 10, 17, 2]
    assert [row.number - 1 for row in rows.test] == [3, 4, 6, 5, 14]
    assert not rows.notes


@pytest.mark.parametrize(
    ("sizes", "count", "taken"),
    [
        ([1, 1, 1, 1], 2, 2),
        ([3, 1, 1, 1], 2, 2),
        ([2, 2, 2], 3, 2),
        ([3, 5, 5], 4, 3),
        ([3, 3, 4], 2, 3),
        ([5, 5], 2, 0),
        ([4], 3, 0),
    ],
)
def test_whole_groups_are_taken_as_near_as_possible(
    sizes: list[int], count: int, taken: int
) -> None:
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    members, rest = take_groups(list(range(len(groups))), groups, count)
    assert len(members) == taken
    assert sorted(members + rest) == list(range(len(groups)))
    assert not {groups[number] for number in members} & {
        groups[number] for number in rest
    }


def test_tied_rows_are_said_in_one_line(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = fillers(30) + [chat("The same?", f"{n} times") for n in range(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows + rows[:2])
    with caplog.at_level(logging.INFO, "finetune"):
        split = load_rows(settings(path=str(file), eval_fraction=0.3))
    line = "7 rows in 3 groups of near twins stay in one part"
    assert f"data: {line}" in caplog.messages
    assert split.notes == [line]


def test_twins_in_a_held_out_file_of_training_rows_are_left_out_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    train = [
        chat("What is it?", "Red."),
        chat("When?", LONG_ANSWER),
        chat(LONG, "a"),
        *fillers(9),
    ]
    twins = [
        chat("what is it", "Blue."),
        chat("Open?", LONG_ANSWER),
        chat(changed_words(LONG, 9), "b"),
    ]
    new = [chat("Who is it?", "Red."), chat("who is it?", "Ana.")]
    paths = {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
        for name, rows in {
            "train": train,
            "eval": twins + new,
            "test": [*new[:1], *twins[:2]],
        }.items()
    }
    rows = load_rows(settings(path=paths["train"], eval_path=paths["eval"]))
    assert rows.evaluation == new
    assert rows.dropped == {"eval rows that also stand in training or twice": 3}
    rows = load_rows(
        settings(path=paths["train"], test_path=paths["test"], eval_fraction=0.25)
    )
    training = marks(rows.train)
    for row, twin in zip(train[:2], twins[:2], strict=True):
        assert (twin in rows.test) == (marks([row]).isdisjoint(training))
    with pytest.raises(
        ConfigError, match=r"eval_path=.*all 3 rows also stand in training"
    ):
        load_rows(
            settings(
                path=paths["eval"],
                eval_path=str(write_jsonl(tmp_path / "t.jsonl", twins)),
            )
        )


def test_rows_of_equal_values_stay_in_one_part(
    settings: Settings, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "dialog": {"id": n // 4} if n < 80 else None}
        for n, row in enumerate(fillers(100))
    ]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for seed in range(3):
        split = load_rows(
            settings(
                path=file,
                eval_fraction=0.2,
                test_fraction=0.1,
                split_seed=seed,
                group_by="dialog",
            )
        )
        assert (len(split.train), len(split.evaluation), len(split.test)) == (
            70,
            20,
            10,
        )
        parts = [split.train, split.evaluation, split.test]
        numbers = [
            {(row.number - 1) // 4 for row in part if row.number <= 80}
            for part in parts
        ]
        assert sum(map(len, numbers)) == 20
        assert "dialog" not in split.train[0]
        line = "80 rows in 20 groups of near twins or of one dialog (dataset.group_by)"
        assert split.notes == [f"{line} stay in one part"]
    held = str(
        write_jsonl(
            tmp_path / "held.jsonl",
            [
                {**chat("New?", "Yes."), "dialog": {"id": 3}},
                {**chat("Newer?", "No."), "dialog": {"id": 99}},
            ],
        )
    )
    split = load_rows(settings(path=file, eval_path=held, group_by="dialog"))
    assert split.evaluation == [chat("Newer?", "No.")]


def test_a_group_of_nearly_all_rows_can_not_be_divided(
    settings: Settings, tmp_path: Path
) -> None:
    rows = [{**row, "author": "Ana"} for row in fillers(20)]
    file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    says = (
        r"dataset\.eval_fraction=0\.1: takes 2 of 20 rows, but 20 of them stay in one part as near "
        r"twins, or rows of one author"
    )
    with pytest.raises(ConfigError, match=says):
        load_rows(settings(path=file, eval_fraction=0.1, group_by="author"))
    assert len(load_rows(settings(path=file, group_by="author")).train) == 20
