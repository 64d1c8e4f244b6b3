"""The kernels of the experts' gradients under Triton's interpreter against float64 loops.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/gradients_interpret.py

test_experts_triton.py runs it in a process.  In float32, as the interpreter's bfloat16 products are silently wrong.
"""

from __future__ import annotations

import sys

import torch
from cases.experts import expert_loop, random_layer, relative_error
from helpers import failures, patch_interpreter

import moealign
from moealign import fused_moe, grouped_gemm
from moealign.errors import InvalidInput
from moealign.experts import gradients, launch
from moealign.experts.records import ExpertWeights, Routes
from moealign.experts.tiles import Tile

MAX_ERROR = 4e-6
NAMES = ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")


def leaves(tensors, dtype):
    return [None if each is None else each.detach().to(dtype).requires_grad_() for each in tensors]


def wanted(tensors, ids, grad, **options):
    """The gradients of plain loops, in float64."""
    inputs = leaves(tensors, torch.float64)
    bias = None if inputs[4] is None else inputs[4:]
    out = expert_loop(*inputs[:4], ids, bias=bias, **options)
    present = [each for each in inputs if each is not None]
    parts = iter(torch.autograd.grad(out, present, grad.double(), allow_unused=True, materialize_grads=True))
    return [None if each is None else next(parts) for each in inputs]


def given(tensors, ids, grad, call=fused_moe, **options):
    """Those of the kernels."""
    inputs = leaves(tensors, torch.float32)
    names = {"gate_up_bias": inputs[4], "down_bias": inputs[5]} if inputs[4] is not None else {}
    call(*inputs[:4], ids, **names, **options).backward(grad.float())
    return [None if each is None else each.grad for each in inputs]


def compare(what, got, want):
    for name, one, other in zip(NAMES, got, want, strict=True):
        if other is not None and other.numel():
            error = float("inf") if one is None else relative_error(one, other)
            yield f"{what}: {name}", float(one.abs().max()) if one is not None and not other.any() else error


def layer_of(*sizes, bias=False, **options):
    *tensors, ids, biases = random_layer(*sizes, bias=bias, **options)
    return [*tensors, *(biases or (None, None))], ids


def grads_like(tensors, seed=9):
    return torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers():
    for sizes, biases in (
        ((1, 2, 8, 40, 24), (False, True)),  # the forward: one tile per route
        ((5, 3, 7, 40, 24), (False, True)),  # blocks of 16
        ((40, 2, 3, 33, 17), (True,)),  # blocks of 64, odd sizes
        ((70, 2, 2, 32, 80), (False,)),  # blocks of 128, two tiles of columns
    ):
        for bias in biases:
            tensors, ids = layer_of(*sizes, bias=bias)
            ids[-1, 0] = sizes[2]  # dropped
            grad = grads_like(tensors)
            got = given(tensors, ids, grad, backend="triton")
            yield from compare(f"{sizes} bias {bias}", got, wanted(tensors, ids, grad))
    for number, activation in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2")):
        for gated in (True, False):
            transposed = gated == (number % 2 == 0)  # either way for each activation, and with a gate or without one
            tensors, ids = layer_of(6, 2, 3, 24, 16, gated=gated, bias=True, transposed=transposed)
            grad = grads_like(tensors)
            options = {"activation": activation, "transposed": transposed}
            what = f"{activation}, gate {gated}, transposed {transposed}"
            yield from compare(what, given(tensors, ids, grad, **options), wanted(tensors, ids, grad, **options))


GATES = (
    moealign.Gate(limit=0.7),
    moealign.Gate(limit=0.7, alpha=1.702, offset=1.0, interleaved=True),
    moealign.Gate(limit=0.7, alpha=1.702, offset=1.0),
    moealign.Gate(limit=0.2, limit_after=True),
    moealign.Gate("situ", beta=0.8, linear_beta=1.5),
    moealign.Gate("situ", linear_beta=None, interleaved=True),
    moealign.Gate("gelu_tanh", limit=0.5, interleaved=True),
)


