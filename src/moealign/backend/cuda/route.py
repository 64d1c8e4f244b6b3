"""The router on NVIDIA GPUs, alone or with the layout of its ids.

For a few tokens one launch does both.  Otherwise the layout's kernel starts while the router's ends, and waits for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...layout import OUTPUTS, BlockLayout, cdiv
from ...problem import SCORINGS, AlignProblem, RouteProblem
from ..reference.route import (
    FAR,
    INVERSE_LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG1P,
    MAX,
    NEAR_ZERO,
    POLYNOMIAL,
    TINY,
)
from .align import Alignment, Path, defines_of, path_of, pointers
from .compile import Defines
from .launch import COOPERATIVE, PLAIN, Kernel, Launch, green_multiprocessors, kernel

__all__ = ["MAX_EXPERTS", "MAX_GROUPS", "MAX_SHARED", "Router", "refuses", "specialisations"]

MAX_EXPERTS = 2048  #: 64 per lane
MAX_GROUPS = 32  #: one per lane
MAX_SHARED = 32  #: one per lane

# -------------------------------------------------------------------------------------------------------------- tuning

_WARPS = 4  #: per CTA of the router alone
_SPLIT = 4  #: warps, a CTA, that share the scores of a token with a bias
_MAX_SPLIT_TOKENS = 256  #: beyond, every multiprocessor has enough warps without
_MEAN_CTAS = 2  #: per multiprocessor, with mean_probability
_MAX_FUSED_ROUTES = 256
_MAX_FUSED_TOKENS = 8  #: every CTA chooses for all tokens, a warp each; more tokens are faster in two launches
_MAX_FUSED_EXPERTS = 1024  #: with more, two launches are as fast
_MAX_FUSED_COLUMNS = 32  #: a lane each
_MAX_EARLY_TOKENS = 512  #: up to here the next kernel may start with the router, beyond only when its CTAs end

_LOGITS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(routing: RouteProblem) -> str | None:
    """Why no kernel takes this router; None if one does."""
    if routing.num_experts > MAX_EXPERTS:
        return f"expected at most {MAX_EXPERTS} experts to route to, got {routing.num_experts}"
    if routing.num_groups > MAX_GROUPS:
        return f"expected at most {MAX_GROUPS} groups, got {routing.num_groups}"
    if routing.shared_experts > MAX_SHARED:
        return f"expected at most {MAX_SHARED} shared experts, got {routing.shared_experts}"
    return None


def _float_bits(value: float) -> int:
    """The bits of a float32, as a signed int."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


_CONSTANTS = (
    ("EXP32_FAR", FAR),
    ("EXP32_INVERSE_LN2", INVERSE_LN2),
    ("EXP32_LN2_HIGH", LN2_HIGH),
    ("EXP32_LN2_LOW", LN2_LOW),
    *((f"EXP32_C{i}", coefficient) for i, coefficient in enumerate(POLYNOMIAL)),
    *((f"LOG1P_{i}", coefficient) for i, coefficient in enumerate(LOG1P)),
    ("FLOAT_MAX", MAX),
    ("NEAR_ZERO", NEAR_ZERO),
    ("TINY", TINY),
)


def _warps_per_token(routing: RouteProblem) -> int:
    """Warps that share the scores of a token, in a CTA that has no other token: `SPLIT` of router.cuh."""
    shares = routing.has_bias and routing.num_experts % (32 * _SPLIT) == 0 and routing.tokens <= _MAX_SPLIT_TOKENS
    return _SPLIT if shares else 1


def _macros(routing: RouteProblem, vector: bool, split: int) -> Defines:
    """The macros of router.cuh except EXPERTS."""
    return (
        ("TOP_K", routing.top_k),
        ("LOGITS", _LOGITS[routing.dtype]),
        ("VECTORS", int(vector)),
        ("SCORING", SCORINGS.index(routing.scoring)),
        ("RENORM", int(routing.renormalize)),
        ("BIAS", int(routing.has_bias)),
        ("GROUPS", routing.num_groups),
        ("TOP_GROUPS", routing.topk_groups),
        ("REPLAY", 0 if routing.replay_dtype is None else 32 if routing.replay_dtype is torch.int32 else 64),
        ("EXPERT_SCALE", 0 if routing.scale_dtype is None else 1 + _LOGITS[routing.scale_dtype]),
        ("SPLIT", split),
        ("SHARED", routing.shared_experts),
        *((name, _float_bits(value)) for name, value in _CONSTANTS),
    )


