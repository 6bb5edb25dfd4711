"""The experts of a mixture: where a model has them, and products with their weights in any format.

transformers keeps the experts of a layer as tensors [experts, out, in], and its own products need
all of them in 16 bits. Here the 4-bit experts that have tokens are dequantised, a few at a time.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

BLOCK = 64
"""4-bit weights that have a common scale."""

DENSE_BYTES = 256 * 2**20
"""Most bytes of dequantised experts at once, but for a single expert that is larger."""

ROUTERS = re.compile(r"Router|Gating$|MoE\w*Gate$")
"""In the names of classes that choose experts."""

ALIGNMENT = 16
"""Bytes that the rows of a matrix must be a multiple of for PyTorch's grouped product."""


def expert_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that hold the experts of a layer, by name.

    They are those that transformers computes by an interchangeable function. A few architectures
    (Llama 4, DBRX) have experts that only their own code computes.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }


def router_layers(model: torch.nn.Module) -> set[str]:
    """Return the names of the linear layers that choose experts: neither adapted nor quantised.

    Most routers are no linear layers at all.
    """
    names = set()
    routers: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if ROUTERS.search(type(module).__name__):
            routers += (f"{name}.",)
        # Parents come before their submodules.
        if isinstance(module, torch.nn.Linear) and f"{name}.".startswith(routers):
            names.add(name)
    return names


