# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the experts' gradients.  Imported at the first launch.

`activation_gradient`  the second product's gradient for its rows, carried on through the routing weight and the
                       activation: one product with that epilogue.
`weights_gradient`     the gradient for each expert's weights: a product over the rows of the expert.
`bias_gradient`        the gradient for each expert's bias: a sum over the rows of the expert.
`routing_gradient`     the gradient for the routing weights, from the parts that the others leave.

Every output element is written by one program, which adds in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_kernels import (
    ALPHA,
    BETA,
    GELU,
    GELU_TANH,
    INTERLEAVED,
    LIMIT,
    LIMIT_AFTER,
    LINEAR_BETA,
    OFFSET,
    RELU,
    RELU2,
    SILU,
    SITU,
    tanh,
)
from .kernels import product, tile_of

__all__ = ["activation_gradient", "bias_gradient", "routing_gradient", "weights_gradient"]


@triton.jit
def _activation_and_slope(x, ACT: tl.constexpr, GATE: tl.constexpr):
    """An activation and its derivative, of a block of any shape, in float32."""
    if ACT == SILU:
        if GATE[ALPHA] == 1:
            share = 1 / (1 + tl.exp(-x))
            slope = share * (1 + x * (1 - share))
        else:
            share = 1 / (1 + tl.exp(-GATE[ALPHA] * x))
            slope = share * (1 + GATE[ALPHA] * x * (1 - share))
        value = x * share
    elif ACT == GELU:
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACT == GELU_TANH:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        share = 1 / (1 + tl.exp(-2 * inner))
        value = x * share
        slope = share + 2 * x * share * (1 - share) * (0.7978845608028654 * (1 + 0.134145 * x * x))
    elif ACT == RELU:
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACT == SITU:
        share = 1 / (1 + tl.exp(-x))
        bounded = tanh(x / GATE[BETA])
        value = GATE[BETA] * bounded * share
        slope = share * ((1 - bounded * bounded) + GATE[BETA] * bounded * (1 - share))
    else:
        tl.static_assert(ACT == RELU2)
        value = tl.maximum(x, 0.0)
        slope = 2 * value
        value = value * value
    return value, slope


@triton.jit
def _gate_and_slopes(x, up, ACT: tl.constexpr, GATE: tl.constexpr):
    """The activation of a gate and its derivative, and its up part and the derivative of that, in float32.

    As in torch, the gradient of a clamp passes where the value is within the limit or equal to it.
    """
    if GATE[LIMIT] is not None and not GATE[LIMIT_AFTER]:
        value, slope = _activation_and_slope(tl.minimum(x, GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL), ACT, GATE)
        slope = tl.where(x <= GATE[LIMIT], slope, 0.0)
    else:
        value, slope = _activation_and_slope(x, ACT, GATE)
        if GATE[LIMIT] is not None:
            slope *= tl.where(value <= GATE[LIMIT], 1.0, 0.0)
            value = tl.minimum(value, GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL)
    if GATE[LIMIT] is not None:
        up_slope = tl.where(tl.abs(up) <= GATE[LIMIT], 1.0, 0.0)
        up = tl.clamp(up, -GATE[LIMIT], GATE[LIMIT], propagate_nan=tl.PropagateNan.ALL)
    else:
        up_slope = tl.full(up.shape, 1.0, tl.float32)
    if GATE[LINEAR_BETA] is not None:
        bounded = tanh(up / GATE[LINEAR_BETA])
        up = GATE[LINEAR_BETA] * bounded
        up_slope = up_slope * (1 - bounded * bounded)
    if GATE[OFFSET] != 0:
        up += GATE[OFFSET]
    return value, slope, up, up_slope


