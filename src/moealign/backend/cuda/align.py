"""The layout on NVIDIA GPUs: which kernel, its macros and its grid.  Tuning is data, below."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...layout import BAD_ID, BAD_MAP, BAD_NUM_VALID, EXTRAS, BlockLayout, capacity, cdiv
from ...problem import AlignProblem
from .compile import Defines
from .launch import COOPERATIVE, OVERLAP, PLAIN, Launch, green_multiprocessors, kernel

__all__ = ["Alignment", "Path", "defines_of", "path_of", "pointers"]

# -------------------------------------------------------------------------------------------------------------- tuning
# Measured on an H200, the tiles and the sizes up to 8,192 routes on an H100, graph replay.

_WARP_ROUTES = 32  #: that a warp ranks, one per lane
_WARP_THREADS = 128
_WARP_CTAS = 2
_PAIRWISE_CTAS = (4, 8)  #: minimum, without and with extras of one element per expert
_PAIRWISE_WORDS = (2, 4, 8)  #: words of 32 routes that the pairwise kernel is compiled for
#: independent: (max routes, threads, words of 32 routes that a CTA ranks, CTAs per cluster)
_CLUSTERS = (
    (512, 256, 1, 1),
    (1024, 512, 1, 1),
    (2048, 512, 1, 1),
    (4096, 512, 4, 1),
    (6144, 512, 4, 1),
    (8192, 1024, 4, 1),
    (16384, 512, 8, 8),
    (32768, 512, 16, 8),
)
_NO_CLUSTERS = ((512, 256, 1, 1), (1024, 512, 1, 1), (2048, 512, 1, 1), (4096, 512, 4, 1), (12000, 1024, 4, 1))
_STEPS_OF_ONE = 4  #: max ids per thread that are read one by one: less code than vectors
_INDEPENDENT_MIN_CTAS = 64  #: without clusters: more CTAs than the routes need, to share the filling
#: grid: (threads, routes per thread, max CTAs); the first row applies that takes all routes and fits shared memory
_GRID = (
    (512, 1, 64),
    (512, 2, 64),
    (512, 2, 128),
    (512, 4, 128),
    (1024, 4, 128),
    (512, 8, 128),
    (256, 8, 128),
    (1024, 8, 128),
)
#: grid: rows of the table that a thread reads, 16 at a time; the number of CTAs is rounded up to fit
_GRID_ROWS = (1, 2, 4, 8, 12, 16, 32, 48, 64, 80, 96, 112, 128)
#: tiles: (max experts, threads, routes per thread of a tile, max CTAs per multiprocessor); the first row applies that
#: fits shared memory, with as many CTAs per multiprocessor as fit
_TILES = ((512, 512, 16, 2), (2048, 512, 32, 1), (4096, 512, 16, 1), (2048, 512, 8, 2), (2048, 256, 8, 2))
_RESERVED_SHARED = 1024  #: bytes of a multiprocessor's shared memory that every CTA takes beside its own
_RADIX_THREADS = 1024
_RADIX_EXPERTS = 4096  #: per CTA, with few routes
_COOPERATIVE = ("grid", "tiles", "radix")  #: paths whose CTAs wait for each other
_PER_EXPERT = {"expert_counts", "expert_offsets", "group_ends"}
_STATIC_SHARED = 2048  #: bytes set aside for static shared memory

_TYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    )
}


class Scratch(NamedTuple):
    """int32 elements of device memory, as coefficients that do not depend on the number of routes: they are macros."""

    per_cta: int = 0
    per_route: int = 0
    fixed: int = 0

    def elements(self, grid: int, routes: int) -> int:
        return self.per_cta * grid + self.per_route * routes + self.fixed


class Path(NamedTuple):
    """How one problem is launched: everything but the pointers."""

    name: str  # of the kernel, and of its file
    grid: int
    threads: int
    words: int
    steps: int
    shared_bytes: int
    scratch: Scratch = Scratch()
    cluster: int = 1  # CTAs
    compact: bool = False
    resident: int = 1  # CTAs per multiprocessor

    @property
    def file(self) -> str:
        return f"{self.name}.cu"


class Compiled(NamedTuple):
    """A path, compiled and ready to launch."""

    launch: Launch
    scratch: int  # int32 elements; 0 if and only if the CTAs do not wait for each other
    common: bool  # three outputs of contiguous ids and no option: a kernel with few parameters
    cluster: int  # CTAs

    def run(self, head: tuple[int, ...], tail: tuple[int, ...], device: torch.device) -> None:
        """Launch with the parameters before and behind the scratch."""
        if not self.scratch:
            self.launch(*head, 0, *tail)
            return
        # Freed on return: the allocator reuses it only for later work on the same stream.
        scratch = torch.empty(self.scratch, dtype=torch.int32, device=device)
        self.launch(*head, scratch.data_ptr(), *tail)


def _cluster_sizes(major: int) -> tuple[int, ...]:
    """Max CTAs per cluster for a major compute capability, then smaller sizes to try."""
    return (1,) if major < 9 else (8, 1) if major > 10 else (16, 8, 1)


def _grid_shared_words(experts: int, threads: int, steps: int) -> int:
    pairs, warps = (experts + 1) // 2, threads // 32
    routes = threads * steps
    return max(_segments(experts, threads) * 4 * pairs, warps * (pairs | 1)) + 3 * experts + 2 + routes + routes // 2


def _segments(experts: int, threads: int) -> int:
    return next((s for s in (16, 8, 4, 2) if threads // ((experts + 1) // 2) >= s), 1)


def _independent(problem: AlignProblem, max_shared: int, max_cluster: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for max_routes, threads, max_words, cluster in (*_CLUSTERS, *_NO_CLUSTERS) if max_cluster > 1 else _NO_CLUSTERS:
        if experts > threads:
            threads = 512 if experts <= 512 else 1024
        if n > max_routes or cluster > max_cluster or (cluster > 1 and experts > 2 * threads):
            continue
        for words in (max_words, 4, 2, 1):
            shared = _independent_shared_bytes(experts, threads, words, cluster)
            if words <= max_words and shared <= max_shared:
                chunk = 32 * words
                steps = _steps(cdiv(max_routes, cluster * chunk) * chunk, threads)
                ctas = cluster * cdiv(n, cluster * chunk)
                if cluster == 1:
                    ctas = max(ctas, _INDEPENDENT_MIN_CTAS)
                return Path("independent", ctas, threads, words, steps, shared, cluster=cluster)
    max_routes, threads, words, _ = _NO_CLUSTERS[-1]
    ctas = max(cdiv(n, 32 * words), _INDEPENDENT_MIN_CTAS)
    shared = 4 * (_span(experts, threads) + 1 + cdiv(experts, _INDEPENDENT_MIN_CTAS))
    if n > max_routes or shared > max_shared:
        return None
    return Path("independent", ctas, threads, words, _steps(max_routes, threads), cdiv(shared, 16) * 16, compact=True)


def _span(experts: int, threads: int) -> int:
    """Words of a table of `experts` + 1 entries, spaced so that threads with several entries have no bank conflicts."""
    per_thread = cdiv(experts, threads)
    return experts + (experts // per_thread if per_thread > 2 and per_thread % 2 == 0 else 0) + 1


def _steps(routes: int, threads: int) -> int:
    """Routes per thread: at most two, or a multiple of four, which are read as vectors."""
    steps = cdiv(routes, threads)
    return steps if steps <= 2 else cdiv(steps, 4) * 4


def _independent_shared_bytes(experts: int, threads: int, words: int, cluster: int) -> int:
    span = _span(experts, threads)
    alone = cdiv(span, 2) * 2 + (0 if words == 1 else cdiv(words, 4) * span) + span
    return cdiv(alone + (0 if cluster == 1 else cluster * cdiv(experts, 2) + 2 * experts), 4) * 16


def _grid(problem: AlignProblem, multiprocessors: int, max_shared: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for threads, steps, max_ctas in _GRID:
        segments = _segments(experts, threads)
        min_rows = cdiv(cdiv(n, threads * steps), segments)
        rows = next((rows for rows in _GRID_ROWS if rows >= min_rows), None)
        shared = 4 * _grid_shared_words(experts, threads, steps)
        if rows and rows * segments <= min(max_ctas, multiprocessors) and shared <= max_shared:
            return Path("grid", rows * segments, threads, rows, steps, shared, Scratch(per_cta=(experts + 1) // 2))
    return None


def _tiles_shared_bytes(experts: int, threads: int, steps: int) -> int:
    table = threads // 32 * ((experts + 1) // 2 | 1)
    return 4 * (max(table + threads * steps, 2 * experts + 1) + 3 * experts)


def _tiles(problem: AlignProblem, multiprocessors: int, max_shared: int) -> Path | None:
    n, experts = problem.routes, problem.num_experts
    for max_experts, threads, steps, max_resident in _TILES:
        shared = _tiles_shared_bytes(experts, threads, steps)
        if experts <= max_experts and shared <= max_shared:
            each = shared + _STATIC_SHARED + _RESERVED_SHARED
            resident = min(max_resident, (max_shared + _STATIC_SHARED + _RESERVED_SHARED) // each)
            grid = min(resident * multiprocessors, cdiv(n, threads * steps))
            scratch = Scratch(per_cta=experts, fixed=experts)
            return Path("tiles", grid, threads, 1, steps, shared, scratch, resident=resident)
    return None


def _radix(problem: AlignProblem, multiprocessors: int) -> Path:
    n, experts = problem.routes, problem.num_experts
    grid = max(1, min(max(cdiv(n, _RADIX_THREADS), cdiv(experts, _RADIX_EXPERTS)), multiprocessors))
    passes = max(1, cdiv((experts - 1).bit_length(), 8))
    scratch = Scratch(passes * 256 + 2, 4 if passes > 1 else 2, 3 * experts)
    return Path("radix", grid, _RADIX_THREADS, 1, 1, 0, scratch)


def path_of(problem: AlignProblem, multiprocessors: int, max_shared: int, max_cluster: int) -> Path:
    """The path of `problem` on a device with `multiprocessors`, `max_shared` bytes of shared memory per CTA and at most
    `max_cluster` CTAs per cluster."""
    n = problem.routes
    length = capacity(n, block_size=problem.block_size, num_experts=problem.num_experts).sorted_token_ids
    max_shared -= _STATIC_SHARED
    if n <= _WARP_ROUTES:
        ctas = max(_WARP_CTAS, min(cdiv(length, 16 * _WARP_THREADS), multiprocessors))
        return Path("warp", ctas, _WARP_THREADS, 1, 1, 0)
    for words in _PAIRWISE_WORDS:
        if n <= 32 * words:
            threads = max(32 * words, 64)
            min_ctas = _PAIRWISE_CTAS[not _PER_EXPERT.isdisjoint(problem.extras)]
            ctas = max(min_ctas, min(cdiv(length, 16 * threads), multiprocessors))
            return Path("pairwise", ctas, threads, words, 1, 0)
    return (
        _independent(problem, max_shared, max_cluster)
        or _grid(problem, multiprocessors, max_shared)
        or _tiles(problem, multiprocessors, max_shared)
        or _radix(problem, multiprocessors)
    )


def _reads_vectors(path: Path) -> bool:
    return path.name == "tiles" or (path.name == "independent" and path.steps > _STEPS_OF_ONE)


def defines_of(
    problem: AlignProblem, path: Path, *, strided: bool = False, vector_in: bool = True, vector_out: bool = True
) -> Defines:
    """The macros of one specialisation.  They do not depend on the number of routes, except that it is not 0."""
    error_bits = (("BAD_ID", BAD_ID), ("BAD_MAP", BAD_MAP), ("BAD_NUM_VALID", BAD_NUM_VALID))
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
        # The memory of the launch: the kernels assert that it suffices.
        ("SHARED_BYTES", path.shared_bytes),
        ("SCRATCH_PER_CTA", path.scratch.per_cta),
        ("SCRATCH_PER_ROUTE", path.scratch.per_route),
        ("SCRATCH_FIXED", path.scratch.fixed),
        ("MIN_CTAS", _INDEPENDENT_MIN_CTAS),
        ("GRID_CTAS", path.grid if path.name == "grid" else 0),
        ("RESIDENT", path.resident),
        *(error_bits if problem.has_error_word else ()),
    )


# ------------------------------------------------------------------------------------------------------------ launching

#: Whether ids are strided; whether ids and sorted_token_ids are aligned to 16 bytes; multiprocessors of the green
#: context, 0 for the whole device.
_Key = tuple[bool, bool, bool, int]
_MAX_COMPILED = 64  # launches per prepared call; green contexts make their number unbounded


class Alignment:
    """One prepared call, with a launch for each alignment and stride of the tensors.

    With `overlap` the kernel starts before the one ahead of it has ended, and waits for it on the device.
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
                defines = (*defines, ("PDL_WAIT", 1))
            compiled = kernel(path.file, path.name, defines, index)
            if path.cluster == 1 or compiled.max_clusters(path.cluster, path.threads, path.shared_bytes):
                break  # a green context may be too small for the largest clusters
        mode = COOPERATIVE if cooperative else OVERLAP if overlap else PLAIN
        options = (problem.map_dtype, problem.has_num_valid_tokens, problem.has_error_word, problem.extras, strided)
        launch = compiled.prepare(path.grid, path.threads, path.shared_bytes, mode)
        entry = Compiled(launch, path.scratch.elements(path.grid, problem.routes), not any(options), path.cluster)
        if len(self._compiled) >= _MAX_COMPILED:
            self._compiled.clear()
        self._compiled[key] = entry
        return entry

    def run(
        self,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        num_valid_tokens: Tensor | None,
        error_word: Tensor | None,
        out: BlockLayout,
    ) -> None:
        """Fill `out` on the current stream, in one launch.  Ids of more than two axes that cannot be viewed as two are
        copied.

        A green context can be too small for the clusters that the whole device holds.  The driver then refuses the
        launch, and the call is prepared once more, for that context.
        """
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
        if compiled.scratch:
            compiled = self._of_green_context(key) or compiled
        head: tuple[int, ...] = (ids, rows_at, out.expert_ids.data_ptr(), out.num_tokens_post_padded.data_ptr())
        tail: tuple[int, ...] = ()
        if not compiled.common:
            extras = (
                out.expert_counts, out.expert_offsets, out.group_ends, out.positions, out.block_rows, out.scatter_idx
            )  # fmt: skip
            head = (ids, *pointers(expert_map, num_valid_tokens, error_word), *head[1:], *pointers(*extras))
            tail = (s0, s1, 0 if expert_map is None else expert_map.stride(0))
        head = (*head, *self._sizes, rows.numel())
        try:
            compiled.run(head, tail, topk_ids.device)
        except RuntimeError:
            smaller = self._of_green_context(key) if compiled.cluster > 1 else None
            if smaller is None:
                raise
            smaller.run(head, tail, topk_ids.device)

    def _of_green_context(self, key: _Key) -> Compiled | None:
        """The launch for the green context of the current stream; None if it has none."""
        green = green_multiprocessors(self._index)
        if not green:
            return None
        key = (*key[:3], green)
        return self._compiled.get(key) or self._compile(key)

    def required(self, topk_ids: Tensor, rows: Tensor, blocks: Tensor, total: Tensor) -> None:
        """:meth:`run` without options, into the three required outputs."""
        ids, rows_at = topk_ids.data_ptr(), rows.data_ptr()
        compiled = self._compiled.get((not topk_ids.is_contiguous(), not ids & 15, not rows_at & 15, 0))
        if compiled is not None and compiled.common and not compiled.scratch:
            try:
                compiled.launch(ids, rows_at, blocks.data_ptr(), total.data_ptr(), *self._sizes, rows.numel(), 0)
                return
            except RuntimeError:
                if compiled.cluster == 1:
                    raise
        self.run(topk_ids, None, None, None, BlockLayout(rows, blocks, total))


