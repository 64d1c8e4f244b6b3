"""The router: every backend against the plain loops and against the routers of the models themselves."""

from __future__ import annotations

import itertools
import math
import operator

import pytest
import torch
import torch._dynamo.testing
from cases.router import (
    KINDS,
    ROUTERS,
    SCORES,
    arguments,
    assert_alike,
    awkward,
    close_calls,
    device_of,
    gpu,
    routed,
)

import moealign
from moealign.backend.reference import route as reference_routing
from moealign.backend.reference.route import exp32, sigmoid32, softmax32, sqrtsoftplus32
from moealign.testing import assert_same_layout, oracle_align, oracle_route

SIZES = [
    (1, 4, 1),
    (7, 8, 2),
    (33, 64, 8),
    (9, 60, 6),
    (5, 100, 32),
    (3, 260, 8),
    (2, 1024, 8),
    (12, 256, 8),
    (3, 896, 16),
]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_oracle_agrees(backend, kind, tokens, experts, top_k, dtype):
    generator = torch.Generator().manual_seed(tokens * experts)
    given = arguments(kind, experts, top_k, generator)
    logits = awkward(tokens, experts, generator).to(dtype)
    valid = max(tokens - 1, 1)
    ids, weights, shares = oracle_route(logits, top_k, **given, num_valid_tokens=valid)
    want = oracle_align(torch.tensor(ids, dtype=torch.int32), block_size=4, num_experts=experts)
    for mean in (True, False):  # without the mean, in one launch with the layout where there is one
        got = routed(
            logits,
            top_k,
            block_size=4,
            **given,
            num_valid_tokens=torch.tensor([valid], dtype=torch.int32),
            mean_probability=mean,
            positions=True,
            backend=backend,
        )
        assert got[1].tolist() == ids
        torch.testing.assert_close(got[0], torch.tensor(weights), rtol=2e-6, atol=1e-9)
        if mean:
            torch.testing.assert_close(got[3], torch.tensor(shares), rtol=1e-5, atol=1e-8)
        assert got[0].dtype is torch.float32
        assert got[1].dtype is torch.int32
        assert_same_layout(got[2], want)


def test_an_order_that_differs_would_be_seen(monkeypatch):
    """The comparison with the oracle fails for a router that prefers the higher of two equal experts."""
    logits = torch.zeros(2, 6)
    assert moealign.route(logits, 2, block_size=4, backend="reference")[1].tolist() == oracle_route(logits, 2)[0]
    honest = reference_routing.order_of
    monkeypatch.setattr(reference_routing, "order_of", lambda x: honest(x) * 8 + torch.arange(x.shape[-1]))
    assert moealign.route(logits, 2, block_size=4, backend="reference")[1].tolist() != oracle_route(logits, 2)[0]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_backends_agree_to_the_bit_about_experts(tokens, scoring):
    names = [name for name in ROUTERS if moealign.backends()[name] is None]
    generator = torch.Generator().manual_seed(1)
    for seed in range(40):
        logits = torch.randn(tokens * 50, 256, generator=generator)
        logits = (logits * 64).round() / 64 if seed % 2 else logits
        bias = torch.rand(256, generator=generator) / 100
        given = {"scoring": scoring, "correction_bias": bias, "num_groups": 8, "topk_groups": 4, "block_size": 16}
        first, *others = (routed(logits, 8, **given, backend=name)[1] for name in names)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("scoring", SCORES)
def test_the_last_bit_of_a_score_decides(backend, scoring):
    """All scores are equal but for their last bits: those of the contract choose, and others would choose otherwise."""
    generator = torch.Generator().manual_seed(4)
    differs = 0
    for experts in (8, 60, 256, 896) * 10:
        logits, bias = close_calls(scoring, experts, generator)
        given = {"scoring": scoring, "correction_bias": bias}
        ids = routed(logits, 4, block_size=4, **given, backend=backend)[1].tolist()
        assert ids == oracle_route(logits, 4, **given)[0]
        others = torch.sort(SCORES[scoring](logits) + bias, dim=1, descending=True, stable=True).indices
        differs += ids != others[:, :4].tolist()
    assert differs > 5


def test_the_contract_s_exp_is_accurate():
    x = torch.linspace(-86.9, 86.9, 200_001)
    exact = x.double().exp()
    assert ((exp32(x).double() - exact) / exact).abs().max() < 2 * 2**-24
    assert exp32(torch.tensor([-88.0, -math.inf])).tolist() == [0, 0]
    s = sigmoid32(torch.tensor([-math.inf, -88.0, 0.0, 88.0, math.inf, math.nan]))
    assert s.tolist() == [0, 0, 0.5, 1, 1, 0]


