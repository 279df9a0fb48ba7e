// Thresholds and packing: the kernels behind `threshold`, `pack` and `batch_norm_relu`.
//
// They read from a Source, so that what makes the values (batch norm, say) runs in the same pass.
// `search_kernel` finds exact thresholds, if they are wanted, and makes the values on the way.
// `pack_kernel` packs by thresholds: those that were found, from the values that were made; those
// that were given, in the pass that makes them. If more survive than there is room for, it makes the
// thresholds exact and packs again. What is to be done stands in device memory. The blocks of each
// kernel run at once and wait for each other.

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

// Device state of one selection. It starts as zeros.
struct Control {
  Search searches[2];  // of search_kernel, and where there was no room
};

__host__ __device__ inline int64_t least_spans_of(int64_t n) {
  return (n + kLeastSpan - 1) / kLeastSpan;
}
// Workspace of one selection, in 32-bit words: swat_jax/kernels.py allocates as much.
__host__ __device__ inline int64_t selection_words(int64_t n) {
  return sizeof(Control) / sizeof(uint32_t) + 3 * least_spans_of(n);
}

template <typename T>
struct Selection {
  uint32_t* workspace;
  int64_t n;
  Ranks ranks;
  const uint8_t* refresh = nullptr;  // says whether thresholds are exact; null: they are
  const float* stored = nullptr;     // the thresholds otherwise
  float* thresholds = nullptr;       // those in use
  bool keeps_thresholds = false;     // they are not to be changed where there is no room
  Packed<T> packed;                  // of several thresholds the smallest decides

  __device__ bool is_exact() const { return refresh == nullptr || *refresh != 0; }
  __device__ Control* control() const { return reinterpret_cast<Control*>(workspace); }
  // A word for every span: counts, those where there was no room, and of ties there.
  __device__ uint32_t* counts(int which) const {
    return workspace + sizeof(Control) / sizeof(uint32_t) + which * least_spans_of(n);
  }
};

// `made` is where `source` keeps what it makes.
template <typename T, typename Source, int kDepth>
__global__ void __launch_bounds__(kThreads, 3)
    search_kernel(Source source, Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t words = selection_words(selection.n);
  for (int64_t i = thread; i < words; i += threads) selection.workspace[i] = 0;
  if (!selection.is_exact()) {
    if (thread < selection.ranks.count) selection.thresholds[thread] = selection.stored[thread];
    return;
  }
  const auto grid = cooperative_groups::this_grid();
  source.prepare();
  grid.sync();
  find_thresholds<T, kDepth>(grid, source, made, selection.n, selection.ranks, true,
                             &selection.control()->searches[0], selection.thresholds, dynamic);
}

// Packs again, since more survived than there is room for: with thresholds that are exact. A call,
// so that what seldom happens takes no registers of what always does.
template <typename T, int kDepth, int kGroups>
__device__ __noinline__ void pack_exactly(const Values<T>& made, const Selection<T>& selection,
                                          uint4* dynamic, PackScratch& scratch) {
  const Packed<T> packed = selection.packed;
  const auto grid = cooperative_groups::this_grid();
  grid.sync();  // until then others may write what they kept
  Search* search = &selection.control()->searches[1];
  Ranks ranks = selection.ranks;
  ranks.most = packed.capacity;
  const bool keeps = selection.keeps_thresholds;
  find_thresholds<T, kDepth>(grid, made, made, selection.n, ranks, false, search,
                             keeps ? nullptr : selection.thresholds, dynamic);
  if (!keeps && blockIdx.x == 0 && threadIdx.x == 0) {
    const uint64_t wanted = uint64_t{search->above} + search->at;
    *packed.overflow =
        wanted > packed.capacity ? static_cast<uint32_t>(wanted - packed.capacity) : 0;
  }
  const Limit<T> limit(search->limit);
  count_ties<T, kGroups>(made, selection.n, limit, selection.counts(2), scratch);
  grid.sync();
  const Ties ties{packed.capacity - search->above, selection.counts(2)};
  const uint32_t kept = pack_spans<T, kDepth, kGroups, true>(
      made, selection.n, limit, ties, packed, selection.counts(1), dynamic, scratch);
  clear_rest(packed, kept);
}

