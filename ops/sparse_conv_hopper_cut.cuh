// How the weight gradient for Hopper is cut: what a block makes of dW, with how many warps, what it has
// in shared memory, and which channels it takes. What the block does stands in sparse_conv_hopper.cuh.

#pragma once

#include <cstdint>

#include "sparse_conv.cuh"

namespace swat {
namespace hopper {

constexpr uint32_t kTileWords = conv::kWordsOfTile, kTileValues = 32 * kTileWords;
constexpr uint32_t kSlots = 3;  // units of a warp in shared memory, all but one on their way
constexpr uint32_t kMostStages = 8;

// ---- The problem --------------------------------------------------------------------------------

struct Problem {
  const uint16_t* values;  // packed, `capacity` of them
  const uint32_t* bitmap;  // `words` of it
  const uint32_t* offsets;
  float* partial;          // (splits, in, out)
  uint32_t pixels, in, out;
  uint32_t capacity, words, splits;
  uint32_t x_stages, dy_stages;  // tiles in shared memory
  uint32_t room;                 // values of a unit there, a multiple of 8
};

// What a block is made of. X input channels by Y output channels, chunks of P pixels; the left operand
// of `wgmma`, 64 channels for each of its warpgroups, is x if kLeftIsX, else dY. kHalf: a pixel has
// twice as many channels as the tile. kPasses: a unit of a warp is dealt with in one pass, or in two, one
// after the other, so that the warp asks for copies, waits, and tells others half as often.
template <typename T_, uint32_t X_, uint32_t Y_, bool kLeftIsX_, uint32_t P_, uint32_t kProducerGroups_,
          bool kHalf_ = false, uint32_t kPasses_ = 1>
struct Cut {
  using T = T_;
  static constexpr uint32_t X = X_, Y = Y_, P = P_, kPasses = kPasses_;
  static constexpr bool kLeftIsX = kLeftIsX_, kHalf = kHalf_;
  static constexpr uint32_t M = kLeftIsX ? X : Y, N = kLeftIsX ? Y : X;
  static constexpr uint32_t kConsumerGroups = M / 64, kProducerGroups = kProducerGroups_;
  static constexpr uint32_t kThreads = 128 * (kConsumerGroups + kProducerGroups);
  static constexpr uint32_t kUnpackers = 4 * kProducerGroups - 1;
  // Of `offsets`. A pass has two words for a lane: a tile, or half of two.
  static constexpr uint32_t kTilesOfPass = kHalf ? 2 : 1, kTilesOfUnit = kPasses * kTilesOfPass;
  static constexpr uint32_t kWordsOfPass = kTilesOfPass * kTileWords;
  static constexpr uint32_t kWordsOfUnit = kTilesOfUnit * kTileWords;
  static constexpr uint32_t kXBytes = X * P * 2, kYBytes = Y * P * 2;
  // Registers for a thread, of 64 K: what it starts with, and what it then has.
  static constexpr uint32_t kStart = 65536 / kThreads / 8 * 8;
  static constexpr uint32_t kProduces = kConsumerGroups == 2 ? (kProducerGroups == 2 ? 80 : 48)
                                                             : (kProducerGroups == 3 ? 96 : 72);
  static constexpr uint32_t kConsumes =
      (kStart * (kConsumerGroups + kProducerGroups) - kProduces * kProducerGroups) / kConsumerGroups / 8 * 8;
  // Columns of one `wgmma`. Its sums have to fit into the registers that a thread starts with: twice as
  // many would need 160.
  static constexpr uint32_t kEach = N > 128 ? 128 : N;
  // Values of a unit that there has to be room for: what 10 % makes, and a good part more.
  static constexpr uint32_t kLeastRoom = kTilesOfUnit == 2 ? 600 : 512;
  static_assert(kProduces <= kStart && kStart <= kConsumes && kConsumes <= 240 && kStart < 160);
  static_assert(M % 64 == 0 && N % kEach == 0 && X % 64 == 0 && Y % 64 == 0 && P % 16 == 0);
  static_assert(kTilesOfUnit <= 2);
};

// The parts of dW that blocks make: those of the same pixels follow one another, so that they meet in
// the cache.
template <typename C>
struct Part {
  uint32_t split, in_block, out_block, begin, end;  // of chunks

  SWAT_INLINE Part(const Problem& problem, uint32_t block) {
    const uint32_t ins = (problem.in + C::X - 1) / C::X, outs = (problem.out + C::Y - 1) / C::Y;
    in_block = block % ins, block /= ins;
    out_block = block % outs;
    split = block / outs;
    const uint64_t chunks = (problem.pixels + C::P - 1) / C::P;
    begin = static_cast<uint32_t>(chunks * split / problem.splits);
    end = static_cast<uint32_t>(chunks * (split + 1) / problem.splits);
  }
  static SWAT_INLINE uint32_t blocks_of(const Problem& problem) {
    return (problem.in + C::X - 1) / C::X * ((problem.out + C::Y - 1) / C::Y);
  }
};

// Shared memory, in bytes from a multiple of 1,024: tiles of x, tiles of dY, units, barriers of tiles (a
// full or empty one of x or dY for every stage), barriers of units.
template <typename C>
struct Shared {
  uint32_t dy, units, slot, x_full, x_empty, y_full, y_empty, arrivals, bytes;
  SWAT_INLINE Shared(uint32_t x_stages, uint32_t dy_stages, uint32_t room) {
    dy = x_stages * C::kXBytes;
    units = dy + dy_stages * C::kYBytes;
    // A copy begins at 16 bytes, up to seven values early; and lanes read up to 36 values too many.
    slot = 4 * C::kWordsOfUnit + 2 * (room + 48);
    x_full = units + C::kUnpackers * kSlots * slot;
    x_empty = x_full + 8 * kMostStages;
    y_full = x_empty + 8 * kMostStages;
    y_empty = y_full + 8 * kMostStages;
    arrivals = y_empty + 8 * kMostStages;
    bytes = arrivals + 8 * C::kUnpackers * kSlots + 1024;  // the start may have to be moved
  }
};

// What is at `barrier + 8 * stage`, and in which turn of the ring.
struct Stage {
  uint32_t at = 0, turn = 0;
  SWAT_INLINE void step(uint32_t stages) {
    if (++at == stages) at = 0, ++turn;
  }
};

// ---- What is launched ---------------------------------------------------------------------------

// Whether a cut takes so many channels: a chunk is whole units, and those of a tile whole columns.
template <typename C>
bool takes(uint32_t in, uint32_t out) {
  const bool fits = C::kHalf ? in == 2 * C::X : in <= conv::kMostRun && in % 32 == 0;
  return fits && C::P * in % (kTileValues * C::kTilesOfUnit) == 0 && out % 8 == 0;
}

// Gives a problem the stages it asks for, or fewer, and room for as many values of a unit as there is
// memory for.
template <typename C>
bool fit(Problem& problem, uint32_t bytes) {
  const auto fits = [&](uint32_t room) {
    return Shared<C>(problem.x_stages, problem.dy_stages, room).bytes <= bytes;
  };
  while (!fits(C::kLeastRoom)) {
    uint32_t& more = problem.x_stages * C::kXBytes > problem.dy_stages * C::kYBytes ? problem.x_stages
                                                                                    : problem.dy_stages;
    if (more == 2) return false;
    --more;
  }
  problem.room = C::kLeastRoom;
  while (problem.room < kTileValues * C::kTilesOfUnit && fits(problem.room + 8)) problem.room += 8;
  return true;
}

}  // namespace hopper
}  // namespace swat
