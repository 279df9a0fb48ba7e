// Exact top-K by histogram, and packing in one pass: the kernels behind `threshold`, `pack` and
// `batch_norm_relu`.
//
// `histogram_kernel` counts magnitudes, and its last block finds the K-th largest. It reads from a
// Source, so that what makes the values (batch norm, say) runs in the same pass. `pack_given_kernel`
// packs by a threshold that is known beforehand, `pack_kernel` what a selection has found; it also
// sees to it that values fit, and fills what is left of their room.

#pragma once

#include "common.cuh"

namespace swat {

constexpr int kBins = 1 << 15;   // a histogram of 15 bits of magnitude
constexpr int kMaxSelections = 2;

// Device state of one selection. It starts as zeros.
struct Control {
  uint32_t spans_begun[2];  // tickets of pack_given_kernel and pack_kernel
  uint32_t blocks_done[6];  // of a first and, after an overflow, a second selection
  uint32_t again;           // whether the sample misled the selection
  uint32_t overflow;        // whether more survive than there is room for, and the limit must rise
  float limit;              // what is packed: magnitudes from here on
  uint32_t above, at;       // how many values are larger than the limit, and equal to it
  uint32_t wanted;          // how many values the threshold asked for
  // State between the digits of a float32 selection.
  uint32_t prefix[kMaxSelections], rank[kMaxSelections], larger[kMaxSelections];
};

// Workspace of one selection, in 32-bit words: swat_jax/kernels.py allocates as much.
constexpr int64_t kControlWords = 64;
static_assert(sizeof(Control) <= kControlWords * 4);
__host__ __device__ inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
__host__ __device__ inline int64_t spans_of(int64_t n) { return (n + kSpan - 1) / kSpan; }
constexpr int64_t kDigitBins = 2 * kMaxSelections * 256;
inline int64_t selection_words(int64_t n) {
  return kControlWords + 2 * (kBins + kDigitBins) + 6 * spans_of(n);
}

struct Workspace {
  Control* control;
  uint32_t* histograms[2];  // of a first and, after an overflow, a second selection
  uint64_t* given_status;  // of spans, in pack_given_kernel
  uint64_t* status;        // of spans, in pack_kernel
  uint64_t* tie_status;    // the same for ties
  size_t bytes;

  Workspace(void* memory, int64_t n) {
    uint32_t* words = static_cast<uint32_t*>(memory);
    control = reinterpret_cast<Control*>(words);
    histograms[0] = words + kControlWords;
    histograms[1] = histograms[0] + kBins + kDigitBins;
    given_status = reinterpret_cast<uint64_t*>(histograms[1] + kBins + kDigitBins);
    status = given_status + spans_of(n);
    tie_status = status + spans_of(n);
    bytes = static_cast<size_t>(selection_words(n)) * 4;
  }
  cudaError_t clear(cudaStream_t stream) const { return cudaMemsetAsync(control, 0, bytes, stream); }
};

// Positions and counts are 32-bit words.
inline ffi::Error check_size(const char* op, const char* name, int64_t n) {
  if (n < (int64_t{1} << 32)) return ffi::Error::Success();
  return invalid(std::string(op) + ": " + name + " must have fewer than 2**32 values, got " +
                 std::to_string(n));
}

// A kernel runs if the byte is what is expected. Without a byte it is as if that were true.
struct Gate {
  const uint8_t* flag = nullptr;
  bool expected = true;
  __device__ bool is_open() const {
    return (flag == nullptr || *flag != 0) == expected;
  }
};

// How many values are to be kept: on the device ([high, low] words) or known here.
struct Ranks {
  const uint32_t* words = nullptr;
  uint32_t constant = 0;
  int count = 1;
  __device__ uint32_t operator()(int s) const {
    if (words == nullptr) return constant;
    return words[2 * s] != 0 ? 0xffffffffu : words[2 * s + 1];
  }
};

// ---- Histogram ---------------------------------------------------------------------------------

// Counts of 15-bit keys in 64 KB of shared memory, 16 bits each. No thread may add more than
// kMostAdded values, and those of four octets, before the counts are flushed.
struct BlockHistogram {
  uint32_t* words;
  static constexpr size_t kBytes = kBins * 2;
  static constexpr uint32_t kMostAdded = 0xffff / kThreads - 4 * kOctet;

