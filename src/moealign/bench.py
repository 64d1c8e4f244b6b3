"""moealign, its peers, the torch formulation and the floors, side by side in one process; see docs/performance.md.

    moealign bench                        # everything, on the GPU if there is one; needs under four minutes
    moealign bench --quick                # a few sizes
    moealign bench --bench eager-host     # one part
    python -m moealign.bench              # the same with fewer words, where typer and rich are not installed

Every implementation is compared with a numpy oracle before it is timed, and ours once more after the timed replays.
GPU time is that of CUDA graphs of 40 calls, each call on the next of 20 inputs and sets of outputs: events around a
replay, median over 50 replays, the implementations taking turns so that clocks drift alike.  ``eager-host`` is the
host's time of a call, without a graph and without waiting for the device.

Peers are the libraries in a folder, if there is one, or else what is installed beside this package; one that cannot
be loaded is left out, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import lzma
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .alignment import align, align_batched, moe_align_block_size
from .calls.dispatch import backends
from .errors import BackendUnavailable, InvalidInput
from .layout import EXTRAS, Capacity, capacity, capacity_batched, cdiv
from .testing import argsort_align, poisoned

# fmt: off
COLUMNS = ["bench", "case", "routes", "num_experts", "top_k", "block_size", "impl",
           "median_us", "min_us", "max_us", "gpu", "torch", "date"]
# fmt: on
VLLM, SGLANG, ARGSORT = "vllm-0.33.0", "sglang-kernel-0.4.4", "torch-argsort"
OURS = ["moealign-cuda", "moealign-triton", "moealign-cpu", "moealign-reference"]
PEERS = [VLLM, SGLANG]  # as they are in the folder of --peers; installed ones carry their own versions
FLOORS = ["floor-empty", "floor-chain", "floor-bytes"]

# Sizes: (tokens, top_k, num_experts, block_size).
DECODE = [(tokens, 8, 256, 16) for tokens in (1, 4, 8, 16, 32, 64, 128)]
MIDDLE = [(256, 8, 256, 64), (512, 8, 256, 64)]
PREFILL = [(tokens, 8, 256, 128) for tokens in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
OTHER = [(32, 4, 128, 16), (32, 2, 8, 16), (8192, 2, 8, 128), (32, 10, 512, 16)]
E256 = [*DECODE, *MIDDLE, *PREFILL]
SIZES = [(1, 1, 256, 16), *E256, *OTHER]
EXTRAS_SIZES = [size for size in E256 if size[0] in (1, 4, 8, 32, 128, 256, 1024, 2048, 8192, 65536)]
SKEW_SIZES = [size for size in E256 if size[0] in (1, 32, 256, 2048, 8192, 65536)]
MAP_SIZES = [(32, 8, 256, 16), (256, 8, 256, 64), (2048, 8, 256, 128), (16384, 8, 256, 128)]
BATCHED_SIZES = [(8, 128, 16), (32, 512, 64), (64, 512, 64), (256, 256, 64), (256, 1024, 128), (32, 8192, 128)]
LARGE_E = [(1024, 8, experts, 16) for experts in (1024, 2048, 4096, 8192, 16384, 32768, 65536)]
HOST_SIZES = [(1, 8, 256, 16), (32, 8, 256, 16), (1024, 8, 256, 128)]
CPU_SIZES = [(1, 8, 256, 16), (32, 8, 256, 16), (256, 8, 256, 64), (2048, 8, 256, 128), (65536, 8, 256, 128)]
BENCHES = ("align", "batched", "align-extras", "align-skew", "align-map", "large-e", "eager-host")
QUICK = {8, 256, 8192, 524288}  # routes
OFTEN = {8, 64, 256, 1024, 8192, 16384, 65536, 524288}  # routes at which the slower implementations are timed too
SELDOM = {256, 8192, 524288}
BASE = {"align-extras": "three", "align-skew": "uniform"}  # the kind that the others of a bench are compared to

SLOTS = 20  # inputs and sets of outputs that the calls of a graph take in turn
CALLS = 40  # in one graph
REPLAYS = 50
ENOUGH_US = 150_000  # of device time for one implementation in one case: slow ones are replayed less often
POISON = -7

FLOOR_KERNELS = r"""
extern "C" __global__ void floor_empty() {}
extern "C" __global__ void floor_chain(const int* in, int* out, int n) {
  __shared__ int held[1024];
  int t = threadIdx.x;
  held[t] = t < n ? in[t] : -1;
  __syncthreads();
  out[t] = held[(t + 1) % blockDim.x];
}
"""

Size = tuple[int, ...]


# ---- what is right -----------------------------------------------------------------------------------------------


def expected_layout(
    ids: np.ndarray,
    *,
    block_size: int,
    num_experts: int,
    length: int,
    expert_map: np.ndarray | None = None,
    ignore: bool = False,
) -> dict[str, np.ndarray]:
    """Every output by its name, from flat ids, by a stable argsort; ``bins`` is each route's bin, -1 if dropped."""
    n, size = len(ids), block_size
    bins = np.where((ids >= 0) & (ids < num_experts), ids.astype(np.int64), -1)
    local = None
    if expert_map is not None:
        local = np.where((expert_map >= 0) & (expert_map < num_experts), expert_map.astype(np.int64), -1)
        if ignore:
            bins = np.where(bins >= 0, local[bins], -1)
    kept = bins >= 0
    order = np.argsort(np.where(kept, bins, num_experts), kind="stable")[: int(kept.sum())]
    counts = np.bincount(bins[kept], minlength=num_experts)
    blocks = -(-counts // size)
    offsets = np.concatenate(([0], np.cumsum(blocks * size)))
    ends = np.cumsum(counts)
    of_route = bins[order]
    rows = offsets[of_route] + np.arange(len(order)) - (ends - counts)[of_route]

    sorted_ids = np.full(length, n)
    sorted_ids[rows] = order
    positions = np.full(n, -1)
    positions[order] = rows
    used, capacity = int(blocks.sum()), cdiv(length, size)
    names = np.repeat(np.arange(num_experts), blocks)
    before = names * 0 + np.arange(used) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    block_rows = np.minimum(size, np.repeat(counts, blocks) - before * size)
    shown = names if local is None or ignore else local[names]
    return {
        "sorted_token_ids": sorted_ids,
        "expert_ids": np.concatenate((shown, np.full(capacity - used, -1))),
        "num_tokens_post_padded": offsets[-1:],
        "expert_counts": counts,
        "expert_offsets": offsets,
        "group_ends": ends,
        "positions": positions,
        "block_rows": np.concatenate((block_rows, np.zeros(capacity - used, dtype=np.int64))),
        "scatter_idx": np.where(kept, np.arange(n), -1),
        "bins": bins if local is None or ignore else np.where(kept, local[bins], -1),
    }


def exact_difference(got: dict[str, torch.Tensor], want: dict[str, np.ndarray]) -> str | None:
    """What is not as it must be, element for element; None if all is."""
    for name, tensor in got.items():
        values = tensor.detach().cpu().numpy().reshape(-1)
        if values.shape != want[name].shape:
            return f"{name}: expected {want[name].shape[0]} elements, got {values.shape[0]}"
        wrong = np.flatnonzero(values != want[name])
        if len(wrong):
            at = wrong[0]
            return f"{name}[{at}]: expected {want[name][at]}, got {values[at]} ({len(wrong)} elements differ)"
    return None


def bins_difference(
    sorted_ids: torch.Tensor, expert_ids: torch.Tensor, total: torch.Tensor, want: dict[str, np.ndarray], size: int
) -> str | None:
    """As exact_difference for what a peer promises: each used block holds routes of its expert, in any order.

    Blocks named -1, tails and the order inside a bin are the peer's own affair.
    """
    bins = want["bins"]
    n, rows = len(bins), int(total.cpu()[0])
    if rows % size or not 0 <= rows <= sorted_ids.numel() + size:
        return f"total: expected a multiple of {size} within the buffer, got {rows}"
    routes = sorted_ids.cpu().numpy()[:rows]
    experts = np.repeat(expert_ids.cpu().numpy()[: rows // size], size)[: len(routes)]
    listed = (routes >= 0) & (routes < n) & (experts >= 0)
    routes, experts = routes[listed], experts[listed]
    if len(np.unique(routes)) != len(routes) or len(routes) != int((bins >= 0).sum()):
        return f"expected {int((bins >= 0).sum())} routes once each, got {len(routes)}"
    wrong = np.flatnonzero(bins[routes] != experts)
    if len(wrong):
        at = wrong[0]
        return f"route {routes[at]}: expected expert {bins[routes[at]]}, got {experts[at]} ({len(wrong)} routes differ)"
    return None


# ---- inputs ------------------------------------------------------------------------------------------------------


def make_ids(kind: str, size: Size, generator: torch.Generator) -> torch.Tensor:
    """int32 ids [tokens, top_k] on the generator's device, distinct in each row except where all go to one expert."""
    tokens, top_k, experts = size[:3]
    device = generator.device
    if kind == "one-expert":
        expert = torch.randint(experts, (1,), generator=generator, device=device, dtype=torch.int32)
        return expert.expand(tokens * top_k).reshape(tokens, top_k).contiguous()
    scores = torch.rand((tokens, experts), generator=generator, device=device)
    if kind == "zipf":  # the k largest of log-weight plus Gumbel noise: k draws without replacement
        ranks = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
        scores = -torch.log(-torch.log(scores.clamp(1e-7, 1 - 1e-7))) - torch.log(ranks)
    ids = scores.topk(top_k, dim=1).indices.to(torch.int32)
    if kind == "half-minus-one":
        ids[torch.rand(ids.shape, generator=generator, device=device) < 0.5] = -1
    return ids


@dataclass
class Work:
    """One case: the calls to make, and what must come of each."""

    bench: str
    case: str
    size: Size  # tokens, top_k, num_experts, block_size; batched: batches, max_tokens_per_batch, batches, block_size
    inputs: list[torch.Tensor]
    batched: bool = False
    expert_map: torch.Tensor | None = None
    ignore: bool = False
    extras: tuple[str, ...] = ()
    dropped: bool = False  # whether the ids hold -1
    _expected: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def routes(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @functools.cached_property
    def capacity(self) -> Capacity:
        tokens, top_k, experts, block_size = self.size
        if self.batched:
            return capacity_batched(top_k, block_size=block_size, num_batches=tokens)
        return capacity(self.routes, block_size=block_size, num_experts=experts)

    def expected(self, slot: int) -> dict[str, np.ndarray]:
        if slot not in self._expected:
            _, top_k, experts, block_size = self.size
            ids = self.inputs[slot].cpu().numpy()
            if self.batched:
                ids = np.where(np.arange(top_k)[None] < ids[:, None], np.arange(experts)[:, None], -1)
            self._expected[slot] = expected_layout(
                ids.reshape(-1),
                block_size=block_size,
                num_experts=experts,
                length=self.capacity.sorted_token_ids,
                expert_map=None if self.expert_map is None else self.expert_map.cpu().numpy(),
                ignore=self.ignore,
            )
        return self._expected[slot]


def name_of(size: Size, kind: str = "") -> str:
    tokens, top_k, experts, block_size = size
    return f"{tokens}x{top_k}-E{experts}-B{block_size}" + (f" {kind}" if kind else "")


# ---- implementations ---------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One implementation in one case: `call` enqueues the work of a slot, `check` says what came out wrong."""

    impl: str
    call: Callable[[int], Any]
    check: Callable[[int], str | None] | None = None
    buffers: Sequence[Sequence[torch.Tensor]] = ()  # of each slot, if the caller owns them: poisoned before a check

    def poison(self, slot: int) -> None:
        if self.buffers:
            for tensor in self.buffers[slot]:
                tensor.fill_(POISON)


def ours(backend: str, work: Work, drop_in: bool = False) -> Entry:
    """align or align_batched into buffers that exist, or with `drop_in` vLLM's signature, which allocates."""
    _, top_k, experts, block_size = work.size
    impl = f"moealign-{backend}"
    if drop_in:
        results: dict[int, tuple[torch.Tensor, ...]] = {}

        def call(slot: int) -> None:
            results[0] = moe_align_block_size(work.inputs[slot], block_size, experts, backend=backend)

        return Entry(impl, call, lambda slot: exact_difference(_named(results[0]), work.expected(slot)))

    wanted: dict[str, Any] = dict.fromkeys(work.extras, True)
    outs = [poisoned(work.capacity, work.extras, work.device, POISON) for _ in work.inputs]
    names = ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", *work.extras)
    named = [{name: getattr(out, name) for name in names} for out in outs]
    if work.batched:

        def call(slot: int) -> None:
            align_batched(
                work.inputs[slot],
                max_tokens_per_batch=top_k,
                block_size=block_size,
                out=outs[slot],
                backend=backend,
                **wanted,
            )
    else:

        def call(slot: int) -> None:
            align(
                work.inputs[slot],
                block_size=block_size,
                num_experts=experts,
                expert_map=work.expert_map,
                ignore_invalid_experts=work.ignore,
                out=outs[slot],
                backend=backend,
                **wanted,
            )

    return Entry(
        impl,
        call,
        lambda slot: exact_difference(named[slot], work.expected(slot)),
        [list(tensors.values()) for tensors in named],
    )


def _named(results: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("sorted_token_ids", "expert_ids", "num_tokens_post_padded"), results, strict=True))


def torch_argsort(work: Work) -> Entry:
    _, _, experts, block_size = work.size
    results: dict[int, tuple[torch.Tensor, ...]] = {}

    def call(slot: int) -> None:
        results[slot] = argsort_align(work.inputs[slot], block_size, experts)

    return Entry(ARGSORT, call, lambda slot: exact_difference(_named(results[slot]), work.expected(slot)))


def buffers_of(length: int, blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A peer's three outputs; room to a multiple of 4 behind the first, which SGLang fills in 16-byte pieces."""
    room = torch.full((cdiv(length, 4) * 4,), POISON, dtype=torch.int32, device=device)
    return (
        room[:length],
        torch.full((blocks,), POISON, dtype=torch.int32, device=device),
        torch.full((1,), POISON, dtype=torch.int32, device=device),
    )


def vllm(work: Work, drop_in: bool = False, impl: str = VLLM) -> Entry:
    """vLLM's op.  It writes its three outputs to the last element: the wrapper gives it torch.empty.

    Without `ignore` an expert map is applied afterwards by indexing, as vLLM's wrapper does.
    """
    _, top_k, experts, block_size = work.size
    inputs, expert_map = work.inputs, work.expert_map
    if drop_in:
        latest: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

        def call_wrapper(slot: int) -> None:
            latest[0] = vllm_wrapper(inputs[slot], block_size, experts)

        return Entry(impl, call_wrapper, lambda slot: bins_difference(*latest[0], work.expected(slot), block_size))

    outs = [buffers_of(work.capacity.sorted_token_ids, work.capacity.expert_ids, work.device) for _ in inputs]
    names = [out[1] for out in outs]
    ops = torch.ops._moe_C
    room = 0 if work.batched else arguments_of(ops.moe_align_block_size) - 6
    nothing, mapped = (None, None)[:room], (expert_map, None)[:room]  # the map and scatter_idx, as far as it takes them
    if work.batched:

        def call(slot: int) -> None:
            ops.batched_moe_align_block_size(top_k, block_size, inputs[slot], *outs[slot])
    elif expert_map is not None and not work.ignore:

        def call(slot: int) -> None:
            ops.moe_align_block_size(inputs[slot], experts, block_size, *outs[slot], *nothing)
            names[slot] = expert_map[outs[slot][1]]
    else:

        def call(slot: int) -> None:
            ops.moe_align_block_size(inputs[slot], experts, block_size, *outs[slot], *mapped)

    def check(slot: int) -> str | None:
        return bins_difference(outs[slot][0], names[slot], outs[slot][2], work.expected(slot), block_size)

    return Entry(impl, call, check, outs)


def vllm_wrapper(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The steps of vLLM 0.33's Python wrapper: three sizes, three torch.empty, the op through one more function."""
    length = topk_ids.numel() + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = cdiv(length, block_size) * block_size
    if topk_ids.numel() < num_experts:
        length = min(topk_ids.numel() * block_size, length)
    sorted_ids = torch.empty((length,), dtype=torch.int32, device=topk_ids.device)
    blocks = cdiv(length, block_size)
    expert_ids = torch.empty((blocks,), dtype=torch.int32, device=topk_ids.device)
    total = torch.empty((1), dtype=torch.int32, device=topk_ids.device)
    _vllm_custom_op(
        topk_ids,
        num_experts,
        block_size,
        sorted_ids,
        expert_ids,
        total,
        expert_map if ignore_invalid_experts else None,
    )
    if expert_map is not None and not ignore_invalid_experts:
        expert_ids = expert_map[expert_ids]
    return sorted_ids, expert_ids, total


def _vllm_custom_op(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    total: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter_idx: torch.Tensor | None = None,
) -> None:
    torch.ops._moe_C.moe_align_block_size(
        topk_ids, num_experts, block_size, sorted_ids, expert_ids, total, expert_map, scatter_idx
    )


@functools.cache
def arguments_of(op: Any) -> int:
    """How many arguments an operator takes: releases of vLLM before 0.33 have fewer."""
    return len(op.default._schema.arguments)


def sglang(work: Work, impl: str = SGLANG) -> Entry:
    """sglang-kernel's op.  Bin 0 is that of id -1, so it is told E + 1; the fill is its own (pad_sorted)."""
    _, _, experts, block_size = work.size
    n = work.routes
    length = n + (experts + 1) * (block_size - 1)
    if n < experts + 1:
        length = min(n * block_size, length)
    outs = [buffers_of(length, cdiv(length, block_size), work.device) for _ in work.inputs]
    scratch = [torch.full((experts + 2,), POISON, dtype=torch.int32, device=work.device) for _ in work.inputs]
    op = torch.ops.sgl_kernel.moe_align_block_size

    def call(slot: int) -> None:
        op(work.inputs[slot], experts + 1, block_size, *outs[slot], scratch[slot], True)

    return Entry(impl, call, lambda slot: bins_difference(*outs[slot], work.expected(slot), block_size), outs)


class Floors:
    """Kernels that do nothing, or the least that any such kernel must: load, barrier, store."""

    def __init__(self) -> None:
        from cuda.core import Device, LaunchConfig, Program, ProgramOptions, Stream, launch

        Device(torch.cuda.current_device()).set_current()
        major, minor = torch.cuda.get_device_capability()
        options = ProgramOptions(arch=f"sm_{major}{minor}", std="c++17")
        code = Program(FLOOR_KERNELS, "c++", options).compile("cubin")
        self._empty, self._chain = code.get_kernel("floor_empty"), code.get_kernel("floor_chain")
        self._launch, self._config = launch, LaunchConfig
        self._streams: dict[int, Any] = {}
        self._from_handle = Stream.from_handle
        self.bytes_per_us = self._bandwidth()

    def _stream(self) -> Any:
        handle = torch.cuda.current_stream().cuda_stream
        if handle not in self._streams:
            self._streams[handle] = self._from_handle(handle)
        return self._streams[handle]

    def _bandwidth(self) -> float:
        """Bytes read and written a microsecond by a device-to-device copy of 1 GiB."""
        source = torch.arange(2**28, dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        times = []
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return float(2 * source.numel() * 4 / statistics.median(times[2:]))

    def entries(self, work: Work) -> list[Entry]:
        threads = next(each for each in (32, 256, 1024) if each >= min(work.routes, 1024))
        outs = [torch.full((threads,), POISON, dtype=torch.int32, device=work.device) for _ in work.inputs]
        flat = [tensor.view(-1) for tensor in work.inputs]
        count = np.int32(flat[0].numel())
        one, block = self._config(grid=1, block=32), self._config(grid=1, block=threads)

        def empty(slot: int) -> None:
            self._launch(self._stream(), one, self._empty)

        def chain(slot: int) -> None:
            self._launch(self._stream(), block, self._chain, flat[slot].data_ptr(), outs[slot].data_ptr(), count)

        def check(slot: int) -> str | None:
            held = np.full(threads, -1)
            values = flat[slot].cpu().numpy()[:threads]
            held[: len(values)] = values
            return exact_difference({"out": outs[slot]}, {"out": np.roll(held, -1)})

        return [Entry("floor-empty", empty), Entry("floor-chain", chain, check, [[out] for out in outs])]

    def fewest_us(self, work: Work) -> float:
        """Every input read once, every output written once, over the bandwidth of a large copy."""
        elements = work.inputs[0].numel() + sum(work.capacity[:3])
        return elements * 4 / self.bytes_per_us


# ---- peers -------------------------------------------------------------------------------------------------------


def load_peers(folder: Path, scratch: Path) -> tuple[set[str], Path | None]:
    """The peers that could be loaded, and the path of SGLang's library; says in one line why one could not."""
    files = {VLLM: ("vllm_moe.so", "_moe_C"), SGLANG: ("sglang_ops.so", "sgl_kernel")}

    def unpack(name: str) -> Path | None:
        packed, target = folder / f"{name}.xz", scratch / name
        if (folder / name).exists():
            return folder / name
        if not packed.exists():
            return None
        with lzma.open(packed) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 2**20)
        return target

    with ThreadPoolExecutor() as pool:
        paths = dict(zip(files, pool.map(unpack, (name for name, _ in files.values())), strict=True))
    loaded = set()
    for impl, (name, namespace) in files.items():
        path = paths[impl]
        if path is None:
            say(f"{impl}: left out, no {name}.xz in {folder}")
            continue
        try:
            load_library(str(path))
            getattr(torch.ops, namespace).moe_align_block_size  # noqa: B018  raises if it is not there
            loaded.add(impl)
        except Exception as error:
            say(f"{impl}: left out, {first_line(error.__cause__ or error)}")
    return loaded, paths[SGLANG] if SGLANG in loaded else None


#: Of each peer: distributions that may bring it, its package, its library's pattern there, and its namespace.
INSTALLED = {
    "vllm": (("vllm",), "vllm", ("_moe_C_stable_libtorch*.so", "_moe_C*.so"), "_moe_C"),
    "sglang-kernel": (("sglang-kernel", "sgl-kernel"), "sgl_kernel", ("sm{sm}/common_ops*.so", "common_ops*.so"),
                      "sgl_kernel"),
}  # fmt: skip


def installed_peers() -> tuple[set[str], Path | None]:
    """As load_peers, from the packages of this environment, which are looked up and never imported.

    A peer is named by its distribution's version, such as ``vllm-0.33.0``.
    """
    loaded: set[str] = set()
    sglang_path = None
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    for kind, (distributions, package, patterns, namespace) in INSTALLED.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            say(f"{kind}: left out, {package} is not installed here")
            continue
        folder = Path(next(iter(spec.submodule_search_locations)))
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern.format(sm=10 * major + minor)))]
        if not paths:
            say(f"{kind}: left out, no {patterns[0].format(sm=10 * major + minor)} in {folder}")
            continue
        try:
            load_library(str(paths[0]))
            op = getattr(torch.ops, namespace).moe_align_block_size
            if not (6 <= arguments_of(op) <= 8 if kind == "vllm" else arguments_of(op) == 8):
                raise InvalidInput(f"expected the operator of a release that this benchmark knows, got {op.default}")
        except Exception as error:
            say(f"{kind}: left out, {first_line(error.__cause__ or error)}")
            continue
        loaded.add(f"{kind}-{version_of(distributions)}")
        if kind != "vllm":
            sglang_path = paths[0]
    return loaded, sglang_path


def version_of(distributions: Sequence[str]) -> str:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"


def peer_among(impls: Iterable[str], kind: str) -> str | None:
    """The implementation of that kind, whatever its version."""
    return next((impl for impl in sorted(impls) if impl.startswith(f"{kind}-")), None)


def is_peer(impl: str) -> bool:
    return impl.startswith(tuple(f"{kind}-" for kind in INSTALLED))


def load_library(path: str) -> None:
    """torch.ops.load_library, with NVRTC loaded beforehand where nothing else has done so: SGLang links to it."""
    try:
        torch.ops.load_library(path)
    except OSError:
        with contextlib.suppress(Exception):
            from cuda.pathfinder import load_nvidia_dynamic_lib

            load_nvidia_dynamic_lib("nvrtc")
        torch.ops.load_library(path)


def probe_sglang(library: str) -> int:
    """In a process of its own: whether sglang-kernel is right past the 65,536 routes that it was measured at."""
    load_library(library)
    generator = torch.Generator("cuda").manual_seed(0)
    for size in ((16384, 8, 256, 128), (65536, 8, 256, 128)):
        work = Work("align", "probe", size, [make_ids("uniform", size, generator) for _ in range(2)])
        entry = sglang(work)
        for slot in (0, 1):
            entry.call(slot)
            torch.cuda.synchronize()
            wrong = entry.check(slot) if entry.check else None
            if wrong:
                print(f"{work.routes} routes: {wrong}")
                return 1
    return 0


def most_routes_of_sglang(library: Path | None) -> int:
    measured = 65536
    if library is None:
        return measured
    command = [sys.executable, "-m", "moealign.bench", "--probe-sglang", str(library)]
    above = str(Path(__file__).resolve().parents[1])
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (above, os.environ.get("PYTHONPATH"))))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=found)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return 2**31
    lines = [] if done is None else (done.stdout + done.stderr).strip().splitlines()
    say(f"{SGLANG}: left out past {measured:,} routes: {lines[-1] if lines else 'no answer in 90 s'}")
    return measured


