"""Every public function in every mode of PyTorch: right, or refused by an error of ours.

Two tables: `CASES`, what is called and a plain formula in torch for it, and `MODES`, what PyTorch can do with a call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from moealign import (
    BackendUnavailable,
    InvalidInput,
    InvalidType,
    align,
    align_batched,
    fused_moe,
    grouped_gemm,
    moe_align_block_size,
    route,
)

E, K, H, B = 4, 2, 8, 4  # experts, choices a token, width, rows a block
INNER = 6


class Case(NamedTuple):
    call: Callable[..., Any]  # of its floating inputs, then of the ids
    plain: Callable[..., Any]  # the same by a formula
    shapes: tuple[tuple[int, ...], ...]  # of the floating inputs; 0 stands for the number of tokens
    dtype: torch.dtype = torch.float64
    ids: Callable[[int, int], Tensor] | None = None  # of so many tokens, by a seed
    flops: Callable[[int], int] | None = None  # of so many tokens
    exact: bool = False  # integers
    device: str = "cpu"


def chosen(tokens: int, seed: int = 0) -> Tensor:
    """Ids of tokens, distinct in a row, one of them dropped."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=generator).argsort(1)[:, :K]
    if tokens > 2:
        ids[1, 1] = -1
    return ids


def counts(batches: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, 5, (batches,), generator=torch.Generator().manual_seed(seed))


