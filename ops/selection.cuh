// Packing by thresholds that are given, or found on the way: the kernel behind `pack` and
// `batch_norm_relu`.
//
// It reads from a Source, so that what makes the values (batch norm, say) runs in the same pass.
// Thresholds that were given pack in that pass. For exact ones of a large tensor a sample guesses a
// limit that a little more values reach than are kept. What reaches it is packed in the same pass, and
// the thresholds are found among that, a small part of the tensor: who unpacks leaves out what is
// smaller. A guess never decides: if too little or too much reached it, everything is searched, as in
// small tensors, and packed again. If more reach a threshold than there is room for, it is made exact
// for as many as fit. What is to be done stands in device memory. The blocks run at once and wait for
// each other.

#pragma once

#include "histogram.cuh"
#include "packing.cuh"

namespace swat {

// How deep the queues of a pass that packs are, where shared memory has room for it.
template <typename T, int kStreams>
constexpr int kPackDepth = sizeof(T) == 2 ? (kStreams == 1 ? 8 : 4) : 2;

// Groups of a span where shared memory has room for it.
template <typename T>
constexpr int kUsualGroups = sizeof(T) == 2 ? 2 : 1;

// Counts of one selection.
struct SelectionCounts {
  uint32_t guess[kBins];
  Counts searches[2];  // the first one, and where there was no room
};
// Times that a tensor may be packed: by a guess, by what was found then, and where there was no room,
// for which ties are counted.
constexpr int kPackings = 4;

__host__ __device__ inline int64_t least_spans_of(int64_t n) {
  return (n + kLeastSpan - 1) / kLeastSpan;
}
// Workspace of one selection, in 32-bit words: swat_jax/kernels/selection.py allocates as much.
__host__ __device__ inline int64_t selection_words(int64_t n) {
  return sizeof(SelectionCounts) / sizeof(uint32_t) + kPackings * least_spans_of(n);
}

template <typename T>
struct Selection {
  uint32_t* workspace;
  int64_t n;
  Ranks ranks;
  const float* stored = nullptr;     // given thresholds; null: they are exact
  const uint8_t* refresh = nullptr;  // says that they are exact nevertheless; null: they are not
  float* thresholds = nullptr;       // those in use; null: given ones stay where there is no room
  Packed<T> packed;                  // of several thresholds the smallest decides

