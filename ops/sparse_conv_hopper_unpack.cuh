// What the unpacking warps of sparse_conv_hopper.cuh do: they put the kept values of x into tiles of
// zeros.

#pragma once

#include <cstdint>

#include "hopper_instructions.cuh"
#include "sparse_conv_hopper_cut.cuh"

namespace swat {
namespace hopper {

constexpr uint32_t kAtOnce = 4;  // values of a word that are put together
constexpr uint32_t kBatch = 32;  // units of a warp whose `offsets` are read together

// ---- Where things lie ---------------------------------------------------------------------------

// The word of a chunk: which pixel, and which of the pixel's words.
struct PixelWord {
  uint32_t pixel, word;
};
// `inverse` is inverse_of(words of a pixel): right for what a chunk has, up to 64 pixels of 16 words.
SWAT_INLINE uint32_t inverse_of(uint32_t words_of_pixel) {
  return (65536 + words_of_pixel - 1) / words_of_pixel;
}
SWAT_INLINE PixelWord pixel_word(uint32_t word, uint32_t words_of_pixel, uint32_t inverse) {
  const uint32_t pixel = word * inverse >> 16;
  return {pixel, word - pixel * words_of_pixel};
}
// Where the 32 channels of a word begin in a tile with `P` pixels, in bytes; channel `bit` of them is
// at place ^ 2 * bit. `word` counts from the tile's first channel.
template <uint32_t P>
SWAT_INLINE uint32_t place_of(uint32_t pixel, uint32_t word) {
  return word / 2 * (P * 128) + pixel * 128 + (word % 2 * 64 ^ pixel % 8 * 16);
}
// In which order lanes clear the four parts of 16 bytes of their words, so that eight lanes side by
// side clear eight different parts.
SWAT_INLINE uint32_t clear_first(uint32_t word, uint32_t words_of_pixel) {
  const uint32_t column = word / 2;
  return (words_of_pixel == 4 ? 2 * column : column) % 4;
}
// The word of two units that belongs to a lane, where a tile has half of a pixel's channels, the
// first or, if `block` is 1, the second.
template <uint32_t X>
SWAT_INLINE uint32_t half_word(uint32_t lane, uint32_t block) {
  constexpr uint32_t kWords = X / 32;
  return lane / kWords * (2 * kWords) + block * kWords + lane % kWords;
}

// ---- Unpacking ----------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void unpack(const Problem& problem, const Part<C>& part,
                                       const Shared<C>& shared, uint32_t base, uint32_t unpacker,
                                       uint32_t least) {
  constexpr uint32_t kAll = 0xffffffffu;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t words_of_pixel = problem.in / 32, inverse = inverse_of(words_of_pixel);
  const uint32_t units_of_chunk = C::P * problem.in / (kTileValues * C::kTilesOfUnit);
  const uint32_t units = (part.end - part.begin) * units_of_chunk;
  const uint32_t first_tile = part.begin * units_of_chunk * C::kTilesOfUnit;
  const uint32_t tiles = (problem.words + kTileWords - 1) / kTileWords;
  // Units of this warp: `unpacker`, and then every so many. Warps work on as many chunks as there are
  // tiles at most: then each goes on by no more than that, and the parity of a barrier says all.
  const uint32_t warps = min(C::kUnpackers, units_of_chunk * problem.x_stages);
  const uint32_t own = unpacker < min(units, warps) ? (units - unpacker + warps - 1) / warps : 0;
  const uint32_t slots = base + shared.units + unpacker * kSlots * shared.slot;
  const uint32_t arrivals = base + shared.arrivals + unpacker * kSlots * 8;
  const uint32_t full = base + shared.x_full, empty = base + shared.x_empty;
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(problem.values) / 2 % 8);
  // The copy engine brings whole parts of 16 bytes: words that begin elsewhere are stored by the lanes,
  // and the last few of all values are read from where they are.
  const bool is_even = reinterpret_cast<uintptr_t>(problem.bitmap) % 16 == 0;
  const uint32_t whole = max((problem.capacity + skew) / 8 * 8, skew) - skew;

