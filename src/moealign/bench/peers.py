"""The peers: vLLM's and SGLang's released operators, from a folder of libraries or from installed packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidInput
from ..layout import cdiv
from .candidates import POISON, Candidate, bins_difference
from .cases import Case, make_ids
from .names import SGLANG, VLLM
from .progress import first_line, log

MAX_EXPERTS = 992  # of both peers
SGLANG_ROUTES = 65536  # sglang-kernel is known to be right up to here; probe_sglang tries more

#: For each peer: the distributions that may contain it, its package, patterns of its library there, its namespace.
INSTALLED = {
    "vllm": (("vllm",), "vllm", ("_moe_C_stable_libtorch*.so", "_moe_C*.so"), "_moe_C"),
    "sglang-kernel": (("sglang-kernel", "sgl-kernel"), "sgl_kernel", ("sm{sm}/common_ops*.so", "common_ops*.so"),
                      "sgl_kernel"),
}  # fmt: skip


# ---- loading -----------------------------------------------------------------------------------------------------


def load_peers(folder: Path, scratch: Path) -> tuple[set[str], Path | None]:
    """Load the peers from `folder`, unpacking into `scratch`; log one line for each that cannot be loaded.

    Returns:
        The names of the loaded peers, and the path of SGLang's library if it is one of them.
    """
    files = {VLLM: ("vllm_moe.so", "_moe_C"), SGLANG: ("sglang_ops.so", "sgl_kernel")}

    def unpack(name: str) -> Path | None:
        packed, target = folder / f"{name}.xz", scratch / name
        if (folder / name).exists():
            return folder / name
        if not packed.exists():
            return None
        with lzma.open(packed) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        return target

    with ThreadPoolExecutor() as pool:
        paths = dict(zip(files, pool.map(unpack, (name for name, _ in files.values())), strict=True))
    loaded = set()
    for impl, (name, namespace) in files.items():
        path = paths[impl]
        if path is None:
            log(f"{impl}: left out, no {name}.xz in {folder}")
            continue
        try:
            load_library(str(path))
            getattr(torch.ops, namespace).moe_align_block_size  # noqa: B018  raises if it is missing
            loaded.add(impl)
        except Exception as error:
            log(f"{impl}: left out, {first_line(error.__cause__ or error)}")
    return loaded, paths[SGLANG] if SGLANG in loaded else None


def installed_peers() -> tuple[set[str], Path | None]:
    """Load the peers from the packages of this environment, without importing the packages.

    Returns:
        The names of the loaded peers, with the versions of their distributions, such as ``vllm-0.33.0``, and the path
        of SGLang's library if it is one of them.
    """
    loaded: set[str] = set()
    sglang_path = None
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    for kind, (distributions, package, patterns, namespace) in INSTALLED.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            log(f"{kind}: left out, {package} is not installed here")
            continue
        folder = Path(next(iter(spec.submodule_search_locations)))
        paths = [path for pattern in patterns for path in sorted(folder.glob(pattern.format(sm=10 * major + minor)))]
        if not paths:
            log(f"{kind}: left out, no {patterns[0].format(sm=10 * major + minor)} in {folder}")
            continue
        try:
            load_library(str(paths[0]))
            op = getattr(torch.ops, namespace).moe_align_block_size
            if not (6 <= argument_count(op) <= 8 if kind == "vllm" else argument_count(op) == 8):
                raise InvalidInput(f"expected the operator of a release that this benchmark knows, got {op.default}")
        except Exception as error:
            log(f"{kind}: left out, {first_line(error.__cause__ or error)}")
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


def load_library(path: str) -> None:
    """torch.ops.load_library, once more with NVRTC if that fails: SGLang's library needs it and does not load it."""
    try:
        torch.ops.load_library(path)
    except OSError:
        with contextlib.suppress(Exception):
            from cuda.pathfinder import load_nvidia_dynamic_lib

            load_nvidia_dynamic_lib("nvrtc")
        torch.ops.load_library(path)


@functools.cache
def argument_count(op: Any) -> int:
    """How many arguments an operator takes: releases of vLLM before 0.33 have fewer."""
    return len(op.default._schema.arguments)


# ---- candidates --------------------------------------------------------------------------------------------------

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def buffers_of(length: int, blocks: int, device: torch.device) -> Outputs:
    """A peer's three outputs.  SGLang fills the first in pieces of 16 bytes, so its buffer is rounded up."""

    def full(size: int) -> torch.Tensor:
        return torch.full((size,), POISON, dtype=torch.int32, device=device)

    return full(cdiv(length, 4) * 4)[:length], full(blocks), full(1)


