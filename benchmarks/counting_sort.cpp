// A stable counting sort of int32 expert ids into padded bins, for comparison with the cpu backend: fills
// sorted_token_ids [length], expert_ids [cdiv(length, block)] and num_tokens_post_padded [1], on one thread.
// Bytes: ids are read twice, every output is written once.
// g++ -O3 -march=native -shared -fPIC -o counting_sort.so counting_sort.cpp

#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" void counting_sort(const int32_t* __restrict ids, int64_t routes, int32_t experts, int32_t block,
                              int64_t length, int32_t* __restrict sorted, int32_t* __restrict expert_ids,
                              int32_t* __restrict total) {
  std::vector<int32_t> counters(experts, 0);
  int32_t* __restrict next = counters.data();
  const int32_t sentinel = static_cast<int32_t>(routes);

  for (int64_t i = 0; i < routes; ++i) {
    const uint32_t e = static_cast<uint32_t>(ids[i]);
    if (e < static_cast<uint32_t>(experts)) ++next[e];
  }

  int32_t first = 0;
  for (int32_t e = 0; e < experts; ++e) {
    const int32_t count = next[e];
    const int32_t blocks = (count + block - 1) / block;
    const int32_t end = first + blocks * block;
    next[e] = first;
    std::fill(expert_ids + first / block, expert_ids + end / block, e);
    std::fill(sorted + first + count, sorted + end, sentinel);
    first = end;
  }
  *total = first;
  std::fill(sorted + first, sorted + length, sentinel);
  std::fill(expert_ids + first / block, expert_ids + (length + block - 1) / block, -1);

  for (int64_t i = 0; i < routes; ++i) {
    const uint32_t e = static_cast<uint32_t>(ids[i]);
    if (e < static_cast<uint32_t>(experts)) sorted[next[e]++] = static_cast<int32_t>(i);
  }
}
