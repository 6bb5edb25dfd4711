"""NEFTune in a slot: noise of each row's own size and each slot's own stream."""

import contextlib
from pathlib import Path

import pytest
from support.runs import Tiny, interrupt_and_resume, losses, train_in_slots

from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run

SHORT = (
    "trainer.max_steps=8",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)
NOISE = "+trainer.extra.neftune_noise_alpha"


def test_noise_has_the_size_of_neftune(tiny: Tiny) -> None:
    """As transformers draws it: uniform, at most alpha / sqrt(tokens x hidden size)."""
    from finetune.engine.packed.batch import pack_rows
    from finetune.engine.packed.embedding_noise import embedding_noise
    from finetune.engine.packed.requests import ForwardBackward

    config = tiny("quantization=none")
    bank = SharedResources().bank(config)
    rows = [
        {"input_ids": ids, "labels": ids}
        for ids in (list(range(2, 50)), list(range(2, 15)))
    ]
    slots = [bank.slots.create(config.lora, seed) for seed in (0, 1)]
    requests = [
        ForwardBackward(slot, rows, 1.0, dropout_step=3, noise_alpha=alpha)
        for slot, alpha in zip(slots, (5.0, None), strict=True)
    ]
    batch = pack_rows([rows, rows], bank.device, [1, 1])
    embedding = bank.base.get_input_embeddings()
    plain = embedding(batch.input_ids)
    with embedding_noise(bank.base, requests, batch):
        noise = (embedding(batch.input_ids) - plain)[0]
    assert embedding(batch.input_ids).equal(plain)
    hidden_size = plain.shape[-1]
    start = 0
    for row in rows:
        tokens = len(row["input_ids"])
        largest = 5 / (tokens * hidden_size) ** 0.5
        drawn = noise[start : start + tokens - 1]
        assert float(drawn.abs().max()) == pytest.approx(largest, rel=0.02)
        assert float(drawn.std()) == pytest.approx(largest / 3**0.5, rel=0.05)
        start += tokens - 1
    assert not noise[start:].any()


def test_each_seed_and_each_batch_has_noise_of_its_own(tiny: Tiny) -> None:
    from finetune.engine.packed.batch import pack_rows
    from finetune.engine.packed.embedding_noise import embedding_noise
    from finetune.engine.packed.requests import ForwardBackward

    config = tiny("quantization=none")
    bank = SharedResources().bank(config)
    rows = [{"input_ids": [*range(2, 30)], "labels": [*range(2, 30)]}]
    slots = [bank.slots.create(config.lora, seed) for seed in (0, 1)]
    batch = pack_rows([rows, rows], bank.device, [1, 1])
    drawn: set[float] = set()
    for batch_number in (1, 2, 1):
        requests = [
            ForwardBackward(slot, rows, 1.0, batch_number, noise_alpha=5.0)
            for slot in slots
        ]
        with embedding_noise(bank.base, requests, batch):
            noisy = bank.base.get_input_embeddings()(batch.input_ids)[0]
        tokens = len(noisy) // 2
        drawn |= {float(noisy[:tokens].sum()), float(noisy[tokens:].sum())}
    assert len(drawn) == 4


def test_a_slot_has_the_noise_that_it_has_alone(tiny: Tiny, tmp_path: Path) -> None:
    configs = [
        tiny(*SHORT, f"{NOISE}=50", "seed=1"),
        tiny(*SHORT, "seed=1"),
        tiny(*SHORT, f"{NOISE}=50", "seed=2", "lora.dropout=0.1"),
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    found = []
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        found.append(losses(alone))
        assert losses(together[number]) == pytest.approx(found[-1], rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-4)


def test_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*SHORT, f"{NOISE}=50", "trainer.gradient_accumulation_steps=2")
    run(config, tmp_path / "whole", RunContext(interactive=False))
    interrupt_and_resume(config, tmp_path / "resumed", step=3)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")


def test_trls_noise_does_not_outlive_a_failed_run(tiny: Tiny) -> None:
    """Its hook would change the next run on the same base."""
    config = tiny(f"{NOISE}=5", "quantization=none")
    resources = SharedResources()
    lent = contextlib.ExitStack()
    embedding = lent.enter_context(resources.model(config)).get_input_embeddings()
    with pytest.raises(RuntimeError), lent:
        raise RuntimeError
    assert resources.bank(config).base.get_input_embeddings() is not embedding


@pytest.mark.parametrize("value", ["0", "-1", "true", "much"])
def test_refuses_in_one_line(tiny: Tiny, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny(f"{NOISE}={value}")
    assert str(refused.value).startswith("trainer.extra.neftune_noise_alpha=")
