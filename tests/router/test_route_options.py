"""Replayed ids, factors of experts and shared experts: every backend against the plain loops, fused or composed."""

from __future__ import annotations

import importlib
import itertools
import math
import random

import pytest
import torch
from cases.router import KINDS, SCORES, arguments, assert_alike, awkward, gpu, routed

import moealign
from moealign.backend import PreparedRoute
from moealign.calls import prepared
from moealign.layout import EXTRAS, REQUIRED
from moealign.testing import assert_same_layout, oracle_align, oracle_route

#: dtype of the replayed ids, dtype of the factors, shared experts.
OPTIONS = {
    "factors": (None, torch.float32, 0),
    "factors in bfloat16": (None, torch.bfloat16, 0),
    "one shared": (None, None, 1),
    "three shared, factors in float16": (None, torch.float16, 3),
    "replay": (torch.int32, None, 0),
    "replay of int64": (torch.int64, None, 0),
    "replay of int16, one shared": (torch.int16, None, 1),
    "all": (torch.int64, torch.float32, 2),
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def options_of(name, tokens, experts, top_k, generator, device="cpu"):
    ids, factors, shared = OPTIONS[name]
    given = {}
    if ids is not None:  # some are no experts
        drawn = torch.randint(-2, experts + 2, (tokens, top_k), generator=generator, device=device)
        given["replay_ids"] = drawn.to(ids)
    if factors is not None:
        given["expert_scale"] = (torch.rand(experts, generator=generator, device=device) + 0.5).to(factors)
    return {**given, "shared_experts": shared} if shared else given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", range(4))
def test_the_oracle_agrees(backend, kind, size):
    """Kernels with every option; where options are composed of a router and what follows, every kind with every option
    at one size each."""
    tokens, experts, top_k = ((1, 4, 1), (13, 64, 8), (7, 60, 6), (5, 100, 32))[size]
    replays_first = sorted(OPTIONS, key=lambda name: OPTIONS[name][0] is None)  # others are refused for many groups
    for number, name in enumerate(replays_first if backend == "cuda" else replays_first[size::4]):
        generator = torch.Generator().manual_seed(tokens * experts)
        given = arguments(kind, experts, top_k, generator)
        given |= options_of(name, tokens, experts, top_k, generator)
        logits = awkward(tokens, experts, generator).to(FLOATS[(tokens + number) % 3])
        valid = max(tokens - 1, 1)
        ids, weights, shares = oracle_route(logits, top_k, **given, num_valid_tokens=valid)
        total = experts + given.get("shared_experts", 0)
        want = oracle_align(torch.tensor(ids, dtype=torch.int32), block_size=4, num_experts=total)
        limit = torch.tensor([valid], dtype=torch.int32)
        for mean in (True, False):  # without the mean, in one launch with the layout where there is one
            got = routed(
                logits, top_k, block_size=4, **given, num_valid_tokens=limit, mean_probability=mean, positions=True,
                backend=backend,
            )  # fmt: skip
            assert got[1].tolist() == ids, name
            torch.testing.assert_close(got[0], torch.tensor(weights), rtol=2e-6, atol=1e-9)
            if mean:
                torch.testing.assert_close(got[3], torch.tensor(shares), rtol=1e-5, atol=1e-8)
            assert (got[0].dtype, got[1].dtype, got[2].num_experts) == (torch.float32, torch.int32, total)
            assert_same_layout(got[2], want)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint64], ids=str
)
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_what_is_no_expert_is_not_read(backend, dtype, tokens):
    """Ids of every integer dtype, far outside too; their weight is 0 whatever the factors are."""
    ends = torch.iinfo(dtype)
    far = [ends.max, ends.min, *((2**32 + 3, -(2**32) + 3) if ends.bits == 64 and ends.min else ()), 8, 9]
    ids = torch.tensor([[far[(token + i) % len(far)] for i in range(3)] + [5] for token in range(tokens)], dtype=dtype)
    factors = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf, 2.0, math.nan, math.inf])
    given = {"replay_ids": ids, "expert_scale": factors, "scale": 3.0}
    expected = [[e if 0 <= e < 8 else -1 for e in row] for row in ids.tolist()]
    for scoring, renormalize in itertools.product(SCORES, (True, False)):
        logits = torch.zeros(tokens, 8)
        call = {"block_size": 4, "scoring": scoring, "renormalize": renormalize}
        weights, got, layout = routed(logits, 4, **call, **given, backend=backend)
        assert got.tolist() == expected
        for row, of_row in zip(expected, weights.tolist(), strict=True):
            assert [w for e, w in zip(row, of_row, strict=True) if e < 0] == [0.0] * row.count(-1)
        if ends.min:  # then 0, whose factor is NaN, is not among them
            alone = 1.0 if renormalize else SCORES[scoring](logits)[0, 0].item()
            torch.testing.assert_close(weights[:, 3], torch.full((tokens,), alone * 6))
        want = oracle_align(torch.tensor(expected, dtype=torch.int32), block_size=4, num_experts=8)
        assert_same_layout(layout, want)


