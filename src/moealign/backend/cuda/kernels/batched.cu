// The layout of batches whose routes come sorted, in one plain launch.  Every CTA scans the counts for itself and fills
// its own share of every output, so CTAs never wait for each other.
//
// With M slots per batch, B rows per block and c[b] = clamp(counts[b], 0, M), batch b takes cdiv(c[b], B) blocks.
//
//   COUNT_BYTES, COUNT_SIGNED  dtype of the counts      B  rows per block      THREADS  threads per CTA
//   VECTOR      4: rows are stored in 16 bytes, which needs B % 4 == 0 and an aligned sorted_token_ids; otherwise 1
//   PER_THREAD  0 compiles batched_few, otherwise batched_many with so many counts per thread
//   GROUPS      counts per lane of batched_few
//   BAD_COUNT   the error bit of a count outside [0, M]
//
// M is a parameter, so another M compiles no kernel.  Every parameter is 8 bytes.
// Launch: any number of CTAs of THREADS threads; no dynamic shared memory.

#if COUNT_BYTES == 1
#define WIDTH char
#elif COUNT_BYTES == 2
#define WIDTH short
#elif COUNT_BYTES == 4
#define WIDTH int
#else
#define WIDTH long long
#endif
#if COUNT_SIGNED
typedef signed WIDTH Count;
#else
typedef unsigned WIDTH Count;
#endif

#define ALL 0xffffffffu
#define WARPS (THREADS / 32)

struct Outputs {
  int* __restrict__ sorted_token_ids;
  int* __restrict__ expert_ids;
  int* __restrict__ block_rows;  // may be null
};

// This CTA's share of `all` items.
struct Share {
  unsigned first, last;
  __device__ explicit Share(unsigned all) {
    unsigned each = (all + gridDim.x - 1) / gridDim.x;
    first = min(blockIdx.x * each, all);
    last = min(first + each, all);
  }
};

// Division of a number below 2^31 by max(M, 1); `reciprocal` in batched.py makes the constants.
struct Divisor {
  unsigned factor, shift;
  __device__ explicit Divisor(long long packed) : factor((unsigned)packed), shift((unsigned)(packed >> 32)) {}
  __device__ unsigned divide(unsigned number) const {
    return (unsigned)((unsigned long long)number * factor >> (31 + shift));
  }
};

__device__ int clamped(const Count* counts, long long stride, int batch, int M, bool& bad) {
  Count value = counts[batch * stride];
  bool low = COUNT_SIGNED && value < 0;
  bool high = !low && (unsigned long long)value > (unsigned long long)M;
  bad |= low || high;
  return low ? 0 : high ? M : (int)value;
}

__device__ int blocks_of(int count) { return count / B + (count % B != 0); }

// Store rows row .. row + VECTOR - 1, all in one block of `batch`, whose rows begin at `start`.  Batch -1 is the tail.
__device__ void store_rows(
    const Outputs& out, unsigned row, int batch, unsigned start, int count, int M, int sentinel) {
  unsigned slot = row - start;
  int left = batch < 0 ? 0 : count - (int)slot;
  unsigned id = (unsigned)batch * M + slot;
#if VECTOR == 4
  int4 four = make_int4(left > 0 ? id : sentinel, left > 1 ? id + 1 : sentinel, left > 2 ? id + 2 : sentinel,
                        left > 3 ? id + 3 : sentinel);
  *reinterpret_cast<int4*>(out.sorted_token_ids + row) = four;
#else
  out.sorted_token_ids[row] = left > 0 ? id : sentinel;
#endif
  if (row % B == 0) {
    out.expert_ids[row / B] = batch;
    if (out.block_rows) out.block_rows[row / B] = min(max(left, 0), B);
  }
}

// ---- up to 32 * GROUPS batches --------------------------------------------------------------------------------------

#if PER_THREAD == 0

// A value of each batch: in lane l, number g is that of batch 32 g + l.
struct PerBatch {
  int of[GROUPS];
  __device__ int operator[](int batch) const {  // the same in all lanes, or another in each
    int value = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      int other = __shfl_sync(ALL, of[g], batch % 32);
      value = g == 0 || batch >= 32 * g ? other : value;
    }
    return value;
  }
  // How many values are at most `limit`, which is the same in all lanes.
  __device__ int at_most(unsigned limit) const {
    int sum = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) sum += __popc(__ballot_sync(ALL, (unsigned)of[g] <= limit));
    return sum;
  }
};

