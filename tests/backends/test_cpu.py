"""Promises of the cpu backend alone: no numba before a call, the same bits on any number of threads, a disk cache."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import in_threads, run_python

import moealign
from moealign.backend import cpu
from moealign.backend.cpu import align as aligner
from moealign.backend.cpu import compiled
from moealign.backend.cpu import route as router
from moealign.backend.cpu import threads as threads_
from moealign.backend.cpu.threads import Helpers
from moealign.backend.reference.route import exp32, sigmoid32, softmax32, sqrtsoftplus32
from moealign.layout import EXTRAS, OUTPUTS
from moealign.problem import AlignProblem
from moealign.testing import assert_same_layout, oracle_align, oracle_align_batched, poisoned

numba = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs numba")


def problem(dtype: torch.dtype = torch.int32) -> AlignProblem:
    return AlignProblem("align", torch.device("cpu"), dtype, 8, 8, 4, 4)


def printed(code: str, *paths: Path, **variables: str | None) -> str:
    """What `code` prints in a process of its own."""
    return run_python(code, *paths, **variables).stdout.strip()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Calls of any size go to several threads."""
    monkeypatch.setattr(aligner, "PARALLEL_ROUTES", 1)
    monkeypatch.setattr(aligner, "MIN_ROUTES_PER_THREAD", 16)
    monkeypatch.setattr(aligner, "MIN_ROUTES_PER_EXPERT", 0.01)
    monkeypatch.setattr(aligner, "CHUNK_ROUTES_PER_EXPERT", 0.01)
    return monkeypatch


def test_importing_the_package_and_the_backend_imports_no_numba() -> None:
    code = """
import sys, moealign
from moealign.backend.cpu import align as cpu
from moealign.backend.cpu import compiled
print(sorted(name for name in sys.modules if name.split(".")[0] in ("numba", "llvmlite")))
"""
    assert printed(code) == "[]"


def test_without_numba_the_reason_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cpu.unavailable.cache_clear()
    try:
        reason = cpu.unavailable()
    finally:
        cpu.unavailable.cache_clear()
    assert reason is not None
    assert "pip install numba" in reason


def test_refuses_tensors_on_other_devices() -> None:
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
    call: dict[str, object] = {"block_size": 16, "num_experts": 65}
    if case == "one expert":
        ids = torch.full((500, 4), 7)
    elif case == "mapped":
        call |= {"expert_map": torch.arange(65) // 2 - 1, "ignore_invalid_experts": True}
    elif case == "strided":
        ids = ids.T.contiguous().T
    if case != "mapped":
        call["num_valid_tokens"] = torch.tensor([431], dtype=torch.int32)
    expected = oracle_align(ids, **call)  # type: ignore[arg-type]
    for count in ("1", "2", "3", "7"):
        threads.setenv("MOEALIGN_NUM_THREADS", count)
        for poison in (-7, 12345):
            out = poisoned(moealign.capacity(2000, block_size=16, num_experts=65), extras, "cpu", poison)
            word = moealign.new_error_word("cpu")
            moealign.align(ids, **call, **dict.fromkeys(extras, True), out=out, error_word=word, backend="cpu")  # type: ignore[arg-type]
            assert_same_layout(out, expected)
            assert word.tolist() == expected["error_word"]


@numba
@pytest.mark.parametrize("tokens", [1, 5, 64])
@pytest.mark.parametrize("scoring", [None, "softmax", "sigmoid", "sqrtsoftplus"])
def test_the_router_on_any_number_of_threads_gives_the_bits_of_one(
    monkeypatch: pytest.MonkeyPatch, tokens: int, scoring: str | None
) -> None:
    monkeypatch.setattr(router, "PARALLEL_LOGITS", 1)
    monkeypatch.setattr(router, "MIN_LOGITS_PER_THREAD", 1)
    logits = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, 48)
    options: dict[str, Any] = {"num_valid_tokens": torch.tensor([tokens - 1], dtype=torch.int32)}
    if scoring is not None:
        options |= {"scoring": scoring, "correction_bias": bias, "num_groups": 6, "topk_groups": 2}
    results = []
    for count in ("1", "2", "7"):
        monkeypatch.setenv("MOEALIGN_NUM_THREADS", count)
        results.append(moealign.route(logits, 5, block_size=4, backend="cpu", **options)[:2])
    expected = moealign.route(logits, 5, block_size=4, backend="reference", **options)[1]
    for weights, ids in results:
        assert torch.equal(weights, results[0][0])
        assert torch.equal(ids, expected)


