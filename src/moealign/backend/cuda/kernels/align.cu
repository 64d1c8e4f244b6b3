// The block-aligned layout of routes, in one launch, stable and bit-identical at every size.
//
// Reads every id once (`independent`: once a CTA), writes every element of every output once or twice.
// One kernel is compiled at a time; align.py chooses it by size and passes the facts of the call as macros:
//
//   KERNEL_warp         n <= 32       every warp ranks all routes with ballots; no barrier at all
//   KERNEL_pairwise     n <= 32*WORDS bit planes of the ids in shared memory, compared pairwise; two barriers
//   KERNEL_independent  n <= 32,768   every cluster counts all routes, every CTA ranks its own; nothing between clusters
//   KERNEL_grid         n <= CTAs*THREADS*STEPS  cooperative: counts of each CTA, one grid barrier, runs written in order
//   KERNEL_radix        any n, any E  cooperative: stable LSD radix sort of the bins by 8-bit digits
//
//   EXPERTS, BLOCK  E, B              ID_TYPE   0..7: int8 int16 int32 int64 uint8 uint16 uint32 uint64
//   MAP       0 no map, 1 map names blocks, 2 map chooses bins (MAP_TYPE: its dtype)
//   NVALID, ERROR  num_valid_tokens / error_word are given
//   EXTRAS    1 counts, 2 offsets, 4 group_ends, 8 positions, 16 block_rows, 32 scatter_idx
//   STRIDED   ids are [n / top_k, top_k] with strides (s0, s1); else contiguous.  VECTOR_IN, VECTOR_OUT: 16-byte aligned
//   THREADS, WORDS, STEPS, CLUSTER  chosen by align.py: threads of a CTA; words of 32 routes a CTA (grid: rows of the table
//             that a thread reads, CTAs being segments * WORDS); routes a thread; CTAs of a cluster
//   COMPACT   independent, for more experts than shared memory holds three words each of
//   SHARED_BYTES, SCRATCH_EACH_CTA, SCRATCH_EACH_ROUTE, SCRATCH_BESIDES  what the launch brings of shared memory and of
//             device memory (words); LEAST_CTAS  of an independent grid without clusters; GRID_CTAS  of grid
//
// Every parameter is 8 bytes.  Costs of these paths do not depend on values beyond bank conflicts.

#if ROUTE
#include "choose.cuh"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if defined(KERNEL_warp)
#define PATH 1
#elif defined(KERNEL_pairwise)
#define PATH 2
#elif defined(KERNEL_independent)
#define PATH 3
#elif defined(KERNEL_grid)
#define PATH 4
#else
#define PATH 5
#endif

constexpr int E = EXPERTS, B = BLOCK, T = THREADS, CH = WORDS, R = STEPS;
static_assert(T % 32 == 0 && T <= 1024, "whole warps, as many as a CTA may have");
static_assert(E >= 0 && E <= 1 << 28, "eight times as many are counted in 32 bits");

template <int> struct Int;
template <> struct Int<0> { typedef signed char type; };
template <> struct Int<1> { typedef short type; };
template <> struct Int<2> { typedef int type; };
template <> struct Int<3> { typedef long long type; };
template <> struct Int<4> { typedef u8 type; };
template <> struct Int<5> { typedef u16 type; };
template <> struct Int<6> { typedef u32 type; };
template <> struct Int<7> { typedef u64 type; };
typedef Int<ID_TYPE>::type id_t;
typedef Int<MAP_TYPE>::type map_t;

#define DEV static __device__ __forceinline__
#define FULL 0xffffffffu
#define COUNTS (EXTRAS & 1)
#define OFFSETS (EXTRAS & 2)
#define ENDS (EXTRAS & 4)
#define POSITIONS (EXTRAS & 8)
#define BLOCK_ROWS (EXTRAS & 16)
#define SCATTER (EXTRAS & 32)
#define WARPS (T / 32)

static __device__ constexpr int bits_of(u32 v) { return v == 0 ? 0 : 1 + bits_of(v >> 1); }
constexpr int BITS = bits_of(E - 1);  // of a bin

#if MAP || NVALID || ERROR || EXTRAS || STRIDED || ROUTE
#define PARAMETERS \
    const id_t *__restrict__ ids, const map_t *__restrict__ map, const int *__restrict__ nvalid, int *error, \
    int *__restrict__ sorted, int *__restrict__ expert_ids, int *__restrict__ total_out, \
    int *__restrict__ counts, int *__restrict__ offsets, int *__restrict__ ends, \
    int *__restrict__ positions, int *__restrict__ block_rows, int *__restrict__ scatter, \
    i64 n64, i64 top_k64, i64 length64, int *scratch, i64 s0, i64 s1, i64 smap
#define UNUSED
#else  // the usual call: the driver takes a while for each parameter
#define PARAMETERS \
    const id_t *__restrict__ ids, int *__restrict__ sorted, int *__restrict__ expert_ids, int *__restrict__ total_out, \
    i64 n64, i64 top_k64, i64 length64, int *scratch
#define UNUSED \
    const map_t *const map = nullptr; const int *const nvalid = nullptr; int *const error = nullptr; \
    const i64 s0 = 0, s1 = 0, smap = 0; (void)map, (void)nvalid, (void)error, (void)s0, (void)s1, (void)smap
#endif
#if ROUTE
#define AND_LOGITS , const raw_t *__restrict__ logits, const float *__restrict__ bias, float *__restrict__ weights, \
    int *__restrict__ ids_out, i64 row_stride, i64 scale_bits
#else
#define AND_LOGITS
#endif
#define SIZES UNUSED; const u32 n = (u32)n64, L = (u32)length64, blocks_all = (L + B - 1u) / B; (void)blocks_all; (void)L

// ---- values as given -> bins ---------------------------------------------------------------------------------------

template <typename V> DEV bool inside(V v) { return !(v < (V)0) && (u64)v < (u64)E; }
template <typename V> DEV bool minus_one(V v) { return (V)-1 < (V)0 && v == (V)-1; }

// Local expert of a global one, -1 for "not here".
DEV int mapped(const map_t *map, i64 smap, int expert) {
#if MAP
    map_t v = map[expert * smap];
    return inside(v) ? (int)v : -1;
#else
    return expert;
#endif
}

DEV int name_of(const map_t *map, i64 smap, int bin) {
#if MAP == 1
    return mapped(map, smap, bin);
#else
    return bin;
#endif
}

// Routes from here on are dropped.
DEV u32 limit_of(const int *nvalid, u32 n, u32 top_k) {
#if NVALID
    int v = *nvalid, rows = top_k ? (int)(n / top_k) : 0;
    v = v < 0 ? 0 : v > rows ? rows : v;
    return (u32)v * top_k;
#else
    return n;
#endif
}

