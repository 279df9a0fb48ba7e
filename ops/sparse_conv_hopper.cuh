// The weight gradient of a 1x1 convolution from packed activations, on Hopper.
//
// dW[i, o] = sum over pixels p of x[p, i] * dY[p, o], where x is packed. A block of threads has a
// multiprocessor for itself, and makes X input times Y output channels of dW over a range of chunks of P
// pixels; a second kernel adds up what the blocks of all ranges made, in their order.
//
// The warps of a block have three jobs, and only mbarriers between them:
//   - one warp has the copy engine bring chunks of dY, two to eight ahead;
//   - `kUnpackers` warps put the kept values of x into tiles of zeros. A warp takes a unit, 2,048
//     values, the unit of `offsets`, or two: the copy engine brought its words and values to shared
//     memory while the warp did the units before. One scan of the words' counts says where the values
//     of each begin, then a lane takes words of its own, clears their place, and scatters their values,
//     of which it reads four at once. Warps do not wait for each other, and several chunks are being
//     filled at any time;
//   - one or two warpgroups multiply by `wgmma`, with operands from shared memory, as they lie there:
//     channels side by side, pixels one below the other, "transposed" for both. dY as the left operand
//     goes through registers.
//
// A tile of C channels is C / 64 columns of P rows of 128 bytes, with their eight parts of 16 bytes
// exchanged: part `n` of row `p` lies where n ^ p % 8 says, the pattern of 128 bytes of the copy engine
// and of `wgmma`. So eight rows of one column (1,024 bytes) do not meet in banks.
//
// Cuts and shared memory stand in sparse_conv_hopper_cut.cuh, the unpacking warps in
// sparse_conv_hopper_unpack.cuh, all others here.

#pragma once

#include <cstdint>

#include "hopper_instructions.cuh"
#include "sparse_conv_hopper_cut.cuh"
#include "sparse_conv_hopper_unpack.cuh"

namespace swat {
namespace hopper {

// ---- Bringing dY --------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void bring(const Problem& problem, const CUtensorMap* map,
                                      const Part<C>& part, const Shared<C>& shared, uint32_t base) {
  const uint32_t full = base + shared.y_full, empty = base + shared.y_empty;
  Stage stage;
  for (uint32_t chunk = part.begin; chunk < part.end; ++chunk) {
    if (stage.turn > 0) barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1);
    const uint32_t barrier = full + 8 * stage.at;
    const uint32_t to = base + shared.dy + stage.at * C::kYBytes;
    barrier_expect(barrier, C::kYBytes);
#pragma unroll
    for (uint32_t column = 0; column < C::Y / 64; ++column) {
      copy_box(to + column * C::P * 128, map, part.out_block * C::Y + column * 64, chunk * C::P, barrier);
    }
    stage.step(problem.dy_stages);
  }
}

// ---- Multiplying --------------------------------------------------------------------------------

// Where an operand lies; `wgmma` adds 16 pixels by 16 * 128 bytes.
template <uint32_t P>
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  // From 64 channels to the next, from eight pixels to the next; the pattern of 128 bytes.
  constexpr uint64_t kLeading = P * 128, kStride = 1024;
  return static_cast<uint64_t>(at >> 4 & 0x3fff) | kLeading >> 4 << 16 | kStride >> 4 << 32 | 1ull << 62;
}

