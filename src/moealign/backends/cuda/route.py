"""The launcher of ``choose.cu``, and of ``align.cu`` where that chooses the experts itself.

Up to 256 routes one launch does all; beyond, the router's launch is followed by that of the layout, which begins while
the router ends and waits for its ids.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...layout import BlockLayout, Problem, Routing, cdiv
from .align import Path, align, align_after, defines_of, path_of, pointers
from .compile import COOPERATIVE, PLAIN, Kernel, Launch, green_multiprocessors, kernel

__all__ = ["MOST_EXPERTS", "MOST_GROUPS", "refuses_route", "route", "route_align", "specialisations"]

MOST_EXPERTS = 2048  #: 64 a lane
MOST_GROUPS = 32  #: one a lane

# -------------------------------------------------------------------------------------------------------------- tuning

_WARPS = 4  #: tokens of a CTA of the router alone
_MEAN_CTAS = 2  #: a multiprocessor, where the mean is wanted
_FUSED_ROUTES = 256
_FUSED_TOKENS = 8  #: every CTA chooses for all of them, a warp each; more are faster in two launches
_FUSED_EXPERTS = 1024  #: beyond, a second launch is as fast
_EARLY_TOKENS = 512  #: up to so many the next kernel may begin with the router, beyond only when CTAs of it end

_LOGITS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses_route(routing: Routing) -> str | None:
    """Why there is no kernel for this router; None if there is."""
    if routing.num_experts > MOST_EXPERTS:
        return f"routes up to {MOST_EXPERTS} experts, these are {routing.num_experts}"
    if routing.num_groups > MOST_GROUPS:
        return f"routes up to {MOST_GROUPS} groups, these are {routing.num_groups}"
    return None


def _macros(routing: Routing, vector: bool) -> tuple[tuple[str, int], ...]:
    """The macros of choose.cuh but EXPERTS."""
    return (
        ("TOP_K", routing.top_k),
        ("LOGITS", _LOGITS[routing.dtype]),
        ("LOGITS_VECTOR", int(vector)),
        ("SIGMOID", int(routing.scoring == "sigmoid")),
        ("RENORM", int(routing.renormalize)),
        ("BIAS", int(routing.has_bias)),
        ("GROUPS", routing.num_groups),
        ("TOP_GROUPS", routing.topk_groups),
    )


def _vector(routing: Routing, logits: Tensor) -> bool:
    """Whether each lane may read its logits as vectors."""
    each = routing.num_experts // 32 * logits.element_size()
    wide = 16 if each % 16 == 0 else 8 if each % 8 == 0 else 0
    pitch = logits.stride(0) * logits.element_size()
    return bool(wide) and routing.num_experts % 32 == 0 and not (logits.data_ptr() | pitch) % wide


def fused_path(routing: Routing, problem: Problem, path: Path) -> Path | None:
    """How `path` of the layout is launched with the router inside; None if that takes two launches."""
    if routing.num_experts > _FUSED_EXPERTS or routing.tokens > _FUSED_TOKENS or problem.has_error_word:
        return None
    if path.name not in ("warp", "pairwise"):
        return None
    threads = max(path.threads, 32 * routing.tokens)
    return path._replace(threads=threads, grid=path.grid + 1)  # one CTA writes weights and ids


class _Choice:
    """The router of one call as it is launched: logits as kernels take them, and the parameters that follow from it."""

    def __init__(self, routing: Routing, logits: Tensor, bias: Tensor | None) -> None:
        self.logits = logits if logits.stride(1) == 1 or routing.num_experts == 1 else logits.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.vector = _vector(routing, self.logits)
        self.scale = struct.unpack("<i", struct.pack("<f", routing.scale))[0]


_plans: dict[Any, Any] = {}
_MOST_PLANS = 4096


def _remembered(key: Any, make: Callable[[], Any]) -> Any:
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[key] = make()
    return found


def _router(routing: Routing, vector: bool, mean: bool, green: int, index: int) -> tuple[Launch, int]:
    """The launch of the router alone, and the floats of scratch that it takes; the mean in a green context of `green`
    multiprocessors, or if 0 on the whole device."""
    macros = (
        ("EXPERTS", routing.num_experts),
        *_macros(routing, vector),
        ("NVALID", int(routing.has_num_valid_tokens)),
        ("THREADS", 32 * _WARPS),
        ("EARLY", int(routing.tokens <= _EARLY_TOKENS)),
    )
    compiled: Kernel = kernel("choose.cu", "choose_mean" if mean else "choose", macros, index)
    grid = cdiv(routing.tokens, _WARPS)
    if not mean:
        return compiled.prepare(grid, 32 * _WARPS, 0, PLAIN), 0
    each = min(_MEAN_CTAS, compiled.max_blocks(32 * _WARPS, 0))
    grid = max(1, min(grid, each * (green or compiled.multiprocessors)))
    return compiled.prepare(grid, 32 * _WARPS, 0, COOPERATIVE), grid * routing.num_experts


def route(
    routing: Routing,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
) -> None:
    """Fill `weights` and `ids` ``[tokens, top_k]``, and `mean_probability` ``[num_experts]``, in one launch."""
    if routing.tokens == 0:
        if mean_probability is not None:
            mean_probability.zero_()
        return
    _route(routing, _Choice(routing, router_logits, correction_bias), num_valid_tokens, weights, ids, mean_probability)


def _route(
    routing: Routing,
    choice: _Choice,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
) -> None:
    index = ids.device.index
    mean = mean_probability is not None
    green = green_multiprocessors(index) if mean else 0
    key = ("router", routing, choice.vector, mean, green)
    start, floats = _remembered(key, lambda: _router(routing, choice.vector, mean, green, index))
    logits = choice.logits
    usual = pointers(logits, choice.bias, num_valid_tokens, weights, ids)
    sizes = (routing.tokens, logits.stride(0), choice.scale)
    if not mean:
        start(*usual, *sizes)
        return
    scratch = torch.empty(floats, dtype=torch.float32, device=ids.device)
    start(*usual, *sizes, *pointers(mean_probability, scratch))


def route_align(
    routing: Routing,
    problem: Problem,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    num_valid_tokens: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    mean_probability: Tensor | None,
    expert_map: Tensor | None,
    error_word: Tensor | None,
    out: BlockLayout,
) -> None:
    """:func:`route` and the layout of its ids, `problem` being theirs: in one launch where that is possible, or two."""
    if routing.tokens == 0:
        route(routing, router_logits, correction_bias, num_valid_tokens, weights, ids, mean_probability)
        align(problem, ids, expert_map, None, error_word, out)
        return
    choice = _Choice(routing, router_logits, correction_bias)
    start = None
    if mean_probability is None and problem.routes <= _FUSED_ROUTES:
        aligned = not out.sorted_token_ids.data_ptr() & 15
        key = ("fused", routing, problem, choice.vector, aligned)
        start = _remembered(key, lambda: _fused(routing, problem, choice.vector, aligned, ids.device.index))
    if start:
        layout = (expert_map, num_valid_tokens, None, *(getattr(out, name) for name in _OUTPUTS))
        start(
            0,
            *pointers(*layout),
            problem.routes,
            problem.top_k,
            out.sorted_token_ids.numel(),
            0,
            0,
            0,
            0 if expert_map is None else expert_map.stride(0),
            *pointers(choice.logits, choice.bias, weights, ids),
            choice.logits.stride(0),
            choice.scale,
        )
        return
    _route(routing, choice, num_valid_tokens, weights, ids, mean_probability)
    if mean_probability is None:
        align_after(problem, ids, expert_map, None, error_word, out)
    else:
        align(problem, ids, expert_map, None, error_word, out)


_OUTPUTS = (
    "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "expert_counts", "expert_offsets", "group_ends",
    "positions", "block_rows", "scatter_idx",
)  # fmt: skip


def _fused_defines(
    routing: Routing, problem: Problem, path: Path, vector: bool, aligned: bool
) -> tuple[tuple[str, int], ...]:
    problem = problem._replace(has_num_valid_tokens=routing.has_num_valid_tokens)
    defines = defines_of(problem, path, vector_in=False, vector_out=aligned)
    return (*defines, ("ROUTE", 1), ("ONE_TOKEN", int(routing.tokens == 1)), *_macros(routing, vector))


def _fused(routing: Routing, problem: Problem, vector: bool, aligned: bool, index: int) -> Launch | bool:
    facts = torch.cuda.get_device_properties(index)
    shared: int = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]
    path = fused_path(routing, problem, path_of(problem, facts.multi_processor_count, shared, 8))
    if path is None:
        return False
    compiled = kernel("align.cu", path.name, _fused_defines(routing, problem, path, vector, aligned), index)
    return compiled.prepare(path.grid, path.threads, path.shared_bytes, PLAIN)


def specialisations(major: int) -> Iterator[tuple[str, str, tuple[tuple[str, int], ...]]]:
    """(source, name, macros) of the routers that models have, to be compiled without a GPU."""
    device = torch.device("cuda")

    def routing(experts: int, top_k: int, dtype: torch.dtype = torch.float32, **facts: Any) -> Routing:
        return Routing(device, dtype, 1, experts, top_k, "softmax", True, 1.0, 1, 1)._replace(**facts)

    sigmoid: dict[str, Any] = {"scoring": "sigmoid", "has_bias": True, "scale": 2.5}
    routers = [
        routing(256, 8),
        routing(128, 8, torch.bfloat16),
        routing(64, 8, torch.float16, renormalize=False),
        routing(8, 2, torch.bfloat16, has_num_valid_tokens=True),
        routing(16, 1, scoring="sigmoid", renormalize=False),
        routing(256, 8, num_groups=8, topk_groups=4, **sigmoid),
        routing(160, 6, torch.bfloat16, num_groups=8, topk_groups=3),
        routing(60, 4, num_groups=3, topk_groups=2, **sigmoid),
        routing(384, 8, torch.bfloat16, **sigmoid),
        routing(1024, 32),
        routing(2048, 8, torch.bfloat16),
    ]
    for each in routers:
        vector = each.num_experts % 128 == 0
        macros = (("EXPERTS", each.num_experts), *_macros(each, vector), ("NVALID", int(each.has_num_valid_tokens)))
        for name in ("choose", "choose_mean"):
            yield "choose.cu", name, (*macros, ("THREADS", 32 * _WARPS), ("EARLY", int(vector)))
        for tokens in (1, _FUSED_TOKENS):
            of = each._replace(tokens=tokens)
            problem = Problem("align", device, torch.int32, tokens * each.top_k, each.top_k, each.num_experts, 16)
            path = fused_path(of, problem, path_of(problem, 108, 99 * 1024, 8))
            if path is not None:
                yield "align.cu", path.name, _fused_defines(of, problem, path, vector, True)
