"""The commands on a run's folder: generate, evaluate, merge, resume."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import Station
from support.configs import tiny_overrides
from support.documents import described_keys
from support.runs import write_jsonl

from finetune import evaluate
from finetune.run.merging import judge_divergences


@pytest.fixture(scope="module")
def trained(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's folder, made by the command."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    overrides = [
        "trainer.max_steps=20",
        "optimizer.learning_rate=0.02",
        "lora.bias=none",
    ]
    done = station.run(
        *tiny_overrides(tiny_base),
        *overrides,
        f"hydra.run.dir={folder}",
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_run_ends_with_a_summary(trained: Path) -> None:
    log = (trained / "train.log").read_text()
    for part in (
        "loading the base ",
        "evaluating ",
        "completed: default",
        "held-out loss",
        "test loss",
        "tokens/s",
        "peak memory",
        "before",
        "after",
        "use it",
    ):
        assert part in log


def test_generate_answers_by_the_adapter_or_the_base(
    trained: Path, station: Station
) -> None:
    sample = json.loads((trained / "samples.json").read_text())[0]
    adapter = station.run(
        str(trained),
        "--prompt",
        sample["prompt"],
        cwd=trained,
        module="finetune.generate",
    )
    base = station.run(
        str(trained),
        "--prompt",
        sample["prompt"],
        "--base",
        cwd=trained,
        module="finetune.generate",
    )

    assert adapter.stderr.splitlines()[0].startswith("loading ")
    assert adapter.stderr.splitlines()[-1] == "answering the prompt"
    assert " ".join(adapter.stdout.split()) == " ".join(sample["after"].split())
    assert " ".join(base.stdout.split()) == " ".join(sample["before"].split())


@pytest.mark.parametrize(
    ("flags", "answered"),
    [
        (["--max-new-tokens", "9"], True),
        (["--max-length", "20", "--max-new-tokens", "9"], False),
        ([], False),
    ],
)
def test_generate_counts_new_tokens_or_says_that_the_prompt_leaves_none(
    trained: Path, tmp_path: Path, flags: list[str], answered: bool, station: Station
) -> None:
    """By a run that began before there was a bound of new tokens: without a flag, its prompt and
    answer have 64."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    identity = json.loads((folder / "run.json").read_text())
    del identity["config"]["sample_max_new_tokens"]
    (folder / "run.json").write_text(json.dumps(identity))
    prompt = "What does heapq.heappush do in Python, and why? " * 5
    done = station.run(
        str(folder),
        "--prompt",
        prompt,
        *flags,
        cwd=tmp_path,
        module="finetune.generate",
    )

    assert done.returncode == 0, done.stderr
    line = "gets no answer: prompt and answer together have"
    assert (len(done.stdout.strip()) > 1, done.stderr.count(line)) == (
        answered,
        int(not answered),
    )


def test_generate_answers_the_prompts_of_a_file(
    trained: Path, tmp_path: Path, station: Station
) -> None:
    samples = json.loads((trained / "samples.json").read_text())
    texts = [sample["prompt"] for sample in samples]
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    done = station.run(
        str(trained),
        "--prompts",
        str(data),
        "--json",
        cwd=trained,
        module="finetune.generate",
    )

    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["answers"]
    assert [row["prompt"] for row in rows] == texts
    assert [row["answer"] for row in rows] == [sample["after"] for sample in samples]


def test_a_chat_answers_the_questions_of_standard_input(trained: Path) -> None:
    sample = json.loads((trained / "samples.json").read_text())[0]
    command = [sys.executable, "-m", "finetune.generate", str(trained), "--chat"]
    question = " ".join(sample["prompt"].split())
    done = subprocess.run(
        [*command, "--max-new-tokens", "64"],
        input=f"{question}\n\n/new\n{question}\n",
        capture_output=True,
        text=True,
        cwd=trained,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout
    # Twice the same, because /new forgets the first question.
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert "Ctrl-D ends the chat" in done.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "one of the arguments --prompt --prompts --chat is required"),
        (["--prompt", "a", "--chat"], "--chat: not allowed with argument --prompt"),
        (["--chat", "--json"], "--json: not allowed with argument --chat"),
        (["--prompt", "a", "--top-p", "0.9"], "--top-p=0.9: needs --temperature"),
        (["--prompt", "a", "--seed", "1"], "--seed=1: needs --temperature"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature=-1.0: must be"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature=nan: must be"),
        (["--chat", "--temperature", "1", "--top-p", "0"], "--top-p=0.0: must be"),
        (["--chat", "--temperature", "1", "--seed", "-1"], "--seed=-1: must be"),
        (["--prompts", "none.txt"], "--prompts=none.txt: there is no such file"),
    ],
)
def test_generate_refuses_flags_before_a_base_is_loaded(
    flags: list[str], line: str, tmp_path: Path, station: Station
) -> None:
    done = station.run("none", *flags, cwd=tmp_path, module="finetune.generate")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_evaluate_measures_adapter_and_base_on_other_rows(
    trained: Path, tmp_path: Path, station: Station
) -> None:
    data = write_jsonl(
        tmp_path / "test.jsonl",
        [
            {
                "prompt": "What does heapq.heappush do in Python?",
                "completion": "Push item onto heap.",
            }
        ],
    )
    done = station.run(
        str(trained), "--data", str(data), cwd=tmp_path, module="finetune.evaluate"
    )

    assert done.returncode == 0, done.stderr
    header, names, loss, perplexity, accuracy, note = done.stdout.splitlines()
    assert header.startswith("1 rows")
    for stage in ("loading ", "evaluating the base", "evaluating the adapter"):
        assert stage in done.stderr
    assert note == "accuracy: of answer tokens, given the right beginning"
    assert names.split() == ["base", "adapter", "change"]
    assert float(loss.split()[2]) < float(loss.split()[1])
    assert perplexity.startswith("perplexity")
    assert accuracy.startswith("accuracy")