@numba
def test_exponentials_as_vectors_have_the_bits_of_the_definition() -> None:
    from moealign.backend.cpu import route_kernels as routing_kernels

    nan, inf = float("nan"), float("inf")
    edges = torch.tensor([0.0, -0.0, 87.0, -87.0, 87.00001, -87.00001, 88.0, -88.0, 1e-30, 1e38, -1e38, inf, -inf, nan])
    x = torch.cat([edges, torch.linspace(-90, 90, 1_000_003), torch.randn(100_000)])
    sigmoids, powers = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.int32)
    routing_kernels._sigmoid32_each(x.numpy(), sigmoids.numpy(), powers.numpy())
    assert torch.equal(sigmoids, sigmoid32(x))
    roots = torch.empty_like(x)
    routing_kernels._sqrtsoftplus32_each(x.numpy(), roots.numpy(), powers.numpy())
    assert torch.equal(roots, sqrtsoftplus32(x))
    for scale in (0.01, 1, 30):
        logits = torch.cat([torch.randn(1000) * scale, torch.tensor([nan, -inf])])
        shares = torch.empty_like(logits)
        routing_kernels._softmax32_each(logits.numpy(), logits[:1000].max().item(), shares.numpy(), powers.numpy())
        assert torch.equal(shares, softmax32(logits))
    below = x[~(x > 87)].clone()
    expected = torch.where(below.isnan(), 0.0, exp32(below))
    routing_kernels._exp32_each(below.numpy(), powers.numpy())
    assert torch.equal(below, expected)


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
    advise = aligner._madvise()

    def record(start: int, stop: int) -> None:
        asked.append((start, stop))
        advise(start, stop)

    monkeypatch.setattr(aligner, "_madvise", lambda: record)
    monkeypatch.setattr(aligner, "HUGE_BYTES", 8 * 2**20)
    small, large = torch.zeros(1000, 2, dtype=torch.int64), torch.arange(2**21).reshape(-1, 2) % 8
    for ids, expected in ((small, 0), (large, 1)):
        layout = moealign.align(ids, block_size=64, num_experts=8, backend="cpu")
        assert len(asked) == expected
    begin = layout.sorted_token_ids.data_ptr()
    ((start, stop),) = asked
    assert begin <= start < stop <= begin + 4 * layout.sorted_token_ids.numel()
    assert start % 2**21 == stop % 2**21 == 0
    expected = moealign.align(large, block_size=64, num_experts=8, backend="reference")
    assert torch.equal(layout.sorted_token_ids, expected.sorted_token_ids)


@numba
def test_callers_on_many_python_threads_do_not_disturb_each_other(threads: pytest.MonkeyPatch) -> None:
    threads.setenv("MOEALIGN_NUM_THREADS", "3")
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, 40, (200 + 10 * i, 4), generator=generator) for i in range(6)]
    expected = [oracle_align(ids, block_size=8, num_experts=40) for ids in inputs]

    def work(i: int) -> None:
        for _ in range(50):
            assert_same_layout(moealign.align(inputs[i], block_size=8, num_experts=40, backend="cpu"), expected[i])

    in_threads(work, len(inputs))


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
    assert printed(code, MOEALIGN_NUM_THREADS="2") == "0"


@numba
def test_ids_of_more_than_two_strides_are_copied() -> None:
    base = torch.arange(2 * 3 * 5 * 4, dtype=torch.int16).reshape(2, 3, 5, 4) % 11
    for ids in (base.permute(2, 0, 1, 3), base[:, ::2], base[..., 1:3], base.permute(3, 2, 1, 0), base[:, :1, :1]):
        layout = moealign.align(ids, block_size=3, num_experts=9, positions=True, backend="cpu")
        assert_same_layout(layout, oracle_align(ids, block_size=3, num_experts=9))


