"""The GPU's kernels, by Triton's interpreter on the CPU, against PyTorch's own operations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from support.matrix import further

if TYPE_CHECKING:
    import torch


def draw(*shape: int) -> "torch.Tensor":
    import torch

    return torch.randn(*shape)


NORMS = {
    "llama": (0.0, False),
    "gemma3": (1.0, True),
}
"""What is added to a norm's weight, and whether it rounds last, by transformers' module."""


@pytest.mark.parametrize("architecture", NORMS)
@pytest.mark.parametrize("columns", [64, 96, 576])
def test_norm_is_transformers(architecture: str, columns: int) -> None:
    import torch
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from finetune.engine.packed.gpu.rms_norm import (
        add_rms_norm,
        read_norm,
        rms_norm,
        rms_norm_backward,
    )
    from finetune.model.decoder_blocks import DecoderBlock

    torch.manual_seed(0)
    plain = (LlamaRMSNorm if architecture == "llama" else Gemma3RMSNorm)(columns, 1e-5)
    offset, rounds_last = NORMS[architecture]
    plain.weight.data.add_(0.1 * draw(columns))
    norm = read_norm(
        plain, DecoderBlock(norm_offset=offset, norm_rounds_last=rounds_last)
    )
    wide, slope, residual = draw(3, 21, 2 * columns)
    # Rows that lie apart in memory, as the queries beside an output gate do.
    x = wide[:, :columns]
    slope, residual = (
        slope[:, :columns].contiguous(),
        residual[:, columns:].contiguous(),
    )
    y = plain(x.requires_grad_())
    (expected,) = torch.autograd.grad(y, x, slope)
    x = x.detach()
    for copies in (False, True):
        computed, inverse_rms, copy = rms_norm(x, norm, copies)
        assert torch.allclose(computed, y, rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, x) if copies else copy is None
    total = residual.clone()
    assert torch.equal(add_rms_norm(total, x, norm), inverse_rms)
    assert torch.allclose(total, residual + y, rtol=1e-5, atol=1e-6)
    gradient = rms_norm_backward(slope, x, norm, inverse_rms)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    gradient = rms_norm_backward(slope, x, norm, inverse_rms, residual)
    assert torch.allclose(gradient, expected + residual, rtol=1e-4, atol=1e-6)
    into = torch.zeros_like(wide)
    rms_norm_backward(slope, x, norm, inverse_rms, grad_x=into[:, columns:])
    assert torch.allclose(into[:, columns:], expected, rtol=1e-4, atol=1e-6)
    assert not into[:, :columns].any()


@pytest.mark.parametrize("rows_apart", [False, True])
@pytest.mark.parametrize("columns", [300, 1500])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "sigmoid"])
def test_gated_product_is_pytorchs(
    activation: str, columns: int, rows_apart: bool
) -> None:
    import torch
    from transformers.activations import ACT2FN

    from finetune.engine.packed.gpu.gated_product import (
        gated_product,
        gated_product_backward,
    )

    torch.manual_seed(0)
    joined = 2 * draw(5, 2 * columns)
    gate, up = joined.chunk(2, 1)
    if not rows_apart:
        gate, up = gate.contiguous(), up.contiguous()
    slope = draw(5, columns)
    y = ACT2FN[activation](gate.requires_grad_()) * up.requires_grad_()
    expected = torch.autograd.grad(y, (gate, up), slope)
    gate, up = gate.detach(), up.detach()
    computed = gated_product(gate, up, activation)
    assert torch.allclose(computed, y, rtol=1e-5, atol=1e-6)
    for recomputes in (False, True):
        in_place = joined.clone().chunk(2, 1)
        elsewhere = torch.zeros(5, columns), torch.zeros(5, columns)
        for inputs, results in ((in_place, in_place), ((gate, up), elsewhere)):
            product = gated_product_backward(
                slope.clone(), *inputs, activation, recomputes, *results
            )
            for gradient, its_expected in zip(results, expected, strict=True):
                assert torch.allclose(gradient, its_expected, rtol=1e-4, atol=1e-5)
            assert (product is None) is not recomputes
            if product is not None:
                assert torch.allclose(product, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(3, 64, 64), (20, 80, 80), (3, 64, 48)]
)
def test_rotation_is_transformers(heads: int, head_dim: int, rotary_dim: int) -> None:
    import torch
    from transformers.models.phi3 import modeling_phi3

    from finetune.engine.packed.gpu.rotary import apply_rotary

    torch.manual_seed(0)
    x = draw(1, 6, heads, head_dim).transpose(1, 2).requires_grad_()
    angles = draw(1, 6, rotary_dim // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    y, _ = modeling_phi3.apply_rotary_pos_emb(x, x, cos, sin)
    slope = draw(1, heads, 6, head_dim)
    (expected,) = torch.autograd.grad(y, x, slope)
    for tensor, rotated, sign in ((x.detach(), y, 1.0), (slope, expected, -1.0)):
        # Beside other columns, as the queries of one layer for queries, keys and values are.
        joined = torch.zeros(6, heads * head_dim + 7)
        view = joined[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        view.copy_(tensor[0].transpose(0, 1))
        apply_rotary(view, cos[0], sin[0], sign)
        assert torch.allclose(view.transpose(0, 1)[None], rotated, rtol=1e-5, atol=1e-6)
        assert not joined[:, heads * head_dim :].any()


@pytest.mark.parametrize("architecture", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(3, 64, 64), (20, 80, 80), (3, 64, 48)]
)
def test_a_rotated_norm_is_the_norm_and_the_rotation(
    architecture: str, dtype: str, heads: int, head_dim: int, rotary_dim: int
) -> None:
    """With the same roundings in between, so that it is the same as two kernels."""
    import torch

    from finetune.engine.packed.gpu.rms_norm import RmsNorm, rms_norm
    from finetune.engine.packed.gpu.rotary import apply_rotary
    from finetune.engine.packed.gpu.rotated_norm import rotated_norm

    torch.manual_seed(0)
    offset, rounds_last = NORMS[architecture]
    norm = RmsNorm(offset + draw(head_dim), 1e-5, rounds_last)
    # Rows that lie apart in memory, as the queries beside an output gate do.
    x = draw(7 * heads, 2 * head_dim).to(getattr(torch, dtype))[:, :head_dim]
    angles = draw(7, rotary_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    expected, expected_rms, _ = rms_norm(x, norm)
    apply_rotary(expected.view(7, heads, head_dim), cos, sin, 1.0)
    y, inverse_rms = rotated_norm(x, norm, cos, sin)
    assert torch.equal(inverse_rms, expected_rms)
    assert torch.equal(y, expected)


# Less than a lane for each thread, one block, and several, the last of which is not full.
@pytest.mark.parametrize("vocabulary", [50, 5000, 33000])
def test_score_is_cross_entropy(vocabulary: int) -> None:
    import torch

    from finetune.engine.packed.gpu.cross_entropy import cross_entropy

    torch.manual_seed(0)
    logits = draw(7, vocabulary)
    # Of equal logits the first is the prediction.
    logits[6, [3, vocabulary - 1]] = 9.0
    logits.requires_grad_()
    likeliest = logits.argmax(-1)
    last = vocabulary - 1
    targets = torch.tensor([3, last, 0, vocabulary // 2, 17, int(likeliest[5]), 3])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), logits)
    for learns in (False, True):
        losses, right, found = cross_entropy(
            taken := logits.detach().clone(), targets, learns
        )
        assert torch.allclose(losses, expected, rtol=1e-5)
        if learns:
            assert torch.allclose(found, slope, rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(right, likeliest == targets)
            assert right[5:].all()
            assert torch.equal(taken, logits)


WIDTHS = (200, 136)
"""Of the layers' input and outputs; neither is a multiple of a block."""
PARTS = ((0, 21, (5, 3)), (21, 90, (0, 0)), (90, 100, (16, 0)), (100, 117, (130, 24)))
"""Each slot's tokens, from and to, and its ranks in two layers with the same input; 0: no adapter
there."""