def test_evaluate_prints_the_same_figures_as_json(
    trained: Path, tmp_path: Path, station: Station
) -> None:
    data = write_jsonl(
        tmp_path / "test.jsonl",
        [
            {
                "prompt": "What does heapq.heappush do in Python?",
                "completion": "Push item onto heap.",
            }
        ],
    )
    arguments = (str(trained), "--data", str(data))
    table = station.run(
        *arguments, cwd=tmp_path, module="finetune.evaluate"
    ).stdout.splitlines()
    printed = station.run(
        *arguments, "--json", cwd=tmp_path, module="finetune.evaluate"
    ).stdout

    figures = json.loads(printed)
    assert described_keys("EVALUATION") == figures.keys() | {"labels", "confusion"}
    assert figures["data"] == str(data)
    assert (
        table[0]
        == f"{figures['rows']} rows, {figures['tokens']} answer tokens of {data}"
    )
    assert table[-1] == "accuracy: of answer tokens, given the right beginning"
    for line in table[2:-1]:
        name, base, adapter, _ = line.split()
        assert f"{figures['base'][name]:.4f}" == base
        assert f"{figures['adapter'][name]:.4f}" == adapter


def test_evaluates_columns_stand_apart_whatever_their_digits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluated(loss: float, perplexity: float, accuracy: float) -> SimpleNamespace:
        evaluation = SimpleNamespace(
            loss=loss,
            perplexity=perplexity,
            accuracy=accuracy,
            scores={},
            tokens=9,
            classification=None,
        )
        return SimpleNamespace(evaluation=evaluation)

    before = evaluated(10.7423, 46274.3422, 0.0)
    after = evaluated(10.0923, 24232.7889, 0.25)
    comparison = evaluate.Comparison("d.jsonl", 3, before, after)  # type: ignore[arg-type]
    evaluate._print_table(comparison)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:5]] == [
        ["base", "adapter", "change"],
        ["loss", "10.7423", "10.0923", "-6.1%"],
        ["perplexity", "46274.3422", "24232.7889", "-47.6%"],
        ["accuracy", "0.0000", "0.2500", "-"],
    ]


@pytest.mark.parametrize(
    ("base", "adapter", "cell"),
    [
        (2.0, 1.0, "-50.0%"),
        (2.0, 2.0, "+0.0%"),
        (0.0, 0.0, "-"),
        (0.0, 0.5, "-"),
        (math.inf, 2.0, "-100.0%"),
        (2.0, math.inf, "-"),
        (math.nan, 2.0, "-"),
    ],
)
def test_there_is_no_change_from_nothing(
    base: float, adapter: float, cell: str
) -> None:
    assert evaluate.change_cell(base, adapter) == cell


