"""The backends, in the order in which a call tries them.  One row here and one module beside this file each.

A backend is a module with these functions; it fills the tensors of `out` and never allocates a result:

``unavailable() -> str | None``
    Why it cannot run on this machine at all, and what would make it work; None if it can.  Nothing heavy is imported
    before this is asked, and what does not tell otherwise whether it works is imported here.
``refuses(problem) -> str | None``
    Why it cannot take this call on a machine where it runs; None if it can.  Depends on nothing but the problem.
``note(problem) -> str``
    What a user should expect of a first call (a compilation, a cache), in one line; may be empty.
``align(problem, topk_ids, expert_map, num_valid_tokens, error_word, out) -> None``
``align_batched(problem, expert_num_tokens, error_word, out) -> None``
    Fill every tensor of `out` (a BlockLayout) that is not None, to the last element.
``align_three(problem, topk_ids, sorted_token_ids, expert_ids, num_tokens_post_padded) -> None``
    Only where a call without options into the first three outputs has a shorter way.
``route(routing, router_logits, correction_bias, num_valid_tokens, weights, ids, mean_probability) -> None``
    Only those that have a router: fill the last three (the last may be None).
``refuses_route(routing) -> str | None``
    Only where a router does not take every problem that the backend takes.
``route_align(routing, problem, router_logits, correction_bias, num_valid_tokens, weights, ids, mean_probability,
expert_map, error_word, out) -> None``
    Only where the router and the layout of its ids are made together: both of the above at once.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["TABLE", "load"]

TABLE: dict[str, str] = {
    "cuda": "moealign.backends.cuda",
    "triton": "moealign.backends.triton",
    "cpu": "moealign.backends.cpu",
    "reference": "moealign.backends.reference",
}


def load(name: str) -> ModuleType:
    """The module of one backend, imported at first use."""
    return importlib.import_module(TABLE[name])