  __device__ __forceinline__ void add(uint32_t key) const {
    atomicAdd(&words[key / 2], key % 2 == 0 ? 1u : 0x10000u);
  }
  // Adds the counts to those in device memory and starts again.
  __device__ void flush(uint32_t* global) const {
    for (int i = threadIdx.x; i < kBins / 2; i += kThreads) {
      const uint32_t both = words[i];
      if (both == 0) continue;
      if (both & 0xffff) atomicAdd(&global[2 * i], both & 0xffff);
      if (both >> 16) atomicAdd(&global[2 * i + 1], both >> 16);
      words[i] = 0;
    }
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
static_assert(sizeof(SelectScratch) <= BlockHistogram::kBytes);

// A histogram in device memory, to which other blocks added.
struct Counts {
  const uint32_t* counts;
  __device__ uint32_t operator()(int key) const { return __ldcg(counts + key); }
};

// The largest key of which at least `rank` values are as large or larger. If there are fewer values,
// key 0; for rank 0, `top`. All threads of one block; `bins` is a multiple of kThreads.
template <typename Histogram>
__device__ Selected select(const Histogram& histogram, int bins, uint32_t rank, uint32_t top,
                           SelectScratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int width = bins / kThreads;  // of a group of bins
  if (width == 1) {
    scratch.groups[threadIdx.x] = histogram(static_cast<int>(threadIdx.x));
  } else {
    for (int group = warp; group < kThreads; group += kWarps) {
      uint32_t sum = 0;
      for (int i = lane; i < width; i += 32) sum += histogram(group * width + i);
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
    if (rank == 0) scratch.result = {top, 0, histogram(static_cast<int>(top))};
  }
  __syncthreads();
  if (rank != 0 && above < rank && above + own >= rank) {
    uint32_t larger = static_cast<uint32_t>(above);
    for (int key = (group + 1) * width - 1;; --key) {
      const uint32_t here = histogram(key);
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

constexpr uint32_t kTooFew = 0xffffffffu;

// What a selection leaves behind.
struct Outcome {
  float* thresholds = nullptr;    // may be absent
  const float* stored = nullptr;  // thresholds where nothing is selected
  uint32_t capacity = kTooFew;    // how many values there is room for
  bool after_overflow = false;    // whether this is a second selection

  __device__ void keep_stored(int s) const {
    if (thresholds != nullptr && stored != nullptr) thresholds[s] = stored[s];
  }
  // By one thread, for one selection after the other.
  __device__ void conclude(Control* control, int s, float threshold, uint32_t above,
                           uint32_t at) const {
    if (thresholds != nullptr) thresholds[s] = threshold;
    // Of several thresholds the smallest is packed.
    if (s != 0 && magnitude(threshold) >= magnitude(control->limit)) return;
    control->limit = threshold;
    control->above = above;
    control->at = at;
    if (!after_overflow) {
      control->wanted = above + at;
      control->overflow = above > capacity;
    }
  }
};

template <typename T>
__device__ float threshold_of(uint32_t found) {
  return found >= Format<T>::kNan ? __uint_as_float(0x7fc00000u)
                                  : Format<T>::from_magnitude(found);
}

// Walks over all octets of a Source: `use(octet, i)` for each, `pause(turn)` after every tile.
template <typename T, typename Source, typename Use, typename Pause>
__device__ void for_each_octet(const Source& source, int64_t n, uint4* shared, Use use,
                               Pause pause) {
  using Queue = Streams<T, Source::kStreams>;
  const Queue queue{shared};
  const int64_t tiles = (n + kTile - 1) / kTile;
  const auto request = [&](int turn) {
    const int64_t tile = blockIdx.x + static_cast<int64_t>(turn) * gridDim.x;
    if (tile < tiles) source.request(queue, turn, tile * kTile + threadIdx.x * kOctet);
    queue.commit();
  };
  for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
  int turn = 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
    request(turn + Queue::kDepth - 1);
    queue.wait();
    const int64_t i = tile * kTile + threadIdx.x * kOctet;
    use(source.take(queue, turn, i), i);
    pause(turn);
  }
}

// Large tensors: a sample tells below which magnitude counting is useless. Most values lie there,
// and adding to the histogram is what costs time; of those above only the keys that follow closely
// are told apart, so that the counts are few. The sample never decides: if what is sought turns out
// to lie elsewhere, everything is counted again.
constexpr int kSampleOctets = 4;  // of a thread
constexpr int kSample = kSampleOctets * kTile;
constexpr int kSampleBins = 1 << 12;
constexpr int64_t kLeastSampled = int64_t{1} << 18;

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
    for (int j = 0; j < kOctet; ++j) keys[k * kOctet + j] = magnitude(octet.v[j]);
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

// Counts everything; only what a sample says is large enough; or everything without queues, on
// devices whose shared memory holds no more than the histogram.
enum class Counting { kAll, kSampled, kLean };

__host__ __device__ constexpr size_t counting_bytes(Counting counting) {
  return counting == Counting::kSampled ? kSampleBins * sizeof(uint32_t) : BlockHistogram::kBytes;
}

// Counts the top 15 bits of magnitude (all there are in a 16-bit float); the last block selects.
template <typename T, typename Source, Counting kCounting>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(Source source, int64_t n, Gate gate, Ranks ranks, Control* control,
                     uint32_t* histogram, Outcome outcome) {
  constexpr int kDrop = sizeof(T) == 2 ? 0 : 16;
  constexpr bool kSampled = kCounting == Counting::kSampled;
  constexpr int kKeys = kSampled ? kSampleBins : kBins;
  extern __shared__ uint4 dynamic[];
  if (!gate.is_open()) {
    if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < ranks.count) {
      outcome.keep_stored(threadIdx.x);
    }
    return;
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(dynamic);
  uint4* queues = dynamic + counting_bytes(kCounting) / sizeof(uint4);
  // Shared memory later serves the selection: nothing else would fit beside a histogram in 64 KB.
  SelectScratch& scratch = *reinterpret_cast<SelectScratch*>(dynamic);
  source.prepare();
  uint32_t least = 1;  // zeros are never kept
  if constexpr (kSampled) {
    uint32_t most = 0;
    for (int s = 0; s < ranks.count; ++s) most = max(most, ranks(s));
    uint32_t(&counts)[2] = *reinterpret_cast<uint32_t(*)[2]>(dynamic);
    least = sample_bound<T>(source, n, sample_rank(most, n), counts);
  }
  for (int i = threadIdx.x; i < static_cast<int>(counting_bytes(kCounting) / sizeof(uint4));
       i += kThreads) {
    dynamic[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const BlockHistogram counts{words};
  uint32_t added = 0;
  const auto use = [&](const Octet<T>& octet, int64_t i) {
    source.keep(octet, i);
    uint32_t keys[kOctet];
#pragma unroll
    for (int j = 0; j < kOctet; ++j) keys[j] = magnitude(octet.v[j]);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if constexpr (kSampled) {
        if (keys[j] >= least) atomicAdd(&words[min(keys[j] - least, kSampleBins - 1u)], 1u);
      } else {
        if (keys[j] != 0) {
          counts.add(keys[j] >> kDrop);
          ++added;
        }
      }
    }
  };
  // Counts of 16 bits go to device memory before they can be full.
  const auto pause = [&](int turn) {
    if constexpr (!kSampled) {
      if (turn % 4 != 3 || !__syncthreads_or(added > BlockHistogram::kMostAdded)) return;
      counts.flush(histogram);
      added = 0;
      __syncthreads();
    }
  };
  if constexpr (kCounting == Counting::kLean) {
    int turn = 0;
    for (int64_t tile = blockIdx.x; tile < tiles_of(n); tile += gridDim.x, ++turn) {
      const int64_t i = tile * kTile + threadIdx.x * kOctet;
      use(source.peek(i), i);
      pause(turn);
    }
  } else {
    for_each_octet<T>(source, n, queues, use, pause);
  }
  __syncthreads();
  if constexpr (kSampled) {
    for (int i = threadIdx.x; i < kSampleBins; i += kThreads) {
      if (words[i] != 0) atomicAdd(&histogram[i], words[i]);
    }
  } else {
    counts.flush(histogram);
  }
  __syncthreads();
  if (!is_last_block(&control->blocks_done[outcome.after_overflow ? 3 : 0], gridDim.x,
                     scratch.groups[0])) {
    return;
  }
  __syncthreads();
  for (int s = 0; s < ranks.count; ++s) {
    const uint32_t rank = ranks(s);
    Selected found =
        select(Counts{histogram}, kKeys, rank, kSampled ? 0 : Format<T>::kNan >> kDrop, scratch);
    if constexpr (kSampled) {
      // Of what lies below the first key and from the last one on nothing is known. But if only
      // zeros lie below, too few values are no mistake.
      const bool enough = found.at != 0;
      if (rank == 0 || (enough ? found.key == kSampleBins - 1 : least > 1)) {
        for (int i = threadIdx.x; i < kSampleBins; i += kThreads) histogram[i] = 0;
        if (threadIdx.x == 0) {
          control->again = 1;
          control->blocks_done[outcome.after_overflow ? 3 : 0] = 0;
        }
        return;
      }
      if (enough) found.key += least;
    }
    if (threadIdx.x != 0) continue;
    if (kDrop == 0) {
      outcome.conclude(control, s, threshold_of<T>(found.key), found.above, found.at);
    } else {
      control->prefix[s] = found.key;
      // Where there are too few values no digit below can be found either, and 0 is right.
      control->rank[s] = rank == 0 ? 0 : rank - found.above;
      control->larger[s] = found.above;
      if (found.at == 0 && rank != 0) control->rank[s] = kTooFew;
    }
  }
}

// The next eight bits of float32 magnitudes that share the prefix found so far.
template <typename Source>
__global__ void __launch_bounds__(kThreads)
    digit_kernel(Source source, int64_t n, Gate gate, int digit, int count, Control* control,
                 uint32_t* digits, Outcome outcome) {
  extern __shared__ uint4 dynamic[];
  __shared__ uint32_t counts[kMaxSelections][256];
  __shared__ SelectScratch scratch;
  __shared__ uint32_t shared;
  if (!gate.is_open()) return;
  const int shift = digit == 0 ? 8 : 0;
  uint32_t* global = digits + digit * kMaxSelections * 256;
  uint32_t prefix[kMaxSelections] = {};
  for (int s = 0; s < count; ++s) {
    counts[s][threadIdx.x] = 0;
    prefix[s] = control->prefix[s];
  }
  __syncthreads();
  for_each_octet<float>(
      source, n, dynamic,
      [&](const Octet<float>& octet, int64_t) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const uint32_t found = magnitude(octet.v[j]);
          if (found == 0) continue;
          for (int s = 0; s < count; ++s) {
            if (found >> (shift + 8) == prefix[s]) {
              atomicAdd(&counts[s][(found >> shift) & 255], 1u);
            }
          }
        }
      },
      [](int) {});
  __syncthreads();
  for (int s = 0; s < count; ++s) {
    const uint32_t own = counts[s][threadIdx.x];
    if (own != 0) atomicAdd(&global[s * 256 + threadIdx.x], own);
  }
  const int round = (outcome.after_overflow ? 3 : 0) + 1 + digit;
  if (!is_last_block(&control->blocks_done[round], gridDim.x, shared)) return;
  for (int s = 0; s < count; ++s) {
    const uint32_t rank = control->rank[s];
    const uint32_t top = (Format<float>::kNan >> shift) & 255;
    Selected found = {0, 0, 0};
    if (rank != kTooFew) {
      found = select(Counts{global + s * 256}, 256, rank, top, scratch);
    }
    if (threadIdx.x != 0) continue;
    control->prefix[s] = prefix[s] << 8 | found.key;
    control->larger[s] += found.above;
    if (rank != 0 && rank != kTooFew) control->rank[s] = rank - found.above;
    if (digit == 1) {
      outcome.conclude(control, s, threshold_of<float>(control->prefix[s]), control->larger[s],
                       found.at);
    }
  }
}

// ---- Packing -----------------------------------------------------------------------------------

// The packed form, see swat_jax/sparsity/packing.py.
template <typename T>
struct Packed {
  T* values = nullptr;
  uint32_t* bitmap = nullptr;
  uint32_t* offsets = nullptr;
  uint32_t* overflow = nullptr;
  uint32_t capacity = 0;
};

// The sizes of `batch` packed tensors of n values each.
struct PackedShape {
  int64_t n = 0, capacity = 0;

  int64_t tiles() const { return (n + kTile - 1) / kTile; }
  template <typename T>
  Packed<T> problem(int64_t b, void* values, void* bitmap, void* offsets, void* overflow) const {
    Packed<T> packed;
    packed.values = static_cast<T*>(values) + b * capacity;
    packed.bitmap = static_cast<uint32_t*>(bitmap) + b * bitmap_words(n);
    packed.offsets = static_cast<uint32_t*>(offsets) + b * tiles();
    packed.overflow = overflow == nullptr ? nullptr : static_cast<uint32_t*>(overflow) + b;
    packed.capacity = static_cast<uint32_t>(capacity);
    return packed;
  }
};

template <typename Buffer>
ffi::Error check_packed(const char* op, ffi::DataType type, int64_t n, int64_t batch,
                        Buffer& values, Buffer& bitmap, Buffer& offsets, PackedShape& shape) {
  const int64_t room = count_of(values);
  if (batch == 0 || room % batch != 0 || room / batch < 1 || room / batch >= (int64_t{1} << 32)) {
    return invalid(std::string(op) + ": values must have room for 1 to 2**32 - 1 values, got " +
                   std::to_string(room) + " for " + std::to_string(batch) + " tensors");
  }
  shape = {n, room / batch};
  SWAT_RETURN_IF_ERROR(check(op, "values", values, type, room, 2));
  SWAT_RETURN_IF_ERROR(check(op, "bitmap", bitmap, ffi::U32, batch * bitmap_words(n)));
  return check(op, "offsets", offsets, ffi::U32, batch * shape.tiles());
}

// How many values precede a span: decoupled look-back (Merrill and Garland, 2016). A span publishes
// its own count, adds up what the spans before it published, back to one that knows its prefix, and
// publishes its own prefix. Spans are taken in order, so those before are done or under way.
constexpr uint64_t kCounted = 1ull << 62;
constexpr uint64_t kSummed = 1ull << 63;
constexpr uint64_t kCountMask = kCounted - 1;

__device__ inline void publish(uint64_t* status, int64_t span, uint64_t own) {
  volatile uint64_t* words = status;
  words[span] = own | (span == 0 ? kSummed : kCounted);
}

// Called by the whole first warp, once the span's own count is published.
__device__ inline uint64_t look_back(uint64_t* status, int64_t span, uint64_t own) {
  constexpr int kEach = 4;  // spans that a lane looks at in one step
  if (span == 0) return 0;
  volatile uint64_t* words = status;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t before = 0;
  for (int64_t newest = span - 1;; newest -= 32 * kEach) {
    uint64_t word[kEach];
    bool waits;
    do {
      waits = false;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int64_t i = newest - lane * kEach - k;
        word[k] = kSummed;
        if (i >= 0) word[k] = words[i];
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (word[k] >> 62 == 0) waits = true;
        if ((word[k] & kSummed) != 0) break;
      }
    } while (__any_sync(kFullWarp, waits));
    uint64_t value = 0;
    bool ends = false;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!ends) value += word[k] & kCountMask;
      ends = ends || (word[k] & kSummed) != 0;
    }
    const unsigned ended = __ballot_sync(kFullWarp, ends);
    const int last = ended != 0 ? __ffs(static_cast<int>(ended)) - 1 : 31;
    if (lane > last) value = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    before += value;
    if (ended != 0) break;
  }
  if (lane == 0) words[span] = kSummed | (before + own);
  return before;
}

// A span is packed by a block, each of its tiles by one warp, in kSteps steps of one octet a lane.
constexpr int kSteps = kTile / (32 * kOctet);
static_assert(kSteps == 8);

template <typename T>
struct PackScratch {
  Octet<T>* stage;  // of one span
  uint32_t counts[2][kWarps];
  uint64_t before[2];
  uint32_t ticket;
};

// The flags of a lane: eight steps, a byte each.
struct Flags {
  uint64_t bits = 0;
  __device__ __forceinline__ uint32_t operator[](int step) const {
    return static_cast<uint32_t>(bits >> (kOctet * step)) & 0xff;
  }
  __device__ __forceinline__ void set(int step, uint32_t flags) {
    bits |= static_cast<uint64_t>(flags) << (kOctet * step);
  }
};

// Where a lane's flags lie among those of its warp's tile: of every step, how many flags of the tile
// come before.
struct Places {
  uint64_t before[2] = {};  // of four steps each, 16 bits a step
  uint32_t total = 0;