# ---- timing ------------------------------------------------------------------------------------------------------

Times = dict[str, list[float]]  # microseconds a call, by implementation


@dataclass
class Session:
    """What one run has: its machine, its rows, and what went wrong."""

    device: torch.device
    gpu: str
    backends: list[str]
    peers: set[str] = field(default_factory=set)
    sglang_most: int = 0
    floors: Floors | None = None
    quick: bool = False
    replays: int = REPLAYS
    slots: int = SLOTS
    started: float = field(default_factory=time.perf_counter)
    budget: float = 200.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ended: BaseException | None = None  # what cut the run short

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(20261123)

    def late(self) -> bool:
        return time.perf_counter() - self.started > self.budget

    def inputs(self, kind: str, size: Size) -> list[torch.Tensor]:
        return [make_ids(kind, size, self.generator) for _ in range(self.slots)]

    def sizes(self, sizes: Sequence[Size]) -> list[Size]:
        return [size for size in sizes if not self.quick or size[0] * size[1] in QUICK]

    def add(self, work: Work, impl: str, times: list[float]) -> None:
        self.rows.append(row_of(work.bench, work.case, work.routes, work.size, impl, times, self.gpu))

    def run(self, work: Work, entries: Sequence[Entry], timer: Callable[[Session, Sequence[Entry]], Times]) -> None:
        """Check each implementation, time those that are right, add their rows."""
        right = [entry for entry in entries if self.right(work, entry)]
        gc.collect()
        gc.disable()
        try:
            times = timer(self, right)
        finally:
            gc.enable()
        for entry in right:
            if entry.impl not in times:
                continue
            last = self.slots - 1
            after = entry.check(last) if entry.check and entry.buffers else None
            if after:
                self.report(work, entry, f"after the timed calls: {after}")
            else:
                self.add(work, entry.impl, times[entry.impl])

    def right(self, work: Work, entry: Entry) -> bool:
        """Whether two calls give what the oracle says, the second without waiting for the device."""
        cuda = self.device.type == "cuda"
        for slot in (0, 1):
            try:
                entry.poison(slot)
                if cuda and slot:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                entry.call(slot)
            except BackendUnavailable as refusal:
                say(f"{work.bench} {work.case} {entry.impl}: left out, {refusal}")
                return False
            except Exception as error:
                self.report(work, entry, first_line(error))
                return False
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            found = entry.check(slot) if entry.check else None
            if found:
                self.report(work, entry, found)
                return False
        entry.poison(self.slots - 1)
        return True

    def report(self, work: Work, entry: Entry, what: str) -> None:
        line = f"WRONG {work.bench} {work.case} {entry.impl}: {what}"
        self.wrong.append(line)
        say(line)


