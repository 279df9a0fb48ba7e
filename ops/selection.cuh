// Thresholds and packing in one launch: the kernel behind `threshold`, `pack` and `batch_norm_relu`.
//
// It reads from a Source, so that what makes the values (batch norm, say) runs in the same pass. By
// thresholds that are given it packs in that pass. Exact ones are known after it: a second pass packs
// what the first made. If more values survive than there is room for, the limit rises to the
// `capacity`-th largest magnitude, which takes a search and a pass more. What is to be done stands in
// device memory; all blocks run at once and meet at barriers of the grid.

#pragma once

#include "histogram.cuh"
#include "packing.cuh"

namespace swat {

// Workspace of one selection, in 32-bit words: swat_jax/kernels.py allocates as much.
inline int64_t selection_words(int64_t n) {
  return 2 * sizeof(Search) / sizeof(uint32_t) + 3 * spans_of(n);
}

template <typename T>
struct Selection {
  uint32_t* workspace;
  Ranks ranks;
  const uint8_t* refresh = nullptr;  // says whether thresholds are exact; null: as `exact`
  bool exact = true;
  const float* stored = nullptr;  // the thresholds otherwise
  float* thresholds = nullptr;    // those in use; may be absent
  Packed<T> packed;               // of several thresholds the smallest decides
};

template <typename T, typename Source, bool kPacks, int kDepth>
constexpr size_t selection_bytes() {
  constexpr size_t kSearch = kCountBytes + Streams<T, Source::kStreams, kDepth>::kBytes;
  return kPacks ? std::max(kSearch, pack_bytes<T, Source::kStreams, kDepth>()) : kSearch;
}

// `made` is where `source` keeps what it makes.
template <typename T, typename Source, bool kPacks, int kDepth>
__global__ void __launch_bounds__(kThreads, kPacks ? 2 : 3)
    select_kernel(Source source, Values<T> made, int64_t n, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  __shared__ PackScratch scratch;
  const auto grid = cooperative_groups::this_grid();
  const bool exact = selection.refresh == nullptr ? selection.exact : *selection.refresh != 0;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  if (!exact && selection.thresholds != nullptr && thread < selection.ranks.count) {
    selection.thresholds[thread] = selection.stored[thread];
  }
  if (!kPacks && !exact) return;
  constexpr int64_t kSearchWords = sizeof(Search) / sizeof(uint32_t);
  const int64_t spans = spans_of(n);
  for (int64_t i = thread; i < 2 * kSearchWords + 3 * spans; i += threads) {
    selection.workspace[i] = 0;
  }
  Search* search = reinterpret_cast<Search*>(selection.workspace);
  uint32_t* counted = selection.workspace + 2 * kSearchWords;
  source.prepare();
  grid.sync();
  if (exact) {
    find_thresholds<T, kDepth>(grid, source, made, n, selection.ranks, true, search, selection.thresholds,
                       dynamic);
  }
  if constexpr (kPacks) {
    const Packed<T> packed = selection.packed;
    uint32_t wanted, kept;
    bool is_packed = false, rises;
    if (exact) {
      wanted = search->above + search->at;
      rises = search->above > packed.capacity;
    } else {
      float smallest = selection.stored[0];
      for (int s = 1; s < selection.ranks.count; ++s) {
        if (magnitude(selection.stored[s]) < magnitude(smallest)) smallest = selection.stored[s];
      }
      const PackLimit<T> cut{Limit<T>(smallest)};
      kept = wanted = pack_spans<T, kDepth>(source, n, cut, packed, counted, dynamic, scratch);
      rises = wanted > packed.capacity;
      is_packed = !rises;
    }
    if (rises) {
      grid.sync();  // all values are made
      ++search;
      Ranks ranks;
      ranks.constant = packed.capacity;
      find_thresholds<T, kDepth>(grid, made, made, n, ranks, false, search, nullptr, dynamic);
    }
    if (!is_packed) {
      PackLimit<T> cut{Limit<T>(search->limit)};
      uint32_t* ties = counted + 2 * spans;
      kept = search->above + search->at;
      if (kept > packed.capacity) {
        cut.limits_ties = true;
        cut.room = packed.capacity - search->above;
        cut.ties = ties;
        kept = packed.capacity;
        count_ties(made, n, cut.limit, ties, scratch);
        grid.sync();
      }
      pack_spans<T, kDepth>(made, n, cut, packed, counted + spans, dynamic, scratch);
    }
    for (int64_t i = kept + thread; i < packed.capacity; i += threads) {
      packed.values[i] = from_float<T>(0.f);
    }
    if (thread == 0) *packed.overflow = wanted - kept;
  }
}

template <bool kPacks, typename T, typename Source>
cudaError_t select(cudaStream_t stream, const Source& source, const Values<T>& made, int64_t n,
                   const Selection<T>& selection) {
  const auto run = [&](auto depth) {
    constexpr int kDepth = decltype(depth)::value;
    return launch_together(stream, select_kernel<T, Source, kPacks, kDepth>,
                           selection_bytes<T, Source, kPacks, kDepth>(),
                           kPacks ? spans_of(n) : tiles_of(n), kMostBlocks, source, made, n,
                           selection);
  };
  constexpr size_t kMost = selection_bytes<T, Source, kPacks, kUsualDepth<T>>();
  if constexpr (kMost + sizeof(PackScratch) > 64 * 1024) {
    // Compute capability 7.5 has that much; it has no queues either.
    if (!has_shared_memory(kMost + sizeof(PackScratch))) {
      return run(std::integral_constant<int, 1>{});
    }
  }
  return run(std::integral_constant<int, kUsualDepth<T>>{});
}

}  // namespace swat