__device__ PerBatch inclusive_scan(PerBatch value, int lane) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    int before = g > 0 ? __shfl_sync(ALL, value.of[g > 0 ? g - 1 : 0], 31) : 0;
    if (lane == 0) value.of[g] += before;
    for (int distance = 1; distance < 32; distance *= 2) {
      int other = __shfl_up_sync(ALL, value.of[g], distance);
      if (lane >= distance) value.of[g] += other;
    }
  }
  return value;
}

// Every warp scans the counts, GROUPS per lane, with shuffles: no barrier and no shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) batched_few(
    // Inputs: [batches] of `stride`; sizes; the constants that divide by M.
    const Count* __restrict__ counts, long long stride, long long batches, long long rows, long long slots64,
    long long packed_reciprocal,
    // Required outputs: [rows], [rows / B], [1].
    int* sorted_token_ids, int* expert_ids, int* total,
    // Extras, or null: [batches], [batches + 1], [batches], [batches * M], [rows / B]; and the error word, or null.
    int* expert_counts, int* expert_offsets, int* group_ends, int* positions, int* block_rows, int* error_word) {
  const int lane = threadIdx.x % 32;
  const unsigned warp_start = threadIdx.x - lane;
  const int M = (int)slots64, sentinel = (int)batches * M;
  const Divisor by_batch(packed_reciprocal);
  const Outputs out{sorted_token_ids, expert_ids, block_rows};

  // Past the last batch there are empty ones.
  bool bad = false;
  PerBatch count, end, start;  // end and start in blocks
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int batch = 32 * g + lane;
    count.of[g] = batch < batches ? clamped(counts, stride, batch, M, bad) : 0;
    end.of[g] = blocks_of(count.of[g]);
  }
  end = inclusive_scan(end, lane);
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) start.of[g] = end.of[g] - blocks_of(count.of[g]);

  // Rows.  The ballots count the batches that end before the first and before the last block of the warp's rows.
  const Share mine((unsigned)rows / VECTOR);
  for (unsigned unit = mine.first + warp_start; unit < mine.last; unit += THREADS) {
    unsigned row = (unit + lane) * VECTOR;
    unsigned block = row / B;
    int batch = end.at_most(unit * VECTOR / B);
    int last = end.at_most((unit + 31) * VECTOR / B);
    for (int other = batch; other < last; ++other) batch += (unsigned)end[other] <= block;
    int from = start[batch], routes = count[batch];
    const bool used = batch < 32 * GROUPS;
    if (unit + lane < mine.last) store_rows(out, row, used ? batch : -1, (unsigned)from * B, routes, M, sentinel);
  }

  if (positions) {
    const Share slots(sentinel);
    for (unsigned slot = slots.first + warp_start; slot < slots.last; slot += THREADS) {
      unsigned batch = by_batch.divide(slot + lane), index = slot + lane - batch * M;
      int from = start[batch], routes = count[batch];
      if (slot + lane < slots.last) positions[slot + lane] = (int)index < routes ? from * B + (int)index : -1;
    }
  }

  if (blockIdx.x == 0 && warp_start == 0) {
    if (bad && error_word) atomicOr(error_word, BAD_COUNT);
    const PerBatch sums = inclusive_scan(count, lane);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int batch = 32 * g + lane;
      if (batch >= batches) continue;
      if (expert_offsets) expert_offsets[batch] = start.of[g] * B;
      if (expert_counts) expert_counts[batch] = count.of[g];
      if (group_ends) group_ends[batch] = sums.of[g];
    }
    if (lane == 31) {
      *total = end.of[GROUPS - 1] * B;
      if (expert_offsets) expert_offsets[batches] = end.of[GROUPS - 1] * B;
    }
  }
}

#else

// ---- any number of batches ------------------------------------------------------------------------------------------

#define TILE (THREADS * PER_THREAD)

// Blocks and rows, summed together.
struct Sum {
  int blocks, counts;
  __device__ Sum operator+(const Sum& other) const { return {blocks + other.blocks, counts + other.counts}; }
};