def test_ids_of_two_strides_are_read_in_place() -> None:
    base = torch.zeros(6, 5, 4, dtype=torch.int32)
    for ids in (base[0].T, base[:, 0], base[0, 0, ::2], base[:, :, 0], base[:1, :1, :1].expand(3, 5, 4)):
        read, *_ = aligner._walk(ids, ids.numel())
        assert read is ids


OPERATIONS: dict[str, Callable[[int], object]] = {
    "align": lambda tokens: moealign.align(torch.zeros(tokens, 8, dtype=torch.int32), block_size=4, num_experts=4),
    "three outputs": lambda tokens: moealign.moe_align_block_size(torch.zeros(tokens, 8, dtype=torch.int32), 4, 4),
    "batched": lambda tokens: moealign.align_batched(
        torch.zeros(4, dtype=torch.int32), max_tokens_per_batch=2 * tokens, block_size=4
    ),
    "route": lambda tokens: moealign.route(torch.zeros(tokens, 8), 2, block_size=4),
}


@numba
@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 60_000])
def test_a_bad_number_of_threads_is_refused_by_every_call(
    monkeypatch: pytest.MonkeyPatch, operation: str, tokens: int, value: str
) -> None:
    for _ in range(2):  # the second call repeats the arguments of the first
        OPERATIONS[operation](tokens)
    monkeypatch.setenv("MOEALIGN_NUM_THREADS", value)
    for _ in range(2):
        with pytest.raises(moealign.InvalidInput, match="MOEALIGN_NUM_THREADS: expected a whole number from 1 on"):
            OPERATIONS[operation](tokens)
    assert cpu.note(problem()).startswith("but calls are refused: MOEALIGN_NUM_THREADS: expected")
    monkeypatch.setenv("MOEALIGN_NUM_THREADS", "2")
    OPERATIONS[operation](tokens)


def test_every_output_has_a_place_in_the_kernels() -> None:
    assert len(OUTPUTS) == 9  # a new field needs an argument in kernels.serial, kernels.shared and kernels.batched_*


def test_helpers_stop_before_the_interpreter_ends() -> None:
    helpers = Helpers()
    done: list[int] = []
    before = set(threading.enumerate())
    helpers.ask(3, lambda number: done.append(number), (7,), None)
    started = set(threading.enumerate()) - before
    helpers.close()
    for thread in started:
        thread.join(30)
    assert done == [7, 7, 7]
    assert len(started) == 3
    assert not any(thread.is_alive() for thread in started)
    helpers.ask(1, lambda number: done.append(number), (8,), None)  # the caller does it all
    assert done == [7, 7, 7]
    helpers.close()  # idempotent


def test_closing_does_not_wait_for_a_helper_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_, "MAX_CLOSE", 0.01)
    helpers, at_work, release = Helpers(), threading.Event(), threading.Event()
    helpers.ask(1, lambda: (at_work.set(), release.wait(30)), (), None)
    assert at_work.wait(30)
    (thread,) = helpers.threads
    helpers.close()
    assert thread.is_alive()
    release.set()
    thread.join(30)
    assert not thread.is_alive()


@numba
@pytest.mark.parametrize("room", [0, 1, 2])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["limit", "memory"])
def test_a_call_does_without_helpers_that_cannot_be_started(
    threads: pytest.MonkeyPatch, room: int, error: Exception
) -> None:
    helpers, start, left = Helpers(), threading.Thread.start, [room]

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise error
        left[0] -= 1
        start(thread)

    threads.setattr(threading.Thread, "start", limited)
    threads.setattr(aligner, "helpers", helpers)
    threads.setenv("MOEALIGN_NUM_THREADS", "4")
    ids = torch.arange(2000).reshape(500, 4) % 65
    for _ in range(3):
        layout = moealign.align(ids, block_size=16, num_experts=65, backend="cpu")
        assert_same_layout(layout, oracle_align(ids, block_size=16, num_experts=65))
    helpers.close()
    assert left == [0]


