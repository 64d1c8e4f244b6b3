// One warp chooses the experts of one token: scores, groups, top k, weights.  docs/routing.md has the equations.
//
//   EXPERTS, TOP_K  at most 2,048 and 32; expert e belongs to lane e / PER_LANE
//   LOGITS  0 float32, 1 bfloat16, 2 float16      VECTORS  E = 32 * PER_LANE; rows and bias are aligned for vectors
//   SCORING  0 softmax, 1 sigmoid, 2 sqrtsoftplus      RENORM  weights are divided by their sum      BIAS  0 none, 1 float32
//   GROUPS, TOP_GROUPS  at most 32 groups
//   REPLAY  0 experts are chosen; 32, 64 they are read, as ints of so many bits, and BIAS is 0 and GROUPS 1
//   EXPERT_SCALE  0 none, else a factor of each expert's weight: 1 float32, 2 bfloat16, 3 float16
//   SPLIT  1, or 4: a CTA has so many warps and one token, whose scores they share; BIAS is 1 and E a multiple of 128
//   SHARED  at most 32 experts that every valid token takes behind its TOP_K, with weight 1: EXPERTS and on
//   EXP32_*, LOG1P_*, FLOAT_MAX, NEAR_ZERO, TINY  bits of the float32 constants in moealign.backend.reference.route
//
// Experts are compared by keys: a u32 that sorts as the float does.  NaN is 1, below every number; 0 cannot be chosen.
// For 16-bit logits the key's lower half is 0xffff - expert, so one reduction gives value and expert.

#include "types.cuh"

#define PER_LANE ((EXPERTS + 31) / 32)
#define SHORT_KEYS (LOGITS != 0 && !BIAS)
#define GROUP_SIZE (EXPERTS / GROUPS)
#define SOFTMAX (SCORING == 0)
#define HIGHEST (SOFTMAX && (BIAS || GROUPS > 1))  // the highest logit may not be the first that is selected
#define COLUMNS (TOP_K + SHARED)                   // of weights and ids
#define SPLIT_KEYS (SPLIT > 1 && GROUPS == 1)      // warps share the scores' keys: no group's sum needs the scores
#define PART (PER_LANE / SPLIT)                    // scores that a lane computes

#if PER_LANE > 32
typedef u64 bits_t;  // a bit for each expert of a lane
#else
typedef u32 bits_t;
#endif

// The bits of a float: TYPE 0 float32, 1 bfloat16, 2 float16.
template <int TYPE> struct Bits { typedef u16 type; };
template <> struct Bits<0> { typedef u32 type; };
template <int TYPE> DEV float float_of(typename Bits<TYPE>::type raw) {
    if (TYPE == 0) return __uint_as_float(raw);
    if (TYPE == 1) return __uint_as_float((u32)raw << 16);
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)raw));
    return x;
}
typedef Bits<LOGITS>::type raw_t;
DEV float to_float(raw_t raw) { return float_of<LOGITS>(raw); }

#if REPLAY == 64
typedef i64 replay_t;
#else
typedef int replay_t;
#endif
#define FACTOR_TYPE (EXPERT_SCALE ? EXPERT_SCALE - 1 : 0)
typedef Bits<FACTOR_TYPE>::type factor_t;

// What options read.  A kernel has these parameters, at its end, only if it has such an option.
struct Options {
    const replay_t *replay;   // tokens x TOP_K
    const factor_t *factors;  // EXPERTS
};
#if REPLAY || EXPERT_SCALE
#define OPTION_PARAMETERS , const replay_t *__restrict__ replay, const factor_t *__restrict__ factors
#define OPTIONS Options{replay, factors}
#else
#define OPTION_PARAMETERS
#define OPTIONS Options{nullptr, nullptr}
#endif

DEV u32 to_key(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(x, 0.f));  // -0 becomes +0
    return x != x ? 1u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEV float key_to_float(u32 key) {  // the key is a number's: not 0 or 1
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

#if SHORT_KEYS
DEV u32 sign_masks(u32 pair) {  // all bits of each 16-bit half whose sign bit is set
    u32 signs;
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(signs) : "r"(pair));
    return signs;
}
// The upper halves of the keys of two logits in a word.  A positive number has its sign bit flipped; a negative one has
// all bits flipped and 1 added, so that -0 equals +0.
DEV u32 short_keys(u32 pair) {
    constexpr u32 EACH = 0x00010001u, PAST_FINITE = 0x7fffu - (LOGITS == 1 ? 0x7f80u : 0x7c00u);
    const u32 negative = sign_masks(pair), nan = sign_masks((pair & 0x7fff7fffu) + PAST_FINITE * EACH);
    const u32 keys = (pair ^ (negative | 0x80008000u)) + (negative & EACH);
    return (keys & ~nan) | (nan & EACH);
}
DEV float short_key_to_float(u32 key) {
    const u32 half = key >> 16;
    return to_float((raw_t)(half & 0x8000u ? half ^ 0x8000u : ~(half - 1u)));
}
#endif

