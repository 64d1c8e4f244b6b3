// The layout of any number of routes, for up to a few thousand experts.  Each CTA has one chunk of consecutive routes.
// It counts them, all CTAs share out the rows of every bin, and each sorts and writes its chunk tile by tile.
//
// Launch: cooperative, any number of CTAs of THREADS threads.  SHARED_BYTES of dynamic shared memory.  Scratch is a
// table of E rows with a word per CTA, and a total per bin.  common.cuh lists macros and parameters.

#include "common.cuh"
#include "scan.cuh"
#include "rank.cuh"
#include "rows.cuh"
#include "barrier.cuh"

#define TILE (THREADS * STEPS)
#define OF_TILE bits_of(TILE - 1)  // bits of a place in a tile
#define SORT_WORDS (WARPS * STRIDE + TILE)
// Counters per bin, so that lanes with the same bin seldom meet: as many as fit the memory that the sort takes later.
#define COPIES \
    (32 * E <= SORT_WORDS ? 32 : 16 * E <= SORT_WORDS ? 16 : 8 * E <= SORT_WORDS ? 8 : 4 * E <= SORT_WORDS ? 4 : 1)
#define IN_FLIGHT 4  // loads of four ids that a thread has under way while it counts
static_assert(E <= 1 << (32 - OF_TILE), "a bin and a place in a tile fit one word");
#define DROPPED 0xffffu            // the bin of a dropped route
#define LINE (128 / sizeof(id_t))  // ids in a line of the cache
static_assert(E < DROPPED, "a bin is not that of a dropped route");
static_assert(TILE <= 0xffff, "counts of a tile fit 16 bits");
static_assert(E <= SCRATCH_PER_CTA && E <= SCRATCH_FIXED, "the table and the totals fit");

struct Shared {
    union {
        u32 copies[E * COPIES];  // while counting: [E][COPIES]
        struct {                 // before the tiles
            u32 first_row[E + 1];
            u32 total[E];
        } bins;
        struct {                         // of a tile
            u32 counts[WARPS * STRIDE];  // pairs of counts per warp
            u32 sorted[TILE];            // bin and place
        } tile;
    } at;
    u32 row[E];    // next row of the chunk, per bin
    u32 base[E];   // row of a route minus its place in the sorted tile
    u32 count[E];  // of the tile
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "counts, bins and sorted routes fit");
extern __shared__ __align__(16) u32 shared[];

// Bring the line of id `i` to the L2 cache.
DEV void prefetch_line(const id_t *ids, u32 i, u32 to, bool active) {
#if !STRIDED
    if (active && i < to) asm volatile("prefetch.global.L2 [%0];" :: "l"(ids + i));
#endif
}

// Count my chunk; share out the rows; then rank, sort and write one tile after the other.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) tiles(PARAMETERS) {
    UNPACK_SIZES;
    __shared__ uint2 partial[32], partial2[32];
    Shared &s = *(Shared *)shared;
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), cta = blockIdx.x, ctas = gridDim.x;
    const u32 grid_thread = cta * THREADS + t, grid_threads = ctas * THREADS, top_k = (u32)top_k64;
    u32 *table = (u32 *)scratch, *totals = table + (u64)E * ctas;
    u32 errors = 0;
    Barrier barrier = Barrier::begin();
    wait_for_dependency(ids);
    const u32 limit = valid_routes(num_valid, n, top_k);
    const u32 chunk = ((n + ctas - 1) / ctas + THREADS - 1) / THREADS * THREADS;
    const u32 from = (u32)min((u64)cta * chunk, (u64)n), to = min(from + chunk, n);

    for (u32 i = t; i < E * COPIES; i += THREADS) s.at.copies[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (u32 first = from + 4 * t; first < to; first += IN_FLIGHT * 4 * THREADS) {
        id_t v[IN_FLIGHT][4];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
            load4(ids, first + k * 4 * THREADS, to, top_k, id_stride0, id_stride1, v[k]);
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 i = first + k * 4 * THREADS + j;
                const int bin = i < to ? bin_of(v[k][j], i < limit, map, map_stride, errors) : -1;
                if (bin >= 0) atomicAdd(&s.at.copies[bin * COPIES + lane % COPIES], 1u);
            }
    }
    __syncthreads();
