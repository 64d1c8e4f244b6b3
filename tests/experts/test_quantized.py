"""Quantised weights on every path that runs here, against plain loops that state their arithmetic."""

from __future__ import annotations

import pytest
import torch
from cases.experts import (
    ROUNDING,
    SCHEMES,
    Near,
    quantized_loop,
    quantized_product,
    random_layer,
    random_quantized,
    relative_error,
)

import moealign
from moealign import Gate, InvalidInput, InvalidType, QuantizedWeights, fused_moe, grouped_gemm
from moealign.experts import quantized

NAMES = [f"{block[0]}x{block[1]}-{activations}{'-e' * each}" for block, activations, each in SCHEMES]
MAX_ERROR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def layer(tokens=9, top_k=2, experts=4, hidden=144, inner=20, scheme=SCHEMES[0], dtype=torch.float32, gated=True):
    """(x, gate_up, down, weights, ids) with odd sizes and a dropped route."""
    x, _, _, weights, ids, _ = random_layer(tokens, top_k, experts, hidden, inner, dtype=dtype)
    ids[-1, 0] = experts
    gate_up = random_quantized(experts, (1 + gated) * inner, hidden, scheme, 1)
    return x, gate_up, random_quantized(experts, hidden, inner, scheme, 2, 2.0), weights, ids


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
@pytest.mark.parametrize("dtype", MAX_ERROR, ids=str)
def test_a_layer_equals_plain_loops(scheme, dtype):
    call = layer(scheme=scheme, dtype=dtype)
    got = fused_moe(*call)
    assert got.dtype is dtype
    assert relative_error(got, quantized_loop(*call)) < MAX_ERROR[dtype]


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner"), [(1, 128, 128), (1, 1, 1), (3, 256, 128), (5, 130, 257), (70, 127, 65), (0, 16, 8)]
)
def test_odd_sizes(tokens, hidden, inner):
    call = layer(tokens or 1, hidden=hidden, inner=inner)
    call = (call[0][:tokens], *call[1:3], call[3][:tokens], call[4][:tokens])
    got = fused_moe(*call)
    assert got.shape == (tokens, hidden)
    assert relative_error(got, quantized_loop(*call)) < 2e-6


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
def test_activations(activation, gated):
    call = layer(gated=gated)
    assert relative_error(fused_moe(*call, activation=activation), quantized_loop(*call, activation=activation)) < 2e-6


@pytest.mark.parametrize(
    "gate", [Gate(limit=0.5, alpha=1.702, offset=1.0, interleaved=True), Gate("situ")], ids=["gpt-oss", "situ"]
)
def test_gates_biases_maps_and_valid_tokens(gate):
    x, gate_up, down, weights, _ = layer(12)
    ids = torch.randint(-1, 9, (12, 2), generator=torch.Generator().manual_seed(3))
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 7])  # 7: a local expert without weights
    biases = random_layer(1, 1, 4, 144, 20, dtype=torch.float32, bias=True)[5]
    weights[ids == 0] = float("nan")
    x[9:] = float("nan")
    options = {"expert_map": expert_map, "activation": gate}
    got = fused_moe(
        x, gate_up, down, weights, ids, **options, num_valid_tokens=torch.tensor([9], dtype=torch.int32),
        gate_up_bias=biases[0], down_bias=biases[1],
    )  # fmt: skip
    want = quantized_loop(x, gate_up, down, weights, ids, **options, valid=9, bias=biases)
    assert relative_error(got, want) < 2e-6
    assert not got[9:].any()


