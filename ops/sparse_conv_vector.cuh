// A convolution with weights of which V output channels are kept or dropped together: what one block
// of threads does.
//
// Where V output channels (a group) share the kept (tap, input channel) positions, tensor cores do
// the sums if somebody gathers the activations of those positions. `ldmatrix.trans` does: it takes
// an address for every row of 16 bytes, and rows are what is summed over. So a tile of the input
// lies in shared memory as [input channel][spatial position][8 images], 16 bytes for a channel and a
// position; to look through another tap, or at another channel, is to add to an address. A list
// entry is that number, good for all pixels of the tile.
//
// Two kernels:
//   1. `arrange` reads the masked kernel and writes for every group and chunk of input channels its
//      list, the values in the order in which `mma` takes them, and how long it is.
//   2. `forward`: a block makes kLines lines of kWide output pixels of 8 images in kOut channels, one
//      such piece of work after another. While a chunk of input channels is multiplied the next one,
//      or the first of the next piece, is on its way to registers; it is transposed there, and
//      stored to the other of two tiles. One barrier for a chunk.
//
// Eight rows of 16 bytes are read at once if they lie in eight different banks of 16 bytes, and one
// after another if not. Positions that are kept lie anywhere, so that would take 2.6 turns on
// average. But the order of a list is free: `arrange` chooses it so that eight entries which follow
// one another lie in different banks as far as they can (`Order`).
//
// Nothing here knows of CUDA but through `Gpu`: tests/emulate_sparse_conv_vector.cpp runs these very
// lines on a CPU. Values are bit patterns of 16 bits.

#pragma once

#include <cstdint>

#include "sparse_conv.cuh"

namespace swat {
namespace vectors {

constexpr int kBlock = 256;  // threads
constexpr int kWarpsOfBlock = kBlock / 32;
constexpr uint32_t kImages = 8;   // whose values lie together
constexpr uint32_t kSlice = 32;   // input channels that a warp brings together
constexpr uint32_t kEntries = 16;  // of a list, for one product
constexpr uint32_t kRow = 16;     // bytes
constexpr uint32_t kBanks = 8;    // of a row each
constexpr uint32_t kMostWindow = 16;

struct Row {
  uint32_t words[4];
};

// ---- The problem --------------------------------------------------------------------------------

struct Shape {
  uint32_t images, height, width, in;  // of the input
  uint32_t rows, columns, out;         // of the output
  uint32_t window[2], strides[2], lows[2];

  SWAT_INLINE uint32_t taps() const { return window[0] * window[1]; }
};

// How work is cut, and how a tile of the input lies in shared memory.
struct Plan {
  Shape shape;
  uint32_t vector;                // V
  uint32_t height, width;         // output pixels of a tile, in one image
  uint32_t octets;                // of images in a tile
  uint32_t chunk, log_chunk;      // input channels that are staged together, a power of 2
  uint32_t chunks, groups, room;  // entries that a list may have
  // Input pixels between neighbours of the output that no tap sees are not staged.
  uint32_t steps[2];              // from one output pixel to the next, in staged rows and columns
  uint32_t plane;                 // staged columns that `steps[1]` divides with the same rest
  uint32_t line, image;           // positions of a staged row, of an octet
  uint32_t positions, channel;    // of a tile; from one channel to the next, an odd number
  uint32_t across, down, outs;    // tiles

  Plan(const Shape& shape, uint32_t vector, uint32_t lines, uint32_t height, uint32_t width,
       uint32_t out, uint32_t chunk)
      : shape(shape), vector(vector), height(height), width(width), octets(lines / height),
        chunk(chunk) {
    log_chunk = conv::lowest_bit(chunk);
    chunks = (shape.in + chunk - 1) / chunk;
    groups = shape.out / vector;
    room = (chunk * shape.taps() + kEntries - 1) / kEntries * kEntries;
    for (int axis = 0; axis < 2; ++axis) {
      steps[axis] = shape.strides[axis] < shape.window[axis] ? shape.strides[axis] : shape.window[axis];
    }
    plane = width + (shape.window[1] - 1) / steps[1];
    line = steps[1] * plane;
    image = ((height - 1) * steps[0] + shape.window[0]) * line;
    positions = octets * image;
    channel = positions | 1;
    across = (shape.columns + width - 1) / width;
    down = (shape.rows + height - 1) / height;
    outs = (shape.out + out - 1) / out;
  }

