"""Plan memory, tokens and time of a run or a study: `python -m finetune.plan OVERRIDES`.

Loads no weights.
"""

import argparse
import time
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

from finetune.app import compose_sweep
from finetune.compat import import_model_libraries
from finetune.config.schema import RunConfig
from finetune.console import (
    json_output,
    overrides_parser,
    quiet_libraries,
    run_command,
)
from finetune.errors import ConfigError
from finetune.model.memory import GIB
from finetune.quantities import format_duration
from finetune.run.evaluation_work import Work
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.quantization import quantization_method, resolve_quantization
from finetune.run.resources import SharedResources
from finetune.run.spreading import spread_over
from finetune.run.time_plan import TimePlan, plan_time

if TYPE_CHECKING:
    from finetune.run.plan import Plan


TRAINING_SHARE = 0.7
"""Share of the measured matrix-product speed at which training runs."""


def main() -> None:
    """Read the command line, plan the run, print the plan."""
    arguments = _parse_arguments()
    config, sweeper = compose_sweep(arguments.overrides, arguments.multirun)
    if arguments.multirun and not sweeper:
        raise ConfigError(
            "-m: plans a study; add hydra/sweeper=optuna, or leave out -m"
        )
    with json_output(arguments.json) as print_json:
        content = _plan(config, sweeper, arguments.json)
        if arguments.json:
            print_json(content)


def _plan(
    config: RunConfig, sweeper: Mapping[str, Any], as_json: bool
) -> dict[str, Any]:
    """Plan the run, print it as text unless as JSON, return what the JSON holds."""
    quiet_libraries()
    resources = SharedResources()
    # Mistakes in the rows are reported before torch is imported.
    rows = resources.rows(config.dataset)
    config = resolve_learning_rate(config, resources)
    import_model_libraries()
    from finetune.model.device import on_gpu
    from finetune.run.memory_plan import plan_memory, resolve_checkpointing
    from finetune.run.sizes import check_sizes

    config = resolve_quantization(config, resources)
    config = spread_over(config, sweeper.get("gpus_per_worker", 1))
    config = resolve_checkpointing(config, "packed", resources)
    splits = {
        "train": resources.tokens("train", rows.train, config),
        "eval": resources.tokens("eval", rows.evaluation, config),
        "test": resources.tokens("test", rows.test, config),
    }
    source = resources.source(config.model)
    check_sizes(
        config,
        source,
        resources.tokenizer(config.model),
        splits,
    )
    plan = plan_memory(config, resources)
    method = quantization_method(config, resources)
    if not as_json:
        _print_memory(plan, method)
    plan.require_room(config)
    tasks = {
        "eval": resources.task_work("eval", config),
        "test": resources.task_work("test", config),
    }
    times = plan_time(
        config,
        splits,
        plan.train_tokens,
        plan.weights,
        measure_speed(),
        on_gpu(),
        tasks,
    )
    study = _plan_study(plan, times, sweeper)
    if not as_json:
        _print_work(plan, config, times, splits, tasks)
        _print_study(study, times, sweeper)
    return {**_to_dict(plan, config, times, study), "quantization": method}


def _plan_study(
    plan: "Plan", times: TimePlan, sweeper: Mapping[str, Any]
) -> tuple[float, float] | None:
    """Return the least and the most seconds of a study; None where `n_trials` is not given."""
    if not sweeper.get("n_trials"):
        return None
    from finetune.model.device import gpu_group_count

    slots = plan.slots if sweeper["slots"] == "auto" else sweeper["slots"]
    seeds = sweeper["baseline_seeds"]
    if seeds == "auto":
        seeds = 2 if slots > 1 else 0
    workers = sweeper["n_jobs"] or gpu_group_count(sweeper["gpus_per_worker"])
    return times.study(sweeper["n_trials"], seeds, workers)


def _parse_arguments() -> argparse.Namespace:
    description = (
        "Plan memory, tokens and time of a run, or of a study with hydra/sweeper=optuna, "
        "before any weights load."
    )
    parser = overrides_parser("finetune.plan", description, "model=llama2_7b lora=r64")
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="as for a study: values that are searched are then allowed",
    )
    return parser.parse_intermixed_args()


def measure_speed() -> float:
    """Measure the floating point operations per second at which this machine trains.

    Returns:
        `TRAINING_SHARE` of the best of five measurements of a matrix product.
    """
    import torch

    from finetune.model.device import on_gpu

    # A product takes a GPU less than a millisecond, a CPU a tenth of a second.
    device, dtype, repeats = "cpu", torch.float32, 1
    if on_gpu():
        device, dtype, repeats = "cuda", torch.bfloat16, 8
    rows, width = 512, 2048
    activations = torch.randn((rows, width), device=device, dtype=dtype)
    weight = torch.randn((width, width), device=device, dtype=dtype)
    best = 0.0
    # The best of several: other processes, and the first use of a kernel, only slow it down.
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            product = activations @ weight
        # Reading a value waits until the GPU has computed it.
        float(product[0, 0])
        seconds = time.perf_counter() - start
        # Each element of the product takes `width` multiplications and additions.
        operations = repeats * 2 * rows * width**2
        best = max(best, operations / seconds)
    return TRAINING_SHARE * best


