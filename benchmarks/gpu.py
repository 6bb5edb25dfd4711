"""Tokens a second and memory of QLoRA on a GPU: this project's slots against TRL and Unsloth, on
published models' shapes.

    python benchmarks/gpu.py [--sides ours,trl,best,unsloth] [--slots 1,2,4,8,16,auto]
                             [--shapes llama2_7b,…] [--length short,long,turns]
                             [--checkpointing off,on,partial] [--lora q_v,all_linear]
                             [--quantization nf4] [--memory GIB] [--gpus N] [--busy] [--tiny]

The base has random weights in NF4 (or nf4_double, as Unsloth always has it), products are in
bfloat16. Rows have random tokens, all of which the loss counts: short ones 128 to 512 tokens (mean
about 350), long ones 2,048, turns 16 to 112 (mean about 64). Batch 4, AdamW in 32 bits. Tokens are
counted without padding. 24 steps come before those that are measured; where passes are recorded 400
do, and at least 48 are measured. `q_v` is r 64 with dropout 0.1, `all_linear` r 16 without.

`ours` is the engine `packed` with so many slots; `auto` is what `slots=auto` would choose, and
`planned` what `finetune.plan` says of its memory. `trl` is SFTTrainer as it is; `best` is the best
that can be made of it: Liger's kernels, and no padding, with PyTorch's attention within boundaries
put in for flash-attn. `unsloth` runs where Unsloth is installed, and alone, as it changes the
other libraries. The share of the roofline is of this GPU's rate for a bfloat16 matrix product, at
4 operations a weight and token (6 with checkpointing on; with partial `ours` computes more than
the 4). `--memory` lets no more than so many GiB be used of each GPU. `--gpus` spreads the base
over so many: `ours` as a pipeline, for `trl` and `best` by accelerate's `dispatch_model`, as
transformers does it by its device map. `--busy` profiles some more steps of `ours`: how long a
step takes, how long the GPU computes of that, in ms, and how often the host launches something.
`--tiny` is a dry run with a small model, on a CPU too.
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_base import (
    DEVICE,
    DTYPE,
    GPU,
    SEED,
    SIZES,
    attention_within_bounds,
    make_base,
    shapes,
    tokenizer,
    write_checkpoint,
)

from finetune.config.sections.trainer import Checkpointing

WARM = 24
"""Steps before the clock starts: a matrix product's kernel is loaded when its shape is first met,
which takes milliseconds."""

WARM_RECORDED = 400
"""The same of `ours` where passes are recorded: a size that larger recorded passes compute gets a
recording of its own late. In a simulation, 0 to 1 of 50 steps record a size from here on."""

STEPS_RECORDED = 48
"""Steps that are measured there, at least: they take milliseconds."""

PROFILED = 12
"""Steps that `--busy` profiles: the first ones are faster, as a GPU that has waited is below its
power limit."""

CHECKPOINTING: dict[str, Checkpointing] = {
    "off": False,
    "on": True,
    "partial": "partial",
}
"""Values of `trainer.gradient_checkpointing`; for other sides than `ours`, partial is on."""

UNCUT = ("eval_fraction=0", "test_fraction=0", "max_length=null")
LORA = {
    "q_v": ["lora=r64", "lora/target=q_v", "lora.dropout=0.1"],
    "all_linear": ["lora=r16"],
}


def main() -> None:
    """Measure each side in turn and print one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", default="ours,trl,best")
    parser.add_argument("--slots", default="1,2,4,8,16,auto")
    parser.add_argument("--shapes", default="llama2_7b", help=", ".join(SIZES))
    parser.add_argument("--length", default="short")
    parser.add_argument("--checkpointing", default="off,on")
    parser.add_argument("--lora", default="q_v,all_linear")
    parser.add_argument(
        "--quantization",
        default="nf4",
        choices=["nf4", "nf4_double"],
        help="of all but Unsloth's",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--memory", type=float, metavar="GIB")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--turns",
        action="store_true",
        help="several GPUs compute their blocks in turns, where they would borrow others' too",
    )
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.shapes = "tiny"
    if "unsloth" in arguments.sides:
        if arguments.sides != "unsloth":
            parser.error("--sides unsloth: alone, as it changes the other libraries")
        import unsloth  # noqa: F401  before what it changes
    import finetune.model.device  # noqa: F401  before the GPU is used: it says how memory is taken, on all sides

    if GPU and arguments.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        fraction = min(1.0, arguments.memory * 2**30 / total)
        for number in range(arguments.gpus):
            torch.cuda.set_per_process_memory_fraction(fraction, number)
    peak, sustained = matmul_rate()
    device = torch.cuda.get_device_name() if GPU else "CPU"
    rates = (
        f"matrix product {peak / 1e12:.1f} TFLOP/s, for a while {sustained / 1e12:.1f}"
    )
    print(f"{device}, {arguments.quantization}, {rates}", flush=True)
    columns = "| shapes | side | rows | LoRA | checkpointing | slots | tokens/s | of the roofline | peak memory, GiB | planned |"
    if arguments.busy:
        columns += " ms a step | GPU computes, ms | launches |"
    print(columns)
    print("|---" * (columns.count("|") - 1) + "|", flush=True)
    for name in arguments.shapes.split(","):
        for side in arguments.sides.split(","):
            for checkpointing in arguments.checkpointing.split(","):
                measure_side(arguments, name, side, CHECKPOINTING[checkpointing], peak)


