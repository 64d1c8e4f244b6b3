"""What can be tested of the CUDA backend without a GPU: every specialisation compiles, and the cache is safe."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import multiprocessing
import os
import random
import re
import struct
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers import EVERY_TARGET, compiled_here, run_python
from sass import disassembler, touched_before_the_wait

import moealign
from moealign.backend import cache
from moealign.calls.checks import check_align, check_route
from moealign.layout import REQUIRED, BlockLayout
from moealign.problem import AlignProblem

cuda = importlib.import_module("moealign.backend.cuda")
compile_ = importlib.import_module("moealign.backend.cuda.compile")
launch = importlib.import_module("moealign.backend.cuda.launch")


def missing() -> str | None:
    try:
        if importlib.util.find_spec("cuda.core") is None:
            return "cuda.core is not installed"
        compile_.compiler_version()
    except Exception as error:
        return f"NVRTC cannot be loaded: {error}"
    return None


needs_nvrtc = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
COMPILED = ARCHITECTURES if EVERY_TARGET else ("sm_90",)
SMALL = 'extern "C" __global__ void k(long long* a) { a[threadIdx.x] = VALUE; }'


def specialisations(major: int) -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
    kernels = []
    for module in ("batched", "align", "route"):
        kernels += importlib.import_module(f"moealign.backend.cuda.{module}").specialisations(major)
    return list(dict.fromkeys(kernels))


def compiled_for(arch: str) -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """Every specialisation is compiled for sm_90 and for one other: where sm_90 does not have it, for that alone."""
    kernels, measured = specialisations(int(arch[3:-1])), specialisations(9)
    if arch == "sm_90":
        return kernels
    others = {other: specialisations(int(other[3:-1])) for other in ARCHITECTURES if other != "sm_90"}
    chance, mine = random.Random(0), []  # not in turn: the options of a kernel come in turn too
    for kernel in measured:
        if arch == chance.choice([other for other in others if kernel in others[other]]):
            mine.append(kernel)
    return mine + [kernel for kernel in kernels if kernel not in measured]


@functools.cache
def built(file: str, name: str, defines: tuple[tuple[str, int], ...], arch: str = "sm_90") -> bytes:
    """The cubin of a kernel, compiled once for all tests."""
    return compile_.build(compile_.source(file), name, defines, arch)


class Resources(NamedTuple):
    """What a kernel needs, read from its cubin's ELF file.  Spilled registers live on the stack."""

    registers: int
    stack: int  # bytes
    parameters: list[int]  # bytes of each


def resources(cubin: bytes, kernel: str) -> Resources:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, entries, names_at = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_size) for i in range(entries)]
    by_name = {}
    for section in sections:
        start = sections[names_at][4] + section[0]
        by_name[cubin[start : cubin.index(b"\0", start)].decode()] = section

    def attributes(name: str) -> Iterator[tuple[int, bytes]]:
        at, end = by_name[name][4], by_name[name][4] + by_name[name][5]
        while at < end:
            form, attribute, size = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # `size` bytes follow; in other forms `size` is the value
                yield attribute, cubin[at : at + size]
                at += size

    symbol, registers = by_name[f".text.{kernel}"][7] & 0xFFFFFF, by_name[f".text.{kernel}"][7] >> 24
    stack = None
    for attribute, value in attributes(".nv.info"):
        if attribute in (0x11, 0x2F):  # frame size; registers, if the section header has none
            which, number = struct.unpack("<II", value)
            if which == symbol and attribute == 0x11:
                stack = number
            elif which == symbol:
                registers = number
    # EIATTR_KPARAM_INFO: index, ordinal, offset, and flags whose upper bits are the size.
    parameters = [
        struct.unpack("<IHHI", value) for attribute, value in attributes(f".nv.info.{kernel}") if attribute == 0x17
    ]
    assert stack is not None
    return Resources(registers, stack, [flags >> 18 for _, _, _, flags in parameters])


def threads_of(defines: tuple[tuple[str, int], ...]) -> int:
    return dict(defines).get("THREADS", 1024)