#define FLOAT(bits) __int_as_float(bits)

// moealign.backend.reference.route.exp32, sigmoid32, sqrtsoftplus32 and softmax32, operation for operation.
// Without branches: the lanes of a warp stay together, and loads can move across.
DEV float exp32(float x) {
    const bool far = x < -FLOAT(EXP32_FAR);
    x = fminf(fmaxf(x, -FLOAT(EXP32_FAR)), FLOAT(EXP32_FAR));
    const float n = floorf(__fadd_rn(__fmul_rn(x, FLOAT(EXP32_INVERSE_LN2)), .5f));
    float r = __fsub_rn(x, __fmul_rn(n, FLOAT(EXP32_LN2_HIGH)));
    r = __fsub_rn(r, __fmul_rn(n, FLOAT(EXP32_LN2_LOW)));
    float y = FLOAT(EXP32_C0);
    y = __fadd_rn(__fmul_rn(y, r), FLOAT(EXP32_C1));
    y = __fadd_rn(__fmul_rn(y, r), FLOAT(EXP32_C2));
    y = __fadd_rn(__fmul_rn(y, r), FLOAT(EXP32_C3));
    y = __fadd_rn(__fmul_rn(y, r), FLOAT(EXP32_C4));
    y = __fadd_rn(__fmul_rn(y, r), FLOAT(EXP32_C5));
    y = __fadd_rn(__fadd_rn(__fmul_rn(y, __fmul_rn(r, r)), r), 1.f);
    y = __fmul_rn(y, __uint_as_float((u32)((int)n + 127) << 23));
    return far ? 0.f : y;
}

// 1 / x to the bit for x in [1, 2**126).
DEV float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return __fmaf_rn(__fmaf_rn(-x, r, 1.f), r, r);
}

// x / y to the bit, given 1 / y; y in [1, 2**12], x 0 or in [2**-126, 1], and 2**-100 <= x unless y is a power of two.
// A quotient that is off by a unit at most is rounded right by one more step (Markstein), if the remainder is exact.
DEV float quotient(float x, float y, float reciprocal_of_y) {
    float q = __fmul_rn(x, reciprocal_of_y);
    q = __fmaf_rn(__fmaf_rn(-y, q, x), reciprocal_of_y, q);
    return __fmaf_rn(__fmaf_rn(-y, q, x), reciprocal_of_y, q);
}

// The square root to the bit, for positive numbers that are no subnormals.
DEV float root(float x) {
    const bool small = x < __int_as_float((127 - 60) << 23);  // whose remainder would be a subnormal
    x = small ? __fmul_rn(x, __int_as_float((127 + 64) << 23)) : x;
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    float y = __fmul_rn(x, r);
    y = __fmaf_rn(__fmaf_rn(-y, y, x), __fmul_rn(r, .5f), y);
    return small ? __fmul_rn(y, __int_as_float((127 - 32) << 23)) : y;
}

DEV float sigmoid32(float x) {
    const float y = reciprocal(__fadd_rn(1.f, exp32(-x)));
    return x >= -FLOAT(EXP32_FAR) ? y : 0.f;
}

DEV float sqrtsoftplus32(float x) {
    const bool far = !(x >= -FLOAT(EXP32_FAR));
    x = fminf(x, FLOAT(FLOAT_MAX));
    const float t = exp32(-fabsf(x)), d = __fadd_rn(t, 2.f), z = quotient(t, d, reciprocal(d)), w = __fmul_rn(z, z);
    float y = __fadd_rn(__fmul_rn(FLOAT(LOG1P_0), w), FLOAT(LOG1P_1));
    y = __fadd_rn(__fmul_rn(y, w), FLOAT(LOG1P_2));
    y = __fadd_rn(__fmul_rn(y, w), FLOAT(LOG1P_3));
    y = __fadd_rn(__fadd_rn(z, z), __fmul_rn(z, __fmul_rn(w, y)));
    return far ? 0.f : root(x > 0.f ? __fadd_rn(y, x) : y);
}

