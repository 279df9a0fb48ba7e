// The packed form (swat_jax/sparsity/packing.py), and how the blocks of a grid make it in one pass.
//
// Work is dealt out in spans of a few tiles, a round at a time: one span for every block. Where the
// values of a span go depends on how many all spans before it keep. Each block publishes the count
// of its span and goes on with the next round; at its end the counts of the round before have long
// arrived, and what was kept there leaves shared memory for its place.

#pragma once

#include "common.cuh"

namespace swat {

constexpr int kSteps = 4;  // tiles of a span
constexpr int64_t kSpan = kSteps * kTile;  // _SPAN in swat_jax/kernels.py
constexpr unsigned kMostBlocks = 2 * kThreads;  // of a grid that packs: two counts for a thread
__host__ __device__ inline int64_t spans_of(int64_t n) { return (n + kSpan - 1) / kSpan; }

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

  template <typename T>
  Packed<T> problem(int64_t b, void* values, void* bitmap, void* offsets, void* overflow) const {
    Packed<T> packed;
    packed.values = static_cast<T*>(values) + b * capacity;
    packed.bitmap = static_cast<uint32_t*>(bitmap) + b * bitmap_words(n);
    packed.offsets = static_cast<uint32_t*>(offsets) + b * tiles_of(n);
    packed.overflow = overflow == nullptr ? nullptr : static_cast<uint32_t*>(overflow) + b;
    packed.capacity = static_cast<uint32_t>(capacity);
    return packed;
  }
};

// Positions and counts are 32-bit words.
inline ffi::Error check_size(const char* op, const char* name, int64_t n) {
  if (n < (int64_t{1} << 32)) return ffi::Error::Success();
  return invalid(std::string(op) + ": " + name + " must have fewer than 2**32 values, got " +
                 std::to_string(n));
}

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
  return check(op, "offsets", offsets, ffi::U32, batch * tiles_of(n));
}

// ---- Ranks -------------------------------------------------------------------------------------

// Of four octets of a thread, a byte of flags each: how many flags the lanes before it have in each
// octet, at most 248, and how many this lane has; a byte for each.
struct WarpRanks {
  uint32_t before, own = 0;
  __device__ explicit WarpRanks(uint32_t flags) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < 4; ++k) own |= __popc(flags >> (8 * k) & 0xff) << (8 * k);
    before = __shfl_up_sync(kFullWarp, own, 1);
    if (lane == 0) before = 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, before, step);
      if (lane >= step) before += other;
    }
  }
  __device__ __forceinline__ uint32_t rank(int k) const { return before >> (8 * k) & 0xff; }
  // In the last lane how many flags the warp has.
  __device__ __forceinline__ uint32_t total(int k) const {
    return rank(k) + (own >> (8 * k) & 0xff);
  }
};

struct alignas(16) PackScratch {
  uint32_t counts[kSteps][kWarps];  // of flags in the span that is being read
  uint32_t before[kWarps], all[kWarps];  // of counts of other spans, a part for every warp
};

__device__ __forceinline__ uint32_t sum_of(const uint32_t (&parts)[kWarps]) {
  static_assert(kWarps == 8);
  const uint4 low = reinterpret_cast<const uint4*>(parts)[0];
  const uint4 high = reinterpret_cast<const uint4*>(parts)[1];
  return low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
}
static_assert(kSteps * kWarps == 32 && kSteps == 4);

// Where the flags of a thread lie among those of its span.
struct SpanRanks {
  uint32_t first[kSteps];  // of every step: how many flags of the span come before
  uint32_t total;
  uint32_t start;  // in lane k * kWarps: how many come before tile k

  // All threads of a block; meets the others once, so what was written before can be read.
  __device__ SpanRanks(uint32_t flags, PackScratch& scratch) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const WarpRanks ranks(flags);
    if (lane == 31) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) scratch.counts[k][warp] = ranks.total(k);
    }
    __syncthreads();
    const uint32_t own = scratch.counts[lane / kWarps][lane % kWarps];
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += other;
    }
    total = __shfl_sync(kFullWarp, sum, 31);
    start = sum - own;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      first[k] = __shfl_sync(kFullWarp, start, k * kWarps + warp) + ranks.rank(k);
    }
  }
};