def weight_names(experts: Any) -> tuple[str, str]:
    """Return the names of the two weights of experts: into them, out of them."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


class ExpertWeight:
    """One of the weights of a layer's experts, in 4 bits or not."""

    def __init__(self, experts: Any, name: str) -> None:
        """Look the weight up.

        Args:
            experts: The module that holds the experts.
            name: One of `weight_names`.
        """
        self._weight: Any = getattr(experts, name)
        self._state: Any = getattr(self._weight, "quant_state", None)
        self._stored: Any = self._weight if self._state is None else self._state
        self._is_transposed: bool = experts.is_transposed
        self.bias: torch.Tensor | None = None
        """[experts, out]."""
        if experts.has_bias:
            self.bias = getattr(experts, f"{name}_bias")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products."""
        dtype: torch.dtype = self._stored.dtype
        return dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, inputs and outputs."""
        experts, rows, columns = self._stored.shape
        if self._is_transposed:
            return experts, rows, columns
        return experts, columns, rows

    def multiply(
        self, rows: torch.Tensor, counts: Sequence[int], backward: bool
    ) -> torch.Tensor:
        """Multiply the rows of each expert by its matrix, without bias.

        Args:
            rows: Sorted by expert: [pairs, in], in the backward pass [pairs, out].
            counts: Rows of each expert.
            backward: Multiply by the transposed matrices.

        Returns:
            [pairs, out], in the backward pass [pairs, in].
        """
        rows = rows.to(self.dtype)
        _, inputs, outputs = self.shape
        width = inputs if backward else outputs
        output = rows.new_empty(len(rows), width)
        start = 0
        for matrices, rows_of_each in self._chunks(counts):
            stop = start + sum(rows_of_each)
            if self._is_transposed == backward:
                matrices = matrices.transpose(-2, -1)
            part = output[start:stop]
            _multiply_groups(rows[start:stop], matrices, rows_of_each, part)
            start = stop
        return output

    def dense(self) -> torch.Tensor:
        """Return the matrices of all experts [experts, …], as they are stored."""
        if self._state is None:
            weight: torch.Tensor = self._weight
            return weight
        return self._dequantize(range(self.shape[0]))

    def _chunks(
        self, counts: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
        """Yield matrices of experts [experts, …] as they are stored, and their numbers of rows."""
        if self._state is None:
            yield self._weight, counts
            return
        used = [expert for expert, count in enumerate(counts) if count]
        _, inputs, outputs = self.shape
        size = max(1, DENSE_BYTES // (inputs * outputs * self.dtype.itemsize))
        for start in range(0, len(used), size):
            chunk = used[start : start + size]
            yield self._dequantize(chunk), [counts[expert] for expert in chunk]

    def _dequantize(self, chunk: Sequence[int]) -> torch.Tensor:
        """Return the matrices of some experts [experts, …], as they are stored."""
        state = self._state
        experts, rows, columns = state.shape
        selection = _selection(chunk, self._weight.device)
        packed = self._weight.data.view(experts, -1)[selection]
        scales = state.absmax.view(experts, -1)[selection]
        if state.nested:
            # Quantised too, in blocks that may begin within an expert.
            outer = state.state2
            blocks = scales.shape[1]
            numbers = torch.arange(experts, device=scales.device)[selection, None]
            places = numbers * blocks + torch.arange(blocks, device=scales.device)
            scale_of_scale = outer.absmax[places // outer.blocksize]
            scales = outer.code[scales.int()] * scale_of_scale + state.offset
        matrices = _dequantized(packed, scales.flatten().float(), state)
        return matrices.view(len(chunk), rows, columns)


def _selection(chunk: Sequence[int], device: torch.device) -> slice | torch.Tensor:
    """Return an index of experts in ascending order, without a copy where they are neighbours."""
    first, last = chunk[0], chunk[-1]
    if last - first + 1 == len(chunk):
        return slice(first, last + 1)
    return torch.tensor(chunk, device=device)


def _dequantized(
    packed: torch.Tensor, scales: torch.Tensor, state: Any
) -> torch.Tensor:
    """Dequantise blocks of 4-bit weights to one row of weights.

    Args:
        packed: Two weights in a byte, of whole blocks.
        scales: The scale of each block, in float32.
        state: bitsandbytes' `QuantState` of the weight, for what blocks have in common.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # As one row: on a CPU bitsandbytes 0.50.2 takes wrong scales where a block reaches from one row
    # into the next.
    row = QuantState(
        absmax=scales,
        shape=torch.Size((1, 2 * packed.numel())),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    weights: torch.Tensor = dequantize_4bit(packed.reshape(-1, 1), row)
    return weights


def is_quantizable(weight: torch.Tensor) -> bool:
    """Whether no block of weights with a common scale reaches from one expert into the next."""
    return weight.ndim == 3 and weight[0].numel() % BLOCK == 0


def quantized_expert_weights(model: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """Yield the module and the name of each weight of experts that is in 4 bits."""
    for experts in expert_modules(model).values():
        for name in weight_names(experts):
            if getattr(getattr(experts, name), "quant_state", None) is not None:
                yield experts, name


def dequantize_experts(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Replace the 4-bit weights of experts by dense ones."""
    for experts, name in list(quantized_expert_weights(model)):
        dense = ExpertWeight(experts, name).dense().to(dtype)
        setattr(experts, name, torch.nn.Parameter(dense, requires_grad=False))


def _multiply_groups(
    rows: torch.Tensor,
    matrices: torch.Tensor,
    counts: Sequence[int],
    output: torch.Tensor,
) -> None:
    """Write the product of each group of rows with its matrix [groups, in, out]."""
    if _can_group(rows, matrices):
        ends = torch.tensor(counts, device=rows.device).cumsum(0, dtype=torch.int32)
        output.copy_(torch.nn.functional.grouped_mm(rows, matrices, offs=ends))
        return
    start = 0
    for matrix, count in zip(matrices, counts, strict=True):
        if count:
            stop = start + count
            torch.mm(rows[start:stop], matrix, out=output[start:stop])
            start = stop


def _can_group(rows: torch.Tensor, matrices: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product takes these matrices here."""
    widths = matrices.shape[-2:]
    if any(width * rows.element_size() % ALIGNMENT for width in widths):
        return False
    if not rows.is_contiguous() or rows.data_ptr() % ALIGNMENT:
        return False
    if rows.device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(rows.device)
        return rows.dtype == torch.bfloat16 and major >= 8
    return rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float32)
