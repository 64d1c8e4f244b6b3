"""Kernels that numba compiles, imported and compiled at their first use.

Importing and compiling take seconds, during which a finalizer, a signal handler or a profiler may call the package
again on the same thread.  numba cannot compile inside itself, so :func:`find` returns None to such a call, which the
reference backend then computes.  The same holds for a kernel that numba fails to compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import how_to_install

__all__ = ["failure", "find", "folder", "is_cached", "is_ready", "loaded"]

_log = logging.getLogger("moealign")
_MODULES = {name: f"{__package__}.{name}" for name in ("intrinsics", "align_kernels", "route_kernels")}
_TRIES = 2  # an exception that a second try does not repeat was not numba's

#: The modules that import numba, by name; empty until they are imported.
loaded: dict[str, Any] = {}
_ready: dict[tuple[str, int], Callable[..., Any]] = {}
_failed: set[tuple[str, int]] = set()
_thread = threading.local()


@contextmanager
def _busy() -> Iterator[None]:
    """numba is busy for calls from inside this block, on the same thread."""
    try:
        _thread.busy = True
        yield
    finally:
        _thread.busy = False


def _is_busy() -> bool:
    if getattr(_thread, "busy", False):
        return True
    # Half imported, by this thread or another: waiting could deadlock, and names are still missing.
    modules = (sys.modules.get(name) for name in ("numba", *_MODULES.values()))
    return any(getattr(getattr(each, "__spec__", None), "_initializing", False) for each in modules)


def _import(name: str) -> Any:
    """Import a module.  If that fails, remove the parts of numba that it had imported: Python keeps them although the
    package's own import failed, and no later import would succeed."""
    before = set(sys.modules)
    try:
        return importlib.import_module(name)
    except BaseException:
        for each in set(sys.modules) - before:
            if each.split(".")[0] in ("numba", "llvmlite"):
                sys.modules.pop(each, None)
        raise


def failure() -> str | None:
    """Why numba cannot run here; None if it can, or while it is being imported.  Imports it, the only way to know."""
    if importlib.util.find_spec("numba") is None:
        return f"numba is not installed: {how_to_install('cpu')}"
    if loaded or _is_busy():
        return None
    errors: list[Exception] = []
    while len(errors) < _TRIES:
        try:
            with _busy():
                if _import("numba.core.config").DISABLE_JIT:
                    return "NUMBA_DISABLE_JIT is set, and these kernels run compiled only; unset it"
                modules = {name: _import(path) for name, path in _MODULES.items()}
        except Exception as error:  # of any type: it is the reason
            errors.append(error)
            continue
        loaded.update(modules)
        if errors:
            raise errors[0]  # not numba's: a signal handler's, say
        return None
    if type(errors[0]) is not type(errors[1]):
        raise errors[0]  # it interrupted numba, which can no longer be imported
    return f"numba cannot be imported ({errors[0]!r}): {how_to_install('cpu', upgrade=True)}"


def find(module: str, name: str, width: int = 0) -> Callable[..., Any] | None:
    """The kernel `name`, of the variant for ids of `width` bytes if there are several; compiled before it is returned,
    so that calling it runs no Python.  None if numba is busy, unavailable or cannot compile it."""
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
            with _busy():
                dispatcher.compile(_signature(dispatcher))  # type: ignore[attr-defined]
        except Exception as error:
            errors.append(error)
        else:
            _ready[key] = dispatcher
            if errors:
                raise errors[0]  # not numba's: a signal handler's, say
            return dispatcher
    _failed.add(key)
    reason = errors[-1]
    _log.warning("numba cannot compile %s (%r): falling back to backend 'reference'", name, reason)
    if type(errors[0]) is not type(reason):
        raise errors[0]  # it interrupted numba, which can no longer compile
    return None


def _dispatcher(module: ModuleType, name: str, width: int) -> Any:
    """The kernel, or its variant for ids of `width` bytes."""
    kernel = getattr(module, name)
    return kernel[width] if width else kernel


def _signature(dispatcher: Any) -> tuple[Any, ...]:
    arguments: int = dispatcher.py_func.__code__.co_argcount
    return (loaded["intrinsics"].int64,) * arguments


def is_ready(name: str, width: int = 0) -> bool:
    """Whether the kernel is compiled in this process."""
    return (name, width) in _ready


def folder() -> Path | None:
    """The folder of compiled kernels; None if there is none that is safe to use.  numba must be loaded."""
    return loaded["intrinsics"].kernel_folder()  # type: ignore[no-any-return]


def is_cached(module: str, name: str, width: int = 0) -> bool:
    """Whether the kernel is on disk, for its current sources, this numba and this processor."""
    dispatcher = _dispatcher(loaded[module], name, width)
    entry = dispatcher._cache.entry(_signature(dispatcher), dispatcher.targetctx.codegen())
    return entry is not None and entry[0].exists()