  SWAT_INLINE uint32_t tile_bytes() const { return chunk * channel * kRow; }
  SWAT_INLINE uint32_t shared_bytes() const { return 2 * tile_bytes() + 4 * positions; }
  uint32_t works() const {
    const uint32_t images = kImages * octets;
    return (shape.images + images - 1) / images * down * across * outs;
  }
  // Of a position: its octet, and its row and column from the tile's first input pixel on.
  SWAT_INLINE uint32_t place(uint32_t position) const {
    const uint32_t octet = position / image, inside = position - octet * image;
    const uint32_t row = inside / line, in_row = inside - row * line;
    const uint32_t rest = in_row / plane, column = in_row - rest * plane;
    return octet << 24 | (row / steps[0] * shape.strides[0] + row % steps[0]) << 12 |
           (column * shape.strides[1] + rest);
  }
  // Where a channel of the chunk lies: a slice is transposed in an order of its own.
  static SWAT_INLINE uint32_t slot(uint32_t channel) {
    return (channel & ~31u) | (channel & 6) << 2 | (channel >> 3 & 3) << 1 | (channel & 1);
  }
  // What a list says: the row of a tap and channel for the tile's first output pixel.
  SWAT_INLINE uint32_t entry(uint32_t tap, uint32_t in_chunk) const {
    const uint32_t y = tap / shape.window[1], x = tap - y * shape.window[1];
    return slot(in_chunk) * channel + y * line + x % steps[1] * plane + x / steps[1];
  }
};

// What `arrange` makes, for every segment: group * chunks + chunk.
struct Lists {
  uint32_t* offsets;  // (segments, room), in bytes
  uint32_t* values;   // (segments, room / 16, 8 V): words of two values, as lanes take them
  uint32_t* steps;    // (segments): entries / 16
};

// ---- The lists ----------------------------------------------------------------------------------

// Of a step's values: where output channel `v` of entry `k` lies, in values. Lanes have neighbouring
// channels, so that they write them together: columns 2 q and 2 q + 1 of all products are the V / 4
// channels from q V / 4 on.
template <int V>
SWAT_INLINE uint32_t value_place(uint32_t k, uint32_t v) {
  constexpr uint32_t kEach = V / 4, kVector = kEach < 4 ? kEach : 4;
  const uint32_t column = v / kEach * 2 + v % 2, tile = v % kEach / 2;
  const uint32_t lane = column * 4 + k % 8 / 2, word = tile * 2 + k / 8;
  return 2 * (word / kVector * 32 * kVector + lane * kVector + word % kVector) + k % 2;
}

SWAT_INLINE uint32_t rows_of_counts(const Plan& plan) {
  return (plan.chunk * plan.shape.taps() + kBlock - 1) / kBlock * kWarpsOfBlock;
}
SWAT_INLINE uint32_t arrange_bytes(const Plan& plan) {
  return 4 * kBanks * (rows_of_counts(plan) + 2);
}

// The order of a list: which eight entries, an octet, are read at once.
//
// Places are dealt to the octets in turn, so that of one bank an octet has a second entry only if
// there are more of it than octets. Banks with many entries are paired with those that have few, and
// a pair has two rounds of dealing, the large one from the beginning and the small one up to the end:
// then second entries are all in the first octets, which have to take two turns anyway. What does not
// fit there gets the places that other pairs leave in between.
struct Order {
  const uint32_t* totals;  // entries of every bank
  const uint32_t* banks;   // by falling totals
  uint32_t octets;