  __device__ explicit Places(const Flags& flags) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint64_t own = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        own |= static_cast<uint64_t>(__popc(flags[half * 4 + k])) << (16 * k);
      }
      uint64_t sum = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
      }
      const uint64_t all = __shfl_sync(kFullWarp, sum, 31);
      before[half] = sum - own;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        before[half] += static_cast<uint64_t>(total) << (16 * k);
        total += static_cast<uint32_t>(all >> (16 * k)) & 0xffff;
      }
    }
  }
  __device__ __forceinline__ uint32_t operator[](int step) const {
    return static_cast<uint32_t>(before[step / 4] >> (16 * (step % 4))) & 0xffff;
  }
};

// Of the counts of a span's tiles: the sum of those before this warp's, and of all.
__device__ __forceinline__ uint32_t sum_tiles(const uint32_t (&counts)[kWarps], int warp,
                                              uint32_t& total) {
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  return before;
}

// Of the ties of a span keeps as many as there is room for, in index order.
template <typename T>
__device__ void limit_ties(Flags& ties, int64_t span, uint64_t* status, uint64_t room,
                           PackScratch<T>& scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const Places places(ties);
  if (threadIdx.x % 32 == 0) scratch.counts[1][warp] = places.total;
  __syncthreads();
  uint32_t total;
  const uint32_t tile = sum_tiles(scratch.counts[1], warp, total);
  if (warp == 0) {
    if (threadIdx.x == 0) publish(status, span, total);
    __syncwarp();
    const uint64_t before = look_back(status, span, total);
    if (threadIdx.x == 0) scratch.before[1] = before;
  }
  __syncthreads();
  Flags kept;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint64_t rank = scratch.before[1] + tile + places[k];
    uint32_t flags = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (ties[k] >> j & 1) flags |= (rank++ < room ? 1u : 0u) << j;
    }
    kept.set(k, flags);
  }
  ties = kept;
}

