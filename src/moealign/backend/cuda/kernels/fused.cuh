// The router inside warp.cu and pairwise.cu, for a few tokens: one launch chooses experts and writes their layout.
// Every CTA chooses for all tokens, a warp each, so no CTA waits for another.  All but the last write the layout; the
// last one writes weights and ids.
//
//   FUSED_ROUTER  1, with the macros of router.cuh      ONE_TOKEN  there is one token, and every warp chooses for it;
//                 with SPLIT, behind Part::share

#if FUSED_ROUTER
#include "router.cuh"

static_assert(COLUMNS <= 32, "a lane per expert of a token");
static_assert(ONE_TOKEN || SPLIT == 1, "the warps that share scores have the same token");

// logits: tokens x EXPERTS, row_stride elements apart.  bias: EXPERTS or null.  weights, ids_out: tokens x COLUMNS.
#define ROUTER_PARAMETERS , const raw_t *__restrict__ logits, const float *__restrict__ bias, \
    float *__restrict__ weights, int *__restrict__ ids_out, i64 row_stride, i64 scale_bits OPTION_PARAMETERS
#define LAYOUT_CTAS (gridDim.x - 1)

// The token of a warp.
struct Token {
    const raw_t *row;
    __align__(16) raw_t raw[PER_LANE];
    u32 number;
    Part part;

    __device__ __forceinline__ void load(const raw_t *logits, const float *bias, i64 row_stride, u32 tokens) {
        number = ONE_TOKEN ? 0 : warp_id();
        row = logits + (i64)number * row_stride;
        if (number < tokens) load_row(row, lane_id(), raw);
        part.load(row, bias, lane_id());
    }

    // Its experts: lane j < COLUMNS returns the j-th, and -1 from route `limit` on.
    __device__ __forceinline__ int route(
        const float *bias, Options options, float *weights, int *ids_out, i64 scale_bits, u32 limit, bool writes) {
        const u32 lane = lane_id(), i = number * COLUMNS + lane;
        const Selected selected = experts_of(raw, bias, options, number, lane);
        const bool valid = number * COLUMNS < limit;
        int e = valid ? (int)selected.expert : -1;
        if (writes) {
            const float scale = __int_as_float((int)scale_bits);
            const float weight = weight_of(raw, row, selected, scale, options, lane, nullptr);
            if (lane < TOP_K) weights[i] = valid ? weight : 0.f, ids_out[i] = e;
            write_shared(i - lane, valid, lane, weights, ids_out);
        }
#if SHARED
        if (lane >= TOP_K) e = valid ? (int)(EXPERTS + lane - TOP_K) : -1;
#endif
        return e;
    }
};

#else
#define ROUTER_PARAMETERS
#define LAYOUT_CTAS gridDim.x
#endif