DEV id_t id_at(const id_t *ids, u32 i, u32 top_k, i64 s0, i64 s1) {
#if STRIDED
    u32 row = i / top_k;
    return ids[(i64)row * s0 + (i64)(i - row * top_k) * s1];
#else
    return ids[i];
#endif
}

// Bin of a route whose id is `v`, -1 if it is dropped.
DEV int bin_of(id_t v, bool valid, const map_t *map, i64 smap, u32 &bad) {
    bool in = inside(v);
#if ERROR
    if (valid && !in && !minus_one(v)) bad |= 1;
#endif
    if (!valid || !in) return -1;
#if MAP == 2
    return mapped(map, smap, (int)v);
#else
    return (int)v;
#endif
}

// What the whole grid checks besides the ids, `me` of `all` threads; then the error word.
DEV void report(int *error, u32 bad, const map_t *map, i64 smap, const int *nvalid, u32 n, u32 top_k, u32 me, u32 all) {
#if ERROR
#if MAP
#pragma unroll 1
    for (u32 e = me; e < E; e += all) {
        map_t v = map[e * smap];
        if (!inside(v) && !minus_one(v)) bad |= 2;
    }
#endif
#if NVALID
    if (me == 0) {
        int v = *nvalid;
        if (v < 0 || v > (top_k ? (int)(n / top_k) : 0)) bad |= 4;
    }
#endif
    if (bad) atomicOr(error, (int)bad);
#endif
}

// ---- pieces --------------------------------------------------------------------------------------------------------

DEV u32 lane_id() { return threadIdx.x & 31; }
DEV u32 warp_id() { return threadIdx.x >> 5; }
DEV u32 below(u32 lane) { return (1u << lane) - 1u; }
DEV u32 cdiv_b(u32 v) { return (v + (B - 1u)) / B; }
DEV u32 load_l2(const u32 *p) { return __ldcg(p); }
DEV u32 load_fresh(const u32 *p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEV void store_fresh(u32 *p, u32 v) { asm volatile("st.relaxed.gpu.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }

// Lanes that hold the same bin (of BITS_ bits), among `active`.
template <int BITS_> DEV u32 same_bin(u32 bin, u32 active) {
    u32 eq = active;
#pragma unroll
    for (int b = 0; b < BITS_; b++) {
        u32 plane = __ballot_sync(FULL, (bin >> b) & 1);
        eq &= (bin >> b) & 1 ? plane : ~plane;
    }
    return eq;
}

// p[from..to) = value, by threads `me` of `all`.
DEV void fill(int *p, u32 from, u32 to, int value, u32 me, u32 all) {
#if VECTOR_OUT
    u32 head = (from + 3u) & ~3u, tail = to & ~3u;
    if (head <= tail) {
        int4 v = make_int4(value, value, value, value);
#pragma unroll 1
        for (u32 i = head + 4 * me; i < tail; i += 4 * all) *(int4 *)(p + i) = v;
        if (me < head - from) p[from + me] = value;
        if (me < to - tail) p[tail + me] = value;
        return;
    }
#endif
#pragma unroll 1
    for (u32 i = from + me; i < to; i += all) p[i] = value;
}

// What the kernel before this one wrote is there afterwards, behind `ids` alone.  The wait gives the pointer anew: what is
// read through one that is const and __restrict__ the compiler takes for constant, and moves ahead of any wait.
DEV void wait_for_the_one_before(const id_t *__restrict__ &ids) {
#if AFTER
    u64 at = __cvta_generic_to_global(ids);
    asm volatile("griddepcontrol.wait;" : "+l"(at) :: "memory");
    ids = (const id_t *)__cvta_global_to_generic(at);
#endif
}

// What neighbours wrote before arriving is seen after the wait.
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where `mine` stands in CTA `rank` of my cluster, as an address in the cluster's shared memory.
DEV void store_neighbour(u32 *mine, u32 rank, u32 v) {
    u32 at;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(mine)), "r"(rank));
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at), "r"(v) : "memory");
}

#if ROUTE
// The last CTA writes the weights and ids; the others choose for themselves and write the layout.
#define CTAS (gridDim.x - 1)

// The token of a warp, of which a CTA has no fewer than there are tokens; with ONE_TOKEN all have the same.
struct Token {
    const raw_t *row;
    __align__(16) raw_t raw[PER_LANE];
    u32 number;

    __device__ __forceinline__ void load(const raw_t *logits, i64 row_stride, u32 tokens) {
        number = ONE_TOKEN ? 0 : warp_id();
        row = logits + (i64)number * row_stride;
        if (number < tokens) load_logits(row, lane_id(), raw);
    }

    // Its experts, of which lane j < TOP_K gets the j-th.
    __device__ __forceinline__ int choose(const float *bias, float *weights, int *ids_out, i64 scale_bits, u32 limit, bool writes) {
        const u32 lane = lane_id(), i = number * TOP_K + lane;
        const Chosen chosen = choose_experts(raw, bias, lane);
        const bool live = number * TOP_K < limit;
        const int e = live ? (int)chosen.expert : -1;
        if (writes) {
            const float weight = weigh(raw, row, chosen, __int_as_float((int)scale_bits), lane, nullptr);
            if (lane < TOP_K) weights[i] = live ? weight : 0.f, ids_out[i] = e;
        }
        return e;
    }
};
#else
#define CTAS gridDim.x
#endif

// ---- 1 warp: n <= 32 -----------------------------------------------------------------------------------------------
// Every warp knows everything; each fills and then overwrites a slice of sorted_token_ids of its own.