// Packs all spans. `limit` decides; if ties are limited only `room` values that equal it are kept.
// Returns, in the block that packs the last span, how many values are kept in all.
template <bool kLimitsTies, typename T>
__device__ uint64_t pack_spans(const T* from, bool wide, int64_t n, Limit<T> limit, uint64_t room,
                               const Packed<T>& packed, uint32_t* begun, uint64_t* status,
                               uint64_t* tie_status, PackScratch<T>& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t spans = spans_of(n);
  uint64_t all = 0;
  Octet<T> octets[kSteps];
  const auto load_span = [&](int64_t span) {
    const int64_t start = span * kSpan + warp * kTile + lane * kOctet;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      octets[k] = load(from, start + k * 32 * kOctet, n, wide);
    }
  };
  if (threadIdx.x == 0) scratch.ticket = atomicAdd(begun, 1u);
  __syncthreads();
  int64_t span = scratch.ticket;
  if (span < spans) load_span(span);
  while (span < spans) {
    Flags flags, ties;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t kept = 0, equal = 0;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const bool keeps = limit.keeps(octets[k].v[j]);
        const bool is_tie = kLimitsTies && keeps && limit.equals(octets[k].v[j]);
        kept |= (keeps && !is_tie ? 1u : 0u) << j;
        equal |= (is_tie ? 1u : 0u) << j;
      }
      flags.set(k, kept);
      ties.set(k, equal);
    }
    if constexpr (kLimitsTies) {
      limit_ties(ties, span, tie_status, room, scratch);
      flags.bits |= ties.bits;
    }
    const Places places(flags);
    if (lane == 0) scratch.counts[0][warp] = places.total;
    __syncthreads();
    uint32_t total;
    const uint32_t tile = sum_tiles(scratch.counts[0], warp, total);
    if (threadIdx.x == 0) {
      publish(status, span, total);
      scratch.ticket = atomicAdd(begun, 1u);
    }
    // The tile's values in shared memory, side by side; its bitmap.
    T* stage = reinterpret_cast<T*>(scratch.stage);
    const int64_t start = span * kSpan + warp * kTile + lane * kOctet;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t at = tile + places[k];
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (flags[k] >> j & 1) stage[at++] = octets[k].v[j];
      }
      store_bits(packed.bitmap, start + k * 32 * kOctet, n, flags[k]);
    }
    __syncthreads();
    const int64_t next = scratch.ticket;
    if (next < spans) load_span(next);  // on the way while this span waits for those before it
    if (warp == 0) {
      const uint64_t before = look_back(status, span, total);
      if (lane == 0) scratch.before[0] = before;
    }
    __syncthreads();
    const uint64_t before = scratch.before[0];
    for (uint32_t i = threadIdx.x; i < total; i += kThreads) {
      if (before + i < packed.capacity) packed.values[before + i] = stage[i];
    }
    if (lane == 0 && span * kWarps + warp < (n + kTile - 1) / kTile) {
      packed.offsets[span * kWarps + warp] = static_cast<uint32_t>(before + tile);
    }
    if (span == spans - 1) all = before + total;
    span = next;
    __syncthreads();  // the stage is free again
  }
  return all;
}

