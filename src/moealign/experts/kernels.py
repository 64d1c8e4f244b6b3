# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the experts.  Imported at the first launch.

`gemm`      one product per expert, accumulated in float32; an activation or a routing weight in its epilogue.
`sum_rows`  the sum over each token's ``top_k`` rows, in order; rows of dropped routes are not read.

With PDL (Hopper and later) a kernel may start before the previous one ends.  It waits before its first memory access.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .activation_kernels import INTERLEAVED, activate, gated
from .quantized_kernels import (
    DEEP,
    GROUP,
    NATIVE,
    QUANTIZED,
    RESULT_BY,
    ROW,
    ROWS_BY,
    STATIC,
    factor_of,
    quantize,
    quantize_result,
    scaled_dot,
    scales_of_columns,
    scales_of_rows,
)  # fmt: skip

__all__ = ["gemm", "product", "sum_rows", "tile_of"]


@triton.jit
def product(
    a, b, a_rows, a_first, kept, expert, column, N, K, steps, outputs,
    a_stride, b_stride_e, b_stride_n, b_stride_k,
    GATED: tl.constexpr, A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, scales=None, SCALING: tl.constexpr = None,
):  # fmt: skip
    """Multiply one tile of rows by one expert: the accumulators ``[BLOCK_M, BLOCK_N]`` of the gate and the up part.

    Without GATED the first one is the product, and the second is zero.

    rows        a; a_rows, kept [BLOCK_M]: their numbers and a mask; a_first: the first one, for TMA
    weights     b; expert; column: the first output column
    sizes       N output columns; K; steps of BLOCK_K; outputs: rows of an expert's weights
    strides     in elements, of a's rows and of b's experts, outputs and K
    B_TMA       1: b describes [experts * outputs, K]; 2: [experts * K, outputs], where BLOCK_K divides K
    SCALING     None or the constants of FP8 weights; scales: those of a and the distance of its rows, those of b and
                the distances of its experts and outputs, and those of the result
    """
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
        if B_TMA == 2:
            b_row = (expert * K).to(tl.int32)
        else:
            b_row = (expert * outputs).to(tl.int32) + column
    else:
        safe = tl.where(columns < N, columns, 0).to(tl.int64)  # columns past the end read the first; never stored
        b_at = b + expert * b_stride_e + safe[:, None] * b_stride_n + (depth * b_stride_k)[None, :]
    if SCALING is not None:
        if SCALING[ROWS_BY] == STATIC:
            row_scale = tl.load(scales[0] + expert * scales[1]) + tl.zeros((BLOCK_M,), dtype=tl.float32)
        elif SCALING[ROWS_BY] == ROW:
            row_scale = tl.load(scales[0] + a_rows, mask=kept, other=0.0)
        # Scales are loaded a step before their use.
        if SCALING[ROWS_BY] == GROUP:
            row_scale_ahead = scales_of_rows(scales, a_rows, kept, 0)
        scale_ahead = scales_of_columns(scales, expert, column, columns, N, 0, SCALING)
        if GATED:
            up_scale_ahead = scales_of_columns(scales, expert, column + N, columns + N, 2 * N, 0, SCALING)
    for step in range(steps):
        start = step * BLOCK_K
        if A_TMA:
            x = a.load([a_first, start])
        elif EVEN_K:
            x = tl.load(a_at, mask=kept[:, None], other=0.0)
        else:
            x = tl.load(a_at, mask=kept[:, None] & (depth[None, :] < K - start), other=0.0)
        if B_TMA == 2:
            w = b.load([b_row + start, column]).T
        elif B_TMA:
            w = b.load([b_row, start])
        elif EVEN_K:
            w = tl.load(b_at)
        else:
            w = tl.load(b_at, mask=depth[None, :] < K - start, other=0.0)
        if SCALING is not None:
            ahead = tl.minimum(step + 1, steps - 1)
            scale = scale_ahead
            if SCALING[DEEP]:
                scale_ahead = scales_of_columns(scales, expert, column, columns, N, ahead, SCALING)
            if SCALING[ROWS_BY] == GROUP:
                row_scale = row_scale_ahead
                row_scale_ahead = scales_of_rows(scales, a_rows, kept, ahead)
            elif not SCALING[QUANTIZED]:
                x = quantize(x.to(tl.float32), row_scale[:, None], SCALING[NATIVE])
            first = scaled_dot(x, w, first, row_scale, scale, SWAP, SCALING)
        elif SWAP:
            first = tl.dot(w, x.T, first, input_precision=PRECISION)
        else:
            first = tl.dot(x, w.T, first, input_precision=PRECISION)
        if GATED:
            if B_TMA == 2:
                u = b.load([b_row + start, column + N]).T
            elif B_TMA:
                u = b.load([b_row + N, start])
            elif EVEN_K:
                u = tl.load(b_at + tl.cast(N, tl.int64) * b_stride_n)
            else:
                u = tl.load(b_at + tl.cast(N, tl.int64) * b_stride_n, mask=depth[None, :] < K - start, other=0.0)
            if SCALING is not None:
                up_scale = up_scale_ahead
                if SCALING[DEEP]:
                    up_scale_ahead = scales_of_columns(scales, expert, column + N, columns + N, 2 * N, ahead, SCALING)
                second = scaled_dot(x, u, second, row_scale, up_scale, SWAP, SCALING)
            elif SWAP:
                second = tl.dot(u, x.T, second, input_precision=PRECISION)
            else:
                second = tl.dot(x, u.T, second, input_precision=PRECISION)
        if not A_TMA:
            a_at += BLOCK_K
        if not B_TMA:
            b_at += BLOCK_K * b_stride_k
    if SCALING is not None and SCALING[ROWS_BY] != GROUP and not SCALING[DEEP]:
        # Without a step, for an expert that is not here, the result is zero whatever the scales are.
        first = tl.where(steps > 0, first * factor_of(row_scale, scale_ahead, SWAP, SCALING), 0.0)
        if GATED:
            second = tl.where(steps > 0, second * factor_of(row_scale, up_scale_ahead, SWAP, SCALING), 0.0)
    if SWAP:
        first = first.T
        second = second.T
    return first, second


