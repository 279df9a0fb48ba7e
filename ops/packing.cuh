// The packed form (swat_jax/sparsity/packing.py), and how the blocks of a grid make it in one pass.
//
// Work is dealt out in spans of a few tiles, a round at a time: one span for every block. Where the
// values of a span go depends on how many all spans before it keep. Each block publishes the count
// of its span and goes on with the next rounds; once the counts of a round are there, what it kept
// leaves shared memory for its place. At 90 % sparsity several rounds fit there, so that a block
// hardly ever waits for the others. Every warp keeps what it found to itself, and the warps of a
// block meet once a round only.

#pragma once

#include "blocks.cuh"
#include "handlers.cuh"
#include "memory.cuh"

namespace swat {

// Octets of a thread that are ranked together: one in each of as many tiles.
template <typename T>
constexpr int kGroup = sizeof(T) == 2 ? 4 : 2;
// A span: so many groups of tiles.
template <typename T, int kGroups>
constexpr int kSteps = kGroups * kGroup<T>;
template <typename T, int kGroups>
constexpr int kSpan = kSteps<T, kGroups> * kTile;
constexpr int kLeastSpan = kSpan<float, 1>;  // _SPAN in swat_jax/kernels/selection.py
constexpr int kMostSteps = 8;
// Blocks of a grid that packs: two counts for a thread. Few of them make many rounds of few values,
// for tests.
#ifdef SWAT_JAX_MOST_BLOCKS
constexpr unsigned kMostBlocks = SWAT_JAX_MOST_BLOCKS;
#else
constexpr unsigned kMostBlocks = 2 * kThreads;
#endif
static_assert(kMostBlocks <= 2 * kThreads);
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
// each octet, at most 248, a byte for each; and how many the whole warp has, 16 bits for each.
struct WarpRanks {
  uint32_t before, even, odd;  // totals of octets 0 and 2, and 1 and 3
  __device__ __forceinline__ explicit WarpRanks(uint32_t flags) {
    // Counts of pairs of bits, of nibbles, of bytes.
    uint32_t own = flags - (flags >> 1 & 0x55555555u);
    own = (own & 0x33333333u) + (own >> 2 & 0x33333333u);
    own = (own + (own >> 4)) & 0x0f0f0f0fu;
    even = warp_sum(own & 0x00ff00ffu);
    odd = warp_sum(own >> 8 & 0x00ff00ffu);
    // With its own a byte may count to 256 and carry; what is then subtracted takes it back.
    before = warp_scan(own);
  }
  __device__ __forceinline__ uint32_t rank(int k) const { return before >> (8 * k) & 0xff; }
  __device__ __forceinline__ uint32_t total(int k) const {
    return (k % 2 == 0 ? even : odd) >> (k < 2 ? 0 : 16) & 0xffff;
  }
};

// Rounds whose values are on the stage: fewer than this.
constexpr int kPending = 8;

struct alignas(16) PackScratch {
  uint16_t counts[kPending][kMostSteps * kWarps];  // of flags in a round's span, by tile and warp
  uint32_t starts[kPending][kWarps];               // where a round begins on each warp's stage
  uint32_t before[2][kWarps], all[2][kWarps];  // of counts of other spans, a part for every warp
  int crowded[2];  // the last round, even and odd, after which a stage had no room; plus 1
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
  for (int k = 0; lane == 0 && k < steps; ++k) {
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

// What is kept of the values that equal the limit, if not all of them.
struct Ties {
  uint32_t room;         // the first so many
  const uint32_t* each;  // how many there are in every span
};

// Packs what `source` makes, all blocks of a grid of kMostBlocks at most, which run at once.
// `counted` has a word for every span, all zeros. Returns, everywhere, how many values were kept.
// `ties` is used if kTies.
template <typename T, int kDepth, int kGroups, bool kTies, typename Source>
__device__ __forceinline__ uint32_t pack_spans(const Source& source, int64_t n,
                                               const Limit<T>& limit, const Ties& ties,
                                               const Packed<T>& packed, uint32_t* counted,
                                               uint4* shared, PackScratch& scratch) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  constexpr int kTiles = kSteps<T, kGroups>, kValues = kSpan<T, kGroups>;
  constexpr int kParts = kTiles * kWarps;  // of a span: what one warp has of one tile
  constexpr int kEach = kParts < 32 ? 1 : kParts / 32;  // parts of which a lane knows the counts
  static_assert(kTiles % Queue::kDepth == 0 && kTiles <= kMostSteps && kWarps == 8 && kEach <= 2);
  constexpr uint32_t kMost = kValues / kWarps;  // that a warp may keep in a round
  const Queue queue{shared};
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* const stage =
      reinterpret_cast<T*>(shared + Queue::kBytes / sizeof(uint4)) + warp * 2 * kMost;
  const int64_t spans = spans_of<T, kGroups>(n);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const auto rounds_of = [&](int of, int64_t all) {
    return of < all ? static_cast<int>((all - of + blocks - 1) / blocks) : 0;
  };
  const int rounds = rounds_of(0, spans), whole_rounds =
      source.wide ? rounds_of(block, n / kValues) : 0;

  // ---- What was staged, and goes to its place.
  int written = 0;    // rounds
  uint32_t base = 0;  // values that they kept
  // Two blocks for every thread, whose counts it adds up, and in how many rounds they have spans.
  int known[2];
  const volatile uint32_t* counts[2];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int other = which * kThreads + static_cast<int>(threadIdx.x);
    known[which] = other < blocks ? rounds_of(other, spans) : 0;
    counts[which] = counted + other;
  }
  const auto look = [&](int which) -> uint32_t {
    return written < known[which] ? *counts[which] : kPublished;
  };
  const auto sum_counts = [&](const uint32_t (&words)[2]) {
    uint32_t before = 0, all = 0;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t count = words[which] & ~kPublished;
      all += count;
      if (which * kThreads + static_cast<int>(threadIdx.x) < block) before += count;
    }
    before = warp_sum(before);
    all = warp_sum(all);
    if (lane == 0) scratch.before[written & 1][warp] = before, scratch.all[written & 1][warp] = all;
  };
  // Writes the next round, whose counts have been added up.
  const auto write = [&] {
    const uint32_t place = base + sum_of(scratch.before[written & 1]);
    base += sum_of(scratch.all[written & 1]);
    // Part lane * kEach + m is that of warp part % kWarps in tile part / kWarps: how many values
    // come before it, and how many it has, in the low 16 bits.
    uint32_t parts[kEach], sum = 0;
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const uint32_t part = lane * kEach + m;
      parts[m] = part < kParts ? scratch.counts[written % kPending][part] : 0;
      sum += parts[m];
    }
    uint32_t start = warp_scan(sum);
    const int64_t tile = (static_cast<int64_t>(written) * blocks + block) * kTiles +
                         lane * kEach / kWarps;
    if (warp == 0 && lane * kEach % kWarps == 0 && lane * kEach < kParts && tile < tiles_of(n)) {
      packed.offsets[tile] = place + start;
    }
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const uint32_t count = parts[m];
      parts[m] |= start << 16;
      start += count;
    }
    const uint32_t own = kEach == 2 && warp % 2 != 0 ? parts[kEach - 1] : parts[0];
    const T* from = stage + scratch.starts[written % kPending][warp] + lane;
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const uint32_t part = __shfl_sync(kFullWarp, own, (k * kWarps + warp) / kEach);
      const uint32_t count = part & 0xffff, to = place + (part >> 16);
      const uint32_t fits = to < packed.capacity ? min(count, packed.capacity - to) : 0;
      if (lane < fits) packed.values[to + lane] = *from;