constexpr int kPackBlocks = 3;  // of a multiprocessor; two are as fast

template <typename T>
constexpr size_t pack_bytes() {
  return sizeof(T) * kSpan;
}

// Packs by thresholds that are given (`stored`, the smallest counts), and finds out whether there
// is room.
template <typename T>
__global__ void __launch_bounds__(kThreads, kPackBlocks)
    pack_given_kernel(const T* from, bool wide, int64_t n, Gate gate, const float* stored,
                      int selections, Packed<T> packed, Control* control, uint64_t* status) {
  extern __shared__ uint4 dynamic[];
  __shared__ PackScratch<T> scratch;
  if (!gate.is_open()) return;
  float smallest = stored[0];
  for (int s = 1; s < selections; ++s) {
    if (magnitude(stored[s]) < magnitude(smallest)) smallest = stored[s];
  }
  if (threadIdx.x == 0) scratch.stage = reinterpret_cast<Octet<T>*>(dynamic);
  const uint64_t total =
      pack_spans<false>(from, wide, n, Limit<T>(smallest), 0, packed, &control->spans_begun[0],
                        status, nullptr, scratch);
  if (total != 0 && threadIdx.x == 0) {
    control->wanted = static_cast<uint32_t>(total);
    control->overflow = total > packed.capacity;
  }
}