class Case:
    """Three layers with the same input and several slots, as the kernels see them and as PyTorch
    computes them.

    Nothing adapts the first.
    """

    def __init__(
        self,
        dropout: float,
        widths: tuple[int, int] = WIDTHS,
        parts: "Sequence[tuple[int, int, tuple[int, int]]]" = PARTS,
    ) -> None:
        import torch

        from finetune.engine.packed.gpu.adapter_tables import (
            COLUMNS,
            AdapterSpan,
            AdapterTables,
            SlotTable,
        )
        from finetune.engine.packed.lora_linear import Adapter, SlotTokens

        torch.manual_seed(0)
        self.x = draw(parts[-1][1], widths[0])
        self.slopes = [draw(parts[-1][1], widths[1]) for _ in range(2)]
        self.adapters: list[list[Adapter]] = [[], []]
        self.stretches: list[list[SlotTokens]] = [[], []]
        tables, rows = [], []
        for number, (start, stop, ranks) in enumerate(parts):
            table = torch.zeros(3, COLUMNS, dtype=torch.int64)
            for layer, rank in enumerate(ranks):
                if rank:
                    a, b = draw(rank, widths[0]), draw(widths[1], rank)
                    adapter = Adapter(
                        7 + layer,
                        0.5 + number,
                        a,
                        b,
                        torch.ones_like(a),
                        torch.ones_like(b),
                    )
                    table[1 + layer] = torch.tensor(adapter.table_row())
                    self.adapters[layer].append(adapter)
                    stretch = SlotTokens(0, dropout, adapter, start, stop, None)
                    self.stretches[layer].append(stretch)
            tables.append(table)
            rows.append(AdapterSpan(start, stop, 2**62 + number, dropout))
        self.tables = AdapterTables(
            rows, [SlotTable.of(table, "cpu") for table in tables], "cpu"
        )

    def gradients(self) -> list["torch.Tensor"]:
        """The adapters' own."""
        return [
            part
            for layer in self.adapters
            for own in layer
            for part in (own.gradient_a, own.gradient_b)
        ]

    def by_kernels(
        self, x: "torch.Tensor", slopes: list["torch.Tensor"]
    ) -> list["torch.Tensor"]:
        """What is added to both outputs and the input's gradient, and the adapters' gradients."""
        from finetune.engine.packed.gpu import lowrank

        for gradient in self.gradients():
            gradient.fill_(7)  # it is replaced
        h = lowrank.shrink(x, self.tables, 0, 3)
        outputs = []
        for layer in (1, 2):
            outputs.append(lowrank.expand(h[layer], self.tables, layer, WIDTHS[1]))
        # Nothing reads that of the first layer, which is the widest.
        unread = x.new_full((len(x), 2 * WIDTHS[0]), float("nan"))
        into_h = lowrank.expand_backward([unread, *slopes], h, self.tables, 0)
        into_x = lowrank.shrink_backward(into_h, self.tables, 0, WIDTHS[0])
        lowrank.shrink_weight_gradient(x, into_h, self.tables, 0)
        return [*outputs, into_x, *(gradient.clone() for gradient in self.gradients())]

    def by_pytorch(self) -> list["torch.Tensor"]:
        """The same, without dropout."""
        import torch

        from finetune.engine.packed.lora_linear import lora_linear

        for gradient in self.gradients():
            gradient.fill_(0)
        plain = torch.nn.Linear(*WIDTHS, bias=False).requires_grad_(False)
        plain.weight.fill_(0)
        x = self.x.clone().requires_grad_()
        anchor = torch.zeros((), requires_grad=True)
        outputs = [
            lora_linear(x, anchor, None, plain, stretches)
            for stretches in self.stretches
        ]
        (into_x,) = torch.autograd.grad(outputs, x, self.slopes)
        return [
            *(y.detach() for y in outputs),
            into_x,
            *(gradient.clone() for gradient in self.gradients()),
        ]


