"""On a GPU: what the CPU's tests can't see. python -m pytest -m gpu"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_cli
from support.configs import compose, tiny_overrides
from support.runs import final, losses, train_in_slots, write_jsonl

from finetune.config.schema import RunConfig
from finetune.run.resources import SharedResources
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
pytestmark = pytest.mark.gpu
STEPS = (
    "trainer.max_steps=30",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)
RATES = ("3e-5", "1e-3", "1e-2")


@pytest.fixture(scope="module")
def wide_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for a GPU's memory to be its weights and activations."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "base"
    shapes = {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=32000, dtype=torch.bfloat16, **shapes)
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """Rows of about 600 tokens."""
    rows = [
        {"text": " ".join(f"word {number * row}" for number in range(120))}
        for row in range(40)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def wide_overrides(wide_base: Path, tiny_base: Path, long_rows: Path) -> list[str]:
    """Overrides of a run on the wide base that does nothing but train."""
    return [
        *tiny_overrides(tiny_base),
        f"model.name_or_path={wide_base}",
        f"dataset.path={long_rows}",
        "dataset.limit=40",
        "trainer.eval_steps=0",
        "sample_prompts=[]",
    ]


def by(one: Any, other: Any) -> float:
    """How far losses are from others, relatively, at most."""
    return max(abs(mine / theirs - 1) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("saves", "dtype"),
    [("true", "bfloat16"), ("false", "bfloat16"), ("false", "float16")],
)
def test_the_decoder_by_hand_is_the_base_with_autograd(
    tiny: Tiny, saves: str, dtype: str, monkeypatch: Any
) -> None:
    import torch

    from finetune.engine.packed.gpu.decoder import Decoder
    from finetune.engine.packed.requests import ForwardBackward

    computed = f"quantization.bnb_4bit_compute_dtype={dtype}"
    config = tiny(
        "lora.dropout=0",
        "lora.r=16",
        f"trainer.gradient_checkpointing={saves}",
        computed,
    )
    found = []
    for by_hand in (True, False):
        with monkeypatch.context() as patched:
            if not by_hand:
                patched.setattr(
                    "finetune.engine.packed.backends.gpu_decoder", lambda *_: None
                )
            resources = SharedResources()
            bank = resources.bank(config)
            assert isinstance(bank.backends.current, Decoder) is by_hand
            slots = [bank.slots.create(config.lora, seed) for seed in range(3)]
        torch.manual_seed(1)
        for slot in slots:
            slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
        rows = list(
            resources.tokens("train", resources.rows(config.dataset).train, config)
        )
        parts = [rows[:2], rows[2:3], rows[3:6]]
        learnt = bank.forward_backward(
            [
                ForwardBackward(slot, own, 0.1, 1)
                for slot, own in zip(slots, parts, strict=True)
            ]
        )
        found.append(
            ([one.loss for one in learnt], [slot.gradient.clone() for slot in slots])
        )
    (ours, gradients), (theirs, expected) = found
    assert by(ours, theirs) < 1e-3
    for one, other in zip(gradients, expected, strict=True):
        assert (
            float((one - other).norm() / other.norm()) < 0.05
        )  # bfloat16 on both sides


@pytest.fixture(scope="module")
def deep_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight blocks, whose head is no copy of its embedding."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("deep") / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saves", ["true", "false"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_base_on_two_gpus_is_the_base_on_one(
    tiny: Tiny, deep_base: Path, by_hand: bool, saves: str, monkeypatch: Any
) -> None:
    """Slots of one pass on a GPU, in groups on two, and each of them alone on two."""
    import torch

    from finetune.engine.packed.gpu.decoder import Decoder

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if not by_hand:
        monkeypatch.setattr(
            "finetune.engine.packed.backends.gpu_decoder", lambda *_: None
        )
    results = []
    for gpus, together in ((1, True), (2, True), (2, False)):
        config = tiny(
            f"model.name_or_path={deep_base}",
            "lora.r=16",
            "lora.dropout=0.1",
            f"trainer.gradient_checkpointing={saves}",
            f"trainer.gpus={gpus}",
        )
        resources = SharedResources()
        bank = resources.bank(config)
        assert len({weight.device for weight in bank.base.parameters()}) == gpus
        results.append(_train_slots(config, resources, bank, together))
        assert isinstance(bank.backends.current, Decoder) is by_hand
    (expected, gradients), *others = results
    for figures, computed in others:
        assert by(figures, expected) < 5e-3
        for one, other in zip(computed, gradients, strict=True):
            assert float((one - other).norm() / other.norm()) < 0.08


def _train_slots(
    config: RunConfig, resources: SharedResources, bank: Any, together: bool
) -> tuple[list[float], list[Any]]:
    """Train five slots for two steps, evaluate them and let them answer."""
    import torch

    from finetune.engine.encoded_prompts import EncodedPrompts
    from finetune.engine.packed.requests import Evaluate, ForwardBackward, Generate

    rows = list(resources.tokens("train", resources.rows(config.dataset).train, config))
    slots = [bank.slots.create(config.lora, seed) for seed in range(5)]
    torch.manual_seed(1)
    for slot in slots:
        slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
    losses = []
    gradients = []
    for step in (1, 2):
        passes = [ForwardBackward(slot, rows[:3], 0.1, step) for slot in slots]
        groups = [passes] if together else [[request] for request in passes]
        for group in groups:
            losses += [result.loss for result in bank.forward_backward(group)]
        gradients += [slot.gradient.cpu() for slot in slots]
        for slot in slots:
            slot.vector.sub_(slot.gradient, alpha=0.1)
    evaluations = [Evaluate(slot, rows[3:6]) for slot in slots]
    groups = [evaluations] if together else [[request] for request in evaluations]
    for group in groups:
        for result in bank.evaluate(group):
            losses += result.row_losses
    prompts = EncodedPrompts([[5, 9, 30], [7, 70]], [6, 4], [], 1)
    answers = bank.generate([Generate(slot, prompts) for slot in slots])
    assert [[len(tokens) for tokens in run] for run in answers] == [[6, 4]] * 5
    return losses, gradients


@pytest.mark.usefixtures("fresh_cache")
def test_a_run_on_two_gpus_and_its_adapter_on_one(
    tiny: Tiny, deep_base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import torch

    import finetune

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = tiny(f"model.name_or_path={deep_base}", "trainer.gpus=2", *STEPS)
    folder = tmp_path / "run"
    # Or the process would see as many GPUs as its first run has.
    monkeypatch.setattr("finetune.model.device._has_selected", True)
    run(config, folder)
    trained = losses(folder)
    assert trained[-1] < trained[0]
    answers = []
    for count in (2, 1):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "device_count", lambda count=count: count)
            loaded = finetune.load(folder)
            answers.append(loaded.generate(["a"], max_new_tokens=4))
            del loaded
    assert answers[0] == answers[1]


def test_the_host_works_while_the_gpu_computes(tiny: Tiny) -> None:
    """It begins and ends runs: an adapter is fetched without waiting for the pass that others'
    batches take."""
    import torch

    from finetune.engine.packed.requests import ForwardBackward
    from finetune.model.device import record_event

    config = tiny("lora.r=16")
    resources = SharedResources()
    bank, busy = resources.bank(config), []
    one, other = (bank.slots.create(config.lora, seed) for seed in (0, 1))
    rows = list(resources.tokens("train", resources.rows(config.dataset).train, config))
    request = ForwardBackward(one, rows[:2], 0.1, 1)
    bank.execute([request])
    with other.weights_on_cpu(
        record_event(bank.device)
    ):  # kernels, a stream, memory to copy by: what comes first waits for the GPU
        pass
    trained = [weight for weight in other.model.parameters() if weight.requires_grad]
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second or more
    other.vector.fill_(7)
    mark = record_event(bank.device)
    torch.cuda._sleep(8_000_000_000)

    def meanwhile() -> None:
        busy.append(not torch.cuda.current_stream().query())
        with other.weights_on_cpu(mark):
            busy.append(
                all(
                    weight.device.type == "cpu" and bool((weight == 7).all())
                    for weight in trained
                )
            )
        busy.append(not torch.cuda.current_stream().query())
        time.sleep(1)

    (learnt,) = bank.execute([request], meanwhile)
    assert learnt.seconds < 0.5, "the host's work is counted too"
    assert busy == [True, True, True], (
        "waits for the pass, or does not wait for what was before it"
    )
    assert all(weight.device.type == "cuda" for weight in trained)


def test_a_checkpoint_is_written_while_the_gpu_computes(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Its copies wait for the slot's last update, not for what others have queued since."""
    import torch
    from safetensors.torch import load_file

    from finetune.engine.packed.gradient_norms import GradientNorm
    from finetune.engine.packed.optimizer import STATE, SlotOptimizer
    from finetune.model.device import record_event

    config = tiny("lora.r=16")
    bank = SharedResources().bank(config)
    slot = bank.slots.create(config.lora, 0)
    optimizer = SlotOptimizer(config, slot, 10)
    slot.gradient.fill_(1e-3)
    optimizer.update(slot.gradient, GradientNorm.of(slot.gradient), 1e-3)
    folders = tmp_path / "first", tmp_path / "second"
    # A stream, memory to copy by: what comes first waits for the GPU.
    optimizer.save(folders[0], record_event(slot.device))
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second or more
    slot.vector.fill_(7)
    mark = record_event(slot.device)
    torch.cuda._sleep(8_000_000_000)
    optimizer.save(folders[1], mark)
    assert not torch.cuda.current_stream().query(), "waits for others' work"
    first, second = (load_file(folder / STATE) for folder in folders)
    assert bool((second["weights"] == 7).all()), "does not wait for its own work"
    assert not bool((first["weights"] == 7).any())
    assert torch.equal(first["exp_avg"], second["exp_avg"])
    assert torch.equal(first["exp_avg"], optimizer_state(optimizer, "exp_avg"))


