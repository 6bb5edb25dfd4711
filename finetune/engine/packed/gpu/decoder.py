"""The decoder of a Llama-like base on a GPU: forward and backward of its blocks written out, without autograd.

A run alone is bound by how fast its operations can be launched, so there are few: what normalises, gates or rotates is
one kernel (`kernels`), the adapters of all slots are computed at once (`lowrank`), and attention stays
within each row's boundaries without padding (`attention`). With gradient checkpointing (Chen et al., 2016) a block
keeps its input alone, and is computed again for its backward pass but for its last product, which no gradient needs;
the last blocks keep all (`kept_whole`).
"""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.gpu import kernels, lowrank
from finetune.engine.packed.gpu.attention import Attended, Rows, attend, attend_backward
from finetune.engine.packed.gpu.lowrank import Places
from finetune.engine.packed.lora_linear import Adapter
from finetune.model.quantization import dense_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finetune.engine.packed.slot import Slot


@dataclass(frozen=True)
class Pass:
    """A pass that goes on: its tokens, their slots, and the rotation of each position."""

    line: PackedBatch
    rows: Rows
    places: Places
    adapted: frozenset[str]
    """Linear layers that have an adapter in some slot."""
    cos: torch.Tensor
    sin: torch.Tensor
    held: dict[str, torch.Tensor] | None = None
    """Dequantised weights from a block's second forward pass to its backward pass; None: each dequantises its own."""