@pytest.mark.parametrize("valid", [None, 2])
def test_ids_and_factors_may_have_any_strides(backend, valid):
    generator = torch.Generator().manual_seed(0)
    logits, wide = torch.randn(5, 8, generator=generator), torch.randint(0, 8, (5, 6), generator=generator)
    factors = torch.rand(16, generator=generator)
    limit = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    for ids in (wide[:, ::2], wide[:, :1].expand(5, 3), wide[:3, :5].T, wide.int()[:, 1:4]):
        call = {"block_size": 4, "num_valid_tokens": limit, "shared_experts": 1, "backend": backend}
        got = routed(logits, 3, replay_ids=ids, expert_scale=factors[::2], **call)
        want = routed(logits, 3, replay_ids=ids.contiguous(), expert_scale=factors[::2].contiguous(), **call)
        assert all(map(torch.equal, got[:2], want[:2]))
        assert got[1].tolist()[:2] == [[*row, 8] for row in ids.tolist()[:2]]


def test_no_more_experts_than_a_kernel_takes_are_needed(backend):
    """What a kernel does not take is composed, also by a backend that is named."""
    logits = torch.randn(3, 2100, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[2099, 0], [-1, 5], [2100, 7]])
    got = routed(logits, 2, block_size=4, replay_ids=ids, backend=backend)
    assert got[1].tolist() == [[2099, 0], [-1, 5], [-1, 7]]
    weights, ids, layout = routed(logits[:, :8], 2, block_size=4, shared_experts=40, backend=backend)
    assert ids[:, 2:].tolist() == [[*range(8, 48)]] * 3
    assert weights[:, 2:].eq(1).all()
    assert layout.num_experts == 48


# ---- what the host passes on, without a GPU --------------------------------------------------------------------------


@pytest.fixture
def fusing(monkeypatch):
    """The reference as a backend that fuses: what its routers were given, in the place of kernels."""
    reference, given = importlib.import_module("moealign.backend.reference"), []
    monkeypatch.setattr(prepared, "cached", {})
    honest = reference.prepare_route

    def prepare_route(problem, layout=None):
        if layout is None:
            return honest(problem)

        def run(logits, bias, valid, weights, ids, mean, expert_map, word, out, replay_ids=None, expert_scale=None):
            given.append((problem, layout, replay_ids, expert_scale))
            for output in (weights, ids, *(out[:3])):
                output.zero_()

        return PreparedRoute(honest(problem).run, run)

    monkeypatch.setattr(reference, "FUSES_OPTIONS", True)
    monkeypatch.setattr(reference, "prepare_route", prepare_route)
    return given


def test_an_eager_call_goes_to_the_backend_at_once(fusing):
    logits, ids, factors = torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.ones(8, dtype=torch.bfloat16)
    call = {"replay_ids": ids, "expert_scale": factors, "shared_experts": 2, "block_size": 4, "backend": "reference"}
    for _ in range(2):
        weights, got, layout = moealign.route(logits, 2, **call, expert_counts=True)
        assert (weights.shape, got.shape, layout.num_experts, layout.num_routes) == ((3, 4), (3, 4), 10, 12)
        assert layout.expert_counts.shape == (10,)
        problem, aligned, *tensors = fusing.pop()
        assert (problem.replay_dtype, problem.scale_dtype, problem.shared_experts) == (torch.int64, torch.bfloat16, 2)
        assert (problem.columns, aligned.row_length, aligned.num_experts) == (4, 4, 10)
        assert tensors[0] is ids
        assert tensors[1] is factors
    assert len(prepared.cached) == 1
    moealign.route(logits, 2, block_size=4, backend="reference")
    assert fusing.pop()[2:] == (None, None)


