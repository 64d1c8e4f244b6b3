"""One run of the benchmark: verify each candidate, time it, keep its row."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import BackendUnavailable
from ..timing import Times, graphs_in_turns, host_in_turns, host_us, one_thread
from .candidates import Candidate
from .cases import Case, Size, make_ids
from .floors import Floors
from .progress import first_line, log
from .rows import row_of

SLOTS = 20  # sets of inputs and outputs that the calls of a graph use in turn
CALLS_PER_GRAPH = 40
REPLAYS = 50
BUDGET_US = 150_000  # of device time for one candidate in one case: slow ones are replayed less often


@dataclass
class Session:
    """The machine, the settings, the rows measured so far, and the failures."""

    device: torch.device
    gpu: str
    backends: list[str]
    peers: set[str] = field(default_factory=set)
    sglang_max_routes: int = 0
    floors: Floors | None = None
    quick: bool = False
    replays: int = REPLAYS
    slots: int = SLOTS
    started: float = field(default_factory=time.perf_counter)
    budget: float = 200.0  # seconds
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    ended: BaseException | None = None  # what cut the run short

    @functools.cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(20261123)

    def over_budget(self) -> bool:
        return time.perf_counter() - self.started > self.budget

    def inputs(self, kind: str, size: Size) -> list[torch.Tensor]:
        return [make_ids(kind, size, self.generator) for _ in range(self.slots)]

    def add(self, case: Case, impl: str, times: list[float]) -> None:
        self.rows.append(row_of(case.bench, case.name, case.routes, case.size, impl, times, self.gpu))

    def run(
        self, case: Case, candidates: Sequence[Candidate], timer: Callable[[Session, Sequence[Candidate]], Times]
    ) -> None:
        """Verify each candidate, time those that are right, add their rows.

        A candidate with preallocated buffers is verified once more afterwards, on what the timed calls wrote.
        """
        right = [candidate for candidate in candidates if self.verify(case, candidate)]
        gc.collect()
        gc.disable()
        try:
            times = timer(self, right)
        finally:
            gc.enable()
        for candidate in right:
            if candidate.impl not in times:
                continue
            wrong = candidate.check(self.slots - 1) if candidate.check and candidate.buffers else None
            if wrong:
                self.fail(case, candidate, f"after the timed calls: {wrong}")
            else:
                self.add(case, candidate.impl, times[candidate.impl])

    def verify(self, case: Case, candidate: Candidate) -> bool:
        """Whether two calls give the expected outputs; the second must not wait for the device."""
        cuda = self.device.type == "cuda"
        for slot in (0, 1):
            try:
                candidate.poison(slot)
                if cuda and slot:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                candidate.call(slot)
            except BackendUnavailable as refusal:
                log(f"{case.bench} {case.name} {candidate.impl}: left out, {refusal}")
                return False
            except Exception as error:
                self.fail(case, candidate, first_line(error))
                return False
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            wrong = candidate.check(slot) if candidate.check else None
            if wrong:
                self.fail(case, candidate, wrong)
                return False
        candidate.poison(self.slots - 1)
        return True

    def fail(self, case: Case, candidate: Candidate, reason: str) -> None:
        line = f"WRONG {case.bench} {case.name} {candidate.impl}: {reason}"
        self.failures.append(line)
        log(line)


# ---- timers ------------------------------------------------------------------------------------------------------


def log_capture_failure(impl: str, error: Exception) -> None:
    log(f"{impl}: not captured, {first_line(error.__context__ or error)}")


def time_graphs(session: Session, candidates: Sequence[Candidate]) -> Times:
    """Device time of a call in graph replay.  The current stream must not be the default one."""
    return graphs_in_turns(
        {candidate.impl: candidate.call for candidate in candidates},
        slots=session.slots,
        calls_per_graph=CALLS_PER_GRAPH,
        max_replays=session.replays,
        budget_us=BUDGET_US,
        on_failure=log_capture_failure,
    )


def time_host(session: Session, candidates: Sequence[Candidate]) -> Times:
    """Host time of an eager call: loops of 100 calls that never wait for the device, which is idle before each loop."""
    calls = {candidate.impl: candidate.call for candidate in candidates}
    arguments = [(i % session.slots,) for i in range(100)]
    turns = 9 if session.quick else 31
    times = host_in_turns(
        calls, dict.fromkeys(calls, arguments), min_turns=turns, before=lambda _: torch.cuda.synchronize()
    )
    torch.cuda.synchronize()
    return {impl: each[1:] for impl, each in times.items()}  # the first turn warms up


def time_cpu(session: Session, candidates: Sequence[Candidate]) -> Times:
    """Wall time of a call on one CPU thread, in loops of at least two milliseconds."""
    calls = {candidate.impl: candidate.call for candidate in candidates}
    once = [(slot,) for slot in range(session.slots)]
    arguments = {}
    with one_thread():
        for impl, call in calls.items():
            count = max(session.slots, int(2e3 / host_us(call, once)))
            arguments[impl] = [(i % session.slots,) for i in range(count)]
        return host_in_turns(calls, arguments, min_turns=5 if session.quick else 15)