#if PATH == 1
extern "C" __global__ void __launch_bounds__(T, 1) warp(PARAMETERS AND_LOGITS) {
    SIZES;
    const u32 lane = lane_id(), me = blockIdx.x * T + threadIdx.x, all = CTAS * T, w = me >> 5, warps = all >> 5;
    u32 bad = 0;
    wait_for_the_one_before(ids);
#if ROUTE
    const u32 tokens = ONE_TOKEN ? 1 : n / TOP_K;
    Token token;
    token.load(logits, row_stride, tokens);
#else
    id_t v = lane < n ? id_at(ids, lane, (u32)top_k64, s0, s1) : (id_t)0;
#endif
    const u32 limit = limit_of(nvalid, n, (u32)top_k64);
    const u32 slice = ((L + warps - 1) / warps + 127u) & ~127u;
    const u32 from = min(w * slice, L), to = min(from + slice, L);
    fill(sorted, from, to, (int)n, lane, 32);
#if ROUTE
    const bool writes = blockIdx.x == CTAS;
    if (ONE_TOKEN && writes && threadIdx.x >= 32) return;
    int e = -1;
    if (token.number < tokens) e = token.choose(bias, weights, ids_out, scale_bits, limit, writes);
#if ONE_TOKEN
    if (writes) return;
    const id_t v = (id_t)e;
#else
    __shared__ int chosen[WARPS * 32];
    if (token.number < tokens && lane < TOP_K) chosen[token.number * TOP_K + lane] = e;
    if (writes) return;
    __syncthreads();
    const id_t v = lane < n ? chosen[lane] : 0;
#endif
#endif

    const int bin = bin_of(v, lane < limit, map, smap, bad);
    const u32 kept = __ballot_sync(FULL, bin >= 0);
    u32 eq = kept, lt = 0;
    u32 planes[BITS + 1];
#pragma unroll
    for (int b = BITS - 1; b >= 0; b--) {
        u32 plane = __ballot_sync(FULL, (bin >> b) & 1), mine = (bin >> b) & 1 ? FULL : 0;
        planes[b] = plane;
        lt |= eq & mine & ~plane;
        eq &= ~(plane ^ mine);
    }
    const u32 rank = __popc(eq & below(lane));
    const bool leads = bin >= 0 && rank % B == 0;
    const u32 leaders = __ballot_sync(FULL, leads);
    const u32 row = __popc(lt & leaders) * B + rank;
    const u32 used = __popc(leaders);
    __syncwarp();
    if (bin >= 0 && row >= from && row < to) sorted[row] = (int)lane;

    if (w == warps - 1) {
        if (leads) {
            expert_ids[row / B] = name_of(map, smap, bin);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, __popc(eq) - rank);
#endif
        }
        if (lane >= used && lane < blocks_all) {
            expert_ids[lane] = -1;
#if BLOCK_ROWS
            block_rows[lane] = 0;
#endif
        }
        if (lane == 0) total_out[0] = (int)(used * B);
    }
    if (w == 0) {
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
    for (u32 e = me; e < E; e += all) {
        u32 is = kept, less = 0;
#pragma unroll
        for (int b = BITS - 1; b >= 0; b--) {
            u32 mine = (e >> b) & 1 ? FULL : 0;
            less |= is & mine & ~planes[b];
            is &= ~(planes[b] ^ mine);
        }
#if COUNTS
        counts[e] = __popc(is);
#endif
#if ENDS
        ends[e] = __popc(is | less);
#endif
#if OFFSETS
        offsets[e] = (int)(__popc(less & leaders) * B);
#endif
    }
#if OFFSETS
    if (me == 0) offsets[E] = (int)(used * B);
#endif
#endif
    report(error, w == 0 ? bad : 0, map, smap, nvalid, n, (u32)top_k64, me, all);
}
#endif

// ---- 2 pairwise: n <= 32 * CH = T routes, any E ----------------------------------------------------------------------
// Every CTA compares all routes with all; each fills and then overwrites a slice of sorted_token_ids of its own.

#if PATH == 2
static_assert(CH * 32 <= T, "a thread a route");
static_assert(CH <= 32 && (CH & (CH - 1)) == 0, "words of an expert are added up within a warp");
struct Planes { u32 kept; u32 bit[BITS + 1]; };

DEV void compare(const Planes &p, u32 bin, u32 &eq, u32 &lt) {
    eq = p.kept;
    lt = 0;
#pragma unroll
    for (int b = BITS - 1; b >= 0; b--) {
        u32 plane = p.bit[b], mine = (bin >> b) & 1 ? FULL : 0;
        lt |= eq & mine & ~plane;
        eq &= ~(plane ^ mine);
    }
}

extern "C" __global__ void __launch_bounds__(T, 1) pairwise(PARAMETERS AND_LOGITS) {
    SIZES;
    __shared__ __align__(16) Planes planes[CH];
    __shared__ u32 leaders[CH];
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), me = blockIdx.x * T + t, all = CTAS * T;
    u32 bad = 0;
    wait_for_the_one_before(ids);
#if ROUTE
    const u32 tokens = n / TOP_K;
    Token token;
    token.load(logits, row_stride, tokens);
#else
    id_t v = t < n ? id_at(ids, t, (u32)top_k64, s0, s1) : (id_t)0;
#endif
    const u32 limit = limit_of(nvalid, n, (u32)top_k64);
    const u32 slice = ((L + CTAS - 1) / CTAS + 3u) & ~3u;
    const u32 from = min(blockIdx.x * slice, L), to = min(from + slice, L);
    fill(sorted, from, to, (int)n, t, T);
#if ROUTE
    __shared__ int chosen[CH * 32];
    const bool writes = blockIdx.x == CTAS;
    if (token.number < tokens) {
        const int e = token.choose(bias, weights, ids_out, scale_bits, limit, writes);
        if (lane < TOP_K) chosen[token.number * TOP_K + lane] = e;
    }
    if (writes) return;
    __syncthreads();
    const id_t v = t < n ? chosen[t] : 0;
#endif

    const int bin = bin_of(v, t < limit, map, smap, bad);
    if (warp < CH) {
        u32 kept = __ballot_sync(FULL, bin >= 0);
        if (lane == 0) planes[warp].kept = kept;
#pragma unroll
        for (int b = 0; b < BITS; b++) {
            u32 plane = __ballot_sync(FULL, (bin >> b) & 1);
            if (lane == 0) planes[warp].bit[b] = plane;
        }
    }
    __syncthreads();
    u32 rank = 0, count = 0, lt[CH];
#pragma unroll
    for (int c = 0; c < CH; c++) {
        u32 eq;
        compare(planes[c], (u32)bin, eq, lt[c]);
        count += __popc(eq);
        rank += __popc(eq & (c < (int)warp ? FULL : c == (int)warp ? below(lane) : 0u));
    }
    const bool leads = bin >= 0 && rank % B == 0;
    const u32 lead = __ballot_sync(FULL, leads);
    if (lane == 0 && warp < CH) leaders[warp] = lead;
    __syncthreads();
    u32 before = 0, used = 0;
#pragma unroll
    for (int c = 0; c < CH; c++) {
        before += __popc(lt[c] & leaders[c]);
        used += __popc(leaders[c]);
    }
    const u32 row = before * B + rank;
    if (bin >= 0 && row >= from && row < to) sorted[row] = (int)t;
    if (blockIdx.x == CTAS - 1) {
        if (leads) {
            expert_ids[row / B] = name_of(map, smap, bin);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, count - rank);
#endif
        }
        if (t >= used && t < blocks_all) {
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
    // CH threads an expert, a word each.
    const u32 word = t % CH, word_leaders = leaders[word];
#pragma unroll 1
    for (u32 i = me; (i & ~31u) < E * CH; i += all) {
        const u32 e = i / CH;
        u32 is, less;
        compare(planes[word], e, is, less);
        u32 in = __popc(is), till = __popc(is | less), blocks = __popc(less & word_leaders);
#pragma unroll
        for (int d = 1; d < CH; d *= 2) {
            in += __shfl_xor_sync(FULL, in, d);
            till += __shfl_xor_sync(FULL, till, d);
            blocks += __shfl_xor_sync(FULL, blocks, d);
        }
        if (word == 0 && e < E) {
#if COUNTS
            counts[e] = in;
#endif
#if ENDS
            ends[e] = till;
#endif
#if OFFSETS
            offsets[e] = (int)(blocks * B);
#endif
        }
    }
#if OFFSETS
    if (me == 0) offsets[E] = (int)(used * B);
#endif
#endif
    report(error, blockIdx.x == 0 ? bad : 0, map, smap, nvalid, n, (u32)top_k64, me, all);
}
#endif