def pointers(*tensors: Tensor | None) -> list[int]:
    """The addresses of `tensors`, 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def specialisations(major: int) -> Iterator[tuple[str, str, Defines]]:
    """(file, name, macros) of every path at models' sizes, and of every option, for tests that compile without a GPU.

    `major` is the major compute capability: devices have clusters from 9.0 on.
    """
    clusters = _cluster_sizes(major)[0]

    def one(routes: int, experts: int, block_size: int, **facts: Any) -> tuple[str, str, Defines]:
        layout = {name: facts.pop(name) for name in ("strided", "vector_in", "vector_out") if name in facts}
        device, dtype = torch.device("cuda"), facts.pop("dtype", torch.int32)
        multiprocessors, shared = facts.pop("fits", (108, 99 * 1024))  # the minimum over sm_80 to sm_120
        problem = AlignProblem("align", device, dtype, routes, 8, experts, block_size)._replace(**facts)
        path = path_of(problem, multiprocessors, shared, clusters)
        layout.setdefault("vector_in", _reads_vectors(path))
        return path.file, path.name, defines_of(problem, path, **layout)

    sizes = (8, 64, 128, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 524288, 2**21)
    for routes in sizes:
        yield one(routes, 256, 16 if routes <= 1024 else 128)
        yield one(routes, 256, 128, extras=EXTRAS, has_num_valid_tokens=True, has_error_word=True)
    for routes in (2**20, 2**22):  # with the tiles of larger devices
        for experts in (8, 256, 512, 1024, 2048):
            for dtype, extras in ((torch.int32, ()), (torch.int64, EXTRAS)):
                yield one(routes, experts, 128, dtype=dtype, extras=extras, fits=(128, 227 * 1024))
    if major >= 9:  # overlapping with the router
        for routes, experts in ((64, 256), (256, 128), (264, 8), (320, 512), *((n, 256) for n in sizes[4:])):
            file, name, defines = one(routes, experts, 16 if routes <= 1024 else 128)
            if name not in _COOPERATIVE:
                yield file, name, (*defines, ("PDL_WAIT", 1))
    for routes in (8, 100, 2000, 40000):
        yield one(routes, 512, 16, map_dtype=torch.int32, ignore_invalid_experts=True, extras=EXTRAS)
        yield one(routes, 8, 64, map_dtype=torch.int64, has_error_word=True)
        yield one(routes, 160, 48, dtype=torch.int64, strided=True, vector_in=False)
        yield one(routes, 257, 7, dtype=torch.uint8, vector_in=False, vector_out=False)
        yield one(routes, 65_536, 16, dtype=torch.uint16, extras=EXTRAS)