@needs_nvrtc
@pytest.mark.targets
@pytest.mark.parametrize("arch", COMPILED)
def test_every_specialisation_compiles_and_spills_nothing(arch):
    # A kernel of 1,024 threads keeps 64-bit ids and every extra in 64 registers.  For a router of 1,024 or more experts
    # the compiler may use a register or two fewer than it could, so that one more block fits on a multiprocessor.
    few = 16  # bytes
    wrong = []
    for file, name, defines in compiled_here(compiled_for(arch), lambda each: each[:2]):
        needs = resources(built(file, name, defines, arch), name)
        threads = threads_of(defines)
        tight = threads == 1024 or (file == "router.cu" and dict(defines)["EXPERTS"] >= 1024)
        if needs.stack > few * tight or not 0 < needs.registers <= min(255, 65536 // threads):
            wrong.append((file, name, defines, needs))
        if set(needs.parameters) != {8}:  # as Kernel.launch passes them
            wrong.append((file, name, defines, needs))
    assert wrong == []


def launched_early() -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
    return [kernel for kernel in specialisations(9) if ("PDL_WAIT", 1) in kernel[2]]


@needs_nvrtc
@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: Triton is not installed")
def test_no_global_memory_is_accessed_before_the_wait():
    """Checked in machine code: the compiler may move loads of what it takes for constant ahead of the wait."""
    kernels = launched_early()
    assert {name for _, name, _ in kernels} == {"pairwise", "independent"}
    for file, name, defines in kernels:
        cubin = built(file, name, defines)
        assert touched_before_the_wait(cubin) == [], defines


@needs_nvrtc
@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: Triton is not installed")
def test_a_load_that_moves_ahead_of_the_wait_is_detected():
    wait = 'asm volatile("griddepcontrol.wait;"'

    def moved(file: str) -> str:
        source = compile_.source(file)
        assert source.count(f'{wait} : "+l"(at) :: "memory");') == 1
        return source.replace(f'{wait} : "+l"(at) :: "memory");', f'{wait} ::: "memory");')

    assert any(
        touched_before_the_wait(compile_.build(moved(file), name, defines, "sm_90"))
        for file, name, defines in launched_early()
    )


def refusal_of(file: str, name: str, defines: tuple[tuple[str, int], ...], **changed: int) -> str:
    """NVRTC's log for the kernel with some macros changed; "" if it compiles, to PTX: assertions need no more."""
    from cuda.bindings import nvrtc

    assert set(changed) <= set(dict(defines))
    macros = [f"-D{key}={value}" for key, value in {**dict(defines), **changed}.items()]
    options = [each.encode() for each in ("-arch=compute_90", f"-std={compile_._STANDARD}", *macros)]
    failed, program = nvrtc.nvrtcCreateProgram(compile_.source(file).encode(), name.encode(), 0, [], [])
    assert not failed
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    return log.decode() if failed else ""


@needs_nvrtc
@pytest.mark.parametrize("experts", [1, 2, 61, 257, 1000, 1025, 2049, 5000, 20000, 40000])
def test_kernels_get_the_memory_that_they_take_and_no_less(experts):
    """Python and the kernels compute the sizes separately; the compiler refuses a smaller one."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    seen = set()
    for routes, clusters in ((300, 8), (4000, 8), (12000, 1), (12000, 8), (40000, 8), (2**21, 8)):
        problem = AlignProblem("align", torch.device("cuda"), torch.int32, routes, 1, experts, 16)
        path = align_.path_of(problem, 132, 227 * 1024, clusters)
        kernel = (path.file, path.name, align_.defines_of(problem, path, vector_in=False))
        if kernel in seen:
            continue
        seen.add(kernel)
        assert refusal_of(*kernel) == ""
        macros = dict(kernel[2])
        for name, step in (
            ("SHARED_BYTES", 16),
            *((f"SCRATCH_{each}", 1) for each in ("PER_CTA", "PER_ROUTE", "FIXED")),
        ):
            if macros[name]:
                assert "static assertion failed" in refusal_of(*kernel, **{name: macros[name] - step})


@needs_nvrtc
@pytest.mark.parametrize(
    ("routes", "changed", "message"),
    [
        (64, {"THREADS": 100}, "whole warps"),
        (64, {"EXPERTS": 2**28 + 1}, "counted in 32 bits"),
        (256, {"THREADS": 128}, "a thread per route"),
        (256, {"WORDS": 6}, "within a warp"),
        (2000, {"WORDS": 32}, "a thread per route of my chunk"),
        (2000, {"STEPS": 128}, "counted in 16 bits"),
        (40000, {"STEPS": 64}, "added packed"),
        (40000, {"EXPERTS": 65537}, "a bin fits local_bin"),
        (40000, {"GRID_CTAS": 1}, "every row of the table"),
        (2**21, {"STEPS": 256}, "fit 16 bits"),
        (2**21, {"EXPERTS": 65535}, "that of a dropped route"),
    ],
)
def test_a_size_that_a_kernel_cannot_count_is_refused_by_the_compiler(routes, changed, message):
    align_ = sys.modules["moealign.backend.cuda.align"]
    problem = AlignProblem("align", torch.device("cuda"), torch.int32, routes, 1, 256, 16)
    path = align_.path_of(problem, 132, 227 * 1024, 8)
    assert message in refusal_of(path.file, path.name, align_.defines_of(problem, path), **changed)


@needs_nvrtc
def test_the_reader_of_resources_sees_a_stack_and_a_short_parameter():
    source = """extern "C" __global__ void k(long long* a, int b) {
      int local[64]; for (int i = 0; i < 64; ++i) local[i * b & 63] = a[i]; a[0] = local[a[b] & 63]; }"""
    needs = resources(compile_.build(source, "k", (), "sm_90"), "k")
    assert needs.stack >= 256
    assert needs.registers > 0
    assert sorted(needs.parameters) == [4, 8]


@needs_nvrtc
def test_a_compile_error_says_what_nvrtc_says():
    with pytest.raises(Exception, match="nonsense"):
        compile_.build("nonsense;", "k", (), "sm_90")


@needs_nvrtc
@pytest.mark.parametrize("ids", [None, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("factors", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", [0, 1])
def test_a_router_passes_what_its_kernels_take(ids, factors, shared, monkeypatch):
    """In one launch, in two and with the mean: an argument for each parameter of the compiled kernel, options last."""
    align_, route_ = (sys.modules[f"moealign.backend.cuda.{name}"] for name in ("align", "route"))
    launched = []

    def kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], index: int) -> types.SimpleNamespace:
        taken = resources(built(file, name, defines), name).parameters
        macros = dict(defines)

        def launch(*args: int) -> None:
            assert len(args) == len(taken), name
            launched.append((name, macros, args))

        return types.SimpleNamespace(multiprocessors=132, max_blocks=lambda *a: 2, prepare=lambda *shape: launch)

    facts = types.SimpleNamespace(multi_processor_count=132, major=9, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(route_, "green_multiprocessors", lambda index: 0)
    monkeypatch.setattr(route_, "kernel", kernel)
    monkeypatch.setattr(align_, "kernel", lambda *key: types.SimpleNamespace(prepare=lambda *shape: lambda *args: None))
    for tokens, mean, names in (
        (1, False, ["warp"]),
        (8, False, ["pairwise"]),
        (9, False, ["topk"]),  # and the kernel of the alignment
        (8, True, ["topk_with_mean"]),
    ):
        logits, bias = torch.zeros(tokens, 16), torch.zeros(16)
        replay = None if ids is None else torch.zeros(tokens, 5, dtype=ids)
        scale = None if factors is None else torch.ones(16, dtype=factors)
        given = (logits, 5, "sigmoid", True, bias, 4, 2, 1.0, None, replay, scale, shared)
        problem = check_route(*given)._replace(device=torch.device("cuda", 0))
        chosen = torch.zeros(tokens, problem.columns, dtype=torch.int32)
        layout, sizes = check_align(chosen, 4, 16 + shared, None, False, False, None, None, ())
        out = BlockLayout(*(torch.zeros(getattr(sizes, name), dtype=torch.int32) for name in REQUIRED))
        router = cuda.prepare_route(problem, layout._replace(device=problem.device))
        launched.clear()
        more = (torch.zeros(16) if mean else None, None, None, out, replay, scale)
        router.run_with_layout(logits, bias, None, torch.zeros(chosen.shape), chosen, *more)
        assert [name for name, _, _ in launched] == names
        _, macros, args = launched[0]
        assert macros["REPLAY"] == {None: 0, torch.int32: 32}.get(ids, 64)
        assert (macros["BIAS"], macros["GROUPS"]) == ((1, 4) if ids is None else (0, 1))
        assert (macros["EXPERTS"], macros["SHARED"]) == (16, shared)
        if ids in (torch.int32, torch.int64):
            assert args[-2] == replay.data_ptr()
        if factors is not None:
            assert args[-1] == scale.data_ptr()


@pytest.mark.parametrize(
    ("tokens", "experts", "facts", "mean", "launched"),
    [
        (1, 256, {}, False, ("warp", 4, 3)),
        (2, 256, {}, False, ("warp", 1, 3)),
        (9, 256, {}, False, ("topk", 4, 9)),
        (256, 896, {}, False, ("topk", 4, 256)),
        (257, 896, {}, False, ("topk", 1, 65)),
        (256, 160, {}, False, ("topk", 1, 64)),
        (1, 160, {}, False, ("warp", 1, 3)),
        (1, 256, {"has_bias": False}, False, ("warp", 1, 3)),
        (256, 256, {"has_bias": False}, False, ("topk", 1, 64)),
        (1, 256, {"replay_dtype": torch.int32}, False, ("warp", 1, 3)),
        (256, 256, {"replay_dtype": torch.int32}, False, ("topk", 1, 64)),
        (1, 256, {}, True, ("topk_with_mean", 1, 1)),
        (1, 2048, {}, False, ("topk", 4, 1)),
    ],
    ids=str,
)
def test_four_warps_share_the_scores_of_a_token(tokens, experts, facts, mean, launched, monkeypatch):
    """With a bias, for few tokens: the kernel, its warps per token and its CTAs."""
    align_, route_ = (sys.modules[f"moealign.backend.cuda.{name}"] for name in ("align", "route"))
    seen = []

    def kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], index: int) -> types.SimpleNamespace:
        macros = dict(defines)
        assert macros["SPLIT"] == 1 or macros["THREADS"] == 32 * macros["SPLIT"]

        def prepare(grid: int, threads: int, *shape: int) -> Any:
            assert threads == macros["THREADS"]
            return lambda *args: seen.append((name, macros["SPLIT"], grid))

        return types.SimpleNamespace(multiprocessors=132, max_blocks=lambda *shape: 2, prepare=prepare)

    device = types.SimpleNamespace(multi_processor_count=132, major=9, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(route_, "green_multiprocessors", lambda index: 0)
    monkeypatch.setattr(route_, "kernel", kernel)
    monkeypatch.setattr(align_, "kernel", lambda *key: types.SimpleNamespace(prepare=lambda *shape: lambda *args: None))
    logits, bias, ids = torch.zeros(tokens, experts), torch.zeros(experts), torch.zeros(tokens, 6, dtype=torch.int32)
    problem = check_route(logits, 6, "sigmoid", True, bias, 1, 1, 1.0, None, None, None, 0)
    problem = problem._replace(device=torch.device("cuda", 0), **facts)
    layout, sizes = check_align(ids, 16, experts, None, False, False, None, None, ())
    out = BlockLayout(*(torch.zeros(getattr(sizes, name), dtype=torch.int32) for name in REQUIRED))
    router = cuda.prepare_route(problem, layout._replace(device=problem.device))
    replay = None if problem.replay_dtype is None else ids
    shares = torch.zeros(experts) if mean else None
    router.run_with_layout(
        logits, bias if problem.has_bias else None, None, torch.zeros(ids.shape), ids, shares, None, None, out, replay
    )
    assert seen == [launched]


@needs_nvrtc
@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("topk", {"EXPERTS": 160}, "whole vectors"),
        ("topk", {"BIAS": 0}, "whole vectors"),
        ("topk", {"THREADS": 256}, "the CTA has one token"),
        ("topk", {"MEAN": 1}, "all logits of which it computes shares"),
        ("warp", {"ONE_TOKEN": 0}, "have the same token"),
    ],
)
def test_warps_that_cannot_share_scores_are_refused_by_the_compiler(name, changed, message):
    kernel = next(each for each in specialisations(9) if each[1] == name and ("SPLIT", 4) in each[2])
    assert refusal_of(*kernel) == ""
    assert message in refusal_of(*kernel, **changed)


def test_what_a_router_s_kernels_do_not_count_is_refused():
    problem = check_route(torch.zeros(3, 16), 4, "softmax", True, None, 1, 1, 1.0, None, None, None, 33)
    reason = sys.modules["moealign.backend.cuda.route"].refuses(problem)
    assert reason == "expected at most 32 shared experts, got 33"


# ---------------------------------------------------------------------------------------------------- specialisations


@pytest.fixture
def requested(monkeypatch):
    """Requests for batched kernels, as (file, name, macros, device); none is compiled."""
    batched, keys = sys.modules["moealign.backend.cuda.batched"], []

    def kernel(*key: object) -> types.SimpleNamespace:
        keys.append(key)
        return types.SimpleNamespace(multiprocessors=132, prepare=lambda *shape: shape)

    monkeypatch.setattr(batched, "kernel", kernel)
    return keys


def test_a_batched_kernel_serves_every_number_of_slots(requested):
    batched = sys.modules["moealign.backend.cuda.batched"]
    for batches, block_size in ((8, 16), (300, 1)):
        requested.clear()
        for slots in (*range(1, 200), 2**20):
            problem = AlignProblem("align_batched", torch.device("cuda", 0), torch.int32, 0, slots, batches, block_size)
            batched.BatchedAlignment(problem)._prepare(batches * -(-slots // block_size) * block_size, True)
        assert len(requested) == 200
        assert len(set(requested)) == 1


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 8, 100, 127, 128, 129, 641, 65535, 2**30 - 1, 2**30 + 1, 2**31 - 1])
def test_a_reciprocal_divides_every_number_of_31_bits(divisor):
    packed = sys.modules["moealign.backend.cuda.batched"].reciprocal(divisor)
    factor, shift = packed & 0xFFFFFFFF, packed >> 32
    edges = {at + off for at in range(0, 2**31, max(divisor, 2**31 // 5000) // divisor * divisor) for off in (-1, 0, 1)}
    for number in {*edges, 2**31 - 1, 2**31 - 2, *range(300)} - {-1, 2**31}:
        assert number * factor >> (31 + shift) == number // divisor


def test_without_routes_a_block_is_of_one():
    """2**32 does not fit an int of a kernel; without routes it is a valid block size."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    problem = AlignProblem("align", torch.device("cuda", 0), torch.int32, 0, 8, 64, 2**32)
    path = align_.path_of(problem, 132, 227 * 1024, 8)
    assert dict(align_.defines_of(problem, path))["BLOCK"] == 1
    few = align_.defines_of(problem._replace(routes=1, block_size=2**31 - 1), path)
    assert dict(few)["BLOCK"] == 2**31 - 1


@pytest.mark.parametrize("slots", [0, 1])
def test_without_rows_a_batched_block_is_of_one(slots, requested):
    batched = sys.modules["moealign.backend.cuda.batched"]
    problem = AlignProblem("align_batched", torch.device("cuda", 0), torch.int32, 0, slots, 0, 2**32)
    batched.BatchedAlignment(problem)._prepare(0, True)
    assert [dict(defines)["B"] for _, _, defines, _ in requested] == [1]


def test_a_kernel_keeps_no_more_launches_than_it_says(monkeypatch):
    kernel = object.__new__(launch.Kernel)
    kernel._launches = {}
    monkeypatch.setattr(launch, "Launch", lambda *facts: facts)
    for grid in range(3000):
        assert kernel.prepare(grid, 32, 0) == (kernel, grid, 32, 0, launch.PLAIN)
        assert len(kernel._launches) <= launch._MAX_LAUNCHES


# ------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("MOEALIGN_CACHE_DIR", str(path))
    cache._checked.cache_clear()
    cache._warn.cache_clear()
    yield path
    cache._checked.cache_clear()
    cache._warn.cache_clear()


@pytest.fixture
def builds(monkeypatch):
    """Compilations, counted; the compiler is left out."""
    calls: list[tuple[object, ...]] = []

    def build(*args: object) -> bytes:
        calls.append(args)
        return repr(args).encode()

    monkeypatch.setattr(compile_, "build", build)
    monkeypatch.setattr(compile_, "compiler_version", lambda: "13.0")
    return calls


REQUEST = (SMALL, "k", (("VALUE", 1),), "sm_90")


def test_the_key_changes_with_each_ingredient():
    base = [*REQUEST, "13.0"]
    others = ["other", "other", (("VALUE", 2),), "sm_80", "13.1"]
    keys = {compile_.cache_key(*base)}
    for i, other in enumerate(others):
        keys.add(compile_.cache_key(*base[:i], other, *base[i + 1 :]))
    keys.add(compile_.cache_key(SMALL, "k", (("VALUE", 1), ("MORE", 1)), "sm_90", "13.0"))
    assert len(keys) == 7


def test_an_entry_is_compiled_once(folder, builds):
    first = compile_.cubin(*REQUEST)
    assert compile_.cubin(*REQUEST) == first
    assert len(builds) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    if hasattr(os, "getuid"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "longer", "renamed"])
