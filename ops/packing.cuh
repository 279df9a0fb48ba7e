// The packed form (swat_jax/sparsity/packing.py), and how it is made in two passes.
//
// The first one, `mark`, says in the bitmap which values are kept and counts them; it runs where the
// values are made. The second one, `gather`, brings the kept ones together; by then everyone knows how
// many come before. Each block has a range of tiles, the same in both.

#pragma once

#include <cooperative_groups.h>

#include "common.cuh"

namespace swat {

constexpr int kParts = kWarps;  // of a tile: what one warp marks
constexpr unsigned kMostBlocks = 1024;  // of a grid; _MOST_BLOCKS in swat_jax/kernels.py

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

// The tiles of one block. Ranges are whole rounds: a tile for every warp.
struct Range {
  int64_t first, last;
  __device__ explicit Range(int64_t n) {
    const int64_t tiles = tiles_of(n), rounds = (tiles + kWarps - 1) / kWarps;
    const int64_t each = (rounds + gridDim.x - 1) / gridDim.x * kWarps;
    first = min(blockIdx.x * each, tiles);
    last = min(first + each, tiles);
  }
};

// Counts of kept values: of every part of every tile, and of every block's range.
struct Counts {
  uint16_t* parts;
  uint32_t* blocks;
};

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

// Exclusive prefix sum over the lanes of a warp.
__device__ __forceinline__ uint32_t warp_scan(uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
    if (static_cast<int>(threadIdx.x) % 32 >= step) sum += other;
  }
  return sum - value;
}

// Adds up a number of every warp, which its lanes share; all threads of a block.
__device__ __forceinline__ uint32_t block_sum(uint32_t of_warp, uint32_t (&shared)[kWarps]) {
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_warp;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// Of the blocks' numbers the sum of those before this one, and of all.
__device__ inline uint32_t sum_blocks(const uint32_t* numbers, uint32_t (&shared)[kWarps],
                                      uint32_t& all) {
  uint32_t before = 0;
  all = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    const uint32_t number = __ldcg(numbers + b);
    all += number;
    if (b < blockIdx.x) before += number;
  }
  all = block_sum(warp_sum(all), shared);
  return block_sum(warp_sum(before), shared);
}

// ---- Marking -----------------------------------------------------------------------------------

// Marks what reaches the limit of what `source` makes.
template <typename T, int kDepth, typename Source>
__device__ void mark(const Source& source, int64_t n, const Limit<T>& limit,
                     const Packed<T>& packed, const Counts& counts, uint4* shared,
                     uint32_t (&sums)[kWarps]) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  const Queue queue{shared};
  const Range range(n);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  // Where tiles are whole nobody has to look for the end.
  const int64_t whole_tiles = source.wide ? n / kTile : 0;
  const auto request = [&](int turn) {
    const int64_t tile = range.first + turn;
    if (tile < range.last) {
      source.request(queue, turn, tile * kTile + threadIdx.x * kOctet, tile < whole_tiles);
    }
    queue.commit();
  };
  for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
  uint32_t total = 0;
  int turn = 0;
  for (int64_t tile = range.first; tile < range.last; ++tile, ++turn) {
    request(turn + Queue::kDepth - 1);
    queue.wait();
    const int64_t i = tile * kTile + threadIdx.x * kOctet;
    const bool whole = tile < whole_tiles;
    const Octet<T> octet = source.take(queue, turn, i, whole);
    source.keep(octet, i, whole);
    const uint32_t flags = limit.flags(octet);
    if (whole) {
      reinterpret_cast<uint8_t*>(packed.bitmap)[i / kOctet] = static_cast<uint8_t>(flags);
    } else {
      store_bits(packed.bitmap, i, n, flags);
    }
    const uint32_t count = warp_sum(__popc(flags));
    if (lane == 0) counts.parts[tile * kParts + warp] = static_cast<uint16_t>(count);
    total += count;
  }
  total = block_sum(total, sums);
  if (threadIdx.x == 0) counts.blocks[blockIdx.x] = total;
}

