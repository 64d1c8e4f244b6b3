"""Launcher of ``gemm.py``: which tiles, which launches, in which order.  Nothing here imports Triton before a call.

A `Plan` says how one fused_moe call is computed; it follows from shapes, dtype and device: from a file that
``moealign tune`` wrote or that ships, if it has an entry, else from the rules below.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moealign.layout import BlockLayout, cdiv, power_of_two

from ..backend.triton.launch import interpreted, on_device, unavailable

__all__ = [
    "BLOCK_SIZES",
    "GemmLaunch",
    "Plan",
    "Target",
    "Tile",
    "block_size_of",
    "fused_moe",
    "grouped_gemm",
    "launches",
    "plan",
    "refuses",
    "target_of",
    "tuning_key",
    "tuning_path",
]

BLOCK_SIZES = (16, 32, 64, 128)
ALONE = 8  #: two tokens with at least so many experts a route: each route is a tile, and nothing is aligned
_STAGES_BYTES = 200 * 1024  #: of shared memory for the stages of a tile with TMA (227 KiB are there)
_ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Tile(NamedTuple):
    """One product's tile and how it is run."""

    m: int  # rows: the block size of the layout
    n: int  # output columns (twice as many weight rows where there is a gate)
    k: int  # of a step
    group: int  # blocks of rows that share a pass over the columns, for L2
    warps: int
    stages: int
    tma: int = 0  # 1: weights by the tensor memory accelerator; 2: rows too, where they lie in layout order
    ctas: int = 0  # programs an SM of a persistent launch; 0: a program a tile
    swap: int = 0  # 1: weights as the left operand
    short: int = 0  # rows of the tile of a block that has no more of them; 0: all blocks alike


class Plan(NamedTuple):
    """How a fused_moe call is computed."""

    block_size: int  # of the layout; 0: no layout, each route is a tile of its own
    first: Tile
    second: Tile


class Target(NamedTuple):
    """What a rule may know of the device."""

    name: str
    multiprocessors: int
    hopper: bool  # has TMA and programmatic dependent launch

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "_").replace("/", "_")


@functools.lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    """The facts of `device`; under the interpreter those of a small GPU without TMA."""
    if device.type != "cuda":
        return Target("interpreter", 4, False)
    facts = torch.cuda.get_device_properties(device)
    roomy = getattr(facts, "shared_memory_per_block_optin", 0) >= 227 * 1024  # the small Blackwells have less
    hopper = torch.version.hip is None and facts.major >= 9 and roomy
    return Target(facts.name, facts.multi_processor_count, hopper)


def refuses(rows: Tensor) -> str | None:
    """Why the kernels do not take these rows; None if they do.  A tracer is told without looking at the machine."""
    if rows.device.type not in ("cuda", "xpu") and not (interpreted() and rows.device.type == "cpu"):
        return f"expected tensors on a GPU, got tensors on {rows.device}"
    if rows.dtype not in _DTYPES:
        return f"expected bfloat16, float16 or float32, got {rows.dtype}"
    return None if torch.compiler.is_compiling() else unavailable()


# ---- tiles ---------------------------------------------------------------------------------------------------------


def _rule(target: Target, routes: int, top_k: int, experts: int, hidden: int, inner: int, item: int) -> Plan:
    """Tiles by rows an expert gets; measured on an H200 by benchmarks/sweep_experts.py."""
    rows = routes / max(experts, 1)
    alone = routes == top_k or (routes <= 2 * top_k and routes * ALONE <= experts)
    if item == 4 or not target.hopper:  # tiles that fit any shared memory, without TMA
        m = 16 if alone else next((size for size in BLOCK_SIZES if rows <= size * 0.75), 128)
        tile = Tile(m, 64, 32 if item == 4 else 64, 8 if rows > 128 else 2, 8 if m == 128 else 4, 2)
        second = tile if item == 4 or m == 128 else tile._replace(n=128)
        return Plan(0 if alone else m, tile._replace(n=32 if m < 64 else 64), second)
    if alone:
        long = Tile(16, 64, 128, 1, 4, 6, 1, 0, 1)
        return Plan(0, Tile(16, 64, 128, 1, 4, 4), long if inner > 4096 else Tile(16, 32, 256, 1, 4, 3))
    if rows <= 10:
        long = Tile(16, 128, 128, 2, 4, 3, 1, 0, 1)
        return Plan(16, Tile(16, 64, 128, 2, 4, 3, 1, 0, 1), long if inner > 4096 else Tile(16, 128, 128, 1, 4, 3))
    if rows <= 24:
        first = Tile(32, 64, 128, 2, 4, 3, 1, 0, 1) if hidden > 2048 else Tile(32, 64, 64, 2, 4, 4)
        return Plan(32, first, Tile(32, 128, 128, 1, 4, 3))
    if rows <= 48:
        return Plan(64, Tile(64, 64, 128, 2, 4, 4, 1, 0, 1), Tile(64, 128, 64, 2, 4, 3, 1, 0, 1))
    # Beyond, a persistent launch without conditions in its loop against a tile of half the rows, which wants one.
    short = Tile(128, 256, 64, 4, 8, 4, 2, 0, 0, 64)
    if rows <= 96:
        return Plan(128, Tile(128, 128, 64, 2, 8, 4, 1, 0, 0, 64), short)
    if rows <= 200:
        return Plan(128, Tile(128, 128, 64, 2, 8, 4, 1, 1), short)
    return Plan(128, Tile(128, 128, 64, 8, 8, 4, 1, 1), Tile(128, 256, 64, 8, 8, 4, 2, 1))


