"""The kernels of gated delta nets, by Triton's interpreter on the CPU, against transformers."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from finetune.engine.packed.batch import PackedBatch

LENGTHS = (2, 38, 71)
"""Of rows: shorter than a chunk, longer, and longer than two; the last token is not computed."""


def packed_rows(lengths: tuple[int, ...] = LENGTHS) -> "PackedBatch":
    import torch

    from finetune.engine.packed.batch import pack_rows

    rows = [
        {"input_ids": list(range(length)), "labels": [-100] * (length - 1) + [3]}
        for length in lengths
    ]
    return pack_rows([rows], torch.device("cpu"), [1])


@pytest.mark.filterwarnings("ignore:.*chunk_gated_delta_rule.*")
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (200,)])
def test_delta_rule_is_transformers(alike: bool, lengths: tuple[int, ...]) -> None:
    """Where keys are alike too, and the system that is solved has large powers."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import (
        torch_chunk_gated_delta_rule,
    )

    from finetune.engine.packed.gpu.delta_rule import DeltaRule, RowTables

    torch.manual_seed(0)
    batch = packed_rows(lengths)
    tokens = batch.input_ids.shape[1]
    rule = DeltaRule(key_heads=2, value_heads=4, key_columns=16, value_columns=32)
    qkv = torch.randn(tokens, sum(rule.widths))
    if alike:
        qkv[:, rule.key_width : 2 * rule.key_width] = 1 + 0.01 * torch.randn(
            tokens, rule.key_width
        )
    log_decays = -(0.01 if alike else 1.0) * torch.rand(tokens, 4)
    rates = torch.rand(tokens, 4) if not alike else torch.full((tokens, 4), 0.99)
    inputs = [tensor.requires_grad_() for tensor in (qkv, log_decays, rates)]
    slope = torch.randn(tokens, 4, 32)
    outputs = []
    for span in batch.spans:
        row = slice(span.start, span.stop)
        query, key, value = qkv[None, row].split(rule.widths, 2)
        output, _ = torch_chunk_gated_delta_rule(
            # Repeated, because transformers before 5.18 wants as many heads as values have.
            query.unflatten(2, (2, 16)).repeat_interleave(2, 2),
            key.unflatten(2, (2, 16)).repeat_interleave(2, 2),
            value.unflatten(2, (4, 32)),
            log_decays[None, row],
            rates[None, row],
            use_qk_l2norm_in_kernel=True,
        )
        outputs.append(output[0])
    expected = torch.cat(outputs)
    expected_gradients = torch.autograd.grad(expected, inputs, slope)

    tables = RowTables(batch.spans, torch.device("cpu"))
    detached = [tensor.detach() for tensor in inputs]
    computed = rule.forward(*detached, tables)
    gradients = rule.backward(slope, *detached, tables)

    assert distance(computed, expected) < 1e-5
    for gradient, its_expected in zip(gradients, expected_gradients, strict=True):
        assert distance(gradient, its_expected) < 1e-4


def test_a_rate_of_zero_changes_no_state() -> None:
    """And its gradients are finite: n is divided by it."""
    import torch

    from finetune.engine.packed.gpu.delta_rule import DeltaRule, RowTables

    torch.manual_seed(0)
    batch = packed_rows((71,))
    tokens = batch.input_ids.shape[1]
    rule = DeltaRule(key_heads=1, value_heads=2, key_columns=16, value_columns=16)
    qkv = torch.randn(tokens, sum(rule.widths))
    log_decays, rates = torch.zeros(tokens, 2), torch.rand(tokens, 2)
    rates[20] = 0
    tables = RowTables(batch.spans, torch.device("cpu"))
    before = rule.forward(qkv, log_decays, rates, tables)
    gradients = rule.backward(
        torch.randn(tokens, 2, 16), qkv, log_decays, rates, tables
    )
    for gradient in gradients:
        assert torch.isfinite(gradient).all()
    assert not gradients[2][20].any()
    _, key, value = qkv.split(rule.widths, 1)
    key[20], value[20] = 5.0, 7.0

    assert torch.equal(rule.forward(qkv, log_decays, rates, tables), before)


