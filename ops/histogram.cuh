// The K-th largest magnitude, exactly, by counting: what the blocks of a grid do together.
//
// The fifteen highest bits of a magnitude are found first, all there are in a 16-bit float. Large
// tensors: a sample tells below which magnitude counting is useless. Most values lie there, and
// adding to the histogram is what costs time; of those above only the keys that follow closely are
// told apart, so that the counts are few. The sample never decides: if what is sought turns out to
// lie elsewhere, everything is counted, digit by digit, as in small tensors.

#pragma once

#include <cooperative_groups.h>

#include "blocks.cuh"
#include "memory.cuh"

namespace swat {

constexpr int kMaxSelections = 2;
constexpr int kBins = 1 << 12;
constexpr int kSampleOctets = 4;  // of a thread
constexpr int kSample = kSampleOctets * kTile;
constexpr int64_t kLeastSampled = int64_t{1} << 18;

// The digits of a magnitude that are counted one after the other: how wide each is, and where the
// digits of 31-bit magnitudes begin. Those of 15-bit magnitudes are the first two.
constexpr int kMostDigits = 4;
constexpr int kSampledDigits = 2;  // what the sampled count finds at once
template <typename T>
constexpr int kDigits = sizeof(T) == 2 ? 2 : kMostDigits;
__device__ constexpr int kDigitWidth[kMostDigits] = {12, 3, 8, 8};
__device__ constexpr int kDigitShift[kMostDigits] = {19, 16, 8, 0};
// Magnitudes are compared in their highest fifteen bits at first.
template <typename T>
constexpr int kLowBits = sizeof(T) == 2 ? 0 : 16;

// Device state of one search. It starts as zeros.
struct Search {
  uint32_t blocks_done[1 + kMostDigits];
  uint32_t again;      // whether the sample misled
  float limit;         // of several thresholds the smallest
  uint32_t above, at;  // how many values are larger than the limit, and equal to it
  // State between the digits.
  uint32_t prefix[kMaxSelections], rank[kMaxSelections], larger[kMaxSelections];
  uint32_t sampled[kBins];
  uint32_t first[kBins];  // the first digit; the others depend on the digits before them
  uint32_t others[kMostDigits - 1][kMaxSelections][256];
};

// How many values are to be kept: on the device ([high, low] words) or known here.
struct Ranks {
  const uint32_t* words = nullptr;
  uint32_t most = 0xffffffffu;  // as many, if there are no words
  int count = 1;
  __device__ uint32_t operator()(int s) const {
    if (words == nullptr || words[2 * s] != 0) return most;
    return min(words[2 * s + 1], most);
  }
};

struct Selected {
  uint32_t key, above, at;
};

struct SelectScratch {
  uint64_t totals[kWarps];
  uint32_t groups[kThreads];
  Selected result;
};

// Shared memory of a search: counts of a block, later the selection, then the queues of a Source.
constexpr size_t kCountBytes = kBins * sizeof(uint32_t);
static_assert(sizeof(SelectScratch) <= kCountBytes);

// The largest key of which at least `rank` values are as large or larger. If there are fewer values,
// key 0; for rank 0, `top`. All threads of one block; other blocks added to `counts`.
__device__ inline Selected select(const uint32_t* counts, int bins, uint32_t rank, uint32_t top,
                                  SelectScratch& scratch) {
  const auto count = [=](int key) { return key < bins ? __ldcg(counts + key) : 0; };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int width = (bins + kThreads - 1) / kThreads;  // of a group of bins
  if (width == 1) {
    scratch.groups[threadIdx.x] = count(static_cast<int>(threadIdx.x));
  } else {
    for (int group = warp; group < kThreads; group += kWarps) {
      uint32_t sum = 0;
      for (int i = lane; i < width; i += 32) sum += count(group * width + i);
      sum = warp_sum(sum);
      if (lane == 0) scratch.groups[group] = sum;
    }
  }
  __syncthreads();
  // Thread t looks at group kThreads - 1 - t, so that sums come from the top down.
  const int group = kThreads - 1 - static_cast<int>(threadIdx.x);
  const uint32_t own = scratch.groups[group];
  uint64_t total;
  const uint64_t above = block_scan(own, scratch.totals, total);
  if (threadIdx.x == 0) {
    scratch.result = {0, static_cast<uint32_t>(total), 0};  // fewer than asked for
    if (rank == 0) scratch.result = {top, 0, count(static_cast<int>(top))};
  }
  __syncthreads();
  if (rank != 0 && above < rank && above + own >= rank) {
    uint32_t larger = static_cast<uint32_t>(above);
    for (int key = (group + 1) * width - 1;; --key) {
      const uint32_t here = count(key);
      if (larger + here >= rank) {
        scratch.result = {static_cast<uint32_t>(key), larger, here};
        break;
      }
      larger += here;
    }
  }
  __syncthreads();
  const Selected result = scratch.result;
  __syncthreads();
  return result;
}

// A rank that is not reached: there are fewer values than were asked for, and 0 is right.
constexpr uint32_t kTooFew = 0xffffffffu;

// By one thread, for one selection after the other: a threshold is found.
template <typename T>
__device__ void conclude(Search* search, int s, uint32_t found, uint32_t above, uint32_t at,
                         float* thresholds) {
  const float threshold = found >= Format<T>::kNan ? __uint_as_float(0x7fc00000u)
                                                   : Format<T>::from_magnitude(found);
  if (thresholds != nullptr) thresholds[s] = threshold;
  if (s != 0 && magnitude(threshold) >= magnitude(search->limit)) return;
  search->limit = threshold;
  search->above = above;
  search->at = at;
}

// The rank in the sample at which far more values than wanted are sure to be counted: twelve
// standard deviations on, since neighbours are alike.
__device__ inline uint32_t sample_rank(uint32_t rank, int64_t n) {
  const float expected = static_cast<float>(rank) / static_cast<float>(n) * kSample;
  return static_cast<uint32_t>(expected + 12.f * sqrtf(expected) + 16.f);
}

// A key (but 0) that about `rank` values of the sample reach, at least; the same in every block.
template <typename T, typename Source>
__device__ uint32_t sample_bound(const Source& source, int64_t n, uint32_t rank,
                                 uint32_t (&counts)[2]) {
  const int64_t stride = n / kOctet / (kSampleOctets * kThreads);
  uint32_t keys[kSampleOctets * kOctet];
#pragma unroll
  for (int k = 0; k < kSampleOctets; ++k) {
    const Octet<T> octet = source.peek((k * kThreads + threadIdx.x) * stride * kOctet);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) keys[k * kOctet + j] = magnitude(octet.v[j]) >> kLowBits<T>;
  }
  if (threadIdx.x < 2) counts[threadIdx.x] = 0;
  __syncthreads();
  uint32_t bound = 0;
  // The lowest bits do not matter: a bound that is a little lower is right, too.
  for (int bit = 14; bit >= 3; --bit) {
    const uint32_t candidate = bound | 1u << bit;
    uint32_t reached = 0;
#pragma unroll
    for (int k = 0; k < kSampleOctets * kOctet; ++k) reached += keys[k] >= candidate ? 1 : 0;
    reached = warp_sum(reached);
    uint32_t& count = counts[bit % 2];
    if (threadIdx.x % 32 == 0) atomicAdd(&count, reached);
    __syncthreads();
    if (count >= rank) bound = candidate;
    if (threadIdx.x == 0) counts[(bit + 1) % 2] = 0;
    __syncthreads();
  }
  return max(bound, 1u);
}

