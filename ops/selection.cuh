// Thresholds and packing: the kernels behind `threshold`, `pack` and `batch_norm_relu`.
//
// They read from a Source, so that what makes the values (batch norm, say) runs in the same pass.
// `search_kernel` finds exact thresholds, if they are wanted, and makes the values on the way.
// `mark_kernel` says what is kept by thresholds: those that were found, of the values that were made;
// those that were given, in the pass that makes them. `gather_kernel` brings the kept ones together.
// If there is no room for all, `overflow_kernel` raises the limit to the `capacity`-th largest
// magnitude and does it again. What is to be done stands in device memory.

#pragma once

#include "histogram.cuh"
#include "packing.cuh"

namespace swat {

// Device state of one selection.
struct Control {
  Search searches[2];  // of search_kernel and overflow_kernel; they start as zeros
  uint32_t wanted;     // how many values the thresholds asked for
  uint32_t blocks[kMostBlocks], ties[kMostBlocks];  // see Counts and mark_limited
  uint32_t padding[4 - (2 * sizeof(Search) / 4 + 1) % 4];
};
static_assert(sizeof(Control) % 16 == 0);

// Workspace of one selection, in 32-bit words: swat_jax/kernels.py allocates as much.
__host__ __device__ inline int64_t selection_words(int64_t n) {
  return sizeof(Control) / sizeof(uint32_t) + tiles_of(n) * (kParts / 2);
}

template <typename T>
struct Selection {
  uint32_t* workspace;
  int64_t n;
  Ranks ranks;
  const uint8_t* refresh = nullptr;  // says whether thresholds are exact; null: they are
  const float* stored = nullptr;     // the thresholds otherwise
  float* thresholds = nullptr;       // those in use
  Packed<T> packed;                  // of several thresholds the smallest decides

  __device__ bool is_exact() const { return refresh == nullptr || *refresh != 0; }
  __device__ Control* control() const { return reinterpret_cast<Control*>(workspace); }
  __device__ Counts counts() const {
    return {reinterpret_cast<uint16_t*>(control() + 1), control()->blocks};
  }
};

// `made` is where `source` keeps what it makes.
template <typename T, typename Source, int kDepth>
__global__ void __launch_bounds__(kThreads, 3)
    search_kernel(Source source, Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  constexpr int64_t kWords = sizeof(Control::searches) / sizeof(uint32_t);
  for (int64_t i = thread; i < kWords; i += threads) selection.workspace[i] = 0;
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

template <typename T, typename Source, int kDepth>
__global__ void __launch_bounds__(kThreads, 3)
    mark_kernel(Source source, Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t sums[kWarps];
  float smallest = selection.thresholds[0];
  for (int s = 1; s < selection.ranks.count; ++s) {
    if (magnitude(selection.thresholds[s]) < magnitude(smallest)) smallest = selection.thresholds[s];
  }
  const Limit<T> limit(smallest);
  if (std::is_same_v<Source, Values<T>> || selection.is_exact()) {
    mark<T, kDepth>(made, selection.n, limit, selection.packed, selection.counts(), dynamic, sums);
  } else {
    source.prepare();
    mark<T, kDepth>(source, selection.n, limit, selection.packed, selection.counts(), dynamic, sums);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    gather_kernel(Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t sums[kWarps];
  const Packed<T> packed = selection.packed;
  const uint32_t wanted = gather(made, selection.n, packed, selection.counts(), dynamic, sums);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = wanted + thread; i < packed.capacity;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    packed.values[i] = from_float<T>(0.f);
  }
  if (thread == 0) {
    selection.control()->wanted = wanted;
    *packed.overflow = wanted > packed.capacity ? wanted - packed.capacity : 0;
  }
}

template <typename T, int kDepth>
__global__ void __launch_bounds__(kThreads, 2)
    overflow_kernel(Values<T> made, Selection<T> selection) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t sums[kWarps];
  const Packed<T> packed = selection.packed;
  Control* control = selection.control();
  if (control->wanted <= packed.capacity) return;
  const auto grid = cooperative_groups::this_grid();
  Search* search = &control->searches[1];
  Ranks ranks;
  ranks.constant = packed.capacity;
  find_thresholds<T, kDepth>(grid, made, made, selection.n, ranks, false, search, nullptr, dynamic);
  mark_limited(grid, made, selection.n, Limit<T>(search->limit), packed.capacity - search->above,
               packed, selection.counts(), control->ties, sums);
  grid.sync();
  gather(made, selection.n, packed, selection.counts(), dynamic, sums);
}

// ---- Launches ----------------------------------------------------------------------------------

template <typename T, typename Source>
cudaError_t search(cudaStream_t stream, const Source& source, const Values<T>& made,
                   const Selection<T>& selection) {
  constexpr int kDepth = kUsualDepth<T>;
  return launch_together(stream, search_kernel<T, Source, kDepth>,
                         kCountBytes + Streams<T, Source::kStreams, kDepth>::kBytes,
                         tiles_of(selection.n), kMostBlocks, source, made, selection);
}

// `search` comes before, or `clear`.
template <typename T, typename Source>
cudaError_t pack(cudaStream_t stream, const Source& source, const Values<T>& made,
                 const Selection<T>& selection) {
  constexpr int kDepth = kUsualDepth<T>;
  constexpr size_t kMark = Streams<T, Source::kStreams, kDepth>::kBytes;
  const int64_t rounds = (tiles_of(selection.n) + kWarps - 1) / kWarps;
  unsigned blocks = 0;
  SWAT_RETURN_IF_CUDA_ERROR(
      resident_blocks(mark_kernel<T, Source, kDepth>, kMark, rounds, blocks));
  blocks = std::min(blocks, kMostBlocks);
  mark_kernel<T, Source, kDepth><<<blocks, kThreads, kMark, stream>>>(source, made, selection);
  SWAT_RETURN_IF_CUDA_ERROR(cudaGetLastError());
  // The same ranges: as many blocks.
  gather_kernel<T><<<blocks, kThreads, gather_bytes<T>(), stream>>>(made, selection);
  SWAT_RETURN_IF_CUDA_ERROR(cudaGetLastError());
  constexpr size_t kSearch = kCountBytes + Streams<T, 1, kDepth>::kBytes;
  return launch_together(stream, overflow_kernel<T, kDepth>,
                         std::max(kSearch, gather_bytes<T>()), rounds, kMostBlocks, made,
                         selection);
}

template <typename T>
cudaError_t clear(cudaStream_t stream, const Selection<T>& selection) {
  return cudaMemsetAsync(selection.workspace, 0, sizeof(Control::searches), stream);
}

}  // namespace swat