template <typename C>
__device__ __forceinline__ void multiply(const Problem& problem, const Part<C>& part,
                                         const Shared<C>& shared, uint32_t base, uint32_t warp) {
  const uint32_t lane = threadIdx.x % 32, group = warp / 4;
  const uint32_t x_full = base + shared.x_full, x_empty = base + shared.x_empty;
  const uint32_t y_full = base + shared.y_full, y_empty = base + shared.y_empty;
  // Where a lane reads dY as the left operand: a row of eight channels, by the pattern of 128 bytes.
  const uint32_t left_at = base + shared.dy + group * C::P * 128 + (lane / 16 * 8 + lane % 8) * 128 +
                           ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
  constexpr uint32_t kEach = C::kEach;
  float sums[C::N / kEach][kEach / 2];
#pragma unroll
  for (uint32_t n = 0; n < C::N / 2; ++n) sums[n / (kEach / 2)][n % (kEach / 2)] = 0.f;
  const uint64_t x_at = descriptor<C::P>(base + (C::kLeftIsX ? group * C::P * 128 : 0));
  Stage x, y;
  const auto give_back = [&](uint32_t x_stage, uint32_t y_stage) {
    if (lane == 0) {
      barrier_arrive(x_empty + 8 * x_stage);
      barrier_arrive(y_empty + 8 * y_stage);
    }
  };
  // All of a chunk, as one group: `left_of` 16 pixels, and what lies at `right`.
  const auto add_products = [&](const auto& left_of, uint64_t right) {
    wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < C::P / 16; ++k) {
#pragma unroll
      for (uint32_t n = 0; n < C::N / kEach; ++n) {
        Wgmma<kEach>::template multiply<typename C::T>(
            sums[n], left_of(k), right + k * 128 + n * (kEach / 64) * (C::P * 8));
      }
    }
    wgmma_commit();
  };
  uint32_t x_before = 0, y_before = 0;  // stages of the chunk before
  for (uint32_t chunk = part.begin; chunk < part.end; ++chunk) {
    barrier_wait(x_full + 8 * x.at, x.turn & 1);
    barrier_wait(y_full + 8 * y.at, y.turn & 1);
    const uint64_t own_x = x_at + x.at * (C::kXBytes / 16);
    if constexpr (C::kLeftIsX) {
      const uint64_t own_y = descriptor<C::P>(base + shared.dy) + y.at * (C::kYBytes / 16);
      add_products([&](uint32_t k) { return own_x + k * 128; }, own_y);
      wgmma_wait<1>();  // those of the chunk before are over
      if (chunk > part.begin) give_back(x_before, y_before);
      x_before = x.at, y_before = y.at;
    } else {
      // dY is read once for two products. They have to be over before its registers are written again,
      // so tiles are given back at once, which unpacking warps wait for.
      const uint32_t from = left_at + y.at * C::kYBytes;
      uint32_t left[C::P / 16][4];
#pragma unroll
      for (uint32_t k = 0; k < C::P / 16; ++k) load_matrices(left[k], from + k * 16 * 128);
      add_products([&](uint32_t k) -> const uint32_t(&)[4] { return left[k]; }, own_x);
      wgmma_wait<0>();
      give_back(x.at, y.at);
    }
    x.step(problem.x_stages);
    y.step(problem.dy_stages);
  }
  wgmma_wait<0>();

  // Of the 64 x N sums a lane has pairs of every eight columns, in two rows.
  float* const to = problem.partial + static_cast<uint64_t>(part.split) * problem.in * problem.out;
  const uint32_t first_row = warp * 16 + lane / 4, first_column = lane % 4 * 2;
#pragma unroll
  for (uint32_t n = 0; n < C::N / 8; ++n) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = first_row + 8 * half, column = first_column + 8 * n;
      const float* const own = &sums[n / (kEach / 8)][n % (kEach / 8) * 4 + 2 * half];
      const float one = own[0], two = own[1];
      if constexpr (C::kLeftIsX) {
        const uint32_t i = part.in_block * C::X + row, o = part.out_block * C::Y + column;
        if (i < problem.in && o < problem.out) {
          *reinterpret_cast<float2*>(to + static_cast<uint64_t>(i) * problem.out + o) =
              make_float2(one, two);
        }
      } else {
        const uint32_t i = part.in_block * C::X + column, o = part.out_block * C::Y + row;
        if (i < problem.in && o < problem.out) {
          to[static_cast<uint64_t>(i) * problem.out + o] = one;
          to[static_cast<uint64_t>(i + 1) * problem.out + o] = two;
        }
      }
    }
  }
}

// ---- The block ----------------------------------------------------------------------------------

// `base` is where shared memory starts, a multiple of 1,024; `least` the smallest magnitude that is kept,
// at least 1.
template <typename C>
__device__ __forceinline__ void make_part(const Problem& problem, const CUtensorMap* map, uint32_t least,
                                          uint32_t base) {
  const Shared<C> shared(problem.x_stages, problem.dy_stages, problem.room);
  const Part<C> part(problem, blockIdx.x);
  // The same register for all lanes, so that branches on it are known to be taken together.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    const uint32_t units = C::P * problem.in / (kTileValues * C::kTilesOfUnit);
    for (uint32_t s = 0; s < kMostStages; ++s) {
      barrier_init(base + shared.x_full + 8 * s, units);
      barrier_init(base + shared.x_empty + 8 * s, 4 * C::kConsumerGroups);
      barrier_init(base + shared.y_full + 8 * s, 1);
      barrier_init(base + shared.y_empty + 8 * s, 4 * C::kConsumerGroups);
    }
    for (uint32_t u = 0; u < C::kUnpackers * kSlots; ++u) barrier_init(base + shared.arrivals + 8 * u, 1);
    fence_barriers();
  }
  __syncthreads();
  if (warp < 4 * C::kConsumerGroups) {
    set_registers<C::kConsumes, true>();
    multiply<C>(problem, part, shared, base, warp);
  } else {
    set_registers<C::kProduces, false>();
    const uint32_t producer = warp - 4 * C::kConsumerGroups;
    if (producer == C::kUnpackers) {
      if (threadIdx.x % 32 == 0) bring<C>(problem, map, part, shared, base);
    } else {
      unpack<C>(problem, part, shared, base, producer, least);
    }
  }
}

}  // namespace hopper
}  // namespace swat