// The numerator of a weight: of the softmax, or the score.
DEV float numerator(float x, float highest) {
#if SCORING == 1
    return sigmoid32(x);
#elif SCORING == 2
    return sqrtsoftplus32(x);
#else
    const float y = exp32(__fsub_rn(x, highest));
    return x != x ? 0.f : x == highest ? 1.f : y;
#endif
}

// The sum over LANES neighbouring lanes, a power of two.
template <int LANES> DEV float sum_lanes(float x) {
#pragma unroll
    for (int d = LANES / 2; d; d /= 2) x = __fadd_rn(x, __shfl_xor_sync(FULL, x, d));
    return x;
}
static __device__ constexpr int power_of_two(int v) { return v <= 1 ? 1 : 2 * power_of_two((v + 1) / 2); }

// Load the PER_LANE logits or biases of lane `lane` into an array that is aligned to 16 bytes; entries past E are 0.
template <class T> DEV void load_row(const T *row, u32 lane, T to[PER_LANE]) {
#if VECTORS
    constexpr int BYTES = PER_LANE * sizeof(T);
    const T *from = row + lane * PER_LANE;
    if (BYTES % 16 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
        return;
    }
    if (BYTES % 8 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 8; i++) ((uint2 *)to)[i] = ((const uint2 *)from)[i];
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) to[i] = lane * PER_LANE + i < EXPERTS ? row[lane * PER_LANE + i] : (T)0;
}

#if HIGHEST || (SOFTMAX && REPLAY)
// The highest of a value of each lane; no NaN.
DEV float highest_of_lanes(float x) { return key_to_float(__reduce_max_sync(FULL, to_key(x))); }

// The highest logit; -inf if none is a number.
DEV float highest_logit(const raw_t raw[PER_LANE], u32 lane) {
    float x = -__int_as_float(0x7f800000);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (EXPERTS % 32 == 0 || lane * PER_LANE + i < EXPERTS) x = fmaxf(x, to_float(raw[i]));  // ignores NaN
    return highest_of_lanes(x);
}
#endif

#if SPLIT > 1
static_assert(SPLIT == 4 && BIAS && EXPERTS % 128 == 0, "a lane has as many experts as another, whole vectors");
static_assert(THREADS == 32 * SPLIT, "the CTA has one token");

// A number for each expert, those of a lane LANE_WORDS behind those of the lane before it: an odd number of vectors, so
// that no two lanes that read theirs together meet in a bank.
#define LANE_WORDS (PER_LANE | 4)
struct __align__(16) PerExpert { float of[32 * LANE_WORDS]; };

// What the warps tell each other.  A word is written by one thread, once, and read behind the next barrier.
__shared__ PerExpert split_scores;  // or their keys
#if SOFTMAX
__shared__ uint2 split_sums[SPLIT];  // of each warp's numerators: upper and lower half
#if !RENORM
__shared__ PerExpert split_numerators;
__shared__ float split_highest;  // the highest logit
#endif
#endif

// Expert `i` of those whose scores the warp computes: neighbouring lanes have neighbouring experts.
DEV u32 expert_of_part(int i, u32 lane) { return (warp_id() * PART + i) * 32 + lane; }

DEV void write_part(const float part[PART], u32 lane, PerExpert &to) {
#pragma unroll
    for (int i = 0; i < PART; i++) {
        const u32 e = expert_of_part(i, lane);
        to.of[e + e / PER_LANE * (LANE_WORDS - PER_LANE)] = part[i];
    }
}