# A process that at every event of a call, one by one, raises or calls again.
AT_EVERY_EVENT = """
import os, sys, threading, time, torch, moealign
from moealign.backend.cpu import align as cpu
from moealign.backend.cpu import compiled
from moealign.backend.cpu import route as routing
for name, value in {"PARALLEL_ROUTES": 1, "MIN_ROUTES_PER_THREAD": 16, "MIN_ROUTES_PER_EXPERT": 0.01,
                    "CHUNK_ROUTES_PER_EXPERT": 0.01}.items():
    if os.environ["SIZE"] == "large":
        setattr(cpu, name, value)
        routing.PARALLEL_LOGITS = routing.MIN_LOGITS_PER_THREAD = 1
ids = (torch.arange(96, dtype=torch.int32) * 7 % 10 - 1).reshape(48, 2)
logits, counts = torch.linspace(-1, 1, 16 * 24).sin().reshape(16, 24), torch.tensor([3, 0, 9, 4])

def results(backend):
    full = moealign.align(ids, block_size=16, num_experts=8, positions=True, backend=backend)
    return [*moealign.moe_align_block_size(ids, 16, 8, backend=backend), *full, full.positions,
            *moealign.align_batched(counts, max_tokens_per_batch=9, block_size=4, backend=backend),
            moealign.route(logits, 4, block_size=16, backend=backend)[1]]

def correct(outputs):
    return all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))

expected, experts = results("reference"), 50

def again():
    global experts
    experts += 50  # more than the rows of any call before
    many = [moealign.moe_align_block_size(ids, 16, experts, backend=name) for name in ("cpu", "reference")]
    assert all(map(torch.equal, *many)) and correct(results("cpu"))

def interrupt():
    raise KeyboardInterrupt

def hook(frame, event, argument):
    global seen
    seen += 1
    if seen == number:
        act()
    return hook

act, watch = {"raise": (interrupt, sys.settrace), "again": (again, sys.setprofile)}[os.environ["ACT"]]
assert correct(results("cpu")) and correct(results("cpu"))
number = seen = 0
while seen >= number:
    number, seen, outputs = number + 1, 0, None
    try:
        watch(hook)
        outputs = results("cpu")
    except KeyboardInterrupt:
        pass
    finally:
        watch(None)
    assert outputs is None or correct(outputs), number
    assert correct(results("cpu")), number
assert number > 200
time.sleep(0.1)
helpers = [thread for thread in threading.enumerate() if thread.name.startswith("moealign")]
assert len(helpers) <= 4, helpers  # as many as requested, and one or two from interrupted starts
clock = time.process_time()
time.sleep(0.3)
assert time.process_time() - clock < 0.2  # no helper spins
print("right")
"""


@numba
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("act", ["raise", "again"])
def test_an_exception_or_a_call_at_any_event_of_a_call_does_no_harm(size: str, act: str) -> None:
    assert printed(AT_EVERY_EVENT, SIZE=size, ACT=act, MOEALIGN_NUM_THREADS="3") == "right"


@numba
@pytest.mark.parametrize("operation", ["align", "batched", "route"])
def test_helpers_of_a_call_that_never_begins_touch_nothing(threads: pytest.MonkeyPatch, operation: str) -> None:
    threads.setattr(threads_, "MAX_CLOSE", 60.0)  # on a busy machine they give up late
    threads.setattr(router, "PARALLEL_LOGITS", 1)
    threads.setattr(router, "MIN_LOGITS_PER_THREAD", 1)
    threads.setenv("MOEALIGN_NUM_THREADS", "3")
    helpers, out = Helpers(), {}
    threads.setattr(aligner, "helpers", helpers)
    threads.setattr(router, "helpers", helpers)
    ask = helpers.ask

    def interrupted(*asked: Any) -> None:
        ask(*asked)
        raise KeyboardInterrupt

    ids, counts = torch.arange(2000, dtype=torch.int32).reshape(500, 4) % 65, torch.arange(30)
    room, room_batched = (
        moealign.capacity(2000, block_size=16, num_experts=65),
        moealign.capacity_batched(33, block_size=8, num_batches=30),
    )
    calls: dict[str, Callable[[], object]] = {
        "align": lambda: moealign.align(ids, block_size=16, num_experts=65, out=out["align"], backend="cpu"),
        "batched": lambda: moealign.align_batched(
            counts, max_tokens_per_batch=33, block_size=8, out=out["batched"], backend="cpu"
        ),
        "route": lambda: moealign.route(torch.zeros(64, 48), 4, block_size=4, backend="cpu"),
    }
    out |= {"align": poisoned(room, (), "cpu", -7), "batched": poisoned(room_batched, (), "cpu", -7)}
    calls[operation]()
    if operation == "batched":
        out["batched"].sorted_token_ids.fill_(-7)
    else:
        out["align"] = poisoned(room, (), "cpu", -7)
    threads.setattr(helpers, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calls[operation]()
    helpers.close()  # after all their tasks
    assert not helpers.threads
    if operation != "route":
        assert (out[operation].sorted_token_ids == -7).all()


def test_close_waits_for_helpers_that_are_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_, "MAX_CLOSE", 60.0)
    left = []

    class Late(Helpers):
        def _serve(self) -> None:
            time.sleep(0.2)
            super()._serve()
            left.append(threading.current_thread().name)

    helpers = Late()
    helpers.ask(2, lambda: None, (), None)
    helpers.close()
    assert sorted(left) == ["moealign-0", "moealign-1"]