  SWAT_INLINE uint32_t pair(uint32_t p) const { return totals[banks[p]] + totals[banks[7 - p]]; }
  SWAT_INLINE uint32_t lacking(uint32_t p) const {
    return pair(p) > 2 * octets ? pair(p) - 2 * octets : 0;
  }
  SWAT_INLINE uint32_t left(uint32_t p) const { return pair(p) < 2 * octets ? 2 * octets - pair(p) : 0; }
  SWAT_INLINE uint32_t place(uint32_t dealt) const { return dealt % octets * kBanks + dealt / octets; }
  // How many banks come before this one.
  static SWAT_INLINE uint32_t before(const uint32_t* totals, uint32_t bank) {
    uint32_t count = 0;
    for (uint32_t b = 0; b < kBanks; ++b) {
      count += totals[b] > totals[bank] || (totals[b] == totals[bank] && b < bank);
    }
    return count;
  }
  // Of the entry that has so many of its bank before it.
  SWAT_INLINE uint32_t place_of(uint32_t bank, uint32_t rank) const {
    const uint32_t own = before(totals, bank), p = own < 4 ? own : 7 - own;
    const uint32_t in_pair = rank + (own < 4 ? 0 : totals[banks[p]] + left(p));
    if (in_pair < 2 * octets) return place(2 * octets * p + in_pair);
    uint32_t rest = in_pair - 2 * octets;
    for (uint32_t q = 0; q < p; ++q) rest += lacking(q);
    uint32_t q = 0;
    while (rest >= left(q)) rest -= left(q++);
    return place(2 * octets * q + totals[banks[q]] + rest);
  }
  // Whether nobody gets the place that is dealt so late, and a bank that its octet lacks.
  SWAT_INLINE bool is_empty(uint32_t dealt, uint32_t& bank) const {
    const uint32_t p = dealt / (2 * octets), in_pair = dealt - p * 2 * octets;
    const uint32_t first = totals[banks[p]];
    bank = banks[in_pair < octets ? p : 7 - p];
    if (in_pair < first || in_pair - first >= left(p)) return false;
    uint32_t before = in_pair - first, taken = 0;
    for (uint32_t q = 0; q < p; ++q) before += left(q);
    for (uint32_t q = 0; q < 4; ++q) taken += lacking(q);
    return before >= taken;
  }
};

// A segment.
template <typename Gpu, int V>
SWAT_DEVICE void arrange(const Gpu& gpu, const Plan& plan, const Lists& lists,
                         const uint16_t* kernel, unsigned char* shared) {
  const Shape& shape = plan.shape;
  const uint32_t segment = gpu.block(), group = segment / plan.chunks;
  const uint32_t first = segment % plan.chunks * plan.chunk, candidates = plan.chunk * shape.taps();
  const uint32_t thread = gpu.thread(), lane = thread % 32, warp = gpu.warp();
  uint32_t* const counts = reinterpret_cast<uint32_t*>(shared);  // of each warp, turn and bank
  const uint32_t rows = rows_of_counts(plan);
  uint32_t* const totals = counts + rows * kBanks;
  uint32_t* const banks = totals + kBanks;
  const auto values_of = [&](uint32_t tap, uint32_t in) {
    return kernel + (static_cast<uint64_t>(tap) * shape.in + in) * shape.out + group * V;
  };
  // An entry and whether it is kept. All threads of a warp have their turns together.
  struct Candidate {
    uint32_t entry, same;
    bool is_kept;
  };
  const auto candidate = [&](uint32_t i, Row(&rows_of_values)[V / 8]) {
    const uint32_t tap = i >> plan.log_chunk, in_chunk = i & (plan.chunk - 1);
    const bool is_there = i < candidates && first + in_chunk < shape.in;
    const uint16_t* const from = values_of(is_there ? tap : 0, is_there ? first + in_chunk : 0);
    uint32_t any = 0;
    SWAT_UNROLL
    for (int part = 0; part < V / 8; ++part) {
      rows_of_values[part] = gpu.load_row(from + part * 8, is_there);
      SWAT_UNROLL
      for (const uint32_t word : rows_of_values[part].words) any |= word & 0x7fff7fffu;
    }
    Candidate found = {is_there ? plan.entry(tap, in_chunk) : 0, 0, any != 0};
    found.same = gpu.match(found.is_kept ? found.entry % kBanks : kBanks);
    return found;
  };

  for (uint32_t i = thread; i < rows * kBanks; i += kBlock) counts[i] = 0;
  gpu.sync();
  Row own[V / 8];
  for (uint32_t turn = 0; turn * kBlock < candidates; ++turn) {
    const Candidate one = candidate(turn * kBlock + thread, own);
    if (one.is_kept && conv::lowest_bit(one.same) == lane) {
      counts[(turn * kWarpsOfBlock + warp) * kBanks + one.entry % kBanks] =
          conv::count_bits(one.same);
    }
  }
  gpu.sync();
  // A warp for every bank.
  uint32_t total = 0;
  for (uint32_t row = lane; row - lane < rows; row += 32) {
    const uint32_t count = row < rows ? counts[row * kBanks + warp] : 0;
    const uint32_t before = total + gpu.scan(count);
    if (row < rows) counts[row * kBanks + warp] = before;
    total = gpu.shuffle(before + count, 31);
  }
  if (lane == 0) totals[warp] = total;
  gpu.sync();
  if (thread < kBanks) banks[Order::before(totals, thread)] = thread;
  gpu.sync();
  uint32_t kept = 0;
  for (uint32_t b = 0; b < kBanks; ++b) kept += totals[b];
  const uint32_t steps = (kept + kEntries - 1) / kEntries;
  // There is always a first step, which is loaded before anyone knows whether it counts.
  const uint32_t written = steps > 0 ? steps : 1;
  const Order order = {totals, banks, 2 * written};

  uint32_t* const offsets = lists.offsets + static_cast<uint64_t>(segment) * plan.room;
  uint16_t* const values =
      reinterpret_cast<uint16_t*>(lists.values) + static_cast<uint64_t>(segment) * plan.room * V;
  const auto write = [&](uint32_t at, uint32_t entry, const Row(&rows_of_values)[V / 8]) {
    gpu.write(offsets + at, entry * kRow);
    SWAT_UNROLL
    for (int v = 0; v < V; ++v) {
      const uint32_t word = rows_of_values[v / 8].words[v % 8 / 2];
      gpu.write(values + at / kEntries * kEntries * V + value_place<V>(at % kEntries, v),
                static_cast<uint16_t>(v % 2 != 0 ? word >> 16 : word));
    }
  };
  for (uint32_t turn = 0; turn * kBlock < candidates; ++turn) {
    const Candidate one = candidate(turn * kBlock + thread, own);
    if (!one.is_kept) continue;
    const uint32_t bank = one.entry % kBanks;
    const uint32_t rank = counts[(turn * kWarpsOfBlock + warp) * kBanks + bank] +
                          conv::count_bits(one.same & conv::low_bits(lane));
    write(order.place_of(bank, rank), one.entry, own);
  }
  if (thread == 0) gpu.write(lists.steps + segment, steps);
  // Places that are left have values of zero, and see the first tap of some channel.
  for (uint32_t dealt = thread; dealt < written * kEntries; dealt += kBlock) {
    uint32_t bank;
    if (!order.is_empty(dealt, bank)) continue;
    // The square of an odd number is 1 but for a multiple of 8.
    write(order.place(dealt), bank * plan.channel % kBanks * plan.channel, {});
  }
}

// ---- The products -------------------------------------------------------------------------------

template <int V_, int kLines_, int kWide_, int kOut_>
struct Tile {
  static constexpr int V = V_, kLines = kLines_, kWide = kWide_, kOut = kOut_;
  // Warps lie over groups, and over lines if there are more warps than groups.
  static constexpr int kGroupsOfBlock = kOut / V;
  static constexpr int kGroups = kGroupsOfBlock > kWarpsOfBlock ? kGroupsOfBlock / kWarpsOfBlock : 1;
  static constexpr int kParts = kGroupsOfBlock < kWarpsOfBlock ? kWarpsOfBlock / kGroupsOfBlock : 1;
  static constexpr int kLinesOfWarp = kLines / kParts, kPairs = kWide / 2, kColumns = V / 8;
  static constexpr int kSums = kGroups * kLinesOfWarp * kPairs * kColumns * 4;  // of a thread
  static constexpr int kBlocks = kSums > 64 ? 1 : 2;  // on a multiprocessor
  static constexpr int kUnits = kSums > 64 ? 8 : 4;   // that wait in registers
  static constexpr int kWords = V / 4;                // of values of a step, in a lane
  static_assert(kGroups * kWarpsOfBlock == kGroupsOfBlock * kParts && kLinesOfWarp * kParts == kLines &&
                kWide % 2 == 0 && kSums <= 128);
};

struct Problem {
  Plan plan;
  const uint16_t* x;
  Lists lists;
  uint16_t* y;
  uint32_t works, blocks;
};

// A piece of work: what follows in memory, or shares its input, follows in number.
struct Work {
  uint32_t image, row, column, out;  // the first ones of the output; `out` counts blocks of kOut

