"""Classification in whole runs: likelihoods, both engines, packs, faults, the commands."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.runs import NONE, PACKED, TRL, Tiny, final, train_in_slots

from finetune.errors import ConfigError
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run

LABELS = ("no", "none", "yes")
"""One is the beginning of another one."""


def quiet() -> RunContext:
    """Surroundings that share nothing with other tests, whose files have the same names."""
    return RunContext(resources=SharedResources(), interactive=False)


def write_csv(path: Path, count: int = 120, labels: tuple[Any, ...] = LABELS) -> Path:
    """A file of two columns, in which the text says the label."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(count):
            label = labels[number % len(labels)]
            writer.writerow([f"Row {number}: kind {number % len(labels)}", label])
    return path


@pytest.fixture
def classifying(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Configs of runs that learn to classify, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "x.csv")

    def make(*overrides: str) -> Any:
        return tiny(
            NONE, "dataset.path=x.csv", "dataset.limit=null", "evaluation=classification",
            "trainer.max_steps=8", "trainer.eval_steps=4", "optimizer.learning_rate=1e-2",
            "sample_prompts=[]", "dataset.eval_fraction=0.15", "dataset.test_fraction=0.15",
            *overrides,
        )  # fmt: skip

    return make


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    return [
        line for line in RunFolder(folder).metrics() if "eval/label_accuracy" in line
    ]


@pytest.mark.parametrize("engine", [PACKED, TRL])
def test_a_run_is_measured_by_labels(
    classifying: Tiny, tmp_path: Path, engine: str
) -> None:
    config = classifying(
        engine, "objective=eval/label_accuracy", "objective_at=best",
        "trainer.max_steps=32", "trainer.eval_steps=8",
    )  # fmt: skip

    objective = run(config, tmp_path / "run", quiet())

    result = final(tmp_path / "run")
    values = [line["eval/label_accuracy"] for line in metric_lines(tmp_path / "run")]
    assert len(values) == 5
    assert objective == max(values) > min(values)
    metrics = result["metrics"]
    assert metrics["eval/label_accuracy"] == objective
    assert result["labels"] == {label: label for label in LABELS}
    recorded = json.loads((tmp_path / "run/test_rows.json").read_text())
    rows = recorded["scores"]["label_accuracy"]["row_sums"]
    assert len(rows) == result["rows"]["test"] == 18
    assert metrics["test/label_accuracy"] == sum(rows) / 18
    for name in ("balanced_accuracy", "macro_f1"):
        assert metrics[f"test/{name}"] == recorded["scores"][name]["value"]
    classification = recorded["classification"]
    assert classification["labels"] == list(LABELS)
    pairs = zip(
        classification["references"], classification["predictions"], strict=True
    )
    assert [float(label == prediction) for label, prediction in pairs] == rows


def test_likelihoods_equal_a_plain_computation(
    classifying: Tiny, tmp_path: Path, station: Station
) -> None:
    """Each label after each prompt, one text after the other, by transformers' own model."""
    import torch

    from finetune.run.load import load_run

    run(classifying("trainer.max_steps=4"), tmp_path / "run", quiet())
    write_csv(tmp_path / "other.csv", 7)
    ended = station.run(
        "run", "--data", "other.csv", "--answers", "answers.jsonl", "--json",
        module="finetune.evaluate", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = [
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text().splitlines()
    ]

    loaded = load_run(tmp_path / "run")
    model = loaded.with_adapter()
    right = 0
    confusion = [[0] * 3 for _ in LABELS]
    for number, line in enumerate(lines):
        prompt = [{"role": "user", "content": f"Row {number}: kind {number % 3}"}]
        before = loaded.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False
        )
        likelihoods = {}
        for label in LABELS:
            answer = loaded.tokenizer(f"{label}<|im_end|>\n")["input_ids"]
            ids = torch.tensor([loaded.tokenizer(before)["input_ids"] + answer])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            logs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            likelihoods[label] = float(logs[-len(answer) :].sum())
        assert line["log_likelihoods"] == pytest.approx(likelihoods, abs=1e-4)
        best = max(likelihoods, key=likelihoods.__getitem__)
        assert line["prediction"] == best
        assert line["scores"]["label_accuracy"] == (best == LABELS[number % 3])
        right += best == LABELS[number % 3]
        confusion[number % 3][LABELS.index(best)] += 1
    printed = json.loads(ended.stdout)
    assert printed["adapter"]["label_accuracy"] == pytest.approx(right / 7)
    assert printed["labels"] == list(LABELS)
    assert printed["confusion"] == confusion


def test_the_table_of_evaluate_ends_with_the_confusion(
    classifying: Tiny, tmp_path: Path, station: Station
) -> None:
    run(classifying("trainer.max_steps=1"), tmp_path / "run", quiet())

    ended = station.run(
        "run", "--data", "x.csv", module="finetune.evaluate", cwd=tmp_path
    )
    lines = ended.stdout.splitlines()
    assert lines[-5].startswith("rows by their label")
    counts = [int(cell) for line in lines[-3:] for cell in line.split()[1:]]
    assert sum(counts) == 120

    write_csv(tmp_path / "other.csv", 7, ("no", "other"))
    refused = station.run(
        "run", "--data", "other.csv", module="finetune.evaluate", cwd=tmp_path
    )
    assert refused.returncode == 1
    assert "other.csv: row 2: its answer 'other' is none of the" in refused.stderr


