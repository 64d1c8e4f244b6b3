// Ranks of a CTA's routes among those of the same bin, for the paths that sort in shared memory: grid and tiles.
// Each warp has a table of 16-bit counts, two bins per word.  Include it behind common.cuh.

#define PAIRS ((E + 1) / 2)
#define STRIDE (PAIRS | 1)  // words of a warp's table

// The ranks of the warp's routes among its own, in the order of steps and lanes.  `counts`, zero before, receives the
// counts.  `peers` are the lanes of the same step with the same bin.
template <int ROUNDS>
DEV void rank_in_warp(
    const int (&bin)[ROUNDS], const u32 (&peers)[ROUNDS], u16 *counts, u32 lane, u32 (&rank)[ROUNDS]) {
#pragma unroll
    for (int r = 0; r < ROUNDS; r++) {
        u32 ahead = peers[r] & lanes_below(lane), old = 0;
        u16 *slot = counts + (bin[r] < 0 ? 0 : bin[r]);
        if (r > 0) {
            old = *slot;
            __syncwarp();
        }
        if (bin[r] >= 0 && ahead == 0) *slot = (u16)(old + __popc(peers[r]));
        if (r + 1 < ROUNDS) __syncwarp();
        rank[r] = old + __popc(ahead);
    }
}

// From the counts of each warp to the counts of the warps before it, eight threads per pair of bins; `store(at, sum)`
// receives the sum over all warps of pair `at`.
template <typename Store> DEV void add_up_warps(u32 *pairs, u32 t, Store store) {
    constexpr int WARPS_EACH = (WARPS + 7) / 8;
#pragma unroll 1
    for (u32 at = t >> 3; at < (PAIRS + 3) / 4 * 4; at += THREADS / 8) {
        u32 seg = t & 7, run = 0, part[WARPS_EACH];
        bool ok = at < PAIRS;
#pragma unroll
        for (int k = 0; k < WARPS_EACH; k++) {
            u32 w = seg * WARPS_EACH + k;
            part[k] = ok && w < WARPS ? pairs[w * STRIDE + at] : 0;
            run += part[k];
        }
        u32 sum = run;
#pragma unroll
        for (int d = 1; d < 8; d *= 2) {
            u32 p = __shfl_up_sync(FULL, sum, d);
            if (seg >= d) sum += p;
        }
        if (ok && seg == 7) store(at, sum);
        run = sum - run;
#pragma unroll
        for (int k = 0; k < WARPS_EACH; k++) {
            u32 w = seg * WARPS_EACH + k;
            if (ok && w < WARPS) pairs[w * STRIDE + at] = run;
            run += part[k];
        }
    }
}