def tuning_key(experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype) -> str:
    """How an entry of a tuning file is named."""
    return f"E={experts},k={top_k},H={hidden},I={inner},{str(dtype).removeprefix('torch.')}"


def tuning_path(target: Target) -> Path:
    """The file that ``moealign tune`` writes: $MOEALIGN_TUNING, or one a device in the cache folder."""
    given = os.environ.get("MOEALIGN_TUNING")
    if given:
        return Path(given)
    cache = os.environ.get("MOEALIGN_CACHE_DIR")
    return (Path(cache) if cache else Path.home() / ".cache" / "moealign") / "tuned" / f"{target.slug}.json"


@functools.lru_cache(maxsize=16)
def tuned(target: Target) -> dict[str, dict[int, Plan]]:
    """Plans by key and tokens: those that ship, then those of the user's file, which win."""
    shipped = Path(__file__).parents[2] / "data" / "tuned" / f"{target.slug}.json"
    found: dict[str, dict[int, Plan]] = {}
    for path in (shipped, tuning_path(target)):
        try:
            text = path.read_text()
        except OSError:
            continue
        try:
            for key, plans in json.loads(text)["plans"].items():
                entry = found.setdefault(key, {})
                for tokens, one in plans.items():
                    entry[int(tokens)] = plan_from(one)
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}: expected a tuning file, got {error!r}; rules are used instead", stacklevel=2)
    return found


def plan_from(values: dict[str, Any]) -> Plan:
    """A plan from its JSON form."""
    first, second = Tile(*values["first"]), Tile(*values["second"])
    return Plan(int(values["block_size"]), first, second)


def plan_to(one: Plan) -> dict[str, Any]:
    """The JSON form of a plan."""
    return {"block_size": one.block_size, "first": list(one.first), "second": list(one.second)}


def plan(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    transposed: bool,
    block_size: int | None,
    expert_map: Tensor | None,
    num_valid_tokens: Tensor | None,
    target: Target | None = None,
) -> Plan:
    """The plan of one call."""
    target = target or target_of(hidden_states.device)
    tokens, top_k = topk_ids.shape
    routes, experts = tokens * top_k, gate_up_proj.shape[0]
    width, hidden = (down_proj.shape[1], down_proj.shape[2]) if transposed else down_proj.shape[:0:-1]
    entry = tuned(target).get(tuning_key(experts, top_k, hidden, width, hidden_states.dtype))
    if entry and block_size is None:
        chosen = entry[min(entry, key=lambda known: abs(math.log(known / max(tokens, 1))))]
    else:
        chosen = _rule(target, routes, top_k, experts, hidden, width, hidden_states.element_size())
        if block_size is not None:
            chosen = _of_block_size(chosen, block_size, hidden_states.element_size())
    alone = (
        chosen.block_size == 0
        and block_size is None
        and expert_map is None
        and num_valid_tokens is None
        and topk_ids.dtype in (torch.int32, torch.int64)
    )
    return chosen if alone else chosen._replace(block_size=chosen.first.m)


