"""The layout and the router on the CPU: numba compiles them at the first call and caches them on disk.

numba is imported by a first call, or by :func:`unavailable`.
"""

from __future__ import annotations

from functools import lru_cache, partial

from ...errors import MoealignError
from ...problem import AlignProblem, RouteProblem
from .. import Prepared, PreparedRoute
from . import compiled
from .align import CODES, align_batched
from .align import prepare as _prepare
from .route import route as _route
from .threads import check_num_threads, num_threads

__all__ = ["FUSES_OPTIONS", "note", "num_threads", "prepare", "prepare_route", "refuses", "unavailable"]

FUSES_OPTIONS = False


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    return compiled.failure()


def refuses(problem: AlignProblem | RouteProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"expected CPU tensors, got tensors on {problem.device}; it sorts in host memory only"
    return None


def note(problem: AlignProblem) -> str:
    try:
        check_num_threads()
    except MoealignError as error:
        return f"but calls are refused: {error}"
    width = abs(CODES[problem.dtype])
    first, *others = [("batched_scan", 0)] if problem.op == "align_batched" else [("serial", width), ("shared", width)]
    if unavailable() is not None or not compiled.loaded or any(compiled.is_ready(*each) for each in (first, *others)):
        return ""
    folder = compiled.folder()
    if folder is None:
        return "the first call compiles with numba, about 3 s, in every process: see the warning about the cache folder"
    if compiled.is_cached("align_kernels", *first):
        return f"compiled by numba before, cached in {folder}: the first call loads it, about 0.5 s"
    return f"the first call compiles with numba, about 3 s, then it is cached in {folder}"


def prepare(problem: AlignProblem) -> Prepared:
    return Prepared(partial(align_batched, problem)) if problem.op == "align_batched" else _prepare(problem)


def prepare_route(route: RouteProblem, layout: AlignProblem | None = None) -> PreparedRoute:
    return PreparedRoute(partial(_route, route))