// ---- Packing -----------------------------------------------------------------------------------

// A count that was published; 0 says that it was not.
constexpr uint32_t kPublished = 1u << 31;

// How many of the values of every span equal the limit.
template <typename T>
__device__ void count_ties(const Values<T>& made, int64_t n, const Limit<T>& limit, uint32_t* ties,
                           PackScratch& scratch) {
  for (int64_t span = blockIdx.x; span < spans_of(n); span += gridDim.x) {
    uint32_t count = 0;
    for (int k = 0; k < kSteps; ++k) {
      const Octet<T> octet = made.peek(span * kSpan + k * kTile + threadIdx.x * kOctet);
      count += __popc(limit.ties(octet));
    }
    count = warp_sum(count);
    if (threadIdx.x % 32 == 0) scratch.all[threadIdx.x / 32] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t total = 0;
      for (int w = 0; w < kWarps; ++w) total += scratch.all[w];
      ties[span] = total;
    }
    __syncthreads();
  }
}

// Which of a span's ties are among the first `room`; `before` lie in the spans before it.
__device__ inline uint32_t first_ties(uint32_t flags, uint64_t before, uint32_t room,
                                      PackScratch& scratch) {
  const SpanRanks ranks(flags, scratch);
  uint32_t kept = 0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint64_t rank = before + ranks.first[k];
#pragma unroll
    for (int j = 8 * k; j < 8 * k + 8; ++j) {
      if (flags >> j & 1) kept |= (rank++ < room ? 1u : 0u) << j;
    }
  }
  __syncthreads();
  return kept;
}

// The limit that decides, and whether there is room for all that equal it.
template <typename T>
struct PackLimit {
  Limit<T> limit;
  bool limits_ties = false;
  uint32_t room = 0;               // for ties, if they are limited
  const uint32_t* ties = nullptr;  // of every span, if they are limited
};

