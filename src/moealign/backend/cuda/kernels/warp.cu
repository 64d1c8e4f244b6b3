// The layout of up to 32 routes.  Every warp ranks all routes with ballots and writes its own share of the outputs, so
// there is no barrier, except in a fused router whose warps share scores, and behind one of several tokens.
//
// Launch: any number of CTAs of THREADS threads, one more with FUSED_ROUTER; no dynamic shared memory, no scratch.
// common.cuh lists macros and parameters.

#include "common.cuh"
#include "fused.cuh"

// Each warp fills its share of sorted_token_ids with the sentinel, then writes the routes whose rows lie in that share.
extern "C" __global__ void __launch_bounds__(THREADS, 1) warp(PARAMETERS ROUTER_PARAMETERS) {
    UNPACK_SIZES;
    const u32 lane = lane_id(), grid_thread = blockIdx.x * THREADS + threadIdx.x, grid_threads = LAYOUT_CTAS * THREADS;
    const u32 grid_warp = grid_thread >> 5, grid_warps = grid_threads >> 5, top_k = (u32)top_k64;
    u32 errors = 0;
    wait_for_dependency(ids);
#if FUSED_ROUTER
    const u32 tokens = ONE_TOKEN ? 1 : n / COLUMNS;
    Token token;
    token.load(logits, bias, row_stride, tokens);
#else
    id_t v = lane < n ? id_at(ids, lane, top_k, id_stride0, id_stride1) : (id_t)0;
#endif
    const u32 limit = valid_routes(num_valid, n, top_k);
    const u32 slice = ((L + grid_warps - 1) / grid_warps + 127u) & ~127u;
    const u32 from = min(grid_warp * slice, L), to = min(from + slice, L);
    fill(sorted, from, to, (int)n, lane, 32);
#if FUSED_ROUTER
    const bool writes = blockIdx.x == LAYOUT_CTAS;
    token.part.share(token.raw, lane);
    if (ONE_TOKEN && writes && threadIdx.x >= 32) return;
    int e = -1;
    if (token.number < tokens) e = token.route(bias, OPTIONS, weights, ids_out, scale_bits, limit, writes);
#if ONE_TOKEN
    if (writes) return;
    const id_t v = (id_t)e;
#else
    __shared__ int chosen[WARPS * 32];
    if (token.number < tokens && lane < COLUMNS) chosen[token.number * COLUMNS + lane] = e;
    if (writes) return;
    __syncthreads();
    const id_t v = lane < n ? chosen[lane] : 0;
#endif
#endif

    const int bin = bin_of(v, lane < limit, map, map_stride, errors);
    const u32 kept = __ballot_sync(FULL, bin >= 0);
    u32 equal = kept, less = 0;
    u32 planes[BITS + 1];
#pragma unroll
    for (int b = BITS - 1; b >= 0; b--) {
        u32 plane = __ballot_sync(FULL, (bin >> b) & 1), mine = (bin >> b) & 1 ? FULL : 0;
        planes[b] = plane;
        less |= equal & mine & ~plane;
        equal &= ~(plane ^ mine);
    }
    const u32 rank = __popc(equal & lanes_below(lane));
    const bool is_leader = bin >= 0 && rank % B == 0;
    const u32 leaders = __ballot_sync(FULL, is_leader);
    const u32 row = __popc(less & leaders) * B + rank;
    const u32 used = __popc(leaders);
    __syncwarp();
    if (bin >= 0 && row >= from && row < to) sorted[row] = (int)lane;

    if (grid_warp == grid_warps - 1) {
        if (is_leader) {
            expert_ids[row / B] = expert_of_bin(map, map_stride, bin);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, __popc(equal) - rank);
#endif
        }
        if (lane >= used && lane < num_blocks) {
            expert_ids[lane] = -1;
#if BLOCK_ROWS
            block_rows[lane] = 0;
#endif
        }
        if (lane == 0) total_out[0] = (int)(used * B);
    }
    if (grid_warp == 0) {
        if (lane < n) {
#if POSITIONS
            positions[lane] = bin >= 0 ? (int)row : -1;
#endif
#if SCATTER
            scatter[lane] = bin >= 0 ? (int)lane : -1;
#endif
        }
    }
#if COUNTS || OFFSETS || ENDS
#pragma unroll 1
    for (u32 e = grid_thread; e < E; e += grid_threads) {
        u32 equal = kept, less = 0;
#pragma unroll
        for (int b = BITS - 1; b >= 0; b--) {
            u32 mine = (e >> b) & 1 ? FULL : 0;
            less |= equal & mine & ~planes[b];
            equal &= ~(planes[b] ^ mine);
        }
#if COUNTS
        counts[e] = __popc(equal);
#endif
#if ENDS
        ends[e] = __popc(equal | less);
#endif
#if OFFSETS
        offsets[e] = (int)(__popc(less & leaders) * B);
#endif
    }
#if OFFSETS
    if (grid_thread == 0) offsets[E] = (int)(used * B);
#endif
#endif
    report_errors(
        error_word, grid_warp == 0 ? errors : 0, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