  SWAT_INLINE Work(const Plan& plan, uint32_t work) {
    out = work % plan.outs, work /= plan.outs;
    column = work % plan.across * plan.width, work /= plan.across;
    row = work % plan.down * plan.height;
    image = work / plan.down * plan.octets * kImages;
  }
};

// Brings a chunk of the input. A unit is 32 channels of a position in 8 images: lane 4 i + q has the
// channels 8 q to 8 q + 7 of image i, of which words j make a matrix of 8 images x 8 channels.
template <typename Gpu, typename T>
struct Stage {
  const uint32_t warp, lane, mask, units, phases;
  const uint32_t target;  // of this lane, from the beginning of a unit on
  Row rows[T::kUnits];

  SWAT_DEVICE Stage(const Gpu& gpu, const Plan& plan)
      : warp(gpu.warp()), lane(gpu.thread() % 32), mask(plan.chunk / kSlice - 1),
        units(plan.positions * (plan.chunk / kSlice)),
        phases((units + T::kUnits * kWarpsOfBlock - 1) / (T::kUnits * kWarpsOfBlock)),
        target(lane / 4 * plan.channel * kRow + lane % 4 * 4) {}

  SWAT_DEVICE void load(const Gpu& gpu, const Problem& problem, const uint32_t* table, const Work& work,
                        uint32_t chunk, uint32_t phase) {
    const Plan& plan = problem.plan;
    const Shape& shape = plan.shape;
    // Below zero is far above the size.
    const uint32_t row = work.row * shape.strides[0] - shape.lows[0];
    const uint32_t column = work.column * shape.strides[1] - shape.lows[1];
    SWAT_UNROLL
    for (int u = 0; u < T::kUnits; ++u) {
      const uint32_t unit = (phase * T::kUnits + u) * kWarpsOfBlock + warp;
      // Without branches all places are looked up before the first one is waited for.
      const uint32_t place = table[unit < units ? unit >> (plan.log_chunk - 5) : 0];
      const uint32_t image = work.image + (place >> 24) * kImages + lane / 4;
      const uint32_t y = row + (place >> 12 & 0xfff), x = column + (place & 0xfff);
      const uint32_t channel = chunk * plan.chunk + (unit & mask) * kSlice + lane % 4 * 8;
      const bool is_there = unit < units && image < shape.images && y < shape.height &&
                            x < shape.width && channel < shape.in;
      const uint32_t pixel = (image * shape.height + y) * shape.width + x;
      rows[u] = gpu.load_row(
          problem.x + (is_there ? static_cast<uint64_t>(pixel) * shape.in + channel : 0), is_there);
    }
  }
  SWAT_DEVICE void store(const Gpu& gpu, const Plan& plan, uint32_t tile, uint32_t phase) {
    SWAT_UNROLL
    for (int u = 0; u < T::kUnits; ++u) {
      const uint32_t unit = (phase * T::kUnits + u) * kWarpsOfBlock + warp;
      if (unit >= units) break;  // all lanes of the warp
      const uint32_t to = tile + target + (unit >> (plan.log_chunk - 5)) * kRow +
                          (unit & mask) * kSlice * plan.channel * kRow;
      SWAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        gpu.store_word(to + j * 8 * plan.channel * kRow, gpu.transpose(rows[u].words[j]));
      }
    }
  }
};

// What a warp multiplies: it has always loaded the step that comes next.
template <typename Gpu, typename T>
struct Products {
  const uint32_t warp, lane;
  uint32_t pixels;                   // where the lane's rows begin, from those of the list on
  uint32_t lines[T::kLinesOfWarp];
  float sums[T::kGroups][T::kLinesOfWarp][T::kPairs][T::kColumns][4];
  uint32_t offsets[T::kGroups], values[T::kGroups][T::kWords];
  uint32_t segments[T::kGroups], steps[T::kGroups], each[T::kGroups];

