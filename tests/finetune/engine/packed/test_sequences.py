"""Sequences of several rows in a slot: as TRL trains on them, and their rows apart."""

from pathlib import Path

import pytest
from support.runs import Tiny, final, interrupt_and_resume, losses, train_in_slots

from finetune.run.context import RunContext
from finetune.run.run import run

PACKING = (
    "dataset.packing=true",
    "dataset.max_length=128",
    "dataset.limit=60",
    "dataset.eval_fraction=0.2",
    "trainer.max_steps=20",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "trainer.per_device_train_batch_size=2",
    "sample_prompts=[]",
)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(
            ("quantization=none", "trainer.gradient_accumulation_steps=2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_trains_as_with_trl(
    tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    for engine in ("trl", "packed"):
        config = tiny(*PACKING, *overrides, f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert len(losses(tmp_path / "packed")) == 20
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
    there, here = final(tmp_path / "trl"), final(tmp_path / "packed")
    assert (there["engine"], here["engine"]) == ("trl", "packed")
    assert here["train_tokens"] == there["train_tokens"]
    for name in ("eval/loss", "eval/accuracy"):
        assert here["metrics"][name] == pytest.approx(there["metrics"][name], rel=1e-4)


def test_slots_with_and_without_packing_train_as_alone(
    tiny: Tiny, tmp_path: Path
) -> None:
    configs = [
        tiny(*PACKING, "lora.dropout=0.1"),
        tiny(*PACKING, "dataset.packing=false", "lora.dropout=0.1"),
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(together[0]) != pytest.approx(losses(together[1]), rel=1e-3)


def test_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*PACKING, "trainer.max_steps=6")
    run(config, tmp_path / "whole", RunContext(interactive=False))
    interrupt_and_resume(config, tmp_path / "resumed", step=3)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_a_sequence_is_its_rows() -> None:
    from finetune.engine.evaluation import Evaluation
    from finetune.engine.packed.sequences import evaluation_of_sequences, rows_of

    sequence = {
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [-100, 2, 3, -100, 5],
        "seq_lengths": [3, 2],
    }
    alone = {"input_ids": [6, 7], "labels": [6, 7], "seq_lengths": [2]}
    assert rows_of([sequence, alone]) == [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [-100, 5]},
        {"input_ids": [6, 7], "labels": [6, 7]},
    ]
    rows = Evaluation(
        row_losses=(1.0, 2.0, 4.0), row_tokens=(2, 1, 1), row_correct=(1, 0, 1)
    )
    whole = evaluation_of_sequences(rows, [sequence, alone])
    assert whole.row_losses == (3.0, 4.0)
    assert whole.row_tokens == (3, 1)
    assert whole.row_correct == (1, 1)
