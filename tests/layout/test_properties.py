"""What a layout promises, one named property each, on drawn cases.

Each property is a function of a case and the outputs, independent of the oracle.  Beside it stands a backend that is
broken in just that way and must fail it: the tests are tested.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moealign import BlockLayout, align, capacity
from moealign.layout import EXTRAS
from moealign.testing import poisoned


@dataclass(frozen=True)
class Case:
    ids: tuple[tuple[int, ...], ...]  # [tokens][top_k]
    experts: int
    block: int

    @property
    def flat(self) -> list[int]:
        return [expert for row in self.ids for expert in row]

    @property
    def tensor(self) -> torch.Tensor:
        top_k = len(self.ids[0]) if self.ids else 1
        return torch.tensor(self.ids, dtype=torch.int64).reshape(len(self.ids), top_k)

    def kept(self) -> list[int]:
        return [i for i, expert in enumerate(self.flat) if 0 <= expert < self.experts]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.one_of(st.integers(1, 12), st.sampled_from([31, 64, 257])))
    top_k = draw(st.integers(1, 4))
    tokens = draw(st.one_of(st.integers(0, 12), st.sampled_from([33, 64, 129])))
    one = st.integers(-1, experts)
    few = st.sampled_from([0, experts - 1])
    far = st.sampled_from([-(2**63), 2**63 - 1, 2**32, -7])
    expert = draw(st.sampled_from([one, one, few, st.one_of(one, far)]))
    row = st.tuples(*[expert] * top_k)
    return Case(tuple(draw(st.lists(row, min_size=tokens, max_size=tokens))), experts, draw(st.integers(1, 20)))


def run(name: str, device: torch.device, case: Case, poison: int = -3) -> BlockLayout:
    sizes = {"block_size": case.block, "num_experts": case.experts}
    ids = case.tensor.to(device)
    out = poisoned(capacity(ids.numel(), **sizes), EXTRAS, device, poison)
    return align(ids, **sizes, **dict.fromkeys(EXTRAS, True), out=out, backend=name)


def blocks(case: Case, layout: BlockLayout) -> list[list[int]]:
    rows = layout.sorted_token_ids.tolist()
    used = layout.num_tokens_post_padded.item()
    return [rows[start : start + case.block] for start in range(0, used, case.block)]


# The properties.  `again` runs the same backend on another case.


def every_kept_route_appears_once(case, layout, again):
    assert sorted(row for row in layout.sorted_token_ids.tolist() if row != len(case.flat)) == case.kept()


def a_block_holds_one_expert(case, layout, again):
    owners = layout.expert_ids.tolist()
    for number, block in enumerate(blocks(case, layout)):
        assert {case.flat[row] for row in block if row < len(case.flat)} == {owners[number]}


def blocks_come_in_ascending_order_of_expert(case, layout, again):
    owners = layout.expert_ids.tolist()[: layout.num_tokens_post_padded.item() // case.block]
    assert owners == sorted(owners)


def padding_trails(case, layout, again):
    for block in blocks(case, layout):
        real = [row < len(case.flat) for row in block]
        assert real == sorted(real, reverse=True)
        assert real[0], "no block is empty"


def routes_ascend_within_an_expert(case, layout, again):
    n = len(case.flat)
    for expert in range(case.experts):
        rows = [row for row in layout.sorted_token_ids.tolist() if row < n and case.flat[row] == expert]
        assert rows == sorted(rows)


def counts_round_up(case, layout, again):
    counts = [case.flat.count(expert) for expert in range(case.experts)]
    assert layout.num_tokens_post_padded.item() == sum(-(-count // case.block) * case.block for count in counts)
    assert len(blocks(case, layout)) == sum(-(-count // case.block) for count in counts)


def the_tail_is_as_promised(case, layout, again):
    used = layout.num_tokens_post_padded.item()
    assert set(layout.sorted_token_ids.tolist()[used:]) <= {len(case.flat)}
    assert set(layout.expert_ids.tolist()[used // case.block :]) <= {-1}
    assert set(layout.block_rows.tolist()[used // case.block :]) <= {0}


def the_poison_does_not_show(case, layout, again):
    other = again(case, 0x5A5A5A5A)
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *EXTRAS):
        assert torch.equal(getattr(layout, name), getattr(other, name)), name


def the_same_input_gives_the_same_bits(case, layout, again):
    for _ in range(2):
        other = again(case, -3)
        for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *EXTRAS):
            assert torch.equal(getattr(layout, name), getattr(other, name)), name


def relabelling_experts_permutes_blocks(case, layout, again):
    last = case.experts - 1
    mirrored = tuple(tuple(last - e if 0 <= e <= last else e for e in row) for row in case.ids)
    other = again(Case(mirrored, case.experts, case.block), -3)

    def runs(c, laid_out):
        grouped: dict[int, list[list[int]]] = {}
        for owner, block in zip(laid_out.expert_ids.tolist(), blocks(c, laid_out), strict=False):
            grouped.setdefault(owner, []).append(block)
        return grouped

    mirrored_runs = runs(Case(mirrored, case.experts, case.block), other)
    assert runs(case, layout) == {last - owner: found for owner, found in mirrored_runs.items()}


def expert_counts_count(case, layout, again):
    assert layout.expert_counts.tolist() == [case.flat.count(expert) for expert in range(case.experts)]


def expert_offsets_point_at_first_rows(case, layout, again):
    offsets, rows = layout.expert_offsets.tolist(), layout.sorted_token_ids.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == layout.num_tokens_post_padded.item()
    for expert, (first, end) in enumerate(itertools.pairwise(offsets)):
        assert {case.flat[row] for row in rows[first:end] if row < len(case.flat)} <= {expert}
        assert (end > first) == (expert in case.flat)


def group_ends_accumulate(case, layout, again):
    ends = layout.group_ends.tolist()
    assert ends == [sum(case.flat.count(e) for e in range(expert + 1)) for expert in range(case.experts)]


def positions_invert(case, layout, again):
    rows = layout.sorted_token_ids.tolist()
    for route, row in enumerate(layout.positions.tolist()):
        assert (row >= 0) == (0 <= case.flat[route] < case.experts)
        assert row < 0 or rows[row] == route


def block_rows_count_the_kept(case, layout, again):
    counted = [sum(row < len(case.flat) for row in block) for block in blocks(case, layout)]
    assert layout.block_rows.tolist()[: len(counted)] == counted


def scatter_idx_marks_the_kept(case, layout, again):
    kept = set(case.kept())
    assert layout.scatter_idx.shape == (len(case.flat), 1)
    assert layout.scatter_idx.flatten().tolist() == [i if i in kept else -1 for i in range(len(case.flat))]


# The broken backends: each spoils a right layout in one way, where the case gives it the chance.


def lose_a_route(case, layout):
    layout.sorted_token_ids[0] = len(case.flat)


def mix_experts(case, layout):
    owners = layout.expert_ids.tolist()
    change = next(i for i in range(1, len(owners)) if owners[i] not in (owners[0], -1))
    rows, other = layout.sorted_token_ids, change * case.block
    rows[[0, other]] = rows[[other, 0]]


def swap_blocks(case, layout):
    size = case.block
    layout.sorted_token_ids[: 2 * size] = layout.sorted_token_ids[: 2 * size].roll(size)
    layout.expert_ids[:2] = layout.expert_ids[:2].flip(0)


def lead_with_padding(case, layout):
    layout.sorted_token_ids[: case.block] = layout.sorted_token_ids[: case.block].flip(0)


def unstable(case, layout):
    layout.sorted_token_ids[[0, 1]] = layout.sorted_token_ids[[1, 0]]


def spare_block(case, layout):
    layout.num_tokens_post_padded.add_(case.block)


def stale_tail(case, layout):
    layout.expert_ids[-1] = 0


def unwritten(case, layout, poison):
    layout.sorted_token_ids[-1] = poison


def by_turns(case, layout, turn=itertools.count()):  # noqa: B008
    """A race: two routes of one expert trade places in every other call."""
    if next(turn) % 2:
        layout.sorted_token_ids[[0, 1]] = layout.sorted_token_ids[[1, 0]]


def by_first_come(case, layout):
    """Right for ascending experts, and in the wrong place for the mirrored case: expert 0 last."""
    layout.expert_ids[0] = case.experts - 1


def off_by_one(name):
    def spoil(case, layout):
        getattr(layout, name)[-1] += 1

    return spoil


def wrong_first(name):
    def spoil(case, layout):
        getattr(layout, name)[0] += 1

    return spoil


# Two experts with one route each and one with three, blocks of two; a tail; one route dropped.
PLAIN = Case(((0, 3), (1, 3), (3, -1)), 5, 2)

PROPERTIES = {
    every_kept_route_appears_once: lose_a_route,
    a_block_holds_one_expert: mix_experts,
    blocks_come_in_ascending_order_of_expert: swap_blocks,
    padding_trails: lead_with_padding,
    routes_ascend_within_an_expert: None,  # on a case of its own below
    counts_round_up: spare_block,
    the_tail_is_as_promised: stale_tail,
    the_poison_does_not_show: unwritten,
    the_same_input_gives_the_same_bits: by_turns,
    relabelling_experts_permutes_blocks: by_first_come,
    expert_counts_count: off_by_one("expert_counts"),
    expert_offsets_point_at_first_rows: off_by_one("expert_offsets"),
    group_ends_accumulate: off_by_one("group_ends"),
    positions_invert: wrong_first("positions"),
    block_rows_count_the_kept: wrong_first("block_rows"),
    scatter_idx_marks_the_kept: wrong_first("scatter_idx"),
}


@pytest.mark.parametrize("property_", PROPERTIES, ids=lambda p: p.__name__)
@given(case=cases())
def test_property(place, property_, case):
    def again(other, poison):
        return run(*place, other, poison)

    property_(case, run(*place, case), again)


@pytest.mark.parametrize("property_", PROPERTIES, ids=lambda p: p.__name__)
def test_a_broken_backend_fails_its_property(property_):
    spoil = PROPERTIES[property_]
    case = PLAIN
    if spoil is None:
        spoil, case = unstable, Case(((3, 3), (3, 4)), 5, 2)
    cpu = torch.device("cpu")

    def broken(other, poison):
        layout = run("reference", cpu, other, poison)
        if spoil is unwritten:
            spoil(other, layout, poison)
        else:
            spoil(other, layout)
        return layout

    def right(other, poison):
        return run("reference", cpu, other, poison)

    property_(case, right(case, -3), right)
    with pytest.raises(AssertionError):
        property_(case, broken(case, -3), broken)


@given(case=cases())
def test_the_same_input_gives_the_same_bits_on_every_backend(place, case):
    ours = run(*place, case)
    reference = run("reference", torch.device("cpu"), case)
    for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *EXTRAS):
        assert torch.equal(getattr(ours, name).cpu(), getattr(reference, name)), name