def test_adapters_at_once_are_adapters_in_turn() -> None:
    case = Case(0.0)
    for one, other in zip(
        case.by_kernels(case.x, case.slopes), case.by_pytorch(), strict=True
    ):
        assert float((one - other).norm() / other.norm()) < 1e-6


@pytest.mark.parametrize(
    ("is_joined", "dropout"),
    [(False, 0.5), (True, 0.0), *further((False, 0.0), (True, 0.5))],
)
def test_gate_with_adapters_is_the_gated_product_of_the_sums(
    is_joined: bool, dropout: float
) -> None:
    """Gate and up are outputs of a layer each, or of one for both; layer 2 stands for `down`."""
    import torch

    from finetune.engine.packed.gpu import lowrank
    from finetune.engine.packed.gpu.adapted_gate import (
        UnadaptedOutput,
        adapted_gate,
        adapted_gate_backward,
    )
    from finetune.engine.packed.gpu.adapter_tables import AdapterSpan, _tile_rows
    from finetune.engine.packed.gpu.gated_product import (
        gated_product,
        gated_product_backward,
    )

    # More than a program has at once, as the tokens of the tiles.
    columns = 520
    outputs = 2 * columns if is_joined else columns
    # Ranks for which the kernels are used.
    parts = (
        (0, 70, (5, 3)),
        (70, 139, (0, 0)),
        (139, 150, (16, 0)),
        (150, 167, (30, 24)),
    )
    case = Case(dropout, (columns, outputs), parts)
    spans = [AdapterSpan(*stretch, 0, 0.0) for *stretch, _ in parts]
    case.tables.tile_tokens = 64
    case.tables.tiles = _tile_rows(spans, 64)
    tokens = len(case.x)
    shrunk = lowrank.shrink(0.01 * case.x, case.tables, 1, 2)
    added = [
        lowrank.expand(shrunk[layer], case.tables, 1 + layer, outputs)
        for layer in (0, 1)
    ]
    if is_joined:
        joined = draw(tokens, outputs)
        gate, up = joined.chunk(2, 1)
        places = [(0, 1, 0), (0, 1, columns)]
        sums = (joined + added[0]).chunk(2, 1)
    else:
        gate, up = draw(tokens, columns), draw(tokens, columns)
        places = [(0, 1, 0), (1, 2, 0)]
        sums = gate + added[0], up + added[1]
    sums = tuple(total.contiguous() for total in sums)
    slope, grad_shrunk = draw(tokens, columns), draw(tokens, case.tables.rank)
    through_a = lowrank.shrink_backward(grad_shrunk[None], case.tables, 2, columns)
    expected = [torch.empty_like(slope) for _ in range(2)]
    product = gated_product_backward(slope + through_a, *sums, "silu", True, *expected)

    unadapted = [
        UnadaptedOutput(output, shrunk[number], layer, first)
        for output, (number, layer, first) in zip((gate, up), places, strict=True)
    ]
    computed = adapted_gate(*unadapted, case.tables, "silu")
    adapted_gate_backward(slope, grad_shrunk, 2, *unadapted, case.tables, "silu")
    assert product is not None
    pairs = [(computed, gated_product(*sums, "silu")), (slope, product)]
    pairs += [(gate, expected[0]), (up, expected[1])]
    for one, other in pairs:
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_dropout_of_the_kernels_is_the_same_forward_and_backward() -> None:
    """What an adapter adds is linear in its weights, so that <slope, output> is <weight, gradient>
    of A and of B."""
    import torch

    case = Case(0.5)
    *outputs, into_x = case.by_kernels(case.x, case.slopes)[:3]
    assert torch.equal(outputs[0], case.by_kernels(case.x, case.slopes)[0]), (
        "the same masks again"
    )
    adapters = [iter(own) for own in case.adapters]
    for start, stop, ranks in PARTS:
        own, together = slice(start, stop), 0.0
        for layer, rank in enumerate(ranks):
            if not rank:
                assert not outputs[layer][own].any()
                continue
            added = float((outputs[layer][own] * case.slopes[layer][own]).sum())
            together += added
            adapter = next(adapters[layer])
            assert float((adapter.gradient_a * adapter.a).sum()) == pytest.approx(
                added, rel=1e-3, abs=0.1
            )
            assert float((adapter.gradient_b * adapter.b).sum()) == pytest.approx(
                added, rel=1e-3, abs=0.1
            )
        assert float((into_x[own] * case.x[own]).sum()) == pytest.approx(
            together, rel=1e-3, abs=0.1
        ), ranks