  // Where the values of a unit begin, and how many there are; lane l has unit l of a batch.
  struct Run {
    uint32_t begin, count;
  };
  const auto look = [&](uint32_t batch) {
    const uint32_t unit = batch * kBatch + lane;
    const uint32_t tile = first_tile + (unpacker + unit * warps) * C::kTilesOfUnit;
    Run run = {0, 0};
    if (unit < own && tile < tiles) {
      const uint32_t after = tile + C::kTilesOfUnit;
      run.begin = __ldg(problem.offsets + tile);
      uint32_t end = after < tiles ? __ldg(problem.offsets + after) : problem.capacity;
      if (end > whole) end = whole;
      run.count = end > run.begin ? end - run.begin : 0;
      // What does not fit is read from where it is.
      if (run.count > problem.room) run.count = problem.room;
    }
    return run;
  };
  Run now = look(0), next = look(1);
  // Copies begin at 16 bytes, so many values before.
  const auto early = [&](uint32_t begin) { return (begin + skew) % 8; };
  const auto ask = [&](uint32_t unit, bool is_next, uint32_t which) {
    if (unit >= own) return;
    const uint32_t slot = slots + which * shared.slot, arrival = arrivals + 8 * which;
    const uint32_t word = (first_tile + (unpacker + unit * warps) * C::kTilesOfUnit) * kTileWords;
    const bool is_whole = is_even && word + C::kWordsOfUnit <= problem.words;
    if (!is_whole) {
#pragma unroll 1
      for (uint32_t w = lane; w < C::kWordsOfUnit; w += 32) {
        store_word(slot + 4 * w, word + w < problem.words ? __ldg(problem.bitmap + word + w) : 0);
      }
      __syncwarp();
    }
    // The lane that knows where the values are.
    if (lane == unit % kBatch) {
      const uint32_t begin = is_next ? next.begin : now.begin, count = is_next ? next.count : now.count;
      const uint32_t bytes_of_words = is_whole ? 4 * C::kWordsOfUnit : 0;
      const uint32_t bytes = count > 0 ? (early(begin) + count + 7) / 8 * 16 : 0;
      barrier_expect(arrival, bytes_of_words + bytes);
      if (is_whole) copy_parts(slot, problem.bitmap + word, bytes_of_words, arrival);
      if (bytes > 0) {
        copy_parts(slot + 4 * C::kWordsOfUnit, problem.values + begin - early(begin), bytes, arrival);
      }
    }
  };

  // The chunk of the warp's unit, its stage, and the unit's number there; how both go on. That is no
  // more than one turn of the ring.
  Stage stage;
  uint32_t in_chunk = unpacker;
  while (in_chunk >= units_of_chunk) {
    in_chunk -= units_of_chunk;
    stage.step(problem.x_stages);
  }
  const uint32_t chunks_on = warps / units_of_chunk, units_on = warps % units_of_chunk;
  const auto go_on = [&] {
    in_chunk += units_on;
    stage.at += chunks_on;
    if (in_chunk >= units_of_chunk) in_chunk -= units_of_chunk, ++stage.at;
    if (stage.at >= problem.x_stages) stage.at -= problem.x_stages, ++stage.turn;
  };
  const auto wait_for_stage = [&] {
    if (stage.turn > 0) {
      barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1);
    }
  };

  // Where a lane's words of a pass go in the tile of x, whether they are of that tile, and which of their
  // parts is cleared first. Passes of whole eights of pixels are alike: each goes so many bytes after the
  // one before.
  uint32_t own_places[2], rotations[2];
  bool is_own[2];
  const auto find_places = [&](uint32_t pass) {
#pragma unroll
    for (uint32_t w = 0; w < 2; ++w) {
      PixelWord at;
      if constexpr (C::kHalf) {
        constexpr uint32_t kWords = C::X / 32;
        at.pixel = (pass * 64 + w * 32 + lane) / kWords, at.word = lane % kWords;
        is_own[w] = true;
      } else {
        at = pixel_word(pass * kTileWords + w * 32 + lane, words_of_pixel, inverse);
        at.word -= part.in_block * (C::X / 32);
        is_own[w] = at.word < C::X / 32;
      }
      own_places[w] = place_of<C::P>(at.pixel, at.word);
      rotations[w] = clear_first(at.word, C::kHalf ? C::X / 32 : words_of_pixel) * 16;
    }
  };
  const bool are_alike = C::kWordsOfPass % (8 * words_of_pixel) == 0;
  const uint32_t bytes_of_pass = are_alike ? C::kWordsOfPass / words_of_pixel * 128 : 0;
  find_places(0);

