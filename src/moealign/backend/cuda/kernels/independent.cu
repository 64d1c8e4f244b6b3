// The layout without communication between clusters: every cluster counts all routes, every CTA ranks a chunk of
// WORDS * 32.  In a cluster, CTA q counts slice q of the routes.  The chunk of CTA q in cluster k is chunk k of slice
// q, so it needs nothing from its neighbours but their counts, and with CLUSTER == 1 nothing at all.
//
// Launch: CTAs of THREADS threads in clusters of CLUSTER, with CTAs * WORDS * 32 >= n, and at least MIN_CTAS of them
// without clusters.  SHARED_BYTES of dynamic shared memory, no scratch.  common.cuh lists macros and parameters.
//
// Shared memory in words, where each table has room for E + 1 experts:
//   table      per expert: routes of my slice | routes of my slice before my chunk << 16
//   of_warp    per expert and warp: a byte that counts routes of my chunk
//   first_row  per expert: first row
//   inbox      [CLUSTER][PAIRS] counts from each CTA of the cluster, two per word; with neighbours only
//   count, base  [E] routes, and first row of my chunk; with neighbours only
// Parts may be empty, so they are offsets and not a struct.
//
// COMPACT, for more experts than three tables have room for: `table` alone, which later holds blocks before the
// expert << 16 | routes before my chunk, then counts of the experts that this CTA writes.  The bins of the chunk stand
// in place of of_warp.

#include "common.cuh"
#include "scan.cuh"

// Behind the wait, a CTA sees what its neighbours wrote before they arrived.
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Store `v` in the shared memory of CTA `rank` of the cluster, where `mine` is in my own.
DEV void store_neighbour(u32 *mine, u32 rank, u32 v) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at), "r"(v) : "memory");
}

// Count the bins of every lane, K per lane, in `table`.  Lanes that agree with the first are added at once, so a single
// hot expert costs one addition per warp, not 32.  Routes with `early` also count in the upper half.  With `uniform`,
// in each of the K steps all lanes are early or none is.
template <int K> DEV void count_warp(u32 *table, const int *bin, const bool *early, bool uniform) {
    int first[K];
    u32 same[K], same_early[K];
#pragma unroll
    for (int k = 0; k < K; k++) first[k] = __shfl_sync(FULL, bin[k], 0);
#pragma unroll
    for (int k = 0; k < K; k++) {
        same[k] = __ballot_sync(FULL, bin[k] == first[k]);
        if (!uniform) same_early[k] = __ballot_sync(FULL, bin[k] == first[k] && early[k]);
    }
    const bool is_leader = lane_id() == 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        u32 add = early[k] ? 0x10001u : 1u;
        if (is_leader) add = uniform ? add * __popc(same[k]) : __popc(same[k]) | __popc(same_early[k]) << 16;
        if (bin[k] >= 0 && (is_leader || bin[k] != first[k])) atomicAdd(&table[bin[k]], add);
    }
}

#define PER_THREAD ((E + THREADS - 1) / THREADS)
#define PAIRS ((E + 1) / 2)
// The slot of expert e: threads that scan PER_THREAD experts each are an odd number of words apart.
#define SLOT(e) ((e) + (PER_THREAD > 2 && PER_THREAD % 2 == 0 ? (e) / PER_THREAD : 0))
#define SPAN (SLOT(E) + 1)
#define TABLE ((SPAN + 1) / 2 * 2)
#define CLEAR_TABLES \
    _Pragma("unroll 1") \
    for (u32 i = 4 * t; i < OF_WARP + TABLE; i += 4 * THREADS) *(uint4 *)(shared + i) = make_uint4(0, 0, 0, 0)
#define FOURS (STEPS % 4 == 0 ? 4 : STEPS % 2 == 0 ? 2 : 1)
#if COMPACT
#define OF_WARP 0
#else
#define OF_WARP (WORDS == 1 ? 0 : (WORDS + 3) / 4 * SPAN)
#endif
#if CLUSTER > 1
static_assert(PER_THREAD <= 2, "the table is sent as pairs of neighbouring words");
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
static_assert(WORDS * 32 <= THREADS, "a thread per route of my chunk");
// If COMPACT, blocks before an expert too.
static_assert(STEPS * THREADS <= 0xffff, "routes of my slice are counted in 16 bits");
static_assert(CLUSTER == 1 || !COMPACT, "a compact table cannot be sent");
#if COMPACT
constexpr int WORDS_SHARED = TABLE + (E + MIN_CTAS - 1) / MIN_CTAS;
#else
constexpr int WORDS_SHARED = TABLE + OF_WARP + SPAN + (CLUSTER > 1 ? CLUSTER * PAIRS + 2 * E : 0);
#endif
static_assert(WORDS_SHARED * 4 <= SHARED_BYTES && (OF_WARP + TABLE + 3) / 4 * 16 <= SHARED_BYTES, "tables fit");
extern __shared__ __align__(16) u32 shared[];