// What the warps wrote of the lane's experts.
DEV void read_parts(const PerExpert &from, u32 lane, float to[PER_LANE]) {
#pragma unroll
    for (int i = 0; i < PER_LANE; i += 4) {
        const float4 v = *(const float4 *)(from.of + lane * LANE_WORDS + i);
        to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
}
#endif

#if SOFTMAX && BIAS
// softmax32 of logits.  The sum is in units of 2**-40, its halves of 20 bits apart: each fits 32 bits.
DEV void probabilities(const raw_t raw[PART], float highest, u32 lane, float p[PART]) {
    u32 upper = 0, lower = 0;
#pragma unroll
    for (int i = 0; i < PART; i++) {
        p[i] = EXPERTS % 32 == 0 || lane * PER_LANE + i < EXPERTS ? numerator(to_float(raw[i]), highest) : 0.f;
        const float scaled = __fmul_rn(p[i], 1048576.f);
        const u32 whole = __float2uint_rz(scaled);
        upper += whole;
        lower += __float2uint_rz(__fmul_rn(__fsub_rn(scaled, __uint2float_rn(whole)), 1048576.f));
    }
    upper = __reduce_add_sync(FULL, upper), lower = __reduce_add_sync(FULL, lower);
#if SPLIT > 1
#if !RENORM
    write_part(p, lane, split_numerators);
    if (threadIdx.x == 0) split_highest = highest;
#endif
    if (lane == 0) split_sums[warp_id()] = make_uint2(upper, lower);
    __syncthreads();
    upper = lower = 0;
#pragma unroll
    for (int w = 0; w < SPLIT; w++) upper += split_sums[w].x, lower += split_sums[w].y;
#endif
    const u64 sum = ((u64)upper << 20) + lower;
    const float total = __fmul_rn(__ull2float_rn(sum), __int_as_float((127 - 40) << 23)), inverse = reciprocal(total);
#pragma unroll
    for (int i = 0; i < PART; i++) p[i] = p[i] >= FLOAT(NEAR_ZERO) ? quotient(p[i], total, inverse) : 0.f;
}
#endif

// By what experts are chosen, given their logits and biases.
DEV void scores_of(const raw_t raw[PART], const float correction[PART], float highest, u32 lane, float score[PART]) {
#if BIAS && SOFTMAX
    probabilities(raw, highest, lane, score);
#elif BIAS
#pragma unroll
    for (int i = 0; i < PART; i++) score[i] = numerator(to_float(raw[i]), 0.f);
#endif
#pragma unroll
    for (int i = 0; i < PART; i++) {
        const float x = to_float(raw[i]);
#if BIAS
        score[i] = x == x ? __fadd_rn(score[i], correction[i]) : x;
#else
        score[i] = x;
#endif
    }
}

// The warp's part of the scores of a token; nothing to do unless warps share them.
struct Part {
#if SPLIT > 1
    raw_t raw[PART];
    float correction[PART];

    __device__ __forceinline__ void load(const raw_t *row, const float *bias, u32 lane) {
#pragma unroll
        for (int i = 0; i < PART; i++) {
            raw[i] = row[expert_of_part(i, lane)];
            correction[i] = bias[expert_of_part(i, lane)];
        }
    }

    // Compute it, and wait for that of the other warps: for every thread of the CTA.
    __device__ __forceinline__ void share(const raw_t raw_of_lane[PER_LANE], u32 lane) const {
        float score[PART], highest = 0.f;
#if SOFTMAX
        highest = highest_logit(raw_of_lane, lane);
#endif
        scores_of(raw, correction, highest, lane, score);
#pragma unroll
        for (int i = 0; i < PART; i++)
            if (SPLIT_KEYS) score[i] = __uint_as_float(to_key(score[i]));
        write_part(score, lane, split_scores);
        __syncthreads();
    }
#else
    __device__ __forceinline__ void load(const raw_t *, const float *, u32) {}
    __device__ __forceinline__ void share(const raw_t *, u32) const {}
#endif
};

#if GROUPS > 1
// The best TOP_GROUPS groups, a bit each.
DEV u32 best_groups(const float score[PER_LANE], u32 lane) {
    u32 mine = 0;  // the key of group `lane`
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
        const u32 key = to_key(BIAS && GROUP_SIZE > 1 ? __fadd_rn(first, second) : first);
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
// Each lane sorts its experts in runs of at most eight.  Then the best head of all runs is taken, TOP_K times.

#define RUN (PER_LANE <= 1 ? 1 : PER_LANE == 2 ? 2 : PER_LANE <= 4 ? 4 : 8)
#define RUNS ((PER_LANE + 7) / 8)

// Put the better of two keys at `i`.
DEV void sort_pair(u32 keys[RUNS * RUN], int i, int j) {
    const u32 a = keys[i], b = keys[j];
    keys[i] = max(a, b), keys[j] = min(a, b);
}

// Sort the run that starts at `at`, best first: Batcher's odd-even merge sort.
DEV void sort_run(u32 keys[RUNS * RUN], int at) {
#define SORT(i, j) if (j < RUN) sort_pair(keys, at + (i < RUN ? i : 0), at + (j < RUN ? j : 0))
    SORT(0, 1); SORT(2, 3); SORT(4, 5); SORT(6, 7);
    SORT(0, 2); SORT(1, 3); SORT(4, 6); SORT(5, 7);
    SORT(1, 2); SORT(5, 6);
    SORT(0, 4); SORT(1, 5); SORT(2, 6); SORT(3, 7);
    SORT(2, 4); SORT(3, 5);
    if (RUN == 8) { SORT(1, 2); SORT(3, 4); SORT(5, 6); }
#undef SORT
}

// The experts of a token: lane j < TOP_K holds the j-th.
struct Selected {
    u32 key, expert;
    u32 first;      // the best key
    float highest;  // the highest logit, if HIGHEST
};

// `given`: the lane's keys before they were sorted.
DEV void select_top_k(u32 keys[RUNS * RUN], const u32 given[PER_LANE], u32 lane, Selected &selected) {
    selected.key = selected.expert = 0;
    u32 holders = 0;  // the lanes that had the key: of equal keys the lowest lane has the lowest expert
#pragma unroll (TOP_K <= 8 && RUNS <= 2 ? TOP_K : 1)
    for (u32 k = 0; k < TOP_K; k++) {
        u32 top = keys[0];
#pragma unroll
        for (int r = 1; r < RUNS; r++) top = max(top, keys[r * RUN]);
        const u32 best = __reduce_max_sync(FULL, top);
#if !SHORT_KEYS
        const u32 equal = __ballot_sync(FULL, top == best);
        bool mine = top == best && !(equal & lanes_below(lane));
        if (lane == k) holders = equal;
#endif
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
#if !SHORT_KEYS
            if (!mine) continue;
#endif
            if (keys[r * RUN] != best) continue;
#if !SHORT_KEYS
            mine = false;
#endif
#pragma unroll
            for (int i = r * RUN; i + 1 < (r + 1) * RUN; i++) keys[i] = keys[i + 1];
            keys[(r + 1) * RUN - 1] = 0;
        }
        if (k == 0) selected.first = best;
        if (lane == k) selected.key = best;
    }
#if SHORT_KEYS
    if (lane < TOP_K) selected.expert = 0xffffu - (selected.key & 0xffffu);
#else
    // Which expert of that lane?  Equal keys of a lane were taken one after the other: the n-th is its n-th such expert.
    const u32 from = holders ? __ffs(holders) - 1 : 0;
    const u32 key_before = __shfl_up_sync(FULL, selected.key, 1), from_before = __shfl_up_sync(FULL, from, 1);
    const u32 again = __ballot_sync(FULL, lane > 0 && key_before == selected.key && from_before == from);
    bits_t same = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) same |= (bits_t)(__shfl_sync(FULL, given[i], from) == selected.key) << i;
    const u32 first = 31 - __clz(~again & (FULL >> (31 - lane)));
#pragma unroll 1
    for (u32 n = lane < TOP_K ? lane - first : 0; n; n--) same &= same - 1;
    if (lane < TOP_K) selected.expert = from * PER_LANE + __ffsll(same) - 1;
#endif
}

