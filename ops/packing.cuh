// The packed form (swat_jax/sparsity/packing.py), and how the blocks of a grid make it in one pass.
//
// Work is dealt out in spans of a few tiles, a round at a time: one span for every block. Where the
// values of a span go depends on how many all spans before it keep. Each block publishes the count
// of its span and goes on with the next round; at its end the counts of the round before have long
// arrived, and what was kept there leaves shared memory for its place. Until then every warp keeps
// what it found to itself, so that the warps of a block meet once a round only.

#pragma once

#include "common.cuh"

namespace swat {

// Octets of a thread that are ranked together: one in each of as many tiles.
template <typename T>
constexpr int kGroup = sizeof(T) == 2 ? 4 : 2;
// A span: so many groups of tiles.
template <typename T, int kGroups>
constexpr int kSteps = kGroups * kGroup<T>;
template <typename T, int kGroups>
constexpr int kSpan = kSteps<T, kGroups> * kTile;
constexpr int kLeastSpan = kSpan<float, 1>;  // _SPAN in swat_jax/kernels.py
constexpr int kMostSteps = 8;
constexpr unsigned kMostBlocks = 2 * kThreads;  // of a grid that packs: two counts for a thread
template <typename T, int kGroups>
__host__ __device__ int64_t spans_of(int64_t n) {
  return (n + kSpan<T, kGroups> - 1) / kSpan<T, kGroups>;
}

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

// Of up to four octets of a thread, a byte of flags each: how many flags the lanes before it have in
// each octet, at most 248, and how many this lane has; a byte for each.
struct WarpRanks {
  uint32_t before, own = 0;
  __device__ explicit WarpRanks(uint32_t flags) {
#pragma unroll
    for (int k = 0; k < 4; ++k) own |= __popc(flags >> (8 * k) & 0xff) << (8 * k);
    // With its own a byte may count to 256 and carry; what is then subtracted takes it back.
    before = warp_scan(own);
  }
  __device__ __forceinline__ uint32_t rank(int k) const { return before >> (8 * k) & 0xff; }
  // In the last lane how many flags the warp has.
  __device__ __forceinline__ uint32_t total(int k) const {
    return rank(k) + (own >> (8 * k) & 0xff);
  }
};

struct alignas(16) PackScratch {
  // Of two rounds, since some warps may still read what was written in the round before.
  uint32_t counts[2][kMostSteps * kWarps];  // of flags in the present span, by tile and warp
  uint32_t before[2][kWarps], all[2][kWarps];  // of counts of other spans, a part for every warp
  uint32_t ties[32];  // of a group of tiles, by tile and warp
};

__device__ __forceinline__ uint32_t sum_of(const uint32_t (&parts)[kWarps]) {
  const uint4 low = reinterpret_cast<const uint4*>(parts)[0];
  const uint4 high = reinterpret_cast<const uint4*>(parts)[1];
  return low.x + low.y + low.z + low.w + high.x + high.y + high.z + high.w;
}

// ---- Packing -----------------------------------------------------------------------------------

// A count that was published; 0 says that it was not.
constexpr uint32_t kPublished = 1u << 31;

// How many of the values of every span equal the limit.
template <typename T, int kGroups>
__device__ void count_ties(const Values<T>& made, int64_t n, const Limit<T>& limit, uint32_t* ties,
                           PackScratch& scratch) {
  for (int64_t span = blockIdx.x; span < spans_of<T, kGroups>(n); span += gridDim.x) {
    uint32_t count = 0;
    for (int k = 0; k < kSteps<T, kGroups>; ++k) {
      const Octet<T> octet =
          made.peek(span * kSpan<T, kGroups> + k * kTile + threadIdx.x * kOctet);
      count += __popc(limit.ties(octet));
    }
    count = warp_sum(count);
    if (threadIdx.x % 32 == 0) scratch.all[0][threadIdx.x / 32] = count;
    __syncthreads();
    if (threadIdx.x == 0) ties[span] = sum_of(scratch.all[0]);
    __syncthreads();
  }
}

// Which ties of a group of tiles are among the first `room`; `before` come before it, and then
// before the next one.
__device__ __noinline__ inline uint32_t first_ties(uint32_t flags, int steps, uint64_t& before,
                                                   uint32_t room, PackScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const WarpRanks ranks(flags);
  __syncthreads();
  for (int k = 0; lane == 31 && k < steps; ++k) {
    scratch.ties[k * kWarps + warp] = ranks.total(k);
  }
  __syncthreads();
  const uint32_t count = lane < steps * kWarps ? scratch.ties[lane] : 0;
  const uint32_t starts = warp_scan(count);
  uint32_t kept = 0;
  for (int k = 0; k < steps; ++k) {
    uint64_t rank = before + __shfl_sync(kFullWarp, starts, k * kWarps + warp) + ranks.rank(k);
    for (int j = 8 * k; j < 8 * k + 8; ++j) {
      if (flags >> j & 1) kept |= (rank++ < room ? 1u : 0u) << j;
    }
  }
  before += __shfl_sync(kFullWarp, starts + count, 31);
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
template <typename T, int kDepth, int kGroups, typename Source>
__device__ uint32_t pack_spans(const Source& source, int64_t n, const PackLimit<T>& limit,
                               const Packed<T>& packed, uint32_t* counted, uint4* shared,
                               PackScratch& scratch) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  constexpr int kTiles = kSteps<T, kGroups>, kValues = kSpan<T, kGroups>;
  constexpr int kParts = kTiles * kWarps;  // of a span: what one warp has of one tile
  constexpr int kEach = kParts < 32 ? 1 : kParts / 32;  // parts of which a lane knows the counts
  static_assert(kTiles % Queue::kDepth == 0 && kTiles <= kMostSteps && kWarps == 8 && kEach <= 2);
  const Queue queue{shared};
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T* const stages =
      reinterpret_cast<T*>(shared + Queue::kBytes / sizeof(uint4)) + warp * (kValues / kWarps);
  const int64_t spans = spans_of<T, kGroups>(n);
  const int rounds = static_cast<int>((spans + gridDim.x - 1) / gridDim.x);
  const auto span_of = [&](int round) {
    return static_cast<int64_t>(round) * gridDim.x + blockIdx.x;
  };
  const auto index = [&](int round) { return span_of(round) * kValues + threadIdx.x * kOctet; };
  // Whether a round's span is whole: then nobody has to look for its end.
  const auto is_whole = [&](int round) {
    return source.wide && (span_of(round) + 1) * kValues <= n;
  };
  // Slots of the queue go with the steps, so `step` is its turn.
  const auto request = [&](int64_t first, int step, bool whole) {
    source.request(queue, step, first + step * kTile, whole);
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
    if (lane == 0) scratch.before[round & 1][warp] = before, scratch.all[round & 1][warp] = all;
  };
  uint32_t base = 0;  // values kept in all rounds that were written
  // Of the span on the stage, part lane * kEach + m is that of warp part % kWarps in tile
  // part / kWarps: how many values it has, and how many come before it.
  uint32_t held[kEach] = {}, starts[kEach] = {};
  const auto write = [&](int round) {
    const uint32_t place = base + sum_of(scratch.before[round & 1]);
    base += sum_of(scratch.all[round & 1]);
    const T* stage = stages + (round & 1) * kValues;
    const uint32_t own_held = held[warp % kEach], own_start = starts[warp % kEach];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int owner = (k * kWarps + warp) / kEach;
      const uint32_t count = __shfl_sync(kFullWarp, own_held, owner);
      const uint32_t to = place + __shfl_sync(kFullWarp, own_start, owner);
#pragma unroll 1
      for (uint32_t i = lane; i < count; i += 32) {
        if (to + i < packed.capacity) packed.values[to + i] = stage[i];
      }
      stage += count;
    }
    const int64_t tile = span_of(round) * kTiles + lane * kEach / kWarps;
    if (warp == 0 && lane * kEach % kWarps == 0 && lane * kEach < kParts && tile < tiles_of(n)) {
      packed.offsets[tile] = place + starts[0];
    }
  };