def _vectors(routing: RouteProblem, logits: Tensor, bias: Tensor | None) -> bool:
    """Whether each lane can read its logits, and its biases, as vectors."""
    size = routing.num_experts // 32 * logits.element_size()
    wide = 16 if size % 16 == 0 else 8 if size % 8 == 0 else 0
    pitch = logits.stride(0) * logits.element_size()
    if bias is not None and bias.data_ptr() % 16:
        return False
    return bool(wide) and routing.num_experts % 32 == 0 and not (logits.data_ptr() | pitch) % wide


def fused_path(routing: RouteProblem, problem: AlignProblem, path: Path) -> Path | None:
    """How the layout's `path` is launched with the router inside; None if router and layout take two launches."""
    if routing.num_experts > _MAX_FUSED_EXPERTS or routing.tokens > _MAX_FUSED_TOKENS or problem.has_error_word:
        return None
    if path.name not in ("warp", "pairwise") or routing.columns > _MAX_FUSED_COLUMNS:
        return None
    threads = max(path.threads, 32 * routing.tokens)
    return path._replace(threads=threads, grid=path.grid + 1)  # the last CTA writes weights and ids


_MAX_LAUNCHES = 64  # per prepared router; green contexts make their number unbounded


class _Inputs:
    """A router's tensors in the form that the kernels read."""

    def __init__(
        self,
        routing: RouteProblem,
        logits: Tensor,
        bias: Tensor | None,
        replay_ids: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> None:
        self.logits = logits if logits.stride(1) == 1 or routing.num_experts == 1 else logits.contiguous()
        self.bias = None if bias is None else bias.to(torch.float32).contiguous()
        self.options: tuple[Tensor | None, ...] = ()  # kernels without them have no parameters for them
        if replay_ids is not None or expert_scale is not None:
            if replay_ids is not None:
                self.bias = None
                wide = replay_ids if replay_ids.dtype is torch.int32 else replay_ids.to(torch.int64)
                replay_ids = wide.contiguous()
            self.options = (replay_ids, None if expert_scale is None else expert_scale.contiguous())
        self.vector = _vectors(routing, self.logits, self.bias)


def _alone_defines(routing: RouteProblem, vector: bool, mean: bool) -> Defines:
    """The macros of router.cu."""
    return (
        ("EXPERTS", routing.num_experts),
        *_macros(routing, vector, 1 if mean else _warps_per_token(routing)),
        ("NVALID", int(routing.has_num_valid_tokens)),
        ("THREADS", 32 * _WARPS),
        ("PDL_LAUNCH_EARLY", int(routing.tokens <= _MAX_EARLY_TOKENS)),
        ("MEAN", int(mean)),
    )


def _router(routing: RouteProblem, vector: bool, mean: bool, green: int, index: int) -> tuple[Launch, int]:
    """The launch of the router alone, and its floats of scratch memory.  `green` counts the multiprocessors of the
    green context, 0 for the whole device; it matters for `mean` only."""
    defines = _alone_defines(routing, vector, mean)
    compiled: Kernel = kernel("router.cu", "topk_with_mean" if mean else "topk", defines, index)
    grid = cdiv(routing.tokens * dict(defines)["SPLIT"], _WARPS)
    if not mean:
        return compiled.prepare(grid, 32 * _WARPS, 0, PLAIN), 0
    resident = min(_MEAN_CTAS, compiled.max_blocks(32 * _WARPS, 0))
    grid = max(1, min(grid, resident * (green or compiled.multiprocessors)))
    return compiled.prepare(grid, 32 * _WARPS, 0, COOPERATIVE), grid * routing.num_experts


class Router:
    """One prepared router, with the layout of its ids unless `layout` is None."""

    def __init__(self, routing: RouteProblem, layout: AlignProblem | None) -> None:
        if routing.replay_dtype is not None:  # nothing is chosen
            routing = routing._replace(has_bias=False, num_groups=1, topk_groups=1)
        self._routing, self._layout, self._index = routing, layout, routing.device.index
        self._scale = _float_bits(routing.scale)
        self._alone: dict[tuple[bool, bool, int], tuple[Launch, int]] = {}
        self._fused: dict[tuple[bool, bool], Launch | None] = {}
        if layout is not None:
            self._align, self._align_overlapped = Alignment(layout), Alignment(layout, overlap=True)

    def run(
        self,
        router_logits: Tensor,
        correction_bias: Tensor | None,
        num_valid_tokens: Tensor | None,
        weights: Tensor,
        ids: Tensor,
        mean_probability: Tensor | None,
    ) -> None:
        """Fill `weights` and `ids` ``[tokens, top_k]``, and unless it is None `mean_probability` ``[num_experts]``, on
        the current stream, in one launch."""
        if self._routing.tokens == 0:
            if mean_probability is not None:
                mean_probability.zero_()
            return
        inputs = _Inputs(self._routing, router_logits, correction_bias)
        self._run(inputs, num_valid_tokens, weights, ids, mean_probability)

    def _run(
        self,
        inputs: _Inputs,
        num_valid_tokens: Tensor | None,
        weights: Tensor,
        ids: Tensor,
        mean_probability: Tensor | None,
    ) -> None:
        mean = mean_probability is not None
        green = green_multiprocessors(self._index) if mean else 0
        key = (inputs.vector, mean, green)
        prepared = self._alone.get(key)
        if prepared is None:
            if len(self._alone) >= _MAX_LAUNCHES:
                self._alone.clear()
            prepared = self._alone[key] = _router(self._routing, *key, self._index)
        launch, floats = prepared
        logits = inputs.logits
        tensors = pointers(logits, inputs.bias, num_valid_tokens, weights, ids)
        sizes = (self._routing.tokens, logits.stride(0), self._scale)
        if not mean:
            launch(*tensors, *sizes, *(pointers(*inputs.options) if inputs.options else ()))
            return
        scratch = torch.empty(floats, dtype=torch.float32, device=ids.device)
        launch(*tensors, *sizes, *pointers(mean_probability, scratch, *inputs.options))

    def run_with_layout(
        self,
        router_logits: Tensor,
        correction_bias: Tensor | None,
        num_valid_tokens: Tensor | None,
        weights: Tensor,
        ids: Tensor,
        mean_probability: Tensor | None,
        expert_map: Tensor | None,
        error_word: Tensor | None,
        out: BlockLayout,
        replay_ids: Tensor | None = None,
        expert_scale: Tensor | None = None,
    ) -> None:
        """:meth:`run`, and fill `out` with the layout of the ids, in one launch or two."""
        routing, layout = self._routing, self._layout
        assert layout is not None
        if routing.tokens == 0:
            self.run(router_logits, correction_bias, num_valid_tokens, weights, ids, mean_probability)
            self._align.run(ids, expert_map, None, error_word, out)
            return
        inputs = _Inputs(routing, router_logits, correction_bias, replay_ids, expert_scale)
        launch = None
        if mean_probability is None and layout.routes <= _MAX_FUSED_ROUTES:
            key = (inputs.vector, not out.sorted_token_ids.data_ptr() & 15)
            if key not in self._fused:
                self._fused[key] = _fused(routing, layout, *key, self._index)
            launch = self._fused[key]
        if launch is None:
            self._run(inputs, num_valid_tokens, weights, ids, mean_probability)
            alignment = self._align if mean_probability is not None else self._align_overlapped
            alignment.run(ids, expert_map, None, error_word, out)
            return
        launch(
            0,
            *pointers(expert_map, num_valid_tokens, None, *(getattr(out, name) for name in OUTPUTS)),
            layout.routes,
            layout.row_length,
            out.sorted_token_ids.numel(),
            0,
            0,
            0,
            0 if expert_map is None else expert_map.stride(0),
            *pointers(inputs.logits, inputs.bias, weights, ids),
            inputs.logits.stride(0),
            self._scale,
            *(pointers(*inputs.options) if inputs.options else ()),
        )


def _fused_defines(routing: RouteProblem, problem: AlignProblem, path: Path, vector: bool, aligned: bool) -> Defines:
    problem = problem._replace(
        has_num_valid_tokens=routing.has_num_valid_tokens, num_experts=routing.num_experts
    )  # the kernel adds the shared experts
    defines = defines_of(problem, path, vector_in=False, vector_out=aligned)
    one = routing.tokens == 1
    split = _warps_per_token(routing) if one and path.threads == 32 * _SPLIT else 1
    return (*defines, ("FUSED_ROUTER", 1), ("ONE_TOKEN", int(one)), *_macros(routing, vector, split))


def _fused(routing: RouteProblem, problem: AlignProblem, vector: bool, aligned: bool, index: int) -> Launch | None:
    device = torch.cuda.get_device_properties(index)
    shared: int = device.shared_memory_per_block_optin  # type: ignore[attr-defined]
    path = fused_path(routing, problem, path_of(problem, device.multi_processor_count, shared, 8))
    if path is None:
        return None
    compiled = kernel(path.file, path.name, _fused_defines(routing, problem, path, vector, aligned), index)
    return compiled.prepare(path.grid, path.threads, path.shared_bytes, PLAIN)


def specialisations(major: int) -> Iterator[tuple[str, str, Defines]]:
    """(file, name, macros) of models' routers, for tests that compile without a GPU."""
    device = torch.device("cuda")

    def routing(experts: int, top_k: int, dtype: torch.dtype = torch.float32, **facts: Any) -> RouteProblem:
        return RouteProblem(device, dtype, 1, experts, top_k, "softmax", True, 1.0, 1, 1)._replace(**facts)

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
        routing(896, 16, torch.bfloat16),
        routing(896, 16, has_bias=True),
        routing(64, 6, has_bias=True),
        routing(768, 12, has_bias=True, renormalize=False, scale=6.0),
        routing(128, 4, torch.bfloat16, has_bias=True, num_groups=8, topk_groups=4),
        routing(60, 4, torch.float16, has_bias=True, num_groups=3, topk_groups=2, renormalize=False),
        routing(1024, 32, has_bias=True, num_groups=32, topk_groups=8),
        routing(256, 6, scoring="sqrtsoftplus", has_bias=True, scale=1.5),
        routing(384, 8, torch.bfloat16, scoring="sqrtsoftplus", renormalize=False),
        routing(256, 8, scoring="sqrtsoftplus", has_bias=True, num_groups=8, topk_groups=4),
        routing(128, 8, torch.bfloat16, scale_dtype=torch.bfloat16),
        routing(256, 8, scale_dtype=torch.float32, shared_experts=1, **sigmoid),
        routing(64, 6, torch.bfloat16, shared_experts=2, renormalize=False, has_num_valid_tokens=True),
        routing(8, 2, shared_experts=32, scale_dtype=torch.float16),
        routing(256, 6, scoring="sqrtsoftplus", replay_dtype=torch.int64, scale=1.5),
        routing(128, 8, torch.bfloat16, replay_dtype=torch.int32, has_num_valid_tokens=True),
        routing(128, 8, replay_dtype=torch.int32, renormalize=False, scale_dtype=torch.float32, shared_experts=1),
        routing(60, 4, torch.float16, scoring="sigmoid", replay_dtype=torch.int64),
        routing(1024, 32, replay_dtype=torch.int64, renormalize=False, shared_experts=1),
    ]
    for each in routers:
        vector = each.num_experts % 128 == 0
        many = each._replace(tokens=_MAX_EARLY_TOKENS + (not vector))
        for of, mean in ((each, False), (many, False), (many, True)):
            yield "router.cu", "topk_with_mean" if mean else "topk", _alone_defines(of, vector, mean)
        for tokens in (1, _MAX_FUSED_TOKENS):
            of = each._replace(tokens=tokens)
            routes, experts = tokens * each.columns, each.num_experts + each.shared_experts
            problem = AlignProblem("align", device, torch.int32, routes, each.columns, experts, 16)
            path = fused_path(of, problem, path_of(problem, 108, 99 * 1024, 8))
            if path is not None:
                yield path.file, path.name, _fused_defines(of, problem, path, vector, True)