def optimizer_state(optimizer: Any, name: str) -> Any:
    (state,) = optimizer._optimizer.state.values()
    return state[name].cpu()


def test_slots_of_the_same_seed_copy_the_same_pinned_weights(tiny: Tiny) -> None:
    import torch

    from finetune.model.adapter import add_adapter

    config = tiny("lora.r=16")
    bank = SharedResources().bank(config)
    models = [bank.adapters.create(config.lora, 0) for _ in range(2)]
    first, second = (
        [weight for weight in model.parameters() if weight.requires_grad]
        for model in models
    )
    assert all(weight.is_pinned() for weight in first)
    assert first[0].data_ptr() == second[0].data_ptr()
    slots = [bank.slots.create(config.lora, 0, model) for model in models]
    alone = add_adapter(bank.adapters._skeleton(), config.lora, 0)
    weights = [weight for weight in alone.parameters() if weight.requires_grad]
    expected = torch.cat([weight.detach().flatten() for weight in weights])
    slots[0].vector.add_(1)
    slots.append(bank.slots.create(config.lora, 0))
    for slot in slots[1:]:
        assert torch.equal(slot.vector.cpu(), expected)
    assert torch.equal(slots[0].vector.cpu(), expected + 1)


def test_packed_is_alone_as_closely_as_alone_is_itself_in_batches_of_another_shape(
    tiny: Tiny, tmp_path: Path
) -> None:
    """In bfloat16: a trial in a pack, alone, and alone with its batches cut in two; and the
    trials' order."""
    configs = [
        tiny(*STEPS, f"optimizer.learning_rate={rate}", "lora.dropout=0")
        for rate in RATES
    ]
    halves = (
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=2",
    )
    cut = [
        tiny(*STEPS, *halves, f"optimizer.learning_rate={rate}", "lora.dropout=0")
        for rate in RATES
    ]
    packed = train_in_slots(configs, tmp_path / "packed", 3)
    alone = train_in_slots(configs, tmp_path / "alone", 1)
    other = train_in_slots(cut, tmp_path / "cut", 1)
    for one, own, half in zip(packed, alone, other, strict=True):
        assert by(losses(one), losses(own)) <= max(
            2 * by(losses(half), losses(own)), 1e-3
        )
    for places in (alone, other):
        assert ranking(places) == ranking(packed)


