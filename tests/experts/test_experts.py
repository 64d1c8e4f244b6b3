"""grouped_gemm and fused_moe on the CPU: against plain loops, gradients, dropped routes, refusals, operators."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from cases.experts import expert_loop, random_layer, relative_error

import moealign
from moealign import BackendUnavailable, InvalidInput, InvalidType, align, fused_moe, grouped_gemm
from moealign.experts import packed, records

# (tokens, top_k, experts, hidden, inner): one of everything, an expert without rows, all to few experts, odd sizes.
SIZES = [(1, 1, 1, 4, 4), (1, 8, 64, 16, 8), (7, 3, 5, 16, 12), (33, 2, 40, 9, 7), (64, 4, 2, 8, 16)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_equals_plain_loops(size, gated, bias, transposed):
    x, gate_up, down, weights, ids, biases = random_layer(*size, gated=gated, bias=bias, transposed=transposed)
    ids[0, -1] = -1 if size[0] > 1 else 0
    extra = {"gate_up_bias": biases[0], "down_bias": biases[1]} if bias else {}
    got = fused_moe(x, gate_up, down, weights, ids, transposed=transposed, **extra)
    want = expert_loop(x, gate_up, down, weights, ids, bias=biases, transposed=transposed)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(activation, gated):
    x, gate_up, down, weights, ids, _ = random_layer(9, 2, 4, 8, 6, gated=gated)
    got = fused_moe(x, gate_up, down, weights, ids, activation=activation)
    assert relative_error(got, expert_loop(x, gate_up, down, weights, ids, activation=activation)) < 1e-12


def clamped(rows):
    """The gate of gpt-oss: interleaved, clamped."""
    gate, up = rows[..., ::2].clamp(max=7.0), rows[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def test_a_callable_for_the_odd_gates():
    x, gate_up, down, weights, ids, biases = random_layer(9, 2, 4, 8, 6, bias=True)
    extra = {"gate_up_bias": biases[0], "down_bias": biases[1]}
    got = fused_moe(x, gate_up, down, weights, ids, activation=clamped, **extra)
    want = expert_loop(x, gate_up, down, weights, ids, activation=clamped, bias=biases)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize(("dtype", "max_error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_lower_precision_stays_where_it_puts_the_error(dtype, max_error):
    x, gate_up, down, weights, ids, _ = random_layer(40, 4, 16, 64, 48, dtype=dtype)
    want = expert_loop(*(each.double() for each in (x, gate_up, down, weights)), ids)
    got = fused_moe(x, gate_up, down, weights, ids)
    assert got.dtype is dtype
    assert relative_error(got, want) < max_error


def test_expert_maps_and_valid_counts():
    x, gate_up, down, weights, _, _ = random_layer(12, 3, 4, 8, 6)
    ids = torch.randint(-1, 11, (12, 3), generator=torch.Generator().manual_seed(5))
    # Global experts 0 to 9, four of them local; the map sends 7 to a local expert without weights.
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 7, -1, -1])
    valid = torch.tensor([9], dtype=torch.int32)
    got = fused_moe(x, gate_up, down, weights, ids, expert_map=expert_map, num_valid_tokens=valid)
    want = expert_loop(x, gate_up, down, weights, ids, expert_map=expert_map, valid=9)
    assert relative_error(got, want) < 1e-12
    assert not got[9:].any()


def test_ranks_of_expert_parallelism_add_up():
    x, gate_up, down, weights, ids, _ = random_layer(20, 3, 6, 8, 6)
    total = torch.zeros_like(x)
    for rank in range(3):
        here = slice(2 * rank, 2 * rank + 2)
        expert_map = torch.full((6,), -1)
        expert_map[here] = torch.arange(2)
        total += fused_moe(x, gate_up[here], down[here], weights, ids, expert_map=expert_map)
    assert relative_error(total, fused_moe(x, gate_up, down, weights, ids)) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dropped_routes_add_exactly_zero(bad):
    x, gate_up, down, weights, ids, biases = random_layer(6, 2, 4, 8, 6, bias=True)
    extra = {"gate_up_bias": biases[0], "down_bias": biases[1]}
    ids[2] = 4  # the sentinel of Transformers' expert parallelism
    ids[3, 0] = -1
    x[2] = bad  # a padding row of a CUDA graph
    weights[2], weights[3, 0] = bad, bad
    got = fused_moe(x, gate_up, down, weights, ids, **extra)
    assert torch.equal(got[2], torch.zeros(8, dtype=torch.float64))
    clean = weights.clone().masked_fill((ids < 0) | (ids > 3), 0)
    want = expert_loop(x.nan_to_num(0, 0, 0), gate_up, down, clean, ids, bias=biases)
    assert relative_error(got, want) < 1e-12


def test_a_bad_expert_without_routes_does_not_show():
    x, gate_up, down, weights, ids, _ = random_layer(6, 2, 4, 8, 6)
    ids[ids == 1] = 2
    gate_up[1], down[1] = float("nan"), float("nan")
    assert fused_moe(x, gate_up, down, weights, ids).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_many_rows_an_expert_are_computed_one_expert_at_a_time(dtype, monkeypatch):
    taken = []
    original = packed.loops_over_experts
    monkeypatch.setattr(packed, "loops_over_experts", lambda *args: taken.append(original(*args)) or taken[-1])
    x, gate_up, down, weights, ids, biases = random_layer(150, 3, 3, 8, 16, bias=True)
    ids[::7, 1] = -1
    extra = {"gate_up_bias": biases[0].to(dtype), "down_bias": biases[1].to(dtype)}
    layer = [each.to(dtype) for each in (x, gate_up, down)]
    bad = weights.masked_fill(ids < 0, float("nan"))
    want = expert_loop(x, gate_up, down, weights, ids, bias=biases)
    for router_weights in (bad, bad.clone().requires_grad_()):
        got = fused_moe(*layer, router_weights, ids, **extra).detach()
        assert relative_error(got, want) < (1e-12 if dtype is torch.float64 else 1e-2)
    assert taken == [True, False], "a gradient takes the way that has one"


@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_nothing_to_do(shape):
    x = torch.ones(shape[0], 4)
    got = fused_moe(
        x, torch.ones(2, 8, 4), torch.ones(2, 4, 4), torch.ones(shape), torch.zeros(shape, dtype=torch.int32)
    )
    assert got.shape == x.shape
    assert not got.any()


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", clamped])
def test_gradients_of_the_layer(transposed, activation):
    x, gate_up, down, weights, ids, biases = random_layer(5, 2, 4, 6, 4, bias=True, transposed=transposed)
    ids[1, 0] = -1
    ids[ids == 3] = 2  # an expert without a route: its gradient is zero, not missing
    leaves = [each.requires_grad_() for each in (x, gate_up, down, weights, *biases)]

    def layer(x, gate_up, down, weights, first, second):
        return fused_moe(
            x,
            gate_up,
            down,
            weights,
            ids,
            activation=activation,
            gate_up_bias=first,
            down_bias=second,
            transposed=transposed,
        )

    assert torch.autograd.gradcheck(layer, leaves)
    layer(*leaves).sum().backward()
    assert gate_up.grad is not None
    assert not gate_up.grad[3].any()
    assert weights.grad[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_callables_with_parameters_see_no_rows_of_dropped_routes(dtype):
    """What stands in memory past the last kept route must not reach the gradient of a norm."""
    x, gate_up, down, weights, ids, _ = random_layer(24, 2, 8, 16, 16, dtype=dtype)
    ids[4:] = -1
    grads = []
    for part in (slice(None), slice(4)):
        scale, slope = (torch.ones(16, dtype=dtype, requires_grad=True) for _ in range(2))
        filled = [torch.full((64, 64), float("nan"), dtype=dtype) for _ in range(64)]  # poisons what is allocated next
        del filled
        out = fused_moe(
            x[part],
            gate_up,
            down,
            weights[part],
            ids[part],
            activation=lambda rows, slope=slope: torch.tanh(rows[:, :16] * slope) * rows[:, 16:],
            output_rows=lambda rows, scale=scale: torch.nn.functional.rms_norm(rows, (16,), scale),
        )
        out[:4].square().sum().backward()
        grads.append((scale.grad, slope.grad))
    for whole, kept in zip(*grads, strict=True):
        assert relative_error(whole, kept) < 1e-5


def test_gradients_of_gradients():
    x, gate_up, down, weights, ids, _ = random_layer(3, 2, 3, 4, 4)
    leaves = [each.requires_grad_() for each in (x, gate_up, down, weights)]
    assert torch.autograd.gradgradcheck(lambda *a: fused_moe(*a, ids), leaves)


def test_gradients_of_one_product():
    x, gate_up, _, weights, ids, biases = random_layer(5, 2, 4, 6, 4, bias=True)
    ids[0, 0] = 9
    layout = align(ids, block_size=4, num_experts=4)
    leaves = [each.requires_grad_() for each in (x, gate_up, weights, biases[0])]

    def product(a, b, weights, bias):
        return grouped_gemm(a, b, layout, top_k=2, row_weights=weights, bias=bias, activation="silu_mul")

    assert torch.autograd.gradcheck(product, leaves)


def test_float32_gradients_equal_those_of_plain_loops():
    x, gate_up, down, weights, ids, _ = random_layer(17, 3, 6, 16, 12, dtype=torch.float32)
    grads = []
    for layer in (fused_moe, expert_loop):
        leaves = [each.clone().requires_grad_() for each in (x, gate_up, down, weights)]
        layer(*leaves, ids).square().sum().backward()
        grads.append([each.grad for each in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_kernels_are_not_taken_for_derivatives_that_they_do_not_give():
    x, gate_up, down, weights, ids, _ = random_layer(3, 2, 3, 4, 4, dtype=torch.float32)
    x.requires_grad_()
    for options in ({"activation": lambda rows: rows[:, :4]}, {"output_rows": torch.sin}):
        assert fused_moe(x, gate_up, down, weights, ids, **options).requires_grad
        with pytest.raises(BackendUnavailable, match="no gradients of callables"):
            fused_moe(x, gate_up, down, weights, ids, **options, backend="triton")
    with torch.no_grad():
        assert not fused_moe(x, gate_up, down, weights, ids).requires_grad


# ---- what a backward keeps, and where it writes ----------------------------------------------------------------------


def training_step(options, bias=False, dtype=torch.float64, activation="silu"):
    """Gradients of a layer's inputs, and the number of elements that its graph keeps beside them."""
    *tensors, ids, biases = random_layer(9, 2, 4, 8, 6, dtype=dtype, bias=bias)
    inputs = [each.requires_grad_() for each in (*tensors, *(biases or ()))]
    extra = dict(zip(("gate_up_bias", "down_bias"), inputs[4:], strict=False))
    kept, own = [], {each.data_ptr() for each in (*inputs, ids)}

    def pack(tensor):
        kept.append(tensor.numel() if tensor.data_ptr() not in own else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        out = fused_moe(*inputs[:4], ids, **extra, activation=activation, **options)
    out.square().sum().backward()
    return [each.grad for each in inputs], sum(kept)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", lambda rows: rows[:, :6] * rows[:, 6:]])
def test_recomputed_rows_give_the_same_gradients_and_are_not_kept(bias, activation):
    want, kept = training_step({}, bias, activation=activation)
    got, less = training_step({"recompute": True}, bias, activation=activation)
    assert all(map(torch.equal, got, want))
    assert less < kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["silu", lambda rows: rows[:, :6] * rows[:, 6:]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_weights_are_added_to_buffers(recompute, activation, dtype):
    want, _ = training_step({}, dtype=dtype, activation=activation)
    start = [torch.randn(each.shape, dtype=dtype) for each in want[1:3]]
    buffers = tuple(each.clone() for each in start)
    options = {"recompute": recompute, "weight_grads": buffers}
    got, _ = training_step(options, dtype=dtype, activation=activation)
    assert got[1] is None
    assert got[2] is None
    assert torch.equal(got[0], want[0])
    for buffer, before, one in zip(buffers, start, want[1:3], strict=True):
        assert torch.equal(buffer, before + one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", lambda rows: rows[:, :24] * rows[:, 24:]])
def test_a_token_does_not_depend_on_its_batch(dtype, activation):
    *tensors, ids, biases = random_layer(40, 2, 4, 40, 24, dtype=dtype, bias=True)
    x, gate_up, down, weights = tensors
    ids[3, 0], grad = -1, torch.randn(40, 40).to(dtype)

    def step(rows):
        leaves = [x[rows].clone().requires_grad_(), weights[rows].clone().requires_grad_()]
        options = {"gate_up_bias": biases[0], "down_bias": biases[1], "activation": activation}
        out = fused_moe(leaves[0], gate_up, down, leaves[1], ids[rows], **options, batch_invariant=True)
        return [out, *torch.autograd.grad(out, leaves, grad[rows])]

    whole = step(torch.arange(40))
    want = fused_moe(*(each.double() for each in tensors), ids, gate_up_bias=biases[0].double(),
                     down_bias=biases[1].double(), activation=activation)  # fmt: skip
    assert relative_error(whole[0], want) < (1e-6 if dtype is torch.float32 else 2e-2)
    for seed in range(4):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(1 + 7 * seed):
            for one, every in zip(step(rows), whole, strict=True):
                assert torch.equal(one, every[rows])


def test_batch_invariance_knows_the_valid_tokens():
    *layer, ids, _ = random_layer(9, 2, 4, 8, 6)
    valid = torch.tensor([5], dtype=torch.int32)
    got = fused_moe(*layer, ids, num_valid_tokens=valid, batch_invariant=True)
    assert relative_error(got, fused_moe(*layer, ids, num_valid_tokens=valid)) < 1e-12
    assert not got[5:].any()
    assert fused_moe(layer[0][:0], *layer[1:3], layer[3][:0], ids[:0], batch_invariant=True).shape == (0, 8)


def test_how_many_routes_are_expected_changes_no_values():
    x, gate_up, down, weights, ids, _ = random_layer(6, 2, 4, 8, 6, dtype=torch.float32)
    leaves = [each.requires_grad_() for each in (x, gate_up, down, weights)]

    def step(call, **options):
        out = call(*leaves, ids, **options)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    want = step(fused_moe)
    compiled = torch.compile(fused_moe, backend="aot_eager", dynamic=True)
    for call, expected in ((fused_moe, 0), (fused_moe, 3), (compiled, 3), (compiled, 5)):
        for one, other in zip(step(call, expected_routes=expected), want, strict=True):
            torch.testing.assert_close(one, other)
    with torch.no_grad():
        half = {"activation": lambda rows: rows[:, :6].tanh()}
        torch.testing.assert_close(fused_moe(*leaves, ids, **half, expected_routes=3), fused_moe(*leaves, ids, **half))
    for wrong, error in ((-1, InvalidInput), (2.0, InvalidType), (True, InvalidType), ("all", InvalidType)):
        with pytest.raises(error, match="expected_routes: expected"):
            fused_moe(*leaves, ids, expected_routes=wrong)


def test_buffers_that_cannot_hold_the_gradients_are_refused():
    x, gate_up, down, weights, ids, _ = random_layer(3, 2, 3, 4, 4, dtype=torch.bfloat16)
    right = (torch.zeros(gate_up.shape), torch.zeros(down.shape))

    def refused(buffers, error, message, **options):
        with pytest.raises(error, match=message):
            fused_moe(x, gate_up, down, weights, ids, weight_grads=buffers, **options)

    refused(right[0], InvalidType, "expected two tensors")
    refused((right[0], None), InvalidType, r"weight_grads\[1\]: expected a torch.Tensor")
    refused(right[::-1], InvalidInput, r"weight_grads\[0\]: expected a contiguous")
    refused((right[0].transpose(1, 2).contiguous().transpose(1, 2), right[1]), InvalidInput, "contiguous")
    refused((right[0].double(), right[1]), InvalidType, "expected float32 or torch.bfloat16")
    refused((right[0].requires_grad_(), right[1]), InvalidInput, "requires_grad=True")
    right[0].requires_grad_(False)
    refused(right, InvalidType, "recompute: expected True or False", recompute=1)
    refused(right, InvalidType, "batch_invariant: expected True or False", batch_invariant="yes")
    with pytest.raises(InvalidInput, match="expected an eager call"):
        torch.compile(fused_moe, backend="eager")(x, gate_up, down, weights, ids, weight_grads=right)
    out = fused_moe(x, gate_up.requires_grad_(), down, weights, ids, weight_grads=right)
    with pytest.raises(InvalidInput, match="expected a plain backward"):
        out.sum().backward(retain_graph=True, create_graph=True)
    with pytest.raises(InvalidInput, match="expected a plain backward"):
        torch.autograd.grad(out, gate_up, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)
    assert not right[0].requires_grad
    assert not right[0].any()


# ---- one product ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("transposed", [True, False])
def test_grouped_gemm_writes_each_route_its_row(block_size, transposed):
    x, gate_up, _, weights, ids, biases = random_layer(11, 3, 7, 8, 5, bias=True, transposed=transposed)
    ids[4] = torch.tensor([-1, 7, 2])
    layout = align(ids, block_size=block_size, num_experts=7)
    got = grouped_gemm(x, gate_up, layout, top_k=3, row_weights=weights, bias=biases[0], transposed=transposed)
    full = gate_up.transpose(1, 2) if transposed else gate_up
    for route, expert in enumerate(ids.reshape(-1).tolist()):
        if 0 <= expert < 7:
            row = weights.reshape(-1)[route] * (full[expert] @ x[route // 3] + biases[0][expert])
            assert relative_error(got[route], row) < 1e-12
        else:
            assert not got[route].any()


def test_grouped_gemm_reads_foreign_blocks_batches_and_bare_tuples():
    x, gate_up, _, _, ids, _ = random_layer(6, 2, 3, 8, 5)
    expert_map = torch.tensor([-1, 0, 1])
    named = align(ids, block_size=4, num_experts=3, expert_map=expert_map)  # foreign blocks stay, marked
    ignored = align(ids, block_size=4, num_experts=3, expert_map=expert_map, ignore_invalid_experts=True)
    got = grouped_gemm(x, gate_up[1:], named, top_k=2)
    assert torch.equal(got, grouped_gemm(x, gate_up[1:], ignored, top_k=2))
    assert not got[ids.reshape(-1) == 0].any()
    bare = moealign.BlockLayout(*moealign.moe_align_block_size(ids, 4, 3), block_size=4)
    whole = align(ids, block_size=4, num_experts=3)
    assert torch.equal(grouped_gemm(x, gate_up, bare, top_k=2), grouped_gemm(x, gate_up, whole, top_k=2))
    batched = moealign.align_batched(torch.tensor([2, 0, 3]), max_tokens_per_batch=4, block_size=4)
    rows = torch.randn(12, 8, dtype=torch.float64)
    got = grouped_gemm(rows, gate_up, batched, top_k=1)
    assert relative_error(got[8:11], rows[8:11] @ gate_up[2].T) < 1e-12
    assert not got[2:8].any()


def test_grouped_gemm_fills_a_buffer():
    x, gate_up, _, _, ids, _ = random_layer(6, 2, 3, 8, 5)
    layout = align(ids, block_size=4, num_experts=3)
    out = torch.full((12, 10), float("nan"), dtype=torch.float64)
    assert grouped_gemm(x, gate_up, layout, top_k=2, out=out) is out
    assert torch.equal(out, grouped_gemm(x, gate_up, layout, top_k=2))


@pytest.mark.parametrize("options", [{}, {"activation": torch.tanh}, {"batch_invariant": True}])
def test_fused_moe_fills_a_buffer(options):
    x, gate_up, down, weights, ids, _ = random_layer(6, 2, 3, 8, 5, gated="activation" not in options)
    want = fused_moe(x, gate_up, down, weights, ids, **options)
    out = torch.full_like(x, float("nan"))
    assert fused_moe(x, gate_up, down, weights, ids, out=out, **options) is out
    assert torch.equal(out, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = [each.float() for each in (x, gate_up, down, weights)]
        assert fused_moe(*single, ids, out=(into := torch.empty(6, 8)), **options) is into
        assert torch.equal(into, fused_moe(*single, ids, **options))
    assert fused_moe(x, gate_up, down, weights, ids, out=x, **options) is x
    assert torch.equal(x, want)


def test_a_compiled_fused_moe_fills_a_buffer():
    x, gate_up, down, weights, ids, _ = random_layer(6, 2, 3, 8, 5)
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    out = torch.full_like(x, float("nan"))
    assert compiled(x, gate_up, down, weights, ids, out=out) is out
    assert torch.equal(out, fused_moe(x, gate_up, down, weights, ids))


# ---- refusals ------------------------------------------------------------------------------------------------------


def layer_call(**changed):
    x, gate_up, down, weights, ids, _ = random_layer(4, 2, 3, 8, 6, dtype=torch.float32)
    call = {
        "hidden_states": x,
        "gate_up_proj": gate_up,
        "down_proj": down,
        "topk_weights": weights,
        "topk_ids": ids,
        **changed,
    }
    return fused_moe(**call)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_states": torch.zeros(4, 8, dtype=torch.int32)}, InvalidType, "hidden_states: expected bfloat16"),
        ({"down_proj": torch.zeros(3, 8, 6, dtype=torch.float64)}, InvalidType, "down_proj: expected torch.float32"),
        ({"down_proj": [1]}, InvalidType, "down_proj: expected a torch.Tensor, got list"),
        ({"hidden_states": torch.zeros(4, 9)}, InvalidInput, "transposed=True"),
        ({"hidden_states": torch.zeros(8)}, InvalidInput, r"expected \[T, H\]"),
        ({"down_proj": torch.zeros(3, 8, 5)}, InvalidInput, "gate_up_proj: expected 2I = 10 or I = 5"),
        (
            {"topk_ids": torch.zeros(4, 3, dtype=torch.int64)},
            InvalidInput,
            r"topk_weights: expected \[4, k\]",
        ),
        ({"activation": "swish"}, InvalidInput, "activation: expected one of gelu, gelu_tanh, relu, relu2, silu"),
        ({"activation": 3}, InvalidType, "activation: expected a name, a Gate or a callable"),
        ({"gate_up_bias": torch.zeros(3, 6)}, InvalidInput, r"gate_up_bias: expected \[3, 12\]"),
        ({"block_size": 48}, InvalidInput, "block_size: expected one of 16, 32, 64, 128, got 48"),
        ({"backend": "cuda"}, BackendUnavailable, "backend: expected one of triton, packed, got 'cuda'"),
        ({"topk_ids": torch.zeros(4, 2)}, InvalidType, "topk_ids: expected an integer dtype"),
        ({"out": torch.zeros(4, 7)}, InvalidInput, r"out: expected a contiguous \[4, 8\] of torch.float32"),
        ({"out": [1]}, InvalidType, "out: expected a torch.Tensor, got list"),
        (
            {"out": torch.zeros(4, 8), "hidden_states": torch.zeros(4, 8, requires_grad=True)},
            InvalidInput,
            "out: expected no buffer where gradients are wanted",
        ),
    ],
)
def test_fused_moe_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        layer_call(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"layout": 3}, InvalidType, "layout: expected a BlockLayout, got int"),
        ({"layout": moealign.BlockLayout(*[torch.zeros(1)] * 3)}, InvalidInput, "layout: expected its block_size"),
        ({"b": torch.zeros(3, 9, 7)}, InvalidInput, r"b: expected \[E, N, 8\].*transposed=True"),
        ({"top_k": 3}, InvalidInput, "top_k: expected 8 routes as in the layout, got 4 rows times top_k = 3"),
        ({"top_k": 0}, InvalidInput, "top_k: expected an int of at least 1, got 0"),
        ({"row_weights": torch.zeros(3)}, InvalidInput, "row_weights: expected 8 elements"),
        ({"bias": torch.zeros(3, 5)}, InvalidInput, r"bias: expected \[E, N\] = \[3, 12\]"),
        ({"activation": "silu_div"}, InvalidInput, "activation: expected one of"),
        ({"out": torch.zeros(8, 3)}, InvalidInput, r"out: expected a contiguous \[8, 12\]"),
        ({"b": torch.zeros(8, 8)}, InvalidInput, r"a, b: expected \[T, K\] and \[E, N, K\]"),
        ({"backend": "triton"}, BackendUnavailable, "expected tensors on a GPU"),
    ],
)
def test_grouped_gemm_refuses(changed, error, message):
    x, gate_up, _, _, ids, _ = random_layer(4, 2, 3, 8, 6, dtype=torch.float32)
    call = {"a": x, "b": gate_up, "layout": align(ids, block_size=4, num_experts=3), "top_k": 2, **changed}
    with pytest.raises(error, match=message):
        grouped_gemm(call.pop("a"), call.pop("b"), call.pop("layout"), **call)


# ---- operators -----------------------------------------------------------------------------------------------------


def test_operators_pass_opcheck():
    rows = torch.randn(6, 4, requires_grad=True)
    weights = torch.randn(3, 5, 4, requires_grad=True)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.moealign.grouped_mm.default, (rows, weights, ends))
    grads = torch.randn(6, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.moealign.grouped_mm_weights.default, (grads, rows, ends, 3))