// Packs what an exact selection, or the one that an overflow made necessary, has found; and fills
// what is left of the values with zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads, kPackBlocks)
    pack_kernel(const T* from, bool wide, int64_t n, Gate exact, Packed<T> packed, Control* control,
                uint64_t* status, uint64_t* tie_status) {
  extern __shared__ uint4 dynamic[];
  __shared__ PackScratch<T> scratch;
  const bool packs = exact.is_open() || control->overflow != 0;
  const uint64_t survive =
      packs ? static_cast<uint64_t>(control->above) + control->at : control->wanted;
  const uint64_t kept = survive < packed.capacity ? survive : packed.capacity;
  for (uint64_t i = kept + blockIdx.x * kThreads + threadIdx.x; i < packed.capacity;
       i += static_cast<uint64_t>(gridDim.x) * kThreads) {
    packed.values[i] = from_float<T>(0.f);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *packed.overflow = static_cast<uint32_t>(control->wanted - kept);
  }
  if (!packs) return;
  if (threadIdx.x == 0) scratch.stage = reinterpret_cast<Octet<T>*>(dynamic);
  const Limit<T> limit(control->limit);
  uint32_t* begun = &control->spans_begun[1];
  if (survive <= packed.capacity) {
    pack_spans<false>(from, wide, n, limit, 0, packed, begun, status, nullptr, scratch);
  } else {
    pack_spans<true>(from, wide, n, limit, packed.capacity - control->above, packed, begun, status,
                     tie_status, scratch);
  }
}

