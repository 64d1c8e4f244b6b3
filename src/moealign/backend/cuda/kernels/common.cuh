// What the six paths of the layout share: macros, parameters, reading ids, filling, error bits.
//
// align.py selects the path by size and passes the constants of a call as macros:
//
//   EXPERTS, BLOCK     E and B; with a fused router EXPERTS are those that it chooses from, and E has SHARED more
//   ID_TYPE, MAP_TYPE  dtypes of ids and map, 0 to 7: int8 int16 int32 int64 uint8 uint16 uint32 uint64
//   MAP                0 no map, 1 the map names the expert of a block, 2 the map selects the bin of a route
//   NVALID, ERROR      num_valid_tokens, error_word are passed; BAD_ID, BAD_MAP, BAD_NUM_VALID are the error bits
//   EXTRAS             1 expert_counts, 2 expert_offsets, 4 group_ends, 8 positions, 16 block_rows, 32 scatter_idx
//   STRIDED            ids are [n / top_k, top_k] with strides (id_stride0, id_stride1), otherwise contiguous
//   VECTOR_IN, VECTOR_OUT  ids, sorted_token_ids are aligned to 16 bytes
//   THREADS, STEPS     threads per CTA, routes per thread
//   WORDS              words of 32 routes that a CTA ranks; on grid, rows of the table that a thread reads
//   CLUSTER, COMPACT, MIN_CTAS  of independent.cu;  GRID_CTAS  of grid.cu
//   RESIDENT           CTAs per multiprocessor, of tiles.cu
//   SHARED_BYTES       dynamic shared memory of the launch
//   SCRATCH_PER_CTA, SCRATCH_PER_ROUTE, SCRATCH_FIXED  words of device memory of the launch
//   PDL_WAIT           the launch may start before the kernel ahead of it has ended
//   FUSED_ROUTER       warp, pairwise: choose the experts first; fused.cuh and router.cuh list the macros
//
// Every kernel is stable and writes every element of every output.  Apart from bank conflicts, no cost depends on
// values.  Every parameter is 8 bytes.

#include "types.cuh"

#ifndef SHARED
#define SHARED 0
#endif

constexpr int E = EXPERTS + SHARED, B = BLOCK;
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "a CTA is whole warps, at most 1,024 threads");
static_assert(E >= 0 && E <= 1 << 28, "eight times the number of experts is counted in 32 bits");

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

#define COUNTS (EXTRAS & 1)
#define OFFSETS (EXTRAS & 2)
#define ENDS (EXTRAS & 4)
#define POSITIONS (EXTRAS & 8)
#define BLOCK_ROWS (EXTRAS & 16)
#define SCATTER (EXTRAS & 32)
#define WARPS (THREADS / 32)

static __device__ constexpr int bits_of(u32 v) { return v == 0 ? 0 : 1 + bits_of(v >> 1); }
constexpr int BITS = bits_of(E - 1);  // of a bin

// ---- parameters -----------------------------------------------------------------------------------------------------
//   inputs    ids [n], map [E] of map_stride, num_valid [1], error_word [1]
//   required  sorted [L], expert_ids [num_blocks], total_out [1]
//   extras    counts [E], offsets [E + 1], ends [E], positions [n], block_rows [num_blocks], scatter [n]
//   sizes     n, top_k, L;  scratch;  strides of ids and map, in elements
//
// Pointers may be null if a macro rules them out.  The common call (three outputs of contiguous ids, no option) has a
// short list, because the driver spends time on each parameter.

#if MAP || NVALID || ERROR || EXTRAS || STRIDED || FUSED_ROUTER
#define PARAMETERS \
    const id_t *__restrict__ ids, const map_t *__restrict__ map, const int *__restrict__ num_valid, int *error_word, \
    int *__restrict__ sorted, int *__restrict__ expert_ids, int *__restrict__ total_out, \
    int *__restrict__ counts, int *__restrict__ offsets, int *__restrict__ ends, \
    int *__restrict__ positions, int *__restrict__ block_rows, int *__restrict__ scatter, \
    i64 n64, i64 top_k64, i64 length64, int *scratch, i64 id_stride0, i64 id_stride1, i64 map_stride
#define DECLARE_ABSENT
#else
#define PARAMETERS \
    const id_t *__restrict__ ids, int *__restrict__ sorted, int *__restrict__ expert_ids, int *__restrict__ total_out, \
    i64 n64, i64 top_k64, i64 length64, int *scratch
#define DECLARE_ABSENT \
    const map_t *const map = nullptr; const int *const num_valid = nullptr; int *const error_word = nullptr; \
    int *const counts = nullptr, *const offsets = nullptr, *const ends = nullptr; \
    const i64 id_stride0 = 0, id_stride1 = 0, map_stride = 0; \
    (void)counts, (void)offsets, (void)ends; \
    (void)map, (void)num_valid, (void)error_word, (void)id_stride0, (void)id_stride1, (void)map_stride
#endif
// The first line of every kernel: absent parameters, and sizes in 32 bits.
#define UNPACK_SIZES \
    DECLARE_ABSENT; \
    const u32 n = (u32)n64, L = (u32)length64, num_blocks = (L + B - 1u) / B; \
    (void)L, (void)num_blocks

// ---- from ids to bins -----------------------------------------------------------------------------------------------