// ---- pieces of the counting paths ------------------------------------------------------------------------------------

#if PATH >= 4
#include "barrier.cuh"
#endif

#if PATH >= 3
// Exclusive prefix over the CTA of (a, b), each thread giving one pair; totals in `all_a`, `all_b`.  One barrier inside;
// `room` is written before it and read after it: two calls need a barrier between them.
DEV void scan_cta(u32 &a, u32 &b, u32 &all_a, u32 &all_b, uint2 *room, bool second) {
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
    if (lane == 31) room[warp] = make_uint2(x, y);
    __syncthreads();
    const uint2 w = lane < WARPS ? room[lane] : make_uint2(0, 0);
    a = x - a + __reduce_add_sync(FULL, lane < warp ? w.x : 0);
    all_a = __reduce_add_sync(FULL, w.x);
    if (second) {
        b = y - b + __reduce_add_sync(FULL, lane < warp ? w.y : 0);
        all_b = __reduce_add_sync(FULL, w.y);
    }
}

// Counts every lane with a bin, K times; lanes that agree with the first are added at once, so that a single hot expert
// costs one addition a warp, not 32.  Lanes that are `early` also count in the upper half; `alike`: all lanes are, or none.
template <int K> DEV void count_warp(u32 *table, const int *bin, const bool *early, bool alike) {
    int first[K];
    u32 same[K], same_early[K];
#pragma unroll
    for (int k = 0; k < K; k++) first[k] = __shfl_sync(FULL, bin[k], 0);
#pragma unroll
    for (int k = 0; k < K; k++) {
        same[k] = __ballot_sync(FULL, bin[k] == first[k]);
        if (!alike) same_early[k] = __ballot_sync(FULL, bin[k] == first[k] && early[k]);
    }
    const bool leads = lane_id() == 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
        u32 add = early[k] ? 0x10001u : 1u;
        if (leads) add = alike ? add * __popc(same[k]) : __popc(same[k]) | __popc(same_early[k]) << 16;
        if (bin[k] >= 0 && (leads || bin[k] != first[k])) atomicAdd(&table[bin[k]], add);
    }
}

// The four ids from `i` on, as vectors where they may be; those past n are not touched and come back with ok = false.
DEV void load4(const id_t *ids, u32 i, u32 n, u32 top_k, i64 s0, i64 s1, id_t v[4]) {
#if VECTOR_IN && !STRIDED
    if (i + 4 <= n) {
        if (sizeof(id_t) == 8) {
            longlong2 a = *(const longlong2 *)(ids + i), b = *(const longlong2 *)(ids + i + 2);
            v[0] = (id_t)a.x, v[1] = (id_t)a.y, v[2] = (id_t)b.x, v[3] = (id_t)b.y;
        } else if (sizeof(id_t) == 4) {
            int4 a = *(const int4 *)(ids + i);
            v[0] = (id_t)a.x, v[1] = (id_t)a.y, v[2] = (id_t)a.z, v[3] = (id_t)a.w;
        } else if (sizeof(id_t) == 2) {
            short4 a = *(const short4 *)(ids + i);
            v[0] = (id_t)a.x, v[1] = (id_t)a.y, v[2] = (id_t)a.z, v[3] = (id_t)a.w;
        } else {
            char4 a = *(const char4 *)(ids + i);
            v[0] = (id_t)a.x, v[1] = (id_t)a.y, v[2] = (id_t)a.z, v[3] = (id_t)a.w;
        }
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = i + j < n ? id_at(ids, i + j, top_k, s0, s1) : (id_t)0;
}
#endif

// ---- 3 independent: every cluster counts all routes, every CTA ranks CH * 32 of its own ---------------------------------
// CTA q of a cluster counts slice q of the routes; chunk k of that slice is its own, k being the cluster's number.  So the
// counts of the other slices are all that it needs from its neighbours, and with CLUSTER == 1 there are none.
// Shared memory (words): table (routes of my slice | those before my chunk << 16), of_warp (a byte a bin and warp of mine),
// first_row, each with room for E + 1 experts (COMPACT, for very many: the table alone, which then holds blocks before the
// expert << 16 | routes before my chunk; the bins of my chunk; counts of the experts that I write); with neighbours also count [E], base [E] and what they sent, inbox [CLUSTER][PAIRS], two counts a word.

#if PATH == 3
#define PER ((E + T - 1) / T)
#define PAIRS ((E + 1) / 2)
// Where expert e stands: apart by an odd number of words for the threads that scan PER of them each.
#define AT(e) ((e) + (PER > 2 && PER % 2 == 0 ? (e) / PER : 0))
#define SPAN (AT(E) + 1)
#define TABLE ((SPAN + 1) / 2 * 2)
#define EMPTY_TABLES \
    _Pragma("unroll 1") \
    for (u32 i = 4 * t; i < OF_WARP + TABLE; i += 4 * T) *(uint4 *)(shared + i) = make_uint4(0, 0, 0, 0)
#define FOURS (STEPS % 4 == 0 ? 4 : STEPS % 2 == 0 ? 2 : 1)
#if COMPACT
#define OF_WARP 0
#else
#define OF_WARP (CH == 1 ? 0 : (CH + 3) / 4 * SPAN)
#endif
#if CLUSTER > 1
static_assert(PER <= 2, "pairs of the table are sent as they stand");
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
static_assert(CH * 32 <= T, "a thread a route of my chunk");
static_assert(R * T <= 0xffff, "routes of my slice are counted in 16 bits, and blocks before an expert if COMPACT");
static_assert(CLUSTER == 1 || !COMPACT, "neighbours send whole tables");
#if COMPACT
constexpr int WORDS_SHARED = TABLE + (E + LEAST_CTAS - 1) / LEAST_CTAS;
#else
constexpr int WORDS_SHARED = TABLE + OF_WARP + SPAN + (CLUSTER > 1 ? CLUSTER * PAIRS + 2 * E : 0);
#endif
static_assert(WORDS_SHARED * 4 <= SHARED_BYTES && (OF_WARP + TABLE + 3) / 4 * 16 <= SHARED_BYTES, "tables fit");
extern __shared__ __align__(16) u32 shared[];

// Routes of `bin` in the warps before mine: word w holds warps 4w to 4w + 3 of every bin (COMPACT: the bins of my chunk).
DEV u32 in_earlier_warps(const u32 *of_warp, u32 bin, u32 warp) {
    if (CH == 1) return 0;
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
    for (u32 w = 0; w < CH; w += 4) {
        u32 take = warp <= w ? 0 : warp - w >= 4 ? FULL : (1u << 8 * (warp - w)) - 1;
        sum = __dp4a(of_warp[w / 4 * SPAN + AT(bin)] & take, 0x01010101u, sum);
    }
    return sum;
}

extern "C" __global__ void CLUSTERED __launch_bounds__(T, 1) independent(PARAMETERS) {
    SIZES;
    __shared__ uint2 room[WARPS];
#if COMPACT
    __shared__ __align__(16) u32 of_warp[CH * 32];
    u32 *table = shared, *written = table + TABLE;
#else
    u32 *table = shared, *of_warp = table + TABLE, *first_row = of_warp + OF_WARP;
#endif
#if CLUSTER > 1
    u32 *inbox = first_row + SPAN, *count = inbox + CLUSTER * PAIRS, *base = count + E;
    cluster_arrive();  // awaited before I write to a neighbour: it must have begun
#endif
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), g = blockIdx.x, G = gridDim.x;
    const u32 me = g * T + t, all = G * T, top_k = (u32)top_k64;
    const u32 q = g % CLUSTER, slice = G / CLUSTER * (CH * 32), from = q * slice, to = min(from + slice, n);
    const u32 chunk = from + g / CLUSTER * (CH * 32), own_i = chunk + t;
    u32 bad = 0;

#if AFTER
    EMPTY_TABLES;
    wait_for_the_one_before(ids);
#endif
    // My slice, STEPS routes a thread: fours of neighbours where they are read as vectors, else a warp's are neighbours.
    id_t v[R], own_v = (id_t)0;
#if VECTOR_IN && !STRIDED && STEPS % 4 == 0
#define ROUTE(r) (from + 4 * (t + (r) / 4 * T) + (r) % 4)
#define ALIKE (CH % 4 == 0)
#pragma unroll
    for (int r = 0; r < R; r += 4) load4(ids, ROUTE(r), to, top_k, s0, s1, v + r);
#else
#define ROUTE(r) (from + t + (r) * T)
#define ALIKE true
#pragma unroll
    for (int r = 0; r < R; r++) v[r] = ROUTE(r) < to ? id_at(ids, ROUTE(r), top_k, s0, s1) : (id_t)0;
#endif
    const bool own = t < CH * 32 && own_i < n;
    if (own) own_v = id_at(ids, own_i, top_k, s0, s1);
    const u32 limit = limit_of(nvalid, n, top_k), valid = min(limit, to);
#if !AFTER
    EMPTY_TABLES;
#endif
    __syncthreads();

    int own_bin = -1;
    u32 ahead = 0, total = 0, kept;
    if (warp < CH) {
        own_bin = own ? bin_of(own_v, own_i < limit, map, smap, bad) : -1;
        const u32 peers = same_bin<BITS>((u32)own_bin, __ballot_sync(FULL, own_bin >= 0));
        ahead = __popc(peers & below(lane));
#if COMPACT
        of_warp[t] = (u32)own_bin;
#else
        if (CH > 1 && own_bin >= 0 && ahead == 0) ((u8 *)(of_warp + warp / 4 * SPAN + AT(own_bin)))[warp % 4] = (u8)__popc(peers);
#endif
    }
    int bin[R];
    bool early[R];
    u32 unused = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
        bin[r] = bin_of(v[r], ROUTE(r) < valid, map, smap, unused);
        if (PER > 2 && bin[r] >= 0) bin[r] = AT(bin[r]);
        early[r] = ROUTE(r) < chunk;
    }
