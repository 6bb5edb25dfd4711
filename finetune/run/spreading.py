"""Over how many GPUs a run spreads its base, where its config leaves that open.

Loads torch only inside functions: `sweeps.study.session` imports this module at its top.
"""

import dataclasses

from finetune.config.schema import RunConfig


def spread_over(config: RunConfig, gpus: int) -> RunConfig:
    """Return a config whose `trainer.gpus=auto` is decided.

    Args:
        config: The run's config.
        gpus: How many the process of the run has for it.

    Returns:
        The config with a number; as it is where it has one, for one GPU, and on a CPU.
    """
    if config.trainer.gpus != "auto" or gpus == 1:
        return config
    from finetune.model.device import on_gpu

    if not on_gpu():
        return config
    return _with_gpus(config, gpus)


def with_visible_gpus(config: RunConfig) -> RunConfig:
    """Return a config with no more GPUs than this process sees."""
    if config.trainer.gpus in ("auto", 1):
        return config
    import torch

    visible = max(1, torch.cuda.device_count())
    return _with_gpus(config, min(int(config.trainer.gpus), visible))


def _with_gpus(config: RunConfig, gpus: int) -> RunConfig:
    trainer = dataclasses.replace(config.trainer, gpus=gpus)
    return dataclasses.replace(config, trainer=trainer)