#pragma unroll 1
    for (u32 e = t; e < E; e += THREADS) {
        u32 sum = 0;
#pragma unroll
        for (int k = 0; k < COPIES; k++) sum += s.at.copies[e * COPIES + (k + lane) % COPIES];
        __stcg(&table[(u64)e * ctas + cta], sum);
    }
    barrier.sync();

    // A warp per bin: from the counts of the chunks to the routes of earlier chunks.
    constexpr int LOADS = 10;
#pragma unroll 1
    for (u32 e = cta + warp * ctas; e < E; e += WARPS * ctas) {
        u32 *counts_of_bin = table + (u64)e * ctas, run = 0;
#pragma unroll 1
        for (u32 first = 0; first < ctas; first += 32 * LOADS) {
            u32 c[LOADS];
#pragma unroll
            for (int k = 0; k < LOADS; k++)
                c[k] = first + 32 * k + lane < ctas ? __ldcg(&counts_of_bin[first + 32 * k + lane]) : 0;
#pragma unroll
            for (int k = 0; k < LOADS; k++) {
                u32 sum = c[k];
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    u32 p = __shfl_up_sync(FULL, sum, d);
                    if (lane >= d) sum += p;
                }
                if (first + 32 * k + lane < ctas) __stcg(&counts_of_bin[first + 32 * k + lane], run + sum - c[k]);
                run += __shfl_sync(FULL, sum, 31);
            }
        }
        if (lane == 0) __stcg(&totals[e], run);
    }
    barrier.sync();

    u32 blocks = 0, routes = 0;
    u32 *first_row = s.at.bins.first_row;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++) {
        u32 e = t * PER_THREAD + k;
        if (e >= E) break;
        u32 c = __ldcg(&totals[e]);
        s.row[e] = __ldcg(&table[(u64)e * ctas + cta]);
        s.at.bins.total[e] = c;
        blocks += blocks_of(c);
        routes += c;
    }
    const u32 total = rows_of_bins(
        s.at.bins.total, blocks, routes, first_row, s.row, partial, total_out, counts, offsets, ends);
    __syncthreads();

    // What the routes do not reach: the rest of each bin's last block, and the rows behind the last block.
#pragma unroll 1
    for (u32 e = cta + warp * ctas; e < E; e += WARPS * ctas)
        fill(sorted, first_row[e] + s.at.bins.total[e], first_row[e + 1], (int)n, lane, 32);
    fill(sorted, total, L, (int)n, grid_thread, grid_threads);
    // Blocks in equal shares, so that a hot expert is shared too.  A warp searches once if one bin owns all its blocks.
    const u32 share = num_blocks >= 128 * WARPS * ctas ? 128 : 32;
#pragma unroll 1
    for (u32 first = (cta + warp * ctas) * share; first < num_blocks; first += WARPS * ctas * share) {
        const u32 last = min(first + share, num_blocks) - 1;
        const u32 owner = owner_of(first_row, first * B);
        const bool alone = last * B < total && first_row[owner + 1] > last * B;
#pragma unroll 1
        for (u32 b = first + lane; b <= last; b += 32) {
            const u32 row = b * B;
            const bool used = row < total;
            const u32 e = alone ? owner : owner_of(first_row, row);
            expert_ids[b] = used ? expert_of_bin(map, map_stride, (int)e) : -1;
#if BLOCK_ROWS
            block_rows[b] = used ? (int)min((u32)B, first_row[e] + s.at.bins.total[e] - row) : 0;
#endif
        }
    }
    __syncthreads();

    u32 *pairs = s.at.tile.counts, *mine = pairs + warp * STRIDE;
    const u32 lanes_above = 0xfffffffeu << lane, valid = min(limit, to);