template <typename T, typename Source, int kDepth, int kGroups>
__global__ void __launch_bounds__(kThreads, 2)
    pack_kernel(Source source, Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  __shared__ PackScratch scratch;
  const Packed<T> packed = selection.packed;
  float smallest = selection.thresholds[0];
  for (int s = 1; s < selection.ranks.count; ++s) {
    if (magnitude(selection.thresholds[s]) < magnitude(smallest)) smallest = selection.thresholds[s];
  }
  const Limit<T> limit(smallest);
  uint32_t wanted;
  if (std::is_same_v<Source, Values<T>> || selection.is_exact()) {
    wanted = pack_spans<T, kDepth, kGroups, false>(made, selection.n, limit, Ties{}, packed,
                                                   selection.counts(0), dynamic, scratch);
  } else {
    source.prepare();
    wanted = pack_spans<T, kDepth, kGroups, false>(source, selection.n, limit, Ties{}, packed,
                                                   selection.counts(0), dynamic, scratch);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *packed.overflow = wanted > packed.capacity ? wanted - packed.capacity : 0;
  }
  if (wanted > packed.capacity) {
    pack_exactly<T, kDepth, kGroups>(made, selection, dynamic, scratch);
  } else {
    clear_rest(packed, wanted);
  }
}

// ---- Launches ----------------------------------------------------------------------------------

// Calls `run` with how deep queues are and how many groups a span has, both constants. `bytes` of
// shared memory are needed with the usual ones; up to compute capability 7.5 a block may not have
// them, and there are no queues either.
template <typename T, int kStreams, typename Run>
cudaError_t with_sizes(size_t bytes, Run&& run) {
  using One = std::integral_constant<int, 1>;
  if (!has_shared_memory(bytes + sizeof(PackScratch))) return run(One{}, One{});
  return run(std::integral_constant<int, kPackDepth<T, kStreams>>{},
             std::integral_constant<int, kUsualGroups<T>>{});
}

template <typename T, typename Source>
cudaError_t search(cudaStream_t stream, const Source& source, const Values<T>& made,
                   const Selection<T>& selection) {
  constexpr int kDepth = kUsualDepth<T>;
  return launch_together(stream, search_kernel<T, Source, kDepth>,
                         kCountBytes + Streams<T, Source::kStreams, kDepth>::kBytes,
                         tiles_of(selection.n), kMostBlocks, source, made, selection);
}

// Shared memory of a pass that packs, and may have to search.
template <typename T, int kStreams, int kDepth, int kGroups>
constexpr size_t kPackBytes = std::max(kCountBytes + Streams<T, 1, kDepth>::kBytes,
                                       pack_bytes<T, kStreams, kDepth, kGroups>());

// `search` or a clear workspace comes before.
template <typename T, typename Source>
cudaError_t pack(cudaStream_t stream, const Source& source, const Values<T>& made,
                 const Selection<T>& selection) {
  constexpr int kStreams = Source::kStreams;
  constexpr size_t kBytes = kPackBytes<T, kStreams, kPackDepth<T, kStreams>, kUsualGroups<T>>;
  return with_sizes<T, kStreams>(kBytes, [&](auto depth, auto groups) {
    constexpr int kDepth = decltype(depth)::value, kGroups = decltype(groups)::value;
    return launch_together(stream, pack_kernel<T, Source, kDepth, kGroups>,
                           kPackBytes<T, kStreams, kDepth, kGroups>,
                           spans_of<T, kGroups>(selection.n), kMostBlocks, source, made, selection);
  });
}

}  // namespace swat
