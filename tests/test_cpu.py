"""What only the cpu backend promises: no numba before a call, the same bits on any number of threads, a cache."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import moealign
from moealign.backends import cpu
from moealign.backends.cpu import routing as router
from moealign.backends.cpu.threads import Helpers
from moealign.backends.reference_routing import exp32, sigmoid32
from moealign.layout import EXTRAS, OUTPUTS, Problem
from moealign.testing import assert_same_layout, difference, oracle_align, oracle_align_batched, poisoned

numba = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs numba")


def problem(dtype: torch.dtype = torch.int32) -> Problem:
    return Problem("align", torch.device("cpu"), dtype, 8, 8, 4, 4)


def python(code: str, **environment: str) -> str:
    """The output of `code` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Calls of any size go to several threads."""
    monkeypatch.setattr(cpu, "PARALLEL_ROUTES", 1)
    monkeypatch.setattr(cpu, "MIN_ROUTES_A_THREAD", 16)
    monkeypatch.setattr(cpu, "MIN_ROUTES_AN_EXPERT", 0.01)
    monkeypatch.setattr(cpu, "CHUNK_ROUTES_AN_EXPERT", 0.01)
    return monkeypatch


def test_importing_the_package_and_the_backend_imports_no_numba() -> None:
    code = """
import sys, moealign
from moealign.backends import cpu
print(sorted(name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")))
"""
    assert python(code) == "[]"


def test_without_numba_it_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cpu.unavailable.cache_clear()
    try:
        reason = cpu.unavailable()
    finally:
        cpu.unavailable.cache_clear()
    assert reason is not None
    assert "pip install 'moealign[cpu]'" in reason


def test_refuses_tensors_that_are_elsewhere() -> None:
    assert cpu.refuses(problem()) is None
    elsewhere = problem()._replace(device=torch.device("cuda"))
    assert "expected CPU tensors" in (cpu.refuses(elsewhere) or "")


@numba
@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize("case", ["uniform", "one expert", "mapped", "strided"])
def test_any_number_of_threads_gives_the_bits_of_one(
    threads: pytest.MonkeyPatch, case: str, extras: tuple[str, ...]
) -> None:
    ids = torch.randint(-2, 70, (500, 4), generator=torch.Generator().manual_seed(3))
    wanted: dict[str, object] = {"block_size": 16, "num_experts": 65}
    if case == "one expert":
        ids = torch.full((500, 4), 7)
    elif case == "mapped":
        wanted |= {"expert_map": torch.arange(65) // 2 - 1, "ignore_invalid_experts": True}
    elif case == "strided":
        ids = ids.T.contiguous().T
    if case != "mapped":
        wanted["num_valid_tokens"] = torch.tensor([431], dtype=torch.int32)
    expected = oracle_align(ids, **wanted)  # type: ignore[arg-type]
    for count in ("1", "2", "3", "7"):
        threads.setenv("MOEALIGN_NUM_THREADS", count)
        for poison in (-7, 12345):
            out = poisoned(moealign.capacity(2000, block_size=16, num_experts=65), extras, "cpu", poison)
            word = moealign.new_error_word("cpu")
            moealign.align(ids, **wanted, **dict.fromkeys(extras, True), out=out, error_word=word, backend="cpu")  # type: ignore[arg-type]
            assert_same_layout(out, expected)
            assert word.tolist() == expected["error_word"]


@numba
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_router_on_any_number_of_threads_gives_the_bits_of_one(
    monkeypatch: pytest.MonkeyPatch, tokens: int, grouped: bool
) -> None:
    monkeypatch.setattr(router, "PARALLEL_LOGITS", 1)
    monkeypatch.setattr(router, "MIN_LOGITS_A_THREAD", 1)
    logits = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, 48)
    options: dict[str, Any] = {"num_valid_tokens": torch.tensor([tokens - 1], dtype=torch.int32)}
    if grouped:
        options |= {"scoring": "sigmoid", "correction_bias": bias, "num_groups": 6, "topk_groups": 2}
    found = []
    for count in ("1", "2", "7"):
        monkeypatch.setenv("MOEALIGN_NUM_THREADS", count)
        found.append(moealign.route(logits, 5, block_size=4, backend="cpu", **options)[:2])
    wanted = moealign.route(logits, 5, block_size=4, backend="reference", **options)[1]
    for weights, ids in found:
        assert torch.equal(weights, found[0][0])
        assert torch.equal(ids, wanted)


@numba
def test_exponentials_as_vectors_have_the_bits_of_the_definition() -> None:
    from moealign.backends.cpu import routing_kernels

    nan, inf = float("nan"), float("inf")
    edges = torch.tensor([0.0, -0.0, 87.0, -87.0, 87.00001, -87.00001, 88.0, -88.0, 1e-30, 1e38, -1e38, inf, -inf, nan])
    x = torch.cat([edges, torch.linspace(-90, 90, 1_000_003), torch.randn(100_000)])
    sigmoids, powers = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.int32)
    routing_kernels._sigmoid32_each(x.numpy(), sigmoids.numpy(), powers.numpy())
    assert torch.equal(sigmoids, sigmoid32(x))
    below = x[~(x > 87)].clone()
    wanted = torch.where(below.isnan(), 0.0, exp32(below))
    routing_kernels._exp32_each(below.numpy(), powers.numpy())
    assert torch.equal(below, wanted)


@numba
def test_batched_on_threads_gives_the_bits_of_one(threads: pytest.MonkeyPatch) -> None:
    counts = torch.tensor([0, 5, 33, 40, -1, 17, 33, 1] * 5)
    expected = oracle_align_batched(counts, max_tokens_per_batch=33, block_size=8)
    for count in ("1", "3"):
        threads.setenv("MOEALIGN_NUM_THREADS", count)
        layout = moealign.align_batched(
            counts, max_tokens_per_batch=33, block_size=8, positions=True, block_rows=True, backend="cpu"
        )
        assert_same_layout(layout, expected)


@numba
def test_huge_pages_are_asked_for_inside_large_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    advise = cpu._madvise()

    def record(start: int, stop: int) -> None:
        asked.append((start, stop))
        advise(start, stop)

    monkeypatch.setattr(cpu, "_madvise", lambda: record)
    monkeypatch.setattr(cpu, "HUGE_BYTES", 8 * 2**20)
    small, large = torch.zeros(1000, 2, dtype=torch.int64), torch.arange(2**21).reshape(-1, 2) % 8
    for ids, expected in ((small, 0), (large, 1)):
        layout = moealign.align(ids, block_size=64, num_experts=8, backend="cpu")
        assert len(asked) == expected
    begin = layout.sorted_token_ids.data_ptr()
    ((start, stop),) = asked
    assert begin <= start < stop <= begin + 4 * layout.sorted_token_ids.numel()
    assert start % 2**21 == stop % 2**21 == 0
    wanted = moealign.align(large, block_size=64, num_experts=8, backend="reference")
    assert torch.equal(layout.sorted_token_ids, wanted.sorted_token_ids)


@numba
def test_callers_on_many_python_threads_do_not_disturb_each_other(threads: pytest.MonkeyPatch) -> None:
    threads.setenv("MOEALIGN_NUM_THREADS", "3")
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, 40, (200 + 10 * i, 4), generator=generator) for i in range(6)]
    expected = [oracle_align(ids, block_size=8, num_experts=40) for ids in inputs]
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(50):
            found = difference(moealign.align(inputs[i], block_size=8, num_experts=40, backend="cpu"), expected[i])
            if found is not None:
                wrong.append(found)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_helpers_of_its_own() -> None:
    code = """
import os, torch, moealign
torch.set_num_threads(1)  # torch's own OpenMP threads do not survive a fork
ids = torch.arange(400_000, dtype=torch.int32).reshape(-1, 8) % 60
first = moealign.align(ids, block_size=16, num_experts=60, backend="cpu")
child = os.fork()
if child == 0:
    again = moealign.align(ids, block_size=16, num_experts=60, backend="cpu")
    # Compared by numpy: torch's own OpenMP threads stayed behind in the parent, and a torch loop would wait for them.
    os._exit(0 if all((a.numpy() == b.numpy()).all() for a, b in zip(first, again)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code, MOEALIGN_NUM_THREADS="2") == "0"


@numba
def test_strides_that_are_not_two_are_copied_and_right() -> None:
    base = torch.arange(2 * 3 * 5 * 4, dtype=torch.int16).reshape(2, 3, 5, 4) % 11
    for ids in (base.permute(2, 0, 1, 3), base[:, ::2], base[..., 1:3], base.permute(3, 2, 1, 0), base[:, :1, :1]):
        layout = moealign.align(ids, block_size=3, num_experts=9, positions=True, backend="cpu")
        assert_same_layout(layout, oracle_align(ids, block_size=3, num_experts=9))


def test_strides_that_are_two_are_read_in_place() -> None:
    base = torch.zeros(6, 5, 4, dtype=torch.int32)
    for ids in (base[0].T, base[:, 0], base[0, 0, ::2], base[:, :, 0], base[:1, :1, :1].expand(3, 5, 4)):
        read, *_ = cpu._walk(ids, ids.numel())
        assert read is ids


@numba
@pytest.mark.parametrize("given", ["0", "-1", "two", ""])
def test_a_bad_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("MOEALIGN_NUM_THREADS", given)
    with pytest.raises(moealign.InvalidInput, match="MOEALIGN_NUM_THREADS: expected a whole number"):
        cpu.num_threads()


@numba
def test_the_note_tells_compile_from_cache_from_loaded(tmp_path: Path) -> None:
    code = """
import torch, moealign
from moealign.backends import cpu
from moealign.layout import Problem
problem = Problem("align", torch.device("cpu"), torch.int32, 8, 8, 4, 4)
print(cpu.note(problem))
moealign.align(torch.zeros(1, 8, dtype=torch.int32), block_size=4, num_experts=4, backend="cpu")
print("then", cpu.note(problem))
"""
    folder = str(tmp_path)
    first = python(code, MOEALIGN_CACHE_DIR=folder).splitlines()
    assert first[0].startswith("the first call compiles")
    assert folder in first[0]
    assert first[1].strip() == "then"
    second = python(code, MOEALIGN_CACHE_DIR=folder).splitlines()
    assert second[0].startswith("compiled by numba before")
    assert folder in second[0]


def test_every_output_has_a_place_in_the_kernels() -> None:
    assert len(OUTPUTS) == 9  # a new field needs an argument in kernels.serial, kernels.shared and kernels.batched_*


def test_helpers_go_home_before_the_interpreter_ends() -> None:
    helpers = Helpers()
    done = []
    helpers.ask(3, lambda number: done.append(number), (7,), None)
    helpers.close()
    assert done == [7, 7, 7]
    assert not any(thread.is_alive() for thread in helpers.threads)
    helpers.ask(1, lambda number: done.append(number), (8,), None)  # the caller does it all
    assert done == [7, 7, 7]