def test_the_contract_s_softmax_has_no_order_and_is_accurate():
    """Its sum is one of whole numbers, so permuted logits have the same probabilities to the bit."""
    generator = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(200, 896, generator=generator) * scale for scale in (0.01, 1, 3, 20)])
    p = softmax32(x)
    order = torch.randperm(896, generator=generator)
    assert torch.equal(softmax32(x[:, order]), p[:, order])
    shuffled = x[:, order].softmax(1)  # torch's own sum depends on the order
    assert not torch.equal(shuffled, x.softmax(1)[:, order])
    exact = x.double().softmax(1)
    near = exact > 1e-25
    below = x.amax(1, keepdim=True) - x  # its rounding is an error of the exponential
    assert (((p.double() - exact) / exact).abs() / (8 + below))[near].max() < 2**-24
    assert p[exact < 1e-31].sum() == 0
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[inf, 0.0, inf, nan], [nan] * 4, [-inf] * 4, [0.0, -70.0, 0.0, -60.0]])
    assert softmax32(rows).tolist()[:3] == [[0.5, 0, 0.5, 0], [0] * 4, [0.25] * 4]
    assert softmax32(rows)[3, 1] == 0


def test_the_contract_s_sqrtsoftplus_is_accurate_and_keeps_the_order():
    x = torch.linspace(-86.9, 200, 400_001)
    exact = torch.nn.functional.softplus(x.double(), threshold=100).sqrt()
    assert ((sqrtsoftplus32(x).double() - exact) / exact).abs().max() < 4 * 2**-24
    near = torch.arange(-(2**21), 2**21) / 2**20  # logits 2**-20 apart
    assert (sqrtsoftplus32(near).diff() >= 0).all()
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    s = sqrtsoftplus32(every[every.abs() > 2**-12].sort().values)
    assert (s.diff() >= 0).all()
    assert s.isfinite().all()
    s = sqrtsoftplus32(torch.tensor([-math.inf, -88.0, 0.0, math.inf, math.nan]))
    assert s.tolist() == [0, 0, pytest.approx(math.sqrt(math.log(2)), rel=1e-6), pytest.approx(2**64), 0]


