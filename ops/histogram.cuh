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
// A guess looks at so many octets of a thread, two million values on a large device. Smaller tensors
// are searched faster than guessed at.
constexpr int kGuessOctets = 4;
#ifdef SWAT_JAX_LEAST_GUESSED
constexpr int64_t kLeastGuessed = SWAT_JAX_LEAST_GUESSED;
#else
constexpr int64_t kLeastGuessed = int64_t{1} << 23;
#endif

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

// Counts of all blocks in device memory, for one search. They start as zeros.
struct Counts {
  uint32_t sampled[kBins];
  uint32_t first[kBins];  // the first digit; the others depend on the digits before them
  uint32_t others[kMostDigits - 1][kMaxSelections][256];
};

// What a search has found, the same in every thread.
struct Found {
  float limit = 0.f;           // of several thresholds the smallest
  uint32_t above = 0, at = 0;  // how many values are larger than the limit, and equal to it
};

// A search between the digits, the same in every thread.
struct Progress {
  uint32_t prefix[kMaxSelections] = {}, rank[kMaxSelections] = {}, above[kMaxSelections] = {};
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
  __device__ uint32_t largest() const {
    uint32_t largest = 0;
    for (int s = 0; s < count; ++s) largest = max(largest, (*this)(s));
    return largest;
  }
};

struct Selected {
  uint32_t key, above, at;
};

struct SelectScratch {
  uint64_t totals[kWarps];
  Selected result;
};

// Shared memory of a search: counts, then the queues of a Source or what a selection needs.
constexpr size_t kCountBytes = kBins * sizeof(uint32_t);
struct SearchMemory {
  uint32_t* counts;
  uint4* queues;
  SelectScratch* scratch;
  __device__ explicit SearchMemory(uint4* shared)
      : counts(reinterpret_cast<uint32_t*>(shared)), queues(shared + kCountBytes / sizeof(uint4)),
        scratch(reinterpret_cast<SelectScratch*>(queues)) {}
  __device__ void clear(int bins) const {
    for (int i = threadIdx.x; i < bins; i += kThreads) counts[i] = 0;
    __syncthreads();
  }
  // Adds what this block counted to the counts of all blocks.
  __device__ void add_to(uint32_t* all, int from, int bins) const {
    for (int i = threadIdx.x; i < bins; i += kThreads) {
      if (counts[from + i] != 0) atomicAdd(&all[i], counts[from + i]);
    }
  }
};

// The largest key of which at least `rank` values are as large or larger. If there are fewer values,
// key 0; for rank 0, `top`. All threads of one block, which counted in shared memory. A thread looks
// at kWidth bins, the first thread at the highest, so that sums come from the top down.
template <int kWidth>
__device__ Selected select_here(const SearchMemory& memory, uint32_t rank, uint32_t top) {
  SelectScratch& scratch = *memory.scratch;
  const uint32_t first = (kThreads - 1 - threadIdx.x) * kWidth;
  uint32_t own[kWidth], sum = 0;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    own[i] = memory.counts[first + i];
    sum += own[i];
  }
  uint64_t total;
  const uint64_t above = block_scan(sum, scratch.totals, total);
  if (threadIdx.x == 0) {
    scratch.result = {0, static_cast<uint32_t>(total), 0};  // fewer than asked for
    if (rank == 0) scratch.result = {top, 0, memory.counts[top]};
  }
  __syncthreads();
  if (rank != 0 && above < rank && above + sum >= rank) {
    uint32_t larger = static_cast<uint32_t>(above);
    bool found = false;
#pragma unroll
    for (int i = kWidth - 1; i >= 0; --i) {
      if (!found && larger + own[i] >= rank) {
        scratch.result = {first + i, larger, own[i]};
        found = true;
      }
      larger += own[i];
    }
  }
  __syncthreads();
  const Selected result = scratch.result;
  __syncthreads();
  return result;
}

// The same from what all blocks counted: every block selects for itself, which takes less than to
// wait for one that does.
__device__ inline Selected select(const SearchMemory& memory, const uint32_t* all, int bins,
                                  uint32_t rank, uint32_t top) {
  const int most = bins > kThreads ? kBins : kThreads;
  for (int i = threadIdx.x; i < most; i += kThreads) {
    memory.counts[i] = i < bins ? __ldcg(all + i) : 0;
  }
  __syncthreads();
  return bins > kThreads ? select_here<kBins / kThreads>(memory, rank, top)
                         : select_here<1>(memory, rank, top);
}

// A rank that is not reached: there are fewer values than were asked for, and 0 is right.
constexpr uint32_t kTooFew = 0xffffffffu;

// The threshold that a key of all digits stands for.
template <typename T>
__device__ float threshold_of(uint32_t key) {
  return key >= Format<T>::kNan ? __uint_as_float(0x7fc00000u) : Format<T>::from_magnitude(key);
}

// For one selection after the other: a threshold is found.
template <typename T>
__device__ void conclude(Found& found, int s, uint32_t key, uint32_t above, uint32_t at,
                         float* thresholds) {
  const float threshold = threshold_of<T>(key);
  if (thresholds != nullptr && blockIdx.x == 0 && threadIdx.x == 0) thresholds[s] = threshold;
  if (s == 0 || magnitude(threshold) < magnitude(found.limit)) found = {threshold, above, at};
}

