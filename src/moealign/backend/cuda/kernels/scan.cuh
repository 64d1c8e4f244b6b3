// A prefix sum over a CTA, for the paths that count: independent, grid and radix.  Include it behind common.cuh.

// Exclusive prefix sums over the CTA of `a` and, if `second`, of `b`, in place; their totals in `total_a`, `total_b`.
// One barrier inside.  `partial` is written before it and read after it, so two calls with the same `partial` need a
// barrier between them.
DEV void scan_cta(u32 &a, u32 &b, u32 &total_a, u32 &total_b, uint2 *partial, bool second) {
    const u32 lane = lane_id(), warp = warp_id();
    u32 x = a, y = b;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        u32 p = __shfl_up_sync(FULL, x, d);
        if (lane >= d) x += p;
        if (second) {
            u32 q = __shfl_up_sync(FULL, y, d);
            if (lane >= d) y += q;
        }
    }
    if (lane == 31) partial[warp] = make_uint2(x, y);
    __syncthreads();
    const uint2 w = lane < WARPS ? partial[lane] : make_uint2(0, 0);
    a = x - a + __reduce_add_sync(FULL, lane < warp ? w.x : 0);
    total_a = __reduce_add_sync(FULL, w.x);
    if (second) {
        b = y - b + __reduce_add_sync(FULL, lane < warp ? w.y : 0);
        total_b = __reduce_add_sync(FULL, w.y);
    }
}
