"""moealign.balance against the formulas of the papers, written as loops."""

from __future__ import annotations

import math

import pytest
import torch

from moealign import InvalidInput, InvalidType, route
from moealign.balance import sequence_loss, switch_loss, update_correction_bias_, z_loss

E, K = 6, 2


def logits_of(*shape, seed=0):
    return torch.randn(*shape, E, generator=torch.Generator().manual_seed(seed))


def test_switch_loss_is_the_papers():
    logits = logits_of(40).requires_grad_()
    _, ids, layout, mean = route(logits, K, block_size=4, expert_counts=True, mean_probability=True)
    got = switch_loss(mean, layout.expert_counts)
    probabilities = logits.detach().double().softmax(-1)
    want = 0.0
    for expert in range(E):
        share = sum(int(each == expert) for each in ids.flatten().tolist()) / ids.numel()
        want += E * share * float(probabilities[:, expert].mean())
    assert math.isclose(got.item(), want, rel_tol=1e-5)
    got.backward()
    assert logits.grad.abs().sum() > 0


def test_switch_loss_of_transformers_is_top_k_times_ours():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = logits_of(33, seed=1)
    _, _, layout, mean = route(logits, K, block_size=4, expert_counts=True, mean_probability=True)
    theirs = mixtral.load_balancing_loss_func((logits,), E, K)
    assert math.isclose(theirs.item(), K * switch_loss(mean, layout.expert_counts).item(), rel_tol=1e-5)


def test_a_uniform_load_costs_one_and_none_costs_nothing():
    uniform = torch.full((E,), 1 / E)
    assert math.isclose(switch_loss(uniform, torch.full((E,), 7)).item(), 1, rel_tol=1e-6)
    assert switch_loss(uniform, torch.zeros(E, dtype=torch.int32)).item() == 0


def loop_sequence_loss(logits, ids, scoring, valid):
    losses = []
    for sequence in range(logits.shape[0]):
        tokens = [t for t in range(logits.shape[1]) if valid[sequence, t]]
        if not tokens:
            continue
        loss = 0.0
        for expert in range(E):
            hits = sum(int((ids[sequence, t] == expert).sum()) for t in tokens)
            frequency = E / (ids.shape[2] * len(tokens)) * hits
            probability = 0.0
            for t in tokens:
                row = logits[sequence, t].double()
                scores = {
                    "sigmoid": torch.sigmoid,
                    "softmax": lambda row: row.softmax(-1),
                    "sqrtsoftplus": lambda row: row.exp().log1p().sqrt(),
                }[scoring](row)
                probability += scores[expert] / scores.sum() / len(tokens)
            loss = loss + frequency * probability
        losses.append(loss)
    return sum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("padded", [False, True])
def test_sequence_loss_is_the_papers(scoring, padded):
    logits = logits_of(4, 9).double().requires_grad_()
    ids = logits.detach().topk(K, -1).indices
    ids[1, 2, 0] = -1
    valid = torch.ones(4, 9, dtype=torch.bool)
    if padded:
        valid[0, 5:], valid[2] = False, False
    got = sequence_loss(logits, ids, scoring=scoring, valid=valid if padded else None)
    want = loop_sequence_loss(logits, ids, scoring, valid)
    assert math.isclose(got.item(), want.item(), rel_tol=1e-5)
    grads = [torch.autograd.grad(each, logits)[0] for each in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_z_loss_is_the_papers(shape):
    logits = logits_of(*shape).requires_grad_()
    rows = logits.detach().double().view(-1, E)
    want = [math.log(sum(math.exp(x) for x in row.tolist())) ** 2 for row in rows]
    assert math.isclose(z_loss(logits).item(), sum(want) / len(want), rel_tol=1e-5)
    valid = torch.arange(12).view(shape) < 5
    got = z_loss(logits, valid=valid)
    assert math.isclose(got.item(), sum(want[:5]) / 5, rel_tol=1e-5)
    got.backward()
    assert not logits.grad.view(-1, E)[5:].any()
    assert z_loss(logits[:0]).item() == 0


def test_the_bias_moves_towards_a_uniform_load():
    bias = torch.zeros(E)
    counts = torch.tensor([3, 3, 3, 0, 5, 4], dtype=torch.int32)  # the mean is 3
    assert update_correction_bias_(bias, counts, 0.25) is bias
    assert bias.tolist() == [0, 0, 0, 0.25, -0.25, -0.25]


def test_the_bias_balances_a_skewed_router():
    logits = logits_of(512) + torch.linspace(0, 3, E)
    bias = torch.zeros(E)

    def load():
        layout = route(logits, K, block_size=4, scoring="sigmoid", correction_bias=bias, expert_counts=True)[2]
        return layout.expert_counts

    before = load()
    for _ in range(300):
        update_correction_bias_(bias, load(), 0.002)
    after = load()
    assert before.max() > 2 * before.float().mean()
    assert after.max() < 1.2 * after.float().mean()


COUNTS = torch.ones(E, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: switch_loss([0.5], COUNTS), InvalidType, "mean_probability: expected a torch.Tensor, got list"),
        (lambda: switch_loss(COUNTS, COUNTS), InvalidType, "mean_probability: expected a floating dtype"),
        (
            lambda: switch_loss(torch.ones(2, E), COUNTS),
            InvalidInput,
            r"mean_probability: expected \[E\], got \[2, 6\]",
        ),
        (lambda: switch_loss(torch.ones(E), torch.ones(E)), InvalidType, "expert_counts: expected an integer dtype"),
        (lambda: switch_loss(torch.ones(E), COUNTS[:2]), InvalidInput, r"expert_counts: expected \[6\], got \[2\]"),
        (lambda: sequence_loss(logits_of(3), COUNTS), InvalidInput, r"router_logits: expected \[S, L, E\]"),
        (lambda: sequence_loss(logits_of(2, 3), COUNTS), InvalidInput, r"topk_ids: expected \[2, 3, k\], got \[6\]"),
        (
            lambda: sequence_loss(logits_of(1, 3), COUNTS.view(1, 3, 2), scoring="relu"),
            InvalidInput,
            "scoring: expected one of softmax, sigmoid, sqrtsoftplus, got 'relu'",
        ),
        (lambda: z_loss(logits_of(3), valid=COUNTS), InvalidType, "valid: expected a bool tensor, got torch.int32"),
        (lambda: z_loss(logits_of(3), valid=COUNTS > 0), InvalidInput, r"valid: expected \[3\], got \[6\]"),
        (lambda: update_correction_bias_(torch.ones(E), COUNTS, -1.0), InvalidInput, "rate: expected a finite number"),
        (lambda: update_correction_bias_(torch.ones(E), COUNTS, "x"), InvalidType, "rate: expected a float, got str"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_they_compile_to_one_graph():
    def losses(logits):
        weights, ids, layout, mean = route(logits, K, block_size=4, expert_counts=True, mean_probability=True)
        rows = sequence_loss(logits.view(2, -1, E), ids.view(2, -1, K), scoring="softmax")
        return switch_loss(mean, layout.expert_counts) + z_loss(logits) + rows + weights.sum()

    logits = logits_of(8).requires_grad_()
    want = torch.autograd.grad(losses(logits), logits)[0]
    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(logits), logits)[0], want)