@triton.jit
def _rows(
    a, b, bias, weights, routes, before, out,
    expert, block_start, column, num_routes, N, K, num_local, outputs, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr,
    SCALING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile: the rows of `routes` ``[BLOCK_M]`` and ``BLOCK_N`` columns from `column` on.

    An `expert` outside ``[0, num_local)`` gives zeros.  `block_start` is the tile's first row of the layout.
    """
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
    # No condition around the steps: a persistent launch fuses their loop with that over tiles.
    local = (expert >= 0) & (expert < num_local)
    steps = tl.where(local, tl.cdiv(K, BLOCK_K), 0)
    safe_expert = tl.where(local, expert, 0)
    if GATED and GATE[INTERLEAVED]:
        width: tl.constexpr = 2 * BLOCK_N
        both, _ = product(
            a, b, a_rows, block_start, kept, safe_expert, 2 * column, 2 * N, K, steps, outputs,
            a_stride, b_stride_e, b_stride_n, b_stride_k,
            False, A_TMA, B_TMA, EVEN_K, SWAP, BLOCK_M, width, BLOCK_K, PRECISION, scales, SCALING,
        )  # fmt: skip
        pairs = 2 * column + tl.arange(0, width)
        if bias is not None:
            bounds = pairs < tl.where(local, 2 * N, 0)
            both += tl.load(bias + safe_expert * bias_stride + pairs, mask=bounds, other=0.0).to(tl.float32)[None, :]
        if before is not None:
            before_at = before + routes[:, None] * outputs + pairs[None, :]
            tl.store(before_at, both.to(before.dtype.element_ty), mask=kept[:, None] & (pairs < 2 * N)[None, :])
        x, up = both.reshape(BLOCK_M, BLOCK_N, 2).split()
    else:
        x, up = product(
            a, b, a_rows, block_start, kept, safe_expert, column, N, K, steps, outputs,
            a_stride, b_stride_e, b_stride_n, b_stride_k,
            GATED, A_TMA, B_TMA, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, scales, SCALING,
        )  # fmt: skip
        if bias is not None:
            at = bias + safe_expert * bias_stride + columns
            # Triton 3.9's interpreter cannot combine a scalar and a block into a mask.
            bounds = columns < tl.where(local, N, 0)
            x += tl.load(at, mask=bounds, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(at + N, mask=bounds, other=0.0).to(tl.float32)[None, :]
        if before is not None:
            before_at = before + routes[:, None] * outputs + columns[None, :]
            tl.store(before_at, x.to(before.dtype.element_ty), mask=stored)
            if GATED:
                tl.store(before_at + N, up.to(before.dtype.element_ty), mask=stored)
    if GATED:
        x = gated(x, up, ACT, GATE)
    else:
        x = activate(x, ACT, GATE)
    if weights is not None:
        weighted = kept & (slot < tl.where(local, BLOCK_M, 0))
        x = x * tl.load(weights + routes, mask=weighted, other=0.0).to(tl.float32)[:, None]
    if SCALING is not None and SCALING[RESULT_BY] is not None:
        x = quantize_result(x, scales, out_rows, kept, column, N, SCALING, BLOCK_M, BLOCK_N)
    tl.store(out_at, x.to(out.dtype.element_ty), mask=stored)


@triton.jit
def tile_of(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """The row and the column of tile number `tile`: consecutive tiles are of GROUP rows and the same column."""
    width = GROUP * num_columns
    first = tile // width * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def _tile(
    a, a_half, b, bias, weights, sorted_ids, expert_ids, before, out,
    tile, num_m, num_n, num_routes, N, K, num_local, outputs, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, HALF_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, SCALING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Compute tile number `tile` of ``num_m * num_n``.

    Consecutive tiles are of GROUP_M blocks and the same columns, whose weights stay in L2.
    With HALF_ROWS, a block with at most that many routes takes a tile of HALF_ROWS rows.
    """
    block, column_tile = tile_of(tile, num_m, num_n, GROUP_M)
    column = column_tile * BLOCK_N
    start = block * BLOCK_M
    expert = tl.load(expert_ids + block).to(tl.int64)
    if HALF_ROWS > 0:
        # Routes come before padding, so this row tells whether the block needs the whole tile.
        whole = tl.load(sorted_ids + start + HALF_ROWS) < num_routes
        if whole:
            _rows(
                a, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, BLOCK_M)), before, out,
                expert, start, column, num_routes, N, K, num_local, outputs, top_k,
                a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
                ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, SCALING,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _rows(
                a_half, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, HALF_ROWS)), before, out,
                expert, start, column, num_routes, N, K, num_local, outputs, top_k,
                a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
                ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, SCALING,
                HALF_ROWS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _rows(
            a, b, bias, weights, tl.load(sorted_ids + start + tl.arange(0, BLOCK_M)), before, out,
            expert, start, column, num_routes, N, K, num_local, outputs, top_k,
            a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
            ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, SCALING,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


# What changes from call to call must not compile another kernel: numbers of rows, and the alignment of tensors with
# one element per route or block, which may be slices of others.
@triton.jit(
    do_not_specialize=["num_routes", "num_blocks", "num_local"],
    do_not_specialize_on_alignment=["weights", "sorted_ids", "expert_ids", "total", "result_scales"],
)
def gemm(
    a, a_half, b, bias, weights, sorted_ids, expert_ids, total, before, out,
    num_routes, num_blocks, N, K, num_local, outputs, top_k,
    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride,
    a_scales, b_scales, result_scales, a_scale_stride, b_scale_stride_e, b_scale_stride_n,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, A_LAYOUT: tl.constexpr, OUT_LAYOUT: tl.constexpr,
    A_TMA: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, HALF_ROWS: tl.constexpr,
    NO_LAYOUT: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr, PERSISTENT: tl.constexpr,
    SCALING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``out[i] = weights[i] * act(b[e] @ a[i // top_k] + bias[e])`` for each route i of expert e.

    One program per tile of ``BLOCK_M`` rows and ``BLOCK_N`` columns.  With PERSISTENT, a fixed number of programs that
    loop over the tiles.  An expert's weights are read once per block of its rows; tiles of the same group share them
    in L2.

    inputs      a [rows, K], a_half: its descriptor with HALF_ROWS rows; b [experts, outputs, K]; bias [experts,
                outputs] or None; weights [num_routes] or None.  a and b are TMA descriptors with A_TMA and B_TMA
    layout      sorted_ids, expert_ids, total.  With NO_LAYOUT each route is a tile, and sorted_ids are its experts
    output      out, a row per route, or with OUT_LAYOUT a row per row of the layout; before [num_routes, outputs] or
                None: the rows before the activation, which a backward needs
    sizes       num_routes; num_blocks: those that the layout's tensors hold; N output columns; K; num_local experts;
                outputs: rows of an expert's weights, N or with GATED 2 N, the gate's first; top_k
    strides     in elements; K is contiguous in a, N in out
    FP8         a_scales, b_scales and their strides, of which SCALING tells the meaning; None and 0 without.
                result_scales: those of out, or the static one, where out is quantised (`quantize_result`)
    options     ACT, GATED, GATE: the epilogue; A_LAYOUT: a is in layout order; EVEN_K: BLOCK_K divides K; PRECISION of
                float32 products
    tunable     BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, HALF_ROWS, PERSISTENT, A_TMA, B_TMA; SWAP: weights are the left
                operand
    """
    num_n = tl.cdiv(N, BLOCK_N)
    scales = (a_scales, a_scale_stride, b_scales, b_scale_stride_e, b_scale_stride_n, result_scales)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if NO_LAYOUT:
        block = tl.program_id(0) // num_n
        expert = tl.load(sorted_ids + block).to(tl.int64)
        routes = tl.where(tl.arange(0, BLOCK_M) == 0, block, num_routes)
        _rows(
            a, b, bias, weights, routes, before, out,
            expert, 0, tl.program_id(0) % num_n * BLOCK_N, num_routes, N, K, num_local, outputs, top_k,
            a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
            ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, PRECISION, SCALING,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        num_m = tl.minimum(tl.load(total) // BLOCK_M, num_blocks)  # a wrong `total` must not lead past the tensors
        if PERSISTENT:
            for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=HALF_ROWS == 0):
                _tile(
                    a, a_half, b, bias, weights, sorted_ids, expert_ids, before, out,
                    tile, num_m, num_n, num_routes, N, K, num_local, outputs, top_k,
                    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
                    ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, HALF_ROWS, PRECISION, SCALING,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                )  # fmt: skip
        else:
            tile = tl.program_id(0)
            if tile < num_m * num_n:
                _tile(
                    a, a_half, b, bias, weights, sorted_ids, expert_ids, before, out,
                    tile, num_m, num_n, num_routes, N, K, num_local, outputs, top_k,
                    a_stride, b_stride_e, b_stride_n, b_stride_k, bias_stride, out_stride, scales,
                    ACT, GATED, GATE, A_LAYOUT, OUT_LAYOUT, A_TMA, B_TMA, EVEN_K, SWAP, HALF_ROWS, PRECISION, SCALING,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                )  # fmt: skip


@triton.jit(do_not_specialize=["limit"], do_not_specialize_on_alignment=["kept"])
def sum_rows(
    rows, kept, out, width, limit,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_j rows[t * TOP_K + j]``, over j in order.  Launched over (tokens, blocks of columns).

    inputs      rows [tokens * TOP_K, width]; kept [tokens * TOP_K], positions or ids: a route is dropped, and its row
                not read, unless 0 <= kept < limit
    output      out [tokens, width]
    tunable     BLOCK columns per program
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        route = token * TOP_K + j
        at = tl.load(kept + route).to(tl.int64)
        bounds = columns < tl.where((at >= 0) & (at < limit), width, 0)
        total += tl.load(rows + route * width + columns, mask=bounds, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=columns < width)
