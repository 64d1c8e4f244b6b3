"""How many threads a large call has, and who runs on them."""

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

from moealign.errors import InvalidInput

__all__ = ["Helpers", "check_num_threads", "helpers", "num_threads"]

MAX_THREADS = 64
LONGEST_CLOSE = 2.0  # seconds

_VARIABLE = "MOEALIGN_NUM_THREADS"
# os.environ encodes and decodes at each look, which takes as long as a third of a small call.
_raw = getattr(os.environ, "_data", os.environ).get
_RAW_VARIABLE = os.environ.encodekey(_VARIABLE) if hasattr(os.environ, "encodekey") else _VARIABLE
_UNREAD = object()
_seen: Any = _UNREAD  # what the variable held when it was last found right


def check_num_threads() -> None:
    """Raise InvalidInput if MOEALIGN_NUM_THREADS is none: for calls of any size, whether they use threads or not."""
    if _raw(_RAW_VARIABLE) is not _seen:
        num_threads()


def num_threads() -> int:
    """Threads of a large call: MOEALIGN_NUM_THREADS if set, else as many as torch uses; at most 64."""
    global _seen
    raw = _raw(_RAW_VARIABLE)
    given = os.environ.get(_VARIABLE)
    try:
        threads = torch.get_num_threads() if given is None else int(given)
    except ValueError:
        threads = 0
    if threads < 1:
        raise InvalidInput(f"MOEALIGN_NUM_THREADS: expected a whole number from 1 on, got {given!r}")
    _seen = raw
    return min(threads, MAX_THREADS)


class Helpers:
    """Daemon threads that run (task, arguments) from a queue; started when first needed, and again in a forked child.

    The first thread of a call never waits for a helper to come, so calls from many threads share them safely, and a
    thread that cannot be started or has died is not missed.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal handler may call from inside `ask`
        self.queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], object] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []  # those that serve
        self.started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # and those that are about to
        self.closed = False

    def ask(self, count: int, task: Callable[..., Any], arguments: tuple[Any, ...], alive: object) -> None:
        """Let up to `count` helpers run task(*arguments); `alive` stays alive until the last of them has left."""
        with self.lock:
            if self.closed:  # the interpreter is about to end: the caller does it all
                return
            here = len(self.threads)
            while here < count:
                thread = threading.Thread(target=self._serve, name=f"moealign-{here}", daemon=True)
                self.started.add(thread)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):  # the system has room for no more
                    break
                here += 1
        for _ in range(min(count, here)):
            self.queue.put((task, arguments, alive))

    def _serve(self) -> None:
        this = threading.current_thread()
        self.threads.append(this)  # here, not where it is started: an exception there may come after the start
        try:
            while (asked := self.queue.get()) is not None:
                task, arguments, alive = asked
                with suppress(MemoryError):  # it took no part: the others do its share
                    task(*arguments)
                del asked, arguments, alive
            self.queue.put(None)  # for the next
        finally:
            self.threads.remove(this)

    def close(self) -> None:
        """Send all home: one that comes back from compiled code when the interpreter has ended aborts the process."""
        self.closed = True
        self.queue.put(None)
        latest = time.monotonic() + LONGEST_CLOSE
        for thread in list(self.started):
            with suppress(RuntimeError):  # its start failed, or is not over yet
                thread.join(max(latest - time.monotonic(), 0))


helpers = Helpers()
atexit.register(helpers.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.__init__)  # type: ignore[misc]
