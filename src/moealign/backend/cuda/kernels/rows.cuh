// From the counts of all bins to their rows, for the paths that sort in shared memory: grid and tiles.  Include it
// behind common.cuh and scan.cuh.

#define PER_THREAD ((E + THREADS - 1) / THREADS)  // bins of a thread

// Fill first_row [E + 1] from count [E], and add the first row of each bin to next_row [E].  `blocks` and `routes` are
// the sums of the thread's own bins, t * PER_THREAD and on.  The CTAs take turns in writing the extras.  Returns the
// rows of all blocks.  A barrier inside; the caller needs one before it reads other threads' bins.
DEV u32 rows_of_bins(
    const u32 *count, u32 blocks, u32 routes, u32 *first_row, u32 *next_row, uint2 *partial, int *total_out,
    int *counts, int *offsets, int *ends) {
    const u32 t = threadIdx.x, cta = blockIdx.x, ctas = gridDim.x;
    u32 total, kept;
    scan_cta(blocks, routes, total, kept, partial, ENDS != 0);
#pragma unroll (PER_THREAD <= 4 ? PER_THREAD : 1)
    for (int k = 0; k < PER_THREAD; k++) {
        const u32 e = t * PER_THREAD + k;
        if (e >= E) break;
        const u32 c = count[e];
        first_row[e] = blocks * B;
        next_row[e] += blocks * B;
        routes += c;
        if (e % ctas == cta) {
            if (COUNTS) counts[e] = (int)c;
            if (OFFSETS) offsets[e] = (int)(blocks * B);
            if (ENDS) ends[e] = (int)routes;
        }
        blocks += blocks_of(c);
    }
    total *= B;
    if (t == 0) {
        first_row[E] = total;
        if (cta == 0) {
            total_out[0] = (int)total;
            if (OFFSETS) offsets[E] = (int)total;
        }
    }
    return total;
}

// The bin that owns `row`: the last one that begins at or before it.
DEV u32 owner_of(const u32 *first_row, u32 row) {
    u32 e = 0;
#pragma unroll 1
    for (int step = BITS ? 1 << (BITS - 1) : 0; step; step /= 2)
        if (e + step < E && first_row[e + step] <= row) e += step;
    return e;
}
