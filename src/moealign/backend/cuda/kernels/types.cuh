// Short names for types, and for a thread's place in its CTA.  The one file that others may include more than once.

#ifndef MOEALIGN_TYPES
#define MOEALIGN_TYPES

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEV static __device__ __forceinline__
#define FULL 0xffffffffu

DEV u32 lane_id() { return threadIdx.x & 31; }
DEV u32 warp_id() { return threadIdx.x >> 5; }
DEV u32 lanes_below(u32 lane) { return (1u << lane) - 1u; }

#endif
