# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the experts' computation.  Imported at a first call only.

`gemm`      a tile of ``BLOCK_M`` rows times ``BLOCK_N`` output columns of one expert, accumulated in float32 over K.
            Rows come through a layout.  Where routes are so few that two of them seldom share an expert there is no
            layout: each route is a tile of its own.
            The activation of the first product and the routing weight of the second are applied to the accumulator.
            Reads each expert's weights once for each block of its rows (the others find them in L2), writes a row a
            route, or a row a row of the layout.
`sum_rows`  ``top_k`` rows of each token added in order; a dropped route's row is not read.

With PDL a kernel may start while the one before it ends (Hopper and later): it waits before it reads or writes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gemm", "sum_rows"]

# What an activation is called inside a kernel.
NONE = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
RELU = tl.constexpr(4)
RELU2 = tl.constexpr(5)


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == SILU:
        x = x / (1 + tl.exp(-x))
    elif ACT == GELU:
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * (1 / (1 + tl.exp(-2 * inner)))  # (1 + tanh(y)) / 2
    elif ACT == RELU:
        x = tl.maximum(x, 0.0)
    elif ACT == RELU2:
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit
def _product(
    a, b, a_rows, a_first, kept, expert, column, N, K, steps, inner_rows,
    a_stride, b_stride_e, b_stride_n, b_stride_k,
    GATED: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The accumulators of one tile: of the gate (or all there is) and of the up part."""
    columns = column + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    if SWAP:
        first = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        second = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not A_TMA:
        a_at = a + a_rows[:, None] * a_stride + depth[None, :]
    if B_TMA:
        b_row = (expert * inner_rows).to(tl.int32) + column
    else:
        held = tl.where(columns < N, columns, 0).to(tl.int64)  # columns past the end repeat the first, and go nowhere
        b_at = b + expert * b_stride_e + held[:, None] * b_stride_n + (depth * b_stride_k)[None, :]
    for step in range(steps):
        start = step * BLOCK_K
        if A_TMA:
            x = a.load([a_first, start])
        elif EVEN_K:
            x = tl.load(a_at, mask=kept[:, None], other=0.0)
        else:
            x = tl.load(a_at, mask=kept[:, None] & (depth[None, :] < K - start), other=0.0)
        if B_TMA:
            w = b.load([b_row, start])
        elif EVEN_K:
            w = tl.load(b_at)
        else:
            w = tl.load(b_at, mask=depth[None, :] < K - start, other=0.0)
        if SWAP:
            first = tl.dot(w, x.T, first, input_precision=PRECISION)
        else:
            first = tl.dot(x, w.T, first, input_precision=PRECISION)
        if GATED:
            if B_TMA:
                u = b.load([b_row + N, start])
            elif EVEN_K:
                u = tl.load(b_at + N * b_stride_n)
            else:
                u = tl.load(b_at + N * b_stride_n, mask=depth[None, :] < K - start, other=0.0)
            if SWAP:
                second = tl.dot(u, x.T, second, input_precision=PRECISION)
            else:
                second = tl.dot(x, u.T, second, input_precision=PRECISION)
        if not A_TMA:
            a_at += BLOCK_K
        if not B_TMA:
            b_at += BLOCK_K * b_stride_k
    if SWAP:
        first = first.T
        second = second.T
    return first, second


@triton.jit
def _rows(
    a, b, bias, weights, routes, out,
    expert, block_start, column, num_routes, N, K, num_local, inner_rows, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `routes` of one block, and ``BLOCK_N`` columns from `column` on."""
    slot = tl.arange(0, BLOCK_M)
    kept = (routes >= 0) & (routes < num_routes)
    routes = routes.to(tl.int64)
    columns = column + tl.arange(0, BLOCK_N)
    if OUT_LAYOUT:
        out_rows = (block_start + slot).to(tl.int64)
    else:
        out_rows = routes
    out_at = out + out_rows[:, None] * out_stride + columns[None, :]
    stored = kept[:, None] & (columns < N)[None, :]
    if A_LAYOUT:
        a_rows = (block_start + slot).to(tl.int64)
    else:
        a_rows = routes // top_k
    # No condition around the steps, which a persistent launch makes one loop with those of the next tile.
    here = (expert >= 0) & (expert < num_local)
    steps = tl.where(here, tl.cdiv(K, BLOCK_K), 0)
    held = tl.where(here, expert, 0)
    x, up = _product(
        a, b, a_rows, block_start, kept, held, column, N, K, steps, inner_rows,
        a_stride, b_stride_e, b_stride_n, b_stride_k,
        GATED, A_TMA, B_TMA, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    if bias is not None:
        at = bias + held * bias_stride + columns
        there = columns < tl.where(here, N, 0)  # a scalar and a block make no mask in Triton 3.9's interpreter
        x += tl.load(at, mask=there, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(at + N, mask=there, other=0.0).to(tl.float32)[None, :]
    x = _activate(x, ACT)
    if GATED:
        x = x * up
    if weights is not None:
        weighted = kept & (slot < tl.where(here, BLOCK_M, 0))
        x = x * tl.load(weights + routes, mask=weighted, other=0.0).to(tl.float32)[:, None]
    tl.store(out_at, x.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _tile(
    a, a_short, b, bias, weights, sorted_ids, expert_ids, out,
    tile, num_m, num_n, num_routes, N, K, num_local, inner_rows, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SHORT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tile number `tile`: neighbours share the columns of GROUP_M blocks, so that L2 serves their weights."""
    width = GROUP_M * num_n
    group = tile // width
    first_m = group * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    block = first_m + (tile % width) % height
    column = (tile % width) // height * BLOCK_N
    start = block * BLOCK_M
    expert = tl.load(expert_ids + block).to(tl.int64)
    if SHORT > 0:
        # Kept rows come first, so this one says whether a tile of half the rows is enough.
        whole = tl.load(sorted_ids + start + SHORT) < num_routes
        if whole:
            _rows(
                a, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, BLOCK_M)), out,
                expert, start, column, num_routes, N, K, num_local, inner_rows, top_k,
                a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
                ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _rows(
                a_short, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, SHORT)), out,
                expert, start, column, num_routes, N, K, num_local, inner_rows, top_k,
                a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
                ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, SHORT, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _rows(
            a, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, BLOCK_M)), out,
            expert, start, column, num_routes, N, K, num_local, inner_rows, top_k,
            a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
            ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


# What changes from call to call compiles nothing anew: numbers of rows, and addresses of tensors with an element a
# route or a block, which may be cut from others.  They are read one by one.
@triton.jit(
    do_not_specialize=["num_routes", "num_blocks", "num_local"],
    do_not_specialize_on_alignment=["weights", "sorted_ids", "expert_ids", "total"],
)
def gemm(
    a, a_short, b, bias, weights, sorted_ids, expert_ids, total, out,
    num_routes, num_blocks, N, K, num_local, inner_rows, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SHORT: tl.constexpr,
    ALONE: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """`N` output columns; with GATED the weights have 2 N rows an expert, the gate's first.

    With ALONE each route is a tile, and ids stand in the place of `sorted_ids`.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if ALONE:
        block = tl.program_id(0) // num_n
        expert = tl.load(sorted_ids + block).to(tl.int64)
        routes = tl.where(tl.arange(0, BLOCK_M) == 0, block, num_routes)
        _rows(
            a, b, bias, weights, routes, out,
            expert, 0, tl.program_id(0) % num_n * BLOCK_N, num_routes, N, K, num_local, inner_rows, top_k,
            a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
            ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        num_m = tl.minimum(tl.load(total) // BLOCK_M, num_blocks)  # `total` cannot lead past the tensors
        if PERSISTENT:
            for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=SHORT == 0):
                _tile(
                    a, a_short, b, bias, weights, sorted_ids, expert_ids, out,
                    tile, num_m, num_n, num_routes, N, K, num_local, inner_rows, top_k,
                    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
                    ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, SHORT, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                )  # fmt: skip
        else:
            tile = tl.program_id(0)
            if tile < num_m * num_n:
                _tile(
                    a, a_short, b, bias, weights, sorted_ids, expert_ids, out,
                    tile, num_m, num_n, num_routes, N, K, num_local, inner_rows, top_k,
                    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
                    ACT, GATED, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, SHORT, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                )  # fmt: skip


@triton.jit(do_not_specialize=["limit"], do_not_specialize_on_alignment=["kept"])
def sum_rows(
    rows, kept, out, width, limit,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_j rows[t * k + j]`` over routes with ``0 <= kept < limit``: positions, or ids and their number."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        route = token * TOP_K + j
        at = tl.load(kept + route).to(tl.int64)
        there = columns < tl.where((at >= 0) & (at < limit), width, 0)
        total += tl.load(rows + route * width + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
