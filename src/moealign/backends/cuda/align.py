"""The launcher of ``align.cu``: which kernel, specialised how, with which grid.  Tuning is data, below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import EXTRAS, BlockLayout, Problem
from .compile import COOPERATIVE, PLAIN, Kernel, kernel

__all__ = ["Plan", "align", "defines_of", "path_of"]

# -------------------------------------------------------------------------------------------------------------- tuning
# Measured on an H200 by benchmarks/align.py, graph replay.

_WARP_ROUTES = 32  #: what one warp ranks by itself
_WARP_THREADS = 128
_WARP_CTAS = 2
_PAIRWISE_CTAS = 4
_PAIRWISE_WORDS = (2, 4, 8)  #: words of 32 routes that the pairwise kernel is compiled for
#: independent: (up to this many routes, threads, words of 32 routes a CTA ranks, vectors of four ids a thread holds)
_INDEPENDENT = ((1024, 256, 1, 1), (2048, 512, 1, 1), (4096, 1024, 2, 1), (8192, 1024, 4, 2), (12000, 1024, 4, 4))
#: grid: (threads, routes a thread, CTAs): the first that takes all routes, with tables that fit shared memory
_GRID = ((512, 1, 64), (512, 2, 64), (1024, 1, 132), (1024, 2, 132), (1024, 4, 132), (512, 8, 132), (256, 8, 132))
_GRID_BATCH = (4, 8, 17)  #: rows of the table that a thread loads at once
_RADIX_THREADS = 1024
_STATIC_SHARED = 2048  #: bytes that kernels may take besides

_TYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    )
}


class Path(NamedTuple):
    """How one problem is launched; everything but the pointers."""

    name: str  # of the kernel in align.cu
    grid: int
    threads: int
    words: int
    steps: int
    shared_bytes: int
    scratch: int  # int32 elements


class Plan(NamedTuple):
    """A path, compiled."""

    problem: Problem  # kept alive, because its id is the key
    kernel: Kernel
    grid: int
    threads: int
    shared_bytes: int
    scratch: int
    mode: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _length(problem: Problem) -> int:
    n, size = problem.routes, problem.block_size
    return min(n * size, n + problem.num_experts * (size - 1))


def _grid_shared_words(experts: int, threads: int, steps: int) -> int:
    pairs, warps = (experts + 1) // 2, threads // 32
    routes = threads * steps
    return max(_segments(experts, threads) * 4 * pairs, warps * (pairs | 1)) + 3 * experts + 2 + routes + routes // 2


def _segments(experts: int, threads: int) -> int:
    return next((s for s in (16, 8, 4, 2) if threads // ((experts + 1) // 2) >= s), 1)


def _independent(problem: Problem, shared_most: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for most, threads, words, steps in _INDEPENDENT:
        if n <= most:
            shared = 4 * (experts * (2 + words) + 1)
            if shared > shared_most:
                words = 1
                shared = 4 * (experts * 3 + 1)
            if shared > shared_most:
                return None
            if experts > threads:
                threads, steps = (512 if experts <= 512 else 1024), 1
            ctas = max(_cdiv(n, 32 * words), 32)
            return Path("independent", ctas, threads, words, steps, shared, 0)
    return None


def _grid(problem: Problem, multiprocessors: int, shared_most: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for threads, steps, most in _GRID:
        grid = _cdiv(n, threads * steps)
        shared = 4 * _grid_shared_words(experts, threads, steps)
        if grid <= min(most, multiprocessors) and shared <= shared_most:
            rows = _cdiv(grid, _segments(experts, threads))
            batch = next((b for b in _GRID_BATCH if rows <= b), _GRID_BATCH[-1])
            return Path("grid", grid, threads, batch, steps, shared, grid * ((experts + 1) // 2))
    return None


def _radix(problem: Problem, multiprocessors: int) -> Path:
    n, experts = problem.routes, problem.num_experts
    grid = max(1, min(_cdiv(n, _RADIX_THREADS), multiprocessors))
    passes = _cdiv(experts.bit_length(), 8)
    scratch = passes * grid * 256 + (4 if passes > 1 else 2) * n + 3 * experts + 2 * grid
    return Path("radix", grid, _RADIX_THREADS, 1, 1, 0, scratch)


def path_of(problem: Problem, multiprocessors: int, shared_most: int) -> Path:
    """The path that takes `problem` on a device with so many multiprocessors and bytes of shared memory a CTA."""
    n, length = problem.routes, _length(problem)
    shared_most -= _STATIC_SHARED
    if n <= _WARP_ROUTES:
        ctas = max(_WARP_CTAS, min(_cdiv(length, 16 * _WARP_THREADS), multiprocessors))
        return Path("warp", ctas, _WARP_THREADS, 1, 1, 0, 0)
    for words in _PAIRWISE_WORDS:
        if n <= 32 * words:
            threads = max(32 * words, 64)
            ctas = max(_PAIRWISE_CTAS, min(_cdiv(length, 16 * threads), multiprocessors))
            return Path("pairwise", ctas, threads, words, 1, 0, 0)
    return (
        _independent(problem, shared_most)
        or _grid(problem, multiprocessors, shared_most)
        or _radix(problem, multiprocessors)
    )


def defines_of(
    problem: Problem, path: Path, *, strided: bool = False, vector_in: bool = True, vector_out: bool = True
) -> tuple[tuple[str, int], ...]:
    """The macros of one specialisation.  The number of routes is not among them."""
    return (
        ("EXPERTS", problem.num_experts),
        ("BLOCK", problem.block_size),
        ("ID_TYPE", _TYPES[problem.dtype]),
        ("MAP", 0 if problem.map_dtype is None else 2 if problem.ignore_invalid_experts else 1),
        ("MAP_TYPE", _TYPES[problem.map_dtype] if problem.map_dtype is not None else 2),
        ("NVALID", int(problem.has_num_valid_tokens)),
        ("ERROR", int(problem.has_error_word)),
        ("EXTRAS", sum(1 << bit for bit, name in enumerate(EXTRAS) if name in problem.extras)),
        ("STRIDED", int(strided)),
        ("VECTOR_IN", int(vector_in)),
        ("VECTOR_OUT", int(vector_out)),
        ("THREADS", path.threads),
        ("WORDS", path.words),
        ("STEPS", path.steps),
    )


# ------------------------------------------------------------------------------------------------------------ launching

_MOST_PLANS = 4096
_plans: dict[tuple[int, bool, bool, bool], Plan] = {}


def _plan(key: tuple[int, bool, bool, bool], problem: Problem, index: int) -> Plan:
    _, strided, vector_in, vector_out = key
    facts = torch.cuda.get_device_properties(index)
    path = path_of(problem, facts.multi_processor_count, facts.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    # Only `independent` reads vectors, and where routes are few nobody gains by vector stores of its own kernel.
    vector_in = vector_in and path.name == "independent"
    defines = defines_of(problem, path, strided=strided, vector_in=vector_in, vector_out=vector_out)
    compiled = kernel("align.cu", path.name, defines, index)
    mode = COOPERATIVE if path.name in ("grid", "radix") else PLAIN
    plan = Plan(problem, compiled, path.grid, path.threads, path.shared_bytes, path.scratch, mode)
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def align(
    problem: Problem,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    error_word: Tensor | None,
    out: BlockLayout,
) -> None:
    """Fill `out`, on the current stream, in one launch.  Ids of more than two axes are copied unless they collapse."""
    s0 = s1 = 0
    strided = not topk_ids.is_contiguous()
    if strided:
        if topk_ids.dim() > 2:
            try:
                topk_ids = topk_ids.view(-1, topk_ids.shape[-1])
            except RuntimeError:
                topk_ids = topk_ids.contiguous()
                strided = False
        if strided:
            s0, s1 = topk_ids.stride() if topk_ids.dim() == 2 else (topk_ids.stride(0), 0)
    ids, rows = topk_ids.data_ptr(), out.sorted_token_ids
    rows_at = rows.data_ptr()
    key = (id(problem), strided, not (ids & 15), not (rows_at & 15))
    plan = _plans.get(key)
    if plan is None:
        plan = _plan(key, problem, topk_ids.device.index)
    extras: Any = (0, 0, 0, 0, 0, 0)
    if problem.extras:
        extras = [
            0 if each is None else each.data_ptr()
            for each in (
                out.expert_counts,
                out.expert_offsets,
                out.group_ends,
                out.positions,
                out.block_rows,
                out.scatter_idx,
            )
        ]
    map_at, map_stride = (0, 0) if expert_map is None else (expert_map.data_ptr(), expert_map.stride(0))
    scratch = None
    if plan.scratch:
        # Freed when this returns: the allocator hands it on to later work of the same stream only.
        scratch = torch.empty(plan.scratch, dtype=torch.int32, device=topk_ids.device)
    plan.kernel.launch(
        plan.grid,
        plan.threads,
        plan.shared_bytes,
        # inputs
        ids,
        map_at,
        0 if num_valid_tokens is None else num_valid_tokens.data_ptr(),
        0 if error_word is None else error_word.data_ptr(),
        # outputs
        rows_at,
        out.expert_ids.data_ptr(),
        out.num_tokens_post_padded.data_ptr(),
        *extras,
        # sizes and strides
        problem.routes,
        problem.top_k,
        rows.numel(),
        s0,
        s1,
        map_stride,
        0 if scratch is None else scratch.data_ptr(),
        mode=plan.mode,
    )


def specialisations() -> Iterator[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """(source, name, macros) of every path as models use it, and of every option, to be compiled without a GPU."""

    def one(routes: int, experts: int, block_size: int, **facts: Any) -> tuple[str, str, tuple[tuple[str, int], ...]]:
        layout = {name: facts.pop(name) for name in ("strided", "vector_in", "vector_out") if name in facts}
        device, dtype = torch.device("cuda"), facts.pop("dtype", torch.int32)
        problem = Problem("align", device, dtype, routes, 8, experts, block_size)._replace(**facts)
        path = path_of(problem, 108, 99 * 1024)  # the least of what sm_80 to sm_120 have
        return "align.cu", path.name, defines_of(problem, path, **layout)

    sizes = (8, 64, 128, 256, 1024, 8192, 16384, 65536, 131072, 524288, 2**21)
    for routes in sizes:
        yield one(routes, 256, 16 if routes <= 1024 else 128)
        yield one(routes, 256, 128, extras=EXTRAS, has_num_valid_tokens=True, has_error_word=True)
    for routes in (8, 100, 2000, 40000):
        yield one(routes, 512, 16, map_dtype=torch.int32, ignore_invalid_experts=True, extras=EXTRAS)
        yield one(routes, 8, 64, map_dtype=torch.int64, has_error_word=True)
        yield one(routes, 160, 48, dtype=torch.int64, strided=True, vector_in=False)
        yield one(routes, 257, 7, dtype=torch.uint8, vector_in=False, vector_out=False)
        yield one(routes, 65_536, 16, dtype=torch.uint16, extras=EXTRAS)
