// What the threads of a warp and of a block do together.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "formats.cuh"

namespace swat {

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, value);
#else
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
#endif
}

// Exclusive prefix sum over the lanes of a warp.
template <typename Number>
__device__ __forceinline__ Number warp_scan(Number value) {
  Number sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number other = __shfl_up_sync(kFullWarp, sum, step);
    if (static_cast<int>(threadIdx.x) % 32 >= step) sum += other;
  }
  return sum - value;
}

// Exclusive prefix sum over the threads of a block.
// `totals` is shared memory that nobody else uses until the next barrier of the caller.
__device__ __forceinline__ uint64_t block_scan(uint64_t value, uint64_t (&totals)[kWarps],
                                               uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t in_warp = warp_scan(value);
  if (lane == 31) totals[warp] = in_warp + value;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += totals[w];
    total += totals[w];
  }
  return before + in_warp;
}

}  // namespace swat