template <typename V> DEV bool in_range(V v) { return !(v < (V)0) && (u64)v < (u64)E; }
template <typename V> DEV bool is_minus_one(V v) { return (V)-1 < (V)0 && v == (V)-1; }

// The local expert of a global one, -1 if it is foreign.
DEV int local_expert(const map_t *map, i64 map_stride, int expert) {
#if MAP
    map_t v = map[expert * map_stride];
    return in_range(v) ? (int)v : -1;
#else
    return expert;
#endif
}

// What expert_ids says of the blocks of `bin`.
DEV int expert_of_bin(const map_t *map, i64 map_stride, int bin) {
#if MAP == 1
    return local_expert(map, map_stride, bin);
#else
    return bin;
#endif
}

// The number of routes of valid tokens: routes from here on are dropped.
DEV u32 valid_routes(const int *num_valid, u32 n, u32 top_k) {
#if NVALID
    int v = *num_valid, rows = top_k ? (int)(n / top_k) : 0;
    v = v < 0 ? 0 : v > rows ? rows : v;
    return (u32)v * top_k;
#else
    return n;
#endif
}

DEV id_t id_at(const id_t *ids, u32 i, u32 top_k, i64 id_stride0, i64 id_stride1) {
#if STRIDED
    u32 row = i / top_k;
    return ids[(i64)row * id_stride0 + (i64)(i - row * top_k) * id_stride1];
#else
    return ids[i];
#endif
}

// Load the four ids from `i` on, as vectors if they are aligned; ids past n are not read.
DEV void load4(const id_t *ids, u32 i, u32 n, u32 top_k, i64 id_stride0, i64 id_stride1, id_t v[4]) {
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
    for (int j = 0; j < 4; j++) v[j] = i + j < n ? id_at(ids, i + j, top_k, id_stride0, id_stride1) : (id_t)0;
}

// The bin of a route with id `v`, -1 if the route is dropped.  A bad id of a valid token sets BAD_ID in `errors`.
DEV int bin_of(id_t v, bool valid, const map_t *map, i64 map_stride, u32 &errors) {
    bool in = in_range(v);
#if ERROR
    if (valid && !in && !is_minus_one(v)) errors |= BAD_ID;
#endif
    if (!valid || !in) return -1;
#if MAP == 2
    return local_expert(map, map_stride, (int)v);
#else
    return (int)v;
#endif
}

// Check the map and num_valid_tokens, shared by the grid's threads, and add what they and the ids showed to error_word.
DEV void report_errors(
    int *error_word, u32 errors, const map_t *map, i64 map_stride, const int *num_valid, u32 n, u32 top_k,
    u32 grid_thread, u32 grid_threads) {
#if ERROR
#if MAP
#pragma unroll 1
    for (u32 e = grid_thread; e < E; e += grid_threads) {
        map_t v = map[e * map_stride];
        if (!in_range(v) && !is_minus_one(v)) errors |= BAD_MAP;
    }
#endif
#if NVALID
    if (grid_thread == 0) {
        int v = *num_valid;
        if (v < 0 || v > (top_k ? (int)(n / top_k) : 0)) errors |= BAD_NUM_VALID;
    }
#endif
    if (errors) atomicOr(error_word, (int)errors);
#endif
}

// ---- small pieces ---------------------------------------------------------------------------------------------------

DEV u32 blocks_of(u32 routes) { return (routes + (B - 1u)) / B; }

// The lanes of `active` whose bin, a number of NUM_BITS bits, equals mine.
// A test of the sign takes fewer instructions than one of a bit.
template <int NUM_BITS> DEV u32 lanes_with_bin(u32 bin, u32 active) {
    u32 equal = active;
#pragma unroll
    for (int b = 0; b < NUM_BITS; b++) {
        const bool one = (int)(bin << (31 - b)) < 0;
        const u32 plane = __ballot_sync(FULL, one);
        equal &= one ? plane : ~plane;
    }
    return equal;
}

// p[from .. to) = value, shared by `threads` threads, of which this is number `thread`.
DEV void fill(int *p, u32 from, u32 to, int value, u32 thread, u32 threads) {
#if VECTOR_OUT
    u32 head = (from + 3u) & ~3u, tail = to & ~3u;
    if (head <= tail) {
        int4 v = make_int4(value, value, value, value);
#pragma unroll 1
        for (u32 i = head + 4 * thread; i < tail; i += 4 * threads) *(int4 *)(p + i) = v;
        if (thread < head - from) p[from + thread] = value;
        if (thread < to - tail) p[tail + thread] = value;
        return;
    }
#endif
#pragma unroll 1
    for (u32 i = from + thread; i < to; i += threads) p[i] = value;
}

// Wait until the kernel ahead of this one in the stream has ended.  Only what is read through `ids` is ordered behind
// the wait: it returns the pointer anew, because the compiler takes what lies behind a const __restrict__ parameter for
// constant and moves such loads ahead of any wait.
DEV void wait_for_dependency(const id_t *__restrict__ &ids) {
#if PDL_WAIT
    u64 at = __cvta_generic_to_global(ids);
    asm volatile("griddepcontrol.wait;" : "+l"(at) :: "memory");
    ids = (const id_t *)__cvta_global_to_generic(at);
#endif
}