def share(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: what a token takes of each expert."""
    experts = torch.arange(E, device=ids.device)
    return sum(torch.where(ids[:, j, None] == experts, weights[:, j, None], 0.0) for j in range(ids.shape[1]))


def silu_mul(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def plain_moe(x, up, down, up_bias, down_bias, weights, ids, act=silu_mul):
    part = share(ids, weights)
    each = [(act(x @ up[e].T + up_bias[e]) @ down[e].T + down_bias[e]) * part[:, e, None] for e in range(E)]
    return torch.stack(each).sum(0)


def moe(x, up, down, up_bias, down_bias, weights, ids, **options):
    return fused_moe(x, up, down, weights, ids, gate_up_bias=up_bias, down_bias=down_bias, **options)


def own_gate(rows: Tensor) -> Tensor:
    return torch.tanh(rows[..., ::2]) * rows[..., 1::2]


def gemm(a, b, bias, factor, ids):
    layout = align(ids, block_size=B, num_experts=E)
    return grouped_gemm(a, b, layout, top_k=K, row_weights=factor, bias=bias, activation="silu_mul")


def plain_gemm(a, b, bias, factor, ids):
    each = torch.stack([silu_mul(a @ b[e].T + bias[e]) for e in range(E)], 1)  # [T, E, N / 2]
    here = torch.stack([ids == e for e in range(E)], -1).to(a.dtype)  # [T, K, E]
    rows = torch.einsum("tke,ten->tkn", here, each) * factor.unsqueeze(-1)
    return rows.reshape(-1, rows.shape[-1])


def layout_of(ids, **options):
    layout = align(ids, block_size=B, num_experts=E, positions=True, expert_counts=True, **options)
    rows, blocks, total = layout
    return rows, blocks, total, layout.positions, layout.expert_counts


def batches_of(ids, **options):
    layout = align_batched(ids, max_tokens_per_batch=3, block_size=B, positions=True, **options)
    rows, blocks, total = layout
    return rows, blocks, total, layout.positions


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax of all": {"renormalize": False, "scale": 1.5},
    "sigmoid": {"scoring": "sigmoid", "renormalize": True, "scale": 2.0},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "scale": 2.0},
    "softmax, bias": {"bias": True, "scale": 1.5},
}


def shifts(logits):
    return torch.linspace(0.1, -0.1, E, device=logits.device)


def router(bias=False, **options):
    def call(logits):
        shift = shifts(logits) if bias else None
        asked = {"block_size": B, "mean_probability": True, "correction_bias": shift}
        weights, ids, layout, mean = route(logits, K, **asked, **options)
        return weights, mean, ids, layout.sorted_token_ids

    return call


SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def plain_router(scoring="softmax", renormalize=True, scale=1.0, bias=False):
    def plain(logits):
        scores = SCORES[scoring](logits)
        choice = scores + shifts(logits) if bias else logits
        ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[..., :K]
        weights = scores.gather(-1, ids)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
        return weights * scale, mean, ids.int(), moe_align_block_size(ids, B, E, backend="reference")[0]

    return plain


LAYER = ((0, H), (E, 2 * INNER, H), (E, H, INNER), (E, 2 * INNER), (E, H), (0, K))
CASES = {
    "fused_moe": Case(
        lambda *given: moe(*given), plain_moe, LAYER, ids=chosen, flops=lambda tokens: 2 * tokens * K * H * 3 * INNER
    ),
    "fused_moe, callable": Case(
        lambda *given: moe(*given, activation=own_gate),
        lambda *given: plain_moe(*given, act=own_gate),
        LAYER,
        ids=chosen,
    ),
    "fused_moe, packed": Case(lambda *given: moe(*given, backend="packed"), plain_moe, LAYER, ids=chosen),
    "grouped_gemm": Case(
        gemm,
        plain_gemm,
        ((0, H), (E, 2 * INNER, H), (E, 2 * INNER), (0, K)),
        ids=chosen,
        flops=lambda tokens: 2 * tokens * K * H * 2 * INNER,
    ),
    **{
        f"route, {name}": Case(router(**options), plain_router(**options), ((0, E),), torch.float32)
        for name, options in ROUTERS.items()
    },
    "align": Case(layout_of, lambda ids: layout_of(ids, backend="reference"), (), ids=chosen, exact=True),
    "align_batched": Case(batches_of, lambda ids: batches_of(ids, backend="reference"), (), ids=counts, exact=True),
}
FLOATING = [name for name, case in CASES.items() if not case.exact]


def inputs(case: Case, tokens: int = 5, seed: int = 0, gradients: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(size or tokens for size in shape) for shape in case.shapes]
    floats = [torch.randn(shape, dtype=torch.float64, generator=generator) / 2 for shape in shapes]
    floats = [each.to(case.device, case.dtype).requires_grad_(gradients) for each in floats]
    return [*floats, *([case.ids(tokens, seed).to(case.device)] if case.ids else [])]


def floating(output: Any) -> Tensor:
    """One number out of all of an output that floats, to be differentiated."""
    leaves = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    scales = [torch.linspace(1, 2, leaf.numel(), device=leaf.device).view(leaf.shape) for leaf in leaves]
    numbers = [(leaf.double() * scale).square().sum() for leaf, scale in zip(leaves, scales, strict=True)]
    return torch.stack(numbers).sum().to(leaves[0].dtype)


def same(got: Any, want: Any, most: float = 1e-9) -> None:
    got, want = _pytree.tree_leaves(got), _pytree.tree_leaves(want)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        if not isinstance(one, Tensor):
            continue
        assert one.shape == other.shape
        if not one.numel():
            continue
        if one.is_floating_point():
            bound = most if one.dtype is torch.float64 else max(min(1e5 * most, 1e-3), 1e-4)
            assert (one.double() - other.double()).abs().max() <= bound * max(1.0, float(other.abs().max()))
        else:
            assert torch.equal(one, other)


def scalar(function: Callable[..., Any], ids: list[Tensor]) -> Callable[..., Tensor]:
    return lambda *floats: floating(function(*floats, *ids))


def split(case: Case, given: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return given[: len(case.shapes)], given[len(case.shapes) :]


# ---- the modes -------------------------------------------------------------------------------------------------------


def values(case: Case) -> None:
    same(case.call(*inputs(case)), case.plain(*inputs(case)))


Transform = Callable[[Callable[..., Any], list[Tensor], list[Tensor]], Any]


def compared(transform: Transform, most: float = 1e-9, **options: Any) -> Callable[[Case], None]:
    """The mode in which `transform` of (function, floats, ids) gives the same for a call as for its formula."""

    def mode(case: Case) -> None:
        parts = split(case, inputs(case, **options))
        same(transform(case.call, *parts), transform(case.plain, *parts), most)

    return mode


def gradients(function, floats, ids):
    return torch.autograd.grad(scalar(function, ids)(*floats), floats)


def double_backward(function, floats, ids):
    first = torch.autograd.grad(scalar(function, ids)(*floats), floats, create_graph=True)
    return torch.autograd.grad(sum(each.double().square().sum() for each in first), floats)


def each_gradient_alone(function, floats, ids):
    """Each input's gradient by itself: what is not wanted is not computed, and nothing is missing."""
    found = []
    for which in range(len(floats)):
        given = [each.detach().requires_grad_(i == which) for i, each in enumerate(floats)]
        found += torch.autograd.grad(scalar(function, ids)(*given), given[which])
    return found


def no_tokens(case: Case) -> None:
    floats, ids = split(case, inputs(case, tokens=0, gradients=True))
    output = case.call(*floats, *ids)
    if case.shapes:
        grads = torch.autograd.grad(floating(output), floats)
        assert all(not each.any() and each.isfinite().all() for each in grads)


def func_grad(function, floats, ids):
    return torch.func.grad(scalar(function, ids), tuple(range(len(floats))))(*floats)


def func_vjp(function, floats, ids):
    value, back = torch.func.vjp(scalar(function, ids), *floats)
    return value, back(torch.ones_like(value))


def tangents_of(floats: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(each.shape, dtype=torch.float64, generator=generator).to(each) / 2 for each in floats)


def func_jvp(function, floats, ids):
    value, tangent = torch.func.jvp(scalar(function, ids), tuple(floats), tangents_of(floats))
    assert tangent.abs() > 0
    return value, tangent


def dual_numbers(function, floats, ids):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        dual = map(forward_ad.make_dual, floats, tangents_of(floats))
        return tuple(forward_ad.unpack_dual(scalar(function, ids)(*dual)))


def jacobians(function, floats, ids):
    def first_output(first):
        return _pytree.tree_leaves(function(first, *floats[1:], *ids))[0]

    return [jacobian(first_output)(floats[0]) for jacobian in (torch.func.jacrev, torch.func.jacfwd)]


def hessian(function, floats, ids):
    return torch.func.hessian(scalar(lambda first: function(first, *floats[1:], *ids), []))(floats[0])


def stacked(case: Case) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Inputs by three seeds, and the same stacked."""
    batch = [inputs(case, seed=seed) for seed in range(3)]
    return batch, [torch.stack(each) for each in zip(*batch, strict=True)]


def vmap(case: Case) -> None:
    batch, together = stacked(case)
    got = torch.vmap(case.call)(*together)
    for i, given in enumerate(batch):
        same(_pytree.tree_map(lambda leaf, i=i: leaf[i], got), case.plain(*given))


def vmap_of_gradients(case: Case) -> None:
    batch, together = stacked(case)

    def of(function):
        return torch.func.grad(lambda *given: floating(function(*given)), tuple(range(len(case.shapes))))

    got = torch.vmap(of(case.call))(*together)
    for i, given in enumerate(batch):
        same([each[i] for each in got], of(case.plain)(*given))


def gradient_of_vmap(case: Case) -> None:
    floats, ids = split(case, stacked(case)[1])
    floats = [each.requires_grad_() for each in floats]

    def of(function):
        return torch.autograd.grad(torch.vmap(lambda *given: floating(function(*given)))(*floats, *ids).sum(), floats)

    same(of(case.call), of(case.plain))


def functional_call(case: Case) -> None:
    floats, ids = split(case, inputs(case))

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ParameterList(floats)

        def forward(self, *ids):
            return case.call(*self.parts, *ids)

    layer = Layer()
    other = {f"parts.{i}": each for i, each in enumerate(inputs(case, seed=3)[: len(floats)])}
    same(torch.func.functional_call(layer, other, tuple(ids)), case.plain(*other.values(), *ids))
    grads = torch.func.grad(lambda given: floating(torch.func.functional_call(layer, given, tuple(ids))))(other)
    which = tuple(range(len(floats)))
    same(list(grads.values()), torch.func.grad(scalar(case.plain, ids), which)(*other.values()))


def jit_trace(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(case.call, tuple(inputs(case)), check_trace=False)
    for tokens, seed in ((5, 1), (9, 2)):
        same(traced(*inputs(case, tokens, seed)), case.plain(*inputs(case, tokens, seed)))
    if case.shapes:
        floats, ids = split(case, inputs(case, 5, 1, gradients=True))
        got = torch.autograd.grad(floating(traced(*floats, *ids)), floats)
        same(got, torch.autograd.grad(floating(case.plain(*floats, *ids)), floats))


def fx(mode: str) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        graph = make_fx(case.call, tracing_mode=mode)(*inputs(case))
        same(graph(*inputs(case, seed=1)), case.plain(*inputs(case, seed=1)))
        if mode == "symbolic":
            same(graph(*inputs(case, 9, 2)), case.plain(*inputs(case, 9, 2)))
        if not case.shapes:
            return

        def of(function):
            def gradient(*given):
                floats, ids = split(case, list(given))
                floats = [each.detach().requires_grad_() for each in floats]
                return torch.autograd.grad(floating(function(*floats, *ids)), floats)

            return gradient

        same(
            make_fx(of(case.call), tracing_mode=mode)(*inputs(case))(*inputs(case, seed=1)),
            of(case.plain)(*inputs(case, seed=1)),
        )

    return run


def export(case: Case) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *given):
            return case.call(*given)

    given = tuple(inputs(case))
    tokens = torch.export.Dim("tokens", min=2)
    dims = tuple({0: tokens} if each.shape[0] == 5 else {} for each in given)
    program = torch.export.export(Layer(), given, dynamic_shapes=(dims,), strict=False)
    for count, seed in ((5, 1), (9, 2)):
        same(program.module()(*inputs(case, count, seed)), case.plain(*inputs(case, count, seed)))


def compiled(backend: str, dynamic: bool) -> Callable[[Case], None]:
    def run(case: Case) -> None:
        function = torch.compile(case.call, backend=backend, dynamic=dynamic, fullgraph=True)
        for tokens, seed in ((5, 1), (9, 2)) if dynamic else ((5, 1),):  # a static graph is compiled for each size anew
            given = inputs(case, tokens, seed, gradients=True)
            floats, _ = split(case, given)
            with torch.no_grad():
                same(function(*given), case.plain(*given))
            if floats:
                got = torch.autograd.grad(floating(function(*given)), floats)
                same(got, torch.autograd.grad(floating(case.plain(*given)), floats))

    return run


def fake_tensors(case: Case) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for grads in (False, True):
        want = case.plain(*inputs(case))
        given = inputs(case, gradients=grads)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(each) for each in given]
            got = case.call(*fake)
        for one, other in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(want), strict=True):
            assert one.shape == other.shape
            assert one.dtype is other.dtype


def meta(case: Case) -> None:
    for grads in (False, True):
        given = [each.detach().to("meta").requires_grad_(grads and each.is_floating_point()) for each in inputs(case)]
        got, want = case.call(*given), case.plain(*inputs(case))
        for one, other in zip(_pytree.tree_leaves(got), _pytree.tree_leaves(want), strict=True):
            assert one.is_meta
            assert one.shape == other.shape
        if grads and case.shapes:
            floats, _ = split(case, given)
            assert [each.shape for each in torch.autograd.grad(got[0].sum(), floats)] == [each.shape for each in floats]


def flop_counter(case: Case) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    if case.flops is None:
        return
    for device in (case.device, "meta"):
        given = [each.to(device) for each in inputs(case, tokens=8)]
        with FlopCounterMode(display=False) as counter:
            case.call(*given)
        assert counter.get_total_flops() == case.flops(8)
        floats, ids = split(case, given)
        with FlopCounterMode(display=False) as counter:
            output = case.call(*(each.requires_grad_() for each in floats), *ids)
            output.sum().backward()
        assert counter.get_total_flops() == 3 * case.flops(8)


def inference_mode(case: Case) -> None:
    with torch.inference_mode():
        same(case.call(*inputs(case)), case.plain(*inputs(case)))
        many = inputs(case, tokens=200)
        same(case.call(*many), case.plain(*many))


def deterministic(case: Case) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        values(case)
        if case.shapes:
            compared(gradients, gradients=True)(case)
    finally:
        torch.use_deterministic_algorithms(False)


def batched_gradients(function, floats, ids):
    output = _pytree.tree_leaves(function(*floats, *ids))[0]
    batch = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return torch.autograd.grad(output, floats, batch, is_grads_batched=True)


def negated_view(case: Case) -> None:
    """A tensor whose memory holds the negative of its values, as the imaginary part of a conjugate has."""
    floats, ids = split(case, inputs(case))
    views = [torch.view_as_complex(torch.stack([each, -each], -1)).conj().imag for each in floats]
    assert all(each.is_neg() for each in views)
    same(case.call(*views, *ids), case.plain(*floats, *ids))


def checkpointed(case: Case) -> None:
    floats, ids = split(case, inputs(case, gradients=True))
    want = torch.autograd.grad(floating(case.plain(*floats, *ids)), floats)
    got = torch.autograd.grad(floating(checkpoint(case.call, *floats, *ids, use_reentrant=False)), floats)
    same(got, want)
    floating(checkpoint(case.call, *floats, *ids, use_reentrant=True)).backward()
    same([each.grad for each in floats], want)


def dispatch_mode(case: Case) -> None:
    """Inside somebody's mode, which sees an operator and not its parts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    with Watch():
        got = case.call(*inputs(case))
    same(got, case.plain(*inputs(case)))
    assert "moealign" in seen


def subclass(case: Case) -> None:
    """A subclass that carries its operators out on two inner tensors works; one that knows none of ours is refused."""
    from torch.testing._internal.two_tensor import TwoTensor

    given = inputs(case)
    both = case.call(*(TwoTensor(each.contiguous(), each.contiguous().clone()) for each in given))
    plain = case.plain(*given)
    same(_pytree.tree_map(lambda leaf: leaf.a if isinstance(leaf, TwoTensor) else leaf, both), plain)
    for which in range(len(given)):
        with pytest.raises(InvalidType, match=r"expected plain tensors, got Stubborn.*convert it first"):
            case.call(*given[:which], stubborn(given[which]), *given[which + 1 :])


class Stubborn(torch.Tensor):
    """Like quantised weights: operators that it does not list are not implemented."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Stubborn: {func} is not implemented")


def stubborn(tensor: Tensor) -> Tensor:
    return torch.Tensor._make_wrapper_subclass(
        Stubborn, tensor.shape, dtype=tensor.dtype, device=tensor.device, strides=tensor.stride()
    )


MODES: dict[str, Callable[[Case], None]] = {
    "values": values,
    "no tokens": no_tokens,
    "torch.vmap": vmap,
    "torch.jit.trace": jit_trace,
    "make_fx, real": fx("real"),
    "make_fx, fake": fx("fake"),
    "make_fx, symbolic": fx("symbolic"),
    "torch.export": export,
    **{
        f"torch.compile, {backend}, {'dynamic' if dynamic else 'static'}": compiled(backend, dynamic)
        for backend in ("eager", "aot_eager", "inductor")
        for dynamic in (False, True)
    },
    "FakeTensor": fake_tensors,
    "meta": meta,
    "FLOP counter": flop_counter,
    "inference mode": inference_mode,
    "deterministic": deterministic,
    "dispatch mode": dispatch_mode,
    "subclass": subclass,
}
GRADIENT_MODES: dict[str, Callable[[Case], None]] = {
    "gradients": compared(gradients, gradients=True),
    "one gradient": compared(each_gradient_alone),
    "double backward": compared(double_backward, 1e-7, gradients=True),
    "torch.func.grad": compared(func_grad),
    "torch.func.vjp": compared(func_vjp),
    "torch.func.jvp": compared(func_jvp),
    "forward-mode AD": compared(dual_numbers),
    "jacobians": compared(jacobians, tokens=3),
    "hessian": compared(hessian, 1e-6, tokens=3),
    "vmap of gradients": vmap_of_gradients,
    "gradient of vmap": gradient_of_vmap,
    "functional_call": functional_call,
    "batched gradients": compared(batched_gradients, gradients=True),
    "negated view": negated_view,
    "checkpoint": checkpointed,
}


def on(device: str, name: str) -> Case:
    """On a GPU layers are in float32, which its kernels take."""
    case = CASES[name]
    return case if device == "cpu" else case._replace(device=device, dtype=torch.float32)


devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)


@devices
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_modes(case, mode, device):
    MODES[mode](on(device, case))


@devices
@pytest.mark.parametrize("case", FLOATING)
@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_modes_of_gradients(case, mode, device):
    GRADIENT_MODES[mode](on(device, case))


# ---- autocast --------------------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [3, 20, 400])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ["silu", "own"])
def test_autocast(training, tokens, low, rows, activation, device):
    """Rows of one dtype beside weights of another, as mixed precision has them; the result is in the rows' dtype."""
    case = CASES["fused_moe"]._replace(device=device)
    floats, (ids,) = split(case, inputs(case, tokens))
    held = torch.float64 if rows is torch.float64 else torch.float32
    want = plain_moe(*floats, ids, act=own_gate if activation == "own" else silu_mul)
    x, *parts = (each.to(held) for each in floats)
    x = x.to(rows).requires_grad_(training)
    parts = [each.requires_grad_(training) for each in parts]
    options = {"activation": own_gate} if activation == "own" else {}
    with torch.set_grad_enabled(training), torch.autocast(device, low):
        got = moe(x, *parts, ids, **options)
    most = 1e-9 if rows is torch.float64 else 3e-2
    assert got.dtype is rows
    assert (got.double() - want).norm() <= most * want.norm()
    if training:
        grads = torch.autograd.grad(floating(got), (x, *parts))
        assert [each.dtype for each in grads] == [rows, *[held] * len(parts)]
        floats = [each.requires_grad_() for each in floats]
        plain = torch.autograd.grad(
            floating(plain_moe(*floats, ids, act=own_gate if activation == "own" else silu_mul)), floats
        )
        for one, other in zip(grads, plain, strict=True):
            assert (one.double() - other).norm() <= 2 * most * other.norm()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_of_a_product_and_of_a_router(low):
    case = CASES["grouped_gemm"]
    floats, (ids,) = split(case, inputs(case))
    want = plain_gemm(*floats, ids)
    with torch.autocast("cpu", low):
        got = gemm(*(each.float() for each in floats), ids)
        out = torch.empty_like(got)
        layout = align(ids, block_size=B, num_experts=E)
        x, b, bias, factor = (each.float() for each in floats)
        options = {"top_k": K, "row_weights": factor, "bias": bias, "activation": "silu_mul"}
        grouped_gemm(x, b, layout, out=out, **options)
        case = CASES["route, softmax"]
        same(case.call(*inputs(case)), case.plain(*inputs(case)))
    assert got.dtype is torch.float32
    assert torch.equal(got, out)
    assert (got.double() - want).norm() <= 2e-2 * want.norm()


def test_autocast_under_torch_compile():
    floats, (ids,) = split(CASES["fused_moe"], inputs(CASES["fused_moe"]))
    floats = [each.float().requires_grad_() for each in floats]
    function = torch.compile(moe, backend="aot_eager", fullgraph=True)
    for low in (torch.bfloat16, None):
        with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
            got, want = (torch.autograd.grad(floating(each(*floats, ids)), floats) for each in (function, moe))
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() <= 1e-2 * other.norm()


# ---- refusals: the same in an eager, a compiled and a meta call ------------------------------------------------------


def refusals() -> dict[str, tuple[Callable[..., Any], list[Any], type[Exception]]]:
    """(function, arguments, error) of calls that no mode may take."""
    floats, (ids,) = split(CASES["fused_moe"], inputs(CASES["fused_moe"]))
    x, up, down, up_bias, _, weights = floats
    logits = torch.randn(5, E)
    layout = align(ids, block_size=B, num_experts=E)

    def gemm_of(x, up, *blocks, **options):
        return grouped_gemm(x, up, type(layout)(*blocks, block_size=B), **{"top_k": K, **options})

    blocks = list(layout)
    short = torch.zeros(E - 1, dtype=torch.int32)
    return {
        "align, block of 0": (lambda ids: moe_align_block_size(ids, 0, E), [ids], InvalidInput),
        "align, block of -3": (lambda ids: moe_align_block_size(ids, -3, E), [ids], InvalidInput),
        "align, block of True": (lambda ids: moe_align_block_size(ids, True, E), [ids], InvalidType),
        "align, block of 2.0": (lambda ids: moe_align_block_size(ids, 2.0, E), [ids], InvalidType),
        "align, no experts": (lambda ids: moe_align_block_size(ids, B, 0), [ids], InvalidInput),
        "align, floats": (lambda ids: moe_align_block_size(ids, B, E), [ids.double()], InvalidType),
        "align, bools": (lambda ids: align(ids, block_size=B, num_experts=E), [ids > 0], InvalidType),
        "align, short map": (lambda ids, map: moe_align_block_size(ids, B, E, map), [ids, short], InvalidInput),
        "align, float map": (lambda ids, map: moe_align_block_size(ids, B, E, map), [ids, torch.rand(E)], InvalidType),
        "align, long valid": (
            lambda ids, valid: align(ids, block_size=B, num_experts=E, num_valid_tokens=valid),
            [ids, torch.tensor([3])],
            InvalidType,
        ),
        "align, float word": (
            lambda ids, word: align(ids, block_size=B, num_experts=E, error_word=word),
            [ids, torch.zeros(1)],
            InvalidType,
        ),
        "align, backend": (
            lambda ids: align(ids, block_size=B, num_experts=E, backend="tpu"),
            [ids],
            BackendUnavailable,
        ),
        "align, out without a buffer": (
            lambda ids, rows: align(ids, block_size=B, num_experts=E, out={"sorted_token_ids": rows}),
            [ids, torch.zeros(22, dtype=torch.int32)],
            InvalidInput,
        ),
        "align_batched, floats": (
            lambda counts: align_batched(counts, max_tokens_per_batch=4, block_size=B),
            [torch.rand(3)],
            InvalidType,
        ),
        "align_batched, two axes": (
            lambda counts: align_batched(counts, max_tokens_per_batch=4, block_size=B),
            [ids],
            InvalidInput,
        ),
        "align_batched, negative": (
            lambda counts: align_batched(counts, max_tokens_per_batch=-1, block_size=B),
            [ids[:, 0]],
            InvalidInput,
        ),
        "route, integers": (lambda logits: route(logits, K, block_size=B), [ids], InvalidType),
        "route, top_k": (lambda logits: route(logits, E + 1, block_size=B), [logits], InvalidInput),
        "route, top_k of True": (lambda logits: route(logits, True, block_size=B), [logits], InvalidType),
        "route, block": (lambda logits: route(logits, K, block_size=0), [logits], InvalidInput),
        "route, scoring": (lambda logits: route(logits, K, block_size=B, scoring="tanh"), [logits], InvalidInput),
        "route, backend": (lambda logits: route(logits, K, block_size=B, backend="tpu"), [logits], BackendUnavailable),
        "fused_moe, rows": (fused_moe, [x[:, 1:], up, down, weights, ids], InvalidInput),
        "fused_moe, one axis": (fused_moe, [x[0], up, down, weights, ids], InvalidInput),
        "fused_moe, dtypes": (fused_moe, [x, up.float(), down, weights, ids], InvalidType),
        "fused_moe, integer rows": (fused_moe, [x.long(), up, down, weights, ids], InvalidType),
        "fused_moe, float ids": (fused_moe, [x, up, down, weights, ids.double()], InvalidType),
        "fused_moe, few weights": (fused_moe, [x, up, down, weights[:, :1], ids], InvalidInput),
        "fused_moe, map": (
            lambda *given: fused_moe(*given[:5], expert_map=given[5]),
            [x, up, down, weights, ids, torch.zeros(2, 2, dtype=torch.int32)],
            InvalidInput,
        ),
        "fused_moe, short map": (
            lambda *given: fused_moe(*given[:5], expert_map=given[5]),
            [x, up, down, weights, ids, torch.zeros(E - 1, dtype=torch.int32)],
            InvalidInput,
        ),
        "fused_moe, activation": (
            lambda *given: fused_moe(*given, activation="tanh"),
            [x, up, down, weights, ids],
            InvalidInput,
        ),
        "fused_moe, bias": (
            lambda *given: fused_moe(*given, down_bias=up_bias),
            [x, up, down, weights, ids],
            InvalidInput,
        ),
        "fused_moe, output_rows": (
            lambda *given: fused_moe(*given, output_rows=3),
            [x, up, down, weights, ids],
            InvalidType,
        ),
        "grouped_gemm, top_k": (lambda *given: gemm_of(*given, top_k=0), [x, up, *blocks], InvalidInput),
        "grouped_gemm, columns": (gemm_of, [x[:, 1:], up, *blocks], InvalidInput),
        "grouped_gemm, float layout": (gemm_of, [x, up, blocks[0].double(), *blocks[1:]], InvalidType),
        "grouped_gemm, factors": (
            lambda x, up, weights, *blocks: gemm_of(x, up, *blocks, row_weights=weights),
            [x, up, weights[:3], *blocks],
            InvalidInput,
        ),
    }


@pytest.mark.parametrize("name", refusals())
@pytest.mark.parametrize(
    "mode", ["eager", "meta", "FakeTensor", "compiled, whole", "compiled", "torch.jit.trace", "vmap"]
)
def test_refusals_are_the_same_in_every_mode(name, mode):
    function, given, error = refusals()[name]
    tried = function
    if mode == "meta":
        given = [each.to("meta") for each in given]
    elif mode.startswith("compiled"):
        tried = torch.compile(function, backend="eager", fullgraph=mode == "compiled, whole")
    elif mode == "FakeTensor":
        from torch._subclasses.fake_tensor import FakeTensorMode

        fake = FakeTensorMode()
        given = [fake.from_tensor(each) for each in given]
    elif mode == "torch.jit.trace":
        tried = lambda *given: torch.jit.trace(function, tuple(given), check_trace=False)  # noqa: E731
    elif mode == "vmap":
        given, tried = [torch.stack([each, each]) for each in given], torch.vmap(function)
    with pytest.raises(error) as caught:
        tried(*given)
    with pytest.raises(error) as eager:
        function(*refusals()[name][1])
    if mode.startswith("compiled"):
        assert str(caught.value) == str(eager.value)


@pytest.mark.parametrize("options", [{"activation": lambda rows: rows[:, :1]}, {"output_rows": lambda rows: None}])
def test_a_callable_that_returns_other_rows_is_refused(options):
    floats, (ids,) = split(CASES["fused_moe"], inputs(CASES["fused_moe"]))
    for function in (moe, torch.compile(moe, backend="eager")):
        with pytest.raises(InvalidInput, match=rf"{next(iter(options))}: expected \[10, \d\] from the callable, got"):
            function(*floats, ids, **options)


def test_what_does_not_lie_in_memory_by_strides_is_refused():
    floats, (ids,) = split(CASES["fused_moe"], inputs(CASES["fused_moe"]))
    x, up, down, _, _, weights = floats
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    with pytest.raises(InvalidType, match=r"hidden_states: expected a dense, strided tensor, got a nested tensor"):
        fused_moe(nested, up, down, weights, ids)
    with pytest.raises(InvalidType, match=r"down_proj: expected a dense, strided tensor, got layout torch.sparse_coo"):
        fused_moe(x, up, down.to_sparse(), weights, ids)
    with pytest.raises(InvalidType, match=r"topk_ids: expected a dense, strided tensor, got layout torch.sparse_csr"):
        align(ids.clamp(min=0).to_sparse_csr(), block_size=B, num_experts=E)
    with pytest.raises(InvalidType, match="router_logits: expected a dense, strided tensor"):
        route(torch.randn(5, E).to_sparse(), K, block_size=B)


def test_no_buffer_is_written_inside_a_transform():
    ids = torch.stack([chosen(5), chosen(5, 1)])
    word = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InvalidInput, match=r"out, error_word: expected none inside torch.func transforms"):
        torch.vmap(lambda ids: align(ids, block_size=B, num_experts=E, error_word=word).expert_ids)(ids)
    case = CASES["grouped_gemm"]
    floats, (ids,) = split(case, inputs(case))
    layout = align(ids, block_size=B, num_experts=E)
    out = torch.zeros(10, 2 * INNER, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="out: expected no buffer"):
        torch.func.grad(lambda x: grouped_gemm(x, floats[1], layout, top_k=K, out=out).sum())(floats[0])