// The rank in the sample at which far more values than wanted are sure to be counted: twelve
// standard deviations on, since neighbours are alike.
__device__ inline uint32_t sample_rank(uint32_t rank, int64_t n) {
  const float expected = static_cast<float>(rank) / static_cast<float>(n) * kSample;
  return static_cast<uint32_t>(expected + 12.f * sqrtf(expected) + 16.f);
}

// A key (but 0) that about `rank` values of the sample reach, at least; the same in every block.
template <typename T, int kDepth, typename Source>
__device__ uint32_t sample_bound(const Source& source, int64_t n, uint32_t rank,
                                 const SearchMemory& memory) {
  memory.clear(kBins);
  const int64_t tiles = n / kTile;
  const auto place = [=](int64_t turn) {
    const int64_t tile = (turn * kThreads + threadIdx.x) * tiles / (kSampleOctets * kThreads);
    return tile * kTile + threadIdx.x * kOctet;
  };
  // The lowest bits do not matter: a bound that is a little lower is right, too.
  constexpr int kBits = 3;
  static_assert(kBins << kBits == 1 << 15);
  const auto count = [&](const Octet<T>& octet, int64_t) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const uint32_t bin = magnitude(octet.v[j]) >> (kLowBits<T> + kBits);
      count_if(bin, &memory.counts[bin]);
    }
  };
  for_octets_at<T, kDepth>(source, kSampleOctets, memory.queues, place, count);
  __syncthreads();
  return max(select_here<kBins / kThreads>(memory, rank, 0).key << kBits, 1u);
}

// Counts the values of which the key is `least` or more, and selects; returns false if what is sought
// lies elsewhere.
template <typename T, int kDepth>
__device__ bool count_from(const cooperative_groups::grid_group& grid, const Values<T>& values,
                           uint32_t least, const Ranks& ranks, Counts* all, Progress& progress,
                           Found& found, float* thresholds, const SearchMemory& memory) {
  memory.clear(kBins);
  for_each_octet<T, kDepth>(values, values.n, memory.queues, [&](const Octet<T>& octet, int64_t) {
    const uint32_t flags = flags_from(octet, least << kLowBits<T>);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      // 16 bits: NaNs may have several keys, all of which become NaN.
      const uint32_t key = sizeof(T) == 2 ? unsigned_bits(octet.v[j])
                                          : magnitude(octet.v[j]) >> kLowBits<T>;
      count_if(flags & 1u << j, &memory.counts[min(key - least, kBins - 1u)]);
    }
  });
  __syncthreads();
  memory.add_to(all->sampled, 0, kBins);
  grid.sync();
#pragma unroll
  for (int s = 0; s < kMaxSelections; ++s) {
    if (s >= ranks.count) break;
    const uint32_t rank = ranks(s);
    Selected selected = select(memory, all->sampled, kBins, rank, 0);
    // Of what lies below the first key and from the last one on nothing is known. But if only zeros
    // lie below, too few values are no mistake.
    const bool enough = selected.at != 0, knows_all = sizeof(T) == 2 && least == 1;
    if (rank == 0 || (enough ? selected.key == kBins - 1 : !knows_all)) return false;
    if (enough) selected.key += least;
    if (sizeof(T) == 2) {
      conclude<T>(found, s, selected.key, selected.above, selected.at, thresholds);
    } else {
      progress.prefix[s] = selected.key;
      progress.rank[s] = rank - selected.above;
      progress.above[s] = selected.above;
    }
  }
  return true;
}

// Counts one digit of the magnitudes that share the digits found so far, and selects.
template <typename T, int kDepth>
__device__ void count_digit(const cooperative_groups::grid_group& grid, const Values<T>& values,
                            int digit, const Ranks& ranks, Counts* all, Progress& progress,
                            Found& found, float* thresholds, const SearchMemory& memory) {
  const int shift = kDigitShift[digit] - (16 - kLowBits<T>), width = kDigitWidth[digit];
  const int bins = 1 << width, kinds = digit == 0 ? 1 : ranks.count;
  memory.clear(kinds * bins);
  for_each_octet<T, kDepth>(values, values.n, memory.queues, [&](const Octet<T>& octet, int64_t) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const uint32_t key = magnitude(octet.v[j]);
#pragma unroll
      for (int s = 0; s < kMaxSelections; ++s) {
        // Zeros are never kept.
        count_if(s < kinds && key != 0 && key >> (shift + width) == progress.prefix[s],
                 &memory.counts[s * bins + (key >> shift & (bins - 1))]);
      }
    }
  });
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kMaxSelections; ++s) {
    uint32_t* to = digit == 0 ? all->first : all->others[digit - 1][s];
    if (s < kinds) memory.add_to(to, s * bins, bins);
  }
  grid.sync();