def capture(entry: Entry, slots: int) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls on the current stream, which must not be the default one."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for i in range(CALLS):
            entry.call(i % slots)
    finally:
        graph.capture_end()
    return graph


def time_graphs(session: Session, entries: Sequence[Entry]) -> Times:
    """Device time of a call in graph replay, the implementations taking turns."""
    pause = getattr(torch.cuda, "_sleep", None)  # holds the device while the host queues a replay and its events
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    turns: dict[str, int] = {}
    torch.cuda.synchronize()
    for entry in entries:
        try:
            graph = capture(entry, session.slots)
        except Exception as error:
            say(f"{entry.impl}: not captured, {first_line(error.__context__ or error)}")
            torch.cuda.synchronize()
            continue
        graph.replay()
        start, end = event_pair()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        graphs[entry.impl] = graph
        turns[entry.impl] = max(5, min(session.replays, int(ENOUGH_US / (start.elapsed_time(end) * 1e3))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {impl: [] for impl in graphs}
    for turn in range(session.replays):
        for impl, graph in graphs.items():
            if turn >= turns[impl]:
                continue
            start, end = event_pair()
            if pause is not None:
                pause(100_000)
            start.record()
            graph.replay()
            end.record()
            events[impl].append((start, end))
    torch.cuda.synchronize()
    return {impl: [a.elapsed_time(b) * 1e3 / CALLS for a, b in pairs] for impl, pairs in events.items()}


def event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def time_host(session: Session, entries: Sequence[Entry]) -> Times:
    """Host time of an eager call: loops of 100 calls, the device emptied between loops and never waited for inside."""
    times: Times = {entry.impl: [] for entry in entries}
    for turn in range(9 if session.quick else 31):
        for entry in entries:
            call = entry.call
            torch.cuda.synchronize()
            start = time.perf_counter()
            for i in range(100):
                call(i % session.slots)
            spent = time.perf_counter() - start
            if turn:
                times[entry.impl].append(spent * 1e4)  # a hundredth of it, in microseconds
    torch.cuda.synchronize()
    return times


def time_cpu(session: Session, entries: Sequence[Entry]) -> Times:
    """Wall time of a call on the CPU, in loops of at least two milliseconds."""
    times: Times = {}
    calls: dict[str, int] = {}
    for entry in entries:
        start = time.perf_counter()
        for slot in range(session.slots):
            entry.call(slot)
        calls[entry.impl] = max(session.slots, int(2e-3 * session.slots / (time.perf_counter() - start)))
        times[entry.impl] = []
    for _ in range(5 if session.quick else 15):
        for entry in entries:
            start = time.perf_counter()
            for i in range(calls[entry.impl]):
                entry.call(i % session.slots)
            times[entry.impl].append((time.perf_counter() - start) / calls[entry.impl] * 1e6)
    return times


# ---- the benches -------------------------------------------------------------------------------------------------


def peers_of(session: Session, work: Work) -> list[Entry]:
    entries = []
    name = peer_among(session.peers, "vllm")
    if name and work.size[2] <= 992 and not work.extras:
        entries.append(vllm(work, impl=name))
    name = peer_among(session.peers, "sglang-kernel")
    takes = work.size[2] <= 992 and not work.extras and not work.batched and work.expert_map is None
    if name and takes and work.routes <= session.sglang_most:
        entries.append(sglang(work, impl=name))
    return entries


def ours_of(session: Session, work: Work, often: set[int] = OFTEN, seldom: set[int] = SELDOM) -> list[Entry]:
    """CUDA in every case; the slower ones where their sets of routes say so, and as long as time is left."""
    entries = []
    for backend in session.backends:
        sometimes = {"triton": often, "reference": seldom}.get(backend)
        if sometimes is None or (work.routes in sometimes and not session.late()):
            entries.append(ours(backend, work))
    if work.routes in often and not session.late() and not (work.extras or work.dropped or work.batched):
        entries.append(torch_argsort(work))
    return entries


def bench_align(session: Session) -> None:
    for size in session.sizes(SIZES):
        work = Work("align", name_of(size), size, session.inputs("uniform", size))
        floors = session.floors.entries(work) if session.floors else []
        main = (8, 256)
        often, seldom = (OFTEN, SELDOM) if size[1:3] == main else (set(), set())
        session.run(work, [*ours_of(session, work, often, seldom), *peers_of(session, work), *floors], time_graphs)
        if session.floors:
            session.add(work, "floor-bytes", [session.floors.fewest_us(work)])


def bench_batched(session: Session) -> None:
    sizes = BATCHED_SIZES[:: len(BATCHED_SIZES) - 1] if session.quick else BATCHED_SIZES
    for batches, most, block_size in sizes:
        counts = [
            torch.randint(most + 1, (batches,), generator=session.generator, device=session.device, dtype=torch.int32)
            for _ in range(session.slots)
        ]
        case = f"nb{batches}-M{most}-B{block_size}"
        work = Work("batched", case, (batches, most, batches, block_size), counts, batched=True)
        floors = session.floors.entries(work) if session.floors else []
        entries = ours_of(session, work, often={work.routes}, seldom=set())
        session.run(work, [*entries, *peers_of(session, work), *floors], time_graphs)
        if session.floors:
            session.add(work, "floor-bytes", [session.floors.fewest_us(work)])


def bench_extras(session: Session) -> None:
    for size in session.sizes(EXTRAS_SIZES):
        inputs = session.inputs("uniform", size)
        for kind, extras in (("three", ()), ("all six", EXTRAS)):
            work = Work("align-extras", name_of(size, kind), size, inputs, extras=extras)
            entries = ours_of(session, work, often={8192}, seldom=set())
            session.run(work, [entry for entry in entries if entry.impl != ARGSORT], time_graphs)


def bench_skew(session: Session) -> None:
    for size in session.sizes(SKEW_SIZES):
        for kind in ("uniform", "one-expert", "zipf", "half-minus-one"):
            dropped = kind == "half-minus-one"
            work = Work("align-skew", name_of(size, kind), size, session.inputs(kind, size), dropped=dropped)
            entries = ours_of(session, work, often=set(), seldom=set())
            session.run(work, [*entries, *peers_of(session, work)], time_graphs)


def bench_map(session: Session) -> None:
    """Expert parallelism over eight ranks: this one holds every eighth expert."""
    for size in session.sizes(MAP_SIZES):
        experts = size[2]
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        expert_map[::8] = torch.arange(len(expert_map[::8]), dtype=torch.int32)
        inputs = session.inputs("uniform", size)
        for kind, ignore in (("all binned", False), ("ignored", True)):
            work = Work(
                "align-map",
                name_of(size, kind),
                size,
                inputs,
                expert_map=expert_map.to(session.device),
                ignore=ignore,
                dropped=True,
            )
            entries = ours_of(session, work, often=set(), seldom=set())
            session.run(work, [*entries, *peers_of(session, work)], time_graphs)


def bench_large_e(session: Session) -> None:
    sizes = LARGE_E[:: len(LARGE_E) - 1] if session.quick else LARGE_E
    for size in sizes:
        work = Work("large-e", name_of(size), size, session.inputs("uniform", size))
        some = {work.routes} if size[2] in (1024, 65536) else set()
        session.run(work, ours_of(session, work, often=some, seldom=set()), time_graphs)


def bench_host(session: Session) -> None:
    """``drop-in``: vLLM's signature, which allocates its results; ``out``: into buffers that exist, the op alone."""
    for size in HOST_SIZES[1:2] if session.quick else HOST_SIZES:
        inputs = session.inputs("uniform", size)
        work = Work("eager-host", name_of(size, "drop-in"), size, inputs)
        entries = [ours(backend, work, drop_in=True) for backend in session.backends if backend != "reference"]
        name = peer_among(session.peers, "vllm")
        if name and arguments_of(torch.ops._moe_C.moe_align_block_size) == 8:  # what our copy of its wrapper calls
            entries.append(vllm(work, drop_in=True, impl=name))
        session.run(work, [*entries, torch_argsort(work)], time_host)
        work = Work("eager-host", name_of(size, "out"), size, inputs)
        entries = [ours(backend, work) for backend in session.backends if backend != "reference"]
        floors = session.floors.entries(work)[:1] if session.floors else []
        session.run(work, [*entries, *peers_of(session, work), *floors], time_host)
        work = Work("eager-host", name_of(size, "all six"), size, inputs, extras=EXTRAS)
        session.run(work, [ours(backend, work) for backend in session.backends if backend == "cuda"], time_host)


def bench_cpu(session: Session) -> None:
    for size in session.sizes(CPU_SIZES):
        work = Work("align", name_of(size), size, session.inputs("uniform", size))
        entries = [ours(backend, work) for backend in session.backends]
        session.run(work, [*entries, torch_argsort(work)], time_cpu)


RUN: dict[str, Callable[[Session], None]] = {
    "align": bench_align,
    "batched": bench_batched,
    "align-extras": bench_extras,
    "align-skew": bench_skew,
    "align-map": bench_map,
    "large-e": bench_large_e,
    "eager-host": bench_host,
}


# ---- reporting ---------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def in_order(impls: Iterable[str]) -> list[str]:
    """Ours, the peers, torch's formulation, the floors; what is none of these comes last."""
    known = [*OURS, *INSTALLED, ARGSORT, *FLOORS]

    def place(impl: str) -> tuple[int, str]:
        kind = next((kind for kind in INSTALLED if impl.startswith(f"{kind}-")), impl)
        return (known.index(kind) if kind in known else len(known), impl)

    return sorted(set(impls), key=place)


def short_name(impl: str) -> str:
    kind = next((kind for kind in INSTALLED if impl.startswith(f"{kind}-")), None)
    return {"vllm": "vllm", "sglang-kernel": "sglang", None: impl.replace("moealign-", "").replace("torch-", "")}[kind]


def pivot(rows: Sequence[dict[str, Any]], bench: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of one bench: a line a case, a column an implementation, and what each is compared to."""
    cases: dict[str, dict[str, float]] = {}
    routes: dict[str, str] = {}
    for row in rows:
        if row["bench"] == bench:
            cases.setdefault(row["case"], {})[row["impl"]] = float(row["median_us"])
            routes[row["case"]] = f"{int(row['routes']):,}"
    impls = in_order(impl for times in cases.values() for impl in times)
    lines = []
    for case, times in cases.items():
        mine = times.get("moealign-cuda", times.get("moealign-cpu"))
        best = min((spent for impl, spent in times.items() if is_peer(impl)), default=None)
        base = None
        if bench in BASE:
            base = cases.get(f"{case.split(' ')[0]} {BASE[bench]}", {}).get("moealign-cuda")
        lines.append(
            [
                case,
                routes[case],
                *(f"{times[impl]:.2f}" if impl in times else "-" for impl in impls),
                f"{best / mine:.2f}" if best and mine else "-",
                *([f"{mine / base:.2f}" if base and mine else "-"] if bench in BASE else []),
            ]
        )
    header = ["case", "routes", *(short_name(impl) for impl in impls), "x peer"]
    return header + ([f"of {BASE[bench]}"] if bench in BASE else []), lines


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    """Microseconds by case and implementation; the main bench last, where a cut output still shows it."""
    benches = [bench for bench in reversed(BENCHES) if any(row["bench"] == bench for row in rows)]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for bench in benches:
            header, lines = pivot(rows, bench)
            widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
            say(f"\n{bench}")
            for first, *others in [header, *lines]:
                cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                say("  ".join([first.ljust(widths[0]), *cells]))
        return
    console = Console(width=150, color_system=None, highlight=False, soft_wrap=True)
    for bench in benches:
        header, lines = pivot(rows, bench)
        table = Table(title=bench, title_justify="left", box=box.ASCII2, show_edge=False, padding=(0, 0))
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    say(f"{len(rows)} rows in {path}")


def row_of(
    bench: str, case: str, routes: int, size: Size, impl: str, times: Sequence[float], gpu: str, digits: int = 3
) -> dict[str, Any]:
    """What `COLUMNS` name, of the `times` of one implementation in one case, in microseconds."""
    _, top_k, num_experts, block_size = size
    return {
        "bench": bench,
        "case": case,
        "routes": routes,
        "num_experts": num_experts,
        "top_k": top_k,
        "block_size": block_size,
        "impl": impl,
        "median_us": f"{statistics.median(times):.{digits}f}",
        "min_us": f"{min(times):.{digits}f}",
        "max_us": f"{max(times):.{digits}f}",
        "gpu": gpu,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def cases_of(rows: Iterable[dict[str, Any]], bench: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """For each case of a bench its first row, for the sizes, and the median of each implementation in microseconds."""
    cases: dict[tuple[str, ...], tuple[dict[str, Any], dict[str, float]]] = {}
    for row in rows:
        if row["bench"] == bench:
            key = tuple(str(row[name]) for name in ("case", "routes", "num_experts", "top_k", "block_size"))
            cases.setdefault(key, (row, {}))[1][row["impl"]] = float(row["median_us"])
    return list(cases.values())


def microseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


#: Of the figure, by the beginning of an implementation's name: label, colour, dashes.
LINES = {
    "torch-argsort": ("torch argsort", "#9a9a9a", "-"),
    "sglang-kernel": ("sglang-kernel", "#d98c2b", "-"),
    "vllm": ("vLLM", "#b5453c", "-"),
    "moealign-reference": ("moealign, reference", "#8fbf8f", "-"),
    "moealign-triton": ("moealign, Triton", "#7aa6d6", "-"),
    "moealign-cpu": ("moealign", "#1f5fa8", "-"),
    "moealign-cuda": ("moealign", "#1f5fa8", "-"),
    "floor-chain": ("load, barrier, store: one CTA", "#555555", "--"),
    "floor-bytes": ("bytes moved / bandwidth", "#555555", ":"),
}


def line_of(impl: str) -> tuple[str, str, str] | None:
    """Label, colour and dashes of an implementation; a peer's label carries its version."""
    for start, (label, colour, dashes) in LINES.items():
        if impl == start or (start in INSTALLED and impl.startswith(f"{start}-")):
            return f"{label} {impl[len(start) + 1 :]}".strip(), colour, dashes
    return None


def draw(rows: Sequence[dict[str, Any]], target: Path, drawn: Sequence[str] = ()) -> None:
    """Time over routes at 256 experts, top-8, and the batched cases if there are any; the ending decides the format.

    `drawn` names the implementations to draw, none meaning all that :data:`LINES` knows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [
        (row, times)
        for row, times in cases_of(rows, "align")
        if (int(row["num_experts"]), int(row["top_k"])) == (256, 8)
    ]
    cases.sort(key=lambda case: int(case[0]["routes"]))
    batched = cases_of(rows, "batched")
    first = rows[0]
    on_cpu = first["gpu"] == "cpu"
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "moealign"}
    with plt.rc_context(style):
        figure, (axes,) = plt.subplots(
            1,
            2 if batched else 1,
            figsize=(11 if batched else 7, 4.6),
            squeeze=False,
            width_ratios=(3, 2) if batched else (1,),
            layout="constrained",
        )
        left = axes[0]
        for start in LINES:
            for impl in sorted({impl for _, times in cases for impl in times}):
                if not (impl == start or impl.startswith(f"{start}-")) or (drawn and impl not in drawn):
                    continue
                line = line_of(impl)
                if line is None:
                    continue
                label, colour, dashes = line
                points = [(int(row["routes"]), times[impl]) for row, times in cases if impl in times]
                left.plot(
                    *zip(*points, strict=True),
                    dashes,
                    color=colour,
                    label=label,
                    linewidth=2.2 if impl in ("moealign-cuda", "moealign-cpu") else 1.2,
                    marker=None if impl.startswith("floor") else "o",
                    markersize=3.5,
                )
        left.set(yscale="log", xlabel="routes (tokens x 8), 256 experts", ylabel="microseconds a call")
        left.set_xscale("log", base=4)
        left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if not on_cpu:
            left.set_ylim(bottom=0.5)
        left.grid(alpha=0.25)
        figure.legend(frameon=False, loc="outside lower center", ncols=4 if batched else 3)
        left.set_title("moe_align_block_size", loc="left")
        if batched:
            _draw_batched(axes[1], batched)
        how = "wall time" if on_cpu else "CUDA graph replay"
        title = f"{how}, {first['gpu'].upper()}, torch {first['torch']}, {first['date']}"
        figure.suptitle(title, fontsize=9, color="#555555")
        target.parent.mkdir(parents=True, exist_ok=True)
        same_bytes = {"Date": None} if target.suffix == ".svg" else {"Software": None}
        figure.savefig(target, dpi=160, metadata=same_bytes)
        plt.close(figure)


def _draw_batched(axis: Any, batched: Sequence[tuple[dict[str, Any], dict[str, float]]]) -> None:
    """Bars of the batched cases: vLLM's, if it was there, and ours."""
    impls = sorted({impl for _, times in batched for impl in times})
    shown = [impl for impl in (peer_among(impls, "vllm"), "moealign-cuda") if impl]
    places = range(len(batched))
    for i, impl in enumerate(shown):
        line = line_of(impl)
        assert line is not None
        shift = 0.4 * i - 0.2 * (len(shown) - 1)
        bars = axis.barh(
            [place + shift for place in places],
            [times.get(impl, 0) for _, times in batched],
            0.38,
            color=line[1],
            label=line[0],
        )
        axis.bar_label(bars, [microseconds(times.get(impl)) for _, times in batched], padding=2, fontsize=8)
    axis.set_yticks(list(places), [f"{row['num_experts']} x {row['top_k']}, {row['block_size']}" for row, _ in batched])
    axis.set_xscale("log")
    axis.set_xlim(left=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set(xlabel="microseconds a call", ylabel="batches x rows, block")
    axis.invert_yaxis()
    axis.set_title("batched_moe_align_block_size", loc="left")


def gpu_slug(name: str) -> str:
    """``NVIDIA H200`` -> ``h200``"""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "").replace("geforce", "")).strip("-")


# ---- the program -------------------------------------------------------------------------------------------------


def available(names: Sequence[str]) -> Iterator[str]:
    """Those of `names` that run on this machine; says of the others why not."""
    for name in names:
        try:
            reason = backends()[name]
        except Exception as error:
            reason = first_line(error)
        if reason is None:
            yield name
        else:
            say(f"moealign-{name}: left out, {reason}")


def measure(
    *,
    device: str | None = None,
    benches: Sequence[str] = (),
    quick: bool = False,
    names: Sequence[str] = (),
    peers: Path | None = None,
    budget: float = 200.0,
) -> Session:
    """Run the benchmark and keep what it measured, whatever ends it; :func:`publish` shows and writes it.

    Args:
        device: ``cuda`` or ``cpu``; by default ``cuda`` where torch can use a GPU.
        benches: of :data:`BENCHES`, none meaning all of them; on a CPU there is only ``align``.
        quick: a few sizes, fewer replays.
        names: of our backends; none meaning all that run on the device.
        peers: folder of the peers' libraries; None takes what is installed.
        budget: seconds after which only the fast implementations are timed.

    Raises:
        InvalidInput: ``cuda`` without a GPU that torch can use.
    """
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise InvalidInput("expected a GPU that torch can use, found none")
    place = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    slug = gpu_slug(torch.cuda.get_device_name()) if on_gpu else "cpu"
    names = names or (["cuda", "triton", "reference"] if on_gpu else ["cpu", "reference"])
    session = Session(place, slug, list(available(names)), quick=quick, budget=budget)
    session.replays = 20 if quick else REPLAYS
    session.slots = SLOTS if on_gpu else 5
    wanted = [bench for bench in BENCHES if not benches or bench in benches] if on_gpu else ["align"]

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        if on_gpu:
            session.peers, library = installed_peers() if peers is None else load_peers(peers, Path(scratch))
            session.sglang_most = most_routes_of_sglang(library)
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            try:
                session.floors = Floors()
                say(f"copy bandwidth: {session.floors.bytes_per_us / 1e6:.2f} TB/s read and written")
            except Exception as error:
                say(f"floors: left out, {first_line(error)}")
        gc.freeze()  # what is loaded by now need not be looked through before every case
        try:
            for bench in wanted:
                since = time.perf_counter()
                (RUN[bench] if on_gpu else bench_cpu)(session)
                say(f"{bench}: {time.perf_counter() - since:.1f} s")
        except BaseException as error:
            session.ended = error  # what was measured is kept; the caller publishes it and raises this
        finally:
            gc.unfreeze()
    return session


def publish(session: Session, out: Path | None, figure: Path | None = None) -> int:
    """Show the tables, write the CSV and the figure where paths are given; 1 if something came out wrong, else 0."""
    print_tables(session.rows)
    say(f"{session.gpu}, torch {torch.__version__}, {time.perf_counter() - session.started:.0f} s; microseconds a call")
    if out is not None:
        write_csv(session.rows, out)
    if figure is not None and session.rows:
        try:
            draw(session.rows, figure)
            say(f"{figure}: drawn")
        except ImportError as error:
            say(f"{figure}: not drawn, {error.name} is not installed; pip install 'moealign[report]' brings it")
    if session.wrong:
        say(f"{len(session.wrong)} WRONG, the first of them:")
    for line in session.wrong[:10]:
        say(line)
    return 1 if session.wrong else 0


def parse(arguments: Sequence[str] | None, peers: Path | None = None, device: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--bench", action="append", choices=BENCHES, help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a few sizes, fewer replays")
    parser.add_argument("--backends", help="of ours, with commas between (default: all that run on the device)")
    parser.add_argument("--peers", type=Path, default=peers, help="folder of the peers' libraries")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--figure", type=Path, help="picture to draw, .png or .svg")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which only the fast ones are timed")
    parser.add_argument("--probe-sglang", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str] | None = None,
    *,
    peers: Path | None = None,
    device: str | None = None,
    tracked: Path | None = None,
    program: str = "moealign.bench",
) -> int:
    """The command line of ``python -m moealign.bench`` and, with its own defaults, of ``benchmarks/align.py``.

    `tracked` is the folder where a whole run on a GPU leaves ``align_<gpu>.csv`` by itself.
    """
    args = parse(arguments, peers, device)
    if args.device == "cuda" and not torch.cuda.is_available():
        hint = "; benchmarks/align_cpu.py is for the CPU" if tracked else "; --device cpu needs none"
        say(f"{program}: expected a GPU that torch can use, found none{hint}")
        return 2
    if args.probe_sglang:
        return probe_sglang(args.probe_sglang)
    names = args.backends.split(",") if args.backends else []
    session = measure(
        device=args.device,
        benches=args.bench or (),
        quick=args.quick,
        names=names,
        peers=args.peers,
        budget=args.budget,
    )
    whole = session.device.type == "cuda" and not (args.quick or args.bench or args.backends or session.ended)
    out = args.out or (tracked / f"align_{session.gpu}.csv" if tracked and whole else None)
    if tracked and out is None:
        say("a part of the benchmark: the tracked CSV stays as it is (--out writes another)")
    status = publish(session, out, args.figure)
    if session.ended:
        raise session.ended
    return status


if __name__ == "__main__":
    sys.exit(main())