def test_a_damaged_entry_is_built_again(folder, builds, damage):
    good = compile_.cubin(*REQUEST)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    if damage == "renamed":  # a good entry under the name of another
        compile_.cubin(SMALL, "k", (("VALUE", 2),), "sm_90")
        (other,) = (each for each in folder.iterdir() if each != path)
        path.write_bytes(other.read_bytes())
        builds.clear()
        builds.append(())
    else:
        path.write_bytes(
            {"truncated": whole[:-1], "flipped": whole[:-1] + b"~", "empty": b"", "longer": whole + b"."}[damage]
        )
    assert compile_.cubin(*REQUEST) == good
    assert len(builds) == 2
    assert path.read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="permissions as on Unix")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_folder_that_others_can_write_is_not_used_and_said_so_once(folder, builds, caplog, mode):
    folder.mkdir()
    folder.chmod(mode)
    with caplog.at_level(logging.WARNING, "moealign"):
        compile_.cubin(*REQUEST)
        compile_.cubin(*REQUEST)
    assert len(builds) == 2
    assert list(folder.iterdir()) == []
    assert len(caplog.records) == 1
    assert "MOEALIGN_CACHE_DIR" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners as on Unix")
def test_a_folder_of_another_user_is_not_used(folder, builds, monkeypatch):
    folder.mkdir(mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    compile_.cubin(*REQUEST)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_done_without(folder, builds):
    folder.write_text("a file stands where the folder should")
    assert compile_.cubin(*REQUEST)


def test_the_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.delenv("MOEALIGN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache._folder() == tmp_path / "xdg" / "moealign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache._folder() == tmp_path / "home" / ".cache" / "moealign"


def test_an_interrupted_write_leaves_nothing_behind(folder, builds, monkeypatch):
    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    assert compile_.cubin(*REQUEST)
    assert list(folder.iterdir()) == []


def _compile_in_a_process(start, results) -> None:
    start.wait()
    results.put(compile_.cubin(*REQUEST))


@needs_nvrtc
def test_four_processes_at_once_end_with_one_good_entry(folder):
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    start, results = context.Barrier(4), context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's threads
        workers = [context.Process(target=_compile_in_a_process, args=(start, results)) for _ in range(4)]
        for each in workers:
            each.start()
    codes = {results.get(timeout=60) for _ in workers}
    for each in workers:
        each.join(60)
    assert len(codes) == 1
    (entry,) = folder.iterdir()
    assert cache.read(entry, entry.stem) == codes.pop()


# ------------------------------------------------------------------------------------------------------------- drivers


def driver_of(version: int, *missing: str, code: int = 0) -> types.SimpleNamespace:
    """A driver of CUDA `version` (12040: 12.4) whose version query returns `code`, without the functions `missing`."""

    def get_version(at: Any) -> int:
        at._obj.value = version
        return code

    functions = dict.fromkeys(launch._FUNCTIONS, lambda *args: 999) | {"cuDriverGetVersion": get_version}
    return types.SimpleNamespace(**{name: each for name, each in functions.items() if name not in missing})


def no_driver() -> None:
    raise OSError("libcuda.so.1: cannot open shared object file")


NEWEST = ("cuKernelGetParamInfo", "cuStreamGetGreenCtx", "cuGreenCtxGetDevResource")
DRIVERS = {
    "none": (no_driver, "13.0", "cannot be loaded (libcuda.so.1"),
    "11.4, without newer": (lambda: driver_of(11040, "cuLaunchKernelEx", *NEWEST), "13.0", "of CUDA 11.4"),
    "12.2, without newer": (lambda: driver_of(12020, *NEWEST), "12.9", "needs a driver of CUDA 12.4 or later"),
    "12.3, with everything": (lambda: driver_of(12030), "12.9", "this one is of CUDA 12.3"),
    "fails": (lambda: driver_of(13000, code=3), "13.0", "does not say its version (CUDA error 3)"),
    "older than NVRTC": (lambda: driver_of(12090), "13.0", "pip install 'cuda-core[cu12]'"),
    "12.4": (lambda: driver_of(12040), "12.9", None),
    "newer than NVRTC": (lambda: driver_of(14010), "13.0", None),
    "of NVRTC's major": (lambda: driver_of(13000), "13.5", None),
} | {
    f"no {name}": (lambda name=name: driver_of(13000, name), "13.0", f"has no {name}: ") for name in launch._FUNCTIONS
}  # fmt: skip


@pytest.fixture
def fresh(monkeypatch):
    """Clear the caches of facts about this machine, before and after."""

    def forget() -> None:
        for each in (cuda.unavailable, cuda._unsupported):
            each.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("which", DRIVERS)
def test_a_driver_that_cannot_run_the_kernels_is_a_reason(which, fresh):
    driver, compiler, said = DRIVERS[which]
    fresh.setattr(launch, "_driver", driver)
    for module in (launch, cuda):
        fresh.setattr(module, "compiler_version", lambda: compiler)
    fresh.setattr(cuda, "architectures", lambda: ("sm_90",))
    fresh.setattr(cuda, "_installed", lambda module: True)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.version, "hip", None)
    reason = cuda.unavailable()
    assert reason == launch.driver_refuses()
    if said is None:
        assert reason is None
    else:
        assert said in reason
        assert "install" in reason  # what to do
        assert moealign.backends()["cuda"] == reason


@pytest.mark.parametrize(
    ("capability", "said"),
    [((7, 5), "needs compute capability 8.0 or later"), ((13, 0), "does not know sm_130"), ((9, 0), None)],
)
def test_a_gpu_that_nothing_is_compiled_for_is_a_reason(capability, said, fresh):
    fresh.setattr(cuda, "compiler_version", lambda: "13.0")
    fresh.setattr(cuda, "architectures", lambda: ("sm_75", "sm_80", "sm_90"))
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = AlignProblem("align", torch.device("cuda", 0), torch.int32, 8, 8, 64, 16)
    reason = cuda.refuses(problem)
    if said is None:
        assert reason is None
    else:
        assert said in reason
        assert "'triton'" in reason  # what to do


def test_every_function_of_the_driver_is_asked_for_before_a_call_is_taken():
    with open(launch.__file__, encoding="utf-8") as file:
        used = set(re.findall(r"\bcu[A-Z][A-Za-z]+\b", file.read()))
    assert used == set(launch._FUNCTIONS)


@pytest.mark.parametrize("said", ["none", "green", "error", "no multiprocessors"])
def test_the_multiprocessors_of_a_stream_are_those_of_its_green_context(said, monkeypatch):
    asked = []

    def get_green(stream, at):
        asked.append(stream.value)
        at._obj.value = 0 if said == "none" else 7
        return 201 if said == "error" else 0

    def get_resource(green, at, kind):
        assert (green.value, kind) == (7, 1)
        struct.pack_into("I", at, 96, 32)
        return 1 if said == "no multiprocessors" else 0

    driver = types.SimpleNamespace(cuStreamGetGreenCtx=get_green, cuGreenCtxGetDevResource=get_resource)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    assert launch._green_multiprocessors(1234) == (32 if said == "green" else 0)
    assert asked == [1234]


class Gpu(NamedTuple):
    """What decides the path; the figures of NVIDIA's tables of compute capabilities and of the products' pages."""

    multiprocessors: int
    shared: int  # KiB of a CTA at most; a multiprocessor has one more
    clusters: int  # CTAs
    threads: int  # of a multiprocessor


A100, H100 = Gpu(108, 163, 1, 2048), Gpu(132, 227, 16, 2048)
GPUS = {
    "A100": A100,
    "A100 MIG 1g": A100._replace(multiprocessors=14),
    "L4": Gpu(58, 99, 1, 1536),
    "RTX 4090": Gpu(128, 99, 1, 1536),
    "RTX 5090": Gpu(170, 99, 8, 1536),
    "H100, H200, GH200": H100,
    "H100 PCIe": H100._replace(multiprocessors=114),
    "H100 MIG 1g": H100._replace(multiprocessors=16),
    "H100 MIG 3g": H100._replace(multiprocessors=60),
    "B200": Gpu(148, 227, 16, 2048),
    "green context of 8": H100._replace(multiprocessors=8, clusters=8),
    "one multiprocessor": Gpu(1, 99, 1, 1536),
}


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("experts", [1, 8, 64, 128, 256, 512, 1000, 1024, 2047, 2048, 2049, 4096, 4097, 65536])
def test_a_path_fits_the_device(name, experts):
    """All CTAs of a cooperative launch are resident at once, and no launch asks for more than there is."""
    align_, gpu = sys.modules["moealign.backend.cuda.align"], GPUS[name]
    names = set()
    for routes in (0, 1, 33, 300, 5000, 12001, 32769, 40000, 65536, 131072, 524288, 524289, 2**20, 2**20 + 1, 2**24):
        problem = AlignProblem("align", torch.device("cuda"), torch.int32, routes, 1, experts, 16)
        path = align_.path_of(problem, gpu.multiprocessors, 1024 * gpu.shared, gpu.clusters)
        names.add(path.name)
        shared = path.shared_bytes + align_._STATIC_SHARED
        assert shared <= 1024 * gpu.shared
        assert path.cluster <= gpu.clusters
        if path.name in align_._COOPERATIVE:
            assert path.grid <= path.resident * gpu.multiprocessors
            assert path.resident * (shared + 1024) <= 1024 * (gpu.shared + 1)
            assert path.resident * path.threads <= gpu.threads
        else:
            assert path.scratch.elements(path.grid, routes) == 0  # a call relies on it
    assert "radix" not in names or experts > 2048
    assert "radix" in names or experts <= 4096


@needs_nvrtc
@pytest.mark.targets
@pytest.mark.parametrize("experts", [1, 200, 256, 300, 1024, 2048] if EVERY_TARGET else [1, 256, 1024])
@pytest.mark.parametrize("name", ["A100", "L4", "H100, H200, GH200"])
def test_the_registers_of_the_tiles_suffice_for_their_ctas(name, experts):
    align_, gpu = sys.modules["moealign.backend.cuda.align"], GPUS[name]
    problem = AlignProblem("align", torch.device("cuda"), torch.int64, 2**22, 8, experts, 16)
    path = align_.path_of(problem, gpu.multiprocessors, 1024 * gpu.shared, gpu.clusters)
    assert path.name == "tiles"
    architecture = "sm_80" if gpu.clusters == 1 else "sm_90"
    cubin = built(path.file, path.name, align_.defines_of(problem, path), architecture)
    assert resources(cubin, path.name).registers * path.threads * path.resident <= 65536


def test_a_call_takes_the_grid_of_its_stream(monkeypatch):
    """In every call, whichever launches exist for the whole device or for another part of it."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    launched = []

    def kernel(*key: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(prepare=lambda grid, *shape: lambda *args: launched.append(grid))

    facts = types.SimpleNamespace(multi_processor_count=132, major=8, shared_memory_per_block_optin=227 * 1024)
    green = iter((0, 32, 16, 0, 32))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(align_, "kernel", kernel)
    monkeypatch.setattr(align_, "green_multiprocessors", lambda index: next(green))
    ids = torch.zeros(2**17, 8, dtype=torch.int32)
    problem = AlignProblem("align", torch.device("cuda", 0), torch.int32, 2**20, 8, 4096, 128)
    out = BlockLayout(*(torch.zeros(1, dtype=torch.int32) for _ in range(3)))
    alignment = align_.Alignment(problem)
    for _ in range(5):
        alignment.run(ids, None, None, None, out)
    assert launched == [128, 32, 16, 128, 32]
    assert len(alignment._compiled) == 3


def test_a_green_context_too_small_for_the_clusters_gets_smaller_ones(monkeypatch):
    """The driver refuses the launch for the whole device; the call is prepared for the context, once."""
    align_ = sys.modules["moealign.backend.cuda.align"]
    launched: list[int] = []
    green = [8]

    def kernel(file: str, name: str, defines: tuple[tuple[str, int], ...], index: int) -> types.SimpleNamespace:
        cluster = dict(defines)["CLUSTER"]

        def launch(*args: int) -> None:
            launched.append(cluster)
            if cluster > 1 and green[0]:
                raise RuntimeError("no room for a cluster")

        return types.SimpleNamespace(
            prepare=lambda *shape: launch, max_clusters=lambda size, *shape: int(not green[0] or size == 1)
        )

    facts = types.SimpleNamespace(multi_processor_count=132, major=9, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(align_, "kernel", kernel)
    monkeypatch.setattr(align_, "green_multiprocessors", lambda index: green[0])
    ids = torch.zeros(2048, 8, dtype=torch.int32)
    alignment = align_.Alignment(AlignProblem("align", torch.device("cuda", 0), torch.int32, 2**14, 8, 256, 128))
    out = [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    green[0] = 0
    alignment.required(ids, *out)  # prepared for the whole device
    assert launched == [8]
    green[0] = 8
    alignment.required(ids, *out)
    assert launched[-1] == 1
    alignment.run(ids, None, None, None, BlockLayout(*out))
    assert launched[-1] == 1
    assert len(alignment._compiled) == 2
    green[0] = 0
    alignment.required(ids, *out)
    assert launched[-1] == 8
    monkeypatch.setattr(align_, "green_multiprocessors", lambda index: 0)
    green[0] = 8
    with pytest.raises(RuntimeError, match="no room"):
        alignment.run(ids, None, None, None, BlockLayout(*out))


def test_more_experts_than_kernels_count_is_a_reason():
    problem = AlignProblem("align", torch.device("cuda", 0), torch.int32, 0, 8, 2**28 + 1, 16)
    assert "expected at most 268435456 experts or batches, got 268435457: use" in (cuda.refuses(problem) or "")


@needs_nvrtc
def test_nvrtc_says_what_it_compiles_for():
    assert set(ARCHITECTURES) <= set(compile_.architectures())


def test_importing_the_backend_imports_no_cuda_core():
    # torch itself may import cuda.bindings, and does where it is installed.
    heavy = "('cuda.core', 'cuda.bindings.nvrtc')"
    code = f"import sys, moealign.backend.cuda; print([m for m in sys.modules if m.startswith({heavy})])"
    assert run_python(code).stdout == "[]\n"
