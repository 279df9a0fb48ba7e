// The K-th largest magnitudes of many tensors, those of all weights of a network, in one launch: for
// each what `threshold` finds.
//
// The tiles of all tensors lie side by side, and every block takes an equal part of them, which may
// hold the end of one tensor and the beginning of others. Digit by digit, all blocks count what they
// have of each tensor and then select for themselves, once the counts of all blocks are there.

#include "handlers.cuh"
#include "histogram.cuh"

namespace swat {
namespace {

// What a launch takes: its parameters have to fit into 4 KB.
constexpr int kMostTensors = 96;

// Digits of a magnitude, from the highest on: how wide they are and where they begin.
template <typename T>
constexpr int kDigitsOfMany = sizeof(T) == 2 ? 2 : 3;
template <typename T>
__device__ constexpr int width_of(int digit) {
  return digit < kDigitsOfMany<T> - 1 ? 12 : sizeof(T) == 2 ? 3 : 7;
}
template <typename T>
__device__ constexpr int shift_of(int digit) {
  return sizeof(T) == 2 ? (digit == 0 ? 3 : 0) : digit == 0 ? 19 : digit == 1 ? 7 : 0;
}

// Counts of one tensor, a row for each digit. They start as zeros.
constexpr int64_t kCountsOfOne = 3 * kBins;  // COUNTS_OF_ONE in swat_jax/kernels/selection.py

template <typename T>
struct Tensors {
  const T* from[kMostTensors];
  const float* stored[kMostTensors];
  float* thresholds[kMostTensors];
  uint32_t sizes[kMostTensors];
  uint32_t ends[kMostTensors];  // in tiles of all tensors so far
  int count = 0;
  const uint32_t* keep = nullptr;    // two words of each
  const uint8_t* refresh = nullptr;  // whether its threshold is searched for, or is stored
  uint32_t* counts = nullptr;        // kCountsOfOne of each