// The same where only the first `room` of the values that equal the limit are kept. All blocks of a
// grid that run at once; `ties` has a word for each.
template <typename T>
__device__ void mark_limited(const cooperative_groups::grid_group& grid, const Values<T>& made,
                             int64_t n, const Limit<T>& limit, uint64_t room,
                             const Packed<T>& packed, const Counts& counts, uint32_t* ties,
                             uint32_t (&sums)[kWarps]) {
  __shared__ uint64_t scan[kWarps];
  const Range range(n);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint32_t total = 0;
  for (int64_t tile = range.first; tile < range.last; ++tile) {
    total += __popc(limit.ties(made.peek(tile * kTile + threadIdx.x * kOctet)));
  }
  total = block_sum(warp_sum(total), sums);
  if (threadIdx.x == 0) ties[blockIdx.x] = total;
  grid.sync();
  uint32_t all;
  uint64_t before = sum_blocks(ties, sums, all);
  total = 0;
  for (int64_t tile = range.first; tile < range.last; ++tile) {
    const int64_t i = tile * kTile + threadIdx.x * kOctet;
    const Octet<T> octet = made.peek(i);
    const uint32_t equal = limit.ties(octet);
    uint32_t flags = limit.flags(octet) & ~equal;
    uint64_t in_tile;
    uint64_t rank = before + block_scan(__popc(equal), scan, in_tile);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if (equal >> j & 1) flags |= (rank++ < room ? 1u : 0u) << j;
    }
    before += in_tile;
    store_bits(packed.bitmap, i, n, flags);
    const uint32_t count = warp_sum(__popc(flags));
    if (lane == 0) counts.parts[tile * kParts + warp] = static_cast<uint16_t>(count);
    total += count;
    __syncthreads();  // `scan` is free again
  }
  total = block_sum(total, sums);
  if (threadIdx.x == 0) counts.blocks[blockIdx.x] = total;
}

// ---- Gathering ---------------------------------------------------------------------------------

constexpr int kGroup = 4;  // octets of a lane that are ranked together
constexpr int kGroupValues = kGroup * 32 * kOctet;
static_assert(kTile == 2 * kGroupValues);

template <typename T>
constexpr size_t gather_bytes() {
  return sizeof(T) * kGroupValues * kWarps;
}

// Brings together what was marked; a tile for every warp, which needs nothing of the others. Returns
// how many values are marked in all.
template <typename T>
__device__ uint32_t gather(const Values<T>& made, int64_t n, const Packed<T>& packed,
                           const Counts& counts, uint4* shared, uint32_t (&sums)[kWarps]) {
  const Range range(n);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T* stage = reinterpret_cast<T*>(shared) + warp * kGroupValues;
  const unsigned staged = static_cast<unsigned>(__cvta_generic_to_shared(stage));
  uint32_t all;
  uint32_t base = sum_blocks(counts.blocks, sums, all);
  for (int64_t first = range.first; first < range.last; first += kWarps) {
    // Two parts for every lane, of the same tile.
    const int64_t part = first * kParts + 2 * lane;
    const uint32_t pair =
        part < range.last * kParts ? *reinterpret_cast<const uint32_t*>(counts.parts + part) : 0;
    const uint32_t own = (pair & 0xffff) + (pair >> 16);
    const uint32_t starts = warp_scan(own);
    uint32_t place = base + __shfl_sync(kFullWarp, starts, warp * (kParts / 2));
    base += __shfl_sync(kFullWarp, starts + own, 31);
    const int64_t tile = first + warp;
    if (tile >= range.last) continue;
    if (lane == 0) packed.offsets[tile] = place;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int64_t i = tile * kTile + half * kGroupValues + lane * kOctet;
      uint32_t flags = 0;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const int64_t at = i + g * 32 * kOctet;
        if (at < n) {
          const uint8_t* bitmap = reinterpret_cast<const uint8_t*>(packed.bitmap);
          flags |= static_cast<uint32_t>(__ldcg(bitmap + at / kOctet)) << (8 * g);
        }
      }
      Octet<T> octets[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (flags >> (8 * g) & 0xff) octets[g] = made.peek(i + g * 32 * kOctet);
      }
      const WarpRanks ranks(flags);
      uint32_t count = 0;
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        unsigned to = staged + (count + ranks.rank(g)) * static_cast<unsigned>(sizeof(T));
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          append_if(flags & 1u << (8 * g + j), to, octets[g].v[j]);
        }
        count += __shfl_sync(kFullWarp, ranks.total(g), 31);
      }
      __syncwarp();
      for (uint32_t k = lane; k < count; k += 32) {
        if (place + k < packed.capacity) packed.values[place + k] = stage[k];
      }
      place += count;
      __syncwarp();
    }
  }
  return all;
}

}  // namespace swat