// Every CTA scans the counts in tiles of THREADS * PER_THREAD batches: two barriers per tile.
extern "C" __global__ void __launch_bounds__(THREADS) batched_many(
    // Inputs: [batches] of `stride`; sizes; the constants that divide by M.
    const Count* __restrict__ counts, long long stride, long long batches, long long rows, long long slots64,
    long long packed_reciprocal,
    // Required outputs: [rows], [rows / B], [1].
    int* sorted_token_ids, int* expert_ids, int* total,
    // Extras, or null: [batches], [batches + 1], [batches], [batches * M], [rows / B]; and the error word, or null.
    int* expert_counts, int* expert_offsets, int* group_ends, int* positions, int* block_rows, int* error_word) {
  __shared__ int ends[TILE];  // in blocks
  __shared__ int routes[TILE];
  __shared__ Sum warp_sums[WARPS];
  __shared__ int lowest, highest;  // batches of the tile that this CTA's rows can belong to

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int M = (int)slots64, sentinel = (int)batches * M;
  const Divisor by_batch(packed_reciprocal);
  const Outputs out{sorted_token_ids, expert_ids, block_rows};
  const Share mine((unsigned)rows / VECTOR), slots(positions ? sentinel : 0);
  const int first_block = mine.first * VECTOR / B;
  const int last_block = mine.last > mine.first ? (mine.last * VECTOR - 1) / B : first_block;
  Sum base{0, 0};
  bool bad = false;

  for (int tile = 0; tile < batches; tile += TILE) {
    const int here = min((int)batches - tile, TILE);

    // The tile's counts, PER_THREAD consecutive ones per thread, and their sum.
    int own[PER_THREAD];
    Sum sum{0, 0};
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      int index = threadIdx.x * PER_THREAD + i;
      own[i] = index < here ? clamped(counts, stride, tile + index, M, bad) : 0;
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum = sum + Sum{blocks_of(own[i]), own[i]};
    Sum scanned = sum;
    for (int distance = 1; distance < 32; distance *= 2) {
      Sum other{__shfl_up_sync(ALL, scanned.blocks, distance), 0};
      if (group_ends) other.counts = __shfl_up_sync(ALL, scanned.counts, distance);
      if (lane >= distance) scanned = scanned + other;
    }
    if (lane == 31) warp_sums[warp] = scanned;
    if (threadIdx.x == 0) {
      lowest = 0;
      highest = here - 1;
    }
    __syncthreads();

    // The first and last row of each batch.
    Sum before = base, after = base;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      if (i < warp) before = before + warp_sums[i];
      after = after + warp_sums[i];
    }
    before = before + Sum{scanned.blocks - sum.blocks, scanned.counts - sum.counts};
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      int index = threadIdx.x * PER_THREAD + i;
      int start = before.blocks;
      before = before + Sum{blocks_of(own[i]), own[i]};
      if (index >= here) continue;
      ends[index] = before.blocks;
      routes[index] = own[i];
      if (start <= first_block && first_block < before.blocks) lowest = index;
      if (start <= last_block && last_block < before.blocks) highest = index;
      if (blockIdx.x == 0) {
        if (expert_counts) expert_counts[tile + index] = own[i];
        if (expert_offsets) expert_offsets[tile + index] = start * B;
        if (group_ends) group_ends[tile + index] = before.counts;
      }
    }
    __syncthreads();

    // This CTA's rows that belong to the tile.
    const unsigned unit_end = min((unsigned)after.blocks * (B / VECTOR), mine.last);
    const unsigned unit_begin = max((unsigned)base.blocks * (B / VECTOR), mine.first);
    for (unsigned unit = unit_begin + threadIdx.x; unit < unit_end; unit += THREADS) {
      unsigned row = unit * VECTOR;
      int block = row / B, low = lowest, high = highest;
      while (low < high) {
        int middle = (low + high) / 2;
        if (ends[middle] > block) high = middle; else low = middle + 1;
      }
      int start = low ? ends[low - 1] : base.blocks;
      store_rows(out, row, tile + low, (unsigned)start * B, routes[low], M, sentinel);
    }

    const unsigned slot_end = min((unsigned)(tile + here) * M, slots.last);
    for (unsigned slot = max((unsigned)tile * M, slots.first) + threadIdx.x; slot < slot_end; slot += THREADS) {
      unsigned batch = by_batch.divide(slot);
      int index = (int)batch - tile, offset = (int)(slot - batch * M);
      int start = index ? ends[index - 1] : base.blocks;
      positions[slot] = offset < routes[index] ? start * B + offset : -1;
    }

    base = after;
    if (tile + TILE < batches) __syncthreads();
  }

  for (unsigned unit = max((unsigned)base.blocks * (B / VECTOR), mine.first) + threadIdx.x; unit < mine.last;
       unit += THREADS)
    store_rows(out, unit * VECTOR, -1, unit * VECTOR, 0, M, sentinel);
  if (bad && error_word && blockIdx.x == 0) atomicOr(error_word, BAD_COUNT);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *total = base.blocks * B;
    if (expert_offsets) expert_offsets[batches] = base.blocks * B;
  }
}

#endif
