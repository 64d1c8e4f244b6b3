// The layout of up to CTAs * THREADS * STEPS routes, for up to a few thousand experts.  Each CTA counts its chunk of
// routes and publishes the counts, all CTAs meet at one barrier, and each writes its rows in runs of one expert.
//
// Launch: cooperative, GRID_CTAS CTAs of THREADS threads.  SHARED_BYTES of dynamic shared memory.  Scratch is a table
// with a row of PAIRS words per CTA, two 16-bit counts per word.  common.cuh lists macros and parameters.

#include "common.cuh"
#include "scan.cuh"
#include "rank.cuh"
#include "rows.cuh"
#include "barrier.cuh"

DEV u32 load_relaxed(const u32 *p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void store_relaxed(u32 *p, u32 v) { asm volatile("st.relaxed.gpu.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }

#define ROUTES (THREADS * STEPS)
// Rows that a thread loads at once: fewer where the routes take more registers.
#define MAX_BATCH (ROUTES > 4096 ? 8 : 16)
#define BATCH (WORDS < MAX_BATCH ? WORDS : WORDS % MAX_BATCH == 0 ? MAX_BATCH : 4)
static_assert(WORDS % BATCH == 0, "no row behind the table is read");
#define EMPTY 0xffffffffu  // never a pair of counts: a CTA has fewer than 65,535 routes
// Groups of threads that share the rows of the table.
#define EACH_PAIR (THREADS / PAIRS)
#define SEGMENTS (EACH_PAIR >= 16 ? 16 : EACH_PAIR >= 8 ? 8 : EACH_PAIR >= 4 ? 4 : EACH_PAIR >= 2 ? 2 : 1)
#define SUMS (SEGMENTS * 4 * PAIRS)
#define FRONT (SUMS > WARPS * STRIDE ? SUMS : WARPS * STRIDE)
static_assert(SEGMENTS * WORDS == GRID_CTAS, "every row of the table is the row of a CTA");
#define PACKED (8 * ROUTES <= 0xffff ? 8 : 4)  // rows that are added without unpacking
static_assert(PACKED * ROUTES <= 0xffff, "pairs of counts are added packed");
static_assert(E <= 0x10000, "a bin fits local_bin");
static_assert(PAIRS <= SCRATCH_PER_CTA, "a row of counts fits");

struct Shared {
    u32 counts[FRONT];        // [WARPS][STRIDE] pairs of counts, later sums over the table: [2][SEGMENTS][2 * PAIRS]
    u32 base[E + 1];          // per bin: its place in the sorted chunk, later its row for the chunk minus that place
    u32 first_row[E + 1];     // per bin
    u32 count[E];             // per bin: routes of the chunk, later of all CTAs
    u32 local_route[ROUTES];  // the sorted chunk
    u16 local_bin[ROUTES];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "counts, bins and sorted routes fit");
extern __shared__ __align__(16) u32 shared[];

// Count and publish my chunk; sort it by bin while others arrive; then sum over the table and write.
extern "C" __global__ void __launch_bounds__(THREADS, 1) grid(PARAMETERS) {
    UNPACK_SIZES;
    __shared__ uint2 partial[32], partial2[32];
    Shared &s = *(Shared *)shared;
    u32 *pairs = s.counts, *base = s.base, *first_row = s.first_row, *count = s.count;
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), cta = blockIdx.x, ctas = gridDim.x;
    const u32 grid_thread = cta * THREADS + t, grid_threads = ctas * THREADS, top_k = (u32)top_k64;
    u32 *table = (u32 *)scratch;
    u32 errors = 0;
    Barrier barrier = Barrier::begin();
    wait_for_dependency(ids);

    // The routes of a warp are consecutive; in step r a lane has route my_first + 32 r.
    const u32 chunk = cta * ROUTES, my_first = chunk + warp * (32 * STEPS) + lane;
    id_t v[STEPS];
#pragma unroll
    for (int r = 0; r < STEPS; r++)
        v[r] = my_first + 32 * r < n ? id_at(ids, my_first + 32 * r, top_k, id_stride0, id_stride1) : (id_t)0;
    const u32 limit = valid_routes(num_valid, n, top_k);
    if (warp == 0) {
#pragma unroll 1
        for (u32 i = lane; i < PAIRS; i += 32) store_relaxed(&table[cta * PAIRS + i], EMPTY);
        barrier.arrive_warp();
    }
    u32 *mine = pairs + warp * STRIDE;
    for (u32 i = lane; i < STRIDE; i += 32) mine[i] = 0;

    int bin[STEPS];
    u32 rank[STEPS], peers[STEPS];
#pragma unroll
    for (int r = 0; r < STEPS; r++) {
        u32 i = my_first + 32 * r;
        bin[r] = bin_of(v[r], i < limit, map, map_stride, errors);
        peers[r] = lanes_with_bin<BITS>((u32)bin[r], __ballot_sync(FULL, bin[r] >= 0));
#if SCATTER
        if (i < n) scatter[i] = bin[r] >= 0 ? (int)i : -1;
#endif
    }
    __syncwarp();
    rank_in_warp(bin, peers, (u16 *)mine, lane, rank);
    __syncthreads();

    add_up_warps(pairs, t, [&](u32 at, u32 sum) {
        store_relaxed(&table[cta * PAIRS + at], sum);
        count[2 * at] = sum & 0xffff;
        if (2 * at + 1 < E) count[2 * at + 1] = sum >> 16;
    });
    __syncthreads();

    // While the table's rows travel, sort the chunk by bin in shared memory.
    u32 a = 0, unused = 0, in_chunk, unused2;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++) a += t * PER_THREAD + k < E ? count[t * PER_THREAD + k] : 0;
    scan_cta(a, unused, in_chunk, unused2, partial, false);
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++) {
        u32 e = t * PER_THREAD + k;
        if (e >= E) break;
        base[e] = a;
        a += count[e];
    }
    __syncthreads();
    u32 place[STEPS];
#pragma unroll
    for (int r = 0; r < STEPS; r++) {
        place[r] = 0;
        if (bin[r] >= 0) {
            place[r] = base[bin[r]] + ((u16 *)mine)[bin[r]] + rank[r];
            s.local_route[place[r]] = my_first + 32 * r;
            s.local_bin[place[r]] = (u16)bin[r];
        }
    }
    barrier.wait();

    // Sum over the rows of the table.  Segment `seg` reads rows seg, seg + SEGMENTS, ... of pair `p`, polling each word
    // until it is not EMPTY.  Pairs are added packed, PACKED rows at a time.
    u32 *sum_all = pairs, *sum_before = pairs + SEGMENTS * 2 * PAIRS;
#pragma unroll 1
    for (u32 at = t; at < SEGMENTS * PAIRS; at += THREADS) {
        const u32 p = at % PAIRS, seg = at / PAIRS;
        u32 lo = 0, hi = 0, lo_before = 0, hi_before = 0;
#pragma unroll 1
        for (int first = 0; first < WORDS; first += BATCH) {
            const u32 *rows = table + (seg + first * SEGMENTS) * PAIRS + p;
            u32 w[BATCH], largest;
            do {
#pragma unroll
                for (int k = 0; k < BATCH; k++) w[k] = load_relaxed(rows + k * SEGMENTS * PAIRS);
                largest = 0;
#pragma unroll
                for (int k = 0; k < BATCH; k++) largest = max(largest, w[k]);
            } while (largest == EMPTY);
#pragma unroll
            for (int k = 0; k < BATCH; k += PACKED) {
                u32 sum = 0, before = 0;
#pragma unroll
                for (int j = k; j < k + PACKED && j < BATCH; j++) {
                    sum += w[j];
                    if (seg + (first + j) * SEGMENTS < cta) before += w[j];
                }
                lo += sum & 0xffff, hi += sum >> 16;
                lo_before += before & 0xffff, hi_before += before >> 16;
            }
        }
        *(uint2 *)(sum_all + seg * 2 * PAIRS + 2 * p) = make_uint2(lo, hi);
        *(uint2 *)(sum_before + seg * 2 * PAIRS + 2 * p) = make_uint2(lo_before, hi_before);
    }
    __syncthreads();
    u32 blocks = 0, routes = 0;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++) {
        u32 e = t * PER_THREAD + k, c = 0, before = 0;
        if (e >= E) break;
#pragma unroll
        for (int seg = 0; seg < SEGMENTS; seg++)
            c += sum_all[seg * 2 * PAIRS + e], before += sum_before[seg * 2 * PAIRS + e];
        count[e] = c;
        base[e] = before - base[e];
        blocks += blocks_of(c);
        routes += c;
    }
    const u32 total = rows_of_bins(
        count, blocks, routes, first_row, base, partial2, total_out, counts, offsets, ends);
    __syncthreads();