  SWAT_DEVICE Products(const Gpu& gpu, const Plan& plan)
      : warp(gpu.warp()), lane(gpu.thread() % 32),
        pixels(conv::left_column(static_cast<int>(lane)) / 8 * kRow) {
    SWAT_UNROLL
    for (int l = 0; l < T::kLinesOfWarp; ++l) {
      const uint32_t line = first_line() + l, octet = line / plan.height;
      lines[l] = (octet * plan.image + (line - octet * plan.height) * plan.steps[0] * plan.line) * kRow;
    }
    clear();
  }
  SWAT_INLINE uint32_t first_line() const {
    return warp / (kWarpsOfBlock / T::kParts) * T::kLinesOfWarp;
  }
  SWAT_INLINE uint32_t group(const Work& work, int g) const {
    return work.out * T::kGroupsOfBlock + warp % (kWarpsOfBlock / T::kParts) * T::kGroups + g;
  }
  SWAT_DEVICE void clear() {
    SWAT_UNROLL
    for (auto& of_group : sums) {
      SWAT_UNROLL
      for (auto& of_line : of_group) {
        SWAT_UNROLL
        for (auto& of_pair : of_line) {
          SWAT_UNROLL
          for (auto& four : of_pair) four[0] = four[1] = four[2] = four[3] = 0.f;
        }
      }
    }
  }
  SWAT_DEVICE void fetch(const Gpu& gpu, const Problem& problem, uint32_t segment,
                         uint32_t step, uint32_t& offset, uint32_t (&words)[T::kWords]) const {
    const uint64_t at = static_cast<uint64_t>(segment) * (problem.plan.room / kEntries) + step;
    offset = gpu.load(problem.lists.offsets + at * kEntries + conv::left_row(static_cast<int>(lane)));
    gpu.load_words(words, problem.lists.values + at * (8 * T::V), lane);
  }
  // The list that comes next: its first step, and how long it is. A group that is not there has none.
  SWAT_DEVICE void begin(const Gpu& gpu, const Problem& problem, int g, const Work& work,
                         uint32_t chunk, uint32_t& length) {
    const bool is_there = group(work, g) < problem.plan.groups;
    segments[g] = is_there ? group(work, g) * problem.plan.chunks + chunk : 0;
    const uint32_t found = gpu.load(problem.lists.steps + segments[g]);
    length = is_there ? found : 0;
    fetch(gpu, problem, segments[g], 0, offsets[g], values[g]);
  }
  SWAT_DEVICE void multiply_step(const Gpu& gpu, uint32_t tile, int g) {
    const uint32_t at = tile + pixels + offsets[g];
    SWAT_UNROLL
    for (int l = 0; l < T::kLinesOfWarp; ++l) {
      uint32_t left[T::kPairs][4];
      SWAT_UNROLL
      for (int p = 0; p < T::kPairs; ++p) gpu.load_matrices(left[p], at + lines[l] + p * 2 * kRow);
      SWAT_UNROLL
      for (int p = 0; p < T::kPairs; ++p) {
        SWAT_UNROLL
        for (int c = 0; c < T::kColumns; ++c) {
          gpu.multiply(sums[g][l][p][c], left[p], values[g][2 * c], values[g][2 * c + 1]);
        }
      }
    }
  }
  // The part of a chunk's lists that belongs to a phase.
  SWAT_DEVICE void multiply(const Gpu& gpu, const Problem& problem, uint32_t tile, uint32_t phase) {
    SWAT_UNROLL
    for (int g = 0; g < T::kGroups; ++g) {
      const uint32_t begin = phase * each[g];
      const uint32_t end = begin + each[g] < steps[g] ? begin + each[g] : steps[g];
      for (uint32_t step = begin; step < end; ++step) {
        uint32_t offset, words[T::kWords];
        const uint32_t next = step + 1 < steps[g] ? step + 1 : step;
        fetch(gpu, problem, segments[g], next, offset, words);
        multiply_step(gpu, tile, g);
        offsets[g] = offset;
        SWAT_UNROLL
        for (int w = 0; w < T::kWords; ++w) values[g][w] = words[w];
      }
    }
  }
  SWAT_DEVICE void write(const Gpu& gpu, const Problem& problem, const Work& work) const {
    const Plan& plan = problem.plan;
    const Shape& shape = plan.shape;
    SWAT_UNROLL
    for (int l = 0; l < T::kLinesOfWarp; ++l) {
      const uint32_t line = first_line() + l, octet = line / plan.height;
      const uint32_t row = work.row + line - octet * plan.height;
      const uint32_t image = work.image + octet * kImages + lane / 4;
      if (image >= shape.images || row >= shape.rows) continue;
      const uint64_t first = (static_cast<uint64_t>(image) * shape.rows + row) * shape.columns + work.column;
      uint16_t* to = problem.y + first * shape.out + group(work, 0) * T::V + lane % 4 * (T::V / 4);
      SWAT_UNROLL
      for (int c = 0; c < T::kWide; ++c, to += shape.out) {
        if (work.column + c >= shape.columns) break;
        SWAT_UNROLL
        for (int g = 0; g < T::kGroups; ++g) {
          if (group(work, g) >= plan.groups) break;
          uint32_t words[T::kColumns];
          SWAT_UNROLL
          for (int k = 0; k < T::kColumns; ++k) {
            const float* const two = sums[g][l][c / 2][k] + c % 2 * 2;
            words[k] = gpu.narrow(two[0], two[1]);
          }
          gpu.store_words(to + g * T::V, words);
        }
      }
    }
  }
};

template <typename Gpu, typename T>
SWAT_DEVICE void forward(const Gpu& gpu, const Problem& problem, unsigned char* shared) {
  const Plan& plan = problem.plan;
  uint32_t* const table = reinterpret_cast<uint32_t*>(shared + 2 * plan.tile_bytes());
  for (uint32_t p = gpu.thread(); p < plan.positions; p += kBlock) table[p] = plan.place(p);
  gpu.sync();

  Stage<Gpu, T> stage(gpu, plan);
  Products<Gpu, T> products(gpu, plan);
  uint32_t now = gpu.address(shared), other = now + plan.tile_bytes();
  uint32_t number = gpu.block();
  Work work(plan, number);
  uint32_t lengths[T::kGroups];
  for (uint32_t phase = 0; phase < stage.phases; ++phase) {
    stage.load(gpu, problem, table, work, 0, phase);
    stage.store(gpu, plan, now, phase);
  }
  SWAT_UNROLL
  for (int g = 0; g < T::kGroups; ++g) products.begin(gpu, problem, g, work, 0, lengths[g]);
  gpu.sync();
  while (number < problem.works) {
    // The chunk that comes next: after the last one it is the first of the next piece.
    Work next = work;
    uint32_t next_number = number;
    for (uint32_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const bool is_last = chunk + 1 == plan.chunks;
      const uint32_t next_chunk = is_last ? 0 : chunk + 1;
      if (is_last) next_number += problem.blocks, next = Work(plan, next_number);
      const bool has_next = next_number < problem.works;
      SWAT_UNROLL
      for (int g = 0; g < T::kGroups; ++g) {
        products.steps[g] = lengths[g];
        products.each[g] = (lengths[g] + stage.phases - 1) / stage.phases;
      }
      for (uint32_t phase = 0; phase < stage.phases; ++phase) {
        if (has_next) stage.load(gpu, problem, table, next, next_chunk, phase);
        products.multiply(gpu, problem, now, phase);
        if (has_next) stage.store(gpu, plan, other, phase);
      }
      if (has_next) {
        SWAT_UNROLL
        for (int g = 0; g < T::kGroups; ++g) {
          products.begin(gpu, problem, g, next, next_chunk, lengths[g]);
        }
      }
      if (is_last) products.write(gpu, problem, work), products.clear();
      gpu.sync();  // the next chunk is there, and nobody reads this one
      const uint32_t swap = now;
      now = other, other = swap;
    }
    work = next, number = next_number;
  }
}

}  // namespace vectors
}  // namespace swat