def gates():
    """Forward and backward; the gate in torch is the reference, which test_activations.py compares with the models'."""
    for number, gate in enumerate(GATES):
        for transposed in (True, False) if number < 2 else (False,):
            usual = (6, 2, 3, 24, 16)
            more = ((1, 2, 8, 40, 24), *(() if transposed else ((40, 2, 3, 33, 17),))) if number == 1 else ()
            for sizes in (usual, *more):
                tensors, ids = layer_of(*sizes, bias=True, transposed=transposed)
                ids[-1, 0] = sizes[2]
                grad, options = grads_like(tensors), {"activation": gate, "transposed": transposed}
                what = f"{gate.text}, transposed {transposed}, {sizes}"
                with torch.no_grad():
                    single = [each.float() for each in tensors]
                    extra = {"gate_up_bias": single[4], "down_bias": single[5]}
                    got = fused_moe(*single[:4], ids, **extra, **options, backend="triton")
                    yield what, relative_error(got, expert_loop(*tensors[:4], ids, bias=tensors[4:], **options))
                yield from compare(what, given(tensors, ids, grad, **options), wanted(tensors, ids, grad, **options))
                if sizes == usual and not transposed:
                    again = given(tensors, ids, grad, **options, recompute=True)
                    yield from compare(f"{what}, recompute", again, wanted(tensors, ids, grad, **options))
    tensors, ids = layer_of(6, 2, 3, 24, 16, bias=True)
    tensors[4] = tensors[4].index_fill(1, torch.tensor([3]), float("nan"))
    for gate in (GATES[0], GATES[1], GATES[3]):
        ways = [given(tensors, ids, grads_like(tensors), activation=gate, backend=way) for way in ("triton", "packed")]
        yield f"{gate.text}: NaN in the gradients", float(not ways[1][1].isnan().any())
        for name, one, other in zip(NAMES, *ways, strict=True):
            yield f"{gate.text}: NaN in {name}", float(not torch.equal(one.isnan(), other.isnan()))
    layer = torch.compile(fused_moe, backend="aot_eager", fullgraph=True)
    tensors, ids = layer_of(6, 2, 3, 24, 16, bias=True)
    grad, options = grads_like(tensors), {"activation": GATES[1]}
    yield from compare(
        "gate, compiled", given(tensors, ids, grad, layer, **options), wanted(tensors, ids, grad, **options)
    )


def dropped():
    tensors, _ = layer_of(24, 3, 4, 16, 16, bias=True)
    ids = torch.randint(-1, 11, (24, 3), generator=torch.Generator().manual_seed(5))
    expert_map = torch.tensor([-1, 2, -1, 0, 3, -1, 1, 7, -1, -1])  # 7: a local expert without weights
    tensors[3] = tensors[3].masked_fill(ids == 0, float("nan"))  # of routes that are dropped
    tensors[0] = tensors[0].clone()
    tensors[0][17:] = float("nan")
    grad = grads_like(tensors)
    got = given(tensors, ids, grad, expert_map=expert_map, num_valid_tokens=torch.tensor([17], dtype=torch.int32))
    want = wanted(tensors, ids, grad, expert_map=expert_map, valid=17)
    yield from compare("map and valid count", got, want)
    yield "gradients of tokens past the valid ones are zero", float(got[0][17:].abs().max() + got[3][17:].abs().max())
    tensors, ids = layer_of(9, 2, 5, 16, 16, bias=True)
    nothing = given(tensors, torch.full_like(ids, -1), grads_like(tensors))
    yield "no route is kept: zeros", float(sum(each.abs().max() for each in nothing))
    tensors, ids = layer_of(0, 2, 5, 16, 16, bias=True)
    nothing = given(tensors, ids, grads_like(tensors))
    yield "no token: zeros", float(sum(each.abs().sum() for each in nothing))
    tensors, ids = layer_of(9, 2, 5, 16, 16, bias=True)
    tensors[1], tensors[2], tensors[4] = tensors[1][:, :0], tensors[2][:, :, :0], tensors[4][:, :0]
    grad = grads_like(tensors)
    yield from compare("no inner columns, but biases", given(tensors, ids, grad), wanted(tensors, ids, grad))
    alone, ids = layer_of(9, 2, 5, 16, 16)
    got = given(alone, torch.full_like(ids, 3), grads_like(alone))
    yield "experts without rows: zeros", float(got[1][[0, 1, 2, 4]].abs().max() + got[2][[0, 1, 2, 4]].abs().max())


