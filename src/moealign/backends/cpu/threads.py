"""How many threads a large call has, and who runs on them."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

from moealign.errors import InvalidInput

__all__ = ["Helpers", "helpers", "num_threads"]

MAX_THREADS = 64


def num_threads() -> int:
    """Threads of a large call: MOEALIGN_NUM_THREADS if set, else as many as torch uses; at most 64."""
    given = os.environ.get("MOEALIGN_NUM_THREADS")
    if given is None:
        return min(torch.get_num_threads(), MAX_THREADS)
    try:
        threads = int(given)
    except ValueError:
        threads = 0
    if threads < 1:
        raise InvalidInput(f"MOEALIGN_NUM_THREADS: expected a whole number from 1 on, got {given!r}")
    return min(threads, MAX_THREADS)


class Helpers:
    """Daemon threads that run (task, arguments) from a queue; started when first needed, and again in a forked child.

    The first thread of a call never waits for a helper to come, so calls from many threads share them safely.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...], object] | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.closed = False

    def ask(self, count: int, task: Callable[..., Any], arguments: tuple[Any, ...], alive: object) -> None:
        """Let `count` helpers run task(*arguments); `alive` stays alive until the last of them has left."""
        with self.lock:
            if self.closed:  # the interpreter is about to end: the caller does it all
                return
            while len(self.threads) < count:
                name = f"moealign-{len(self.threads)}"
                self.threads.append(threading.Thread(target=self._serve, name=name, daemon=True))
                self.threads[-1].start()
        for _ in range(count):
            self.queue.put((task, arguments, alive))

    def _serve(self) -> None:
        while True:
            asked = self.queue.get()
            if asked is None:
                return
            task, arguments, alive = asked
            task(*arguments)
            del asked, alive

    def close(self) -> None:
        """Send all home: one that comes back from compiled code when the interpreter has ended aborts the process."""
        with self.lock:
            self.closed = True
        for _ in self.threads:
            self.queue.put(None)
        for thread in self.threads:
            thread.join(timeout=5)


helpers = Helpers()
atexit.register(helpers.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=helpers.__init__)  # type: ignore[misc]