@triton.jit(
    do_not_specialize=["num_routes", "num_blocks", "num_local"],
    do_not_specialize_on_alignment=["weights", "sorted_ids", "expert_ids", "total", "sums"],
)
def activation_gradient(
    grads, b, before, weights, sorted_ids, expert_ids, total, activated, out, sums,
    num_routes, num_blocks, N, K, num_local, outputs, top_k,
    grad_stride, b_stride_e, b_stride_n, b_stride_k,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, B_TMA: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """With ``g = b[e] @ grads[i // top_k]`` for each route i of expert e, and x, up the rows of `before`:

    ==============  ==========================================================================================
    ``activated``   ``weights[i] * act(x) * up``: what the gradient of the second projection multiplies
    ``out``         ``weights[i] * g * up * act'(x)``, then ``weights[i] * g * act(x)``: the gradient of `before`
    ``sums[i]``     of ``g * act(x) * up`` over the columns of each tile: parts of the gradient of ``weights[i]``
    ==============  ==========================================================================================

    Without GATED there is no up; a gate with constants (GATE) has its own derivatives for gate and up.  A fixed number
    of programs loops over tiles of ``BLOCK_M`` rows and ``BLOCK_N`` columns.

    inputs      grads [tokens, K]; b [experts, N, K] by its strides, or its TMA descriptor (`product` in kernels.py);
                before [num_routes, outputs]; weights [num_routes]
    layout      sorted_ids, expert_ids, total
    outputs     activated, out: rows of the layout; padding rows of used blocks are zero, and so are rows of an expert
                outside ``[0, num_local)``; sums [num_routes, column tiles], rows of dropped routes are not written
    sizes       num_routes; num_blocks: those that the layout's tensors hold; N columns; K; num_local experts;
                outputs: columns of `before`, N or with GATED 2 N; top_k
    strides     in elements; K is contiguous in grads
    tunable     BLOCK_M (the layout's blocks), BLOCK_N, BLOCK_K, GROUP_M, B_TMA
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_m = tl.minimum(tl.load(total) // BLOCK_M, num_blocks)  # a wrong `total` must not lead past the tensors
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        block, column_tile = tile_of(tile, num_m, num_n, GROUP_M)
        slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
        expert = tl.load(expert_ids + block).to(tl.int64)
        routes = tl.load(sorted_ids + slots)
        kept = (routes >= 0) & (routes < num_routes)
        routes = routes.to(tl.int64)
        local = (expert >= 0) & (expert < num_local)
        steps = tl.where(local, tl.cdiv(K, BLOCK_K), 0)
        weighted = kept & (slots < tl.where(local, slots + 1, 0))
        column = column_tile * BLOCK_N
        # Some columns at a time, for fewer registers.
        parts: tl.constexpr = BLOCK_N // 64 if BLOCK_N > 64 else 1
        width: tl.constexpr = BLOCK_N // parts
        g, _ = product(
            grads, b, routes // top_k, 0, kept, tl.where(local, expert, 0), column, N, K, steps, N,
            grad_stride, b_stride_e, b_stride_n, b_stride_k,
            False, False, B_TMA, EVEN_K, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        factor = tl.load(weights + routes, mask=weighted, other=0.0).to(tl.float32)[:, None]
        dots = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for part in tl.static_range(parts):
            first = column + part * width
            x, up = _before(before, routes, weighted, first, N, outputs, GATED, GATE, width)
            dots += _through_activation(
                _part(g, part, parts, BLOCK_M, BLOCK_N), x, up, factor, activated, out, slots, first, N, outputs,
                ACT, GATED, GATE, width,
            )  # fmt: skip
        tl.store(sums + routes * num_n + column_tile, dots, mask=kept)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block's columns."""
    return x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _part(x, part: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part number `part` of a block's columns, of 1, 2 or 4 PARTS."""
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS > 1:
        left, right = _halves(x, ROWS, COLUMNS)
        x = right if part >= PARTS // 2 else left
    if PARTS > 2:
        left, right = _halves(x, ROWS, COLUMNS // 2)
        x = right if part % 2 else left
    return x


@triton.jit
def _before(
    before, routes, weighted, column, N, outputs, GATED: tl.constexpr, GATE: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS columns from `column` on of the rows before the activation: of the gate and of the up part, if any."""
    columns = column + tl.arange(0, COLUMNS)
    if GATED and GATE[INTERLEAVED]:
        pairs = 2 * column + tl.arange(0, 2 * COLUMNS)
        mask = weighted[:, None] & (pairs < 2 * N)[None, :]
        both = tl.load(before + routes[:, None] * outputs + pairs[None, :], mask=mask, other=0.0)
        x, up = both.reshape(routes.shape[0], COLUMNS, 2).split()
    else:
        mask = weighted[:, None] & (columns < N)[None, :]
        at = before + routes[:, None] * outputs + columns[None, :]
        x = tl.load(at, mask=mask, other=0.0)
        if GATED:
            up = tl.load(at + N, mask=mask, other=0.0)
        else:
            up = x
    return x, up


@triton.jit
def _through_activation(
    g, x, up, factor, activated, out, slots, column, N, outputs,
    ACT: tl.constexpr, GATED: tl.constexpr, GATE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The epilogue of `activation_gradient` for COLUMNS columns from `column` on: its part of the rows' sums."""
    columns = column + tl.arange(0, COLUMNS)
    inside = (columns < N)[None, :]
    rows = slots.to(tl.int64)[:, None]
    weighted_g = g * factor
    x = x.to(tl.float32)
    if GATED:
        value, slope, up, up_slope = _gate_and_slopes(x, up.to(tl.float32), ACT, GATE)
        to_x = weighted_g * slope * up
        to_up = weighted_g * value * up_slope
        if GATE[LIMIT] is not None:  # as in torch, what a clamp stops is zero beside NaN too
            to_up = tl.where(up_slope == 0, 0.0, to_up)
            if not GATE[LIMIT_AFTER]:
                to_x = tl.where(slope == 0, 0.0, to_x)
        value = value * up
    else:
        value, slope = _activation_and_slope(x, ACT, GATE)
        to_x = weighted_g * slope
    if GATED and GATE[INTERLEAVED]:
        pairs = 2 * column + tl.arange(0, 2 * COLUMNS)
        both = tl.join(to_x, to_up).reshape(slots.shape[0], 2 * COLUMNS)
        tl.store(out + rows * outputs + pairs[None, :], both.to(out.dtype.element_ty), mask=(pairs < 2 * N)[None, :])
    else:
        out_at = out + rows * outputs + columns[None, :]
        tl.store(out_at, to_x.to(out.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(out_at + N, to_up.to(out.dtype.element_ty), mask=inside)
    tl.store(activated + rows * N + columns[None, :], (value * factor).to(activated.dtype.element_ty), mask=inside)
    return tl.sum(tl.where(inside, g * value, 0.0), 1)


@triton.jit
def _span_of(offsets, counts, expert, limit):
    """First row and number of rows of `expert` in the layout; wrong values must not lead past its `limit` rows."""
    first = tl.minimum(tl.maximum(tl.load(offsets + expert), 0), limit)
    return first, tl.minimum(tl.load(counts + expert), limit - first)


@triton.jit(
    do_not_specialize=["num_routes", "limit"],
    do_not_specialize_on_alignment=["sorted_ids", "offsets", "counts"],
)
def weights_gradient(
    gathered, other, sorted_ids, offsets, counts, out,
    num_routes, limit, M, N,
    gathered_stride, other_stride, out_stride_e, out_stride_m, out_stride_n,
    TOP_K: tl.constexpr, OTHER_LAYOUT: tl.constexpr, OTHER_TMA: tl.constexpr, ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``out[e, m, n] = sum of gathered[i // TOP_K, m] * other[i, n]`` over the routes i of expert e.

    One program per expert and tile of ``[BLOCK_M, BLOCK_N]``.  An expert without routes gets zeros.

    inputs      gathered [rows, M]; other [rows, N], or with OTHER_LAYOUT in layout order [limit, N], where the padding
                rows of used blocks are zero; a TMA descriptor of it with OTHER_TMA
    layout      sorted_ids [limit]; offsets, counts of the experts.  BLOCK_K divides its blocks
    output      out [experts, M, N] by its strides; with ACCUMULATE the sum is added to it
    sizes       num_routes; limit: rows of the layout; M, N; TOP_K
    strides     in elements; the columns are contiguous in gathered and other
    tunable     BLOCK_M, BLOCK_N, BLOCK_K rows of a step, GROUP_M
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (num_m * num_n)
    row_tile, column_tile = tile_of(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, count = _span_of(offsets, counts, expert, limit)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # The routes of a step are loaded one step ahead: otherwise two loads in turn would precede each product.
    depth = tl.arange(0, BLOCK_K)
    routes = tl.load(sorted_ids + first + depth, mask=first + depth < limit, other=num_routes)
    for step in range(tl.cdiv(count, BLOCK_K)):
        start = first + step * BLOCK_K
        slots = start + depth
        kept = (routes >= 0) & (routes < num_routes)
        left_rows = (routes // TOP_K).to(tl.int64)
        left_at = gathered + left_rows[:, None] * gathered_stride + m[None, :]
        left = tl.load(left_at, mask=kept[:, None] & (m < M)[None, :], other=0.0)
        if OTHER_TMA:
            right = other.load([start, column_tile * BLOCK_N])
        else:
            right_rows = slots.to(tl.int64) if OTHER_LAYOUT else routes.to(tl.int64)
            right_at = other + right_rows[:, None] * other_stride + n[None, :]
            right = tl.load(right_at, mask=kept[:, None] & (n < N)[None, :], other=0.0)
        routes = tl.load(sorted_ids + slots + BLOCK_K, mask=slots < limit - BLOCK_K, other=num_routes)
        total = tl.dot(left.T, right, total, input_precision=PRECISION)
    out_at = out + expert.to(tl.int64) * out_stride_e + m[:, None] * out_stride_m + n[None, :] * out_stride_n
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ACCUMULATE:
        total += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_routes", "limit"],
    do_not_specialize_on_alignment=["weights", "sorted_ids", "offsets", "counts", "sums"],
)
def bias_gradient(
    rows, weights, bias, sorted_ids, offsets, counts, out, sums,
    num_routes, limit, N, top_k, row_stride, bias_stride,
    IN_LAYOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out[e, n] = sum of weights[i] * rows[i // top_k, n]`` over the routes i of expert e.

    One program per expert and BLOCK_N columns.  An expert without routes gets zeros.

    inputs      rows [., N], or with IN_LAYOUT in layout order; weights [num_routes] or None; bias [experts, N] or None
    layout      sorted_ids [limit]; offsets, counts of the experts
    outputs     out [experts, N]; with `bias` also sums [num_routes, column tiles]: of ``rows[i // top_k] * bias[e]``
                over the columns of each tile, parts of the gradient of ``weights[i]``
    sizes       num_routes; limit: rows of the layout; N; top_k
    strides     in elements, of rows and of bias
    tunable     BLOCK_M rows of a step, BLOCK_N
    """
    num_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // num_n
    column_tile = tl.program_id(0) % num_n
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, count = _span_of(offsets, counts, expert, limit)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if bias is not None:
        added = tl.load(bias + expert.to(tl.int64) * bias_stride + n, mask=n < N, other=0.0).to(tl.float32)
    for step in range(0, count, BLOCK_M):
        index = step + tl.arange(0, BLOCK_M)
        routes = tl.load(sorted_ids + first + index, mask=index < count, other=num_routes)
        kept = (routes >= 0) & (routes < num_routes)
        routes = routes.to(tl.int64)
        if IN_LAYOUT:
            numbers = (first + index).to(tl.int64)
        else:
            numbers = routes // top_k
        at = rows + numbers[:, None] * row_stride + n[None, :]
        values = tl.load(at, mask=kept[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if bias is not None:
            tl.store(sums + routes * num_n + column_tile, tl.sum(values * added[None, :], 1), mask=kept)
        if weights is not None:
            values = values * tl.load(weights + routes, mask=kept, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out + expert.to(tl.int64) * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit(
    do_not_specialize=["num_routes"],
    do_not_specialize_on_alignment=["sums", "dots", "positions", "out"],
)
def routing_gradient(
    sums, dots, positions, out, num_routes, num_sums, num_dots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = sum_j sums[i, j] + sum_j dots[i, j]``, over j in order; 0 for dropped routes.

    One program per BLOCK routes.

    inputs      sums [num_routes, num_sums]; dots [num_routes, num_dots] or None; positions [num_routes], negative if
                dropped
    output      out [num_routes]
    """
    routes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = routes < num_routes
    kept = tl.load(positions + routes, mask=inside, other=-1) >= 0
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for j in range(num_sums):
        total += tl.load(sums + routes * num_sums + j, mask=kept, other=0.0)
    if dots is not None:
        for j in range(num_dots):
            total += tl.load(dots + routes * num_dots + j, mask=kept, other=0.0)
    tl.store(out + routes, total.to(out.dtype.element_ty), mask=inside)