def test_logits_that_are_no_numbers_have_the_weights_of_a_choice(backend):
    """Of the same experts, replayed: an infinite logit has all of the weight, NaN has none, in every scoring."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[inf, 0.0, inf, 1.0], [nan, 1.0, 0.0, nan], [-inf] * 4, [nan] * 4, [-inf, 0.0, -inf, -inf]])
    for scoring, renormalize in itertools.product(SCORES, (True, False)):
        call = {"block_size": 4, "scoring": scoring, "renormalize": renormalize, "mean_probability": True}
        own = routed(logits, 3, **call, backend=backend)
        again = routed(logits, 3, replay_ids=own[1], **call, backend=backend)
        for one, other in ((own[0], again[0]), (own[3], again[3])):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- models' own routers

EXPERTS, HIDDEN, TOKENS = 32, 24, 50


def config(**facts: object) -> object:
    class Config:
        hidden_size = HIDDEN
        num_experts = num_local_experts = EXPERTS
        num_experts_per_tok = 4
        norm_topk_prob = True

    for name, value in facts.items():
        setattr(Config, name, value)
    return Config()


def module(package: str, name: str):
    pytest.importorskip("transformers")
    found = pytest.importorskip(f"transformers.models.{package}.modeling_{package}", exc_type=ImportError)
    if not hasattr(found, name):
        pytest.skip(f"this release of Transformers has no {name}")
    return getattr(found, name)


def filled(router, generator: torch.Generator):
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return router


def zeros(router):
    return torch.zeros(EXPERTS)


def bias_of(path):
    return lambda router: operator.attrgetter(path)(router).detach().reshape(-1)


BIAS = bias_of("e_score_correction_bias")
OF_GROUPS = {"num_groups": 4, "topk_groups": 2}
GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
MODELS = [
    ("mixtral", "MixtralTopKRouter", {}, {}),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {}, {}),
    ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, {"renormalize": False}),
    ("gpt_oss", "GptOssTopKRouter", {}, {}),
    ("deepseek_v3", "DeepseekV3TopkRouter", GROUPED, {"scoring": "sigmoid", "scale": 2.5, "bias": BIAS, **OF_GROUPS}),
    ("glm4_moe", "Glm4MoeTopkRouter", GROUPED, {"scoring": "sigmoid", "scale": 2.5, "bias": BIAS, **OF_GROUPS}),
    (
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
        {"scoring": "sqrtsoftplus", "scale": 1.5, "bias": BIAS},
    ),
    (
        "ernie4_5_moe",
        "Ernie4_5_MoeTopKRouter",
        {"moe_norm_min": 1e-12},
        {"bias": bias_of("moe_statics.e_score_correction_bias")},
    ),
    (
        "longcat_flash",
        "LongcatFlashTopkRouter",
        {"n_routed_experts": EXPERTS - 4, "zero_expert_num": 4, "routed_scaling_factor": 6.0},
        {"renormalize": False, "scale": 6.0, "bias": BIAS},
    ),
    ("mistral4", "Mistral4TopkRouter", GROUPED, {"scale": 2.5, "bias": zeros, **OF_GROUPS}),
    ("mistral_large4", "MistralLarge4TextTopkRouter", GROUPED, {"scale": 2.5, "bias": zeros, **OF_GROUPS}),
]


@pytest.mark.parametrize(("package", "name", "facts", "given"), MODELS, ids=[model[0] for model in MODELS])
def test_a_model_s_own_router_agrees(backend, package, name, facts, given):
    generator = torch.Generator().manual_seed(3)
    router = filled(module(package, name)(config(**facts)), generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    with torch.no_grad():
        result = router(hidden)
    if len(result) != 3:
        pytest.skip("the router of this release of Transformers returns no logits")
    logits, theirs, which = result
    given = dict(given)
    if "bias" in given:
        given["correction_bias"] = given.pop("bias")(router)
    weights, ids, _ = routed(logits, 4, block_size=16, **given, backend=backend)
    # Some of them leave the chosen unsorted: expert by expert.
    order, own = which.sort(1), ids.to(torch.int64).sort(1)
    assert torch.equal(order.values, own.values)
    torch.testing.assert_close(weights.gather(1, own.indices), theirs.float().gather(1, order.indices))


def test_the_hash_layers_of_deepseek_v4_are_a_choice_by_a_table(backend):
    generator = torch.Generator().manual_seed(3)
    facts = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "vocab_size": 100}
    router = filled(module("deepseek_v4", "DeepseekV4HashRouter")(config(**facts)), generator)
    table = torch.rand(100, EXPERTS, generator=generator).argsort(1)[:, :4]
    router.tid2eid.copy_(table)
    hidden, tokens = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randint(0, 100, (TOKENS,))
    with torch.no_grad():
        logits, theirs, which = router(hidden, tokens)
    given = {"scoring": "sqrtsoftplus", "scale": 1.5, "replay_ids": table[tokens]}
    weights, ids, layout = routed(logits, 4, block_size=16, **given, backend=backend)
    assert torch.equal(ids, which.int())
    torch.testing.assert_close(weights, theirs)
    assert_same_layout(layout, oracle_align(which.int(), block_size=16, num_experts=EXPERTS))


def test_llama4_s_own_router_agrees(backend):
    generator = torch.Generator().manual_seed(3)
    router = filled(module("llama4", "Llama4Router")(config(num_experts_per_tok=1)), generator)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    with torch.no_grad():
        scores, logits = router(hidden)
    weights, ids, _ = routed(logits, 1, block_size=16, scoring="sigmoid", renormalize=False, backend=backend)
    dense = torch.zeros_like(scores).scatter(1, ids.to(torch.int64), weights)
    torch.testing.assert_close(dense, scores)


# ----------------------------------------------------------------------------------------------------------- gradients


def eager(x, ids, scoring="softmax", renormalize=True, scale=1.0, **_):
    index = ids.to(torch.int64)
    every = SCORES[scoring](x)
    picked = every.gather(1, index)
    if renormalize:
        picked = picked / (picked.sum(1, keepdim=True) + (0 if scoring == "softmax" else 1e-20))
    return picked * scale, (every / every.sum(1, keepdim=True)).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_eager_formula(backend, kind):
    generator = torch.Generator().manual_seed(5)
    given = arguments(kind, 16, 4, generator)
    x = torch.randn(9, 16, generator=generator, requires_grad=True)
    to_weights, to_mean = torch.randn(9, 4, generator=generator), torch.randn(16, generator=generator)
    weights, ids, _, mean = routed(x, 4, block_size=4, **given, mean_probability=True, backend=backend)
    ((weights * to_weights).sum() + (mean * to_mean).sum()).backward()
    y = x.detach().double().requires_grad_()
    expected, share = eager(y, ids, **given)
    ((expected * to_weights).sum() + (share * to_mean).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad.float(), rtol=1e-4, atol=1e-6)


def test_padding_rows_have_no_gradient(backend):
    x = torch.randn(6, 8, requires_grad=True, device=device_of(backend))
    valid = torch.tensor([4], dtype=torch.int32, device=x.device)
    given = {"block_size": 4, "num_valid_tokens": valid, "mean_probability": True, "backend": backend}
    weights, ids, layout, mean = moealign.route(x, 2, **given)
    assert ids[4:].tolist() == [[-1, -1]] * 2
    assert not weights[4:].any()
    (weights.pow(2).sum() + mean.pow(2).sum()).backward()
    assert x.grad[:4].any(1).all()
    assert not x.grad[4:].any()
    assert math.isclose(mean.sum().item(), 1, rel_tol=1e-5)
    assert layout.num_tokens_post_padded.item() % 4 == 0


# ------------------------------------------------------------------------------------------------------------ operator


def test_opcheck(backend):
    x = torch.randn(5, 8, requires_grad=True, device=device_of(backend))
    some = torch.rand(8, device=x.device)
    for scoring, bias in (("softmax", None), ("softmax", some), ("sigmoid", some), ("sqrtsoftplus", some)):
        given = (x, 2, scoring, True, bias, 2, 1, 1.0, None, True, backend)
        torch.library.opcheck(torch.ops.moealign.route, given)


def test_one_graph_for_all_sizes():
    counted = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=counted)
    def compiled(x):
        weights, ids, layout = moealign.route(x, 2, block_size=4, backend="reference")
        return weights, ids, layout.sorted_token_ids

    for tokens in (5, 9, 17):
        x = torch.randn(tokens, 8)
        expected = moealign.route(x, 2, block_size=4, backend="reference")
        got = compiled(x)
        for a, b in zip(got, (*expected[:2], expected[2].sorted_token_ids), strict=True):
            assert torch.equal(a, b)
    assert counted.frame_count == 1


# ------------------------------------------------------------------------------------------------------------ refusals

GOOD = torch.zeros(3, 8)
REFUSED = [
    ({"router_logits": [1.0]}, TypeError, "router_logits: expected a torch.Tensor"),
    ({"router_logits": GOOD.double()}, TypeError, "router_logits: expected float32, bfloat16 or float16"),
    ({"router_logits": torch.zeros(8)}, ValueError, r"router_logits: expected shape \[tokens, num_experts\]"),
    ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1"),
    ({"top_k": 9}, ValueError, "top_k: expected at most 8"),
    ({"router_logits": torch.zeros(1, 64), "top_k": 33}, ValueError, "top_k: expected at most 32"),
    ({"scoring": "tanh"}, ValueError, "scoring: expected one of softmax, sigmoid, sqrtsoftplus"),
    ({"correction_bias": torch.zeros(9)}, ValueError, "correction_bias: expected shape"),
    ({"scoring": "sigmoid", "correction_bias": torch.zeros(7)}, ValueError, "correction_bias: expected shape"),
    ({"num_groups": 3}, ValueError, "num_groups: expected a divisor of num_experts = 8"),
    ({"num_groups": 4, "topk_groups": 5}, ValueError, "topk_groups: expected at most 4 groups"),
    ({"num_groups": 8, "topk_groups": 1}, ValueError, "topk_groups: expected at most 8 groups that hold 2 experts"),
    ({"num_valid_tokens": torch.tensor([1])}, TypeError, "num_valid_tokens: expected an int32 tensor"),
    ({"backend": "cuda"}, ValueError, "backend: expected one that can take this call, got 'cuda'"),
    ({"block_size": 0}, ValueError, "block_size: expected an int of at least 1"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_bad_input_is_refused(wrong, error, message):
    call = {"router_logits": GOOD, "top_k": 2, "block_size": 4, **wrong}
    with pytest.raises(error, match=message):
        moealign.route(**call)


# --------------------------------------------------------------------------------------------------------------- a GPU


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 8, 16, 31, 32, 33, 128, 256, 500, 1024, 2048, 4096, 20_000])
@pytest.mark.parametrize("experts", [8, 128, 256, 512])
def test_gpu_sizes_and_layouts(tokens, experts):
    """One launch or two, every option of the layout, against the two parts by the reference."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    logits = torch.randn(tokens, experts + 3, generator=generator, device="cuda").round(decimals=1)[:, :experts]
    where = torch.randperm(experts, generator=generator, device="cuda").to(torch.int32) - experts // 2
    extras = dict.fromkeys(("expert_counts", "expert_offsets", "group_ends", "positions", "block_rows"), True)
    options = [{}, {"expert_map": where.clamp(min=-1), "ignore_invalid_experts": True, **extras}]
    for given in options:
        for dtype in (torch.float32, torch.bfloat16):
            k = min(8, experts)
            valid = torch.tensor([tokens - 1], dtype=torch.int32, device="cuda")
            call = {"block_size": 16, **given, "num_valid_tokens": valid}
            ours = moealign.route(logits.to(dtype), k, **call, backend="cuda")
            want = moealign.route(logits.to(dtype), k, **call, backend="reference")
            assert_alike(ours, want)


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257])
@pytest.mark.parametrize("experts", [128, 130, 160, 256, 384, 512, 896])
def test_gpu_around_the_sizes_where_warps_share_the_scores_of_a_token(tokens, experts):
    """They share those with a bias at one token, and up to 256 in two launches, of a multiple of 128 experts."""
    generator = torch.Generator().manual_seed(experts + tokens)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    kinds = [kind for kind, given in KINDS.items() if "correction_bias" in given and given.get("num_groups") != 0]
    for kind, dtype in zip(kinds, dtypes, strict=False):
        if "num_groups" in KINDS[kind] and experts % 4:
            continue
        call = {**arguments(kind, experts, 8, generator), "block_size": 16}
        call["correction_bias"] = call["correction_bias"].cuda()
        logits = awkward(tokens, experts, generator).to("cuda", dtype)
        want = moealign.route(logits, 8, **call, backend="reference")
        assert_alike(moealign.route(logits, 8, **call, backend="cuda"), want)


