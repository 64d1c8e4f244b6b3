"""The backends, in the order in which a call tries them: each is a row in the table below and a package beside it.

Every backend has the same modules: ``align.py``, ``route.py`` and their kernels.  It fills outputs and allocates none.
Its package has these functions:

``unavailable() -> str | None``
    Why it cannot run on this machine, and how to make it run; None if it can.  Imports nothing heavy until called.
``refuses(problem) -> str | None``
    Why it cannot take this AlignProblem or RouteProblem although it is available; None if it can.  Depends on nothing
    but the problem.
``note(problem) -> str``
    What a first call involves (a compilation, a cache), in one line; may be empty.
``prepare(problem) -> Prepared``
    What a call with this AlignProblem runs; prepared once per signature.
``prepare_route(route, layout=None) -> PreparedRoute``
    The same for a RouteProblem, and for the layout of its ids if an AlignProblem is given.
``FUSES_OPTIONS: bool``
    Whether `prepare_route`, given a layout, takes a RouteProblem with replayed ids, factors of experts or shared
    experts.  Otherwise calls compose them of operators.

Prepared calls run on any thread, also inside each other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

__all__ = ["TABLE", "Prepared", "PreparedRoute", "load"]

TABLE: dict[str, str] = {
    "cuda": "moealign.backend.cuda",
    "triton": "moealign.backend.triton",
    "cpu": "moealign.backend.cpu",
    "reference": "moealign.backend.reference",
}


class Prepared(NamedTuple):
    """One alignment, ready to run.  Both functions fill every output that is not None, to the last element."""

    #: ``(topk_ids, expert_map, num_valid_tokens, error_word, out)``; batched ``(expert_num_tokens, error_word, out)``
    run: Callable[..., None]
    #: ``(topk_ids, sorted_token_ids, expert_ids, num_tokens_post_padded)``: faster, for a call without options
    required: Callable[..., None] | None = None


class PreparedRoute(NamedTuple):
    """One router, ready to run."""

    #: ``(router_logits, correction_bias, num_valid_tokens, weights, ids, mean_probability)``: fills the last three, of
    #: which the mean may be None
    run: Callable[..., None]
    #: the same, then ``expert_map, error_word, out``, and with options ``replay_ids, expert_scale``: the router and the
    #: layout of its ids; None if they are two calls
    run_with_layout: Callable[..., None] | None = None


def load(name: str) -> ModuleType:
    """The package of one backend, imported at first use."""
    return importlib.import_module(TABLE[name])
