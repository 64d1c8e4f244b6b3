"""The router on the CPU: the launcher of ``route_kernels.py``.

One pass over the logits, on several threads if there are many.  With the mean it runs on one thread, which sums the
shares in the order of the tokens.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from ...problem import SCORINGS, RouteProblem
from ..reference import route as reference
from . import compiled
from .threads import check_num_threads, helpers, num_threads

__all__ = ["route"]

PARALLEL_LOGITS = 262_144  # fewer logits than this stay on one thread
MIN_LOGITS_PER_THREAD = 65_536
CHUNKS_PER_THREAD = 4
_ARGUMENTS = struct.Struct("14qd")


def route(
    routing: RouteProblem,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
) -> None:
    """Fill `weights` and `ids` ``[tokens, top_k]``, and `mean_probability` ``[num_experts]`` unless that is None."""
    check_num_threads()
    kernel = compiled.find("route_kernels", "route")
    if kernel is None:
        inputs = (router_logits, correction_bias, num_valid_tokens)
        reference.route(routing, *inputs, weights, ids, mean_probability)
        return
    first = compiled.loaded["route_kernels"].ARGUMENTS_AT
    tokens, experts = routing.tokens, routing.num_experts
    logits, bias = (
        _contiguous_float32(router_logits),
        None if correction_bias is None else _contiguous_float32(correction_bias),
    )
    valid = tokens if num_valid_tokens is None else min(max(int(num_valid_tokens), 0), tokens)
    threads = chunks = 1
    if tokens * experts >= PARALLEL_LOGITS and mean_probability is None:
        threads = min(num_threads(), tokens * experts // MIN_LOGITS_PER_THREAD, tokens)
        chunks = min(CHUNKS_PER_THREAD * threads, tokens) if threads > 1 else 1
    arguments = ctypes.create_string_buffer(first + _ARGUMENTS.size)
    _ARGUMENTS.pack_into(
        arguments, first,
        chunks, tokens, experts, routing.top_k, valid,
        SCORINGS.index(routing.scoring), routing.renormalize, routing.num_groups, routing.topk_groups,
        logits.data_ptr(), 0 if bias is None else bias.data_ptr(), weights.data_ptr(), ids.data_ptr(),
        0 if mean_probability is None else mean_probability.data_ptr(), routing.scale,
    )  # fmt: skip
    address = ctypes.addressof(arguments)
    if threads > 1:
        helpers.ask(threads - 1, kernel, (0, address), arguments)
    kernel(1, address)


def _contiguous_float32(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()