// Counts what a sample says is large enough; the last block selects, or finds that it was misled.
template <typename T, int kDepth, typename Source>
__device__ void count_sampled(const Source& source, int64_t n, const Ranks& ranks, Search* search,
                              float* thresholds, uint4* shared) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared);
  SelectScratch& scratch = *reinterpret_cast<SelectScratch*>(shared);
  uint32_t most = 0;
  for (int s = 0; s < ranks.count; ++s) most = max(most, ranks(s));
  const uint32_t least = sample_bound<T>(source, n, sample_rank(most, n),
                                         *reinterpret_cast<uint32_t(*)[2]>(shared));
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for_each_octet<T, kDepth>(
      source, n, shared + kCountBytes / sizeof(uint4), [&](const Octet<T>& octet, int64_t i) {
        source.keep(octet, i);
        const uint32_t flags = flags_from(octet, least << kLowBits<T>);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          // 16 bits: NaNs may have several keys, all of which become NaN.
          const uint32_t key = sizeof(T) == 2 ? unsigned_bits(octet.v[j])
                                              : magnitude(octet.v[j]) >> kLowBits<T>;
          count_if(flags & 1u << j, &counts[min(key - least, kBins - 1u)]);
        }
      });
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (counts[i] != 0) atomicAdd(&search->sampled[i], counts[i]);
  }
  __syncthreads();
  if (!is_last_block(&search->blocks_done[0], gridDim.x, scratch.groups[0])) return;
  __syncthreads();
  for (int s = 0; s < ranks.count; ++s) {
    const uint32_t rank = ranks(s);
    Selected found = select(search->sampled, kBins, rank, 0, scratch);
    // Of what lies below the first key and from the last one on nothing is known. But if only zeros
    // lie below, too few values are no mistake.
    const bool enough = found.at != 0, all = sizeof(T) == 2 && least == 1;
    if (rank == 0 || (enough ? found.key == kBins - 1 : !all)) {
      if (threadIdx.x == 0) search->again = 1;
      return;
    }
    if (enough) found.key += least;
    if (threadIdx.x != 0) continue;
    if (sizeof(T) == 2) {
      conclude<T>(search, s, found.key, found.above, found.at, thresholds);
    } else {
      search->prefix[s] = found.key;
      search->rank[s] = rank - found.above;
      search->larger[s] = found.above;
    }
  }
}

