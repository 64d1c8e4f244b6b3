"""The Triton backend without a GPU: interpreted on the CPU, and compiled ahead for other machines."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import WORKERS, assert_passes, compile_ahead, cut, kind_of, signature_of, specialisation

from moealign.layout import EXTRAS, BlockLayout, capacity, capacity_batched
from moealign.problem import AlignProblem
from moealign.testing import poisoned

pytest.importorskip("triton")
backend = importlib.import_module("moealign.backend.triton.align")
launching = importlib.import_module("moealign.backend.triton.launch")


def test_interpreted_it_equals_the_oracle():
    assert_passes(WORKERS / "triton_interpret.py", interpreted=True)


@pytest.mark.targets
def test_compiles_ahead_within_every_targets_shared_memory():
    assert_passes(__file__, interpreted=False)


def test_says_why_it_is_unavailable(monkeypatch):
    launching.unavailable.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "TRITON_INTERPRET=1" in (launching.unavailable() or "")
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    launching.unavailable.cache_clear()
    assert "pip install" in (launching.unavailable() or "")
    monkeypatch.undo()
    launching.unavailable.cache_clear()


@pytest.mark.parametrize("routes", [0, 1, 128, 129, 2_048, 2_049, 524_288])
def test_launches_few_kernels(routes):
    assert len(plan(routes)) == (1 if routes <= 2_048 else 3)


def test_another_number_of_routes_compiles_nothing_new():
    """Constants and the kinds of the arguments decide what is compiled; they are the same over a range of sizes."""
    few = ((65, 128), (129, 256), (257, 512), (513, 1_024), (1_025, 2_048), (2_049, 16_384))
    for low, high in (*few, (16_385, 65_536), (65_537, 262_144), (262_145, 524_288)):
        middle = (low + high) // 2
        # The last scan's tile follows the number of chunks, in powers of two.
        kinds = {
            repr([(one.kernel, {k: v for k, v in one.constants.items() if k != "ROWS"}) for one in plan(n)])
            for n in (low, middle, high)
        }
        assert len(kinds) == 1, (low, high)


def test_alignments_of_the_layout_compile_nothing():
    from moealign.backend.triton import align_kernels as kernels

    for low, high, mapped in ((2, 16, False), (129, 160, False), (129, 160, True), (4_096, 4_120, True)):
        keys, tiles = set(), set()
        for n in range(low, high):
            sizes = capacity(n, block_size=16, num_experts=60)
            extras = [name for name in EXTRAS if name != "scatter_idx"]
            names = ["sorted_token_ids", "expert_ids", "num_tokens_post_padded", *extras]
            for shift in range(4):
                out = BlockLayout(
                    **dict(zip(names, cut(*(getattr(sizes, name) for name in names), shift=shift), strict=True))
                )
                ids, expert_map, words = cut(n, 60, 2, shift=shift)
                problem = AlignProblem("align", ids.device, ids.dtype, n, 1, 60, 16, torch.int32 if mapped else None)
                for one in backend.launches(problem, ids, expert_map if mapped else None, words[:1], words[1:], out):
                    keys.add(specialisation(getattr(kernels, one.kernel), one))
                    tiles.add((one.kernel, *one.constants.items(), one.num_warps))
        assert len(keys) == len(tiles), (low, high)


def test_outputs_for_engines_are_allocated_separately():
    """An engine's kernels are compiled for the alignment that they see; an allocation of its own is always aligned."""
    from moealign.integrations import vllm_ops

    for tokens in (1, 16, 17, 21):
        ids = torch.empty(tokens, 8, dtype=torch.int64, device="meta")
        for padded in (False, True):
            sizes = capacity(tokens * 8, block_size=16, num_experts=128, pad_sorted_ids=padded)
            layout = vllm_ops.separate_outputs(ids, 16, 128, padded, True)
            assert [each.numel() for each in (*layout, layout.scatter_idx)] == [*sizes[:3], sizes.scatter_idx]
            assert len({each.untyped_storage()._cdata for each in (*layout, layout.scatter_idx)}) == 4
            assert vllm_ops.separate_outputs(ids, 16, 128, padded, False).scatter_idx is None
    for wrong in ((0, 128), (16, 0), ("16", 128), (16, True), (2**31, 128)):
        assert vllm_ops.separate_outputs(ids, *wrong, False, False) is None


