"""The number of threads of a large call, and the helper threads that run them."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import torch

from ...errors import InvalidInput

__all__ = ["Helpers", "check_num_threads", "helpers", "num_threads"]

MAX_THREADS = 64
MAX_CLOSE = 2.0  # seconds that the end of the interpreter waits for helpers

_VARIABLE = "MOEALIGN_NUM_THREADS"
# os.environ encodes and decodes at every access, which takes a third of the time of a small call.
_raw = getattr(os.environ, "_data", os.environ).get
_RAW_VARIABLE = os.environ.encodekey(_VARIABLE) if hasattr(os.environ, "encodekey") else _VARIABLE
_UNREAD = object()
_valid: Any = _UNREAD  # the last valid value of the variable


def check_num_threads() -> None:
    """Raise InvalidInput if MOEALIGN_NUM_THREADS is set and no positive integer.  Calls on one thread check it too."""
    if _raw(_RAW_VARIABLE) is not _valid:
        num_threads()


def num_threads() -> int:
    """Threads of a large call: MOEALIGN_NUM_THREADS if set, else as many as torch uses; at most 64."""
    global _valid
    raw = _raw(_RAW_VARIABLE)
    text = os.environ.get(_VARIABLE)
    try:
        threads = torch.get_num_threads() if text is None else int(text)
    except ValueError:
        threads = 0
    if threads < 1:
        raise InvalidInput(f"MOEALIGN_NUM_THREADS: expected a whole number from 1 on, got {text!r}")
    _valid = raw
    return min(threads, MAX_THREADS)


class Helpers:
    """Daemon threads that run (task, arguments) from a queue; started when first needed, and again in a forked child.

    A call's own thread never waits for a helper to arrive.  So calls from many threads share the helpers safely, and
    one that cannot be started or has died is not missed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may call from inside `ask`
        self.queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], object] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []  # those that take tasks
        self.started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # these, and those about to
        self.closed = False

    def ask(self, count: int, task: Callable[..., Any], arguments: tuple[Any, ...], alive: object) -> None:
        """Let up to `count` helpers run task(*arguments).  They keep a reference to `alive` until they are done."""
        with self.lock:
            if self.closed:  # the interpreter is finalizing: the caller does all the work
                return
            running = len(self.threads)
            while running < count:
                thread = threading.Thread(target=self._serve, name=f"moealign-{running}", daemon=True)
                self.started.add(thread)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):  # the system's limit
                    break
                running += 1
        for _ in range(min(count, running)):
            self.queue.put((task, arguments, alive))

    def _serve(self) -> None:
        this = threading.current_thread()
        self.threads.append(this)  # not in `ask`, where an exception may come between the start and the append
        try:
            while (item := self.queue.get()) is not None:
                task, arguments, alive = item
                with suppress(MemoryError):  # it has taken no chunk: the other threads do the work
                    task(*arguments)
                del item, arguments, alive
            self.queue.put(None)  # stops the next helper
        finally:
            self.threads.remove(this)

    def close(self) -> None:
        """Stop the helpers: one that returned from compiled code to a finalized interpreter would abort the process."""
        self.closed = True
        self.queue.put(None)
        deadline = time.monotonic() + MAX_CLOSE
        for thread in list(self.started):
            with suppress(RuntimeError):  # it was not started, or is just starting
                thread.join(max(deadline - time.monotonic(), 0))


helpers = Helpers()
atexit.register(helpers.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.__init__)  # type: ignore[misc]