#pragma unroll
    for (int r = 0; r < R; r += FOURS) count_warp<FOURS>(table, bin + r, early + r, ALIKE);
    __syncthreads();
#if CLUSTER > 1
    cluster_wait();
#pragma unroll (CLUSTER * PAIRS <= 4 * T ? 4 : 1)
    for (u32 i = t; i < CLUSTER * PAIRS; i += T) {
        const u32 p = i % PAIRS;
        const uint2 w = *(const uint2 *)(table + 2 * p);
        store_neighbour(inbox + q * PAIRS + p, (i / PAIRS + q) % CLUSTER, __byte_perm(w.x, w.y, 0x5410));
    }
    cluster_arrive();
    cluster_wait();
#endif

    // Thread t scans experts t * PER ...
    u32 blocks = 0, routes = 0;
#pragma unroll (PER <= 4 ? PER : COMPACT ? 4 : 1)
    for (int k = 0; k < PER; k++) {
        const u32 e = t * PER + k;
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
        if (e < E) c = table[AT(e)] & 0xffff;
#endif
        blocks += cdiv_b(c);
        routes += c;
    }
#if CLUSTER > 1
#define COUNT(e) count[e]
#else
#define COUNT(e) (table[AT(e)] & 0xffff)
#endif
#if COMPACT
#define FIRST_ROW(e) ((table[AT(e)] >> 16) * B)
#define BEFORE(e) (table[AT(e)] & 0xffff)
#else
#define FIRST_ROW(e) first_row[AT(e)]
#define BEFORE(e) (table[AT(e)] >> 16)
#endif
    scan_cta(blocks, routes, total, kept, room, ENDS != 0);
    // Expert e is written by CTA e % G, as its e / G-th; one division, then counted on.
    u32 nth = t * PER / G, turn = t * PER - nth * G;