def kept_whole(layers: int, slots: int) -> int:
    """With checkpointing: of how many of the last blocks all is kept, so that they are not computed again.

    Of the very last, whose backward pass comes at once. Where there is room for several slots there is for some more.
    """
    return 1 if slots == 1 else max(1, layers // 8)


@dataclass
class Trace:
    """What a forward pass keeps for its backward pass."""

    now: Pass
    blocks: list[Any]
    """What each block kept, or its input alone."""
    last: torch.Tensor
    """What the last norm took, and its inverse root."""
    inverse: torch.Tensor


class Decoder:
    """Embedding, blocks and last norm."""

    logits_chunk = 1024
    """Answers' tokens whose logits are in memory at once: with fewer, their products leave a large GPU half idle."""

    def __init__(self, base: "PreTrainedModel", saves: bool) -> None:
        model, prefix = base.get_decoder(), base.base_model_prefix
        self._embed, self._turn, self._norm, self._saves = model.embed_tokens, model.rotary_emb, model.norm, saves
        self._rows: dict[str, int] = {}
        """The linear layers, and their rows in the slots' tables."""
        for name, module in model.named_modules(prefix=prefix):
            if isinstance(module, torch.nn.Linear):
                self._rows[name] = len(self._rows)
        mistral = base.config.model_type == "mistral"
        self._blocks = [
            _Block(block, f"{prefix}.layers.{number}", self._rows, base.config.sliding_window if mistral else None)
            for number, block in enumerate(model.layers)
        ]

    score = staticmethod(kernels.score)

    def table(self, adapters: dict[str, Adapter]) -> torch.Tensor:
        """A slot's table for the kernels [layers, columns]; rank 0 where a layer has no adapter."""
        table = torch.zeros(len(self._rows), lowrank.COLUMNS, dtype=torch.int64)
        for name, adapter in adapters.items():
            table[self._rows[name]] = torch.tensor(adapter.row())
        return table

    @torch.no_grad()
    def forward(
        self, line: PackedBatch, slots: "Sequence[Slot]", draws: Sequence[int] | None
    ) -> tuple[torch.Tensor, Trace]:
        """The last hidden state where an answer's token is predicted [answers' tokens, width].

        `draws` name each slot's dropout masks; without them nothing is dropped, and nothing kept.
        """
        parts = []
        for number, (slot, (start, stop)) in enumerate(zip(slots, line.parts, strict=True)):
            key = random.Random(f"{slot.seed} {draws[number]}").getrandbits(63) if draws else 0
            parts.append((start, stop, key, slot.dropout if draws else 0.0))
        x: torch.Tensor = self._embed(line.ids)[0]
        cos, sin = (part[0].contiguous() for part in self._turn(x[None], line.positions))
        places = Places(parts, [slot.table for slot in slots if slot.table is not None], x.device)
        rows = Rows(line.spans, line.positions[0])
        now = Pass(line, rows, places, frozenset().union(*(slot.adapters for slot in slots)), cos, sin)
        kept: list[Any] = []
        recomputed = len(self._blocks) - kept_whole(len(self._blocks), len(slots)) if self._saves else 0
        for block in self._blocks:
            out, own = block.forward(x, now)
            assert out is not None
            x = out
            if draws:
                kept.append(own.x if len(kept) < recomputed else own)
            del own, out  # or it would outlive the next block's forward pass
        last = x[line.predictors]
        hidden, inverse, _ = kernels.norm(last, self._norm.weight, self._norm.variance_epsilon)
        return hidden, Trace(now, kept, last, inverse)

    @torch.no_grad()
    def backward(self, trace: Trace, gradient: torch.Tensor) -> None:
        """Put the adapters' gradients into the slots, from that of the hidden state."""
        now = trace.now
        slope = gradient.new_zeros(now.line.ids.shape[1], gradient.shape[1])
        slope[now.line.predictors] = kernels.norm_backward(
            gradient.contiguous(), trace.last, self._norm.weight, trace.inverse
        )
        del trace.last, gradient  # here and below: what is read no more makes room for what comes
        several = len(now.line.parts) > 1
        for block in reversed(self._blocks):
            kept = trace.blocks.pop()
            now = dataclasses.replace(now, held={} if several else None)
            if isinstance(kept, torch.Tensor):
                _, kept = block.forward(kept, now, again=True)
            into_x = block.backward(slope, kept, now, wanted=bool(trace.blocks))
            if into_x is not None:
                slope = into_x


@dataclass(frozen=True)
class _Group:
    """Linear layers with the same input; `h` is what goes through their adapters, None: they have none."""

    layers: list[Any]
    names: list[str]
    row: int
    """The first one's in the slots' tables; the others follow."""

    def forward(
        self, x: torch.Tensor, now: Pass, onto: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Each layer's output with what the adapters add, and h; a single layer's is added `onto` what is given."""
        h, outputs = self.through_a(x, now), []
        for number, (layer, name) in enumerate(zip(self.layers, self.names, strict=True)):
            weight = dense_weight(layer)
            if now.held is not None:
                now.held[name] = weight
            # A product adds to what there is without reading it in a pass of its own, and rounds once. What an adapter
            # adds is not put onto the block's input by itself: it may be too small to change what is so much larger.
            if h is not None and name in now.adapted:
                y = lowrank.expand(h[number], now.places, self.row + number, len(weight)).addmm_(x, weight.t())
                y = y if layer.bias is None else y.add_(layer.bias)
            elif onto is None or layer.bias is not None:
                y = linear(x, weight, layer.bias)
            else:
                y, onto = onto.addmm_(x, weight.t()), None
            outputs.append(y if onto is None else onto.add_(y))
            del weight  # or two dequantised ones would be in memory
        return outputs, h

    def through_a(self, x: torch.Tensor, now: Pass) -> torch.Tensor | None:
        """h alone."""
        adapted = not now.adapted.isdisjoint(self.names)
        return lowrank.shrink(x, now.places, self.row, len(self.layers)) if adapted else None

    def backward_h(self, slopes: list[torch.Tensor], h: torch.Tensor | None, now: Pass) -> torch.Tensor | None:
        """The gradient of h, from those of the outputs; B's go to the slots."""
        if h is None:
            return None
        into_h = torch.empty_like(h)
        for number, (name, slope) in enumerate(zip(self.names, slopes, strict=True)):
            if name in now.adapted:
                lowrank.expand_backward(slope, h[number], into_h[number], now.places, self.row + number)
        return into_h

    def backward(
        self, slopes: list[torch.Tensor], h: torch.Tensor | None, now: Pass
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of the input and of h, from those of the outputs; B's go to the slots."""
        into_h, into_x = self.backward_h(slopes, h, now), None
        if into_h is not None:
            into_x = lowrank.shrink_backward(into_h, now.places, self.row, self.layers[0].in_features)
        for layer, name, slope in zip(self.layers, self.names, slopes, strict=True):
            held = now.held.pop(name, None) if now.held else None
            weight = dense_weight(layer) if held is None else held
            del held
            into_x = slope @ weight if into_x is None else into_x.addmm_(slope, weight)
            del weight
        assert into_x is not None
        return into_x, into_h

    def collect_a(self, x: torch.Tensor | None, into_h: torch.Tensor | None, now: Pass) -> None:
        """A's gradients go to the slots."""
        if into_h is not None:
            assert x is not None
            lowrank.collect_a(x, into_h, now.places, self.row)


@dataclass(frozen=True)
class _Kept:
    """Of a block's forward pass, for its backward pass."""

    x: torch.Tensor
    normed: torch.Tensor | None
    """None: no adapter reads it."""
    inverse: torch.Tensor
    heads: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Of queries and keys, where they have a norm: what it took, and the inverse roots."""
    attended: Attended
    middle: torch.Tensor
    """After attention."""
    normed_middle: torch.Tensor | None
    inverse_middle: torch.Tensor
    gated: torch.Tensor
    """The backward pass puts its gradient here, and that of `up` there."""
    up: torch.Tensor
    h_qkv: torch.Tensor | None
    h_o: torch.Tensor | None
    h_gate_up: torch.Tensor | None
    h_down: torch.Tensor | None


class _Block:
    """Attention and a gated feed-forward layer, each added to its input."""

    def __init__(self, block: Any, name: str, rows: dict[str, int], window: int | None) -> None:
        attention = block.self_attn
        self._norm, self._middle_norm = block.input_layernorm, block.post_attention_layernorm
        groups = []
        for owner, parts in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
            names = [f"{part}_proj" for part in parts]
            layers = [getattr(getattr(block, owner), part) for part in names]
            whole = [f"{name}.{owner}.{part}" for part in names]
            assert [rows[part] for part in whole] == list(range(rows[whole[0]], rows[whole[0]] + len(whole)))
            groups.append(_Group(layers, whole, rows[whole[0]]))
        self._qkv, self._o, self._gate_up, self._down = groups
        self._head_norms: dict[str, Any] = {part: getattr(attention, f"{part}_norm", None) for part in "qk"}
        self._rotates = bool(getattr(attention, "use_rope", True))
        self._width, self._scaling = attention.head_dim, attention.scaling
        self._window = getattr(attention, "sliding_window", window)

    def forward(self, x: torch.Tensor, now: Pass, again: bool = False) -> tuple[torch.Tensor | None, _Kept]:
        """The block's output from its input. `again`: for the backward pass alone; the output is None."""
        normed: torch.Tensor | None
        normed_middle: torch.Tensor | None
        normed, inverse, middle = kernels.norm(x, self._norm.weight, self._norm.variance_epsilon, copies=True)
        flat, h_qkv = self._qkv.forward(normed, now)
        normed = None if h_qkv is None else normed  # what is read no more makes room, here and below
        states = {part: own.view(len(own), -1, self._width) for part, own in zip("qkv", flat, strict=True)}
        del flat
        heads = {}
        for part, own in self._head_norms.items():
            if own is not None:
                before = states[part].view(-1, self._width)
                unit, roots, _ = kernels.norm(before, own.weight, own.variance_epsilon)
                states[part], heads[part] = unit.view(states[part].shape), (before, roots)
            if self._rotates:
                states[part] = kernels.rotate(states[part], now.cos, now.sin, 1.0)
        attended = attend(states["q"], states["k"], states["v"], now.rows, self._scaling, self._window)
        (middle,), h_o = self._o.forward(attended.out.flatten(1), now, onto=middle)
        normed_middle, inverse_middle, out = kernels.norm(
            middle, self._middle_norm.weight, self._middle_norm.variance_epsilon, copies=not again
        )
        (gated, up), h_gate_up = self._gate_up.forward(normed_middle, now)
        normed_middle = None if h_gate_up is None else normed_middle
        h_down = None
        if not again:
            (out,), h_down = self._down.forward(kernels.gate(gated, up), now, onto=out)
        elif self._down.names[0] in now.adapted:
            h_down = self._down.through_a(kernels.gate(gated, up), now)
        kept = _Kept(
            x=x,
            normed=normed,
            inverse=inverse,
            heads=heads,
            attended=attended,
            middle=middle,
            normed_middle=normed_middle,
            inverse_middle=inverse_middle,
            gated=gated,
            up=up,
            h_qkv=h_qkv,
            h_o=h_o,
            h_gate_up=h_gate_up,
            h_down=h_down,
        )
        return out, kept

    def backward(self, slope: torch.Tensor, kept: _Kept, now: Pass, wanted: bool) -> torch.Tensor | None:
        """The gradient of the block's input, if wanted, from that of its output; adapters' go to the slots."""
        into_inner, into_h = self._down.backward([slope], kept.h_down, now)
        inner = kernels.gate_backward(into_inner, kept.gated, kept.up, into_h is not None)
        self._down.collect_a(inner, into_h, now)
        del into_inner, inner
        slopes = [kept.gated, kept.up]  # which are their gradients by now
        into_middle, into_h = self._gate_up.backward(slopes, kept.h_gate_up, now)
        self._gate_up.collect_a(kept.normed_middle, into_h, now)
        slope = kernels.norm_backward(into_middle, kept.middle, self._middle_norm.weight, kept.inverse_middle, slope)
        del into_middle
        into_out, into_h = self._o.backward([slope], kept.h_o, now)
        self._o.collect_a(kept.attended.out.flatten(1), into_h, now)
        turn = (now.cos, now.sin) if self._rotates else None
        into = attend_backward(into_out.view(kept.attended.out.shape), kept.attended, now.rows, turn)
        del into_out
        into_states = dict(zip("qkv", into, strict=True))
        del into
        for part, (flat, roots) in kept.heads.items():
            weight = self._head_norms[part].weight
            into_states[part] = kernels.norm_backward(into_states[part].view(-1, self._width), flat, weight, roots)
        slopes = [own.view(len(slope), -1) for own in into_states.values()]
        if not wanted:
            self._qkv.collect_a(kept.normed, self._qkv.backward_h(slopes, kept.h_qkv, now), now)
            return None
        into_x, into_h = self._qkv.backward(slopes, kept.h_qkv, now)
        self._qkv.collect_a(kept.normed, into_h, now)
        return kernels.norm_backward(into_x, kept.x, self._norm.weight, kept.inverse, slope)