@pytest.mark.parametrize("width", [0, H])
@pytest.mark.parametrize("inner", [0, INNER])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_of_no_size_gives_zeros_or_biases(width, inner, tokens, gradients):
    shapes = ((tokens, width), (E, 2 * inner, width), (E, width, inner), (E, 2 * inner), (E, width), (tokens, K))
    case = Case(moe, plain_moe, shapes)
    floats = [torch.randn(shape, requires_grad=gradients) for shape in case.shapes]
    ids = chosen(tokens)
    got, want = moe(*floats, ids), plain_moe(*floats, ids)
    same(got, want, 1e-5)
    if gradients:
        same(*(torch.autograd.grad(each.square().sum(), floats, materialize_grads=True) for each in (got, want)), 1e-5)


WAITLESS = {  # of tokens [T, 64] and weights that gradients go to, ids [T, 2], and the counts of batches
    "moe_align_block_size": lambda x, up, down, ids, counts: moe_align_block_size(ids, 16, E),
    "align": lambda x, up, down, ids, counts: align(ids, block_size=16, num_experts=E, positions=True),
    "align_batched": lambda x, up, down, ids, counts: align_batched(counts, max_tokens_per_batch=64, block_size=16),
    "route": lambda x, up, down, ids, counts: route(x[:, :E], K, block_size=16)[0],
    "fused_moe": lambda x, up, down, ids, counts: fused_moe(x, up, down, x[:, :K], ids),
    "grouped_gemm": lambda x, up, down, ids, counts: grouped_gemm(
        x, up, align(ids, block_size=16, num_experts=E), top_k=K
    ),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("name", WAITLESS)
def test_nothing_waits_for_the_device(name, tokens, gradients):
    shapes = ((tokens, 64), (E, 128, 64), (E, 64, 64))
    floats = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=gradients) for s in shapes]
    given = (*floats, chosen(tokens).cuda(), counts(6).cuda())

    def step() -> None:
        result = WAITLESS[name](*given)
        if isinstance(result, Tensor) and result.requires_grad:
            result.sum().backward()

    step()  # compiles, and makes what is kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
