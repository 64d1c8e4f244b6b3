// One warp chooses the experts of one token: scores, groups, top k, weights.  docs/routing.md has the equations.
//
//   EXPERTS   E, at most 2048; expert e belongs to lane e / PER_LANE       TOP_K  at most 32
//   LOGITS    0 float32, 1 bfloat16, 2 float16      LOGITS_VECTOR  E = 32 * PER_LANE and rows may be read as vectors
//   SIGMOID, RENORM, BIAS (0 none, 1 float32)       GROUPS, TOP_GROUPS  at most 32 groups
//
// Experts are compared by keys: a u32 that sorts as the float does, NaN being 1, below every number, and 0 what cannot be
// chosen.  Where 16 bits hold the logit, the key's lower half is 0xffff - expert: one reduction gives value and expert.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define DEV static __device__ __forceinline__
#define FULL 0xffffffffu

#define PER_LANE ((EXPERTS + 31) / 32)
#define SHORT_KEYS (LOGITS != 0 && !BIAS)
#define GROUP_SIZE (EXPERTS / GROUPS)

#if LOGITS == 0
typedef u32 raw_t;
#else
typedef u16 raw_t;
#endif

DEV float number_of(raw_t raw) {
#if LOGITS == 0
    return __uint_as_float(raw);
#elif LOGITS == 1
    return __uint_as_float((u32)raw << 16);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(raw));
    return x;
#endif
}

DEV u32 key_of(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(x, 0.f));  // -0 becomes +0
    return x != x ? 1u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
#define KEY_OF_MINUS_INFINITY 0x007fffffu

DEV float number_of_key(u32 key) {  // not of 0 or 1
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

#if SHORT_KEYS
DEV u32 signs_of(u32 pair) {  // all bits of each half that has its sign bit
    u32 signs;
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(signs) : "r"(pair));
    return signs;
}
// Of two logits in a word, the upper halves of their keys: a number gets its sign bit flipped, one below zero all bits,
// and one more, so that -0 is what +0 is.
DEV u32 short_keys(u32 pair) {
    constexpr u32 EACH = 0x00010001u, PAST_FINITE = 0x7fffu - (LOGITS == 1 ? 0x7f80u : 0x7c00u);
    const u32 below_zero = signs_of(pair), nan = signs_of((pair & 0x7fff7fffu) + PAST_FINITE * EACH);
    const u32 keys = (pair ^ (below_zero | 0x80008000u)) + (below_zero & EACH);
    return (keys & ~nan) | (nan & EACH);
}
DEV float number_of_short_key(u32 key) {
    const u32 half = key >> 16;
    return number_of((raw_t)(half & 0x8000u ? half ^ 0x8000u : ~(half - 1u)));
}
#endif

// moealign.backend.reference.route.exp32 and sigmoid32, operation for operation.
DEV float exp32(float x) {
    if (x < -87.f) return 0.f;
    x = fminf(x, 87.f);
    const float n = floorf(__fadd_rn(__fmul_rn(x, 1.4426950216293335f), .5f));
    float r = __fsub_rn(x, __fmul_rn(n, .693359375f));
    r = __fsub_rn(r, __fmul_rn(n, -2.1219444170128554e-4f));
    float y = 1.9875691214110702e-4f;
    y = __fadd_rn(__fmul_rn(y, r), 1.3981999363750219e-3f);
    y = __fadd_rn(__fmul_rn(y, r), 8.333452045917511e-3f);
    y = __fadd_rn(__fmul_rn(y, r), 4.166579619050026e-2f);
    y = __fadd_rn(__fmul_rn(y, r), .16666665673255920f);
    y = __fadd_rn(__fmul_rn(y, r), .5f);
    y = __fadd_rn(__fadd_rn(__fmul_rn(y, __fmul_rn(r, r)), r), 1.f);
    return __fmul_rn(y, __uint_as_float((u32)((int)n + 127) << 23));
}

DEV float sigmoid32(float x) { return x >= -87.f ? __fdiv_rn(1.f, __fadd_rn(1.f, exp32(-x))) : 0.f; }

// What a weight is before it is divided.
DEV float part_of(float x, float highest) {
#if SIGMOID
    return sigmoid32(x);
#else
    return x != x ? 0.f : x == highest ? 1.f : exp32(__fsub_rn(x, highest));
#endif
}

// Sum over LANES neighbouring lanes, a power of two.
template <int LANES> DEV float sum_lanes(float x) {
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) x = __fadd_rn(x, __shfl_xor_sync(FULL, x, d));
    return x;
}
static __device__ constexpr int power_of_two(int v) { return v <= 1 ? 1 : 2 * power_of_two((v + 1) / 2); }