def vllm_candidate(case: Case, drop_in: bool = False, impl: str = VLLM) -> Candidate:
    """vLLM's operator, which writes every element of its three outputs, or with `drop_in` its wrapper.

    Unless the case ignores invalid experts, the expert map is applied afterwards by indexing, as in vLLM's wrapper.
    """
    _, top_k, experts, block_size = case.size
    inputs, expert_map = case.inputs, case.expert_map
    if drop_in:
        results: dict[int, Outputs] = {}

        def call_wrapper(slot: int) -> None:
            results[0] = vllm_wrapper(inputs[slot], block_size, experts)

        return Candidate(impl, call_wrapper, lambda slot: bins_difference(*results[0], case.expected(slot), block_size))

    outs = [buffers_of(case.capacity.sorted_token_ids, case.capacity.expert_ids, case.device) for _ in inputs]
    expert_ids = [out[1] for out in outs]
    ops = torch.ops._moe_C
    optional = 0 if case.batched else argument_count(ops.moe_align_block_size) - 6  # the expert map, then scatter_idx
    unmapped, mapped = (None, None)[:optional], (expert_map, None)[:optional]
    if case.batched:

        def call(slot: int) -> None:
            ops.batched_moe_align_block_size(top_k, block_size, inputs[slot], *outs[slot])
    elif expert_map is not None and not case.ignore:

        def call(slot: int) -> None:
            ops.moe_align_block_size(inputs[slot], experts, block_size, *outs[slot], *unmapped)
            expert_ids[slot] = expert_map[outs[slot][1]]
    else:

        def call(slot: int) -> None:
            ops.moe_align_block_size(inputs[slot], experts, block_size, *outs[slot], *mapped)

    def check(slot: int) -> str | None:
        return bins_difference(outs[slot][0], expert_ids[slot], outs[slot][2], case.expected(slot), block_size)

    return Candidate(impl, call, check, outs)


def vllm_wrapper(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> Outputs:
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


def sglang_candidate(case: Case, impl: str = SGLANG) -> Candidate:
    """sglang-kernel's operator.  Its bin 0 is for id -1, so it gets E + 1; it fills the padding (pad_sorted)."""
    _, _, experts, block_size = case.size
    n = case.routes
    length = n + (experts + 1) * (block_size - 1)
    if n < experts + 1:
        length = min(n * block_size, length)
    outs = [buffers_of(length, cdiv(length, block_size), case.device) for _ in case.inputs]
    scratch = [torch.full((experts + 2,), POISON, dtype=torch.int32, device=case.device) for _ in case.inputs]
    op = torch.ops.sgl_kernel.moe_align_block_size

    def call(slot: int) -> None:
        op(case.inputs[slot], experts + 1, block_size, *outs[slot], scratch[slot], True)

    return Candidate(impl, call, lambda slot: bins_difference(*outs[slot], case.expected(slot), block_size), outs)


# ---- SGLang beyond 65,536 routes ---------------------------------------------------------------------------------


def probe_sglang(library: str) -> int:
    """In a process of its own: 0 if sglang-kernel is right beyond :data:`SGLANG_ROUTES`, else 1."""
    load_library(library)
    generator = torch.Generator("cuda").manual_seed(0)
    for size in ((16384, 8, 256, 128), (65536, 8, 256, 128)):
        case = Case("align", "probe", size, [make_ids("uniform", size, generator) for _ in range(2)])
        candidate = sglang_candidate(case)
        for slot in (0, 1):
            candidate.call(slot)
            torch.cuda.synchronize()
            wrong = candidate.check(slot) if candidate.check else None
            if wrong:
                print(f"{case.routes} routes: {wrong}")
                return 1
    return 0


def max_routes_of_sglang(library: Path | None) -> int:
    """How many routes sglang-kernel may be timed at; a separate process tries, as a failure may end it."""
    if library is None:
        return SGLANG_ROUTES
    command = [sys.executable, "-m", "moealign.bench", "--probe-sglang", str(library)]
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=90, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return 2**31
    lines = [] if done is None else (done.stdout + done.stderr).strip().splitlines()
    log(f"{SGLANG}: left out past {SGLANG_ROUTES:,} routes: {lines[-1] if lines else 'no answer in 90 s'}")
    return SGLANG_ROUTES