#pragma unroll (PER <= 4 ? PER : 1)
    for (int k = 0; k < PER; k++, turn = turn + 1 == G ? nth++, 0u : turn + 1) {
        const u32 e = t * PER + k;
        if (e >= E) break;
        const u32 c = COUNT(e);
#if COMPACT
        table[AT(e)] = blocks << 16 | table[AT(e)] >> 16;
        if (turn == g) written[nth] = c;
#else
        first_row[AT(e)] = blocks * B;
#endif
#if CLUSTER > 1
        base[e] += blocks * B;
#endif
        routes += c;
        if (turn == g) {
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
        blocks += cdiv_b(c);
    }
    total *= B;
    if (t == 0) {
#if !COMPACT
        first_row[AT(E)] = total;
#endif
        if (g == 0) {
            total_out[0] = (int)total;
#if OFFSETS
            offsets[E] = (int)total;
#endif
        }
    }
    __syncthreads();

    if (t < CH * 32) {
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
    // Padding and blocks of experts g, g + G, ...: one warp each, the last warp first (the first rank routes).
#pragma unroll 1
    for (u32 e = g + (WARPS - 1 - warp) * G; e < E; e += WARPS * G) {
#if COMPACT
        const u32 start = FIRST_ROW(e), end = start + written[e / G], stop = start + cdiv_b(end - start) * B;
#else
        const u32 start = FIRST_ROW(e), end = start + COUNT(e), stop = FIRST_ROW(e + 1);
#endif
#pragma unroll 1
        for (u32 r = end + lane; r < stop; r += 32) sorted[r] = (int)n;
        int name = name_of(map, smap, (int)e);
#pragma unroll 1
        for (u32 b = start / B + lane; b < stop / B; b += 32) {
            expert_ids[b] = name;
#if BLOCK_ROWS
            block_rows[b] = (int)min((u32)B, end - b * B);
#endif
        }
    }
#pragma unroll 1
    for (u32 r = total + me; r < L; r += all) sorted[r] = (int)n;
#pragma unroll 1
    for (u32 b = total / B + me; b < blocks_all; b += all) {
        expert_ids[b] = -1;
#if BLOCK_ROWS
        block_rows[b] = 0;
#endif
    }
    report(error, bad, map, smap, nvalid, n, top_k, me, all);
}
#endif

// ---- 4 grid: T * R routes a CTA, E up to a few thousand ----------------------------------------------------------------
// Scratch: G rows of PAIRS words, two 16-bit counts each.  Shared memory: counts [WARPS][STRIDE] words (later the sums),
// then per bin: base [E + 1], first_row [E + 1], count [E]; then route and bin of T * R sorted routes.

#if PATH == 4
#define PAIRS ((E + 1) / 2)
#define STRIDE (PAIRS | 1)
#define PER ((E + T - 1) / T)
#define ROUTES (T * R)
#define BATCH (CH < 16 ? CH : 16)
#define EMPTY 0xffffffffu  // no pair of counts: a CTA has fewer than 65,535 routes
#define SEGS ((T / PAIRS) >= 16 ? 16 : (T / PAIRS) >= 8 ? 8 : (T / PAIRS) >= 4 ? 4 : (T / PAIRS) >= 2 ? 2 : 1)
// The sums need SEGS * 2 * (2 * PAIRS) words, the counts WARPS * STRIDE.
#define SUMS (SEGS * 4 * PAIRS)
#define FRONT (SUMS > WARPS * STRIDE ? SUMS : WARPS * STRIDE)
static_assert(SEGS * CH == GRID_CTAS, "every row of the table is that of a CTA");
static_assert(8 * ROUTES <= 0xffff, "pairs of counts are added packed, eight rows at a time");
static_assert(E <= 0x10000, "a bin fits local_bin");
static_assert((FRONT + 3 * E + 2 + ROUTES) * 4 + ROUTES * 2 <= SHARED_BYTES, "counts, bins and sorted routes fit");
static_assert(PAIRS <= SCRATCH_EACH_CTA, "a row of counts fits");
extern __shared__ __align__(16) u32 shared[];

extern "C" __global__ void __launch_bounds__(T, 1) grid(PARAMETERS) {
    SIZES;
    __shared__ uint2 room[32], room2[32];
    u32 *cnt = shared, *base = shared + FRONT, *first_row = base + E + 1, *count = first_row + E + 1;
    u32 *local_route = count + E;
    u16 *local_bin = (u16 *)(local_route + ROUTES);
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), g = blockIdx.x, G = gridDim.x;
    const u32 me = g * T + t, all = G * T, top_k = (u32)top_k64;
    u32 *table = (u32 *)scratch;
    u32 bad = 0;
    Barrier barrier = Barrier::begin();
    wait_for_the_one_before(ids);

    // Routes of a warp are consecutive: its step r holds routes my_first + 32 r + lane.
    const u32 chunk = g * ROUTES, my_first = chunk + warp * (32 * R) + lane;
    id_t v[R];
#pragma unroll
    for (int r = 0; r < R; r++) v[r] = my_first + 32 * r < n ? id_at(ids, my_first + 32 * r, top_k, s0, s1) : (id_t)0;
    const u32 limit = limit_of(nvalid, n, top_k);
    if (warp == 0) {
#pragma unroll 1
        for (u32 i = lane; i < PAIRS; i += 32) store_fresh(&table[g * PAIRS + i], EMPTY);
        barrier.arrive_warp();
    }
    u32 *mine = cnt + warp * STRIDE;
    for (u32 i = lane; i < STRIDE; i += 32) mine[i] = 0;

    int bin[R];
    u32 rank[R], peers[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        u32 i = my_first + 32 * r;
        bin[r] = bin_of(v[r], i < limit, map, smap, bad);
        peers[r] = same_bin<BITS>((u32)bin[r], __ballot_sync(FULL, bin[r] >= 0));
#if SCATTER
        if (i < n) scatter[i] = bin[r] >= 0 ? (int)i : -1;
#endif
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < R; r++) {
        u32 ahead = peers[r] & below(lane), old = 0;
        u16 *slot = (u16 *)mine + (bin[r] < 0 ? 0 : bin[r]);
        if (r > 0) {
            old = *slot;
            __syncwarp();
        }
        if (bin[r] >= 0 && ahead == 0) *slot = (u16)(old + __popc(peers[r]));
        if (r + 1 < R) __syncwarp();
        rank[r] = old + __popc(ahead);
    }
    __syncthreads();

    // Prefix over the warps, eight threads a pair of bins.
    constexpr int EACH = (WARPS + 7) / 8;
#pragma unroll 1
    for (u32 at = t >> 3; at < (PAIRS + 3) / 4 * 4; at += T / 8) {
        u32 seg = t & 7, run = 0, part[EACH];
        bool ok = at < PAIRS;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            u32 w = seg * EACH + k;
            part[k] = ok && w < WARPS ? cnt[w * STRIDE + at] : 0;
            run += part[k];
        }
        u32 sum = run;
#pragma unroll
        for (int d = 1; d < 8; d *= 2) {
            u32 p = __shfl_up_sync(FULL, sum, d);
            if (seg >= d) sum += p;
        }
        if (ok && seg == 7) {
            store_fresh(&table[g * PAIRS + at], sum);
            count[2 * at] = sum & 0xffff;
            if (2 * at + 1 < E) count[2 * at + 1] = sum >> 16;
        }
        run = sum - run;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            u32 w = seg * EACH + k;
            if (ok && w < WARPS) cnt[w * STRIDE + at] = run;
            run += part[k];
        }
    }
    const u32 look = barrier.look();
    __syncthreads();

    // While the rows travel: sort the chunk by bin in shared memory.
    u32 a = 0, unused = 0, in_chunk, unused2;
#pragma unroll (PER <= 4 ? PER : 1)
    for (int k = 0; k < PER; k++) a += t * PER + k < E ? count[t * PER + k] : 0;
    scan_cta(a, unused, in_chunk, unused2, room, false);
