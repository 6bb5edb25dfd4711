"""The summary at a run's end."""

from pathlib import Path

from finetune.files.atomic import write_json
from finetune.files.run_folder import RunFolder
from finetune.run import summary


def test_texts_of_several_lines_keep_the_indentation(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    sample = {
        "prompt": "Sum these:\n  1\n  2",
        "before": "\nNo.\n\nWhy?\n",
        "after": "It is 3.",
    }
    write_json(folder.samples, [sample])

    assert summary._fact_lines(summary._answers(folder)) == [
        "  prompt         Sum these:",
        "                   1",
        "                   2",
        "    before       No.",
        "",
        "                 Why?",
        "    after        It is 3.",
    ]


def test_an_answer_that_is_missing_leaves_its_label(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_json(folder.samples, [{"prompt": "Hi"}])
    assert summary._fact_lines(summary._answers(folder)) == [
        "  prompt         Hi",
        "    before",
        "    after",
    ]
