// A barrier over the grid, for kernels under a cooperative launch.
//
// The word is the driver's own, one per cooperative launch (cooperative_groups uses the same one): nothing to zero, and
// nothing that two streams or graphs could share.  Its top bit flips when all CTAs have arrived.

#include "types.cuh"

DEV u32 *barrier_word() {
    u32 hi, lo;
    asm("mov.u32 %0, %%envreg1;" : "=r"(hi));
    asm("mov.u32 %0, %%envreg2;" : "=r"(lo));
    return (u32 *)(((u64)hi << 32 | lo) + 4);
}

struct Barrier {
    u32 *word;
    u32 phase;  // only thread 0 uses it

    __device__ __forceinline__ static Barrier begin() {
        Barrier b;
        b.word = barrier_word();
        b.phase = 0;
        if (threadIdx.x == 0) asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(b.phase) : "l"(b.word) : "memory");
        return b;
    }
    // Arrive with what the CTA wrote: every CTA sees it after its wait().
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        arrive_thread();
    }
    // Arrive with what warp 0 wrote; the other warps need not participate.
    __device__ __forceinline__ void arrive_warp() {
        __syncwarp();
        arrive_thread();
    }
    __device__ __forceinline__ void arrive_thread() {
        if (threadIdx.x == 0) {
            u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
            asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(word), "r"(add) : "memory");
        }
    }
    __device__ __forceinline__ void wait() {
        if (threadIdx.x == 0) spin();
        __syncthreads();
    }
    __device__ __forceinline__ void spin() {
        u32 now;
        do {
            asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        } while (!((now ^ phase) & 0x80000000u));
        phase ^= 0x80000000u;
    }
    __device__ __forceinline__ void sync() {
        arrive();
        wait();
    }
};
