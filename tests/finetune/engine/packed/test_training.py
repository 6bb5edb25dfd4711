"""The packed engine: equal to TRL and to itself alone, blind to a sick neighbour; adapters,
gradients, resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose, tiny_overrides
from support.runs import final, losses, train_in_slots

from finetune.config.schema import RunConfig
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run, run_steps

Tiny = Callable[..., RunConfig]

STEPS = 20
"""More than three epochs."""
SHORT = (
    f"trainer.max_steps={STEPS}",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)


def adapter(folder: Path) -> Any:
    """All adapter weights of a run in one vector."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "quantization=none",
            "trainer.group_by_length=true",
            "optimizer.weight_decay=0.1",
        ),
        (
            "trainer.gradient_accumulation_steps=3",
            "trainer.per_device_train_batch_size=2",
            "lora.use_rslora=true",
        ),
        pytest.param(
            (
                "quantization=fp4",
                "lora/target=q_v",
                "optimizer.lr_scheduler_type=linear",
                "optimizer.max_grad_norm=0",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: ",".join(overrides) or "default",
)
def test_equals_trl(tiny: Tiny, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    for engine in ("trl", "packed"):
        run(tiny(*SHORT, *overrides, f"trainer.engine={engine}"), tmp_path / engine)
    theirs, ours = losses(tmp_path / "trl"), losses(tmp_path / "packed")
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-5)
    one, other = adapter(tmp_path / "trl"), adapter(tmp_path / "packed")
    assert float((one - other).norm() / one.norm()) < 1e-4
    there, here = final(tmp_path / "trl"), final(tmp_path / "packed")
    assert (there["engine"], here["engine"]) == ("trl", "packed")
    assert here["metrics"]["eval/loss"] == pytest.approx(
        there["metrics"]["eval/loss"], rel=1e-4
    )
    assert here["train_tokens"] == there["train_tokens"]


EIGHT = [
    ("lora.r=4", "optimizer.learning_rate=1e-3", "lora.dropout=0.1"),
    ("lora.r=64", "lora.alpha=8", "lora.dropout=0.05", "seed=1"),
    (
        "trainer.per_device_train_batch_size=2",
        "lora.dropout=0.3",
        "optimizer.lr_scheduler_type=linear",
    ),
    ("trainer.max_steps=12", "lora/target=q_v", "lora.dropout=0.1", "seed=2"),
    (
        "trainer.gradient_accumulation_steps=2",
        "lora.use_rslora=true",
        "lora.dropout=0.2",
    ),
    (
        "optimizer.learning_rate=1e-4",
        "lora.target_modules=[down_proj]",
        "lora.dropout=0.1",
        "trainer.max_steps=17",
    ),
    (
        "trainer.group_by_length=true",
        "lora.dropout=0.15",
        "seed=3",
        "optimizer.weight_decay=0.1",
    ),
    (
        "trainer.per_device_train_batch_size=6",
        "lora.r=1",
        "lora.alpha=4",
        "lora.dropout=0.01",
        "seed=4",
    ),
]


@pytest.fixture(scope="module")
def eight_alone(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The folders of the eight runs, each trained with nobody beside it."""
    folder = tmp_path_factory.mktemp("alone")
    for number, overrides in enumerate(EIGHT):
        config = compose(*tiny_overrides(tiny_base), *SHORT, *overrides)
        run(config, folder / str(number), RunContext(interactive=False))
    return [folder / str(number) for number in range(len(EIGHT))]


@pytest.mark.parametrize(
    "slots", [*(pytest.param(slots, marks=pytest.mark.slow) for slots in (2, 3)), 8]
)
def test_equals_itself_alone(
    tiny: Tiny, eight_alone: list[Path], tmp_path: Path, slots: int
) -> None:
    """With 2 and 3 slots trials join late and leave early."""
    configs = [tiny(*SHORT, *overrides) for overrides in EIGHT]
    packed = train_in_slots(configs, tmp_path, slots)
    for number, (config, lonely, place) in enumerate(
        zip(configs, eight_alone, packed, strict=True)
    ):
        assert losses(place) == pytest.approx(losses(lonely), rel=1e-5), EIGHT[number]
        there, here = final(lonely), final(place)
        assert here["metrics"]["eval/loss"] == pytest.approx(
            there["metrics"]["eval/loss"], rel=1e-4
        )
        assert len(losses(place)) == config.trainer.max_steps
        assert (here["engine"], here["slots"], there["slots"]) == ("packed", slots, 1)
        assert here["companions"]
        assert there["companions"] == []


def test_a_sick_neighbour_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """To the last bit while it stays in the pack: its loss is no number there as well."""
    healthy = [
        tiny(*SHORT, "seed=1", "lora.dropout=0.1"),
        tiny(*SHORT, "lora.r=4", "seed=2"),
    ]
    rates = ("1e-4", "1e30")
    found = []
    for rate in rates:
        sick = tiny(
            *SHORT,
            f"optimizer.learning_rate={rate}",
            "optimizer.max_grad_norm=0",
            "trainer.max_steps=20",
        )
        places = [tmp_path / rate / str(number) for number in range(3)]
        found.append(together_step_by_step([healthy[0], sick, healthy[1]], places))
    well, ill = found
    assert any(
        loss != loss or loss == float("inf") for loss in ill[1]
    )  # it is no number at last
    assert ill[0] == well[0]
    assert ill[2] == well[2]


def together_step_by_step(
    configs: list[RunConfig], places: list[Path]
) -> list[list[float]]:
    """The losses of runs in one pack by the engine alone: nothing ends a run that has diverged."""
    from finetune.engine.packed.training import PackedTraining

    resources = SharedResources()
    rows = resources.rows(configs[0].dataset).train
    slots = [
        resources.bank(config).slots.create(config.lora, config.seed)
        for config in configs
    ]
    trainings = [
        PackedTraining(
            config,
            slot,
            resources.tokens("train", rows, config),
            config.trainer.max_steps,
        )
        for config, slot in zip(configs, slots, strict=True)
    ]
    bank = slots[0].bank
    recorders = [Recorder() for _ in configs]
    works = [
        training.train(recorder, RunFolder(place), None)  # type: ignore[arg-type]
        for training, recorder, place in zip(trainings, recorders, places, strict=True)
    ]
    requests = [next(work) for work in works]
    for _ in range(19):
        requests = [
            work.send(answer)
            for work, answer in zip(works, bank.execute(requests), strict=True)
        ]
    return [recorder.losses for recorder in recorders]


class Recorder:
    """As much of a reporter as the engine asks for; it never stops a run."""

    is_checkpoint_due = False

    def __init__(self) -> None:
        from finetune.engine.checkpoint import Progress

        self.progress, self.losses = Progress(), list[float]()

    def live(self) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def begin(self) -> Any:
        yield from ()

    def report_step(self, step: int, loss: float, **_: Any) -> Any:
        self.progress.step = step
        self.losses.append(loss)
        yield from ()


def test_a_diverged_trial_fails_alone(tiny: Tiny, tmp_path: Path) -> None:
    from finetune.errors import Diverged
    from sweeps.study.pack import PackedRun, train_together

    resources, ended = SharedResources(), []

    def guarded(config: RunConfig, place: Path) -> Any:
        try:
            yield from run_steps(
                config,
                RunFolder(place),
                RunContext(resources=resources, interactive=False),
            )
        except Diverged as error:
            ended.append(str(error))

    configs = [tiny(*SHORT, "seed=1"), tiny(*SHORT, "optimizer.learning_rate=1e30")]
    places = [tmp_path / "well", tmp_path / "sick"]
    lanes = [
        PackedRun(p.name, guarded(c, p), tmp_path / f"{p.name}.log", set())
        for c, p in zip(configs, places, strict=True)
    ]
    train_together(lambda: lanes.pop() if lanes else None, 2)
    assert "training diverged" in ended[0]
    assert final(places[1])["status"] == "failed"
    run(configs[0], tmp_path / "alone", RunContext(interactive=False))
    assert losses(places[0]) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


@pytest.mark.parametrize(
    "quantization",
    ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "int8"))],
)
def test_saved_adapters_are_plain_pefts_at_their_true_rank(
    tiny: Tiny, tmp_path: Path, quantization: str
) -> None:
    import torch
    from peft import PeftModel

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    ranks = (4, 16, 3)
    configs = [
        tiny(
            f"quantization={quantization}",
            "trainer.max_steps=6",
            f"lora.r={rank}",
            "lora.dropout=0.1",
        )
        for rank in ranks
    ]
    places = train_in_slots(configs, tmp_path, 3)
    for config, place, rank in zip(configs, places, ranks, strict=True):
        base = load_base(find_base(config.model), config)
        model = PeftModel.from_pretrained(base, place / "adapter").eval()
        assert model.peft_config["default"].r == rank
        resources = SharedResources()
        slot = resources.bank(config).slots.create(config.lora, config.seed)
        from finetune.model.adapter import load_adapter

        load_adapter(slot.model, place / "adapter")
        ids = torch.arange(40).reshape(2, 20)
        with (
            torch.no_grad(),
            slot.bank.backends.autograd.adapted_rows([slot]) as spoken,
        ):
            ours = spoken(input_ids=ids).logits
            theirs = model(input_ids=ids).logits
        assert float((ours - theirs).abs().max()) < 1e-4
        assert float((ours - base(input_ids=ids).logits).abs().max()) < 10


def test_gradients_are_autograds(tiny: Tiny) -> None:
    """The packed linear layer in float64: of its input by gradcheck, of the adapters against plain
    autograd."""
    import torch

    from finetune.engine.packed.lora_linear import Adapter, SlotTokens, lora_linear

    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 5).double().requires_grad_(False)
    x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    anchor = torch.zeros((), requires_grad=True)

    weights = [
        (
            torch.randn(rank, 6, dtype=torch.float64),
            torch.randn(5, rank, dtype=torch.float64),
        )
        for rank in (2, 3)
    ]
    gradients = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in weights]
    stretches = [
        SlotTokens(
            3, 0.4, Adapter(number, 0.5 + number, a, b, ga, gb), start, stop, draw
        )
        for number, ((a, b), (ga, gb), (start, stop, draw)) in enumerate(
            zip(weights, gradients, ((0, 4, 7), (4, 9, None)), strict=True)
        )
    ]
    assert torch.autograd.gradcheck(
        lambda x: lora_linear(x, anchor, None, layer, stretches), (x,)
    )
    for ga, gb in gradients:
        ga.zero_()
        gb.zero_()
    slope = torch.randn(1, 9, 5, dtype=torch.float64)
    lora_linear(x, anchor, None, layer, stretches).backward(slope)
    plain = [
        (a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in weights
    ]
    rows = x.detach()[0]
    y = torch.nn.functional.linear(rows, layer.weight, layer.bias)
    parts = []
    for stretch, (a, b) in zip(stretches, plain, strict=True):
        own = rows[stretch.start : stretch.stop]
        dropped = stretch.dropout_mask(own)
        parts.append(
            stretch.scaling
            * (own if dropped is None else own * ~dropped)
            @ a.t()
            @ b.t()
        )
    (y + torch.cat(parts)).backward(slope[0])
    for (ga, gb), (a, b) in zip(gradients, plain, strict=True):
        assert torch.allclose(ga, a.grad)
        assert torch.allclose(gb, b.grad)
    kept = ~stretches[0].dropout_mask(torch.ones(2000, 6))
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.02)


def test_what_follows_the_last_answer_is_not_computed() -> None:
    import torch

    from finetune.engine.packed.batch import pack_rows, packed_length

    asked = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, -100]}
    learnt = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    line = pack_rows([[asked], [learnt]], torch.device("cpu"))
    assert line.input_ids.tolist() == [[5, 6, 1, 2]]
    assert line.position_ids.tolist() == [[0, 1, 0, 1]]
    assert line.prediction_positions.tolist() == [1, 2, 3]
    assert line.targets.tolist() == [7, 2, 3]
    assert packed_length([asked]) == 2
    assert packed_length([learnt]) == 2