def ranking(places: list[Path]) -> list[int]:
    """Runs from the best to the worst."""
    ends = [final(place)["metrics"]["eval/loss"] for place in places]
    return sorted(range(len(ends)), key=ends.__getitem__)


@pytest.mark.parametrize("engine", ["trl", "packed"])
@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "int8", "none"])
def test_a_run_learns(
    tiny: Tiny, tmp_path: Path, engine: str, quantization: str
) -> None:
    chosen = (
        f"trainer.engine={engine}",
        f"quantization={quantization}",
        "optimizer.learning_rate=1e-2",
    )
    run(tiny("trainer.max_steps=20", "sample_prompts=[Hello]", *chosen), tmp_path)
    result = final(tmp_path)
    assert result["status"] == "completed"
    assert result["engine"] == engine
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert json.loads((tmp_path / "samples.json").read_text())


def test_both_engines_learn_alike(tiny: Tiny, tmp_path: Path) -> None:
    for engine in ("trl", "packed"):
        run(
            tiny(*STEPS, f"trainer.engine={engine}", "lora.dropout=0"),
            tmp_path / engine,
        )
    assert by(losses(tmp_path / "packed"), losses(tmp_path / "trl")) < 0.02


def test_the_published_recipe_trains(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"<s>[INST] What is {n}? [/INST] It is {n}.</s>"} for n in range(48)
    ]
    data = write_jsonl(tmp_path / "guanaco.jsonl", rows)
    recipe = (
        "experiment=llama2_guanaco",
        f"model.name_or_path={tiny_base}",
        f"dataset.path={data}",
        "tracker=none",
    )
    run(compose(*recipe), tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"


@pytest.fixture
def little_memory() -> Iterator[Callable[[float], None]]:
    """Lets this process take so many bytes of the GPU's memory."""
    import torch

    from finetune.model.memory import free_memory

    def limit(size: float) -> None:
        free_memory()
        torch.cuda.set_per_process_memory_fraction(
            size / torch.cuda.get_device_properties(0).total_memory
        )

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_too_little_memory_makes_the_pack_smaller_and_loses_no_run(
    wide_base: Path,
    tiny_base: Path,
    long_rows: Path,
    tmp_path: Path,
    little_memory: Callable[[float], None],
) -> None:
    overrides = wide_overrides(wide_base, tiny_base, long_rows)
    more = [
        "trainer.max_steps=3",
    ]
    configs = [compose(*overrides, *more, f"seed={seed}") for seed in range(6)]
    resources = SharedResources()
    (alone,) = train_in_slots(configs[:1], tmp_path / "alone", 1, resources)
    little_memory(2.2 * final(alone)["peak_memory_bytes"])
    places = train_in_slots(configs, tmp_path / "packed", 6, resources)
    assert all(final(place)["status"] == "completed" for place in places)
    assert resources.bank(configs[0]).capacity in range(1, 6)


@pytest.mark.parametrize("saves", ["true", "false"])
@pytest.mark.parametrize("slots", [1, 4])
def test_the_plan_is_the_measured_peak(
    wide_base: Path,
    tiny_base: Path,
    long_rows: Path,
    tmp_path: Path,
    slots: int,
    saves: str,
) -> None:
    """Within 10 %."""
    import torch

    from finetune.model.memory import free_memory
    from finetune.run.memory_plan import plan_memory

    overrides = wide_overrides(wide_base, tiny_base, long_rows)
    more = [
        "trainer.max_steps=6",
    ]
    saving = f"trainer.gradient_checkpointing={saves}"
    configs = [
        compose(*overrides, *more, saving, f"seed={seed}") for seed in range(slots)
    ]
    planned = plan_memory(configs[0], SharedResources()).peak(slots)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    train_in_slots(configs, tmp_path / "runs", slots)
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_blocks_are_stored_as_memory_allows_and_change_nothing(
    wide_base: Path,
    tiny_base: Path,
    long_rows: Path,
    tmp_path: Path,
    little_memory: Callable[[float], None],
) -> None:
    """The plan is within 10 % of the peak, whatever the memory is."""
    import torch

    from finetune.model.memory import USABLE, free_memory
    from finetune.run.memory_plan import plan_memory

    config = compose(
        *wide_overrides(wide_base, tiny_base, long_rows),
        "trainer.gradient_checkpointing=partial",
        # Too many tokens for a recorded pass, which stores the fewest blocks.
        "trainer.per_device_train_batch_size=20",
        "trainer.max_steps=3",
    )
    need = plan_memory(config, SharedResources()).need()
    peaks, results = [], []
    for number, size in enumerate((1.05 * need / USABLE, 2.5 * need, 100 * 2**30)):
        little_memory(size)
        planned = plan_memory(config, SharedResources()).peak()
        torch.cuda.reset_peak_memory_stats()
        (place,) = train_in_slots([config], tmp_path / str(number), 1)
        measured = torch.cuda.max_memory_allocated()
        assert planned == pytest.approx(measured, rel=0.1)
        assert measured < size
        peaks.append(measured)
        results.append(losses(place))
        free_memory()
    assert peaks[0] < peaks[1] < peaks[2]
    assert results[0] == results[1] == results[2]


def test_a_study_trains_in_slots(tiny_base: Path, tmp_path: Path) -> None:
    study = (
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.study_name=s",
    )
    more = (
        "trainer.max_steps=8",
        "trainer.eval_steps=2",
        "sample_prompts=[]",
        "hydra.sweep.dir=s",
    )
    done = run_cli(*study, *tiny_overrides(tiny_base), *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = [
        json.loads(file.read_text())
        for file in (tmp_path / "s" / "trials").glob("*/result.json")
    ]
    assert len(results) == 6
    assert all(result["status"] in ("completed", "pruned") for result in results)
    assert {result["engine"] for result in results} == {"packed"}
    assert max(result["slots"] for result in results) > 1
    assert (tmp_path / "s" / "report.html").is_file()
    merged = run_cli("s/best", "--to", "merged", module="finetune.merge", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_generate_the_tokens_of_launched_ones(
    tiny: Tiny, dtype: str, monkeypatch: Any
) -> None:
    import torch

    from finetune.data.types import Prompt
    from finetune.engine import recorded_steps
    from finetune.engine.encoded_prompts import encode_prompts
    from finetune.engine.packed.requests import Generate

    config = tiny(f"quantization.bnb_4bit_compute_dtype={dtype}", "lora.r=16")
    resources = SharedResources()
    bank = resources.bank(config)
    texts = ("Hm?", "What does math.gcd do in Python, and why?", "Sea, or not?")
    requests = []
    torch.manual_seed(1)
    for seed in range(3):
        slot = bank.slots.create(config.lora, seed)
        slot.vector.add_(torch.randn_like(slot.vector), alpha=0.05)
        prompts = encode_prompts(
            bank.base,
            resources.tokenizer(config.model),
            [Prompt(text) for text in texts],
            max_new_tokens=40 + 20 * seed,
            max_length=None,
            variables=None,
            sampling=None,
        )
        requests.append(Generate(slot, prompts))
    recorded: list[bool] = []
    recorder = recorded_steps.recorder

    def counting() -> Callable[[Callable[[], None]], Callable[[], None]]:
        recorded.append(True)
        return recorder()

    monkeypatch.setattr(recorded_steps, "recorder", counting)
    bank.generate(requests)
    memory = torch.cuda.memory_reserved()
    answers = bank.generate(requests)
    assert recorded
    # What was recorded has given its memory back.
    for _ in range(4):
        assert bank.generate(requests) == answers
    assert torch.cuda.memory_reserved() <= memory + 2**23
    recorded_steps._unrecordable.add(bank.base)
    recorded.clear()

    launched = bank.generate(requests)

    assert not recorded
    if dtype == "float32":
        assert answers == launched
    else:
        # Attention adds in another order: near ties may be decided otherwise.
        agreeing = []
        for mine, theirs in zip(answers, launched, strict=True):
            pairs = zip(mine, theirs, strict=True)
            agreeing += [one[:8] == other[:8] for one, other in pairs]
        assert sum(agreeing) >= len(agreeing) - 2


def test_after_a_recording_that_failed_another_one_succeeds() -> None:
    import torch

    from finetune.engine.graph_pool import GraphPool, end_recording

    number = torch.zeros(1, device="cuda")

    def waiting() -> None:
        number.add_(1)
        number.item()

    with pytest.raises(RuntimeError, match="captur"):
        GraphPool().record(waiting)
    end_recording()

    replay = GraphPool().record(lambda: number.add_(1))  # type: ignore[arg-type, return-value]
    replay()
    replay()

    assert float(number) == 2
    # It draws, and its unused memory can be returned.
    assert torch.rand(3, device="cuda").isfinite().all()
    torch.cuda.empty_cache()


def test_a_recording_outlives_garbage_with_another_one() -> None:
    """The garbage collector would end the other one in the middle of it, which CUDA refuses."""
    import gc

    import torch

    from finetune.engine.graph_pool import GraphPool

    number = torch.zeros(1, device="cuda")
    cycle: list[Any] = [GraphPool().record(lambda: number.mul_(2))]  # type: ignore[arg-type, return-value]
    cycle.append(cycle)
    garbage = [cycle]
    del cycle
    thresholds = gc.get_threshold()
    pool = GraphPool()

    def launch() -> None:
        garbage.clear()
        gc.set_threshold(1)
        # Objects that the collector counts.
        number.add_(len([[] for _ in range(100)]))

    try:
        replay = pool.record(launch)
    finally:
        gc.set_threshold(*thresholds)
    replay()
    assert number.item() == 100