@numba
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer's signal")
@pytest.mark.parametrize("seconds", ["0.05", "1.0"])  # while numba is imported; while it compiles
def test_an_interrupt_while_numba_is_busy_does_no_harm(seconds: str, tmp_path: Path) -> None:
    code = """
import os, signal, threading, time, torch, moealign
class Late(Exception): pass
def ring(*_): raise Late
signal.signal(signal.SIGALRM, ring)
ids = torch.arange(1 << 19, dtype=torch.int32).reshape(-1, 8) % 60
expected = moealign.moe_align_block_size(ids, 16, 60, backend="reference")
try:
    signal.setitimer(signal.ITIMER_REAL, float(os.environ["SECONDS"]))
    moealign.moe_align_block_size(ids, 16, 60, backend="cpu")
except Late:
    pass  # a fast machine finishes before the signal
signal.setitimer(signal.ITIMER_REAL, 0)
clock = time.process_time()
time.sleep(0.3)
assert time.process_time() - clock < 0.2
assert all(map(torch.equal, moealign.moe_align_block_size(ids, 16, 60), expected))
print("right")
"""
    folder = {"MOEALIGN_CACHE_DIR": str(tmp_path)} if seconds == "1.0" else {}
    assert printed(code, SECONDS=seconds, MOEALIGN_NUM_THREADS="2", **folder) == "right"


@numba
def test_a_call_while_numba_is_busy_is_computed_by_the_reference(tmp_path: Path) -> None:
    code = """
import sys, torch, moealign
from moealign.backend.cpu import compiled
ids = torch.arange(96, dtype=torch.int32).reshape(-1, 2) % 9
calls = {
    "align": lambda backend: moealign.align(ids, block_size=4, num_experts=9, backend=backend),
    "batched": lambda backend: moealign.align_batched(
        torch.arange(5), max_tokens_per_batch=4, block_size=4, backend=backend),
    "route": lambda backend: moealign.route(torch.eye(7), 3, block_size=4, backend=backend)[2],
}
expected = {name: list(call("reference")) for name, call in calls.items()}
correct = lambda *names: all(all(map(torch.equal, calls[name]("cpu"), expected[name])) for name in names)
seen = inside = 0
def hook(frame, event, argument):
    global seen, inside
    seen += "numba" in sys.modules
    if seen in (1_000, 50_000, 400_000, 800_000):
        seen += 1
        assert correct(*calls)
        inside += 1
        if inside == 4:
            sys.setprofile(None)
sys.setprofile(hook)
moealign.align(ids, block_size=4, num_experts=9, backend="cpu")
sys.setprofile(None)
print(inside, correct("align"), compiled._failed)
"""
    assert printed(code, MOEALIGN_CACHE_DIR=str(tmp_path)) == "4 True set()"