def test_a_row_never_reaches_its_neighbours() -> None:
    import torch

    from finetune.engine.packed.gpu.delta_rule import DeltaRule, RowTables

    torch.manual_seed(0)
    batch = packed_rows()
    tokens = batch.input_ids.shape[1]
    rule = DeltaRule(key_heads=1, value_heads=2, key_columns=16, value_columns=16)
    qkv = torch.randn(tokens, sum(rule.widths))
    log_decays, rates = -torch.rand(tokens, 2), torch.rand(tokens, 2)
    slope = torch.randn(tokens, 2, 16)
    tables = RowTables(batch.spans, torch.device("cpu"))
    changed = slice(batch.spans[1].start, batch.spans[1].stop)
    results = []
    for size in (1.0, 5.0):
        qkv[changed] *= size
        results.append(
            (
                rule.forward(qkv, log_decays, rates, tables),
                *rule.backward(slope, qkv, log_decays, rates, tables),
            )
        )
    others = torch.ones(tokens, dtype=torch.bool)
    others[changed] = False
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[others], after[others])
    assert not torch.equal(results[0][0][changed], results[1][0][changed])


def test_padded_tables_change_nothing() -> None:
    import torch

    from finetune.engine.packed.gpu.delta_rule import DeltaRule, RowTables
    from finetune.engine.packed.gpu.pass_size import pass_size

    torch.manual_seed(0)
    batch = packed_rows()
    tokens = batch.input_ids.shape[1]
    size = pass_size(batch)
    rule = DeltaRule(key_heads=1, value_heads=2, key_columns=16, value_columns=16)
    qkv = torch.randn(size.tokens, sum(rule.widths))
    log_decays, rates = -torch.rand(size.tokens, 2), torch.rand(size.tokens, 2)
    slope = torch.randn(size.tokens, 2, 16)
    results = []
    for tables in (
        RowTables(batch.spans, torch.device("cpu")),
        RowTables(batch.spans, torch.device("cpu"), size),
    ):
        results.append(
            (
                rule.forward(qkv, log_decays, rates, tables)[:tokens],
                *rule.backward(slope, qkv, log_decays, rates, tables),
            )
        )
    for exact, padded in zip(*results, strict=True):
        assert torch.equal(exact[:tokens], padded[:tokens])


@pytest.mark.parametrize(
    ("channels", "taps"), [(40, 4), (200, 4), (40, 1), (40, 2), (40, 3), (40, 6)]
)
def test_short_convolution_is_transformers(channels: int, taps: int) -> None:
    """Qwen 3.5 has 4 taps; a base's config may say any other number."""
    import torch

    from finetune.engine.packed.gpu.short_convolution import (
        short_convolution,
        short_convolution_backward,
    )

    torch.manual_seed(0)
    batch = packed_rows()
    layer = torch.nn.Conv1d(
        channels, channels, taps, groups=channels, padding=taps - 1, bias=False
    ).requires_grad_(False)
    weight = layer.weight[:, 0].contiguous()
    x = torch.randn(batch.input_ids.shape[1], channels).requires_grad_()
    slope = torch.randn_like(x)
    outputs = []
    for span in batch.spans:
        row = x[span.start : span.stop]
        outputs.append(layer(row.T[None])[0, :, : len(row)].T)
    expected = torch.nn.functional.silu(torch.cat(outputs))
    (expected_gradient,) = torch.autograd.grad(expected, x, slope)

    x = x.detach()
    positions = batch.position_ids[0]
    computed = short_convolution(x, weight, positions)
    gradient = short_convolution_backward(slope, x, weight, positions)

    assert distance(computed, expected) < 1e-6
    assert distance(gradient, expected_gradient) < 1e-6


