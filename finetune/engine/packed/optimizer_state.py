"""The state of a slot's optimizer as the tensors of a file, and back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune.files.atomic import name_file_in_errors
from finetune.model.device import HostCopy, copy_stream_after

NUMBERS = "numbers"
"""The metadata's key of a state's values that are no tensors, as JSON."""

ON_HOST = "on_host"
"""The metadata's key of the tensors that stay in host memory, as JSON."""


def save_state(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    path: Path,
    event: "torch.cuda.Event | None",
) -> None:
    """Write an optimizer's state into a safetensors file.

    It is copied to the host first, which waits only for the GPU work that was queued before the
    event.

    Args:
        optimizer: Its parameters are named by their position, a single one by nothing.
        tensors: Further tensors of the file.
        path: The file.
        event: Recorded after the last update; None on a CPU.
    """
    contents = dict(tensors)
    numbers: dict[str, Any] = {}
    on_host: list[str] = []
    for prefix, parameter in _named_parameters(optimizer):
        for name, value in optimizer.state[parameter].items():
            key = f"{prefix}{name}"
            if not isinstance(value, torch.Tensor):
                numbers[key] = value
                continue
            contents[key] = value
            if value.device.type == "cpu":
                # bitsandbytes shares its table of 8-bit values between parameters.
                contents[key] = value.clone()
                on_host.append(key)
    total = sum(value.nbytes for value in contents.values())
    with copy_stream_after(event):
        copies = {key: HostCopy(value, total) for key, value in contents.items()}
    contents = {key: copy.read() for key, copy in copies.items()}
    metadata = {NUMBERS: json.dumps(numbers), ON_HOST: json.dumps(on_host)}
    with name_file_in_errors(path):
        save_file(contents, path, metadata)


def load_state(
    optimizer: torch.optim.Optimizer, names: set[str], path: Path
) -> dict[str, torch.Tensor]:
    """Read an optimizer's state from a file of `save_state`.

    Args:
        optimizer: A new one of the same class, with the same parameters.
        names: The further tensors of the file.
        path: The file.

    Returns:
        The further tensors that the file has, on the CPU.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    numbers = json.loads(metadata.get(NUMBERS, "{}"))
    # A file of an earlier version has AdamW's state alone, all of it beside the weights.
    on_host = set(json.loads(metadata.get(ON_HOST, "[]")))
    others = {name: tensors.pop(name) for name in names & tensors.keys()}
    states: dict[str, dict[str, Any]] = {}
    devices = {prefix: p.device for prefix, p in _named_parameters(optimizer)}
    for key, value in (tensors | numbers).items():
        prefix, name = _split(key)
        if isinstance(value, torch.Tensor) and key not in on_host:
            value = value.to(devices[prefix])
        states.setdefault(prefix, {})[name] = value
    for prefix, parameter in _named_parameters(optimizer):
        # Empty if all steps before the checkpoint were skipped: there is no state by then.
        if prefix in states:
            optimizer.state[parameter] = states[prefix]
    return others


def _named_parameters(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each parameter with the prefix of its names in a file."""
    parameters: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for position, parameter in enumerate(parameters):
        yield f"{position}." if len(parameters) > 1 else "", parameter


def _split(key: str) -> tuple[str, str]:
    position, dot, name = key.rpartition(".")
    return f"{position}{dot}", name
