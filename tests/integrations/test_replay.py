"""Routing replay: the choices of one run, with the weights and gradients of another."""

from __future__ import annotations

import copy

import pytest
import torch

import moealign
from moealign import InvalidInput, InvalidType, route
from moealign.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

E, K = 8, 2
OPTIONS = {
    "softmax": {},
    "softmax of all": {"renormalize": False, "scale": 1.5},
    "sigmoid": {"scoring": "sigmoid", "scale": 2.0},
    "sigmoid, as it is": {"scoring": "sigmoid", "renormalize": False},
    "groups and a bias": {
        "scoring": "sigmoid",
        "correction_bias": torch.linspace(-1, 1, E),
        "num_groups": 4,
        "topk_groups": 2,
    },
}


def logits_of(tokens, seed=0):
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_own_choice_replayed_gives_the_own_weights_and_gradients(options):
    logits = logits_of(20).requires_grad_()
    options = {**options, "block_size": 4, "mean_probability": True, "positions": True}
    own = route(logits, K, **options)
    again = route(logits, K, replay_ids=own.topk_ids, **options)
    assert torch.equal(own.topk_ids, again.topk_ids)
    assert torch.equal(own.layout.positions, again.layout.positions)
    for name in ("topk_weights", "mean_probability"):
        one, other = getattr(own, name), getattr(again, name)
        torch.testing.assert_close(other, one)
        grads = [torch.autograd.grad(each.square().sum(), logits, retain_graph=True)[0] for each in (one, other)]
        torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(route(logits, K, replay_ids=own.topk_ids.long(), **options)[0], again[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_choice_gets_the_weights_of_these_logits(options):
    logits, ids = logits_of(20), route(logits_of(20, seed=1), K, block_size=4)[1]
    got = route(logits, K, block_size=4, replay_ids=ids, **options)
    plain = {name: value for name, value in options.items() if name in ("scoring", "renormalize", "scale")}
    for token in range(20):
        x = logits[token].double()
        scores = x.sigmoid() if plain.get("scoring") == "sigmoid" else x.softmax(0)
        chosen = scores[ids[token].long()]
        if plain.get("renormalize", True):
            chosen = chosen / chosen.sum()
        torch.testing.assert_close(
            got.topk_weights[token].double(), chosen * plain.get("scale", 1), rtol=1e-5, atol=1e-7
        )
    assert torch.equal(got.topk_ids, ids)


def test_what_was_no_choice_has_no_weight():
    ids = torch.tensor([[0, -1], [9, 3], [-1, -1], [1, 2]])
    logits = logits_of(4).requires_grad_()
    weights, got, layout, mean = route(
        logits, K, block_size=4, replay_ids=ids, num_valid_tokens=torch.tensor([3], dtype=torch.int32),
        mean_probability=True, positions=True,
    )  # fmt: skip
    assert got.tolist() == [[0, -1], [-1, 3], [-1, -1], [-1, -1]]
    assert weights.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert (layout.positions >= 0).tolist() == [True, False, False, True, *[False] * 4]
    torch.testing.assert_close(mean, logits[:3].softmax(1).mean(0))
    assert torch.autograd.grad(weights.sum(), logits)[0].isfinite().all()


def test_replay_compiles_to_one_graph():
    def call(logits, ids):
        return route(logits, K, block_size=4, replay_ids=ids)[:2]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        logits, ids = logits_of(tokens).requires_grad_(), route(logits_of(tokens, 1), K, block_size=4)[1]
        torch.testing.assert_close(compiled(logits, ids), call(logits, ids))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(3, K), InvalidType, "replay_ids: expected an integer dtype"),
        (torch.zeros(2, K, dtype=torch.int32), InvalidInput, r"replay_ids: expected \[tokens, top_k\] = \[3, 2\]"),
        ([[0, 1]] * 3, InvalidType, "replay_ids: expected a torch.Tensor"),
        (torch.zeros(3, K, dtype=torch.int32, device="meta"), InvalidInput, "replay_ids: expected a tensor on cpu"),
    ],
)
def test_refusals(ids, error, message):
    with pytest.raises(error, match=message):
        route(logits_of(3), K, block_size=4, replay_ids=ids)