// ---- Sources and launches ----------------------------------------------------------------------

// A Source makes values of what it reads: `request` and `take` go through the queues of
// `for_each_octet`, `peek` reads directly, `keep` stores what was made. Beyond the end it makes zeros.

// Values that lie in memory.
template <typename T>
struct Values {
  static constexpr int kStreams = 1;
  const T* from;
  int64_t n;
  bool wide;
  Values(const T* from, int64_t n) : from(from), n(n), wide(is_wide(from)) {}
  __device__ void prepare() {}
  __device__ void request(const Streams<T, 1>& queue, int turn, int64_t i) const {
    queue.request(turn, 0, from, i, n, wide);
  }
  __device__ Octet<T> take(const Streams<T, 1>& queue, int turn, int64_t) const {
    return queue.take(turn, 0);
  }
  __device__ Octet<T> peek(int64_t i) const { return load(from, i, n, wide); }
  __device__ void keep(const Octet<T>&, int64_t) const {}
};

template <typename Kernel, typename... Args>
cudaError_t launch(cudaStream_t stream, Kernel kernel, size_t shared, int64_t work,
                   const Args&... args) {
  unsigned blocks = 0;
  const cudaError_t code = resident_blocks(kernel, shared, work, blocks);
  if (code != cudaSuccess) return code;
  kernel<<<blocks, kThreads, shared, stream>>>(args...);
  return cudaGetLastError();
}

#define SWAT_RETURN_IF_CUDA_ERROR(expression)       \
  do {                                              \
    const cudaError_t swat_code = (expression);     \
    if (swat_code != cudaSuccess) return swat_code; \
  } while (0)