def _to_dict(
    plan: "Plan",
    config: RunConfig,
    times: TimePlan,
    study: tuple[float, float] | None,
) -> dict[str, Any]:
    """Return the plan as `--json` prints it: memory in bytes, time in seconds."""
    fullest = plan.fullest
    return {
        "memory": {
            "process": fullest.process,
            "base": fullest.base,
            "unquantized_experts": fullest.experts,
            "adapter": fullest.adapter,
            "optimizer": fullest.optimizer,
            "activations": fullest.activations.single.peak,
            "logits": fullest.activations.logits,
            "evaluation": fullest.activations.evaluating,
        },
        "need": plan.need(),
        "peak": plan.peak(),
        "available": plan.available,
        "gpus": plan.gpus,
        "further_slot": plan.further_slot,
        "largest_slots": plan.largest,
        "slots": plan.slots,
        "borrows_blocks": plan.borrows_blocks(plan.slots),
        "learning_rate": config.optimizer.learning_rate,
        "answers_together": plan.answers_together,
        "train_tokens": plan.train_tokens,
        "train_seconds": times.training,
        "evaluation_seconds": times.evaluation + times.answering,
        "evaluations": times.evaluations,
        "final_seconds": times.final,
        "run_seconds": times.run,
        "study_seconds": study,
    }


def _print_memory(plan: "Plan", method: str) -> None:
    fullest = plan.fullest
    rows = {
        "python and libraries": fullest.process,
        f"base ({method})" if method != "none" else "base": fullest.base,
        "  its experts, not quantised": fullest.experts,
        "adapter and its gradient": fullest.adapter,
        "optimizer": fullest.optimizer,
        f"activations ({max(plan.batches)} tokens)": fullest.activations.single.peak,
        "logits": fullest.activations.logits,
        "evaluation": fullest.activations.evaluating,
    }
    for name, size in rows.items():
        if size:
            print(f"{name:32}{size / GIB:8.2f} GiB")
    peak = plan.peak() / GIB
    available = plan.available / GIB
    more = peak - plan.need() / GIB
    if more:
        print(f"{'activations of more blocks':32}{more:8.2f} GiB, as memory allows")
    where = f" on the fullest of {plan.gpus} GPUs" if plan.gpus > 1 else ""
    print(f"{'peak of one run':32}{peak:8.2f} GiB of {available:.1f}{where}")


def _print_work(
    plan: "Plan",
    config: RunConfig,
    times: TimePlan,
    splits: Mapping[str, Sized],
    tasks: Mapping[str, Work],
) -> None:
    size = plan.further_slot / GIB
    slots = f"room for {plan.largest}, {plan.slots} recommended"
    print(f"{'each further slot':32}{size:8.2f} GiB: {slots}")
    if plan.gpus > 1:
        print(f"{'GPUs in a study':32}{plan.gpus:8d}: {_describe_sharing(plan)}")
    print(f"{'learning rate':32}{config.optimizer.learning_rate:8.2g}")
    training = format_duration(times.training)
    print(f"{'tokens':32}{plan.train_tokens:8d}: about {training} of training")
    # Answers may end before their limit.
    steps = tasks["eval"].steps + tasks["test"].steps
    measure = "up to" if config.evaluation.generates or steps else "about"
    if times.evaluations:
        evaluations = format_duration(times.all_evaluations)
        count = f"{measure} {evaluations} for {times.evaluations} evaluations"
        print(f"{'held-out rows':32}{len(splits['eval']):8d}: {count}")
    test = f"{measure} {format_duration(times.test)}"
    print(f"{'test rows':32}{len(splits['test']):8d}: {test}")
    documents = tasks["eval"].documents + tasks["test"].documents
    if documents:
        counts = f"{tasks['eval'].documents} with the held-out rows, the others with the test rows"
        print(f"{'documents of benchmarks':32}{documents:8d}: {counts}")
    if times.answers:
        measure = "up to"
        answers = format_duration(2 * times.answers)
        print(f"{'sample prompts':32}{'':8}  up to {answers}, before and after")
    if not plan.answers_together:
        print(f"{'answers':32}{'':8}  one prompt after another, in slots too")
    run = format_duration(times.run)
    print(f"{'the run, after loading':32}{'':8}  {measure} {run}")


def _describe_sharing(plan: "Plan") -> str:
    """Say how several GPUs share the base where the recommended slots train."""
    if plan.borrows_blocks(plan.slots):
        return "each computes all blocks for slots of its own, with borrowed weights"
    return "each computes the blocks that it has, for groups of slots in turns"


def _print_study(
    study: tuple[float, float] | None, times: TimePlan, sweeper: Mapping[str, Any]
) -> None:
    if study is not None:
        least, most = (format_duration(seconds) for seconds in study)
        trials = f"the study of {sweeper['n_trials']} trials"
        print(f"{trials:32}{'':8}  {least} (pruning saves half) to {most}")
    timeout = sweeper.get("timeout")
    if timeout:
        fitting = max(0.0, timeout - times.final - times.test) / times.training
        print(f"{'whole trials in the timeout':32}{fitting:8.1f} on each worker")


if __name__ == "__main__":
    run_command(main)
