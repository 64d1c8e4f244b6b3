"""Timers: CUDA-graph replay for the device, loops of calls for the host.  All times are in microseconds per call."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Times = dict[str, list[float]]  # by implementation


# ---- the device --------------------------------------------------------------------------------------------------


def event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def device_us(run: Callable[[], Any]) -> float:
    """Device time of the work that `run` enqueues on the current stream.  Waits for that work."""
    start, end = event_pair()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end) * 1e3)


def capture(calls: Sequence[Callable[[], Any]], warm_up: int = 0) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `calls`, the first `warm_up` of which run eagerly beforehand.

    It is captured on the current stream, or on torch's capture stream if the current one is the default stream.
    """
    for call in calls[:warm_up]:
        call()
    torch.cuda.synchronize()
    current = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=None if current == torch.cuda.default_stream() else current):
        for call in calls:
            call()
    return graph


def graph_us(
    calls: Sequence[Callable[[], Any]],
    *,
    warm_up: int,
    min_replays: int,
    max_replays: int,
    budget_us: float = 0.0,
    untimed_replays: int = 1,
) -> float:
    """Median device time of a call in replays of one graph of `calls`.

    Replays between `min_replays` and `max_replays` times, and stops in between once they took `budget_us` together.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the inputs of the calls were written there
    with torch.cuda.stream(stream):
        graph = capture(calls, warm_up)
        for _ in range(untimed_replays):
            graph.replay()
        times: list[float] = []
        while len(times) < min_replays or (sum(times) < budget_us and len(times) < max_replays):
            times.append(device_us(graph.replay))
    return statistics.median(times) / len(calls)


def graphs_in_turns(
    calls: Mapping[str, Callable[[int], Any]],
    *,
    slots: int,
    calls_per_graph: int,
    warm_up: int = 0,
    max_replays: int = 50,
    budget_us: float = 150_000.0,
    on_failure: Callable[[str, Exception], None],
) -> Times:
    """Device time of each implementation in graph replay; they take turns, so that clock drift affects all alike.

    Args:
        calls: by implementation, a function that enqueues the work of one slot: one set of inputs and outputs.
        slots: the calls of a graph use the slots in turn, so that no call finds the inputs of the last one in a cache.
        calls_per_graph: calls in one graph.
        warm_up: eager calls before the capture.
        max_replays: timed replays of a fast implementation.
        budget_us: device time of one implementation; a slow one is replayed less often, but at least five times.
        on_failure: receives an implementation that cannot be captured, and why.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    replays: dict[str, int] = {}
    for impl, call in calls.items():
        try:
            graph = capture([lambda i=i, call=call: call(i % slots) for i in range(calls_per_graph)], warm_up)  # type: ignore[misc]
        except Exception as error:
            on_failure(impl, error)
            torch.cuda.synchronize()
            continue
        graph.replay()
        graphs[impl] = graph
        replays[impl] = max(5, min(max_replays, int(budget_us / device_us(graph.replay))))
    pause = getattr(torch.cuda, "_sleep", None)  # keeps the device busy while the host queues a replay and its events
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {impl: [] for impl in graphs}
    for turn in range(max(replays.values(), default=0)):
        for impl, graph in graphs.items():
            if turn >= replays[impl]:
                continue
            start, end = event_pair()
            if pause is not None:
                pause(100_000)
            start.record()
            graph.replay()
            end.record()
            events[impl].append((start, end))
    torch.cuda.synchronize()
    return {impl: [a.elapsed_time(b) * 1e3 / calls_per_graph for a, b in pairs] for impl, pairs in events.items()}


# ---- the host ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for torch and for the cpu backend, whatever the environment says, and the former ones after."""
    threads, variable = torch.get_num_threads(), os.environ.pop("MOEALIGN_NUM_THREADS", None)
    torch.set_num_threads(1)  # the cpu backend takes as many as torch where the variable is not set
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is not None:
            os.environ["MOEALIGN_NUM_THREADS"] = variable


NO_ARGUMENTS: tuple[tuple[Any, ...], ...] = ((),)  # one call without arguments


def host_us(
    call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]] = NO_ARGUMENTS, wait: Callable[[], Any] | None = None
) -> float:
    """Wall time of a call, one call for each tuple of `arguments`; `wait` runs before the clock stops."""
    start = time.perf_counter()
    for each in arguments:
        call(*each)
    if wait is not None:
        wait()
    return (time.perf_counter() - start) * 1e6 / len(arguments)


def host_in_turns(
    calls: Mapping[str, Callable[..., Any]],
    arguments: Mapping[str, Sequence[tuple[Any, ...]]],
    *,
    min_turns: int,
    max_turns: int | None = None,
    seconds: float = 0.0,
    order: random.Random | None = None,
    before: Callable[[str], Any] | None = None,
) -> Times:
    """Wall time of each implementation, one mean a turn; in every turn each makes the calls of its `arguments`.

    Takes turns until `seconds` have passed, but at least `min_turns` and at most `max_turns`.  With `order` every turn
    has a random order, so that no implementation always follows the same one.  `before` is called, untimed, with the
    name of the implementation whose turn it is.
    """
    times: Times = {impl: [] for impl in calls}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < min_turns or (time.perf_counter() < end and (max_turns is None or turn < max_turns)):
        for impl in order.sample(list(calls), len(calls)) if order else calls:
            if before is not None:
                before(impl)
            times[impl].append(host_us(calls[impl], arguments[impl]))
        turn += 1
    return times