def measure_side(
    arguments: argparse.Namespace,
    name: str,
    side: str,
    saving: Checkpointing,
    peak: float,
) -> None:
    """Print the lines of a side, all on one base."""
    base = None
    all_slots = arguments.slots.split(",") if side == "ours" else ["1"]
    kinds = itertools.product(
        arguments.length.split(","), arguments.lora.split(","), all_slots
    )
    for length, lora, slots in kinds:
        case = Case(
            name,
            side,
            lora,
            length,
            saving,
            slots,
            arguments.quantization,
            arguments.steps,
            arguments.busy,
            arguments.gpus,
            arguments.turns,
        )
        if side == "ours" and base is not None:
            bank: Any = base
            if bank.backends.current.borrows_blocks != case.borrows_blocks:
                base = bank = None
                free()
        if base is None:
            base = case.base()
        case.measure(base, peak)
    del base
    free()


def free() -> None:
    """Give memory back, and count its peak anew."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)


class Case:
    """One line of the table."""

    def __init__(
        self,
        name: str,
        side: str,
        lora: str,
        length: str,
        saving: Checkpointing,
        slots: str,
        quantization: str,
        steps: int,
        busy: bool,
        gpus: int,
        turns: bool = False,
    ) -> None:
        self.name = name
        self.gpus = gpus
        self.busy = busy and side == "ours"
        tiny = name == "tiny"
        self.saving: Checkpointing
        self.side, self.lora, self.length, self.saving, self.quantization = (
            side,
            lora,
            length,
            saving,
            quantization,
        )
        self.warm, self.steps = WARM, steps
        self.rows = make_rows(length, tiny)
        self.planned = ""
        self.profiled = ""
        """What `--busy` adds to the line."""
        self.slots = 1 if slots == "auto" else int(slots)
        self.borrows_blocks = False
        if not tiny and slots != "auto" and self.slots < 4 and gpus == 1:
            self.steps *= 4 // self.slots
        if side == "ours":
            plan = self.plan_memory()
            if turns:
                plan = replace(plan, borrowing=())
            if slots == "auto":
                self.slots = plan.slots
            self.borrows_blocks = plan.borrows_blocks(self.slots)
            recorded = plan.fullest.recorded
            if recorded is not None and recorded.size(plan.tokens(self.slots)):
                self.warm = WARM_RECORDED
                self.steps = max(self.steps, STEPS_RECORDED)
            self.planned = f"{plan.peak(self.slots) / 2**30:.1f}"

    def config(self, seed: int = SEED, *more: str) -> Any:
        """The run's config, as a command line has it."""
        from finetune.app import compose_run

        base = (
            f"quantization={self.quantization}",
            f"trainer.gradient_checkpointing={str(self.saving).lower()}",
            f"trainer.gpus={self.gpus}",
        )
        steps = (
            f"trainer.max_steps={self.warm + self.steps + PROFILED + 1}",
            "trainer.save_steps=0",
            "optimizer.learning_rate=1e-3",
        )
        return compose_run([*LORA[self.lora], *base, f"seed={seed}", *steps, *more])

    def plan_memory(self) -> Any:
        """What `finetune.plan` says of such a run: it reads no weights, so here are none."""
        from finetune.run.memory_plan import plan_memory
        from finetune.run.resources import SharedResources

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shapes(self.name).save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            (folder / "model.safetensors").touch()
            texts = [
                " ".join(f"w{number}" for number in row["input_ids"])
                for row in self.rows
            ]
            (folder / "rows.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
            more = (
                f"model.name_or_path={folder}",
                f"dataset.path={folder / 'rows.jsonl'}",
            )
            return plan_memory(
                self.config(SEED, *more, *(f"dataset.{key}" for key in UNCUT)),
                SharedResources(),
            )

    def base(self) -> Any:
        """A fresh base as the side has it."""
        if self.side == "unsloth":
            return None
        base = make_base(self.name, self.quantization == "nf4_double", self.gpus)
        if self.side != "ours":
            return dispatch(base, self.gpus)
        from finetune.engine.packed.bank import Bank
        from finetune.model.layer_devices import move_inputs
        from finetune.model.quantization import dequantize_base

        if self.gpus > 1:
            move_inputs(base)
        dequantize_base(base, self.config())
        return Bank(base, self.config(), borrows_blocks=self.borrows_blocks)

    def measure(self, base: Any, peak: float) -> None:
        """Print the line."""
        from finetune.errors import is_out_of_memory_error
        from finetune.model.memory import peak_memory_bytes

        free()
        words = {value: word for word, value in CHECKPOINTING.items()}
        saved = words[self.saving]
        line = f"| {self.name} | {self.side} | {self.length} | {self.lora} | {saved} | {self.slots} |"
        try:
            run = {"ours": ours, "unsloth": unsloth}.get(self.side, trl)
            rate, weights = run(base, self)
        except RuntimeError as error:
            if not is_out_of_memory_error(error):
                raise
            print(f"{line} out of memory | | | {self.planned} |", flush=True)
            return
        memory = peak_memory_bytes() / 2**30 if GPU else 0.0
        recomputes = self.saving is True or (self.saving and self.side != "ours")
        share = rate * (6 if recomputes else 4) * weights / peak
        print(
            f"{line} {rate:.0f} | {share:.0%} | {memory:.1f} | {self.planned} |{self.profiled}",
            flush=True,
        )


def dispatch(base: Any, gpus: int) -> Any:
    """Let accelerate's hooks take the inputs of modules to their GPU."""
    if gpus == 1:
        return base
    from accelerate import dispatch_model

    return dispatch_model(base, base.gpu_of)


def make_rows(length: str, tiny: bool) -> list[dict[str, list[int]]]:
    """256 rows of random tokens."""
    draw = random.Random(SEED)
    rows = []
    for _ in range(256):
        tokens = 2048
        if length == "short":
            tokens = min(512, max(128, round(draw.gauss(350, 110))))
        elif length == "turns":
            tokens = min(112, max(16, round(draw.gauss(64, 20))))
        ids = [
            draw.randrange(3, 32000) for _ in range(tokens // 16 if tiny else tokens)
        ]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def matmul_rate() -> tuple[float, float]:
    """Operations a second of a matrix product of the base's shape: the best of some, and where
    they go on for a while.

    A GPU at its power limit is slower than one that has just begun.
    """
    shape, rounds = ((8192, 4096, 11008), 200) if GPU else ((512, 512, 1024), 10)
    left, right = (
        torch.randn(sides, device=DEVICE, dtype=DTYPE)
        for sides in (shape[:2], shape[1:])
    )
    rates = []
    for _ in range(rounds):
        synchronize()
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        synchronize()
        rates.append(
            10 * 2 * shape[0] * shape[1] * shape[2] / (time.perf_counter() - began)
        )
    return max(rates), statistics.median(rates[rounds // 2 :])


def synchronize() -> None:
    """Wait for the GPUs."""
    if GPU:
        for number in range(torch.cuda.device_count()):
            torch.cuda.synchronize(number)


def weights_of(model: torch.nn.Module) -> int:
    """That a token is multiplied by: of a mixture's experts those that it is sent to."""
    from finetune.model.experts import expert_modules
    from finetune.run.expert_costs import expert_shape

    weights = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weights += module.in_features * module.out_features
    experts = expert_shape(model, 1)
    if experts is not None:
        each = experts.hidden * (experts.up + experts.inner)
        weights += len(expert_modules(model)) * experts.pairs * each
    return weights


class Counter:
    """Stands where one run's reporter does, and counts the trained tokens."""

    is_checkpoint_due = False

    def __init__(self) -> None:
        from finetune.engine.checkpoint import Progress

        self.progress = Progress()
        self.tokens: list[int] = []
        """Of each step that was reported."""

    def live(self) -> Any:
        """Nothing is shown."""
        return nullcontext()

    def begin(self) -> Iterator[Any]:
        """Nothing is measured first."""
        yield from ()

    def report_step(self, *, tokens: int, **_: object) -> Iterator[Any]:
        """A step was taken."""
        self.tokens.append(tokens)
        self.progress.step += 1
        yield from ()


def trained_tokens(counters: list[Counter], first: int, steps: int) -> int:
    """Tokens of some steps of all slots, from a number on."""
    return sum(sum(counter.tokens[first : first + steps]) for counter in counters)


def stored_tokens(rows: list[dict[str, list[int]]]) -> Any:
    """Rows as a run has them: in a file on disk."""
    import numpy
    import pyarrow

    from finetune.data.token_file import Tokens, TokenWriter
    from finetune.data.token_report import TokenReport

    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenWriter(Path(folder))
        writer.write(pyarrow.RecordBatch.from_pydict(columns))
        writer.finish(numpy.arange(len(rows)), TokenReport())
        return Tokens.load(Path(folder))


def ours(bank: Any, case: Case) -> tuple[float, int]:
    """Tokens a second of so many runs in slots of one bank, optimizer included."""
    with ExitStack() as stack:
        return train_in_slots(bank, case, stack), weights_of(bank.base)


def train_in_slots(bank: Any, case: Case, stack: ExitStack) -> float:
    """Tokens a second; the stack's end leaves the slots to the next case."""
    from finetune.engine.packed.training import PackedTraining

    data = stored_tokens(case.rows)
    counters = [Counter() for _ in range(case.slots)]
    bank.capacity = None  # an earlier case may not have fitted
    works = []
    for seed, counter in enumerate(counters):
        config = case.config(seed)
        slot = bank.slots.create(config.lora, seed)
        stack.callback(bank.slots.remove, slot)
        training = PackedTraining(
            config,
            slot,
            data,
            case.steps + case.warm + PROFILED + 2,
        )
        works.append(training.train(counter, None, None))  # type: ignore[arg-type]
    requests: list[Any] = [next(work) for work in works]

    def step() -> None:
        response = bank.execute(requests)
        for answer in response:
            if isinstance(answer, Exception):
                raise answer
        if bank.capacity is not None:
            raise torch.OutOfMemoryError("out of memory for so many at once")
        requests[:] = [
            work.send(answer) for work, answer in zip(works, response, strict=True)
        ]

    for _ in range(case.warm):
        step()
    synchronize()
    began = time.perf_counter()
    for _ in range(case.steps):
        step()
    synchronize()
    seconds = time.perf_counter() - began
    # A step is reported when the next one has been queued.
    step()
    tokens = trained_tokens(counters, case.warm, case.steps)
    if case.busy and GPU:
        busy, launches = profile_steps(step)
        wall = 1000 * seconds / case.steps
        case.profiled = f" {wall:.1f} | {busy:.1f} | {launches} |"
    return tokens / seconds


def profile_steps(step: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds that the GPU computes in a step, and launches of a step, on average."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        synchronize()
    nanoseconds = launches = 0
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA:
            nanoseconds += event.duration_ns()
        else:
            launches += "Launch" in event.name()
    return nanoseconds / 1e6 / PROFILED, launches // PROFILED


def trl(base: Any, case: Case) -> tuple[float, int]:
    """Tokens a second of one run by SFTTrainer."""
    from finetune.model.adapter import add_adapter

    weights = weights_of(base)
    arguments: dict[str, Any] = {}
    if case.side == "best":
        if GPU:
            base.config._attn_implementation = attention_within_bounds()
        arguments = {"use_liger_kernel": GPU, "padding_free": True}
    model = add_adapter(base, case.config().lora, SEED)
    try:
        return train(model, case, arguments), weights
    finally:
        model.unload()
        base.__dict__.pop("forward", None)  # TRL wraps it anew for each run


def unsloth(base: Any, case: Case) -> tuple[float, int]:
    """Tokens a second of one run by Unsloth, which loads a folder."""
    from unsloth import FastLanguageModel

    lora = case.config().lora
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), case.name)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=4096, dtype=DTYPE, load_in_4bit=True
        )
    weights = weights_of(model)
    targets = ["q_proj", "v_proj"]
    if case.lora == "all_linear":
        targets += ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
        use_gradient_checkpointing="unsloth" if case.saving else False,
    )  # fmt: skip
    free()  # what was written and loaded is no part of its training's peak
    return train(model, case, {}), weights


def train(model: Any, case: Case, arguments: dict[str, Any]) -> float:
    """Tokens a second of SFTTrainer, with further arguments."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    seen: list[tuple[float, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            synchronize()
            seen.append((time.perf_counter(), counted[0]))

    counted = [0]
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=case.steps + case.warm, bf16=GPU, use_cpu=not GPU,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=bool(case.saving),
            optim="adamw_torch_fused", learning_rate=1e-4,
            logging_steps=100, report_to="none", save_strategy="no", max_length=None, seed=SEED,
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, **arguments,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(case.rows), processing_class=tokenizer(),
            callbacks=[Watch()],
        )  # fmt: skip
        collate: Callable[[Any], Any] = trainer.data_collator

        def counting(rows: Any) -> Any:
            counted[0] += sum(len(row["input_ids"]) for row in rows)
            return collate(rows)

        trainer.data_collator = counting
        trainer.train()
    (first, before), (last, after) = seen[case.warm - 1], seen[-1]
    return (after - before) / (last - first)


if __name__ == "__main__":
    main()