// The experts of the row in `raw`; with SPLIT, behind Part::share.
DEV Selected select_experts(const raw_t raw[PER_LANE], const float *bias, u32 lane) {
    u32 keys[RUNS * RUN];
    Selected selected;
    float score[PER_LANE];  // by which experts are chosen
#if SPLIT > 1
    read_parts(split_scores, lane, score);
#if SOFTMAX && !RENORM
    selected.highest = split_highest;
#endif
#else
    __align__(16) float correction[PER_LANE];
    selected.highest = 0.f;
#if BIAS
    load_row(bias, lane, correction);  // early, for what it waits
#if SOFTMAX
    selected.highest = highest_logit(raw, lane);
#endif
#endif
    scores_of(raw, correction, selected.highest, lane, score);
#endif
#if SHORT_KEYS
    u32 pair = 0;
#endif
#pragma unroll
    for (int i = 0; i < RUNS * RUN; i++) {
        const u32 e = lane * PER_LANE + i, at = i < PER_LANE ? i : 0;
        const bool exists = i < PER_LANE && (EXPERTS % 32 == 0 || e < EXPERTS);
#if SHORT_KEYS
        const u32 next = i + 1 < PER_LANE ? (u32)raw[i + 1] << 16 : 0;
        if (i % 2 == 0) pair = short_keys(raw[at] | next);
        keys[i] = exists ? __byte_perm(0xffffu - e, pair, i % 2 == 0 ? 0x5410 : 0x7610) : 0;
#else
        keys[i] = exists ? (SPLIT_KEYS ? __float_as_uint(score[at]) : to_key(score[at])) : 0;
#endif
    }
#if GROUPS > 1
    const u32 allowed = best_groups(score, lane);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (!(allowed >> (lane * PER_LANE + i) / GROUP_SIZE % 32 & 1)) keys[i] = 0;
#if HIGHEST && !BIAS
    selected.highest = highest_logit(raw, lane);
#endif
#endif
    u32 given[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) given[i] = keys[i];
#pragma unroll
    for (int r = 0; r < RUNS; r++) sort_run(keys, r * RUN);
    select_top_k(keys, given, lane, selected);
    return selected;
}