@gpu
def test_gpu_in_a_graph_with_other_logits_and_without_a_wait():
    sizes = [(tokens, 256) for tokens in (1, 8, 32, 256, 300, 1024, 2048)]
    for tokens, experts in (*sizes, (33, 8), (33, 512)):
        logits = torch.randn(tokens, experts, device="cuda")
        moealign.route(logits, 8, block_size=16)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            moealign.route(logits, 8, block_size=16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            weights, ids, layout = moealign.route(logits, 8, block_size=16)
        for _ in range(3):
            logits.normal_()
            graph.replay()
            want = moealign.route(logits, 8, block_size=16, backend="reference")
            assert_alike((weights, ids, layout), want)


# ---- experts that every token takes, and factors of experts ----------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("valid", [None, 6])
def test_shared_experts_and_scales_of_experts(gradients, valid):
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).requires_grad_(gradients)
    scale = torch.linspace(0.5, 2, 7).requires_grad_(gradients)
    limit = None if valid is None else torch.tensor([valid], dtype=torch.int32)
    options = {"block_size": 4, "num_valid_tokens": limit, "positions": True}
    plain = moealign.route(logits, 2, **options)
    got = moealign.route(logits, 2, expert_scale=scale, shared_experts=2, **options)
    live = torch.arange(9) < (9 if valid is None else valid)
    for token in range(9):
        ids = [*plain.topk_ids[token].tolist(), *((7, 8) if live[token] else (-1, -1))]
        assert got.topk_ids[token].tolist() == ids
        factor = torch.tensor([float(scale[each]) if each >= 0 else 0.0 for each in ids[:2]])
        torch.testing.assert_close(got.topk_weights[token, :2].detach(), plain.topk_weights[token].detach() * factor)
        assert got.topk_weights[token, 2:].tolist() == [float(live[token])] * 2
    want = moealign.align(got.topk_ids, block_size=4, num_experts=9, positions=True)
    assert all(map(torch.equal, got.layout, want))
    assert torch.equal(got.layout.positions, want.positions)
    if gradients:
        one, other = torch.autograd.grad(got.topk_weights.square().sum(), (logits, scale))
        scaled = plain.topk_weights * scale[plain.topk_ids.clamp(min=0).long()]
        for each, plainly in zip(
            (one, other), torch.autograd.grad(scaled.square().sum(), (logits, scale)), strict=True
        ):
            torch.testing.assert_close(each, plainly)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shared_experts": -1}, moealign.InvalidInput, "shared_experts: expected an int of at least 0, got -1"),
        ({"shared_experts": 1.5}, moealign.InvalidType, "shared_experts: expected an int"),
        ({"expert_scale": torch.ones(3)}, moealign.InvalidInput, r"expert_scale: expected \[num_experts\] = \[7\]"),
        ({"expert_scale": torch.ones(7).int()}, moealign.InvalidType, "expert_scale: expected float32"),
    ],
)
def test_what_is_no_scale_or_number_of_experts_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        moealign.route(torch.zeros(2, 7), 2, block_size=4, **options)