def test_dropout_of_the_kernels_drops_its_share_anew_for_each_key_layer_and_token() -> (
    None
):
    """Where A is ones and what comes back is one, the input's gradient shows the mask."""
    import torch

    from finetune.engine.packed.gpu import lowrank
    from finetune.engine.packed.gpu.adapter_tables import (
        AdapterSpan,
        AdapterTables,
        SlotTable,
    )
    from finetune.engine.packed.lora_linear import Adapter

    tokens, width = 40, 500

    def mask(key: int, number: int) -> torch.Tensor:
        a, b = torch.ones(1, width), torch.ones(8, 1)
        adapter = Adapter(number, 1.0, a, b, torch.zeros_like(a), torch.zeros_like(b))
        span = AdapterSpan(0, tokens, key, 0.3)
        tables = AdapterTables(
            [span], [SlotTable.of(torch.tensor([adapter.table_row()]), "cpu")], "cpu"
        )
        into_h = torch.zeros(1, tokens, tables.rank)
        into_h[0, :, 0] = 1
        into_x = lowrank.shrink_backward(into_h, tables, 0, width)
        assert into_x.unique().tolist() == [0.0, 1.0]
        x = draw(tokens, width)
        y = lowrank.expand(lowrank.shrink(x, tables, 0, 1)[0], tables, 0, 8)
        expected = (x * into_x).sum(
            1, keepdim=True
        ) / 0.7  # what is kept stands for the rest as well
        assert torch.allclose(y, expected.expand(-1, 8), rtol=1e-4, atol=1e-4)
        return into_x > 0

    masks = [mask(key, number) for key, number in ((1, 0), (2, 0), (2**40, 0), (1, 1))]
    for one in masks:
        assert float(one.float().mean()) == pytest.approx(0.7, abs=0.01)
        assert float(one.float().mean(0).std()) == pytest.approx(
            (0.21 / tokens) ** 0.5, rel=0.15
        )
        assert float(one.float().mean(1).std()) == pytest.approx(
            (0.21 / width) ** 0.5, rel=0.35
        )
        for other in masks:
            alike = float((one == other).float().mean())
            assert (
                alike == 1.0
                if one is other
                else alike == pytest.approx(0.58, abs=0.015)
            )
    assert torch.equal(masks[0], mask(1, 0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_slots_numbers_never_reach_another() -> None:
    import torch

    case = Case(0.5)
    sick = slice(*PARTS[-1][:2])  # the blocks of the slot before reach into it
    sick_x, sick_slopes = case.x.clone(), [slope.clone() for slope in case.slopes]
    for part, value in ((sick_x, "nan"), *((slope, "inf") for slope in sick_slopes)):
        part[sick] = float(value)
    found = []
    for x, slopes in ((case.x, case.slopes), (sick_x, sick_slopes)):
        *parts, into_x = case.by_kernels(x, slopes)[:3]
        own = [
            part
            for layer in case.adapters
            for one in layer[:-1]
            for part in (one.gradient_a, one.gradient_b)
        ]
        found.append(
            [part[: PARTS[-1][0]] for part in (*parts, into_x)]
            + [part.clone() for part in own]
        )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not bool(parts[0][sick].isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_one_rows_attention_never_reaches_another() -> None:
    import torch

    from finetune.engine.packed.batch import pack_rows
    from finetune.engine.packed.gpu.attention import (
        SpanTables,
        attention,
        attention_backward,
    )

    torch.manual_seed(0)
    rows = [
        {"input_ids": list(range(size)), "labels": [-100] * 3 + list(range(3, size))}
        for size in (20, 70, 9)
    ]
    line = pack_rows([[row] for row in rows], torch.device("cpu"))
    states = [draw(line.input_ids.shape[1], 2, 32) for _ in range(4)]
    table = SpanTables(line.spans, line.position_ids[0], {32})

    def run() -> list[torch.Tensor]:
        trace = attention(*states[:3], table, 0.2, None)
        gradients = [torch.empty_like(state) for state in states[:3]]
        attention_backward(states[3], trace, table, gradients)
        return [trace.output, *gradients]

    well = run()
    for sick in line.spans:
        before = [state.clone() for state in states]
        for state in states:
            state[sick.start : sick.stop] = float("nan")
        for ill, found in zip(run(), well, strict=True):
            assert torch.equal(ill[: sick.start], found[: sick.start])
            assert torch.equal(ill[sick.stop :], found[sick.stop :])
        for state, values in zip(states, before, strict=True):
            state.copy_(values)


@pytest.mark.parametrize("is_padded", [False, True])
def test_the_programs_that_take_longest_come_first(is_padded: bool) -> None:
    import torch

    from finetune.engine.packed.batch import Span
    from finetune.engine.packed.gpu.attention import SpanTables, tiling_of
    from finetune.engine.packed.gpu.pass_size import PassSize

    block = tiling_of(64).block
    prefix = Span(0, 3 * block, 0, 0)
    reader = Span(prefix.stop, 10, 0, prefix.length)
    other = Span(reader.stop, 2 * block + 5, reader.stop, 0)
    size = PassSize(tokens=8 * block, slots=2, spans=8) if is_padded else None
    tokens = size.tokens if size else other.stop
    positions = torch.zeros(tokens, dtype=torch.long)
    tables = SpanTables([prefix, reader, other], positions, {64}, size)
    queries, keys = tables.query_blocks[block], tables.key_blocks[block]
    # The reader sees the whole prefix before itself.
    assert queries[:6].tolist() == [
        [1, reader.start],
        [0, 2 * block],
        [2, other.start + 2 * block],
        [0, block],
        [2, other.start + block],
        [0, 0],
    ]
    # It sees each key of the prefix, too.
    assert keys[:7].tolist() == [
        [0, 0],
        [0, block],
        [2, other.start],
        [0, 2 * block],
        [2, other.start + block],
        [1, reader.start],
        [2, other.start + 2 * block],
    ]
    for table in (queries, keys):
        added = table[7:].tolist()
        assert added == [[7, 0]] * (size.blocks(block) - 7 if size else 0)


@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "rotary_dim", "window"),
    [
        (2, 1, 32, 32, 20),
        (1, 1, 24, 24, None),
        pytest.param(2, 1, 32, 16, None, marks=pytest.mark.slow),
        *further((2, 1, 256, 256, 20), (2, 1, 512, 512, None)),
    ],
)
@pytest.mark.parametrize("is_joined", [False, True])
def test_attention_is_the_cpus(
    heads: int,
    groups: int,
    head_dim: int,
    rotary_dim: int,
    window: int | None,
    is_joined: bool,
) -> None:
    """Rows of one token, of more than a block, and rows that share a beginning; rotated before it
    or not; queries, keys and values of one layer or of three."""
    import torch

    from finetune.engine.packed.attention import PackedAttention, Scores
    from finetune.engine.packed.batch import pack_rows
    from finetune.engine.packed.gpu.attention import (
        SpanTables,
        attention,
        attention_backward,
    )
    from finetune.engine.packed.gpu.rotary import apply_rotary

    torch.manual_seed(0)
    ids = torch.randint(0, 99, (6, 150)).tolist()
    # The last token of a row is not computed.
    plain = [
        {"input_ids": ids[0][:size], "labels": ids[0][:size]} for size in (2, 71, 65)
    ]
    sharing = [
        {"input_ids": ids[1][:66] + own[:size], "labels": [-100] * 67 + own[1:size]}
        for own, size in zip(ids[2:], (3, 60, 130, 5), strict=True)
    ]
    batch = pack_rows([plain, sharing], torch.device("cpu"))
    assert any(span.prefix_length for span in batch.spans)
    tokens = batch.input_ids.shape[1]
    sizes = [count * head_dim for count in (heads, groups, groups)]

    def empty() -> list[torch.Tensor]:
        parts = list(torch.zeros(tokens, sum(sizes)).split(sizes, 1))
        if not is_joined:
            parts = [part.contiguous() for part in parts]
        return [part.unflatten(1, (-1, head_dim)) for part in parts]

    states = [part.copy_(draw(*part.shape)).requires_grad_() for part in empty()]
    output = PackedAttention(batch).attend(*states, Scores(0.2, window))
    slope = draw(tokens, heads, head_dim)
    expected = torch.autograd.grad(output, states, slope)
    tables = SpanTables(batch.spans, batch.position_ids[0], {head_dim})
    trace = attention(*(state.detach() for state in states), tables, 0.2, window)
    assert torch.allclose(trace.output, output, rtol=1e-4, atol=1e-5)
    gradients = empty()
    attention_backward(slope, trace, tables, gradients)
    for gradient, its_expected in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, its_expected, rtol=1e-4, atol=1e-4)
    angles = draw(tokens, rotary_dim // 2).repeat(1, 2)
    rotation = (angles.cos(), angles.sin())
    for gradient in expected[:2]:
        apply_rotary(gradient, *rotation, -1.0)
    attention_backward(slope, trace, tables, gradients, rotation)
    for gradient, its_expected in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, its_expected, rtol=1e-4, atol=1e-4)


