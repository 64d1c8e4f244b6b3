// A barrier of the whole grid, for kernels under a cooperative launch.
// The word is the driver's own, one for each cooperative launch (the one cooperative_groups uses): nothing to zero,
// nothing that two streams or graphs could share.  Its top bit flips when all CTAs have arrived.

typedef unsigned int u32;
typedef unsigned long long u64;
#define DEV static __device__ __forceinline__

DEV u32 *barrier_word() {
    u32 hi, lo;
    asm("mov.u32 %0, %%envreg1;" : "=r"(hi));
    asm("mov.u32 %0, %%envreg2;" : "=r"(lo));
    return (u32 *)(((u64)hi << 32 | lo) + 4);
}

struct Barrier {
    u32 *word;
    u32 phase;  // thread 0 alone uses it

    __device__ __forceinline__ static Barrier begin() {
        Barrier b;
        b.word = barrier_word();
        b.phase = 0;
        if (threadIdx.x == 0) asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(b.phase) : "l"(b.word) : "memory");
        return b;
    }
    // The same for what warp 0 alone wrote; nobody else need come along.
    __device__ __forceinline__ void arrive_warp() {
        __syncwarp();
        if (threadIdx.x == 0) {
            u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
            asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(word), "r"(add) : "memory");
        }
    }
    // Everything that the CTA wrote before is seen by every CTA after its wait().
    __device__ __forceinline__ void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) {
            u32 add = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
            asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(word), "r"(add) : "memory");
        }
    }
    // Starts a look at the word, for wait() to use: what lies between hides its latency.
    __device__ __forceinline__ u32 look() {
        u32 now = phase;
        if (threadIdx.x == 0) asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
        return now;
    }
    __device__ __forceinline__ void wait_after(u32 now) {
        if (threadIdx.x == 0 && ((now ^ phase) & 0x80000000u)) {
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            phase ^= 0x80000000u;
        } else if (threadIdx.x == 0) {
            spin();
        }
        __syncthreads();
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
