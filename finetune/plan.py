"""What a run will need, before any weights load: `python -m finetune.plan` with the run's overrides."""

import math

from finetune.app import compose_run
from finetune.console import command_parser, run_command
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.memory_plan import GIB, plan_memory, resolve_checkpointing
from finetune.run.resources import SharedResources


def main() -> None:
    """Read the command line, plan, print."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("overrides", nargs="*", help="as python -m finetune takes them")
    config = compose_run(parser.parse_intermixed_args().overrides)
    from finetune.console import quiet_libraries

    quiet_libraries()
    resources = SharedResources()
    config = resolve_checkpointing(resolve_learning_rate(config, resources), "packed", resources)
    found = plan_memory(config, resources)
    gib = {
        "python and libraries": found.process,
        "base": found.base,
        "adapter and its gradient": found.adapter,
        "optimizer": found.optimizer,
        f"activations ({max(found.batches)} tokens)": found.activations,
        "logits": found.logits,
        "evaluation": found.evaluation,
    }
    for name, amount in gib.items():
        if amount:
            print(f"{name:32}{amount / GIB:8.2f} GiB")
    print(f"{'peak of one run':32}{found.peak() / GIB:8.2f} GiB of {found.available / GIB:.1f}")
    found.require_room(config)
    further = (found.peak(3) - found.peak(2)) / GIB  # the second also brings what only several keep
    print(f"{'each further slot':32}{further:8.2f} GiB: room for {found.largest}, {found.slots} worth having")
    print(f"{'learning rate':32}{config.optimizer.learning_rate:8.2g}")
    seconds = found.train_tokens * 4 * found.weights / speed()
    print(f"{'tokens':32}{found.train_tokens:8d}: about {max(1, math.ceil(seconds / 60))} min of training")


def speed() -> float:
    """What this machine multiplies, in floating point operations a second, as training does it."""
    import time

    import torch

    from finetune.model.device import on_gpu

    device, dtype = ("cuda", torch.bfloat16) if on_gpu() else ("cpu", torch.float32)
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((512, 2048), (2048, 2048)))
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(8):
            product = left @ right
        float(product[0, 0])
        best = max(best, 8 * 2 * 512 * 2048**2 / (time.perf_counter() - began))
    return 0.7 * best


if __name__ == "__main__":
    run_command(main)