def test_packed_equals_alone(classifying: Tiny, tmp_path: Path) -> None:
    configs = [classifying(f"seed={seed}", f"lora.r={4 * seed}") for seed in (1, 2, 3)]

    folders = train_in_slots(configs, tmp_path / "pack", slots=3)
    for number, config in enumerate(configs):
        run(config, tmp_path / "alone" / str(number), quiet())
        alone = metric_lines(tmp_path / "alone" / str(number))
        together = metric_lines(folders[number])
        for here, there in zip(alone, together, strict=True):
            for name in here:
                if name.startswith("eval/"):
                    assert here[name] == pytest.approx(there[name], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_packed_likelihoods_equal_those_of_the_plain_model(
    classifying: Tiny, batch_size: int
) -> None:
    """Groups with a prompt of their own, and the same rows one by one; the same twice."""
    from finetune.engine.loaded_model import LoadedModel
    from finetune.engine.packed.training import PackedTraining
    from finetune.engine.steps import drive

    resources = SharedResources()
    config = classifying(f"trainer.per_device_eval_batch_size={batch_size}")
    rows = resources.rows(config.dataset)
    labels = resources.labels(rows.train, config)
    labelled = resources.labelled_rows("eval", rows.evaluation, labels, config)
    assert labelled is not None
    candidates = labelled.candidates
    tokens = resources.tokens("train", rows.train, config)

    with resources.slot(config) as create_slot:
        training = PackedTraining(config, create_slot(), tokens, 1)
        grouped = drive(training.evaluate(candidates, 3))
        again = drive(training.evaluate(candidates, 3))
        each = [drive(training.evaluate([row])) for row in candidates]
    with resources.model(config) as model:
        plain = drive(LoadedModel(config, model).evaluate(candidates, 3))

    assert grouped == again
    alone = [evaluation.row_losses[0] for evaluation in each]
    assert grouped.row_losses == pytest.approx(alone, abs=1e-5)
    assert grouped.row_losses == pytest.approx(plain.row_losses, abs=1e-4)
    assert grouped.row_tokens == plain.row_tokens


def test_the_prompt_is_computed_once_for_all_labels() -> None:
    import torch

    from finetune.engine.packed.batch import pack_rows

    rows = []
    for prompt in (range(20), range(100, 130)):
        for answer in ([7], [8, 9], [7, 8, 9]):
            ids = [*prompt, *answer]
            rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + answer})

    batch = pack_rows([rows], torch.device("cpu"), [3])

    # Of each row the prompt's last token, and the answer but for its last token.
    assert batch.input_ids.shape[1] == 20 + 30 - 2 + 2 * (3 + 0 + 1 + 2)
    assert [span.prefix_length for span in batch.spans if span.prefix_length] == [
        *[19] * 3, *[29] * 3
    ]  # fmt: skip


@pytest.mark.parametrize("labels", [(0, 1, 2), (True, False)])
def test_integer_and_boolean_classes_are_labels(
    classifying: Tiny, tmp_path: Path, labels: tuple[Any, ...]
) -> None:
    write_csv(tmp_path / "x.csv", labels=labels)

    run(classifying("trainer.max_steps=1"), tmp_path / "run", quiet())

    assert list(final(tmp_path / "run")["labels"]) == sorted(map(str, labels))


def test_class_labels_are_known_by_their_names(
    classifying: Tiny, tmp_path: Path
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["sport", "news"]
    features = Features(text=Value("string"), label=ClassLabel(names=names))
    rows = {
        "text": [f"Text {number}" for number in range(60)],
        "label": [number % 2 for number in range(60)],
    }
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "rows")

    run(
        classifying("dataset.path=rows", "trainer.max_steps=1"),
        tmp_path / "run",
        quiet(),
    )

    assert list(final(tmp_path / "run")["labels"]) == ["news", "sport"]


@pytest.mark.parametrize(
    ("count", "labels", "says"),
    [
        (120, tuple(f"text {number}" for number in range(60)), "has different answer number 51; allowed: evaluation.max_labels=50"),
        (30, tuple(f"text {number}" for number in range(30)), "needs a small set of answers, not"),
        (60, ("one",), "needs training rows with at least two different answers"),
    ],
)  # fmt: skip
def test_what_is_no_classification_is_refused_before_the_base_loads(
    classifying: Tiny,
    tmp_path: Path,
    count: int,
    labels: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_csv(tmp_path / "x.csv", count, labels)

    def refuse(*_: object) -> None:
        raise AssertionError("the base is loaded")

    monkeypatch.setattr("finetune.model.loading.load_base", refuse)
    with pytest.raises(ConfigError) as error:
        run(classifying("dataset.eval_fraction=0.1"), tmp_path / "run", quiet())
    message = str(error.value)
    assert message.startswith("evaluation.metrics=classification: ")
    assert says in message
    assert "\n" not in message


def test_generated_metrics_and_labels_together(
    classifying: Tiny, tmp_path: Path
) -> None:
    config = classifying(
        "evaluation.metrics=[exact_match,classification]", "trainer.max_steps=1",
        "evaluation.max_new_tokens=2",
    )  # fmt: skip

    run(config, tmp_path / "run", quiet())

    metrics = final(tmp_path / "run")["metrics"]
    assert {"test/exact_match", "test/label_accuracy", "test/macro_f1"} <= set(metrics)


def test_each_source_has_its_scores(classifying: Tiny, tmp_path: Path) -> None:
    write_csv(tmp_path / "y.csv", 60, ("yes", "no"))
    config = classifying("dataset.path=[x.csv,y.csv]", "trainer.max_steps=1")

    run(config, tmp_path / "run", quiet())

    metrics = final(tmp_path / "run")["metrics"]
    for source in ("x", "y"):
        for name in ("label_accuracy", "balanced_accuracy", "macro_f1"):
            assert f"eval/{source}/{name}" in metrics