def options():
    tensors, ids = layer_of(21, 3, 4, 32, 24, bias=True)
    grad = grads_like(tensors)
    want = wanted(tensors, ids, grad)
    once = given(tensors, ids, grad)
    yield "the same bits twice", float(not all(map(torch.equal, once, given(tensors, ids, grad))))
    yield from compare("recompute", given(tensors, ids, grad, recompute=True), want)
    for recompute in (False, True):
        buffers = tuple(torch.ones(each.shape) for each in tensors[1:3])
        got = given(tensors, ids, grad, recompute=recompute, weight_grads=buffers)
        yield "the projections have no gradient of their own", float(got[1] is not None or got[2] is not None)
        got[1], got[2] = (each - 1 for each in buffers)
        yield from compare(f"buffers, recompute {recompute}", got, want)
    wide, narrow = (Tile(32, 16, 16, 2, 4, 2, 0, size) for size in (1, 2))
    weights, routes = ExpertWeights(*(each.float() for each in tensors[1:3])), Routes(tensors[3].float(), ids)
    plain = wanted([*tensors[:4], None, None], ids, grad)
    for tiles in (
        gradients.GradientTiles(wide, wide, Tile(16, 32, 16, 1, 4, 2)),
        gradients.GradientTiles(narrow, wide._replace(swap=1), Tile(32, 16, 32, 8, 4, 2)),
        gradients.GradientTiles(wide._replace(n=128), wide, Tile(16, 32, 16, 1, 4, 2)),
        gradients.GradientTiles(wide._replace(n=256), wide, Tile(16, 32, 16, 1, 4, 2)),
    ):
        call = (grad.float(), None, tensors[0].float(), weights, routes, "silu")
        got = gradients.layer_gradients(*call, (True, True, True, True, False, False), tiles=tiles)
        yield from compare(str(tuple(tiles)), got, plain)
    strided = [each.detach() for each in tensors]
    strided[1] = torch.cat([tensors[1], tensors[1]], 2)[:, :, :32]  # a view into wider rows
    strided[0] = torch.cat([tensors[0], tensors[0]], 1)[:, :32]
    strided[4], strided[5] = (each.t().contiguous().t() for each in tensors[4:])  # biases whose columns are strided
    yield from compare("strided inputs", given(strided, ids, grad), want)
    inputs, expanded = leaves(tensors[:5], torch.float32), tensors[5].float()[:, :1].expand(tensors[5].shape)
    fused_moe(*inputs[:4], ids, gate_up_bias=inputs[4], down_bias=expanded).backward(grad.float())
    other = wanted([*tensors[:5], expanded.contiguous()], ids, grad)
    yield from compare("an expanded bias", [*(each.grad for each in inputs), None], [*other[:5], None])
    inputs = leaves(tensors, torch.float32)
    out = fused_moe(*inputs[:4], ids, weight_grads=tuple(torch.zeros(each.shape) for each in tensors[1:3]))
    for how in ({"create_graph": True}, {"is_grads_batched": True}):
        outputs = grad.float().expand(2, *grad.shape) if "is_grads_batched" in how else grad.float()
        try:
            torch.autograd.grad(out, inputs[0], outputs, retain_graph=True, **how)
            yield f"buffers are refused with {how}", 1.0
        except InvalidInput:
            pass
    for name, place in zip(NAMES, range(6), strict=True):  # one gradient at a time
        inputs = [each.detach().float() for each in tensors]
        inputs[place].requires_grad_()
        out = fused_moe(*inputs[:4], ids, gate_up_bias=inputs[4], down_bias=inputs[5])
        out.backward(grad.float())
        yield f"only {name}", relative_error(inputs[place].grad, want[place])
    inputs = leaves(tensors, torch.float32)

    def loss(*each):
        out = fused_moe(*each[:4], ids, gate_up_bias=each[4], down_bias=each[5])
        first = torch.autograd.grad(out.square().sum(), each, create_graph=True)
        return sum(part.square().sum() for part in first)

    twice = torch.autograd.grad(loss(*inputs), inputs)
    double = leaves(tensors, torch.float64)
    out = expert_loop(*double[:4], ids, bias=double[4:])
    first = torch.autograd.grad(out.square().sum(), double, create_graph=True)
    yield from compare("double backward", twice, torch.autograd.grad(sum(p.square().sum() for p in first), double))