  bool whole = is_whole(0);
  for (int step = 0; step < Queue::kDepth - 1; ++step) request(index(0), step, whole);
  uint64_t ties_before = 0;
  int64_t ties_from = 0;
  for (int round = 0; round < rounds; ++round) {
    uint32_t words[2] = {look(round - 1, 0), look(round - 1, 1)};
    const bool next_whole = is_whole(round + 1);
    const int64_t first = index(round), next_first = index(round + 1);
    uint8_t* bitmap = reinterpret_cast<uint8_t*>(packed.bitmap) + first / kOctet;
    if (limit.limits_ties) {
      uint32_t between = 0;  // ties of the spans since the last one of this block
      for (int64_t s = ties_from + threadIdx.x; s < span_of(round) && s < spans; s += kThreads) {
        between += limit.ties[s];
      }
      ties_from = span_of(round) + 1;
      between = warp_sum(between);
      __syncthreads();
      if (lane == 0) scratch.all[0][warp] = between;
      __syncthreads();
      ties_before += sum_of(scratch.all[0]);
      __syncthreads();
    }
    unsigned address = static_cast<unsigned>(
        __cvta_generic_to_shared(stages + (round & 1) * kValues));
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      Octet<T> octets[kGroup<T>];
      uint32_t flags = 0, ties = 0;
#pragma unroll
      for (int g = 0; g < kGroup<T>; ++g) {
        const int k = group * kGroup<T> + g;
        constexpr int kAhead = Queue::kDepth - 1;
        if (k + kAhead < kTiles) {
          request(first, k + kAhead, whole);
        } else {
          request(next_first, k + kAhead - kTiles, next_whole);
        }
        queue.wait();
        const int64_t i = first + k * kTile;
        octets[g] = source.take(queue, k, i, whole);
        source.keep(octets[g], i, whole);
        const uint32_t found = limit.limit.flags(octets[g]);
        flags |= found << (8 * g);
        if (limit.limits_ties) {
          ties |= limit.limit.ties(octets[g]) << (8 * g);
        } else if (whole) {
          bitmap[k * kThreads] = static_cast<uint8_t>(found);
        } else {
          store_bits(packed.bitmap, i, n, found);
        }
      }
      if (limit.limits_ties) {
        flags = (flags & ~ties) | first_ties(ties, kGroup<T>, ties_before, limit.room, scratch);
#pragma unroll
        for (int g = 0; g < kGroup<T>; ++g) {
          const int64_t i = first + (group * kGroup<T> + g) * kTile;
          store_bits(packed.bitmap, i, n, flags >> (8 * g) & 0xff);
        }
      }
      const WarpRanks ranks(flags);
#pragma unroll
      for (int g = 0; g < kGroup<T>; ++g) {
        const uint32_t total = __shfl_sync(kFullWarp, ranks.total(g), 31);
        unsigned to = address + ranks.rank(g) * static_cast<unsigned>(sizeof(T));
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          append_if(flags & 1u << (8 * g + j), to, octets[g].v[j]);
        }
        address += total * static_cast<unsigned>(sizeof(T));
        if (lane == 0) {
          scratch.counts[round & 1][(group * kGroup<T> + g) * kWarps + warp] = total;
        }
      }
    }
    whole = next_whole;
    sum_counts(round - 1, words);
    __syncthreads();
    uint32_t found[kEach], places[kEach], sum = 0;
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const int part = lane * kEach + m;
      found[m] = part < kParts ? scratch.counts[round & 1][part] : 0;
      sum += found[m];
    }
    places[0] = warp_scan(sum);
#pragma unroll
    for (int m = 1; m < kEach; ++m) places[m] = places[m - 1] + found[m - 1];
    if (threadIdx.x == 31 && span_of(round) < spans) {
      *const_cast<volatile uint32_t*>(counted + span_of(round)) =
          kPublished | (places[kEach - 1] + found[kEach - 1]);
    }
    if (round > 0) write(round - 1);
#pragma unroll
    for (int m = 0; m < kEach; ++m) held[m] = found[m], starts[m] = places[m];
  }
  uint32_t words[2] = {};
  sum_counts(rounds - 1, words);
  __syncthreads();
  write(rounds - 1);
  __syncthreads();
  return base;
}

template <typename T, int kStreams, int kDepth, int kGroups>
constexpr size_t pack_bytes() {
  return Streams<T, kStreams, kDepth>::kBytes + 2 * sizeof(T) * kSpan<T, kGroups>;
}

}  // namespace swat
