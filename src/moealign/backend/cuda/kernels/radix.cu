// The layout of any number of routes and experts: a stable radix sort of the bins, least significant digit first, eight
// bits per pass.  The first pass leaves dropped routes out.  Runs of equal keys then give the counts, and one scan over
// the experts, shared by the grid, gives the rows.
//
// Launch: cooperative, any number of CTAs of THREADS threads; no dynamic shared memory.  common.cuh lists macros and
// parameters.
//
// Scratch in words: PASSES tables of CTAs x 256; keys and routes (2n; 4n with several passes); begin, end and first row
// of each expert (3E); two sums per CTA.

#include "common.cuh"
#include "scan.cuh"
#include "barrier.cuh"

DEV u32 load_l2(const u32 *p) { return __ldcg(p); }

#define PASSES (BITS > 8 ? (BITS + 7) / 8 : 1)
static_assert(THREADS % 256 == 0, "a segment of threads has one for each digit");
static_assert(PASSES * 256 + 2 <= SCRATCH_PER_CTA, "tables and sums fit");
static_assert((PASSES > 1 ? 4 : 2) <= SCRATCH_PER_ROUTE, "keys and routes fit");
static_assert(3 * (long long)E <= SCRATCH_FIXED, "begin, end and first row of each expert fit");

// Sort (key, route) pairs by key; then find the runs, scan their lengths, and write the outputs.
extern "C" __global__ void __launch_bounds__(THREADS, 1) radix(PARAMETERS) {
    UNPACK_SIZES;
    __shared__ uint2 partial[32];
    __shared__ u32 table[256];  // per digit: count in my chunk, then next index
    __shared__ u32 sums[2][THREADS / 256 * 256];
    __shared__ u32 of_warp[WARPS][257];
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), cta = blockIdx.x, ctas = gridDim.x;
    const u32 grid_thread = cta * THREADS + t, grid_threads = ctas * THREADS, top_k = (u32)top_k64;
    u32 errors = 0;
    u32 *tables = (u32 *)scratch, *keys = tables + (u64)PASSES * ctas * 256, *routes = keys + n;
    u32 *other = PASSES > 1 ? routes + n : keys;
    u32 *begin = other + 2ull * n, *end = begin + E, *row_of = end + E, *cta_sums = row_of + E;
    Barrier barrier = Barrier::begin();
    wait_for_dependency(ids);
    const u32 limit = valid_routes(num_valid, n, top_k);

    fill(sorted, 0, L, (int)n, grid_thread, grid_threads);
    for (u32 b = grid_thread; b < num_blocks; b += grid_threads) {
        expert_ids[b] = -1;
#if BLOCK_ROWS
        block_rows[b] = 0;
#endif
    }
    for (u32 e = grid_thread; e < E; e += grid_threads) begin[e] = end[e] = 0;

    u32 *keys_in = nullptr, *routes_in = nullptr, kept_routes = n;  // what a pass reads: all routes, then those kept
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        u32 *keys_out = pass & 1 ? other : keys, *routes_out = keys_out + n;
        const int shift = 8 * pass;
        const u32 tiles = (kept_routes + THREADS - 1) / THREADS, share = (tiles + ctas - 1) / ctas;
        const u32 from = min((u64)cta * share * THREADS, (u64)kept_routes);
        const u32 to = min((u64)from + (u64)share * THREADS, (u64)kept_routes);
        for (u32 i = t; i < 256; i += THREADS) table[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (u32 tile = from; tile < to; tile += THREADS) {
            const u32 i = tile + t;
            int key = -1;
            if (i < to) {
                if (pass == 0)
                    key = bin_of(id_at(ids, i, top_k, id_stride0, id_stride1), i < limit, map, map_stride, errors);
                else
                    key = (int)load_l2(&keys_in[i]);
            }
            const int digit = key < 0 ? -1 : (key >> shift) & 255;
            int first = __shfl_sync(FULL, digit, 0);
            u32 same = __ballot_sync(FULL, digit == first);
            if (digit >= 0 && (lane == 0 || digit != first)) atomicAdd(&table[digit], lane == 0 ? __popc(same) : 1);
        }
        __syncthreads();
        u32 *mine = tables + (u64)pass * ctas * 256;
        for (u32 i = t; i < 256; i += THREADS) __stcg(&mine[cta * 256 + i], table[i]);
        barrier.sync();
        {
            u32 d = t & 255, seg = t >> 8, a = 0, before = 0;
#pragma unroll 16
            for (u32 row = seg; row < ctas; row += THREADS / 256) {
                u32 w = load_l2(&mine[row * 256 + d]);
                a += w;
                if (row < cta) before += w;
            }
            sums[0][t] = a, sums[1][t] = before;
        }
        __syncthreads();
        u32 a = 0, before = 0, unused = 0, x, y;
        if (t < 256)
            for (int s = 0; s < THREADS / 256; s++) a += sums[0][s * 256 + t], before += sums[1][s * 256 + t];
        scan_cta(a, unused, x, y, partial, false);
        if (t < 256) table[t] = a + before;
        kept_routes = x;
#pragma unroll 1
        for (u32 tile = from; tile < to; tile += THREADS) {
            for (u32 i = lane; i < 256; i += 32) of_warp[warp][i] = 0;
            __syncwarp();
            const u32 i = tile + t;
            u32 route = i;
            int key = -1;
            if (i < to) {
                if (pass == 0) {
                    u32 ignored = 0;
                    key = bin_of(id_at(ids, i, top_k, id_stride0, id_stride1), i < limit, map, map_stride, ignored);
#if SCATTER
                    scatter[i] = key < 0 ? -1 : (int)i;
#endif
#if POSITIONS
                    if (key < 0) positions[i] = -1;
#endif
                } else {
                    key = (int)load_l2(&keys_in[i]);
                    route = load_l2(&routes_in[i]);
                }
            }
            const bool ok = key >= 0;
            const u32 digit = (key >> shift) & 255;
            u32 equal = lanes_with_bin<8>(digit, __ballot_sync(FULL, ok)), ahead = equal & lanes_below(lane);
            if (ok && ahead == 0) of_warp[warp][digit] = __popc(equal);
            __syncthreads();
            if (t < 256) {
                u32 run = table[t];
#pragma unroll
                for (int w = 0; w < WARPS; w++) {
                    u32 c = of_warp[w][t];
                    of_warp[w][t] = run;
                    run += c;
                }
                table[t] = run;
            }
            __syncthreads();
            if (ok) {
                u32 at = of_warp[warp][digit] + __popc(ahead);
                __stcg(&keys_out[at], (u32)key);
                __stcg(&routes_out[at], route);
            }
            __syncwarp();
        }
        keys_in = keys_out, routes_in = routes_out;
        barrier.sync();
    }

    for (u32 i = grid_thread; i < kept_routes; i += grid_threads) {
        const u32 key = load_l2(&keys_in[i]);
        if (i == 0 || load_l2(&keys_in[i - 1]) != key) __stcg(&begin[key], i);
        if (i + 1 == kept_routes || load_l2(&keys_in[i + 1]) != key) __stcg(&end[key], i + 1);
    }
    barrier.sync();

    // A share of the experts per CTA: their sums first, then their rows.
    const u32 experts_each = (E + ctas - 1) / ctas;
    const u32 e_from = min(cta * experts_each, (u32)E), e_to = min(e_from + experts_each, (u32)E);
    u32 blocks = 0, kept = 0, all_blocks, all_kept;
    for (u32 e = e_from + t; e < e_to; e += THREADS) {
        u32 c = load_l2(&end[e]) - load_l2(&begin[e]);
        blocks += blocks_of(c);
        kept += c;
    }
    scan_cta(blocks, kept, all_blocks, all_kept, partial, true);
    if (t == 0) __stcg(&cta_sums[2 * cta], all_blocks), __stcg(&cta_sums[2 * cta + 1], all_kept);
    barrier.sync();
    u32 before_blocks = 0, before_kept = 0, total = 0;
    {
        u32 a = 0, b = 0, c = 0, x, y;
        for (u32 i = t; i < ctas; i += THREADS) {
            u32 p = load_l2(&cta_sums[2 * i]), q = load_l2(&cta_sums[2 * i + 1]);
            if (i < cta) a += p, b += q;
            c += p;
        }
        u32 a_ = a, b_ = b;
        scan_cta(a_, b_, before_blocks, before_kept, partial, true);
        __syncthreads();
        u32 zero = 0;
        scan_cta(c, zero, x, y, partial, false);
        total = x * B;
        __syncthreads();
    }
    for (u32 tile = e_from; tile < e_to; tile += THREADS) {
        u32 e = tile + t, c = 0;
        if (e < e_to) c = load_l2(&end[e]) - load_l2(&begin[e]);
        u32 a = blocks_of(c), b = c, x, y;
        scan_cta(a, b, x, y, partial, true);
        if (e < e_to) {
            u32 row = (before_blocks + a) * B;
            __stcg(&row_of[e], row);
#if COUNTS
            counts[e] = (int)c;
#endif
#if OFFSETS
            offsets[e] = (int)row;
#endif
#if ENDS
            ends[e] = (int)(before_kept + b + c);
#endif
        }
        before_blocks += x;
        before_kept += y;
        __syncthreads();
    }
    if (grid_thread == 0) {
        total_out[0] = (int)total;
#if OFFSETS
        offsets[E] = (int)total;
#endif
    }
    barrier.sync();

    for (u32 i = grid_thread; i < kept_routes; i += grid_threads) {
        const u32 key = load_l2(&keys_in[i]), route = load_l2(&routes_in[i]);
        u32 rank = i - load_l2(&begin[key]), row = load_l2(&row_of[key]) + rank;
        sorted[row] = (int)route;
#if POSITIONS
        positions[route] = (int)row;
#endif
        if (rank % B == 0) {
            expert_ids[row / B] = expert_of_bin(map, map_stride, (int)key);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, load_l2(&end[key]) - i);
#endif
        }
    }
    report_errors(error_word, errors, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