#pragma unroll (PER <= 4 ? PER : 1)
    for (int k = 0; k < PER; k++) {
        u32 e = t * PER + k;
        if (e >= E) break;
        base[e] = a;
        a += count[e];
    }
    __syncthreads();
    u32 place[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        place[r] = 0;
        if (bin[r] >= 0) {
            place[r] = base[bin[r]] + ((u16 *)mine)[bin[r]] + rank[r];
            local_route[place[r]] = my_first + 32 * r;
            local_bin[place[r]] = (u16)bin[r];
        }
    }
    barrier.wait_after(look);

    // All rows of the table at once: pair `p`, rows seg, seg + SEGS, ...; a word is there once it is not EMPTY.
    // Pairs are added packed, 8 rows at a time.
    u32 *sum_all = cnt, *sum_before = cnt + SEGS * 2 * PAIRS;
#pragma unroll 1
    for (u32 at = t; at < SEGS * PAIRS; at += T) {
        const u32 p = at % PAIRS, seg = at / PAIRS;
        u32 lo = 0, hi = 0, lo_before = 0, hi_before = 0;
#pragma unroll 1
        for (int first = 0; first < CH; first += BATCH) {
            const u32 *rows = table + (seg + first * SEGS) * PAIRS + p;
            u32 w[BATCH], most;
            do {
#pragma unroll
                for (int k = 0; k < BATCH; k++) w[k] = load_fresh(rows + k * SEGS * PAIRS);
                most = 0;
#pragma unroll
                for (int k = 0; k < BATCH; k++) most = max(most, w[k]);
            } while (most == EMPTY);
#pragma unroll
            for (int k = 0; k < BATCH; k += 8) {
                u32 sum = 0, before = 0;
#pragma unroll
                for (int j = k; j < k + 8 && j < BATCH; j++) {
                    sum += w[j];
                    if (seg + (first + j) * SEGS < g) before += w[j];
                }
                lo += sum & 0xffff, hi += sum >> 16;
                lo_before += before & 0xffff, hi_before += before >> 16;
            }
        }
        *(uint2 *)(sum_all + seg * 2 * PAIRS + 2 * p) = make_uint2(lo, hi);
        *(uint2 *)(sum_before + seg * 2 * PAIRS + 2 * p) = make_uint2(lo_before, hi_before);
    }
    __syncthreads();
    u32 blocks = 0, routes = 0, total, kept;
#pragma unroll (PER <= 4 ? PER : 1)
    for (int k = 0; k < PER; k++) {
        u32 e = t * PER + k, c = 0, before = 0;
        if (e >= E) break;
#pragma unroll
        for (int s = 0; s < SEGS; s++) c += sum_all[s * 2 * PAIRS + e], before += sum_before[s * 2 * PAIRS + e];
        count[e] = c;
        base[e] = before - base[e];
        blocks += cdiv_b(c);
        routes += c;
    }
    scan_cta(blocks, routes, total, kept, room2, ENDS != 0);
#pragma unroll (PER <= 4 ? PER : 1)
    for (int k = 0; k < PER; k++) {
        u32 e = t * PER + k;
        if (e >= E) break;
        u32 c = count[e];
        first_row[e] = blocks * B;
        base[e] += blocks * B;
        routes += c;
        if (e % G == g) {
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
        blocks += cdiv_b(c);
    }
    total *= B;
    if (t == 0) {
        first_row[E] = total;
        if (g == 0) {
            total_out[0] = (int)total;
#if OFFSETS
            offsets[E] = (int)total;
#endif
        }
    }
    __syncthreads();

#pragma unroll
    for (int r = 0; r < R; r++) {
        u32 q = t + r * T;
        if (q < in_chunk) sorted[base[local_bin[q]] + q] = (int)local_route[q];
#if POSITIONS
        u32 i = my_first + 32 * r;
        if (i < n) positions[i] = bin[r] >= 0 ? (int)(base[bin[r]] + place[r]) : -1;
#endif
    }
#pragma unroll 1
    for (u32 e = g + (WARPS - 1 - warp) * G; e < E; e += WARPS * G)
#pragma unroll 1
        for (u32 r = first_row[e] + count[e] + lane; r < first_row[e + 1]; r += 32) sorted[r] = (int)n;
#pragma unroll 1
    for (u32 r = total + me; r < L; r += all) sorted[r] = (int)n;
    // Blocks in equal shares, so that one hot expert is everybody's: the last e with first_row[e] <= row owns it.
#pragma unroll 1
    for (u32 b = g + G * t; b < blocks_all; b += all) {
        u32 row = b * B, e = 0;
        if (row < total) {
#pragma unroll 1
            for (int step = BITS ? 1 << (BITS - 1) : 0; step; step /= 2)
                if (e + step < E && first_row[e + step] <= row) e += step;
            expert_ids[b] = name_of(map, smap, (int)e);
        } else {
            expert_ids[b] = -1;
        }
#if BLOCK_ROWS
        block_rows[b] = row < total ? (int)min((u32)B, first_row[e] + count[e] - row) : 0;
#endif
    }
    report(error, bad, map, smap, nvalid, n, top_k, me, all);
}
#endif

// ---- 5 radix: any number of routes, any number of experts --------------------------------------------------------------
// Least significant digit first, 8 bits a pass; a dropped route has key E and sorts last.  Then runs of equal keys give
// counts, one distributed scan over the experts gives rows.
// Scratch (words): PASSES tables of G * 256, keys and routes (2n; 4n from two passes on), begin, end, first row (3E),
// parts (2G).