// Routes of `bin` in the warps before mine.  Word w of a bin holds a byte for each of warps 4w to 4w + 3; if COMPACT,
// `of_warp` holds the bins of my chunk.
DEV u32 in_earlier_warps(const u32 *of_warp, u32 bin, u32 warp) {
    if (WORDS == 1) return 0;
    u32 sum = 0;
#if COMPACT
#pragma unroll 1
    for (u32 i = 0; i < 32 * warp; i += 4) {
        const uint4 w = *(const uint4 *)(of_warp + i);
        sum += (w.x == bin) + (w.y == bin) + (w.z == bin) + (w.w == bin);
    }
    return sum;
#endif
#pragma unroll
    for (u32 w = 0; w < WORDS; w += 4) {
        u32 take = warp <= w ? 0 : warp - w >= 4 ? FULL : (1u << 8 * (warp - w)) - 1;
        sum = __dp4a(of_warp[w / 4 * SPAN + SLOT(bin)] & take, 0x01010101u, sum);
    }
    return sum;
}

// Count my slice, scan the experts, and write the rows of my chunk and a share of padding and blocks.
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, 1) independent(PARAMETERS) {
    UNPACK_SIZES;
    __shared__ uint2 partial[WARPS];
#if COMPACT
    __shared__ __align__(16) u32 of_warp[WORDS * 32];
    u32 *table = shared, *written = table + TABLE;
#else
    u32 *table = shared, *of_warp = table + TABLE, *first_row = of_warp + OF_WARP;
#endif
#if CLUSTER > 1
    u32 *inbox = first_row + SPAN, *count = inbox + CLUSTER * PAIRS, *base = count + E;
    cluster_arrive();  // awaited before I write to a neighbour, which must have started
#endif
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), cta = blockIdx.x, ctas = gridDim.x;
    const u32 grid_thread = cta * THREADS + t, grid_threads = ctas * THREADS, top_k = (u32)top_k64;
    const u32 q = cta % CLUSTER, slice = ctas / CLUSTER * (WORDS * 32), from = q * slice, to = min(from + slice, n);
    const u32 chunk = from + cta / CLUSTER * (WORDS * 32), own_i = chunk + t;
    u32 errors = 0;

#if PDL_WAIT
    CLEAR_TABLES;
    wait_for_dependency(ids);
#endif
    // My slice, STEPS routes per thread.  As vectors, each thread reads four neighbours; otherwise each warp reads 32.
    id_t v[STEPS], own_v = (id_t)0;
#if VECTOR_IN && !STRIDED && STEPS % 4 == 0
#define route_index(r) (from + 4 * (t + (r) / 4 * THREADS) + (r) % 4)
#define UNIFORM (WORDS % 4 == 0)
#pragma unroll
    for (int r = 0; r < STEPS; r += 4) load4(ids, route_index(r), to, top_k, id_stride0, id_stride1, v + r);
#else
#define route_index(r) (from + t + (r) * THREADS)
#define UNIFORM true
#pragma unroll
    for (int r = 0; r < STEPS; r++)
        v[r] = route_index(r) < to ? id_at(ids, route_index(r), top_k, id_stride0, id_stride1) : (id_t)0;
#endif
    const bool own = t < WORDS * 32 && own_i < n;
    if (own) own_v = id_at(ids, own_i, top_k, id_stride0, id_stride1);
    const u32 limit = valid_routes(num_valid, n, top_k), valid = min(limit, to);
#if !PDL_WAIT
    CLEAR_TABLES;
#endif
    __syncthreads();

    int own_bin = -1;
    u32 ahead = 0, total = 0, kept;
    if (warp < WORDS) {
        own_bin = own ? bin_of(own_v, own_i < limit, map, map_stride, errors) : -1;
        const u32 peers = lanes_with_bin<BITS>((u32)own_bin, __ballot_sync(FULL, own_bin >= 0));
        ahead = __popc(peers & lanes_below(lane));
#if COMPACT
        of_warp[t] = (u32)own_bin;
#else
        if (WORDS > 1 && own_bin >= 0 && ahead == 0)
            ((u8 *)(of_warp + warp / 4 * SPAN + SLOT(own_bin)))[warp % 4] = (u8)__popc(peers);
#endif
    }
    int bin[STEPS];
    bool early[STEPS];
    u32 unused = 0;
#pragma unroll
    for (int r = 0; r < STEPS; r++) {
        bin[r] = bin_of(v[r], route_index(r) < valid, map, map_stride, unused);
        if (PER_THREAD > 2 && bin[r] >= 0) bin[r] = SLOT(bin[r]);
        early[r] = route_index(r) < chunk;
    }
#pragma unroll
    for (int r = 0; r < STEPS; r += FOURS) count_warp<FOURS>(table, bin + r, early + r, UNIFORM);
    __syncthreads();
#if CLUSTER > 1
    cluster_wait();
