"""Kernels that numba compiles, imported and compiled at their first use.

Importing and compiling run Python for seconds, in which a finalizer, a signal handler or a profiler may call the
package again on the same thread.  numba cannot compile inside itself, so :func:`find` returns None to such a call,
which is then computed by the reference.  The same holds for a kernel that numba fails to compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["failure", "find", "is_kept", "is_ready", "loaded"]

_log = logging.getLogger("moealign")
_MODULES = {name: f"{__package__}.{name}" for name in ("align_kernels", "route_kernels")}
_TRIES = 2  # an exception that a second import does not repeat came from elsewhere

#: The modules of kernels by name, once they are imported.
loaded: dict[str, Any] = {}
_ready: dict[tuple[str, int], Callable[..., Any]] = {}
_failed: set[tuple[str, int]] = set()
_here = threading.local()


@contextmanager
def _at_work() -> Iterator[None]:
    """Calls from inside this one, on the same thread, find numba busy."""
    try:
        _here.busy = True
        yield
    finally:
        _here.busy = False


def _is_busy() -> bool:
    if getattr(_here, "busy", False):
        return True
    # Half imported, by this thread or another: waiting could be for ever, reading it would find names missing.
    modules = (sys.modules.get(name) for name in ("numba", *_MODULES.values()))
    return any(getattr(getattr(each, "__spec__", None), "_initializing", False) for each in modules)


def _whole(name: str) -> Any:
    """The module, imported.  Where that is interrupted, what it had brought in goes too: Python keeps the parts of a
    package whose own import failed, and no later import of it succeeds."""
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except BaseException:
        for each in set(sys.modules) - before:
            if each.split(".")[0] in ("numba", "llvmlite"):
                sys.modules.pop(each, None)
        raise


def failure() -> str | None:
    """Why numba cannot run here; None if it can, or if that is being found out.  Imports it: nothing else tells."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'moealign[cpu]'"
    if loaded or _is_busy():
        return None
    errors: list[Exception] = []
    while len(errors) < _TRIES:
        try:
            with _at_work():
                if _whole("numba.core.config").DISABLE_JIT:
                    return "NUMBA_DISABLE_JIT is set, and these kernels run compiled only; unset it"
                found = {name: _whole(path) for name, path in _MODULES.items()}
        except Exception as error:  # whatever keeps numba from being imported is the reason
            errors.append(error)
            continue
        loaded.update(found)
        if errors:
            raise errors[0]  # it did not come from numba: a signal handler's, say
        return None
    if type(errors[0]) is not type(errors[1]):
        raise errors[0]  # it interrupted numba, which can no longer be imported
    return f"numba cannot be imported ({errors[0]!r}); pip install --upgrade 'moealign[cpu]'"


def find(module: str, name: str, width: int = 0) -> Callable[..., Any] | None:
    """The kernel `name`, of the variant for ids of `width` bytes if there are several; compiled before it is returned,
    so that calling it runs no Python.  None if it cannot be had, see above."""
    key = (name, width)
    kernel = _ready.get(key)
    if kernel is not None or key in _failed or _is_busy():
        return kernel
    if failure() is not None or not loaded:
        return None
    dispatcher: Callable[..., Any] = _dispatcher(loaded[module], name, width)
    errors: list[Exception] = []
    while len(errors) < _TRIES:
        try:
            with _at_work():
                dispatcher.compile(_signature(dispatcher))  # type: ignore[attr-defined]
        except Exception as error:
            errors.append(error)
        else:
            _ready[key] = dispatcher
            if errors:
                raise errors[0]  # it did not come from numba: a signal handler's, say
            return dispatcher
    _failed.add(key)
    why = errors[-1]
    _log.warning("backend 'reference' computes in the place of %s, which numba cannot compile: %r", name, why)
    if type(errors[0]) is not type(why):
        raise errors[0]  # it interrupted numba, which can no longer compile
    return None


def _dispatcher(module: ModuleType, name: str, width: int) -> Any:
    found = getattr(module, name)
    return found[width] if width else found


def _signature(dispatcher: Any) -> tuple[Any, ...]:
    arguments: int = dispatcher.py_func.__code__.co_argcount
    return (loaded["align_kernels"].types.int64,) * arguments


def is_ready(name: str, width: int = 0) -> bool:
    """Whether the kernel is compiled in this process."""
    return (name, width) in _ready


def is_kept(module: str, name: str, width: int = 0) -> bool:
    """Whether the kernel is on disk, for this version of it, of numba and of the processor."""
    dispatcher = _dispatcher(loaded[module], name, width)
    place = dispatcher._cache.place(_signature(dispatcher), dispatcher.targetctx.codegen())
    return place is not None and place[0].exists()