def test_merge_gives_the_logits_of_the_adapter_on_its_quantised_base(
    trained: Path, tmp_path: Path, station: Station
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.run.load import load_run

    exact, half = tmp_path / "float32", tmp_path / "bfloat16"
    for target in (exact, half):
        done = station.run(
            str(trained),
            "--to",
            str(target),
            "--dtype",
            target.name,
            cwd=tmp_path,
            module="finetune.merge",
        )
        assert done.returncode == 0, done.stderr
    assert "after rounding to bfloat16" in done.stdout
    assert done.stdout.splitlines()[-1] == "fine: below 10% of what the adapter changes"
    for stage in ("loading ", "merging adapter and base", "saving the merged model"):
        assert stage in done.stderr

    ids = torch.tensor(
        [
            AutoTokenizer.from_pretrained(half)(
                "What does heapq.heappush do in Python?"
            )["input_ids"]
        ]
    )
    with torch.inference_mode():
        wanted = load_run(trained).with_adapter()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(exact)
        rounded = AutoModelForCausalLM.from_pretrained(half)
        assert rounded.dtype == torch.bfloat16
        assert not hasattr(merged.config, "quantization_config")
        # In float32 the two are the same product in another order; what remains in 16 bit is
        # rounding.
        assert (merged(input_ids=ids).logits - wanted).abs().max() < 1e-4
        assert (rounded.float()(input_ids=ids).logits - wanted).abs().max() < 0.1


@pytest.mark.parametrize(
    ("exact", "rounded", "says"),
    [
        (1e-5, 0.05, "fine: below 10%"),
        (1e-5, 0.2, "not fine: rounding to float16 costs more than 10%"),
        (0.2, 0.2, "not fine: merging alone differs by more than 10%"),
        (math.nan, 0.0, "not fine: merging alone"),
        (0.0, math.nan, "not fine: rounding to float16"),
    ],
)
def test_merge_says_whether_its_difference_is_fine(
    exact: float, rounded: float, says: str
) -> None:
    assert judge_divergences(exact, rounded, 1.0, "float16").startswith(says)


@pytest.mark.slow
def test_a_merged_model_is_a_base_again(
    trained: Path, tmp_path: Path, station: Station
) -> None:
    station.run(
        str(trained),
        "--to",
        str(tmp_path / "merged"),
        cwd=tmp_path,
        module="finetune.merge",
    )
    again = station.run(
        *tiny_overrides(tmp_path / "merged"), "trainer.max_steps=1", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr


def test_a_completed_run_is_not_run_again(trained: Path, station: Station) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    again = station.run(f"resume={trained}", cwd=trained)

    assert again.returncode == 0
    assert "completed already" in again.stderr
    assert (trained / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["mine", "latest"])
def test_every_command_on_a_run_takes_its_name(
    name: str, trained: Path, tmp_path: Path, station: Station
) -> None:
    named = tmp_path / "outputs" / "runs" / "mine" / "t1"
    named.parent.mkdir(parents=True)
    named.symlink_to(trained)
    (tmp_path / "empty.jsonl").write_text("")
    resumed = station.run(f"resume={name}", cwd=tmp_path)
    generated = station.run(
        name, "--prompt", "Hi", cwd=tmp_path, module="finetune.generate"
    )
    # Refused for another reason: the run is found.
    evaluated = station.run(
        name, "--data", "empty.jsonl", cwd=tmp_path, module="finetune.evaluate"
    )
    merged = station.run(
        name, "--to", "new", "--dtype", "float32", cwd=tmp_path, module="finetune.merge"
    )

    assert "mine/t1: this run is completed already" in resumed.stderr
    assert generated.returncode == 0, generated.stderr
    assert ", the base of outputs/runs/mine/t1" in generated.stderr
    assert evaluated.stderr.startswith("error: --data=empty.jsonl: ")
    assert merged.returncode == 0, merged.stderr


def test_a_run_is_gone_on_with_only_as_it_began(
    trained: Path, station: Station
) -> None:
    before = (trained / "run.json").read_bytes()
    beside = station.run(f"resume={trained}", "lora.r=4", cwd=trained)
    same_folder = station.run("lora.r=4", f"hydra.run.dir={trained}", cwd=trained)

    assert beside.returncode == same_folder.returncode == 1
    assert "lora.r=4: resume takes no other override" in beside.stderr
    assert "has" in same_folder.stderr.splitlines()[-1]
    assert (trained / "run.json").read_bytes() == before


@pytest.mark.slow
def test_commands_work_from_another_folder_and_with_odd_names(
    tiny_base: Path, tmp_path: Path, station: Station
) -> None:
    (tmp_path / "base").symlink_to(tiny_base)
    folder = tmp_path / "ünï k=v, it's {b}"
    overrides = tiny_overrides(Path("base"))
    quoted = str(folder).replace("'", "\\'")
    done = station.run(
        *overrides, "trainer.max_steps=1", f"hydra.run.dir='{quoted}'", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()

    resumed = station.run(f"resume={folder}", cwd=tmp_path / "elsewhere")
    text = station.run(
        str(folder),
        "--prompt",
        "Hi",
        cwd=tmp_path / "elsewhere",
        module="finetune.generate",
    )

    assert "completed already" in resumed.stderr
    assert text.returncode == 0, text.stderr


def test_two_processes_never_train_in_one_folder(
    trained: Path, station: Station
) -> None:
    import fcntl

    with open(trained / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = station.run(f"resume={trained}", cwd=trained)
    assert refused.returncode == 1
    assert "another process" in refused.stderr