// The PER_LANE logits of lane `lane`, into an array that is aligned to 16 bytes; what is past E does not count.
DEV void load_logits(const raw_t *row, u32 lane, raw_t raw[PER_LANE]) {
#if LOGITS_VECTOR
    constexpr int BYTES = PER_LANE * sizeof(raw_t);
    const raw_t *from = row + lane * PER_LANE;
    if (BYTES % 16 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) ((uint4 *)raw)[i] = ((const uint4 *)from)[i];
        return;
    }
    if (BYTES % 8 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) ((uint2 *)raw)[i] = ((const uint2 *)from)[i];
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) raw[i] = lane * PER_LANE + i < EXPERTS ? row[lane * PER_LANE + i] : (raw_t)0;
}

#if GROUPS > 1
// A bit for each group that may be chosen from.
DEV u32 best_groups(const float score[PER_LANE], u32 lane) {
    u32 mine = 0;  // key of group `lane`
    constexpr int LANES = GROUP_SIZE / PER_LANE;
    constexpr bool WHOLE = GROUP_SIZE % PER_LANE == 0 && (LANES & (LANES - 1)) == 0 && EXPERTS == 32 * PER_LANE;
#pragma unroll 1
    for (int g = 0; g < (WHOLE ? 1 : GROUPS); g++) {
        float first = -__int_as_float(0x7f800000), second = first;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const u32 e = lane * PER_LANE + i;
            if (score[i] == score[i] && e < EXPERTS && (WHOLE || e / GROUP_SIZE == g)) {
                second = fmaxf(second, fminf(first, score[i]));
                first = fmaxf(first, score[i]);
            }
        }
#pragma unroll
        for (int d = 1; d < (WHOLE ? LANES : 32); d *= 2) {
            const float a = __shfl_xor_sync(FULL, first, d), b = __shfl_xor_sync(FULL, second, d);
            second = fmaxf(fmaxf(second, b), fminf(first, a));
            first = fmaxf(first, a);
        }
        const u32 key = key_of(BIAS && GROUP_SIZE > 1 ? __fadd_rn(first, second) : first);
        if (WHOLE) mine = __shfl_sync(FULL, key, lane * LANES % 32);
        else if (lane == g) mine = key;
    }
    u32 rank = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const u32 other = __shfl_sync(FULL, mine, g);
        rank += other > mine || (other == mine && g < lane);
    }
    return __ballot_sync(FULL, lane < GROUPS && rank < TOP_GROUPS);
}
#endif

// ---- the k best -----------------------------------------------------------------------------------------------------
// Each lane sorts its experts in runs of at most eight; then the best head of all runs is taken, TOP_K times.

#define RUN (PER_LANE <= 1 ? 1 : PER_LANE == 2 ? 2 : PER_LANE <= 4 ? 4 : 8)
#define RUNS ((PER_LANE + 7) / 8)

struct Keys {
    u32 key[RUNS * RUN];
#if !SHORT_KEYS
    u32 low[RUNS * RUN];  // FULL - expert: of equal keys the lower expert is the better
#endif
};

// The better one at `i`.
DEV void order(Keys &keys, int i, int j) {
#if SHORT_KEYS
    const u32 a = keys.key[i], b = keys.key[j];
    keys.key[i] = max(a, b), keys.key[j] = min(a, b);
#else
    const u64 a = (u64)keys.key[i] << 32 | keys.low[i], b = (u64)keys.key[j] << 32 | keys.low[j];
    const u64 first = a < b ? b : a, second = a < b ? a : b;
    keys.key[i] = (u32)(first >> 32), keys.low[i] = (u32)first;
    keys.key[j] = (u32)(second >> 32), keys.low[j] = (u32)second;
#endif
}

// Batcher's odd-even merge sort of the run from `at` on, the best first.
DEV void sort_run(Keys &keys, int at) {
#define ORDER(i, j) if (j < RUN) order(keys, at + (i < RUN ? i : 0), at + (j < RUN ? j : 0))
    ORDER(0, 1); ORDER(2, 3); ORDER(4, 5); ORDER(6, 7);
    ORDER(0, 2); ORDER(1, 3); ORDER(4, 6); ORDER(5, 7);
    ORDER(1, 2); ORDER(5, 6);
    ORDER(0, 4); ORDER(1, 5); ORDER(2, 6); ORDER(3, 7);
    ORDER(2, 4); ORDER(3, 5);
    if (RUN == 8) { ORDER(1, 2); ORDER(3, 4); ORDER(5, 6); }
#undef ORDER
}

// What was chosen for a token: lane j < TOP_K holds the j-th.
struct Chosen {
    u32 key, expert;
    u32 first;      // the best key of all
    float highest;  // logit, where groups keep it from being the first
};