  __device__ uint32_t begin(int t) const { return t == 0 ? 0 : ends[t - 1]; }
};

// How far the search in a tensor has come: the digits found so far, and the rank among the values
// that share them.
struct Search {
  uint32_t prefix, rank;
};

template <typename T>
__device__ void select_digit(const SearchMemory& memory, const uint32_t* counts, int digit,
                             Search& search) {
  const uint32_t bins = 1u << width_of<T>(digit);
  const uint32_t top = Format<T>::kNan >> shift_of<T>(digit) & (bins - 1);
  Selected selected = {0, 0, 0};
  if (search.rank != kTooFew) {
    selected = select(memory, counts + digit * kBins, static_cast<int>(bins), search.rank, top);
  }
  search.prefix = search.prefix << width_of<T>(digit) | selected.key;
  if (digit == 0 && search.rank != 0 && selected.at == 0) {
    search.rank = kTooFew;
  } else if (search.rank != kTooFew && search.rank != 0) {
    search.rank -= selected.above;
  }
}

// Counts a digit of the values of a tensor in some tiles.
template <typename T>
__device__ void count_tiles(const SearchMemory& memory, const Values<T>& values, int64_t begin,
                            int64_t end, int digit, uint32_t prefix) {
  constexpr int kAhead = 4;  // octets in flight
  const int shift = shift_of<T>(digit), width = width_of<T>(digit);
  for (int64_t tile = begin; tile < end; tile += kAhead) {
    Octet<T> octets[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      octets[k] = tile + k < end ? values.peek((tile + k) * kTile + threadIdx.x * kOctet)
                                 : Octet<T>{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const uint32_t key = magnitude(octets[k].v[j]);
        // Zeros are never kept.
        count_if(key != 0 && key >> shift >> width == prefix,
                 &memory.counts[key >> shift & ((1u << width) - 1)]);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    thresholds_kernel(const __grid_constant__ Tensors<T> tensors) {
  __shared__ uint4 shared[(kCountBytes + sizeof(SelectScratch) + sizeof(uint4) - 1) / sizeof(uint4)];
  __shared__ Search searches[kMostTensors];
  const SearchMemory memory(shared);
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  int due = 0;
  for (int t = threadIdx.x; t < tensors.count; t += kThreads) {
    due |= tensors.refresh[t];
    if (blockIdx.x == 0 && tensors.refresh[t] == 0) *tensors.thresholds[t] = *tensors.stored[t];
  }
  if (__syncthreads_or(due) == 0) return;

  for (int64_t i = thread; i < tensors.count * kCountsOfOne; i += gridDim.x * kThreads) {
    tensors.counts[i] = 0;
  }
  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  const uint64_t tiles = tensors.ends[tensors.count - 1];
  const uint32_t begin = static_cast<uint32_t>(tiles * blockIdx.x / gridDim.x);
  const uint32_t end = static_cast<uint32_t>(tiles * (blockIdx.x + 1) / gridDim.x);
  int first = 0;
  while (tensors.ends[first] <= begin) ++first;
  for (int digit = 0; digit <= kDigitsOfMany<T>; ++digit) {
    for (int t = first; t < tensors.count && tensors.begin(t) < end; ++t) {
      if (tensors.refresh[t] == 0) continue;
      uint32_t* const counts = tensors.counts + t * kCountsOfOne;
      Search search;
      if (digit == 0) {
        Ranks ranks;
        ranks.words = tensors.keep + 2 * t;
        search = {0, ranks(0)};
      } else {
        search = searches[t];
        __syncthreads();  // who has found that there are too few values does not wait otherwise
        select_digit<T>(memory, counts, digit - 1, search);
      }
      if (threadIdx.x == 0) searches[t] = search;
      if (digit < kDigitsOfMany<T>) {
        const uint32_t from = tensors.begin(t);
        memory.clear(1 << width_of<T>(digit));
        count_tiles<T>(memory, Values<T>(tensors.from[t], tensors.sizes[t]), max(begin, from) - from,
                       min(end, tensors.ends[t]) - from, digit, search.prefix);
        __syncthreads();
        memory.add_to(counts + digit * kBins, 0, 1 << width_of<T>(digit));
      } else if (threadIdx.x == 0 && begin <= tensors.begin(t)) {
        *tensors.thresholds[t] = threshold_of<T>(search.prefix);
      }
      __syncthreads();
    }
    if (digit < kDigitsOfMany<T>) grid.sync();
  }
}

ffi::Error thresholds(cudaStream_t stream, ffi::AnyBuffer keep, ffi::AnyBuffer refresh,
                      ffi::RemainingArgs tensors, ffi::Result<ffi::AnyBuffer> scratch,
                      ffi::RemainingRets results) {
  constexpr const char* kOp = "thresholds";
  const int64_t count = static_cast<int64_t>(results.size());
  if (count < 1 || static_cast<int64_t>(tensors.size()) != 2 * count) {
    return invalid(std::string(kOp) + ": there must be a tensor and a stored threshold for every "
                   "result, got " + std::to_string(tensors.size()) + " for " +
                   std::to_string(count));
  }
  auto first = tensors.get<ffi::AnyBuffer>(0);
  if (first.has_error()) return first.error();
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", *first, 1, batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "keep", keep, ffi::U32, 2 * batch * count));
  SWAT_RETURN_IF_ERROR(check(kOp, "refresh", refresh, ffi::PRED, batch * count, 1));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * count * kCountsOfOne));
  return with_type(kOp, "x", first->element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t done = 0; done < count; done += kMostTensors) {
        Tensors<T> some;
        some.count = static_cast<int>(std::min<int64_t>(count - done, kMostTensors));
        const int64_t at = b * count + done;
        some.keep = static_cast<const uint32_t*>(keep.untyped_data()) + 2 * at;
        some.refresh = static_cast<const uint8_t*>(refresh.untyped_data()) + at;
        some.counts = static_cast<uint32_t*>(scratch->untyped_data()) + at * kCountsOfOne;
        int64_t end = 0;
        for (int t = 0; t < some.count; ++t) {
          auto x = tensors.get<ffi::AnyBuffer>(done + t);
          auto stored = tensors.get<ffi::AnyBuffer>(count + done + t);
          auto result = results.get<ffi::AnyBuffer>(done + t);
          if (x.has_error()) return x.error();
          if (stored.has_error()) return stored.error();
          if (result.has_error()) return result.error();
          const int64_t n = x->dimensions().back();
          SWAT_RETURN_IF_ERROR(check_size(kOp, "x", n));
          SWAT_RETURN_IF_ERROR(check(kOp, "x", *x, first->element_type(), batch * n, sizeof(T)));
          SWAT_RETURN_IF_ERROR(check(kOp, "stored", *stored, ffi::F32, batch));
          SWAT_RETURN_IF_ERROR(check(kOp, "result", **result, ffi::F32, batch));
          some.from[t] = static_cast<const T*>(x->untyped_data()) + b * n;
          some.stored[t] = static_cast<const float*>(stored->untyped_data()) + b;
          some.thresholds[t] = static_cast<float*>((*result)->untyped_data()) + b;
          some.sizes[t] = static_cast<uint32_t>(n);
          // An empty tensor has a tile, too, so that some block finds its threshold.
          end += std::max<int64_t>(tiles_of(n), 1);
          some.ends[t] = static_cast<uint32_t>(end);
        }
        SWAT_RETURN_IF_ERROR(cuda_error(
            kOp, launch_together(stream, thresholds_kernel<T>, 0, end, kAnyBlocks, some)));
      }
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_thresholds, swat::thresholds,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // keep
                                  .Arg<xla::ffi::AnyBuffer>()   // refresh
                                  .RemainingArgs()              // tensors, then stored thresholds
                                  .Ret<xla::ffi::AnyBuffer>()   // scratch
                                  .RemainingRets(),             // thresholds
                              {xla::ffi::Traits::kCmdBufferCompatible});