def test_callables_run_on_rows_in_the_dtype_of_the_layer():
    x, gate_up, down, weights, ids = layer(dtype=torch.bfloat16)
    seen = []

    def act(rows):
        seen.append(rows.dtype)
        return torch.tanh(rows[:, ::2]) * rows[:, 1::2]

    def norm(rows):
        seen.append(rows.dtype)
        return rows * 2

    for backend in (None, "packed"):
        got = fused_moe(x, gate_up, down, weights, ids, activation=act, output_rows=norm, backend=backend)
        want = quantized_loop(x, gate_up, down, 2 * weights, ids, activation=act)
        assert relative_error(got, want) < 2e-2  # rows of the first product are rounded before they are quantised
    assert torch.bfloat16 in seen
    named = fused_moe(x.float(), gate_up, down, weights, ids, output_rows=norm)
    assert relative_error(named, quantized_loop(x.float(), gate_up, down, 2 * weights, ids)) < 2e-6


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_one_product_equals_plain_loops(scheme):
    x, gate_up, _, weights, ids = layer(scheme=scheme)
    layout = moealign.align(ids, block_size=16, num_experts=4)
    bias = torch.randn(4, 40)
    got = grouped_gemm(x, gate_up, layout, top_k=2, bias=bias, row_weights=weights, activation="silu_mul")
    plain = grouped_gemm(x, gate_up, layout, top_k=2)
    for route, expert in enumerate(ids.flatten().tolist()):
        if expert == 4:
            assert not plain[route].any()
            continue
        rows = quantized_product(x[route // 2], gate_up, expert).values
        assert relative_error(plain[route], rows) < 2e-6
        gate, up = (rows + bias[expert].double()).chunk(2)
        want = torch.nn.functional.silu(gate) * up * weights.flatten()[route].double()
        assert relative_error(got[route], want) < 3e-6
    out = torch.empty_like(plain)
    assert grouped_gemm(x, gate_up, layout, top_k=2, out=out) is out
    assert torch.equal(out, plain)


def test_what_is_e4m3_already_gives_the_product_of_the_values():
    x, gate_up, *_, ids = layer(hidden=128)
    x = x.to(torch.float8_e4m3fn).float()
    x[:, 0] = 448
    gate_up.scales.fill_(2.0**-12)
    layout = moealign.align(ids, block_size=16, num_experts=4)
    want = grouped_gemm(x, gate_up.data.float() * 2.0**-12, layout, top_k=2)
    assert relative_error(grouped_gemm(x, gate_up, layout, top_k=2), want) < 1e-6


@pytest.mark.parametrize("activations", quantized.SCHEMES)
def test_values_are_rounded_to_the_nearest_and_ties_to_even(activations):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448, ascending
    middles = (codes[1:] + codes[:-1]) / 2
    rows = torch.cat([codes, middles, -codes, middles.nextafter(codes[1:]), codes[-1:]]).unsqueeze(0)
    if activations == "group":  # one group holds the largest value, so that the scale is 1
        rows = torch.nn.functional.pad(rows[:, : 128 * 3], (0, 0)).view(3, 128).clone()
        rows[:, 0] = 448
    got, scales = quantized.quantize_rows(rows, activations, torch.ones(1))
    assert torch.equal(scales, torch.ones_like(scales))
    for value, one in zip(rows.flatten().tolist(), got.float().flatten().tolist(), strict=True):
        distances = (codes - abs(value)).abs()
        nearest = (distances == distances.min()).nonzero().flatten().tolist()
        even = [index for index in nearest if index % 2 == 0] if len(nearest) > 1 else nearest
        assert one == (codes[even[0]].item() if value >= 0 else -codes[even[0]].item())


def test_nan_infinity_saturation_and_rows_of_zeros():
    x, gate_up, down, weights, ids = layer(4, experts=1, hidden=256, inner=128)
    ids.zero_()
    x[0] = 0
    x[1, 5] = float("nan")
    x[2, 200] = float("inf")
    got = fused_moe(x, gate_up, down, weights, ids)
    assert not got[0].any()
    assert got[1].isnan().all()
    assert got[2].isnan().all()
    assert got[3].isfinite().all()
    static = gate_up._replace(activations="static", activation_scale=torch.tensor([0.01]))
    layout = moealign.align(ids, block_size=16, num_experts=1)
    cut, far = x.clone(), x.clone()
    cut[2, 200], far[2, 200] = 4.48, 1e30  # with infinity, three values that are all cut off at 448
    rows = [grouped_gemm(each, static, layout, top_k=2) for each in (x, cut, far)]
    assert torch.equal(rows[0][4], rows[1][4])
    assert torch.equal(rows[0][4], rows[2][4])
    assert rows[0][2].isnan().all()
    gate_up.data.view(torch.uint8)[0, 3, 0] = 0x7F  # a NaN among the weights, of one output
    rows = grouped_gemm(x[3:], gate_up, layout=moealign.align(ids[3:], block_size=16, num_experts=1), top_k=2)
    assert rows[0].isnan().nonzero().flatten().tolist() == [3]


def test_batch_invariance():
    x, gate_up, down, weights, ids = layer(30)
    run = lambda part: fused_moe(x[part], gate_up, down, weights[part], ids[part], batch_invariant=True)  # noqa: E731
    whole = run(slice(0, 30))
    assert torch.equal(torch.cat([run(slice(0, 7)), run(slice(7, 30))]), whole)
    assert relative_error(whole, quantized_loop(x, gate_up, down, weights, ids)) < 2e-6


# ---- a checkpoint's layout -------------------------------------------------------------------------------------------


def test_the_tensors_of_a_checkpoint(tmp_path):
    """Names, shapes and dtypes of DeepSeek-V3's and Qwen3's FP8 files, through a file, stacked as the page says."""
    safetensors = pytest.importorskip("safetensors.torch")
    experts, hidden, inner = 3, 256, 192
    prefix, state = "model.layers.3.mlp.experts", {}
    for expert in range(experts):
        for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
            one = random_quantized(1, *shape, seed=10 * expert + number)
            state[f"{prefix}.{expert}.{name}.weight"] = one.data[0]
            state[f"{prefix}.{expert}.{name}.weight_scale_inv"] = one.scales[0]
    safetensors.save_file(state, tmp_path / "layer.safetensors")
    read = safetensors.load_file(tmp_path / "layer.safetensors")

    def stacked(suffix, *names):
        return torch.stack(
            [torch.cat([read[f"{prefix}.{e}.{name}.{suffix}"] for name in names]) for e in range(experts)]
        )

    # 192 outputs are no multiple of 128: scales of gate and up cannot be joined, so each output has its own row of them
    scales = torch.cat(
        [stacked("weight_scale_inv", name).repeat_interleave(128, 1)[:, :inner] for name in ("gate_proj", "up_proj")], 1
    )
    gate_up = QuantizedWeights(stacked("weight", "gate_proj", "up_proj"), scales, (1, 128))
    down = QuantizedWeights(stacked("weight", "down_proj"), stacked("weight_scale_inv", "down_proj"))
    x, _, _, weights, ids, _ = random_layer(5, 2, experts, hidden, inner, dtype=torch.float32)
    want, slack = torch.zeros(2, 5, hidden, dtype=torch.float64)
    for token in range(5):
        for choice in range(2):
            expert = int(ids[token, choice])
            parts = {
                name: QuantizedWeights(
                    read[f"{prefix}.{expert}.{name}.weight"][None],
                    read[f"{prefix}.{expert}.{name}.weight_scale_inv"][None],
                )
                for name in ("gate_proj", "up_proj", "down_proj")
            }
            gate, up = (quantized_product(x[token], parts[name], 0).values for name in ("gate_proj", "up_proj"))
            row = (torch.nn.functional.silu(gate) * up).float()
            near = quantized_product(row, parts["down_proj"], 0, ROUNDING[torch.float32])
            want[token] += weights[token, choice].double() * near.values
            slack[token] += weights[token, choice].abs().double() * near.slack
    assert relative_error(fused_moe(x, gate_up, down, weights, ids), Near(want, slack)) < 2e-6


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_every_mode_gives_the_eager_result():
    x, gate_up, down, weights, ids = layer()
    want = fused_moe(x, gate_up, down, weights, ids)
    layout = moealign.align(ids, block_size=16, num_experts=4)

    def product(x, gate_up):
        return grouped_gemm(x, gate_up, layout, top_k=2, activation="silu_mul")

    compiled = torch.compile(fused_moe, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, gate_up, down, weights, ids), want)
    few = (x[:5], gate_up, down, weights[:5], ids[:5])
    assert torch.equal(compiled(*few), fused_moe(*few))
    assert torch.equal(torch.compile(product, backend="aot_eager", fullgraph=True)(x, gate_up), product(x, gate_up))
    meta = [torch.utils._pytree.tree_map(lambda each: each.to("meta") if isinstance(each, torch.Tensor) else each, one)
            for one in (x, gate_up, down, weights, ids)]  # fmt: skip
    assert fused_moe(*meta).shape == want.shape
    batch = torch.vmap(lambda one: fused_moe(one, gate_up, down, weights, ids))(torch.stack([x, 2 * x]))
    assert torch.equal(batch[0], want)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, one in (("gate_up", gate_up), ("down", down)):
                self.register_buffer(name, one.data)
                self.register_buffer(name + "_scales", one.scales)

        def forward(self, x, weights, ids):
            first, second = (
                QuantizedWeights(getattr(self, n), getattr(self, n + "_scales")) for n in ("gate_up", "down")
            )
            return fused_moe(x, first, second, weights, ids)

    program = torch.export.export(Layer(), (x, weights, ids))
    assert "moealign.fused_moe_quantized" in str(program.graph)
    assert torch.equal(program.module()(x, weights, ids), want)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        fused_moe(x, gate_up, down, weights, ids)
        grouped_gemm(x, gate_up, layout, top_k=2)
    assert counter.get_total_flops() == 2 * 18 * (2 * 40 * 144 + 20 * 144)


def test_autocast_leaves_the_weights_alone():
    x, gate_up, down, weights, ids = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused_moe(x, gate_up, down, weights, ids)
    assert got.dtype is torch.float32
    assert torch.equal(got, fused_moe(x.bfloat16(), gate_up, down, weights, ids).float())


@pytest.mark.parametrize("options", [{}, {"activation": torch.tanh}, {"batch_invariant": True}])
def test_a_buffer_or_the_rows_in_place_get_the_result(options):
    x, gate_up, down, weights, ids = layer(gated="activation" not in options)
    want = fused_moe(x, gate_up, down, weights, ids, **options)
    out = torch.full_like(x, float("nan"))
    assert fused_moe(x, gate_up, down, weights, ids, out=out, **options) is out
    assert torch.equal(out, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_moe(x, gate_up, down, weights, ids, out=out, **options) is out
        assert torch.equal(out, fused_moe(x, gate_up, down, weights, ids, **options))
    with pytest.raises(InvalidInput, match=r"out: expected a contiguous \[9, 144\] of torch.float32, got \[9, 7\]"):
        fused_moe(x, gate_up, down, weights, ids, out=torch.zeros(9, 7), **options)
    assert fused_moe(x, gate_up, down, weights, ids, out=x, **options) is x
    assert torch.equal(x, want)


# ---- refusals --------------------------------------------------------------------------------------------------------


def with_field(**fields):
    return lambda call: (call[0], call[1]._replace(**fields), *call[2:])


E5M2 = torch.zeros(4, 40, 144).to(torch.float8_e5m2)
REFUSED = {
    "e5m2": (with_field(data=E5M2), InvalidType, r"gate_up_proj.data: expected torch.float8_e4m3fn, got .*e5m2"),
    "bfloat16 data": (with_field(data=E5M2.bfloat16()), InvalidType, r"data: expected .*e4m3fn, got torch.bfl"),
    "no data": (with_field(data=None), InvalidType, r"gate_up_proj.data: expected a torch.Tensor, got NoneType"),
    "two axes": (with_field(data=torch.zeros(4, 4).to(torch.float8_e4m3fn)), InvalidInput, r"expected \[E, N, K\]"),
    "K apart": (
        lambda call: with_field(data=call[1].data.transpose(1, 2).contiguous().transpose(1, 2))(call),
        InvalidInput, "data: expected a stride of 1 along K, got 40",
    ),
    "scales in bfloat16": (
        with_field(scales=torch.ones(4, 1, 2, dtype=torch.bfloat16)), InvalidType, "scales: expected torch.float32",
    ),
    "scales of another shape": (
        with_field(scales=torch.ones(4, 2, 1)), InvalidInput,
        r"scales: expected \[4, 1, 2\] for data of \[4, 40, 144\] in blocks of \(128, 128\), got \[4, 2, 1\]",
    ),
    "scales elsewhere": (
        with_field(scales=torch.ones(4, 1, 2, device="meta")), InvalidInput, "scales: expected a tensor on cpu",
    ),
    "a block of inputs": (with_field(block=(128, 64)), InvalidInput, r"block: expected .* 128 or 0, got \(128, 64\)"),
    "a negative block": (with_field(block=(-1, 0)), InvalidInput, r"block: expected outputs of at least 1.*\(-1, 0\)"),
    "no block": (with_field(block=128), InvalidType, "block: expected two ints, got 128"),
    "a float block": (with_field(block=(128.0, 128)), InvalidType, "block: expected two ints, got"),
    "another scheme": (with_field(activations="tensor"), InvalidInput, "expected one of group, row, static"),
    "static without a scale": (with_field(activations="static"), InvalidInput, r"_scale: expected one .* got none"),
    "a scale without static": (
        with_field(activation_scale=torch.ones(1)), InvalidInput, r"got one with activations='group'",
    ),
    "three static scales": (
        with_field(activations="static", activation_scale=torch.ones(3)), InvalidInput,
        r"activation_scale: expected one element or \[4\], got \[3\]",
    ),
    "static in float64": (
        with_field(activations="static", activation_scale=torch.tensor(1.0).double()), InvalidType, "torch.float32",
    ),
    "one of both": (
        lambda call: (call[0], call[1], call[2].data.float(), *call[3:]), InvalidType,
        "down_proj: expected QuantizedWeights like the other projection, got Tensor; quantise both or none",
    ),
    "no scales": (
        lambda call: (call[0], call[1].data, call[2].data, *call[3:]), InvalidType,
        "gate_up_proj: expected bfloat16, .*; moealign.QuantizedWeights takes FP8 weights with their scales",
    ),
    "float64 rows": (
        lambda call: (call[0].double(), *call[1:]), InvalidType, "expected rows in bfloat16, float16 or float32",
    ),
    "another depth": (lambda call: (call[0][:, :143], *call[1:]), InvalidInput, r"expected \[E, 2I, 143\]"),
    "a gradient of the rows": (
        lambda call: (call[0].requires_grad_(), *call[1:]), InvalidInput, "expected a call without gradients.*no_grad",
    ),
    "a gradient of the scales": (
        lambda call: with_field(scales=call[1].scales.requires_grad_())(call), InvalidInput, "a call without gradients",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_refusals(change):
    wrong, kind, message = REFUSED[change]
    with pytest.raises(kind, match=message):
        fused_moe(*wrong(layer()))


def test_refusals_of_options():
    call = layer()
    for options, message in (
        ({"transposed": True}, "transposed=False with quantised weights"),
        ({"recompute": True}, "recompute: expected none with quantised weights"),
        ({"weight_grads": (call[0], call[0])}, "weight_grads: expected none with quantised weights"),
        ({"batch_invariant": True, "activation": torch.tanh}, "batch_invariant: expected no callable with quantised"),
    ):
        with pytest.raises(InvalidInput, match=message):
            fused_moe(*call, **options)
    with pytest.raises(InvalidType, match="batch_invariant: expected True or False, got int"):
        fused_moe(*call, batch_invariant=1)
    with pytest.raises(moealign.BackendUnavailable, match="got 'triton': expected tensors on a GPU"):
        fused_moe(*call, backend="triton")
    with pytest.raises(InvalidInput, match="expected a call without gradients"):
        torch.func.jvp(lambda x: fused_moe(x, *call[1:]), (call[0],), (call[0],))
    parameter = torch.ones(1, requires_grad=True)
    with pytest.raises(InvalidInput, match="expected a call without gradients"):
        fused_moe(*call, activation=lambda rows: rows[:, :20] * parameter)
    layout = moealign.align(call[4], block_size=16, num_experts=4)
    with pytest.raises(InvalidInput, match="b: expected transposed=False"):
        grouped_gemm(call[0], call[1], layout, top_k=2, transposed=True)
    with pytest.raises(InvalidInput, match="expected a call without gradients"):
        grouped_gemm(call[0].requires_grad_(), call[1], layout, top_k=2)
    with pytest.raises(InvalidType, match=r"b.data: expected torch.float8_e4m3fn"):
        grouped_gemm(call[0].detach(), call[1]._replace(data=E5M2), layout, top_k=2)


def test_a_compiled_call_raises_its_refusal():
    call = layer()
    wrong = call[1]._replace(scales=torch.ones(4, 2, 1))
    with pytest.raises(InvalidInput, match=r"gate_up_proj\.scales: expected"):
        torch.compile(fused_moe, backend="eager")(call[0], wrong, *call[2:])