DEV void take_best(Keys &keys, u32 lane, Chosen &chosen) {
    chosen.key = chosen.expert = 0;
#pragma unroll (TOP_K <= 8 && RUNS <= 2 ? TOP_K : 1)
    for (u32 k = 0; k < TOP_K; k++) {
        u32 top = keys.key[0];
#pragma unroll
        for (int r = 1; r < RUNS; r++) top = max(top, keys.key[r * RUN]);
        const u32 best = __reduce_max_sync(FULL, top);
#if !SHORT_KEYS
        // Of equal keys the lowest lane's is that of the lowest expert, and in a lane the first run's.
        u32 low = 0;
#pragma unroll
        for (int r = RUNS - 1; r >= 0; r--)
            if (keys.key[r * RUN] == best) low = keys.low[r * RUN];
        const u32 winner = __ffs(__ballot_sync(FULL, top == best)) - 1;
        const u32 best_low = __shfl_sync(FULL, low, winner);
#endif
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
#if SHORT_KEYS
            if (keys.key[r * RUN] != best) continue;
#else
            if (lane != winner || keys.key[r * RUN] != best || keys.low[r * RUN] != low) continue;
#endif
#pragma unroll
            for (int i = r * RUN; i + 1 < (r + 1) * RUN; i++) {
                keys.key[i] = keys.key[i + 1];
#if !SHORT_KEYS
                keys.low[i] = keys.low[i + 1];
#endif
            }
            keys.key[(r + 1) * RUN - 1] = 0;
        }
        if (k == 0) chosen.first = best;
        if (lane == k) {
            chosen.key = best;
#if SHORT_KEYS
            chosen.expert = 0xffffu - (best & 0xffffu);
#else
            chosen.expert = FULL - best_low;
#endif
        }
    }
}

// The experts of the row that lies in `raw`.
DEV Chosen choose_experts(const raw_t raw[PER_LANE], const float *bias, u32 lane) {
    Keys keys;
    Chosen chosen;
#if SHORT_KEYS
    u32 pair = 0;
#endif
#if BIAS || GROUPS > 1
    float score[PER_LANE];
#endif
#pragma unroll
    for (int i = 0; i < RUNS * RUN; i++) {
        const u32 e = lane * PER_LANE + i;
        const bool there = i < PER_LANE && (EXPERTS % 32 == 0 || e < EXPERTS);
        const raw_t given = i < PER_LANE ? raw[i] : (raw_t)0;
#if BIAS || GROUPS > 1
        float x = number_of(given);
#if BIAS
        if (there && x == x) x = __fadd_rn(sigmoid32(x), bias[e]);
#endif
        if (i < PER_LANE) score[i] = x;
#endif
#if BIAS
        keys.key[i] = there ? key_of(x) : 0;
#elif !SHORT_KEYS
        keys.key[i] = there ? key_of(number_of(given)) : 0;
#else
        const u32 next = i + 1 < PER_LANE ? (u32)raw[i + 1] << 16 : 0;
        if (i % 2 == 0) pair = short_keys(given | next);
        keys.key[i] = there ? __byte_perm(0xffffu - e, pair, i % 2 == 0 ? 0x5410 : 0x7610) : 0;
#endif
#if !SHORT_KEYS
        keys.low[i] = FULL - e;
#endif
    }
#if GROUPS > 1
    const u32 allowed = best_groups(score, lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (!(allowed >> (lane * PER_LANE + i) / GROUP_SIZE % 32 & 1)) keys.key[i] = 0;
#if !SIGMOID
    float x = -__int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (EXPERTS % 32 == 0 || lane * PER_LANE + i < EXPERTS) x = fmaxf(x, number_of(raw[i]));  // past NaN
    chosen.highest = number_of_key(__reduce_max_sync(FULL, key_of(x)));
#endif
#endif
#pragma unroll
    for (int r = 0; r < RUNS; r++) sort_run(keys, r * RUN);
    take_best(keys, lane, chosen);
    return chosen;
}

// The weight of what the lane holds; with `every`, each lane also gets the shares of its experts.
DEV float weigh(
    const raw_t raw[PER_LANE], const raw_t *row, const Chosen &chosen, float scale, u32 lane, float *every) {
#if BIAS
    const float x = lane < TOP_K ? number_of(row[chosen.expert]) : 0.f;
#elif SHORT_KEYS
    const float x = number_of_short_key(chosen.key);
#else
    const float x = chosen.key == 1 ? __int_as_float(0x7fffffff) : number_of_key(chosen.key);
#endif
#if SIGMOID
    const float highest = 0.f;
#elif GROUPS > 1
    const float highest = chosen.highest;
#elif SHORT_KEYS
    const float highest = number_of_short_key(chosen.first);
#else
    const float highest = chosen.first == 1 ? -__int_as_float(0x7f800000) : number_of_key(chosen.first);
#endif
    const float part = lane < TOP_K ? part_of(x, highest) : 0.f;
    float total = 1.f;
    if (every || (!SIGMOID && !RENORM)) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float f = lane * PER_LANE + i < EXPERTS ? part_of(number_of(raw[i]), highest) : 0.f;
            if (every) every[i] = f;
            sum = __fadd_rn(sum, f);
        }
        sum = sum_lanes<32>(sum);
        if (!SIGMOID) total = sum;
        if (every) {
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) every[i] = sum > 0.f ? __fdiv_rn(every[i], sum) : 0.f;
        }
    }
    if (RENORM) {
        total = sum_lanes<power_of_two(TOP_K)>(part);
        if (SIGMOID) total = __fadd_rn(total, 1e-20f);
    }
    return total > 0.f ? __fmul_rn(__fdiv_rn(part, total), scale) : 0.f;
}