  __device__ bool is_exact() const {
    return stored == nullptr || (refresh != nullptr && *refresh != 0);
  }
  __device__ SelectionCounts* counts() const {
    return reinterpret_cast<SelectionCounts*>(workspace);
  }
  // A word for every span.
  __device__ uint32_t* span_counts(int which) const {
    return workspace + sizeof(SelectionCounts) / sizeof(uint32_t) + which * least_spans_of(n);
  }
  __device__ void clear() const {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    for (; i < selection_words(n); i += step) workspace[i] = 0;
  }
  // Takes the given thresholds, and returns the smallest.
  __device__ float take_stored() const {
    float smallest = stored[0];
    for (int s = 1; s < ranks.count; ++s) {
      if (magnitude(stored[s]) < magnitude(smallest)) smallest = stored[s];
    }
    const bool writes = thresholds != nullptr && blockIdx.x == 0;
    if (writes && threadIdx.x < ranks.count) thresholds[threadIdx.x] = stored[threadIdx.x];
    return smallest;
  }
  // How many values a guess should keep, between those that are wanted and those that fit; 0: a guess
  // would not help.
  __device__ uint32_t guessed_count() const {
    const uint32_t most = ranks.largest();
    const uint32_t room = packed.capacity > most ? packed.capacity - most : 0;
    if (n < kLeastGuessed || most == 0 || room < most / 25) return 0;
    // Of a hundredth of the values, one 16-bit number may hold as many as there is room for.
    if (sizeof(T) == 2 && most < n / 64) return 0;
    return most + min(room / 16 * 7, most / 32);
  }
  // Whether nothing that is sought is missing among what a guess kept.
  __device__ bool is_enough(uint32_t kept, float limit) const {
    return kept >= ranks.largest() || magnitude(limit) == magnitude(Format<T>::from_magnitude(1));
  }
  __device__ void report(uint32_t wanted) const {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    *packed.overflow = wanted > packed.capacity ? wanted - packed.capacity : 0;
  }
};

// What seldom happens, or takes little of the time, is a call, so that it takes no registers of the
// pass over everything. For the same reason they take what was given as constants.

template <typename T, typename Source, int kDepth>
__device__ __noinline__ float guess(const Source& given, const Selection<T>& selection,
                                    uint4* dynamic) {
  const uint32_t target = selection.guessed_count();
  if (target == 0) return 0.f;
  Source source = given;
  source.prepare();
  return guess_limit<T, kDepth>(cooperative_groups::this_grid(), source, selection.n, target,
                                selection.counts()->guess, dynamic);
}

// Exact thresholds from what a guess kept.
template <typename T, int kDepth>
__device__ __noinline__ void search_packed(const Selection<T>& selection, uint32_t kept,
                                           float limit, uint4* dynamic) {
  const auto grid = cooperative_groups::this_grid();
  grid.sync();  // until then others may write what they kept
  const Values<T> values(selection.packed.values, kept);
  const uint32_t least = max(Limit<T>(limit).least >> kLowBits<T>, 1u);
  find_thresholds<T, kDepth>(grid, values, selection.ranks, least,
                             &selection.counts()->searches[0], selection.thresholds, dynamic);
}

// Makes all values.
template <typename T, typename Source, int kDepth>
__device__ __noinline__ void make_values(const Source& given, int64_t n, uint4* dynamic) {
  Source source = given;
  source.prepare();
  for_each_octet<T, kDepth>(source, n, dynamic,
                            [&](const Octet<T>& octet, int64_t i) { source.keep(octet, i); });
}

// Exact thresholds from everything, and what they keep; returns how many values that should be.
template <typename T, int kDepth, int kGroups>
__device__ __noinline__ uint32_t search_and_pack(const Values<T>& made,
                                                 const Selection<T>& selection, uint4* dynamic,
                                                 PackScratch& scratch) {
  const auto grid = cooperative_groups::this_grid();
  grid.sync();  // until then others make values, or write what they kept
  const Found found =
      find_thresholds<T, kDepth>(grid, made, selection.ranks, kAsk,
                                 &selection.counts()->searches[0], selection.thresholds, dynamic);
  return pack_spans<T, kDepth, kGroups, false>(made, selection.n, Limit<T>(found.limit), Ties{},
                                               selection.packed, selection.span_counts(1), dynamic,
                                               scratch);
}

// Packs again, since more survived than there is room for: with thresholds that are exact.
template <typename T, int kDepth, int kGroups>
__device__ __noinline__ void pack_what_fits(const Values<T>& made, const Selection<T>& selection,
                                            uint4* dynamic, PackScratch& scratch) {
  const Packed<T> packed = selection.packed;
  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  Ranks ranks = selection.ranks;
  ranks.most = packed.capacity;
  const Found found =
      find_thresholds<T, kDepth>(grid, made, ranks, kEverywhere,
                                 &selection.counts()->searches[1], selection.thresholds, dynamic);
  if (selection.thresholds != nullptr) selection.report(found.above + found.at);
  const Limit<T> limit(found.limit);
  count_ties<T, kGroups>(made, selection.n, limit, selection.span_counts(3), scratch);
  grid.sync();
  const Ties ties{packed.capacity - found.above, selection.span_counts(3)};
  const uint32_t kept = pack_spans<T, kDepth, kGroups, true>(
      made, selection.n, limit, ties, packed, selection.span_counts(2), dynamic, scratch);
  clear_rest(packed, kept);
}

// Each architecture launches one of two sizes (`with_sizes`); the other is compiled for tests only.
template <int kDepth>
#if defined(__CUDA_ARCH__) && !defined(SWAT_JAX_MOST_BLOCKS)
constexpr bool kIsLaunched = (kDepth > 1) == (__CUDA_ARCH__ >= 800);
#else
constexpr bool kIsLaunched = true;
#endif

// `made` is where `source` keeps what it makes.
template <typename T, typename Source, int kDepth, int kGroups>
__global__ void __launch_bounds__(kThreads, 2)
    pack_kernel(const __grid_constant__ Source given, const __grid_constant__ Values<T> made,
                const __grid_constant__ Selection<T> selection) {
  if constexpr (kIsLaunched<kDepth>) {
    extern __shared__ uint4 dynamic[];
    __shared__ PackScratch scratch;
    const auto grid = cooperative_groups::this_grid();
    selection.clear();
    grid.sync();
    const Packed<T> packed = selection.packed;
    const bool is_exact = selection.is_exact();
    const float limit =
        is_exact ? guess<T, Source, kDepth>(given, selection, dynamic) : selection.take_stored();
    bool searches = is_exact && limit == 0.f;
    uint32_t wanted = 0;
    if (searches) {
      make_values<T, Source, kDepth>(given, selection.n, dynamic);
    } else {
      Source source = given;
      source.prepare();
      wanted = pack_spans<T, kDepth, kGroups, false>(source, selection.n, Limit<T>(limit), Ties{},
                                                     packed, selection.span_counts(0), dynamic, scratch);
      if (is_exact) {
        searches = wanted > packed.capacity || !selection.is_enough(wanted, limit);
        if (!searches) search_packed<T, kDepth>(selection, wanted, limit, dynamic);
      }
    }
    if (searches) {
      wanted = search_and_pack<T, kDepth, kGroups>(made, selection, dynamic, scratch);
    }
    selection.report(wanted);
    if (wanted > packed.capacity) {
      pack_what_fits<T, kDepth, kGroups>(made, selection, dynamic, scratch);
    } else {
      clear_rest(packed, wanted);
    }
  }
}

// ---- Launches ----------------------------------------------------------------------------------

// Calls `run` with how deep queues are and how many groups a span has, both constants.
template <typename T, int kStreams, typename Run>
cudaError_t with_sizes(Run&& run) {
  using One = std::integral_constant<int, 1>;
  if (!has_queues()) return run(One{}, One{});
  return run(std::integral_constant<int, kPackDepth<T, kStreams>>{},
             std::integral_constant<int, kUsualGroups<T>>{});
}

// Shared memory of a pass that packs, and may have to search.
template <typename T, int kStreams, int kDepth, int kGroups>
constexpr size_t kPackBytes = std::max(kCountBytes + Streams<T, kStreams, kDepth>::kBytes,
                                       pack_bytes<T, kStreams, kDepth, kGroups>());

// Workspace needs no clearing.
template <typename T, typename Source>
cudaError_t pack(cudaStream_t stream, const Source& source, const Values<T>& made,
                 const Selection<T>& selection) {
  constexpr int kStreams = Source::kStreams;
  return with_sizes<T, kStreams>([&](auto depth, auto groups) {
    constexpr int kDepth = decltype(depth)::value, kGroups = decltype(groups)::value;
    return launch_together(stream, pack_kernel<T, Source, kDepth, kGroups>,
                           kPackBytes<T, kStreams, kDepth, kGroups>,
                           spans_of<T, kGroups>(selection.n), kMostBlocks, source, made, selection);
  });
}

}  // namespace swat