@pytest.mark.parametrize("what", ["logits", "factors", "jvp", "meta", "vmap"])
def test_a_call_that_is_followed_or_needs_gradients_is_composed(fusing, what):
    logits, factors = torch.randn(3, 8), torch.rand(8) + 0.5
    want = moealign.route(logits, 2, block_size=4, expert_scale=factors, backend="cpu")

    def call(logits, factors):
        return moealign.route(logits, 2, block_size=4, expert_scale=factors, backend="reference")[:2]

    if what == "meta":
        got = call(logits.to("meta"), factors.to("meta"))
        assert got[0].is_meta
    elif what == "jvp":
        got = torch.func.jvp(lambda x: call(x, factors)[0], (logits,), (torch.ones_like(logits),))
    elif what == "vmap":
        got = torch.vmap(lambda x: call(x, factors))(logits[None])
        got = [each[0] for each in got]
    else:
        got = call(logits.requires_grad_(what == "logits"), factors.requires_grad_(what == "factors"))
        assert got[0].requires_grad
    assert fusing == []
    if what != "meta":
        torch.testing.assert_close(got[0].detach(), want[0])
    with torch.no_grad():
        call(logits.detach().requires_grad_(), torch.nn.Parameter(factors.detach()))
    assert len(fusing) == 1


REFUSED = [
    ({"replay_ids": torch.zeros(3, 2)}, moealign.InvalidType, "replay_ids: expected an integer dtype"),
    (
        {"replay_ids": torch.zeros(2, 2).int()},
        moealign.InvalidInput,
        r"replay_ids: expected \[tokens, top_k\] = \[3, 2\]",
    ),
    ({"replay_ids": [[0, 1]] * 3}, moealign.InvalidType, "replay_ids: expected a torch.Tensor"),
    ({"expert_scale": torch.ones(7)}, moealign.InvalidInput, r"expert_scale: expected \[num_experts\] = \[8\]"),
    ({"expert_scale": torch.ones(8).double()}, moealign.InvalidType, "expert_scale: expected float32"),
    ({"expert_scale": 2.0}, moealign.InvalidType, "expert_scale: expected a torch.Tensor"),
    ({"shared_experts": -1}, moealign.InvalidInput, "shared_experts: expected an int of at least 0"),
    ({"shared_experts": True}, moealign.InvalidType, "shared_experts: expected an int"),
    ({"shared_experts": 1.5}, moealign.InvalidType, "shared_experts: expected an int"),
    ({"shared_experts": 1, "top_k": 9}, moealign.InvalidInput, "top_k: expected at most 8"),
    ({"shared_experts": 1, "block_size": 0}, moealign.InvalidInput, "block_size: expected an int of at least 1"),
    ({"shared_experts": 1, "expert_map": torch.zeros(8).int()}, moealign.InvalidInput, r"\[num_experts\] = \[9\]"),
    ({"shared_experts": 1, "backend": "none"}, moealign.BackendUnavailable, "backend: expected one of"),
    ({"shared_experts": 1, "backend": "none", "top_k": 9}, moealign.BackendUnavailable, "backend: expected one of"),
]