#pragma unroll 1
      for (uint32_t i = lane + 32; i < fits; i += 32) packed.values[to + i] = from[i - lane];
      from += count;
    }
    __syncwarp();
    ++written;
    counts[0] += blocks;
    counts[1] += blocks;
  };
  const auto wait_and_write = [&] {
    uint32_t words[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      do words[which] = look(which);
      while (words[which] == 0);
    }
    sum_counts(words);
    __syncthreads();
    write();
  };
  // Where a round may begin on the stage of this warp, which holds those from `written` to before
  // `round`, the last of which ends at `end`; kNowhere if it might not fit.
  constexpr uint32_t kNowhere = ~0u;
  const auto place_for = [&](int round, uint32_t end) {
    if (round == written) return 0u;
    if (round - written > kPending - 2) return kNowhere;
    const uint32_t oldest = scratch.starts[written % kPending][warp];
    if (end < oldest) return end + kMost < oldest ? end : kNowhere;
    if (end <= kMost) return end;
    return kMost < oldest ? 0u : kNowhere;
  };
  if (threadIdx.x < 2) scratch.crowded[threadIdx.x] = 0;
  __syncthreads();

  // ---- What is found, and staged.
  const int64_t stride = static_cast<int64_t>(blocks) * kValues;
  int64_t first = static_cast<int64_t>(block) * kValues + threadIdx.x * kOctet;
  // Slots of the queue go with the steps, so `step` is its turn.
  const auto request = [&](bool there, int64_t from, int step) {
    if (there) source.request(queue, step, from + step * kTile, true);
    queue.commit();
  };
  for (int step = 0; step < Queue::kDepth - 1; ++step) request(0 < whole_rounds, first, step);
  uint64_t ties_before = 0;
  int64_t ties_from = 0;
  uint32_t end = 0;  // of what is on the stage of this warp
  for (int round = 0; round < rounds; ++round, first += stride) {
    const uint32_t words[2] = {look(0), look(1)};  // of the next round to be written
    const uint32_t start = place_for(round, end);
    if constexpr (kTies) {
      const int64_t span = static_cast<int64_t>(round) * blocks + block;
      uint32_t between = 0;  // ties of the spans since the last one of this block
      for (int64_t s = ties_from + threadIdx.x; s < span && s < spans; s += kThreads) {
        between += ties.each[s];
      }
      ties_from = span + 1;
      between = warp_sum(between);
      __syncthreads();
      if (lane == 0) scratch.all[0][warp] = between;
      __syncthreads();
      ties_before += sum_of(scratch.all[0]);
      __syncthreads();
    }
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(stage + start));
    end = start;
    uint16_t* const totals = &scratch.counts[round % kPending][warp];
    uint8_t* const bitmap = reinterpret_cast<uint8_t*>(packed.bitmap) + first / kOctet;
    const auto flags_of_octet = [&](const Octet<T>& octet, int k, bool whole, uint32_t& equal) {
      const uint32_t found = limit.flags(octet);
      if constexpr (kTies) {
        equal = limit.ties(octet);
      } else if (whole) {
        bitmap[k * kThreads] = static_cast<uint8_t>(found);
      } else {
        store_bits(packed.bitmap, first + k * kTile, n, found);
      }
      return found;
    };
    const auto stage_group = [&](const Octet<T>(&octets)[kGroup<T>], int group, uint32_t flags,
                                 uint32_t equal) {
      if constexpr (kTies) {
        flags = (flags & ~equal) | first_ties(equal, kGroup<T>, ties_before, ties.room, scratch);
#pragma unroll
        for (int g = 0; g < kGroup<T>; ++g) {
          store_bits(packed.bitmap, first + (group * kGroup<T> + g) * kTile, n,
                     flags >> (8 * g) & 0xff);
        }
      }
      const WarpRanks ranks(flags);
#pragma unroll
      for (int g = 0; g < kGroup<T>; ++g) {
        const uint32_t total = ranks.total(g);
        append(octets[g], flags >> (8 * g),
               address + ranks.rank(g) * static_cast<unsigned>(sizeof(T)));
        address += total * static_cast<unsigned>(sizeof(T));
        end += total;
        if (lane == 0) {
          totals[(group * kGroup<T> + g) * kWarps] = static_cast<uint16_t>(total);
        }
      }
    };
    // `octet_of(k)` makes the octet of tile k; `whole` is known when this is compiled.
    const auto pack_group = [&](int group, auto whole, auto octet_of) {
      constexpr bool kWhole = decltype(whole)::value;
      Octet<T> octets[kGroup<T>];
      uint32_t flags = 0, equal = 0;
#pragma unroll
      for (int g = 0; g < kGroup<T>; ++g) {
        const int k = group * kGroup<T> + g;
        octets[g] = octet_of(k);
        source.keep(octets[g], first + k * kTile, kWhole);
        uint32_t same = 0;
        flags |= flags_of_octet(octets[g], k, kWhole, same) << (8 * g);
        equal |= same << (8 * g);
      }
      stage_group(octets, group, flags, equal);
    };
    if (round < whole_rounds) {
      const bool goes_on = round + 1 < whole_rounds;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        pack_group(group, std::true_type{}, [&](int k) {
          constexpr int kAhead = Queue::kDepth - 1;
          if (k + kAhead < kTiles) {
            request(true, first, k + kAhead);
          } else {
            request(goes_on, first + stride, k + kAhead - kTiles);
          }
          queue.wait();
          return source.take(queue, k, first + k * kTile, true);
        });
      }
    } else {
#pragma unroll 1
      for (int group = 0; group < kGroups; ++group) {
        pack_group(group, std::false_type{},
                   [&](int k) { return source.peek(first + k * kTile); });
      }
    }
    if (lane == 0) {
      scratch.starts[round % kPending][warp] = start;
      if (place_for(round + 1, end) == kNowhere) scratch.crowded[round & 1] = round + 1;
    }
    sum_counts(words);
    const bool is_known = written < round && words[0] != 0 && words[1] != 0;
    const bool all_known = __syncthreads_and(is_known);
    if (warp == 0) {
      uint32_t kept = 0;
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        const uint32_t part = lane * kEach + m;
        if (part < kParts) kept += scratch.counts[round % kPending][part];
      }
      kept = warp_sum(kept);
      const int64_t span = static_cast<int64_t>(round) * blocks + block;
      if (lane == 0 && span < spans) {
        *const_cast<volatile uint32_t*>(counted + span) = kPublished | kept;
      }
    }
    if (all_known) write();
    if (scratch.crowded[round & 1] == round + 1) {
      while (__syncthreads_or(place_for(round + 1, end) == kNowhere)) wait_and_write();
    }
  }
  while (written < rounds) {
    wait_and_write();
    __syncthreads();
  }
  return base;
}

// Makes what no value was kept for zero.
template <typename T>
__device__ void clear_rest(const Packed<T>& packed, uint32_t kept) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = kept + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i < packed.capacity; i += step) packed.values[i] = from_float<T>(0.f);
}

template <typename T, int kStreams, int kDepth, int kGroups>
constexpr size_t pack_bytes() {
  return Streams<T, kStreams, kDepth>::kBytes + 2 * sizeof(T) * kSpan<T, kGroups>;
}

}  // namespace swat