// Packs what `source` makes, all blocks of a grid of kMostBlocks at most, which run at once.
// `counted` has a word for every span, all zeros. Returns, everywhere, how many values were kept.
template <typename T, int kDepth, typename Source>
__device__ uint32_t pack_spans(const Source& source, int64_t n, const PackLimit<T>& cut,
                               const Packed<T>& packed, uint32_t* counted, uint4* shared,
                               PackScratch& scratch) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  static_assert(kSteps % Queue::kDepth == 0);
  const Queue queue{shared};
  T* stage = reinterpret_cast<T*>(shared + Queue::kBytes / sizeof(uint4));
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t spans = spans_of(n);
  const int rounds = static_cast<int>((spans + gridDim.x - 1) / gridDim.x);
  const auto span_of = [&](int round) {
    return static_cast<int64_t>(round) * gridDim.x + blockIdx.x;
  };
  const auto index = [&](int round) { return span_of(round) * kSpan + threadIdx.x * kOctet; };
  // Whether a round's span is whole: then nobody has to look for its end.
  const auto is_whole = [&](int round) {
    return source.wide && (span_of(round) + 1) * kSpan <= n;
  };
  // Slots of the queue go with the steps, so `step` is its turn.
  const auto request = [&](int round, int step, bool whole) {
    source.request(queue, step, index(round) + step * kTile, whole);
    queue.commit();
  };
  // Two spans of a round for every thread, whose counts it adds up.
  const auto look = [&](int round, int which) -> uint32_t {
    const unsigned block = which * kThreads + threadIdx.x;
    const int64_t span = static_cast<int64_t>(round) * gridDim.x + block;
    if (round < 0 || block >= gridDim.x || span >= spans) return kPublished;
    return *const_cast<volatile uint32_t*>(counted + span);
  };
  const auto sum_counts = [&](int round, uint32_t (&words)[2]) {
    uint32_t before = 0, all = 0;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      while (words[which] == 0) words[which] = look(round, which);
      const uint32_t count = words[which] & ~kPublished;
      all += count;
      if (which * kThreads + threadIdx.x < blockIdx.x) before += count;
    }
    before = warp_sum(before);
    all = warp_sum(all);
    if (lane == 0) scratch.before[warp] = before, scratch.all[warp] = all;
  };
  uint32_t base = 0;           // values kept in all rounds that were written
  uint32_t held = 0, start = 0;  // of the span on the stage: its total, and SpanRanks::start
  const auto write = [&](int round) {
    const uint32_t place = base + sum_of(scratch.before);
    base += sum_of(scratch.all);
    for (uint32_t i = threadIdx.x; i < held; i += kThreads) {
      if (place + i < packed.capacity) packed.values[place + i] = stage[i];
    }
    const int64_t tile = span_of(round) * kSteps + lane / kWarps;
    if (warp == 0 && lane % kWarps == 0 && tile < tiles_of(n)) packed.offsets[tile] = place + start;
  };

  bool whole = is_whole(0);
  for (int step = 0; step < Queue::kDepth - 1; ++step) request(0, step, whole);
  uint64_t ties_before = 0;
  int64_t ties_from = 0;
  for (int round = 0; round < rounds; ++round) {
    uint32_t words[2] = {look(round - 1, 0), look(round - 1, 1)};
    Octet<T> octets[kSteps];
    uint32_t flags = 0, ties = 0;
    const bool next_whole = is_whole(round + 1);
    const int64_t first = index(round);
    uint8_t* bitmap = reinterpret_cast<uint8_t*>(packed.bitmap) + first / kOctet;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      constexpr int kAhead = Queue::kDepth - 1;
      if (k + kAhead < kSteps) {
        request(round, k + kAhead, whole);
      } else {
        request(round + 1, k + kAhead - kSteps, next_whole);
      }
      queue.wait();
      const int64_t i = first + k * kTile;
      octets[k] = source.take(queue, k, i, whole);
      source.keep(octets[k], i, whole);
      const uint32_t found = cut.limit.flags(octets[k]);
      flags |= found << (8 * k);
      if (cut.limits_ties) {
        ties |= cut.limit.ties(octets[k]) << (8 * k);
      } else if (whole) {
        bitmap[k * kThreads] = static_cast<uint8_t>(found);
      } else {
        store_bits(packed.bitmap, i, n, found);
      }
    }
    whole = next_whole;
    if (cut.limits_ties) {
      uint32_t between = 0;  // ties of the spans since the last one of this block
      for (int64_t s = ties_from + threadIdx.x; s < span_of(round) && s < spans; s += kThreads) {
        between += cut.ties[s];
      }
      ties_from = span_of(round);
      between = warp_sum(between);
      if (lane == 0) scratch.all[warp] = between;
      __syncthreads();
      ties_before += sum_of(scratch.all);
      flags = (flags & ~ties) | first_ties(ties, ties_before, cut.room, scratch);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        store_bits(packed.bitmap, first + k * kTile, n, flags >> (8 * k) & 0xff);
      }
    }
    sum_counts(round - 1, words);
    const SpanRanks ranks(flags, scratch);
    if (threadIdx.x == 0 && span_of(round) < spans) {
      *const_cast<volatile uint32_t*>(counted + span_of(round)) = kPublished | ranks.total;
    }
    if (round > 0) write(round - 1);
    __syncthreads();  // the stage is free
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(stage + ranks.first[k]));
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        append_if(flags & 1u << (8 * k + j), address, octets[k].v[j]);
      }
    }
    held = ranks.total;
    start = ranks.start;
  }
  uint32_t words[2] = {};
  sum_counts(rounds - 1, words);
  __syncthreads();
  write(rounds - 1);
  __syncthreads();
  return base;
}

template <typename T, int kStreams, int kDepth>
constexpr size_t pack_bytes() {
  return Streams<T, kStreams, kDepth>::kBytes + sizeof(T) * kSpan;
}

}  // namespace swat