def test_the_table_stays_small():
    for routes in (2_049, 8_192, 262_144, 524_288, 1 << 22):
        for bins in (1, 256, 65_536, 1 << 20):
            size = backend._chunk(routes, bins)
            chunks = -(-routes // size)
            assert size % backend.PAIRWISE == 0
            assert chunks <= backend.MAX_CHUNKS
            assert chunks * bins <= max(backend.MAX_TABLE, bins)


def plan(routes, experts=256, block_size=128, dtype=torch.int32, extras=(), mapped=False, ignore=False, rich=False):
    """The launches of one call.  Nothing runs; with `rich`, strided ids, an error word and a valid count."""
    top_k = 4 if rich else 1
    ids = torch.empty(top_k, routes // top_k, dtype=dtype).T if rich else torch.empty(routes, dtype=dtype)
    expert_map = torch.empty(experts, dtype=torch.int32) if mapped else None
    word = torch.empty(1, dtype=torch.int32) if rich else None
    sizes = capacity(ids.numel(), block_size=block_size, num_experts=experts)
    out = poisoned(sizes, extras, "cpu", 0)
    map_dtype = torch.int32 if mapped else None
    problem = AlignProblem(
        "align", ids.device, dtype, ids.numel(), top_k, experts, block_size, map_dtype, ignore, rich, rich, extras
    )
    return backend.launches(problem, ids, expert_map, word, word, out)


def plan_batched(batches, max_tokens, block_size, dtype=torch.int32, extras=()):
    counts = torch.empty(batches, dtype=dtype)
    problem = AlignProblem(
        "align_batched", counts.device, dtype, batches * max_tokens, max_tokens, batches, block_size, extras=extras
    )
    out = poisoned(capacity_batched(max_tokens, block_size=block_size, num_batches=batches), extras, "cpu", 0)
    return backend.launches_batched(problem, counts, torch.empty(1, dtype=torch.int32), out)


def every_configuration():
    """Every set of tunables that the rules choose, each with the plain and the richest arguments."""
    planned = []
    for routes in (8, 64, 100):
        planned += plan(routes, block_size=16)
        planned += plan(routes, extras=EXTRAS, mapped=True, ignore=True, rich=True, dtype=torch.int64)
        planned += plan(routes, extras=EXTRAS[:-1], mapped=True, rich=True)
    for routes in (256, 320, 1_024, 2_048):
        planned += plan(routes, experts=512 if routes == 320 else 256, block_size=16)
        planned += plan(routes, extras=EXTRAS, mapped=True, ignore=True, rich=True, dtype=torch.int64)
        planned += plan(routes, experts=1_024, block_size=48, extras=EXTRAS[:-1], mapped=True, rich=True)
    for routes in (4_096, 32_768, 131_072, 524_288):
        planned += plan(routes)
    planned += plan(16_384, experts=8)
    planned += plan(4_096, experts=65_536, block_size=16, extras=EXTRAS, mapped=True, rich=True)
    planned += plan(524_288, experts=2_048, block_size=7, extras=EXTRAS, mapped=True, ignore=True, dtype=torch.uint16)
    planned += plan(4_096, block_size=1, dtype=torch.uint64, rich=True)
    planned += plan_batched(8, 128, 16) + plan_batched(256, 1_024, 128, torch.int64, EXTRAS[:-1])
    planned += plan_batched(5_000, 16, 1, torch.uint8)
    seen = {}
    for one in planned:
        kinds = tuple(kind_of(argument) for argument in one.arguments)
        seen[one.kernel, kinds, tuple(one.constants.items()), one.num_warps] = one
    return list(seen.values())


def compile_all():
    """Compile every configuration for every target."""
    from moealign.backend.triton import align_kernels as kernels

    for one in every_configuration():
        function = getattr(kernels, one.kernel)
        call = signature_of(function, one.arguments, one.constants)
        for _ in compile_ahead(function, *call, num_warps=one.num_warps):
            pass


if __name__ == "__main__":
    compile_all()