def _of_block_size(chosen: Plan, size: int, item: int) -> Plan:
    """The same with another block size, and as many stages as then fit shared memory."""

    def resized(one: Tile, products: int) -> Tile:
        n = min(one.n, 128)
        stage = (size + products * n) * one.k * item
        return one._replace(
            m=size,
            n=n,
            warps=8 if size >= 128 else 4,
            stages=max(min(one.stages, _STAGES_BYTES // stage), 1),
            swap=int(bool(one.tma) and size < 64),
            short=one.short if one.short < size else 0,
        )

    return Plan(size, resized(chosen.first, 2), resized(chosen.second, 1))


def block_size_of(rows: Tensor, routes: int, gate_up_proj: Tensor, down_proj: Tensor, transposed: bool) -> int:
    """The block size of the rule, for a layer whose activation is computed between two products."""
    target, experts = target_of(rows.device), gate_up_proj.shape[0]
    inner = down_proj.shape[1 if transposed else 2]
    return _rule(target, routes, 1, experts, rows.shape[1], inner, rows.element_size()).first.m


# ---- launches ------------------------------------------------------------------------------------------------------


class GemmLaunch(NamedTuple):
    """One launch, before it happens: what tests compile ahead for machines that are not there."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    pdl: bool


def _descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _describable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it."""
    pitch = matrix.stride(-2) * matrix.element_size()
    return matrix.stride(-1) == 1 and pitch % 16 == 0 and matrix.data_ptr() % 16 == 0 and matrix.numel() > 0


def _gemm(
    target: Target,
    tile: Tile,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    rows: tuple[Tensor, Tensor | None, Tensor | None],
    blocks: int,
    routes: int,
    alone: bool,
    top_k: int,
    activation: str | None,
    gated: bool,
    transposed: bool,
    bias: Tensor | None,
    weights: Tensor | None,
    a_layout: bool,
    out_layout: bool,
) -> GemmLaunch:
    experts = b.shape[0]
    outputs, depth = (b.shape[2], b.shape[1]) if transposed else (b.shape[1], b.shape[2])
    width = outputs // 2 if gated else outputs
    strides = (b.stride(0), b.stride(2), b.stride(1)) if transposed else b.stride()
    b_tma = bool(tile.tma and target.hopper and not transposed and b.is_contiguous() and _describable(b))
    a_tma = bool(b_tma and tile.tma > 1 and a_layout and _describable(a))
    tiles = blocks * cdiv(width, tile.n)
    short = 0 if alone else tile.short
    persistent = bool(tile.ctas) and not alone
    grid = min(tiles, tile.ctas * target.multiprocessors) if persistent else tiles
    held = blocks if alone else min(blocks, rows[0].numel() // tile.m)
    return GemmLaunch(
        "gemm",
        (grid,),
        (
            _descriptor(a, tile.m, tile.k) if a_tma else a,
            (_descriptor(a, short, tile.k) if a_tma else a) if short else None,
            _descriptor(b.view(-1, depth), tile.n, tile.k) if b_tma else b,
            bias, weights, *rows, out,
            routes, held, width, depth, experts, outputs, top_k,
            a.stride(0), *strides, 0 if bias is None else bias.stride(0), out.stride(0),
        ),
        {
            "ACT": _ACTIVATIONS[activation], "GATED": gated, "A_LAYOUT": a_layout, "OUT_LAYOUT": out_layout,
            "A_TMA": a_tma, "B_TMA": b_tma, "EVEN_K": depth % tile.k == 0, "SWAP": bool(tile.swap),
            "SHORT": short, "ALONE": alone, "PDL": target.hopper,
            "PRECISION": "ieee" if a.dtype is torch.float32 else "tf32",
            "PERSISTENT": persistent,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP_M": tile.group,
        },
        tile.warps,
        tile.stages,
        target.hopper,
    )  # fmt: skip


def launches(
    how: Plan,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    layout: BlockLayout | None,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    target: Target,
) -> tuple[list[GemmLaunch], Tensor]:
    """What :func:`fused_moe` launches after the alignment, in order, and the tensor that they fill."""
    tokens, top_k = topk_ids.shape
    routes, experts, hidden = tokens * top_k, gate_up_proj.shape[0], hidden_states.shape[1]
    outputs = gate_up_proj.shape[2 if transposed else 1]
    inner = down_proj.shape[1 if transposed else 2]
    new = hidden_states.new_empty
    weights = topk_weights.reshape(-1)
    x = hidden_states if hidden_states.stride(-1) == 1 else hidden_states.contiguous()
    kept, limit, rows = _kept(topk_ids, layout, experts)
    blocks = routes if layout is None else layout.expert_ids.numel()
    in_layout = layout is not None
    between = new(blocks * how.first.m if in_layout else routes, inner)
    out, of_routes = new(tokens, hidden), new(routes, hidden)
    common: dict[str, Any] = {
        "rows": rows, "blocks": blocks, "routes": routes, "alone": not in_layout, "transposed": transposed,
    }  # fmt: skip
    first = _gemm(
        target, how.first, x, gate_up_proj, between,
        top_k=top_k, activation=activation, gated=outputs == 2 * inner, bias=gate_up_bias, weights=None,
        a_layout=False, out_layout=in_layout, **common,
    )  # fmt: skip
    second = _gemm(
        target, how.second, between, down_proj, of_routes,
        top_k=1, activation=None, gated=False, bias=down_bias, weights=weights,
        a_layout=in_layout, out_layout=False, **common,
    )  # fmt: skip
    block = min(1024, power_of_two(hidden))
    last = GemmLaunch(
        "sum_rows",
        (tokens, cdiv(hidden, block)),
        (of_routes, kept, out, hidden, limit),
        {"TOP_K": top_k, "BLOCK": block, "PDL": target.hopper},
        4,
        3,
        target.hopper,
    )
    return [first, second, last], out


def _kept(
    topk_ids: Tensor, layout: BlockLayout | None, experts: int
) -> tuple[Tensor, int, tuple[Tensor, Tensor | None, Tensor | None]]:
    """What tells kept routes, the limit of its values, and where tiles find their rows."""
    if layout is None:
        flat = topk_ids.reshape(-1)
        return flat, experts, (flat, None, None)
    assert layout.positions is not None
    return layout.positions, 2**31 - 1, (layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded)


def _run(launches: list[GemmLaunch], device: torch.device) -> None:
    from . import kernels  # imports Triton

    with on_device(device):
        for one in launches:
            options: dict[str, Any] = {"num_warps": one.num_warps, "num_stages": one.num_stages}
            if one.pdl:
                options["launch_pdl"] = True
            getattr(kernels, one.kernel)[one.grid](*one.arguments, **one.constants, **options)


def fused_moe(
    how: Plan,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    layout: BlockLayout | None,
    activation: str,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
) -> Tensor:
    """``[T, H]``; all shapes have been checked."""
    target = target_of(hidden_states.device)
    planned, out = launches(
        how, hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids, layout, activation,
        gate_up_bias, down_bias, transposed, target,
    )  # fmt: skip
    _run(planned, hidden_states.device)
    return out


def gemm_launch(
    a: Tensor,
    b: Tensor,
    layout: BlockLayout,
    top_k: int,
    row_weights: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    transposed: bool,
    out: Tensor,
    target: Target,
) -> GemmLaunch:
    """What :func:`grouped_gemm` launches."""
    routes = a.shape[0] * top_k
    x = a if a.stride(-1) == 1 else a.contiguous()
    size = layout.block_size
    if size not in BLOCK_SIZES:
        from moealign.errors import InvalidInput

        raise InvalidInput(
            f"layout: expected blocks of {', '.join(map(str, BLOCK_SIZES))} rows on a GPU, got blocks of {size}"
        )
    depth = b.shape[1 if transposed else 2]
    item = a.element_size()
    by_rule = _of_block_size(_rule(target, routes, 1, b.shape[0], depth, depth, item), size, item)
    return _gemm(
        target, by_rule.first if gated else by_rule.second, x, b, out,
        rows=(layout.sorted_token_ids, layout.expert_ids, layout.num_tokens_post_padded),
        blocks=layout.expert_ids.numel(), routes=routes, alone=False, top_k=top_k,
        activation=activation, gated=gated, transposed=transposed,
        bias=bias, weights=None if row_weights is None else row_weights.reshape(-1),
        a_layout=False, out_layout=False,
    )  # fmt: skip


def grouped_gemm(
    a: Tensor,
    b: Tensor,
    layout: BlockLayout,
    top_k: int,
    row_weights: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    transposed: bool,
    out: Tensor,
) -> None:
    """Fill the rows of `out` that the layout names."""
    target = target_of(a.device)
    one = gemm_launch(a, b, layout, top_k, row_weights, bias, activation, gated, transposed, out, target)
    _run([one], a.device)