def test_what_an_adapter_adds_is_not_lost_in_the_blocks_input() -> None:
    """In 16 bits it may be far smaller than the steps of the sum that it becomes part of."""
    import torch

    from finetune.engine.packed.gpu.adapter_tables import (
        AdapterSpan,
        AdapterTables,
        SlotTable,
    )
    from finetune.engine.packed.gpu.context import PassContext
    from finetune.engine.packed.gpu.linear_group import LinearGroup
    from finetune.engine.packed.lora_linear import Adapter

    torch.manual_seed(0)
    width, tokens, half = 64, 300, torch.float16
    layer = torch.nn.Linear(width, width, bias=False, dtype=half).requires_grad_(False)
    layer.weight.copy_(0.02 * draw(width, width))
    a, b = (0.02 * draw(16, width)).to(half), (0.0005 * draw(width, 16)).to(half)
    adapter = Adapter(0, 1.0, a, b, a.float(), b.float())
    span = AdapterSpan(0, tokens, 1, 0.0)
    tables = AdapterTables(
        [span], [SlotTable.of(torch.tensor([adapter.table_row()]), "cpu")], "cpu"
    )
    x, onto = draw(tokens, width).to(half), (2 * draw(tokens, width)).to(half)
    group, sums = LinearGroup([layer], ["o"], 0), []
    for adapted in (frozenset({"o"}), frozenset()):
        context = PassContext(None, None, 1, None, tables, adapted)  # type: ignore[arg-type]
        (found,), _ = group.forward(x, context, residual=onto.clone())
        sums.append(found.float())
    added = x.float() @ a.float().t() @ b.float().t()
    arrived = float(((sums[0] - sums[1]) * added).sum() / added.square().sum())
    assert float(added.std()) < 5e-4
    assert arrived == pytest.approx(1, abs=0.15)
