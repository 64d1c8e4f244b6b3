// The router alone: a warp chooses the experts of one token.  docs/routing.md has the equations, router.cuh the macros.
//
//   MEAN  0 compiles `topk`, 1 compiles `topk_with_mean`
//   THREADS  threads per CTA
//   NVALID  num_valid is passed: tokens from *num_valid on get ids -1 and weights 0
//   PDL_LAUNCH_EARLY  topk: the next kernel in the stream may start when this one starts, otherwise when its last CTA
//             has chosen its experts; that kernel must wait before it touches memory
//
// Every parameter is 8 bytes.

#include "types.cuh"
#include "router.cuh"
#include "barrier.cuh"

#define WARPS (THREADS / 32)

static_assert(!MEAN || SPLIT == 1, "a warp has all logits of which it computes shares");

// Allow the next kernel in the stream to start, if it was launched to overlap with this one.
DEV void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEV u32 valid_tokens(const int *num_valid, u32 tokens) {
#if NVALID
    const int v = *num_valid;
    return v < 0 ? 0u : min((u32)v, tokens);
#else
    return tokens;
#endif
}

#if !MEAN

// Weights and ids of every token.
// Launch: SPLIT warps per token, so cdiv(SPLIT * tokens, WARPS) CTAs of THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS) topk(
    // Inputs: tokens x EXPERTS, row_stride elements apart; EXPERTS or null; 1 or null.
    const raw_t *__restrict__ logits, const float *__restrict__ bias, const int *__restrict__ num_valid,
    // Outputs: both tokens x COLUMNS.
    float *__restrict__ weights, int *__restrict__ ids,
    // Sizes, and the bits of the float by which weights are scaled.
    i64 tokens64, i64 row_stride, i64 scale_bits OPTION_PARAMETERS) {
    if (PDL_LAUNCH_EARLY) launch_dependents();
    const u32 lane = lane_id(), token = (blockIdx.x * WARPS + warp_id()) / SPLIT, tokens = (u32)tokens64;
    if (token >= tokens) return;
    const raw_t *row = logits + (i64)token * row_stride;
    __align__(16) raw_t raw[PER_LANE];
    load_row(row, lane, raw);
    Part part;
    part.load(row, bias, lane);
    part.share(raw, lane);
    if (SPLIT > 1 && warp_id() > 0) return;  // one warp chooses
    const Selected selected = experts_of(raw, bias, OPTIONS, token, lane);
    if (!PDL_LAUNCH_EARLY) launch_dependents();
    float weight = weight_of(raw, row, selected, __int_as_float((int)scale_bits), OPTIONS, lane, nullptr);
    int expert = (int)selected.expert;
    const bool valid = !NVALID || token < valid_tokens(num_valid, tokens);
    if (!valid) expert = -1, weight = 0.f;
    if (lane < TOP_K) {
        weights[token * COLUMNS + lane] = weight;
        ids[token * COLUMNS + lane] = expert;
    }
    write_shared(token * COLUMNS, valid, lane, weights, ids);
}

#else

// Weights and ids of every token, and the mean of every expert's share over the valid tokens.  Each CTA sums over its
// tokens in order; behind one grid barrier the sums of the CTAs are added in order.
// Launch: cooperative, any number of CTAs of THREADS threads.
extern "C" __global__ void __launch_bounds__(THREADS) topk_with_mean(
    // Inputs, outputs and sizes, as of topk.
    const raw_t *__restrict__ logits, const float *__restrict__ bias, const int *__restrict__ num_valid,
    float *__restrict__ weights, int *__restrict__ ids, i64 tokens64, i64 row_stride, i64 scale_bits,
    // Output: EXPERTS.  Scratch: CTAs x EXPERTS.
    float *__restrict__ mean, float *partial OPTION_PARAMETERS) {
    __shared__ float sums[WARPS * EXPERTS];
    const u32 lane = lane_id(), warp = warp_id(), tokens = (u32)tokens64;
    const u32 limit = valid_tokens(num_valid, tokens);
    Barrier barrier = Barrier::begin();
    float sum_of_shares[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) sum_of_shares[i] = 0.f;
#pragma unroll 1
    for (u32 token = blockIdx.x * WARPS + warp; token < tokens; token += gridDim.x * WARPS) {
        const raw_t *row = logits + (i64)token * row_stride;
        __align__(16) raw_t raw[PER_LANE];
        load_row(row, lane, raw);
        const Selected selected = experts_of(raw, bias, OPTIONS, token, lane);
        float shares[PER_LANE];
        float weight = weight_of(raw, row, selected, __int_as_float((int)scale_bits), OPTIONS, lane, shares);
        int expert = (int)selected.expert;
        const bool valid = token < limit;
        if (!valid) expert = -1, weight = 0.f;
        if (lane < TOP_K) {
            weights[token * COLUMNS + lane] = weight;
            ids[token * COLUMNS + lane] = expert;
        }
        write_shared(token * COLUMNS, valid, lane, weights, ids);
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) sum_of_shares[i] = __fadd_rn(sum_of_shares[i], valid ? shares[i] : 0.f);
    }
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        if (lane * PER_LANE + i < EXPERTS) sums[warp * EXPERTS + lane * PER_LANE + i] = sum_of_shares[i];
    __syncthreads();
    for (u32 e = threadIdx.x; e < EXPERTS; e += THREADS) {
        float sum = 0.f;
        for (u32 w = 0; w < WARPS; w++) sum = __fadd_rn(sum, sums[w * EXPERTS + e]);
        __stcg(&partial[blockIdx.x * EXPERTS + e], sum);
    }
    barrier.sync();
    // A warp per expert.
    for (u32 e = blockIdx.x * WARPS + warp; e < EXPERTS; e += gridDim.x * WARPS) {
        float sum = 0.f;
        for (u32 c = lane; c < gridDim.x; c += 32) sum = __fadd_rn(sum, __ldcg(&partial[c * EXPERTS + e]));
        sum = sum_lanes<32>(sum);
        if (lane == 0) mean[e] = __fdiv_rn(sum, (float)max(limit, 1u));
    }
}

#endif