@numba
def test_a_kernel_that_numba_cannot_compile_is_replaced(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from moealign.backend.cpu import align_kernels as kernels

    def broken(*_: object) -> None:
        raise RuntimeError("compiler re-entrant")

    monkeypatch.setattr(compiled, "_ready", {})
    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setattr(kernels.serial[2], "compile", broken)
    ids = torch.arange(30, dtype=torch.int16).reshape(-1, 2) % 9
    for _ in range(2):
        layout = moealign.align(ids, block_size=4, num_experts=9, backend="cpu")
        assert_same_layout(layout, oracle_align(ids, block_size=4, num_experts=9))
    (record,) = caplog.records
    assert record.message.startswith("numba cannot compile serial")
    assert "falling back to backend 'reference'" in record.message


# ---- The disk cache ------------------------------------------------------------------------------------------------

COLD = """
import os, sys, torch, moealign
if os.environ.get("LOSE_HOME"):
    import pathlib
    def lost(): raise RuntimeError("Could not determine home directory.")
    pathlib.Path.home = lost
ids = torch.arange(40, dtype=torch.int32).reshape(-1, 2) % 5
print(moealign.explain(ids, block_size=4, num_experts=5))
if "EXPLAIN_ALONE" not in os.environ:
    layout = moealign.align(ids, block_size=4, num_experts=5)
    expected = moealign.align(ids, block_size=4, num_experts=5, backend="reference")
    assert all(map(torch.equal, layout, expected))
    print("then\\n", moealign.explain(ids, block_size=4, num_experts=5), sep="")
"""


@numba
@pytest.mark.parametrize("case", ["a file", "of others", "no home", "below a file, by numba's variable"])
def test_without_a_cache_folder_kernels_compile_in_every_process(tmp_path: Path, case: str) -> None:
    file = tmp_path / "file"
    file.write_text("")
    environment: dict[str, str | None] = {"MOEALIGN_CACHE_DIR": None, "NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None}
    if case != "no home":  # from there on it is the same for all
        environment["EXPLAIN_ALONE"] = "1"
    if case == "a file":
        environment["MOEALIGN_CACHE_DIR"] = str(file)
    elif case == "of others":
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        environment["MOEALIGN_CACHE_DIR"] = str(tmp_path / "open")
    elif case == "no home":
        environment["LOSE_HOME"] = "1"
    else:
        environment["NUMBA_CACHE_DIR"] = str(file)
    done = run_python(COLD, **environment)
    assert "chosen; the first call compiles with numba, about 3 s, in every process: see the warning" in done.stdout
    assert done.stderr.count("kernels are compiled in every process") == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The entry of a kernel, and what the process that compiled it printed."""
    base = tmp_path_factory.mktemp("cold")
    variables = {"MOEALIGN_CACHE_DIR": "own", "NUMBA_CACHE_DIR": "numba", "XDG_CACHE_HOME": ""}
    done = run_python(COLD, **{name: str(base / folder) for name, folder in variables.items()})
    assert [path.name for path in base.iterdir()] == ["own"]
    (entry,) = (base / "own").iterdir()
    return entry, done


def copy_of(entry: Path, folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True)
    return Path(shutil.copy(entry, folder))


@numba
def test_kernels_are_cached_in_the_folder_of_the_variables(cold: Any, tmp_path: Path) -> None:
    entry, first = cold
    assert entry.suffix == ".numba"
    assert f"the first call compiles with numba, about 3 s, then it is cached in {entry.parent}" in first.stdout
    assert re.search("^cpu +chosen$", first.stdout.partition("then\n")[2], re.MULTILINE)
    assert first.stderr == ""
    copied = copy_of(entry, tmp_path / "numba" / "moealign")
    variables = {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "XDG_CACHE_HOME": str(tmp_path)}
    second = run_python(COLD, MOEALIGN_CACHE_DIR="", **variables)
    assert f"compiled by numba before, cached in {copied.parent}" in second.stdout
    assert second.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["numba"]
    assert list(copied.parent.iterdir()) == [copied]


@numba
def test_a_damaged_entry_is_compiled_again(cold: Any, tmp_path: Path) -> None:
    entry = copy_of(cold[0], tmp_path / "own")
    entry.write_bytes(entry.read_bytes()[:-1])
    done = run_python(COLD, MOEALIGN_CACHE_DIR=str(entry.parent))
    assert "compiled by numba before" in done.stdout
    assert done.stderr.count("is damaged: compiling again") == 1


@numba
@pytest.mark.parametrize("name", ["align_kernels", "route_kernels"])
def test_the_key_of_a_kernel_has_every_source_that_it_is_built_from(name: str) -> None:
    module = importlib.import_module(f"moealign.backend.cpu.{name}")
    sources = {inspect.getsource(module).encode()}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            values = (getattr(base, alias.name) for alias in node.names)
            sources |= {inspect.getsource(each if inspect.ismodule(each) else base).encode() for each in values}
    variants = [
        each for kernel in vars(module).values() for each in (kernel.values() if type(kernel) is dict else [kernel])
    ]
    kernels = [each for each in variants if hasattr(getattr(each, "_cache", None), "ingredients")]
    assert len(sources) == 3
    assert len(kernels) >= 3
    for kernel in kernels:
        assert sources <= set(kernel._cache.ingredients)


@numba
def test_a_relative_folder_is_relative_to_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moealign.backend.cpu import intrinsics

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEALIGN_CACHE_DIR", "below/cache")
    assert intrinsics.kernel_folder() == tmp_path / "below" / "cache"


# ---- Where numba fails ---------------------------------------------------------------------------------------------

FAILING = {
    "import": ("numba/__init__.py", "raise ImportError('Numba needs NumPy 2.0 or less')", "Numba needs NumPy 2.0"),
    "llvmlite": ("llvmlite/__init__.py", "raise OSError('libllvmlite.so: cannot open')", "libllvmlite.so"),
    "too old": ("numba/__init__.py", "", "numba cannot be imported"),
}


@numba
@pytest.mark.parametrize("case", [*FAILING, "switched off"])
def test_a_numba_that_does_not_run_makes_the_backend_unavailable(tmp_path: Path, case: str) -> None:
    code = """
import torch, moealign
ids = torch.zeros(4, 2, dtype=torch.int32)
explanation = moealign.explain(ids, block_size=4, num_experts=2)
assert explanation.backend == "reference" and explanation.reasons["cpu"] == moealign.backends()["cpu"]
for _ in range(2):
    assert moealign.align(ids, block_size=4, num_experts=2).num_tokens_post_padded.item() == 8
moealign.route(torch.eye(4), 2, block_size=4)
try:
    moealign.align(ids, block_size=4, num_experts=2, backend="cpu")
except moealign.BackendUnavailable as error:
    print(error)
"""
    environment: dict[str, str | None] = {}
    reason = "NUMBA_DISABLE_JIT is set"
    if case == "switched off":
        environment["NUMBA_DISABLE_JIT"] = "1"
    else:
        name, text, reason = FAILING[case]
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    message = printed(code, tmp_path, **environment)
    assert "got 'cpu'" in message
    assert reason in message


@numba
def test_an_exception_from_elsewhere_passes_through_the_import_of_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real, raised = compiled._import, []

    def once(name: str) -> Any:
        if not raised:
            raised.append(name)
            raise TimeoutError("a signal handler's")
        return real(name)

    cpu.unavailable.cache_clear()
    monkeypatch.setattr(compiled, "loaded", {})
    monkeypatch.setattr(compiled, "_import", once)
    with pytest.raises(TimeoutError):
        cpu.unavailable()
    assert cpu.unavailable() is None


@numba
def test_info_shows_the_state_of_the_cpu_backend(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    code = """
import os
from moealign import diagnosis
diagnosis.show()
os.environ["MOEALIGN_NUM_THREADS"] = "0"
diagnosis.show()
"""
    shown = " ".join(printed(code, MOEALIGN_CACHE_DIR=str(tmp_path)).split())
    assert "available: the first call compiles with numba" in shown
    assert "available: but calls are refused: MOEALIGN_NUM_THREADS" in shown
    shown = " ".join(printed("from moealign import diagnosis; diagnosis.show()", NUMBA_DISABLE_JIT="1").split())
    assert "unavailable: NUMBA_DISABLE_JIT is set" in shown
