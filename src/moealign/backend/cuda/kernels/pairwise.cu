// The layout of up to 32 * WORDS routes, for any number of experts.  Every CTA compares all routes with all: one ballot
// per bit of the bins gives bit planes in shared memory, which compare a route with 32 others at a time.  Each CTA
// writes its own share of the outputs; two barriers, and one more behind a fused router.
//
// Launch: any number of CTAs of THREADS threads, one more with FUSED_ROUTER; no dynamic shared memory, no scratch.
// common.cuh lists macros and parameters.

#include "common.cuh"
#include "fused.cuh"

static_assert(WORDS * 32 <= THREADS, "a thread per route");
static_assert(WORDS <= 32 && (WORDS & (WORDS - 1)) == 0, "words of an expert are summed within a warp");

// The bins of 32 routes, route i in bit i of each word.
struct Planes {
    u32 kept;           // the route is not dropped
    u32 bit[BITS + 1];  // bit b of its bin
};

// The routes in `p` whose bin equals `bin`, and those whose bin is less.
DEV void compare(const Planes &p, u32 bin, u32 &equal, u32 &less) {
    equal = p.kept;
    less = 0;
#pragma unroll
    for (int b = BITS - 1; b >= 0; b--) {
        u32 plane = p.bit[b], mine = (bin >> b) & 1 ? FULL : 0;
        less |= equal & mine & ~plane;
        equal &= ~(plane ^ mine);
    }
}

// Each CTA fills its share of sorted_token_ids with the sentinel, then writes the routes whose rows lie in that share.
extern "C" __global__ void __launch_bounds__(THREADS, 1) pairwise(PARAMETERS ROUTER_PARAMETERS) {
    UNPACK_SIZES;
    __shared__ __align__(16) Planes planes[WORDS];
    __shared__ u32 leaders[WORDS];
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id();
    const u32 grid_thread = blockIdx.x * THREADS + t, grid_threads = LAYOUT_CTAS * THREADS, top_k = (u32)top_k64;
    u32 errors = 0;
    wait_for_dependency(ids);
#if FUSED_ROUTER
    static_assert(SPLIT == 1, "a token has one warp");
    const u32 tokens = n / COLUMNS;
    Token token;
    token.load(logits, bias, row_stride, tokens);
#else
    id_t v = t < n ? id_at(ids, t, top_k, id_stride0, id_stride1) : (id_t)0;
#endif
    const u32 limit = valid_routes(num_valid, n, top_k);
    const u32 slice = ((L + LAYOUT_CTAS - 1) / LAYOUT_CTAS + 3u) & ~3u;
    const u32 from = min(blockIdx.x * slice, L), to = min(from + slice, L);
    fill(sorted, from, to, (int)n, t, THREADS);
#if FUSED_ROUTER
    __shared__ int chosen[WORDS * 32];
    const bool writes = blockIdx.x == LAYOUT_CTAS;
    if (token.number < tokens) {
        const int e = token.route(bias, OPTIONS, weights, ids_out, scale_bits, limit, writes);
        if (lane < COLUMNS) chosen[token.number * COLUMNS + lane] = e;
    }
    if (writes) return;
    __syncthreads();
    const id_t v = t < n ? chosen[t] : 0;
#endif

    const int bin = bin_of(v, t < limit, map, map_stride, errors);
    if (warp < WORDS) {
        u32 kept = __ballot_sync(FULL, bin >= 0);
        if (lane == 0) planes[warp].kept = kept;
#pragma unroll
        for (int b = 0; b < BITS; b++) {
            u32 plane = __ballot_sync(FULL, (bin >> b) & 1);
            if (lane == 0) planes[warp].bit[b] = plane;
        }
    }
    __syncthreads();
    u32 rank = 0, count = 0, less[WORDS];
#pragma unroll
    for (int c = 0; c < WORDS; c++) {
        u32 equal;
        compare(planes[c], (u32)bin, equal, less[c]);
        count += __popc(equal);
        rank += __popc(equal & (c < (int)warp ? FULL : c == (int)warp ? lanes_below(lane) : 0u));
    }
    const bool is_leader = bin >= 0 && rank % B == 0;
    const u32 leading = __ballot_sync(FULL, is_leader);
    if (lane == 0 && warp < WORDS) leaders[warp] = leading;
    __syncthreads();
    u32 before = 0, used = 0;
#pragma unroll
    for (int c = 0; c < WORDS; c++) {
        before += __popc(less[c] & leaders[c]);
        used += __popc(leaders[c]);
    }
    const u32 row = before * B + rank;
    if (bin >= 0 && row >= from && row < to) sorted[row] = (int)t;
    if (blockIdx.x == LAYOUT_CTAS - 1) {
        if (is_leader) {
            expert_ids[row / B] = expert_of_bin(map, map_stride, bin);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, count - rank);
#endif
        }
        if (t >= used && t < num_blocks) {
            expert_ids[t] = -1;
#if BLOCK_ROWS
            block_rows[t] = 0;
#endif
        }
        if (t == 0) total_out[0] = (int)(used * B);
    }
    if (blockIdx.x == 0 && t < n) {
#if POSITIONS
        positions[t] = bin >= 0 ? (int)row : -1;
#endif
#if SCATTER
        scatter[t] = bin >= 0 ? (int)t : -1;
#endif
    }
#if COUNTS || OFFSETS || ENDS
    // WORDS threads per expert, a word each.
    const u32 word = t % WORDS, word_leaders = leaders[word];
#pragma unroll 1
    for (u32 i = grid_thread; (i & ~31u) < E * WORDS; i += grid_threads) {
        const u32 e = i / WORDS;
        u32 equal, less;
        compare(planes[word], e, equal, less);
        u32 routes = __popc(equal), end = __popc(equal | less), blocks = __popc(less & word_leaders);
#pragma unroll
        for (int d = 1; d < WORDS; d *= 2) {
            routes += __shfl_xor_sync(FULL, routes, d);
            end += __shfl_xor_sync(FULL, end, d);
            blocks += __shfl_xor_sync(FULL, blocks, d);
        }
        if (word == 0 && e < E) {
#if COUNTS
            counts[e] = routes;
#endif
#if ENDS
            ends[e] = end;
#endif
#if OFFSETS
            offsets[e] = (int)(blocks * B);
#endif
        }
    }
#if OFFSETS
    if (grid_thread == 0) offsets[E] = (int)(used * B);
#endif
#endif
    report_errors(
        error_word, blockIdx.x == 0 ? errors : 0, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