def invariant():
    """The bits of a token, forward and backward, are those that it has in any other batch."""
    tensors, ids = layer_of(60, 3, 4, 40, 80, bias=True)
    single, grad = [each.float() for each in tensors], grads_like(tensors).float()

    def step(rows, **options):
        leaves = [single[0][rows].clone().requires_grad_(), single[3][rows].clone().requires_grad_()]
        extra = {"gate_up_bias": single[4], "down_bias": single[5], "batch_invariant": True, "backend": "triton"}
        out = fused_moe(leaves[0], *single[1:3], leaves[1], ids[rows], **extra, **options)
        return [out, *torch.autograd.grad(out, leaves, grad[rows])]

    whole = step(torch.arange(60))
    want = expert_loop(*tensors[:4], ids, bias=tensors[4:])
    yield "batch-invariant", relative_error(whole[0].detach(), want)
    for name, size in (("single tokens", 1), ("two tokens", 2), ("17 tokens", 17)):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(size))
        for rows, recompute in zip(order.split(size), (False, True, False, True), strict=False):
            got = step(rows, recompute=recompute)
            differ = [not torch.equal(one, every[rows]) for one, every in zip(got, whole, strict=True)]
            yield f"{name}: other bits than in the whole batch", float(any(differ))


def products():
    tensors, ids = layer_of(11, 3, 5, 24, 20, bias=True)
    ids[4] = torch.tensor([-1, 5, 2])
    weights = tensors[3].clone()
    weights[4, 0] = float("nan")  # of a dropped route
    layout = moealign.align(ids, block_size=16, num_experts=5)
    mapped = moealign.align(ids, block_size=64, num_experts=5, expert_map=torch.tensor([3, -1, 0, 1, 2]))
    for which, order, count in (("blocks of 16", layout, 5), ("blocks of 64, mapped", mapped, 4)):
        for activation in (None, "silu_mul", "gelu"):
            for factor in (None, weights):
                got, want = (
                    product_gradients(tensors, order, count, activation, factor, dtype, backend)
                    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "packed"))
                )
                for name, one, other in zip(("a", "b", "bias", "row_weights"), got, want, strict=False):
                    what = f"grouped_gemm, {which}, {activation}, {factor is not None}: {name}"
                    yield what, relative_error(one, other)


def product_gradients(tensors, layout, experts, activation, factor, dtype, backend):
    inputs = leaves([tensors[0], tensors[1][:experts], tensors[4][:experts], factor], dtype)
    call = {"row_weights": inputs[3], "bias": inputs[2], "activation": activation, "backend": backend}
    out = grouped_gemm(inputs[0], inputs[1], layout, top_k=3, **call)
    scale = torch.linspace(1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return torch.autograd.grad((out * scale.to(dtype)).sum(), [each for each in inputs if each is not None])


def compiled():
    layer = torch.compile(fused_moe, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 20):
        tensors, ids = layer_of(tokens, 2, 4, 16, 16, bias=True)
        grad = grads_like(tensors)
        yield from compare(f"{tokens} tokens, compiled", given(tensors, ids, grad, layer), wanted(tensors, ids, grad))
        got = given(tensors, ids, grad, layer, recompute=True)
        yield from compare(f"{tokens} tokens, compiled, recompute", got, wanted(tensors, ids, grad))


def launched():
    """A backward is so many launches, and keeps no tensor of a row per route but the first product's."""
    ran, run = [], launch.run
    launch.run = lambda launches, device: (ran.extend(one.kernel for one in launches), run(launches, device))
    try:
        tensors, ids = layer_of(12, 2, 3, 32, 16)
        inputs = leaves(tensors[:4], torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(each), each)[1], lambda each: each):
            out = fused_moe(*inputs, ids)
        out.sum().backward()
    finally:
        launch.run = run
    want = ["gemm", "gemm", "sum_rows", "activation_gradient", "gemm", "sum_rows", "routing_gradient"]
    yield "launches", float(ran != [*want, "weights_gradient", "weights_gradient"])
    own = {each.data_ptr() for each in (*inputs, ids)}
    extra = sum(each.numel() for each in kept if each.data_ptr() not in own)
    yield "elements kept beside the inputs", float(extra != 24 * 32)


def compared():
    """(what, its relative error or None) of every case; NaN is an error too."""
    for part in (layers, gates, dropped, options, invariant, products, compiled, launched):
        for name, error in part():
            yield name, None if error < MAX_ERROR else f"relative error {error}"


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(compared()))