#pragma unroll (CLUSTER * PAIRS <= 4 * THREADS ? 4 : 1)
    for (u32 i = t; i < CLUSTER * PAIRS; i += THREADS) {
        const u32 p = i % PAIRS;
        const uint2 w = *(const uint2 *)(table + 2 * p);
        store_neighbour(inbox + q * PAIRS + p, (i / PAIRS + q) % CLUSTER, __byte_perm(w.x, w.y, 0x5410));
    }
    cluster_arrive();
    cluster_wait();
#endif

    // Prefix sums over the experts: thread t has experts t * PER_THREAD and on.
    u32 blocks = 0, routes = 0;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : COMPACT ? 4 : 1)
    for (int k = 0; k < PER_THREAD; k++) {
        const u32 e = t * PER_THREAD + k;
        u32 c = 0;
#if CLUSTER > 1
        if (e < E) {
            u32 before = table[e] >> 16;
#pragma unroll
            for (u32 i = 0; i < CLUSTER; i++) {
                const u32 w = ((const u16 *)(inbox + i * PAIRS))[e];
                c += w;
                if (i < q) before += w;
            }
            count[e] = c;
            base[e] = before;
        }
#else
        if (e < E) c = table[SLOT(e)] & 0xffff;
#endif
        blocks += blocks_of(c);
        routes += c;
    }
#if CLUSTER > 1
#define COUNT(e) count[e]
#else
#define COUNT(e) (table[SLOT(e)] & 0xffff)
#endif
#if COMPACT
#define FIRST_ROW(e) ((table[SLOT(e)] >> 16) * B)
#define BEFORE(e) (table[SLOT(e)] & 0xffff)
#else
#define FIRST_ROW(e) first_row[SLOT(e)]
#define BEFORE(e) (table[SLOT(e)] >> 16)
#endif
    scan_cta(blocks, routes, total, kept, partial, ENDS != 0);
    // CTA e % ctas writes expert e, as its number e / ctas: one division, then a count.
    u32 nth = t * PER_THREAD / ctas, turn = t * PER_THREAD - nth * ctas;
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++, turn = turn + 1 == ctas ? nth++, 0u : turn + 1) {
        const u32 e = t * PER_THREAD + k;
        if (e >= E) break;
        const u32 c = COUNT(e);
#if COMPACT
        table[SLOT(e)] = blocks << 16 | table[SLOT(e)] >> 16;
        if (turn == cta) written[nth] = c;
#else
        first_row[SLOT(e)] = blocks * B;
#endif
#if CLUSTER > 1
        base[e] += blocks * B;
#endif
        routes += c;
        if (turn == cta) {
#if COUNTS
            counts[e] = c;
#endif
#if OFFSETS
            offsets[e] = blocks * B;
#endif
#if ENDS
            ends[e] = routes;
#endif
        }
        blocks += blocks_of(c);
    }
    total *= B;
    if (t == 0) {
#if !COMPACT
        first_row[SLOT(E)] = total;
#endif
        if (cta == 0) {
            total_out[0] = (int)total;
#if OFFSETS
            offsets[E] = (int)total;
#endif
        }
    }
    __syncthreads();

    if (t < WORDS * 32) {
        const u32 b = own_bin >= 0 ? own_bin : 0;
#if CLUSTER > 1
        u32 row = base[b];
#else
        u32 row = FIRST_ROW(b) + BEFORE(b);
#endif
        row += ahead + in_earlier_warps(of_warp, b, warp);
        if (own_bin >= 0) sorted[row] = (int)own_i;
#if POSITIONS
        if (own) positions[own_i] = own_bin >= 0 ? (int)row : -1;
#endif
#if SCATTER
        if (own) scatter[own_i] = own_bin >= 0 ? (int)own_i : -1;
#endif
    }
    // Padding and blocks of experts cta, cta + ctas, ...: a warp each, the last warp first, since the first ones rank.
#pragma unroll 1
    for (u32 e = cta + (WARPS - 1 - warp) * ctas; e < E; e += WARPS * ctas) {
#if COMPACT
        const u32 start = FIRST_ROW(e), end = start + written[e / ctas], stop = start + blocks_of(end - start) * B;
#else
        const u32 start = FIRST_ROW(e), end = start + COUNT(e), stop = FIRST_ROW(e + 1);
#endif
#pragma unroll 1
        for (u32 r = end + lane; r < stop; r += 32) sorted[r] = (int)n;
        int name = expert_of_bin(map, map_stride, (int)e);
#pragma unroll 1
        for (u32 b = start / B + lane; b < stop / B; b += 32) {
            expert_ids[b] = name;
#if BLOCK_ROWS
            block_rows[b] = (int)min((u32)B, end - b * B);
#endif
        }
    }
#pragma unroll 1
    for (u32 r = total + grid_thread; r < L; r += grid_threads) sorted[r] = (int)n;
#pragma unroll 1
    for (u32 b = total / B + grid_thread; b < num_blocks; b += grid_threads) {
        expert_ids[b] = -1;
#if BLOCK_ROWS
        block_rows[b] = 0;
#endif
    }
    report_errors(error_word, errors, map, map_stride, num_valid, n, top_k, grid_thread, grid_threads);
}