// Whether blocks may have as much shared memory; with less there is no room for the sample's work.
inline bool has_shared_memory(size_t bytes) {
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         static_cast<size_t>(most) >= bytes;
}

// Exact thresholds of the values that `first` makes; `made` reads them again where that is needed:
// for the lower digits of float32, and if a sample misled.
template <typename T, typename First>
cudaError_t select_thresholds(cudaStream_t stream, const First& first, const Values<T>& made,
                              int64_t n, Gate gate, Ranks ranks, const Workspace& workspace,
                              Outcome outcome) {
  uint32_t* histogram = workspace.histograms[outcome.after_overflow ? 1 : 0];
  const auto count = [&](auto counting, const auto& source, Gate open, const Outcome& out) {
    constexpr Counting kCounting = decltype(counting)::value;
    using Source = std::decay_t<decltype(source)>;
    constexpr size_t kQueues =
        kCounting == Counting::kLean ? 0 : Streams<T, Source::kStreams>::kBytes;
    return launch(stream, histogram_kernel<T, Source, kCounting>, counting_bytes(kCounting) + kQueues,
                  tiles_of(n), source, n, open, ranks, workspace.control, histogram, out);
  };
  using All = std::integral_constant<Counting, Counting::kAll>;
  using Sampled = std::integral_constant<Counting, Counting::kSampled>;
  using Lean = std::integral_constant<Counting, Counting::kLean>;
  const auto count_all = [&](const auto& source, Gate open, const Outcome& out) {
    using Source = std::decay_t<decltype(source)>;
    const size_t bytes = BlockHistogram::kBytes + Streams<T, Source::kStreams>::kBytes;
    return has_shared_memory(bytes) ? count(All{}, source, open, out)
                                    : count(Lean{}, source, open, out);
  };
  if (sizeof(T) == 4 || n < kLeastSampled || outcome.after_overflow) {
    SWAT_RETURN_IF_CUDA_ERROR(count_all(first, gate, outcome));
  } else if constexpr (sizeof(T) == 2) {
    SWAT_RETURN_IF_CUDA_ERROR(count(Sampled{}, first, gate, outcome));
    const Gate again{reinterpret_cast<const uint8_t*>(&workspace.control->again), true};
    Outcome second = outcome;
    second.stored = nullptr;
    SWAT_RETURN_IF_CUDA_ERROR(count_all(made, again, second));
  }
  if constexpr (sizeof(T) == 4) {
    for (int digit = 0; digit < 2; ++digit) {
      SWAT_RETURN_IF_CUDA_ERROR(launch(stream, digit_kernel<Values<T>>, Streams<T, 1>::kBytes,
                                       tiles_of(n), made, n, gate, digit, ranks.count,
                                       workspace.control, histogram + kBins, outcome));
    }
  }
  return cudaSuccess;
}

// Packs by thresholds that are given, where `gate` is open; `finish_packing` follows.
template <typename T>
cudaError_t pack_given(cudaStream_t stream, const Values<T>& made, int64_t n, Gate gate,
                       const float* stored, int selections, const Packed<T>& packed,
                       const Workspace& workspace) {
  return launch(stream, pack_given_kernel<T>, pack_bytes<T>(), spans_of(n), made.from, made.wide, n,
                gate, stored, selections, packed, workspace.control, workspace.given_status);
}

// The end of every packing: where more survived than there is room for the limit rises to the
// `capacity`-th largest magnitude, and what is not packed yet is packed. `exact` is open where an
// exact selection went before; `may_overflow` is false where it is known to fit.
template <typename T>
cudaError_t finish_packing(cudaStream_t stream, const Values<T>& made, int64_t n, Gate exact,
                           bool may_overflow, const Packed<T>& packed,
                           const Workspace& workspace) {
  if (may_overflow) {
    const Gate overflow{reinterpret_cast<const uint8_t*>(&workspace.control->overflow), true};
    Ranks ranks;
    ranks.constant = packed.capacity;
    Outcome outcome;
    outcome.after_overflow = true;
    SWAT_RETURN_IF_CUDA_ERROR(
        select_thresholds<T>(stream, made, made, n, overflow, ranks, workspace, outcome));
  }
  return launch(stream, pack_kernel<T>, pack_bytes<T>(), spans_of(n), made.from, made.wide, n, exact,
                packed, workspace.control, workspace.status, workspace.tie_status);
}

}  // namespace swat