def test_the_operators_of_the_kernels_work_where_the_kernels_do_not():
    """What a tracer wrote for a GPU runs anywhere: the operator takes the other path by itself."""
    x, gate_up, down, weights, ids, _ = random_layer(5, 2, 4, 8, 6, dtype=torch.float32)
    layer = (x, gate_up, down, weights, ids, None, None, "silu", None, None, False, None)
    torch.library.opcheck(torch.ops.moealign.fused_moe.default, layer)
    torch.library.opcheck(torch.ops.moealign.fused_moe.default, (*layer, False, None, None, False, 4))
    want = fused_moe(x, gate_up, down, weights, ids)
    assert relative_error(torch.ops.moealign.fused_moe(*layer), want) < 1e-6
    layout = align(ids, block_size=16, num_experts=4)
    out = torch.zeros(10, 12)
    product = (x, gate_up, *layout, 2, 16, weights, None, None, False, False)
    torch.library.opcheck(torch.ops.moealign.grouped_gemm.out, product, {"out": out})
    torch.ops.moealign.grouped_gemm.out(*product, out=out)
    assert relative_error(out, grouped_gemm(x, gate_up, layout, top_k=2, row_weights=weights)) < 1e-6


@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_to_one_graph_for_all_numbers_of_tokens(gradients):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = torch.compile(fused_moe, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (5, 9, 33):
        x, gate_up, down, weights, ids, _ = random_layer(tokens, 2, 4, 8, 6)
        x.requires_grad_(gradients)
        got = layer(x, gate_up, down, weights, ids)
        assert relative_error(got.detach(), expert_loop(x.detach(), gate_up, down, weights, ids)) < 1e-12
        if gradients:
            (grad,) = torch.autograd.grad(got.sum(), x)
            (want,) = torch.autograd.grad(fused_moe(x, gate_up, down, weights, ids).sum(), x)
            assert relative_error(grad, want) < 1e-12
    assert counter.frame_count == 1


def test_fakes_have_the_right_shape():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        empty = torch.empty
        x, ids = empty(5, 8), empty(5, 2, dtype=torch.int64)
        assert fused_moe(x, empty(3, 12, 8), empty(3, 8, 6), empty(5, 2), ids).shape == (5, 8)
        rows = torch.ops.moealign.grouped_mm(x, empty(3, 12, 8), empty(3, dtype=torch.int32))
        assert rows.shape == (5, 12)


def test_records_have_no_properties():
    """The Dynamo of torch 2.10 reads fields and methods of tuples, and nothing else."""
    for kind in vars(records).values():
        if isinstance(kind, type) and issubclass(kind, tuple):
            assert not [name for name, value in vars(kind).items() if isinstance(value, property)]


def test_a_layout_of_more_experts_than_weights_is_refused_unless_it_is_mapped():
    ids, rows, weights = torch.tensor([[0, 4], [3, 1]]), torch.randn(2, 8), torch.randn(3, 8, 8)
    with pytest.raises(InvalidInput, match="layout: expected at most 3 experts, for which b has weights, got 5"):
        grouped_gemm(rows, weights, align(ids, block_size=2, num_experts=5), top_k=2)
    expert_map = torch.tensor([2, -1, -1, 0, 1])
    for ignore in (False, True):
        layout = align(ids, block_size=2, num_experts=5, expert_map=expert_map, ignore_invalid_experts=ignore)
        assert layout.mapped
        got = grouped_gemm(rows, weights, layout, top_k=2)
        want = torch.stack([weights[2] @ rows[0], weights[1] @ rows[0], weights[0] @ rows[1], torch.zeros(8)])
        torch.testing.assert_close(got, want)
