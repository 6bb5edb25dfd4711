"""A slot's weights by the device of their layers: the layers of a base may be on several GPUs.

The optimizer has one flat vector on one device. Products read the weights, and write the gradients,
on the device of the layer.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Section:
    """The weights of consecutive layers on one device."""

    span: slice
    """Where they are in the slot's vector."""
    parameters: Sequence[torch.Tensor]
    """The model's parameters in this section."""
    weights: torch.Tensor
    """As products read them [parameters]; a view of the vector where it can be."""
    gradient: torch.Tensor
    """Float32 [parameters]; a view of the slot's gradient where it can be."""
    copies_weights: bool
    """Whether `weights` is a copy of the vector's."""
    copies_gradient: bool
    """Whether `gradient` has to be copied into the slot's."""


def make_sections(
    vector: torch.Tensor,
    gradient: torch.Tensor,
    dtype: torch.dtype,
    parameters: Sequence[torch.Tensor],
    devices: Sequence[torch.device],
    slot_device: torch.device,
) -> list[Section]:
    """Divide a slot's vector into sections.

    Args:
        vector: All weights, float32 [parameters].
        gradient: Their gradient, float32 [parameters].
        dtype: Of products.
        parameters: The model's parameters, in the order of the vector.
        devices: Of the layer of each.
        slot_device: Of the vector.
    """
    sections = []
    start = 0
    pairs = zip(devices, parameters, strict=True)
    for device, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        section_parameters = [parameter for _, parameter in group]
        stop = start + sum(parameter.numel() for parameter in section_parameters)
        span = slice(start, stop)
        is_elsewhere = device != slot_device
        weights = vector[span]
        section_gradient = gradient[span]
        copies_weights = is_elsewhere or dtype != vector.dtype
        if copies_weights:
            weights = torch.empty_like(weights, dtype=dtype, device=device)
        if is_elsewhere:
            section_gradient = torch.zeros_like(section_gradient, device=device)
        section = Section(
            span=span,
            parameters=section_parameters,
            weights=weights,
            gradient=section_gradient,
            copies_weights=copies_weights,
            copies_gradient=is_elsewhere,
        )
        sections.append(section)
        start = stop
    return sections