#pragma unroll
  for (uint32_t unit = 0; unit < kSlots - 1; ++unit) ask(unit, false, unit);
  Stage slot;
  for (uint32_t unit = 0; unit < own; ++unit) {
    if (unit % kBatch == 0 && unit > 0) {
      now = next;
      next = look(unit / kBatch + 1);
    }
    // The slot of the unit before is free.
    const uint32_t ahead = unit + kSlots - 1;
    ask(ahead, ahead / kBatch != unit / kBatch, slot.at == 0 ? kSlots - 1 : slot.at - 1);
    const uint32_t begin = __shfl_sync(kAll, now.begin, unit % kBatch);
    const uint32_t present = __shfl_sync(kAll, now.count, unit % kBatch);
    const uint32_t words_of_unit = slots + slot.at * shared.slot;
    const uint32_t near = words_of_unit + 4 * C::kWordsOfUnit + 2 * early(begin);
    barrier_wait(arrivals + 8 * slot.at, slot.turn & 1);
    slot.step(kSlots);

    uint32_t passed = 0;  // kept values of the passes before
#pragma unroll 1
    for (uint32_t pass = 0; pass < C::kPasses; ++pass) {
      const uint32_t words = words_of_unit + pass * 4 * C::kWordsOfPass;
      // The kept values of the pass before each word; those of two words share a register.
      uint32_t read[C::kTilesOfPass][2], before[C::kTilesOfPass], sums[C::kTilesOfPass], total = passed;
#pragma unroll
      for (uint32_t t = 0; t < C::kTilesOfPass; ++t) {
        read[t][0] = load_word(words + 4 * (t * kTileWords + lane));
        read[t][1] = load_word(words + 4 * (t * kTileWords + lane + 32));
      }
#pragma unroll
      for (uint32_t t = 0; t < C::kTilesOfPass; ++t) {
        const uint32_t counts = __popc(read[t][0]) | __popc(read[t][1]) << 16;
        before[t] = scan_lanes(counts);
        sums[t] = __shfl_sync(kAll, before[t] + counts, 31);
        total += (sums[t] & 0xffff) + (sums[t] >> 16);
      }
      // A lane's words: what they have, how much of the unit is kept before, where they go.
      uint32_t bits[2], ranks[2], places[2];
      if (!are_alike) find_places(in_chunk * C::kPasses + pass);
#pragma unroll
      for (uint32_t w = 0; w < 2; ++w) {
        ranks[w] = passed;
        if constexpr (C::kHalf) {
          const uint32_t word = half_word<C::X>(lane, part.in_block);
          bits[w] = load_word(words + 4 * (w * kTileWords + word));
          const uint32_t both = __shfl_sync(kAll, before[w], word % 32);
          ranks[w] += word < 32 ? both & 0xffff : (both >> 16) + (sums[w] & 0xffff);
          if (w == 1) ranks[w] += (sums[0] & 0xffff) + (sums[0] >> 16);
        } else {
          bits[w] = is_own[w] ? read[0][w] : 0;
          ranks[w] += w == 0 ? before[0] & 0xffff : (before[0] >> 16) + (sums[0] & 0xffff);
        }
        places[w] = base + stage.at * C::kXBytes + (in_chunk * C::kPasses + pass) * bytes_of_pass +
                    own_places[w];
      }
      const uint32_t counts[2] = {static_cast<uint32_t>(__popc(bits[0])),
                                  static_cast<uint32_t>(__popc(bits[1]))};
      const uint32_t most = __reduce_max_sync(kAll, max(counts[0], counts[1]));
      const auto clear = [&] {
        if (pass == 0) wait_for_stage();
#pragma unroll
        for (uint32_t w = 0; w < 2; ++w) {
          if (is_own[w]) {
#pragma unroll
            for (uint32_t part = 0; part < 64; part += 16) {
              clear_part(places[w] ^ rotations[w] ^ part);
            }
          }
        }
      };
      // From the first value of each word to its last, so that its lowest bit is the next: what is then
      // left of the word is known at once, and only the store waits for the number of the bit.
      const auto put = [&](uint32_t w, uint32_t value) {
        const uint32_t left = bits[w] & (bits[w] - 1);
        put_value(places[w] ^ 2 * highest_bit(bits[w] ^ left), bits[w], value, least);
        bits[w] = left;
      };
      if (total <= present) {
        // Four values at once, from a multiple of eight bytes: lanes side by side have few of them, and
        // those of one half of the lanes mostly lie in 128 bytes, so a read takes two turns of the banks
        // for four values of a lane, as it would for one. A word's first value is one of the first four;
        // they are moved down by what lies before it. The first ones are read before the place is clear.
        // What is read after a word's values is not used, and lies in the unit's own memory.
        uint32_t from[2], down[2];
        bool is_second[2];  // of two words, each of two values
        Four here[2], above[2], last[2];
#pragma unroll
        for (uint32_t w = 0; w < 2; ++w) {
          const uint32_t first = near + 2 * ranks[w];
          is_second[w] = (first & 4) != 0;
          down[w] = first % 4 * 8;
          from[w] = first & ~7u;
          here[w] = load_four<0>(from[w]), above[w] = load_four<8>(from[w]);
          last[w] = load_four<16>(from[w]);
        }
        static_assert(kAtOnce == 4);
        const auto put_four = [&](const Four (&four)[2], const Four (&after)[2]) {
          uint32_t first[2], second[2];
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) {
            const uint32_t a = is_second[w] ? four[w].high : four[w].low;
            const uint32_t b = is_second[w] ? after[w].low : four[w].high;
            const uint32_t c = is_second[w] ? after[w].high : after[w].low;
            first[w] = move_down(a, b, down[w]), second[w] = move_down(b, c, down[w]);
          }
          put(0, first[0]), put(1, first[1]), put(0, first[0] >> 16), put(1, first[1] >> 16);
          put(0, second[0]), put(1, second[1]), put(0, second[0] >> 16), put(1, second[1] >> 16);
        };
        clear();
        if (most > 0) put_four(here, above);
        if (most > kAtOnce) put_four(above, last);
#pragma unroll 1
        for (uint32_t g = 2 * kAtOnce; g < most; g += kAtOnce) {
          Four after[2];
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) after[w] = load_four<24>(from[w]), from[w] += 8;
          put_four(last, after);
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) last[w] = after[w];
        }
      } else {
        clear();
#pragma unroll 1
        for (uint32_t g = 0; g < most; g += kAtOnce) {
          uint32_t values[kAtOnce][2];
#pragma unroll
          for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
            for (uint32_t w = 0; w < 2; ++w) {
              // A bitmap that promises too much stays in bounds: what is not there is below `least`.
              const uint32_t rank = begin + ranks[w] + g + s;
              const bool is_there = g + s < counts[w] && rank < problem.capacity;
              values[s][w] = load_value_if(is_there, problem.values + rank);
            }
          }
#pragma unroll
          for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
            for (uint32_t w = 0; w < 2; ++w) put(w, values[s][w]);
          }
        }
      }
      passed = total;
    }
    // `wgmma` sees it, and the slot is free.
    fence_stores();
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8 * stage.at);
    go_on();
  }
}

}  // namespace hopper
}  // namespace swat