@pytest.mark.parametrize("mode", ["fused", "composed", "gradient", "compiled", "a GPU"])
@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED, ids=[each[2][:40] for each in REFUSED])
def test_refusals_are_the_same_in_every_mode(wrong, error, message, mode, request):
    call = {"top_k": 2, "block_size": 4, **wrong}
    logits = torch.zeros(3, 8, requires_grad=mode == "gradient")
    function = moealign.route
    if mode == "fused":
        request.getfixturevalue("fusing")
        call.setdefault("backend", "reference")
    elif mode == "a GPU":
        if moealign.backends()["cuda"] is not None:
            pytest.skip("no GPU")
        logits, call = logits.cuda(), {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
    elif mode == "compiled":
        torch._dynamo.reset()

        @torch.compile(backend="eager")
        def function(logits, **call):
            return moealign.route(logits, **call)[:2]

    with pytest.raises(error, match=message):
        function(logits, **call)


def test_buffers_over_the_replayed_ids_are_refused(fusing):
    """A kernel writes the layout while it reads the ids."""
    ids = torch.zeros(3, 2, dtype=torch.int32)
    sizes = moealign.capacity(6, block_size=1, num_experts=8)
    out = {name: torch.zeros(getattr(sizes, name), dtype=torch.int32) for name in REQUIRED}
    call = {"block_size": 1, "replay_ids": ids, "backend": "reference"}
    moealign.route(torch.zeros(3, 8), 2, **call, out=out)
    out["sorted_token_ids"] = ids.view(-1)
    with pytest.raises(moealign.InvalidInput, match="expected buffers that share no memory"):
        moealign.route(torch.zeros(3, 8), 2, **call, out=out)


def test_more_weights_than_int32_counts_are_refused(fusing):
    for backend in ("reference", "cpu"):
        with pytest.raises(moealign.InvalidInput, match="shared_experts: expected at most"):
            moealign.route(torch.zeros(3, 8), 2, block_size=4, shared_experts=2**31 - 3, backend=backend)


# --------------------------------------------------------------------------------------------------------------- a GPU

ROUTED = {
    "softmax": {},
    "softmax of all": {"renormalize": False, "scale": 1.5},
    "sigmoid, bias, groups": {"scoring": "sigmoid", "correction_bias": True, "num_groups": 4, "topk_groups": 2},
    "sqrtsoftplus": {"scoring": "sqrtsoftplus", "scale": 2.5},
}


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 33, 600])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ROUTED)
def test_gpu_equals_the_reference(name, tokens, kind):
    """Each with six of the combinations of dtype, layout, valid tokens and outputs beside; together all of them."""
    chance = random.Random(f"{name} {tokens} {kind}")
    every = list(itertools.product(FLOATS, range(3), (None, tokens - 1, 0), ("", "mean", "word")))
    for dtype, which, valid, beside in chance.sample(every, 6):
        generator = torch.Generator(device="cuda").manual_seed(tokens)
        experts = chance.choice((8, 60, 256))
        top_k = min(8, experts // 2)
        given = dict(ROUTED[kind])
        if given.pop("correction_bias", False):
            given["correction_bias"] = torch.rand(experts, generator=generator, device="cuda") / 10
        given |= options_of(name, tokens, experts, top_k, generator, "cuda")
        total = experts + given.get("shared_experts", 0)
        where = (torch.randperm(total, generator=generator, device="cuda").int() - total // 2).clamp(min=-1)
        mapped = {"expert_map": where, "ignore_invalid_experts": True, "positions": True}
        given |= ({}, dict.fromkeys(EXTRAS, True), mapped)[which]
        if valid is not None:
            given["num_valid_tokens"] = torch.tensor([valid], dtype=torch.int32, device="cuda")
        logits = torch.randn(tokens, experts + 3, generator=generator, device="cuda").to(dtype)[:, :experts]
        words = [moealign.new_error_word("cuda") if beside == "word" else None for _ in range(2)]
        ours, want = (
            moealign.route(
                logits, top_k, block_size=16, **given, mean_probability=beside == "mean", error_word=word,
                backend=backend,
            )
            for backend, word in zip(("cuda", "reference"), words, strict=True)
        )  # fmt: skip
        assert_alike(ours, want, rtol=1e-5)
        if beside == "word":
            assert torch.equal(*words)


@gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tokens", [1, 4, 8, 33, 600])
def test_gpu_in_a_graph_with_other_values_and_without_a_wait(name, tokens):
    """Captured once, replayed with other logits, ids, factors and numbers of valid tokens."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    logits, valid = torch.randn(tokens, 64, device="cuda"), torch.tensor([tokens], dtype=torch.int32, device="cuda")
    options = options_of(name, tokens, 64, 8, generator, "cuda")
    call = {"block_size": 16, "num_valid_tokens": valid, **options}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # a first call compiles
            moealign.route(logits, 8, **call, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = moealign.route(logits, 8, **call, backend="cuda")
    for count in (tokens, tokens // 2, 0, tokens + 5):
        logits.normal_()
        valid.fill_(count)
        for key, other in options_of(name, tokens, 64, 8, generator, "cuda").items():
            if isinstance(other, torch.Tensor):
                options[key].copy_(other)
        graph.replay()
        assert_alike(captured, moealign.route(logits, 8, **call, backend="reference"), rtol=1e-5)


@gpu
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("tokens", "kernels"), [(1, 1), (8, 1), (9, 2), (33, 2)])
def test_gpu_takes_as_many_launches_as_without_options(name, tokens, kernels, monkeypatch):
    """One up to eight tokens, two beyond; ids that are neither int32 nor int64 are converted by torch."""
    from moealign.backend.cuda.launch import Launch

    launches, own = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda *arguments: launches.append(arguments[0]) or own(*arguments))
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits, call = torch.randn(tokens, 64, device="cuda"), options_of(name, tokens, 64, 8, generator, "cuda")
    moealign.route(logits, 8, block_size=16, **call, backend="cuda")
    assert len(launches) == kernels