# ---- models ----------------------------------------------------------------------------------------------------------


def model_of(kind="qwen"):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": K,
    }  # fmt: skip
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=E))
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=E, moe_intermediate_size=24, head_dim=8)
    return transformers.Qwen3MoeForCausalLM(config)


TOKENS = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))


def recorded(model, *calls):
    with moealign.capture(model) as recording:
        for tokens in calls:
            model(tokens)
    return recording.topk_ids


def other_precision(model):
    """The same model after another computation: some tokens choose other experts."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.02)
    return other


@pytest.mark.parametrize("kind", ["qwen", "mixtral"])
@pytest.mark.parametrize("already", [False, True])
def test_a_model_repeats_the_choices_of_another(kind, already):
    generator = model_of(kind)
    ids = recorded(generator, TOKENS)
    trainer = other_precision(generator)
    before = recorded(trainer, TOKENS)
    assert any(not torch.equal(before[name], ids[name]) for name in ids), "the test needs different choices"
    if already:
        integration.replace_routers(trainer)
    with moealign.capture(trainer) as recording, integration.replay(trainer, ids):
        trainer(TOKENS, labels=TOKENS).loss.backward()
    for name, chosen in recording.topk_ids.items():
        assert torch.equal(chosen, ids[name]), name
    router = next(each for name, each in trainer.named_parameters() if "gate.weight" in name or "router" in name)
    assert router.grad.abs().sum() > 0
    assert all(torch.equal(each, before[name]) for name, each in recorded(trainer, TOKENS).items()), "it is as before"
    assert integration.restore_routers(trainer) == (2 if already else 0)


def test_replay_of_a_model_itself_changes_nothing():
    model = model_of()
    want = model(TOKENS).logits
    with integration.replay(model, recorded(model, TOKENS)):
        torch.testing.assert_close(model(TOKENS).logits, want, rtol=1e-5, atol=1e-5)


def test_several_calls_take_their_tokens_in_order():
    model = model_of()
    calls = (TOKENS, TOKENS[:, :3], TOKENS[:1])
    ids, trainer = recorded(model, *calls), other_precision(model)
    with moealign.capture(trainer) as recording, integration.replay(trainer, ids):
        for tokens in calls:
            trainer(tokens)
    for name, chosen in recording.topk_ids.items():
        assert torch.equal(chosen, ids[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_same_tokens(reentrant):
    model = model_of()
    ids, grads = recorded(model, TOKENS), []
    for checkpointing in (False, True):
        trainer = other_precision(model)
        trainer.train()
        if checkpointing:
            trainer.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with integration.replay(trainer, ids):
            trainer(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grads.append([each.grad for each in trainer.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_replay_says_what_does_not_fit():
    model = model_of()
    ids = recorded(model, TOKENS)
    first = next(iter(ids))

    def refused(error, message, given, tokens=TOKENS):
        with pytest.raises(error, match=message), integration.replay(model, given):
            model(tokens)
        assert integration.restore_routers(model) == 0

    refused(InvalidInput, "expected at most 14 tokens .* got 28", ids, TOKENS.repeat(2, 1))
    refused(InvalidInput, "expected 14 tokens for .* got 7", ids, TOKENS[:1])
    refused(InvalidInput, "expected ids for every router, got none for", {first: ids[first]})
    refused(InvalidInput, "expected a router for model.nowhere, got none beside it", {"model.nowhere": ids[first]})
    refused(InvalidInput, r"expected ids \[tokens, 2\]", {name: each[:, :1] for name, each in ids.items()})
    refused(InvalidType, "expected integers as ids", {name: each.float() for name, each in ids.items()})
