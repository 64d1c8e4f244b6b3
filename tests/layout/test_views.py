"""moealign.views against plain loops."""

from __future__ import annotations

import pytest
import torch

from moealign import InvalidInput, InvalidType, align, align_batched, views

E, K, B = 5, 3, 4


def case(tokens=11, seed=0, **options):
    ids = torch.randint(-1, E + 1, (tokens, K), generator=torch.Generator().manual_seed(seed))
    wanted = {"positions": True, "block_rows": True, "expert_counts": True, "expert_offsets": True}
    return ids, align(ids, block_size=B, num_experts=E, **wanted, **options)


LAYOUTS = {
    "plain": {},
    "padded": {"pad_sorted_ids": True},
    "map": {"expert_map": torch.tensor([2, -1, 0, 1, -1]), "ignore_invalid_experts": True},
    "map, foreign blocks stay": {"expert_map": torch.tensor([2, -1, 0, 1, -1])},
}
layouts = pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
tokens = pytest.mark.parametrize("tokens", [0, 1, 11, 40])


@layouts
@tokens
def test_group_indices(options, tokens):
    _, layout = case(tokens, **options)
    blocks = layout.expert_ids.tolist()
    assert views.group_indices(layout).tolist() == [expert for expert in blocks for _ in range(B)]