#pragma unroll 1
    for (u32 tile = from; tile < to; tile += TILE) {
        // The routes of a warp are consecutive; in step r a lane has route my_first + 32 r.
        const int steps = min(STEPS, (int)((to - tile + THREADS - 1) / THREADS));
        const u32 my_first = tile + warp * (32 * steps) + lane;
        for (u32 i = lane; i < STRIDE; i += 32) mine[i] = 0;
        u32 key[STEPS];  // id, then bin and rank in the warp
#pragma unroll
        for (int r = 0; r < STEPS; r++) {
            if (sizeof(id_t) < 8 && r >= steps) break;  // not where a load is used at once: it would delay the next
            const u32 i = my_first + 32 * r;
            const id_t v = r < steps && i < to ? id_at(ids, i, top_k, id_stride0, id_stride1) : (id_t)0;
            key[r] = sizeof(id_t) < 8 || in_range(v) ? (u32)v : FULL;
        }
        prefetch_line(ids, tile + TILE + warp * (32 * STEPS) + lane * LINE, to, lane * LINE < 32 * STEPS);
        __syncwarp();
#pragma unroll
        for (int r = 0; r < STEPS; r++) {
            if (r >= steps) break;
            const u32 i = my_first + 32 * r;
            u32 ignored = 0;
            const int bin = bin_of((id_t)(int)key[r], i < valid, map, map_stride, ignored);
            const u32 peers = lanes_with_bin<BITS>((u32)bin, __ballot_sync(FULL, bin >= 0));
#if SCATTER
            if (i < to) scatter[i] = bin >= 0 ? (int)i : -1;
#endif
            u32 old = 0;
            u16 *slot = (u16 *)mine + max(bin, 0);
            if (r > 0) {
                old = *slot;
                __syncwarp();
            }
            old += __popc(peers & lanes_below(lane));
            if (bin >= 0 && (peers & lanes_above) == 0) *slot = (u16)(old + 1);
            __syncwarp();
            key[r] = (u32)bin << 16 | old;
        }
        __syncthreads();
        add_up_warps(pairs, t, [&](u32 at, u32 sum) {
            s.count[2 * at] = sum & 0xffff;
            if (2 * at + 1 < E) s.count[2 * at + 1] = sum >> 16;
        });
        __syncthreads();
        u32 a = 0, unused = 0, in_tile, unused2;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
        for (int k = 0; k < PER_THREAD; k++) a += t * PER_THREAD + k < E ? s.count[t * PER_THREAD + k] : 0;
        scan_cta(a, unused, in_tile, unused2, partial2, false);
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
        for (int k = 0; k < PER_THREAD; k++) {
            u32 e = t * PER_THREAD + k;
            if (e >= E) break;
            const u32 c = s.count[e], row = s.row[e];
            s.count[e] = a;
            s.base[e] = row - a;
            s.row[e] = row + c;
            a += c;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < STEPS; r++) {
            if (r >= steps) break;
            const u32 i = my_first + 32 * r;
            const u32 bin = key[r] >> 16;
            u32 place = 0;
            if (bin != DROPPED) {
                place = s.count[bin] + ((u16 *)mine)[bin] + (key[r] & 0xffff);
                s.at.tile.sorted[place] = bin << OF_TILE | (i - tile);
            }
#if POSITIONS
            if (i < to) positions[i] = bin != DROPPED ? (int)(s.base[bin] + place) : -1;
#endif
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < STEPS; r++) {
            const u32 q = t + r * THREADS;
            if (q >= in_tile) break;
            const u32 word = s.at.tile.sorted[q];
            sorted[s.base[word >> OF_TILE] + q] = (int)(tile + (word & ((1u << OF_TILE) - 1)));
        }
    }
    report_errors(error_word, errors, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
