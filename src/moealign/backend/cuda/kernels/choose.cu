// The router alone: a warp a token; docs/routing.md has the equations, choose.cuh the macros of a token.
//
//   KERNEL_choose       weights and ids of every token
//   KERNEL_choose_mean  cooperative: the same, and the mean of every expert's share over the valid tokens; each CTA adds
//                       up its tokens in order, and behind one grid barrier the CTAs' sums are added in order
//
//   THREADS of a CTA    NVALID  rows from *nvalid on get ids -1 and weights 0
//   EARLY     choose: what follows in the stream may start when this starts, else when a CTA has nearly ended; it has to
//             wait before it touches memory
//
// Every parameter is 8 bytes.

#include "choose.cuh"
#ifdef KERNEL_choose_mean
#include "barrier.cuh"
#endif

#define WARPS (THREADS / 32)

DEV void let_the_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEV u32 limit_of(const int *nvalid, u32 tokens) {
#if NVALID
    const int v = *nvalid;
    return v < 0 ? 0u : min((u32)v, tokens);
#else
    return tokens;
#endif
}

#ifdef KERNEL_choose
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const raw_t *__restrict__ logits, const float *__restrict__ bias, const int *__restrict__ nvalid,
    float *__restrict__ weights, int *__restrict__ ids, i64 tokens64, i64 row_stride, i64 scale_bits) {
    if (EARLY) let_the_next_begin();
    const u32 lane = threadIdx.x & 31, token = blockIdx.x * WARPS + (threadIdx.x >> 5), tokens = (u32)tokens64;
    if (token >= tokens) return;
    const raw_t *row = logits + (i64)token * row_stride;
    __align__(16) raw_t raw[PER_LANE];
    load_logits(row, lane, raw);
    const Chosen chosen = choose_experts(raw, bias, lane);
    if (!EARLY) let_the_next_begin();
    float weight = weigh(raw, row, chosen, __int_as_float((int)scale_bits), lane, nullptr);
    int expert = (int)chosen.expert;
    if (NVALID && token >= limit_of(nvalid, tokens)) expert = -1, weight = 0.f;
    if (lane < TOP_K) {
        weights[token * TOP_K + lane] = weight;
        ids[token * TOP_K + lane] = expert;
    }
}
#endif

#ifdef KERNEL_choose_mean
// partial: [CTAs][EXPERTS].
extern "C" __global__ void __launch_bounds__(THREADS) choose_mean(
    const raw_t *__restrict__ logits, const float *__restrict__ bias, const int *__restrict__ nvalid,
    float *__restrict__ weights, int *__restrict__ ids, i64 tokens64, i64 row_stride, i64 scale_bits,
    float *__restrict__ mean, float *partial) {
    __shared__ float sums[WARPS * EXPERTS];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tokens = (u32)tokens64;
    const u32 limit = limit_of(nvalid, tokens);
    Barrier barrier = Barrier::begin();
    float mine[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) mine[i] = 0.f;
#pragma unroll 1
    for (u32 token = blockIdx.x * WARPS + warp; token < tokens; token += gridDim.x * WARPS) {
        const raw_t *row = logits + (i64)token * row_stride;
        __align__(16) raw_t raw[PER_LANE];
        load_logits(row, lane, raw);
        const Chosen chosen = choose_experts(raw, bias, lane);
        float every[PER_LANE], weight = weigh(raw, row, chosen, __int_as_float((int)scale_bits), lane, every);
        int expert = (int)chosen.expert;
        const bool live = token < limit;
        if (!live) expert = -1, weight = 0.f;
        if (lane < TOP_K) {
            weights[token * TOP_K + lane] = weight;
            ids[token * TOP_K + lane] = expert;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) mine[i] = __fadd_rn(mine[i], live ? every[i] : 0.f);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (lane * PER_LANE + i < EXPERTS) sums[warp * EXPERTS + lane * PER_LANE + i] = mine[i];
    __syncthreads();
    for (u32 e = threadIdx.x; e < EXPERTS; e += THREADS) {
        float sum = 0.f;
        for (u32 w = 0; w < WARPS; w++) sum = __fadd_rn(sum, sums[w * EXPERTS + e]);
        __stcg(&partial[blockIdx.x * EXPERTS + e], sum);
    }
    barrier.sync();
    // A warp an expert.
    for (u32 e = blockIdx.x * WARPS + warp; e < EXPERTS; e += gridDim.x * WARPS) {
        float sum = 0.f;
        for (u32 c = lane; c < gridDim.x; c += 32) sum = __fadd_rn(sum, __ldcg(&partial[c * EXPERTS + e]));
        sum = sum_lanes<32>(sum);
        if (lane == 0) mean[e] = __fdiv_rn(sum, (float)max(limit, 1u));
    }
}
#endif