@pytest.mark.parametrize("boundary", [1, 31, 32, 33, 60])
def test_a_convolution_never_reaches_another_row(boundary: int) -> None:
    """Not even numbers that are not finite, at any place in the tokens of a program."""
    import torch

    from finetune.engine.packed.gpu.short_convolution import (
        short_convolution,
        short_convolution_backward,
    )

    torch.manual_seed(0)
    x, slope = torch.randn(2, 70, 40)
    weight = torch.randn(40, 4)
    positions = torch.cat([torch.arange(boundary), torch.arange(70 - boundary)])
    for row, other in (
        (slice(0, boundary), slice(boundary, 70)),
        (slice(boundary, 70), slice(0, boundary)),
    ):
        changed_x, changed_slope = x.clone(), slope.clone()
        changed_x[other] = changed_slope[other] = torch.nan
        computed = short_convolution(changed_x, weight, positions)
        gradient = short_convolution_backward(
            changed_slope, changed_x, weight, positions
        )
        alone = x[row], weight, positions[row]
        expected = short_convolution(*alone)
        expected_gradient = short_convolution_backward(slope[row], *alone)
        assert distance(computed[row], expected) < 1e-6
        assert distance(gradient[row], expected_gradient) < 1e-6


@pytest.mark.parametrize("recompute_output", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 128), (37, 128), (21, 24), (3, 2500)]
)
def test_gated_norm_is_transformers(
    rows: int, columns: int, recompute_output: bool
) -> None:
    """Heads of many to a program and larger than one, and the last program's rows."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    from finetune.engine.packed.gpu.gated_norm import gated_norm, gated_norm_backward
    from finetune.engine.packed.gpu.rms_norm import RmsNorm

    torch.manual_seed(0)
    module = Qwen3_5RMSNormGated(columns, 1e-3).requires_grad_(False)
    module.weight += 0.3 * torch.randn(columns)
    norm = RmsNorm(module.weight, module.variance_epsilon, False)
    x, gate, slope = torch.randn(3, rows, columns)
    # Of different sizes, so that a row shows whose norm it has.
    x *= torch.logspace(-2, 1, rows)[:, None]
    inputs = x.requires_grad_(), gate.requires_grad_()
    expected = module(*inputs)
    expected_gradients = torch.autograd.grad(expected, inputs, slope)

    x, gate = x.detach(), gate.detach()
    assert distance(gated_norm(x, gate, norm), expected) < 1e-6
    grad_output = slope.clone()
    grad_x, output = gated_norm_backward(grad_output, x, gate, norm, recompute_output)

    for gradient, its_expected in zip((grad_x, gate), expected_gradients, strict=True):
        for its_row, its_expected_row in zip(gradient, its_expected, strict=True):
            assert distance(its_row, its_expected_row) < 1e-5
    if recompute_output:
        assert output is grad_output
        assert distance(output, expected) < 1e-6
    else:
        assert output is None
        assert torch.equal(grad_output, slope)


def test_gated_norm_rounds_as_transformers_does() -> None:
    """In float16, as Triton's interpreter does not round to bfloat16."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

    from finetune.engine.packed.gpu.gated_norm import gated_norm
    from finetune.engine.packed.gpu.rms_norm import RmsNorm

    torch.manual_seed(0)
    module = Qwen3_5RMSNormGated(96).to(torch.float16).requires_grad_(False)
    module.weight += 0.3 * torch.randn(96)
    norm = RmsNorm(module.weight, module.variance_epsilon, False)
    x, gate = torch.randn(2, 50, 96).to(torch.float16)
    equal = gated_norm(x, gate, norm) == module(x, gate)
    # Two roundings to 11 bits; the square root's last bits may move one of them.
    assert equal.float().mean() > 0.99


def distance(computed: "torch.Tensor", expected: "torch.Tensor") -> float:
    """How far results are from others, as a share of these."""
    return float((computed - expected).detach().norm() / expected.detach().norm())