// Counts one digit of the magnitudes that share the digits found so far; the last block selects.
template <typename T, int kDepth, typename Source>
__device__ void count_digit(const Source& source, int64_t n, int digit, const Ranks& ranks,
                            Search* search, float* thresholds, uint4* shared) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared);
  SelectScratch& scratch = *reinterpret_cast<SelectScratch*>(shared);
  const int shift = kDigitShift[digit] - (16 - kLowBits<T>), width = kDigitWidth[digit];
  const int bins = 1 << width, kinds = digit == 0 ? 1 : ranks.count;
  uint32_t prefix[kMaxSelections] = {};
  for (int s = 0; digit > 0 && s < kinds; ++s) prefix[s] = __ldcg(&search->prefix[s]);
  for (int i = threadIdx.x; i < kinds * bins; i += kThreads) counts[i] = 0;
  __syncthreads();
  for_each_octet<T, kDepth>(
      source, n, shared + kCountBytes / sizeof(uint4), [&](const Octet<T>& octet, int64_t i) {
        source.keep(octet, i);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const uint32_t found = magnitude(octet.v[j]);
#pragma unroll
          for (int s = 0; s < kMaxSelections; ++s) {
            // Zeros are never kept.
            count_if(s < kinds && found != 0 && found >> (shift + width) == prefix[s],
                     &counts[s * bins + (found >> shift & (bins - 1))]);
          }
        }
      });
  __syncthreads();
  uint32_t* global[kMaxSelections];
  for (int s = 0; s < kMaxSelections; ++s) {
    global[s] = digit == 0 ? search->first : search->others[digit - 1][s];
  }
  for (int s = 0; s < kinds; ++s) {
    for (int i = threadIdx.x; i < bins; i += kThreads) {
      if (counts[s * bins + i] != 0) atomicAdd(&global[s][i], counts[s * bins + i]);
    }
  }
  __syncthreads();
  if (!is_last_block(&search->blocks_done[1 + digit], gridDim.x, scratch.groups[0])) return;
  __syncthreads();
  for (int s = 0; s < ranks.count; ++s) {
    const uint32_t rank = digit == 0 ? ranks(s) : search->rank[s];
    const uint32_t top = Format<T>::kNan >> shift & (bins - 1);
    Selected found = {0, 0, 0};
    if (digit == 0 || rank != kTooFew) found = select(global[s], bins, rank, top, scratch);
    if (threadIdx.x == 0) {
      search->prefix[s] = (digit == 0 ? 0 : search->prefix[s]) << width | found.key;
      search->larger[s] = (digit == 0 ? 0 : search->larger[s]) + found.above;
      if (digit == 0 && rank != 0 && found.at == 0) {
        search->rank[s] = kTooFew;
      } else if (rank != kTooFew) {
        search->rank[s] = rank == 0 ? 0 : rank - found.above;
      }
      if (digit == kDigits<T> - 1) {
        conclude<T>(search, s, search->prefix[s], search->larger[s], found.at, thresholds);
      }
    }
    __syncthreads();
  }
}

// Exact thresholds of the values that `source` makes; `made` reads them again where that is needed.
// All blocks of the grid; afterwards all of them see what was found. `thresholds` may be absent.
template <typename T, int kDepth, typename Source>
__device__ void find_thresholds(const cooperative_groups::grid_group& grid, const Source& source,
                                const Values<T>& made, int64_t n, const Ranks& ranks,
                                bool may_sample, Search* search, float* thresholds,
                                uint4* shared) {
  int digit = 0;
  bool are_made = false;
  if (may_sample && n >= kLeastSampled) {
    count_sampled<T, kDepth>(source, n, ranks, search, thresholds, shared);
    grid.sync();
    if (__ldcg(&search->again) == 0) digit = kSampledDigits;
    are_made = true;
  }
  for (; digit < kDigits<T>; ++digit) {
    if (are_made) {
      count_digit<T, kDepth>(made, n, digit, ranks, search, thresholds, shared);
    } else {
      count_digit<T, kDepth>(source, n, digit, ranks, search, thresholds, shared);
    }
    grid.sync();
    are_made = true;
  }
}

}  // namespace swat