#if PATH == 5
#define PASSES ((bits_of(E) + 7) / 8)
static_assert(T % 256 == 0, "a segment of threads has one for each digit");
static_assert(PASSES * 256 + 2 <= SCRATCH_EACH_CTA, "tables and parts fit");
static_assert((PASSES > 1 ? 4 : 2) <= SCRATCH_EACH_ROUTE, "keys and routes fit");
static_assert(3 * (long long)E <= SCRATCH_BESIDES, "begin, end and first row of each expert fit");
extern "C" __global__ void __launch_bounds__(T, 1) radix(PARAMETERS) {
    SIZES;
    __shared__ uint2 room[32];
    __shared__ u32 table[256];            // counts of my chunk, then the next row of each digit
    __shared__ u32 sums[2][T / 256 * 256];
    __shared__ u32 of_warp[WARPS][257];
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id(), g = blockIdx.x, G = gridDim.x;
    const u32 me = g * T + t, all = G * T, top_k = (u32)top_k64;
    u32 bad = 0;
    u32 *tables = (u32 *)scratch, *keys = tables + (u64)PASSES * G * 256, *routes = keys + n;
    u32 *other = PASSES > 1 ? routes + n : keys;
    u32 *begin = other + 2ull * n, *end = begin + E, *row_of = end + E, *parts = row_of + E;
    Barrier barrier = Barrier::begin();
    wait_for_the_one_before(ids);
    const u32 limit = limit_of(nvalid, n, top_k);

    fill(sorted, 0, L, (int)n, me, all);
    for (u32 b = me; b < blocks_all; b += all) {
        expert_ids[b] = -1;
#if BLOCK_ROWS
        block_rows[b] = 0;
#endif
    }
    for (u32 e = me; e < E; e += all) begin[e] = end[e] = 0;

    const u32 tiles = (n + T - 1) / T, share = (tiles + G - 1) / G;
    const u32 from = min((u64)g * share * T, (u64)n), to = min((u64)from + (u64)share * T, (u64)n);
    u32 *keys_in = nullptr, *routes_in = nullptr;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        u32 *keys_out = pass & 1 ? other : keys, *routes_out = keys_out + n;
        const int shift = 8 * pass;
        for (u32 i = t; i < 256; i += T) table[i] = 0;
        __syncthreads();
#pragma unroll 1
        for (u32 tile = from; tile < to; tile += T) {
            u32 i = tile + t, key = E;
            int digit = -1;
            if (i < to) {
                if (pass == 0) {
                    int bin = bin_of(id_at(ids, i, top_k, s0, s1), i < limit, map, smap, bad);
                    key = bin < 0 ? E : (u32)bin;
                } else {
                    key = load_l2(&keys_in[i]);
                }
                digit = (key >> shift) & 255;
            }
            int first = __shfl_sync(FULL, digit, 0);
            u32 same = __ballot_sync(FULL, digit == first);
            if (digit >= 0 && (lane == 0 || digit != first)) atomicAdd(&table[digit], lane == 0 ? __popc(same) : 1);
        }
        __syncthreads();
        u32 *mine = tables + (u64)pass * G * 256;
        for (u32 i = t; i < 256; i += T) __stcg(&mine[g * 256 + i], table[i]);
        barrier.sync();
        {
            u32 d = t & 255, seg = t >> 8, a = 0, before = 0;
#pragma unroll 16
            for (u32 row = seg; row < G; row += T / 256) {
                u32 w = load_l2(&mine[row * 256 + d]);
                a += w;
                if (row < g) before += w;
            }
            sums[0][t] = a, sums[1][t] = before;
        }
        __syncthreads();
        u32 a = 0, before = 0, unused = 0, x, y;
        if (t < 256)
            for (int s = 0; s < T / 256; s++) a += sums[0][s * 256 + t], before += sums[1][s * 256 + t];
        scan_cta(a, unused, x, y, room, false);
        if (t < 256) table[t] = a + before;
#pragma unroll 1
        for (u32 tile = from; tile < to; tile += T) {
            for (u32 i = lane; i < 256; i += 32) of_warp[warp][i] = 0;
            __syncwarp();
            u32 i = tile + t, key = E, route = i;
            bool ok = i < to;
            if (ok) {
                if (pass == 0) {
                    u32 ignored = 0;
                    int bin = bin_of(id_at(ids, i, top_k, s0, s1), i < limit, map, smap, ignored);
                    key = bin < 0 ? E : (u32)bin;
#if SCATTER
                    scatter[i] = bin < 0 ? -1 : (int)i;
#endif
                } else {
                    key = load_l2(&keys_in[i]);
                    route = load_l2(&routes_in[i]);
                }
            }
            u32 digit = (key >> shift) & 255;
            u32 eq = same_bin<8>(digit, __ballot_sync(FULL, ok)), ahead = eq & below(lane);
            if (ok && ahead == 0) of_warp[warp][digit] = __popc(eq);
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
                __stcg(&keys_out[at], key);
                __stcg(&routes_out[at], route);
            }
            __syncwarp();
        }
        keys_in = keys_out, routes_in = routes_out;
        barrier.sync();
    }

    for (u32 i = me; i < n; i += all) {
        u32 key = load_l2(&keys_in[i]);
        if (key >= E) continue;
        if (i == 0 || load_l2(&keys_in[i - 1]) != key) __stcg(&begin[key], i);
        if (i + 1 == n || load_l2(&keys_in[i + 1]) != key) __stcg(&end[key], i + 1);
    }
    barrier.sync();

    // My experts: sums first, then rows.
    const u32 each = (E + G - 1) / G, e_from = min(g * each, (u32)E), e_to = min(e_from + each, (u32)E);
    u32 blocks = 0, kept = 0, all_blocks, all_kept;
    for (u32 e = e_from + t; e < e_to; e += T) {
        u32 c = load_l2(&end[e]) - load_l2(&begin[e]);
        blocks += cdiv_b(c);
        kept += c;
    }
    scan_cta(blocks, kept, all_blocks, all_kept, room, true);
    if (t == 0) __stcg(&parts[2 * g], all_blocks), __stcg(&parts[2 * g + 1], all_kept);
    barrier.sync();
    u32 before_blocks = 0, before_kept = 0, total = 0;
    {
        u32 a = 0, b = 0, c = 0, x, y;
        for (u32 i = t; i < G; i += T) {
            u32 p = load_l2(&parts[2 * i]), q = load_l2(&parts[2 * i + 1]);
            if (i < g) a += p, b += q;
            c += p;
        }
        u32 a_ = a, b_ = b;
        scan_cta(a_, b_, before_blocks, before_kept, room, true);
        __syncthreads();
        u32 zero = 0;
        scan_cta(c, zero, x, y, room, false);
        total = x * B;
        __syncthreads();
    }
    for (u32 tile = e_from; tile < e_to; tile += T) {
        u32 e = tile + t, c = 0;
        if (e < e_to) c = load_l2(&end[e]) - load_l2(&begin[e]);
        u32 a = cdiv_b(c), b = c, x, y;
        scan_cta(a, b, x, y, room, true);
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
    if (me == 0) {
        total_out[0] = (int)total;
#if OFFSETS
        offsets[E] = (int)total;
#endif
    }
    barrier.sync();

    for (u32 i = me; i < n; i += all) {
        u32 key = load_l2(&keys_in[i]), route = load_l2(&routes_in[i]);
        if (key >= E) {
#if POSITIONS
            positions[route] = -1;
#endif
            continue;
        }
        u32 rank = i - load_l2(&begin[key]), row = load_l2(&row_of[key]) + rank;
        sorted[row] = (int)route;
#if POSITIONS
        positions[route] = (int)row;
#endif
        if (rank % B == 0) {
            expert_ids[row / B] = name_of(map, smap, (int)key);
#if BLOCK_ROWS
            block_rows[row / B] = (int)min((u32)B, load_l2(&end[key]) - i);
#endif
        }
    }
    report(error, bad, map, smap, nvalid, n, top_k, me, all);
}
#endif