@layouts
@tokens
def test_group_row_ends(options, tokens):
    _, layout = case(tokens, **options)
    counts, start, want = layout.expert_counts.tolist(), 0, []
    for count in counts:
        want.append(start + count)
        start = -(-(start + count) // B) * B
    assert views.group_row_ends(layout).tolist() == want
    assert views.group_row_ends(layout).dtype is torch.int32


@layouts
@tokens
@pytest.mark.parametrize("max_rows", [1, 4, 50])
def test_masked(options, tokens, max_rows):
    ids, layout = case(tokens, **options)
    got = views.masked(layout, max_rows)
    n, order, offsets = ids.numel(), layout.sorted_token_ids.tolist(), layout.expert_offsets.tolist()
    positions = [-1] * n
    for expert, count in enumerate(layout.expert_counts.tolist()):
        assert int(got.masked_m[expert]) == min(count, max_rows)
        for slot in range(max_rows):
            route = order[offsets[expert] + slot] if slot < count else n
            assert int(got.rows[expert, slot]) == route
            if route < n:
                positions[route] = expert * max_rows + slot
    assert got.positions.tolist() == positions
    assert {each.dtype for each in got} == {torch.int32}


@layouts
@tokens
def test_tiles(options, tokens):
    ids, layout = case(tokens, **options)
    got, n = views.tiles(layout), ids.numel()
    used = int(layout.num_tokens_post_padded) // B
    assert int(got.num_non_exiting_tiles) == used
    assert int(got.total_num_padded_tokens) == used * B
    order = layout.sorted_token_ids.tolist()
    order += [n] * (len(layout.expert_ids) * B - len(order))
    for tile in range(len(layout.expert_ids)):
        rows = order[tile * B : tile * B + B]
        kept = sum(row < n for row in rows)
        assert int(got.tile_idx_to_mn_limit[tile]) == (tile * B + kept if tile < used else 0)
        assert int(got.tile_idx_to_expert_idx[tile]) == int(layout.expert_ids[tile])
        assert got.permuted_idx_to_expanded_idx[tile * B : tile * B + B].tolist() == [
            row if row < n else -1 for row in rows
        ]
    assert got.expanded_idx_to_permuted_idx.tolist() == layout.positions.tolist()


def test_pack_topk():
    weights = torch.tensor([[0.1, -2.0], [1.0, 0.0]])
    ids = torch.tensor([[3, 0], [-1, 40000]])
    packed = views.pack_topk(weights, ids)
    assert packed.dtype is torch.int32
    for got, weight, expert in zip(packed.flatten().tolist(), weights.flatten(), ids.flatten().tolist(), strict=True):
        assert (got >> 16) & 0xFFFF == expert & 0xFFFF
        bits = torch.tensor([got & 0xFFFF]).to(torch.uint16).view(torch.bfloat16)
        assert bits.item() == weight.to(torch.bfloat16).item()
    assert packed[1, 0] >> 16 == -1


# ---- rows ------------------------------------------------------------------------------------------------------------


def loop_permute(x, order, n, fill=0.0):
    return torch.stack([x[i // K] if i < n else torch.full_like(x[0], fill) for i in order])


@layouts
def test_permute_and_unpermute_are_loops_and_have_gradients(options):
    ids, layout = case(13, **options)
    x = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(13, 2)
    n, order = ids.numel(), layout.sorted_token_ids.tolist()
    rows, gathered = views.permute(x, layout, top_k=K, scales=scales)
    want = loop_permute(x, order, n)
    assert torch.equal(rows, want)
    assert torch.equal(gathered, loop_permute(scales, order, n, 1.0))
    weights = torch.randn(13, K, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(rows.shape, dtype=torch.float64)
    out = views.unpermute(rows * factor, layout.positions, top_k=K, weights=weights)
    plain = []
    for token in range(13):
        total = torch.zeros(6, dtype=torch.float64)
        for j in range(K):
            row = int(layout.positions[token * K + j])
            if row >= 0:
                total = total + weights[token, j] * (want * factor)[row]
        plain.append(total)
    plain = torch.stack(plain)
    torch.testing.assert_close(out, plain)
    grads = [torch.autograd.grad(each.square().sum(), (x, weights)) for each in (out, plain)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_masked_matrices_there_and_back():
    _, layout = case(40)
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    for max_rows in (2, 60):
        matrices = views.masked(layout, max_rows)
        rows = views.permute(x, layout, top_k=K, rows=matrices.rows)
        assert rows.shape == (E, max_rows, 6)
        assert torch.equal(rows, loop_permute(x, matrices.rows.flatten().tolist(), 40 * K).view_as(rows))
        out = views.unpermute(rows.flatten(0, 1), matrices.positions, top_k=K)
        kept = (matrices.positions.view(40, K) >= 0).sum(1, keepdim=True)
        torch.testing.assert_close(out, x * kept)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], kept.expand(40, 6).double())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.uint8, torch.int32])
def test_rows_of_every_dtype_move(dtype):
    _, layout = case(9)
    x = torch.randint(0, 9, (9, 6)).to(dtype)
    rows = views.permute(x, layout, top_k=K)
    assert rows.dtype is dtype
    assert torch.equal(rows.float(), loop_permute(x.float(), layout.sorted_token_ids.tolist(), 27))


def test_dropped_rows_do_not_spread():
    _, layout = case(9)
    rows = torch.full((layout.sorted_token_ids.shape[0], 2), float("nan"))
    kept = layout.sorted_token_ids < 27
    rows[kept] = 1.0
    weights = torch.where(layout.positions.view(9, K) < 0, float("nan"), 1.0)
    out = views.unpermute(rows, layout.positions, top_k=K, weights=weights)
    assert torch.equal(out, (layout.positions.view(9, K) >= 0).sum(1, keepdim=True).float().expand(9, 2))


def test_a_batched_layout_has_views_too():
    layout = align_batched(
        torch.tensor([3, 0, 5]), max_tokens_per_batch=6, block_size=B, positions=True, block_rows=True
    )
    x = torch.arange(18.0).view(18, 1)
    rows = views.permute(x, layout, top_k=1)
    used = int(layout.num_tokens_post_padded)
    assert rows[:used, 0].tolist() == [0, 1, 2, 0, 12, 13, 14, 15, 16, 0, 0, 0]
    assert views.tiles(layout).tile_idx_to_mn_limit[:3].tolist() == [3, 8, 9]


def test_they_compile_to_one_graph():
    def there_and_back(x, ids):
        wanted = {"positions": True, "block_rows": True, "expert_counts": True, "expert_offsets": True}
        layout = align(ids, block_size=B, num_experts=E, **wanted)
        rows = views.permute(x, layout, top_k=K)
        matrices = views.masked(layout, 8)
        more = views.permute(x, layout, top_k=K, rows=matrices.rows).sum()
        limits = views.tiles(layout).tile_idx_to_mn_limit.sum() + views.group_indices(layout).sum()
        return views.unpermute(rows, layout.positions, top_k=K), more, limits + views.group_row_ends(layout).sum()

    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (7, 12):
        ids, _ = case(count, seed=count)
        x = torch.randn(count, 4, requires_grad=True)
        got, want = compiled(x, ids), there_and_back(x, ids)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(each[0].square().sum() + each[1], x)[0] for each in (got, want)]
        torch.testing.assert_close(*grads)


_, LAYOUT = case()
X = torch.zeros(11, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: views.group_indices([1]), InvalidType, "layout: expected a BlockLayout, got list"),
        (
            lambda: views.tiles(align(torch.zeros(1, 1, dtype=torch.int32), block_size=1, num_experts=1)),
            InvalidInput,
            r"expected positions and block_rows, got none; align\(..., positions=True, block_rows=True\)",
        ),
        (lambda: views.masked(LAYOUT, 0), InvalidInput, "max_rows: expected an int of at least 1, got 0"),
        (lambda: views.permute(X, LAYOUT, top_k=2), InvalidInput, "top_k: expected 33 routes as in the layout"),
        (lambda: views.permute(X[0], LAYOUT, top_k=K), InvalidInput, r"x: expected 2 dimensions, got \[4\]"),
        (lambda: views.permute(X, LAYOUT, top_k=K, scales=X[:3]), InvalidInput, "scales: expected 11 rows like x"),
        (lambda: views.unpermute(X.int(), LAYOUT.positions, top_k=K), InvalidType, "rows: expected a floating dtype"),
        (lambda: views.unpermute(X, LAYOUT.positions, top_k=2), InvalidInput, "top_k: expected a divisor of 33"),
        (
            lambda: views.unpermute(X, LAYOUT.positions, top_k=K, weights=X),
            InvalidInput,
            r"weights: expected \[11, 3\]",
        ),
        (lambda: views.pack_topk(X.int(), X), InvalidType, "topk_weights: expected a floating tensor, got torch.int32"),
        (lambda: views.pack_topk(X, X), InvalidType, "topk_ids: expected an integer tensor, got torch.float32"),
        (lambda: views.pack_topk(X, X[:1].int()), InvalidInput, r"topk_ids: expected \[11, 4\], got \[1, 4\]"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