// The experts of number `token`, whose row is in `raw`: chosen, or read, and then FULL for what is no expert.
DEV Selected experts_of(const raw_t raw[PER_LANE], const float *bias, Options options, u32 token, u32 lane) {
#if REPLAY
    Selected selected = {};
    const replay_t id = lane < TOP_K ? options.replay[token * TOP_K + lane] : -1;
    selected.expert = id >= 0 && id < EXPERTS ? (u32)id : FULL;
    return selected;
#else
    return select_experts(raw, bias, lane);
#endif
}

// The weight of the lane's expert; in `shares`, unless it is null, the shares of all experts of the lane.
DEV float weight_of(
    const raw_t raw[PER_LANE], const raw_t *row, const Selected &selected, float scale, Options options, u32 lane,
    float *shares) {
    const bool is_expert = (REPLAY || lane < TOP_K) && selected.expert < EXPERTS;  // other lanes read none
#if EXPERT_SCALE
    // Read ahead of the sums below, which hide most of its latency.
    const float factor = is_expert ? float_of<FACTOR_TYPE>(options.factors[selected.expert]) : 0.f;
#else
    const float factor = 1.f;
#endif
#if REPLAY
    const float x = is_expert ? to_float(row[selected.expert]) : __int_as_float(0x7fffffff);
#elif BIAS
    const float x = lane < TOP_K ? to_float(row[selected.expert]) : 0.f;
#elif SHORT_KEYS
    const float x = short_key_to_float(selected.key);
#else
    const float x = selected.key == 1 ? __int_as_float(0x7fffffff) : key_to_float(selected.key);
#endif
#if !SOFTMAX
    const float highest = 0.f;
#elif REPLAY
    const float highest = shares || !RENORM ? highest_logit(raw, lane) : 0.f;
#elif HIGHEST
    const float highest = selected.highest;
#elif SHORT_KEYS
    const float highest = short_key_to_float(selected.first);
#else
    const float highest = selected.first == 1 ? -__int_as_float(0x7f800000) : key_to_float(selected.first);
#endif
#if SOFTMAX && (BIAS || REPLAY) && RENORM
    const float of_chosen = highest_of_lanes(lane < TOP_K && x == x ? x : -__int_as_float(0x7f800000));
#else
    const float of_chosen = highest;
#endif
    const float part = lane < TOP_K ? numerator(x, of_chosen) : 0.f;
    float total = 1.f;
    if (shares || (SOFTMAX && !RENORM)) {
        float sum = 0.f;
#if SPLIT > 1 && SOFTMAX && !RENORM
        float numerators[PER_LANE];
        read_parts(split_numerators, lane, numerators);
#endif
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
#if SPLIT > 1 && SOFTMAX && !RENORM
            const float f = numerators[i];
#else
            const float f = lane * PER_LANE + i < EXPERTS ? numerator(to_float(raw[i]), highest) : 0.f;
#endif
            if (shares) shares[i] = f;
            sum = __fadd_rn(sum, f);
        }
        sum = sum_lanes<32>(sum);
        if (SOFTMAX) total = sum;
        if (shares) {
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) shares[i] = sum > 0.f ? __fdiv_rn(shares[i], sum) : 0.f;
        }
    }
    if (RENORM) {
        total = sum_lanes<power_of_two(TOP_K)>(part);
        if (!SOFTMAX) total = __fadd_rn(total, FLOAT(TINY));
    }
    const float weight = total > 0.f ? __fmul_rn(__fdiv_rn(part, total), scale) : 0.f;
    if (REPLAY && !is_expert) return 0.f;  // even if the scale is infinite
    return EXPERT_SCALE ? __fmul_rn(weight, factor) : weight;
}

// Write the weights and ids of a token's shared experts, 0 and -1 if it is not valid.  Its row starts at `row`.
DEV void write_shared(u32 row, bool valid, u32 lane, float *weights, int *ids) {
#if SHARED
    if (lane < SHARED) {
        weights[row + TOP_K + lane] = valid ? 1.f : 0.f;
        ids[row + TOP_K + lane] = valid ? (int)(EXPERTS + lane) : -1;
    }
#endif
}
