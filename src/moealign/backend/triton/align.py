"""The layout in Triton: the launcher of ``align_kernels.py``, which describes the passes and their bytes.

One launch up to `FEW_ROUTES` routes of up to `FEW_BINS` experts, three beyond; batched two.  The sizes of a launch
follow from the problem by the rules below, never from a measurement at run time.  The number of routes is no constant
of a kernel: another number compiles nothing, unless a rule changes.  Nothing waits for the device, so a CUDA graph can
capture a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import BlockLayout, cdiv, power_of_two
from ...problem import AlignProblem
from .launch import on_device

__all__ = ["Launch", "align", "align_batched", "launches", "launches_batched"]

SMALL_ROUTES = 128  # a larger pairwise tile spills registers
SMALL_LENGTH = 65_536  # rows that the kernels for few routes fill
SMALL_BINS = 1_024  # with expert_offsets or group_ends, which cost `align_small` bins times routes
FEW_ROUTES = 2_048  # every program of `align_few` counts all routes
FEW_BINS = 1_024  # and holds all bins in registers
FEW_OWN = 8  # min routes that it places, and blocks that it fills
PAIRWISE = 64  # routes in a pairwise tile of a chunk: a larger one means more work per route and fewer steps
CHUNKS = ((16_384, 64), (65_536, 128), (262_144, 256))  # (max routes, routes per chunk); beyond, MAX_CHUNKS
MAX_CHUNKS = 1_024
MAX_TABLE = 2**24  # chunks times bins
SCAN_TILE = 8_192  # chunks times bins in one step of a scanning program
SCAN_COLUMNS = ((4_096, 8), (2**31, 64))  # (max bins, bins per scanning program)
MAX_SCAN = 4_096  # bins in one step of the last scan
PLACE = 512  # routes per placing program
FILL_TILE = 1_024  # rows that a filling program writes per step

_SIGNED = {
    torch.uint8: torch.int8,
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


class Launch(NamedTuple):
    """The description of one launch.  Tests compile it ahead for GPUs that they do not have."""

    kernel: str
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


def _as_signed(values: Tensor) -> tuple[Tensor, bool]:
    """The same bits as a signed dtype, and whether they were unsigned: Triton does not take every unsigned dtype."""
    signed = _SIGNED.get(values.dtype)
    return (values, False) if signed is None else (values.view(signed), True)


def _walk(ids: Tensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """Ids, whether they are contiguous, and (columns, row stride, column stride) if not."""
    if ids.is_contiguous():
        return ids, True, (1, 0, 0)
    if ids.dim() == 1:
        return ids, False, (ids.shape[0], 0, ids.stride(0))
    if ids.dim() == 2:
        return ids, False, (ids.shape[1], ids.stride(0), ids.stride(1))
    return ids.contiguous(), True, (1, 0, 0)


def _chunk(routes: int, bins: int) -> int:
    """Routes per chunk: a power of two, so that a new number of routes seldom compiles a new kernel."""
    size = next((size for max_routes, size in CHUNKS if routes <= max_routes), PAIRWISE)
    return max(size, power_of_two(cdiv(routes, MAX_CHUNKS)) if routes > CHUNKS[-1][0] else 0, _min_chunk(routes, bins))


def _min_chunk(routes: int, bins: int) -> int:
    """The smallest chunk that keeps the table within MAX_TABLE."""
    return power_of_two(cdiv(routes, max(MAX_TABLE // bins, 1)))


def _fill_shape(block_size: int) -> dict[str, int]:
    rows = min(power_of_two(block_size), 64)
    return {"BLOCKS": FILL_TILE // rows, "ROWS": rows}


def launches(
    problem: AlignProblem,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    out: BlockLayout,
) -> list[Launch]:
    """The launches of :func:`align`, in order.  Allocates scratch: n ranks and a table of chunks times bins."""
    n, bins = problem.routes, problem.num_experts
    length, blocks = out.sorted_token_ids.numel(), out.expert_ids.numel()
    block_size = problem.block_size if n else 1  # without routes it has no effect, and may be any number
    ids, unsigned = _as_signed(topk_ids)
    ids, contiguous, walk = _walk(ids)
    if expert_map is None:
        local, map_unsigned, map_stride = None, False, 0
    else:
        local, map_unsigned = _as_signed(expert_map)
        map_stride = local.stride(0)
    ignore = expert_map is not None and problem.ignore_invalid_experts
    rows = n // problem.row_length if n else 0
    inputs = (ids, local, num_valid_tokens, error_word)
    reading = {"CONTIGUOUS": contiguous, "UNSIGNED": unsigned, "MAP_UNSIGNED": map_unsigned, "IGNORE": ignore}
    extra_bins = out.expert_offsets is not None or out.group_ends is not None

    if n <= SMALL_ROUTES and length <= SMALL_LENGTH and not (extra_bins and bins > SMALL_BINS):
        size = max(power_of_two(n), 16)
        return [
            Launch(
                "align_small",
                1,
                (
                    *inputs,
                    out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.expert_counts,
                    out.expert_offsets, out.group_ends, out.positions, out.block_rows, out.scatter_idx,
                    n, rows, problem.row_length, *walk, map_stride, bins, length, blocks,
                ),
                {"BLOCK_SIZE": block_size, **reading, "SIZE": size, "FILL": 1024, "BINS": 64},
                size // 32 or 1,
            )
        ]  # fmt: skip

    named = expert_map is not None and not ignore
    if n <= FEW_ROUTES and length <= SMALL_LENGTH and bins <= FEW_BINS:
        size, tile = power_of_two(n), max(power_of_two(bins), 32)
        own = max(FEW_OWN, size // 128)
        return [
            Launch(
                "align_few",
                max(cdiv(n, own), cdiv(blocks, FEW_OWN)),
                (
                    *inputs,
                    out.sorted_token_ids, out.expert_ids, out.num_tokens_post_padded, out.expert_counts,
                    out.expert_offsets, out.group_ends, out.positions, out.block_rows, out.scatter_idx,
                    n, rows, problem.row_length, *walk, map_stride, bins, length, blocks,
                ),
                {
                    "BLOCK_SIZE": block_size, **reading, "NAMED": named, "SIZE": size, "BINS": tile,
                    "OWN": own, "BLOCKS": FEW_OWN, "ROWS": min(power_of_two(block_size), 64),
                },
                min(max(size // 128, 4), 16),
            )
        ]  # fmt: skip

    chunk = _chunk(n, bins)
    chunks = max(cdiv(n, chunk), 1)
    scratch = torch.empty(chunks * bins + n + 2 * bins + 2, dtype=torch.int32, device=problem.device)
    table, ranks, totals, offsets, arrived = scratch.split([chunks * bins, n, bins, bins + 1, 1])
    columns = next(columns for max_bins, columns in SCAN_COLUMNS if bins <= max_bins)
    scan_rows = min(max(power_of_two(chunks), 32), SCAN_TILE // columns)
    placing, fill = cdiv(n, PLACE), _fill_shape(block_size)
    return [
        Launch(
            "rank_chunks",
            chunks,
            (*inputs, table, ranks, arrived, n, rows, problem.row_length, *walk, map_stride, bins),
            {**reading, "CHUNK": chunk, "SIZE": PAIRWISE, "FILL": min(power_of_two(bins), 1024)},
            1,
        ),
        Launch(
            "scan_bins",
            cdiv(bins, columns),
            (
                local, error_word,
                table, totals, offsets, arrived,
                out.num_tokens_post_padded, out.expert_counts, out.expert_offsets, out.group_ends,
                chunks, bins, map_stride,
            ),
            {
                "BLOCK_SIZE": block_size, "MAP_UNSIGNED": map_unsigned,
                "ROWS": scan_rows, "COLUMNS": columns, "SCAN": min(max(power_of_two(bins), 32), MAX_SCAN),
            },
            8 if scan_rows * columns > 1024 else 4,
        ),
        Launch(
            "place_routes",
            placing + cdiv(blocks, fill["BLOCKS"]),
            (
                ids, local,
                table, ranks, totals, offsets,
                out.sorted_token_ids, out.expert_ids, out.positions, out.block_rows, out.scatter_idx,
                n, *walk, map_stride, bins, length, blocks, placing,
            ),
            {
                "BLOCK_SIZE": block_size, **reading, "NAMED": named,
                "CHUNK": chunk, "PLACE": PLACE, **fill, "STEPS": bins.bit_length(),
            },
            4,
        ),
    ]  # fmt: skip


def launches_batched(
    problem: AlignProblem, expert_num_tokens: Tensor, error_word: Tensor | None, out: BlockLayout
) -> list[Launch]:
    """The launches of :func:`align_batched`, in order.  Allocates scratch."""
    n, bins, max_tokens = problem.routes, problem.num_experts, problem.row_length
    length, blocks = out.sorted_token_ids.numel(), out.expert_ids.numel()
    block_size = problem.block_size if length else 1
    counts, unsigned = _as_signed(expert_num_tokens)
    scratch = torch.empty(2 * bins + 1, dtype=torch.int32, device=problem.device)
    totals, offsets = scratch.split([bins, bins + 1])
    fill = _fill_shape(block_size)
    filling = cdiv(blocks, fill["BLOCKS"])
    placing = cdiv(n, PLACE) if out.positions is not None else 0
    scan = min(max(power_of_two(bins), 32), MAX_SCAN)
    return [
        Launch(
            "scan_counts",
            1,
            (
                counts, error_word,
                totals, offsets,
                out.num_tokens_post_padded, out.expert_counts, out.expert_offsets, out.group_ends,
                bins, max_tokens, counts.stride(0),
            ),
            {"BLOCK_SIZE": block_size, "UNSIGNED": unsigned, "SCAN": scan},
            8 if scan > 512 else 4,
        ),
        Launch(
            "fill_batches",
            filling + placing,
            (
                totals, offsets,
                out.sorted_token_ids, out.expert_ids, out.positions, out.block_rows,
                n, bins, length, blocks, max_tokens, filling,
            ),
            {"BLOCK_SIZE": block_size, "PLACE": PLACE, **fill, "STEPS": bins.bit_length()},
            4,
        ),
    ]  # fmt: skip


def _run(problem: AlignProblem, launches: list[Launch]) -> None:
    from . import align_kernels  # imports Triton

    with on_device(problem.device):
        for launch in launches:
            if launch.programs:
                kernel = getattr(align_kernels, launch.kernel)
                kernel[(launch.programs,)](*launch.arguments, **launch.constants, num_warps=launch.num_warps)


def align(
    problem: AlignProblem,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    out: BlockLayout,
) -> None:
    """Fill `out`."""
    _run(problem, launches(problem, topk_ids, expert_map, num_valid_tokens, error_word, out))


def align_batched(
    problem: AlignProblem, expert_num_tokens: Tensor, error_word: Tensor | None, out: BlockLayout
) -> None:
    """Fill `out` from the counts of the batches."""
    _run(problem, launches_batched(problem, expert_num_tokens, error_word, out))