#pragma unroll
  for (int s = 0; s < kMaxSelections; ++s) {
    if (s >= ranks.count) break;
    const uint32_t* from = digit == 0 ? all->first : all->others[digit - 1][s];
    const uint32_t rank = digit == 0 ? ranks(s) : progress.rank[s];
    const uint32_t top = Format<T>::kNan >> shift & (bins - 1);
    Selected selected = {0, 0, 0};
    if (digit == 0 || rank != kTooFew) selected = select(memory, from, bins, rank, top);
    progress.prefix[s] = progress.prefix[s] << width | selected.key;
    progress.above[s] += selected.above;
    if (digit == 0 && rank != 0 && selected.at == 0) {
      progress.rank[s] = kTooFew;
    } else if (rank != kTooFew) {
      progress.rank[s] = rank == 0 ? 0 : rank - selected.above;
    }
    if (digit == kDigits<T> - 1) {
      conclude<T>(found, s, progress.prefix[s], progress.above[s], selected.at, thresholds);
    }
  }
}

// What is known before a search of where to count first.
constexpr uint32_t kAsk = 0;          // nothing: large tensors are sampled
constexpr uint32_t kEverywhere = ~0u;  // nothing, and it is not to be asked for

// Exact thresholds. `least`: a key, below that of every threshold, or one of the constants above. All
// blocks of the grid. `thresholds` may be absent.
template <typename T, int kDepth>
__device__ Found find_thresholds(const cooperative_groups::grid_group& grid,
                                 const Values<T>& values, const Ranks& ranks, uint32_t least,
                                 Counts* counts, float* thresholds, uint4* shared) {
  const SearchMemory memory(shared);
  Found found;
  Progress progress;
  int digit = 0;
  if (least == kAsk) {
    least = kEverywhere;
    if (values.n >= kLeastSampled) {
      const uint32_t rank = sample_rank(ranks.largest(), values.n);
      least = sample_bound<T, kDepth>(values, values.n, rank, memory);
    }
  }
  if (least != kEverywhere) {
    if (count_from<T, kDepth>(grid, values, least, ranks, counts, progress, found, thresholds,
                              memory)) {
      digit = kSampledDigits;
    } else {
      progress = {};
    }
  }
  for (; digit < kDigits<T>; ++digit) {
    count_digit<T, kDepth>(grid, values, digit, ranks, counts, progress, found, thresholds, memory);
  }
  return found;
}

// A limit that about `target` values of `source` reach, from a sample; the smallest positive number if
// fewer seem to be positive; 0 if the sample does not tell. All blocks of the grid, the same in all.
template <typename T, int kDepth, typename Source>
__device__ float guess_limit(const cooperative_groups::grid_group& grid, const Source& source,
                             int64_t n, uint32_t target, uint32_t* all, uint4* shared) {
  const SearchMemory memory(shared);
  const uint32_t least = sample_bound<T, kDepth>(source, n, sample_rank(target, n), memory);
  memory.clear(kBins);
  // One octet of every thread from each stratum, of any tile of it.
  const uint32_t tiles = static_cast<uint32_t>(n / kTile);
  const uint32_t strata = min(gridDim.x * kGuessOctets, tiles);
  const float width = static_cast<float>(tiles) / static_cast<float>(strata);
  const auto place = [=](int64_t turn) {
    const uint32_t stratum = static_cast<uint32_t>(turn) * gridDim.x + blockIdx.x;
    const uint32_t begin = static_cast<uint32_t>(static_cast<float>(stratum) * width);
    const uint32_t end = static_cast<uint32_t>(static_cast<float>(stratum + 1) * width);
    const uint32_t random = (stratum * kThreads + threadIdx.x) * 2654435761u >> 8;
    const uint32_t tile = min(begin + random % max(end - begin, 1u), tiles - 1);
    return static_cast<int64_t>(tile) * kTile + threadIdx.x * kOctet;
  };
  const uint32_t own = strata > blockIdx.x ? (strata - 1 - blockIdx.x) / gridDim.x + 1 : 0;
  const auto count = [&](const Octet<T>& octet, int64_t) {
    const uint32_t flags = flags_from(octet, least << kLowBits<T>);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const uint32_t key = magnitude(octet.v[j]) >> kLowBits<T>;
      count_if(flags & 1u << j, &memory.counts[min(key - least, kBins - 1u)]);
    }
  };
  for_octets_at<T, kDepth>(source, own, memory.queues, place, count);
  __syncthreads();
  memory.add_to(all, 0, kBins);
  grid.sync();
  const double share = static_cast<double>(strata) * kTile / static_cast<double>(n);
  const uint32_t rank = max(static_cast<uint32_t>(target * share), 1u);
  const Selected found = select(memory, all, kBins, rank, 0);
  if (found.at == 0) return least == 1 ? Format<T>::from_magnitude(1) : 0.f;
  // Of the limits on both sides of the rank the nearer one.
  const bool next = rank - found.above < found.above + found.at - rank && found.above != 0;
  const uint32_t limit = (found.key + least + (next ? 1 : 0)) << kLowBits<T>;
  return found.key < kBins - 2 && limit < Format<T>::kNan ? Format<T>::from_magnitude(limit) : 0.f;
}

}  // namespace swat
