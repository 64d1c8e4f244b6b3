"""The layout on NVIDIA GPUs: which kernel, specialised how, with which grid.  Tuning is data, below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import EXTRAS, BlockLayout, capacity, cdiv
from ...problem import AlignProblem
from .compile import COOPERATIVE, OVERLAP, PLAIN, Launch, green_multiprocessors, kernel

__all__ = ["Alignment", "Path", "defines_of", "path_of", "pointers"]

# -------------------------------------------------------------------------------------------------------------- tuning
# Measured on an H200 by benchmarks/align.py, graph replay.

_WARP_ROUTES = 32  #: what one warp ranks by itself
_WARP_THREADS = 128
_WARP_CTAS = 2
_PAIRWISE_CTAS = (4, 8)  #: without and with the extras that have an element for each expert
_PAIRWISE_WORDS = (2, 4, 8)  #: words of 32 routes that the pairwise kernel is compiled for
#: independent: (up to this many routes, threads, words of 32 routes that a CTA ranks, CTAs of a cluster)
_CLUSTERS = (
    (512, 256, 1, 1),
    (1024, 512, 1, 1),
    (2048, 512, 1, 1),
    (4096, 512, 4, 1),
    (8192, 512, 4, 8),
    (16384, 512, 8, 8),
    (32768, 512, 16, 8),
)
_NO_CLUSTERS = ((512, 256, 1, 1), (1024, 512, 1, 1), (2048, 512, 1, 1), (4096, 512, 4, 1), (12000, 1024, 4, 1))
_STEPS_OF_ONE = 4  #: up to this many ids a thread are read one by one: less code than vectors
_INDEPENDENT_CTAS = 64  #: at least, where CTAs stand alone: they share the filling
#: grid: (threads, routes a thread, CTAs at most); the first that takes all routes and whose tables fit shared memory
_GRID = (
    (512, 1, 64),
    (512, 2, 64),
    (512, 2, 128),
    (512, 4, 128),
    (1024, 4, 128),
    (512, 8, 128),
    (256, 8, 128),
)
#: rows of the table that a thread reads, 16 at a time; the grid is rounded up to fit
_GRID_ROWS = (1, 2, 4, 8, 12, 16, 32, 48, 64, 80, 96, 112, 128)
_RADIX_THREADS = 1024
_RADIX_EXPERTS = 4096  #: of a CTA, where routes are few
_COOPERATIVE = ("grid", "radix")  #: paths whose CTAs wait for each other
_PER_EXPERT = {"expert_counts", "expert_offsets", "group_ends"}
_STATIC_SHARED = 2048  #: bytes that kernels may take besides

_TYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    )
}


class Scratch(NamedTuple):
    """int32 elements of device memory, in parts that no number of routes changes: align.cu is compiled with them."""

    each_cta: int = 0
    each_route: int = 0
    besides: int = 0

    def of(self, grid: int, routes: int) -> int:
        return self.each_cta * grid + self.each_route * routes + self.besides


class Path(NamedTuple):
    """How one problem is launched; everything but the pointers."""

    name: str  # of the kernel in align.cu
    grid: int
    threads: int
    words: int
    steps: int
    shared_bytes: int
    scratch: Scratch = Scratch()
    cluster: int = 1  # CTAs
    compact: bool = False


class Compiled(NamedTuple):
    """A path, compiled and ready to launch."""

    launch: Launch
    scratch: int  # int32 elements; 0 if and only if CTAs do not wait for each other
    short: bool  # three outputs from contiguous ids and no options: a kernel with few parameters
    cluster: int  # CTAs


def _cluster_sizes(major: int) -> tuple[int, ...]:
    """CTAs that a cluster may have at most, by the major compute capability; then what else to try."""
    return (1,) if major < 9 else (8, 1) if major > 10 else (16, 8, 1)


def _grid_shared_words(experts: int, threads: int, steps: int) -> int:
    pairs, warps = (experts + 1) // 2, threads // 32
    routes = threads * steps
    return max(_segments(experts, threads) * 4 * pairs, warps * (pairs | 1)) + 3 * experts + 2 + routes + routes // 2


def _segments(experts: int, threads: int) -> int:
    return next((s for s in (16, 8, 4, 2) if threads // ((experts + 1) // 2) >= s), 1)


def _independent(problem: AlignProblem, max_shared: int, max_cluster: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for most, threads, wanted, cluster in (*_CLUSTERS, *_NO_CLUSTERS) if max_cluster > 1 else _NO_CLUSTERS:
        if experts > threads:
            threads = 512 if experts <= 512 else 1024
        if n > most or cluster > max_cluster or (cluster > 1 and experts > 2 * threads):
            continue
        for words in (wanted, 4, 2, 1):
            shared = _independent_shared_bytes(experts, threads, words, cluster)
            if words <= wanted and shared <= max_shared:
                chunk = 32 * words
                steps = _steps(cdiv(most, cluster * chunk) * chunk, threads)
                ctas = cluster * cdiv(n, cluster * chunk)
                if cluster == 1:
                    ctas = max(ctas, _INDEPENDENT_CTAS)
                return Path("independent", ctas, threads, words, steps, shared, cluster=cluster)
    most, threads, words, _ = _NO_CLUSTERS[-1]
    ctas = max(cdiv(n, 32 * words), _INDEPENDENT_CTAS)
    shared = 4 * (_span(experts, threads) + 1 + cdiv(experts, _INDEPENDENT_CTAS))
    if n > most or shared > max_shared:
        return None
    return Path("independent", ctas, threads, words, _steps(most, threads), cdiv(shared, 16) * 16, compact=True)


def _span(experts: int, threads: int) -> int:
    """Words of a table of experts and one more, laid out so that threads with several each meet in no bank."""
    each = cdiv(experts, threads)
    return experts + (experts // each if each > 2 and each % 2 == 0 else 0) + 1


def _steps(routes: int, threads: int) -> int:
    """Routes a thread: few, or fours of them, which are read as vectors."""
    steps = cdiv(routes, threads)
    return steps if steps <= 2 else cdiv(steps, 4) * 4


def _independent_shared_bytes(experts: int, threads: int, words: int, cluster: int) -> int:
    span = _span(experts, threads)
    alone = cdiv(span, 2) * 2 + (0 if words == 1 else cdiv(words, 4) * span) + span
    return cdiv(alone + (0 if cluster == 1 else cluster * cdiv(experts, 2) + 2 * experts), 4) * 16


def _grid(problem: AlignProblem, multiprocessors: int, max_shared: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for threads, steps, most in _GRID:
        segments = _segments(experts, threads)
        need = cdiv(cdiv(n, threads * steps), segments)
        rows = next((each for each in _GRID_ROWS if each >= need), None)
        shared = 4 * _grid_shared_words(experts, threads, steps)
        if rows and rows * segments <= min(most, multiprocessors) and shared <= max_shared:
            return Path("grid", rows * segments, threads, rows, steps, shared, Scratch(each_cta=(experts + 1) // 2))
    return None


def _radix(problem: AlignProblem, multiprocessors: int) -> Path:
    n, experts = problem.routes, problem.num_experts
    grid = max(1, min(max(cdiv(n, _RADIX_THREADS), cdiv(experts, _RADIX_EXPERTS)), multiprocessors))
    passes = cdiv(experts.bit_length(), 8)
    scratch = Scratch(passes * 256 + 2, 4 if passes > 1 else 2, 3 * experts)
    return Path("radix", grid, _RADIX_THREADS, 1, 1, 0, scratch)


def path_of(problem: AlignProblem, multiprocessors: int, max_shared: int, max_cluster: int) -> Path:
    """The path of `problem` on a device with so many multiprocessors, bytes of shared memory and CTAs a cluster."""
    n = problem.routes
    length = capacity(n, block_size=problem.block_size, num_experts=problem.num_experts).sorted_token_ids
    max_shared -= _STATIC_SHARED
    if n <= _WARP_ROUTES:
        ctas = max(_WARP_CTAS, min(cdiv(length, 16 * _WARP_THREADS), multiprocessors))
        return Path("warp", ctas, _WARP_THREADS, 1, 1, 0)
    for words in _PAIRWISE_WORDS:
        if n <= 32 * words:
            threads = max(32 * words, 64)
            most = _PAIRWISE_CTAS[not _PER_EXPERT.isdisjoint(problem.extras)]
            ctas = max(most, min(cdiv(length, 16 * threads), multiprocessors))
            return Path("pairwise", ctas, threads, words, 1, 0)
    return (
        _independent(problem, max_shared, max_cluster)
        or _grid(problem, multiprocessors, max_shared)
        or _radix(problem, multiprocessors)
    )


def _reads_vectors(path: Path) -> bool:
    return path.name == "independent" and path.steps > _STEPS_OF_ONE


def defines_of(
    problem: AlignProblem, path: Path, *, strided: bool = False, vector_in: bool = True, vector_out: bool = True
) -> tuple[tuple[str, int], ...]:
    """The macros of one specialisation.  The number of routes is not among them, only whether there are any."""
    return (
        ("EXPERTS", problem.num_experts),
        ("BLOCK", problem.block_size if problem.routes else 1),  # without routes it may exceed 32 bits
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
        ("CLUSTER", path.cluster),
        ("COMPACT", int(path.compact)),
        # What the launch brings: align.cu asserts that it is enough.
        ("SHARED_BYTES", path.shared_bytes),
        ("SCRATCH_EACH_CTA", path.scratch.each_cta),
        ("SCRATCH_EACH_ROUTE", path.scratch.each_route),
        ("SCRATCH_BESIDES", path.scratch.besides),
        ("LEAST_CTAS", _INDEPENDENT_CTAS),
        ("GRID_CTAS", path.grid if path.name == "grid" else 0),
    )


# ------------------------------------------------------------------------------------------------------------ launching

#: Whether ids are strided, whether ids and rows are aligned to 16 bytes, and the multiprocessors of the green context
#: that the launch is for, 0 for the whole device.
_Key = tuple[bool, bool, bool, int]
_MAX_GREEN = 64  # launches kept for parts of a device


class Alignment:
    """One prepared call.  With `overlap` the launch begins before the kernel ahead of it ends, and waits on the device.

    Holds a launch for each way in which ids and outputs may lie in memory.
    """

    def __init__(self, problem: AlignProblem, overlap: bool = False) -> None:
        self._problem, self._overlap, self._index = problem, overlap, problem.device.index
        self._sizes = (problem.routes, problem.row_length)
        self._compiled: dict[_Key, Compiled] = {}

    def _compile(self, key: _Key) -> Compiled:
        strided, vector_in, vector_out, green = key
        problem, index = self._problem, self._index
        device = torch.cuda.get_device_properties(index)
        max_shared: int = device.shared_memory_per_block_optin  # type: ignore[attr-defined]
        for max_cluster in _cluster_sizes(device.major):
            path = path_of(problem, green or device.multi_processor_count, max_shared, max_cluster)
            vectors = vector_in and _reads_vectors(path)
            defines = defines_of(problem, path, strided=strided, vector_in=vectors, vector_out=vector_out)
            cooperative = path.name in _COOPERATIVE
            overlap = self._overlap and device.major >= 9 and not cooperative
            if overlap:
                defines = (*defines, ("AFTER", 1))
            compiled = kernel("align.cu", path.name, defines, index)
            if path.cluster == 1 or compiled.max_clusters(path.cluster, path.threads, path.shared_bytes):
                break  # part of a device may have no room for the largest clusters
        mode = COOPERATIVE if cooperative else OVERLAP if overlap else PLAIN
        options = (problem.map_dtype, problem.has_num_valid_tokens, problem.has_error_word, problem.extras, strided)
        launch = compiled.prepare(path.grid, path.threads, path.shared_bytes, mode)
        made = Compiled(launch, path.scratch.of(path.grid, problem.routes), not any(options), path.cluster)
        if len(self._compiled) >= _MAX_GREEN:
            self._compiled.clear()
        self._compiled[key] = made
        return made

    def run(
        self,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_valid_tokens: Tensor | None,
        error_word: Tensor | None,
        out: BlockLayout,
    ) -> None:
        """Fill `out`, on the current stream, in one launch.  Ids of more than two axes are copied unless they
        collapse."""
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
        key = (strided, not ids & 15, not rows_at & 15, 0)
        compiled = self._compiled.get(key) or self._compile(key)
        scratch_at, scratch = 0, None
        if compiled.scratch:
            green = green_multiprocessors(self._index)
            if green:
                key = (*key[:3], green)
                compiled = self._compiled.get(key) or self._compile(key)
            # Freed when this returns: the allocator hands it on to later work of the same stream only.
            scratch = torch.empty(compiled.scratch, dtype=torch.int32, device=topk_ids.device)
            scratch_at = scratch.data_ptr()
        blocks_at, total_at = out.expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr()
        sizes = (*self._sizes, rows.numel(), scratch_at)
        if compiled.short:
            compiled.launch(ids, rows_at, blocks_at, total_at, *sizes)
            return
        compiled.launch(
            ids,
            *pointers(expert_map, num_valid_tokens, error_word),
            rows_at,
            blocks_at,
            total_at,
            *pointers(
                out.expert_counts, out.expert_offsets, out.group_ends, out.positions, out.block_rows, out.scatter_idx
            ),
            *sizes,
            s0,
            s1,
            0 if expert_map is None else expert_map.stride(0),
        )

    def required(self, topk_ids: Tensor, rows: Tensor, blocks: Tensor, total: Tensor) -> None:
        """:meth:`run` without options into the three required outputs."""
        ids, rows_at = topk_ids.data_ptr(), rows.data_ptr()
        compiled = self._compiled.get((not topk_ids.is_contiguous(), not ids & 15, not rows_at & 15, 0))
        if compiled is None or compiled.scratch or not compiled.short:
            self.run(topk_ids, None, None, None, BlockLayout(rows, blocks, total))
            return
        compiled.launch(ids, rows_at, blocks.data_ptr(), total.data_ptr(), *self._sizes, rows.numel(), 0)


def pointers(*tensors: Tensor | None) -> list[int]:
    """Their addresses, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def specialisations(major: int) -> Iterator[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """(source, name, macros) of every path as models use it, and of every option, to be compiled without a GPU.

    `major` is that of the compute capability: devices from 9.0 on have clusters.
    """
    clusters = _cluster_sizes(major)[0]

    def one(routes: int, experts: int, block_size: int, **facts: Any) -> tuple[str, str, tuple[tuple[str, int], ...]]:
        layout = {name: facts.pop(name) for name in ("strided", "vector_in", "vector_out") if name in facts}
        device, dtype = torch.device("cuda"), facts.pop("dtype", torch.int32)
        problem = AlignProblem("align", device, dtype, routes, 8, experts, block_size)._replace(**facts)
        path = path_of(problem, 108, 99 * 1024, clusters)  # the least of what sm_80 to sm_120 have
        layout.setdefault("vector_in", _reads_vectors(path))
        return "align.cu", path.name, defines_of(problem, path, **layout)

    sizes = (8, 64, 128, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 524288, 2**21)
    for routes in sizes:
        yield one(routes, 256, 16 if routes <= 1024 else 128)
        yield one(routes, 256, 128, extras=EXTRAS, has_num_valid_tokens=True, has_error_word=True)
    if major >= 9:  # behind a router's kernel
        for routes, experts in ((64, 256), (256, 128), (264, 8), (320, 512), *((n, 256) for n in sizes[4:])):
            source, name, defines = one(routes, experts, 16 if routes <= 1024 else 128)
            if name not in _COOPERATIVE:
                yield source, name, (*defines, ("AFTER", 1))
    for routes in (8, 100, 2000, 40000):
        yield one(routes, 512, 16, map_dtype=torch.int32, ignore_invalid_experts=True, extras=EXTRAS)
        yield one(routes, 8, 64, map_dtype=torch.int64, has_error_word=True)
        yield one(routes, 160, 48, dtype=torch.int64, strided=True, vector_in=False)
        yield one(routes, 257, 7, dtype=torch.uint8, vector_in=False, vector_out=False)
        yield one(routes, 65_536, 16, dtype=torch.uint16, extras=EXTRAS)