#pragma unroll
    for (int r = 0; r < STEPS; r++) {
        u32 q = t + r * THREADS;
        if (q < in_chunk) sorted[base[s.local_bin[q]] + q] = (int)s.local_route[q];
#if POSITIONS
        u32 i = my_first + 32 * r;
        if (i < n) positions[i] = bin[r] >= 0 ? (int)(base[bin[r]] + place[r]) : -1;
#endif
    }
#pragma unroll 1
    for (u32 e = cta + (WARPS - 1 - warp) * ctas; e < E; e += WARPS * ctas)
#pragma unroll 1
        for (u32 r = first_row[e] + count[e] + lane; r < first_row[e + 1]; r += 32) sorted[r] = (int)n;
#pragma unroll 1
    for (u32 r = total + grid_thread; r < L; r += grid_threads) sorted[r] = (int)n;
    // Blocks in equal shares, so that a hot expert is shared too.
#pragma unroll 1
    for (u32 b = cta + ctas * t; b < num_blocks; b += grid_threads) {
        u32 row = b * B, e = 0;
        if (row < total) {
            e = owner_of(first_row, row);
            expert_ids[b] = expert_of_bin(map, map_stride, (int)e);
        } else {
            expert_ids[b] = -1;
        }
#if BLOCK_ROWS
        block_rows[b] = row < total ? (int)min((u32)B, first_row[e] + count[e] - row) : 0;
#endif
    }
    report_errors(error_word, errors, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
