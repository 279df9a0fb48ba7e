// The weight gradient of a convolution from packed activations: what one block of threads does.
//
// dW[tap, i, o] = sum over output pixels q of x[pixel of q under tap, i] * dY[q, o], which is a matrix
// product over pixels. A block makes a tile of M input and N output channels of one tap, over a range
// of chunks of pixels; `sparse_conv.cu` adds up what the blocks of all ranges made.
//
// Warps have two jobs, and a chunk is one turn of both:
//   - producers put the kept values of x into a tile of zeros in shared memory, one of two. A
//     warp takes 2,048 values of the bitmap, the unit of `offsets`: one scan of their counts says where
//     the values of every word begin, and words and values came to shared memory a turn before;
//   - eight consumers multiply it with dY's on tensor cores, which they copied there many turns before.
// Either side waits for the other only where a tile of x changes hands, so that the scattering, the
// products and the memory work at the same time.
//
// Nothing here knows of CUDA but through `Gpu`, what threads do together and what only the hardware
// does: tests/emulate_sparse_conv.cpp runs these very lines on a CPU. Values are bit patterns of 16
// bits.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SWAT_INLINE __host__ __device__ __forceinline__
#define SWAT_DEVICE __device__ __forceinline__
#define SWAT_UNROLL _Pragma("unroll")
#else
#define SWAT_INLINE inline
#define SWAT_DEVICE inline
#define SWAT_UNROLL
#endif

namespace swat {
namespace conv {

constexpr int kConsumers = 8;     // warps; producers are `Gpu::kProducers`
constexpr int kSteps = 2;         // of 16 pixels that a consumer multiplies in a turn
constexpr int kRing = 2;          // tiles of x
constexpr int kMostStages = 8;    // tiles of dY
constexpr uint32_t kWordsOfTile = 64;  // of a bitmap, for every entry of `offsets`
constexpr uint32_t kMostRun = 512;  // input channels of pixels that are not gathered
constexpr uint32_t kNowhere = ~0u;

SWAT_INLINE uint32_t count_bits(uint32_t word) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__popc(static_cast<int>(word)));
#else
  return static_cast<uint32_t>(__builtin_popcount(word));
#endif
}
// Which one it is; of no bits anything.
SWAT_INLINE uint32_t lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return static_cast<uint32_t>(__ffs(static_cast<int>(word)) - 1);
#else
  return word == 0 ? 0 : static_cast<uint32_t>(__builtin_ctz(word));
#endif
}
// The first `count` bits, at most 32.
SWAT_INLINE uint32_t low_bits(uint32_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
// 32 bits from bit `shift` of `low` on, which go on in `high`.
SWAT_INLINE uint32_t join(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
#endif
}

// ---- The problem --------------------------------------------------------------------------------

struct Shape {
  uint32_t height, width, in;   // of the input
  uint32_t rows, columns, out;  // of the output
  uint32_t pixels;              // of the output, of all images
  uint32_t window[2];
  int strides[2], lows[2];      // zeros before the first row and column

  SWAT_INLINE uint32_t taps() const { return window[0] * window[1]; }
  SWAT_INLINE uint32_t chunks(uint32_t each) const { return (pixels + each - 1) / each; }
  // Whether output pixels are input pixels.
  SWAT_INLINE bool is_plain() const {
    return taps() == 1 && strides[0] == 1 && strides[1] == 1 && lows[0] == 0 && lows[1] == 0 &&
           rows == height && columns == width;
  }
  // The input pixel that a tap sees from an output pixel; kNowhere in the padding.
  SWAT_INLINE uint32_t input_pixel(uint32_t q, uint32_t tap) const {
    const uint32_t line = q / columns, image = line / rows;
    const int y = static_cast<int>(line - image * rows) * strides[0] +
                  static_cast<int>(tap / window[1]) - lows[0];
    const int x = static_cast<int>(q - line * columns) * strides[1] +
                  static_cast<int>(tap % window[1]) - lows[1];
    // Below zero is far above the size.
    if (static_cast<uint32_t>(y) >= height || static_cast<uint32_t>(x) >= width) return kNowhere;
    return (image * height + static_cast<uint32_t>(y)) * width + static_cast<uint32_t>(x);
  }
};

struct Problem {
  Shape shape;
  const uint16_t* values;  // packed, `capacity` of them
  const uint32_t* bitmap;  // `words` of it
  const uint32_t* offsets;
  const uint16_t* dy;
  float* partial;          // (splits, taps, in, out)
  uint32_t capacity, words, splits;
  uint32_t stages;         // tiles of dY in shared memory, 2 to kMostStages
  uint32_t room;           // values of a tile of the bitmap there, a multiple of 8
};

// ---- Layout of a tile ---------------------------------------------------------------------------

// Groups of consumers that have sums of their own.
SWAT_INLINE constexpr uint32_t groups_of(int64_t m, int64_t n) { return m * n <= 16384 ? 2 : 1; }
// Pixels of a chunk.
SWAT_INLINE constexpr uint32_t pixels_of(int64_t m, int64_t n) { return groups_of(m, n) * kSteps * 16; }

// Consumers lie over the M x N sums of a block in rows and columns. Where those are few, there are two
// groups, each with sums of its own, of every other 32 pixels: large parts of the sums for a warp need
// fewer bytes of shared memory for every product.
template <int M, int N>
struct Tile {
  static constexpr int kRows = M * N <= 4096 ? 32 : 64, kColumns = kRows;  // of sums of a warp
  static constexpr int kWarpRows = M / kRows, kWarpColumns = N / kColumns;
  static constexpr int kGroups = groups_of(M, N), kPixels = pixels_of(M, N);
  static constexpr int kDown = kRows / 16, kAcross = kColumns / 16;
  // Rows in shared memory end with 16 bytes that nobody uses: eight rows then lie in eight banks.
  static constexpr int kPitchX = M + 8, kPitchDy = N + 8;
  static constexpr int kValuesX = kPixels * kPitchX, kValuesDy = kPixels * kPitchDy;
  static_assert(kRows * kWarpRows == M && kColumns * kWarpColumns == N &&
                kGroups * kWarpRows * kWarpColumns == kConsumers);
};

// What one block makes: blocks of the same pixels follow one another, so that they meet in the cache.
template <int M, int N>
struct Part {
  uint32_t split, tap, in, out;  // the first input and output channel
  uint32_t begin, end;           // chunks

  SWAT_INLINE Part(const Problem& problem, uint32_t block) {
    const Shape& shape = problem.shape;
    const uint32_t ins = (shape.in + M - 1) / M, outs = (shape.out + N - 1) / N;
    in = block % ins * M, block /= ins;
    out = block % outs * N, block /= outs;
    tap = block % shape.taps();
    split = block / shape.taps();
    const uint64_t chunks = shape.chunks(pixels_of(M, N));
    begin = static_cast<uint32_t>(chunks * split / problem.splits);
    end = static_cast<uint32_t>(chunks * (split + 1) / problem.splits);
  }
  static uint32_t blocks(const Shape& shape, uint32_t splits) {
    return (shape.in + M - 1) / M * ((shape.out + N - 1) / N) * shape.taps() * splits;
  }
};

// Where a lane finds its part of a 16 x 16 matrix that lies in shared memory with pixels as rows:
// the row and the column of eight values, as `ldmatrix.x4.trans` takes them.
// The left operand: registers are (channels 0-7, 8-15) of pixels 0-7, then of pixels 8-15.
SWAT_INLINE int left_row(int lane) { return lane % 8 + lane / 16 * 8; }
SWAT_INLINE int left_column(int lane) { return lane / 8 % 2 * 8; }
// The right one: registers are (pixels 0-7, 8-15) of channels 0-7, then of channels 8-15.
SWAT_INLINE int right_row(int lane) { return lane % 8 + lane / 8 % 2 * 8; }
SWAT_INLINE int right_column(int lane) { return lane / 16 * 8; }
// The 16 x 8 sums of an `mma`: of lane, register.
SWAT_INLINE int sum_row(int lane, int which) { return lane / 4 + which / 2 * 8; }
SWAT_INLINE int sum_column(int lane, int which) { return lane % 4 * 2 + which % 2; }

// ---- Barriers -----------------------------------------------------------------------------------

// Number 0 is that of __syncthreads. One warp in `arrive` does not wait, and what it wrote before is
// seen by those that did.
SWAT_INLINE int full(uint32_t turn) { return 1 + static_cast<int>(turn % kRing); }
SWAT_INLINE int empty(uint32_t turn) { return 1 + kRing + static_cast<int>(turn % kRing); }
constexpr int kAmongProducers = 1 + 2 * kRing, kAmongConsumers = 2 + 2 * kRing;

// ---- Producers ----------------------------------------------------------------------------------

// Puts the values of words to where `place` says for each of their bits, four at a time: as many as the
// warp's fullest word has. Values below `least` are left out; no NaN is. `load` reads a value, or for
// what is not there anything below `least`: it has to say so itself where bits and counts differ. Two
// words of a lane wait for less than one after the other.
constexpr uint32_t kAtOnce = 4;
template <typename Gpu, uint32_t Words, typename Load, typename Place>
SWAT_DEVICE void scatter(const Gpu& gpu, uint32_t (&bits)[Words], const uint32_t (&counts)[Words],
                         uint32_t least, const Load& load, const Place& place, uint32_t from = 0) {
  uint32_t most = 0;
  SWAT_UNROLL
  for (uint32_t w = 0; w < Words; ++w) most = counts[w] > most ? counts[w] : most;
  most = gpu.largest(most);
  for (uint32_t g = from; g < most; g += kAtOnce) {
    uint32_t waiting[kAtOnce][Words];
    SWAT_UNROLL
    for (uint32_t s = 0; s < kAtOnce; ++s) {
      SWAT_UNROLL
      for (uint32_t w = 0; w < Words; ++w) waiting[s][w] = load(w, g + s < counts[w], g + s);
    }
    SWAT_UNROLL
    for (uint32_t s = 0; s < kAtOnce; ++s) {
      SWAT_UNROLL
      for (uint32_t w = 0; w < Words; ++w) {
        const uint32_t value = waiting[s][w];
        place(w, bits[w] != 0 && (value & 0x7fff) >= least, lowest_bit(bits[w]), value);
        bits[w] &= bits[w] - 1;
      }
    }
  }
}

// How many of `count` values from number `rank` on are there: a bitmap that promises too much stays in
// bounds.
SWAT_INLINE uint32_t within(uint32_t count, uint32_t rank, uint32_t capacity) {
  const uint32_t left = rank < capacity ? capacity - rank : 0;
  return count < left ? count : left;
}

// Of pixels that follow one another.
template <typename Gpu, int M, int N>
struct RunSource {
  static constexpr uint32_t kPixels = Tile<M, N>::kPixels, kPitch = Tile<M, N>::kPitchX;
  static constexpr uint32_t kTileValues = 32 * kWordsOfTile;
  // Bytes that `scatter` may read after the last value of a word, and does not use.
  static constexpr uint32_t kBeyond = 80;
  struct Entry {
    uint32_t bits, before;  // a word, and how many values of the tile are kept before it
  };
  struct Word {
    Entry entry;
    uint16_t* to;  // where its first channel lies
  };
  // The values of a tile of the bitmap: number of the first, and where they are in shared memory, if so.
  struct Found {
    uint32_t first;
    const uint16_t* near;
  };
  struct Run {
    uint32_t begin, end;  // numbers of values
  };

  // Tiles of the bitmap for every warp, in a turn.
  static SWAT_INLINE uint32_t units(uint32_t in) {
    const uint32_t values = kPixels * in;
    const uint32_t tiles = values / kTileValues + (values % kTileValues == 0 ? 0 : 2);
    return (tiles + Gpu::kProducers - 1) / Gpu::kProducers;
  }
  static SWAT_INLINE uint32_t slot_bytes(uint32_t room) { return 4 * kWordsOfTile + 2 * (room + 8); }
  static SWAT_INLINE uint32_t warp_bytes(uint32_t in, uint32_t room) {
    return kWordsOfTile * static_cast<uint32_t>(sizeof(Entry)) + 2 * units(in) * slot_bytes(room) +
           kBeyond;
  }
  static SWAT_INLINE uint32_t bytes(const Shape& shape, uint32_t room) {
    return Gpu::kProducers * warp_bytes(shape.in, room);
  }

  const Problem& problem;
  const uint32_t producer, lane, first_channel, begin, chunks, most_units, tiles, skew;
  // Whether a chunk is whole tiles and a tile whole pixels of whole words: 2**pair words of each
  // belong to the block.
  const bool is_regular;
  const uint32_t pair, words_of_pixel;
  unsigned char* const shared;
  // Lane l has the run of the warp's tile l: of this turn, the next, and the one after.
  Run now = {0, 0}, next = {0, 0}, later = {0, 0};

  SWAT_DEVICE RunSource(const Gpu& gpu, const Problem& problem, const Part<M, N>& part,
                        unsigned char* shared)
      : problem(problem), producer(gpu.warp() - kConsumers), lane(gpu.thread() % 32),
        first_channel(part.in), begin(part.begin), chunks(part.end - part.begin),
        most_units(units(problem.shape.in)),
        tiles((problem.words + kWordsOfTile - 1) / kWordsOfTile),
        skew(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(problem.values) / 2 % 8)),
        is_regular(problem.shape.in % 32 == 0 && kTileValues % problem.shape.in == 0 &&
                   kPixels * problem.shape.in % kTileValues == 0),
        pair(lowest_bit((problem.shape.in - part.in < M ? problem.shape.in - part.in : M) / 32)),
        words_of_pixel(problem.shape.in / 32),
        shared(shared + producer * warp_bytes(problem.shape.in, problem.room)) {}

  SWAT_INLINE uint32_t first_value(uint32_t turn) const {
    return (begin + turn) * kPixels * problem.shape.in;
  }
  SWAT_INLINE uint32_t first_tile(uint32_t turn) const { return first_value(turn) / kTileValues; }
  // Tiles that a turn touches.
  SWAT_INLINE uint32_t count(uint32_t turn) const {
    if (turn >= chunks) return 0;
    const uint32_t left = problem.shape.pixels - (begin + turn) * kPixels;
    const uint32_t values = (left < kPixels ? left : kPixels) * problem.shape.in;
    return (first_value(turn) + values - 1) / kTileValues - first_tile(turn) + 1;
  }
  SWAT_INLINE unsigned char* slot(uint32_t turn, uint32_t unit) const {
    return shared + kWordsOfTile * sizeof(Entry) +
           (turn % 2 * most_units + unit) * slot_bytes(problem.room);
  }
  // How many values the copy of a run begins before it, so that it begins at 16 bytes.
  SWAT_INLINE uint32_t early(uint32_t rank) const { return (rank + skew) % 8; }

  SWAT_DEVICE void look(const Gpu& gpu, uint32_t turn) {
    const uint32_t own = producer + lane * Gpu::kProducers;
    if (own >= count(turn)) return;
    const uint32_t tile = first_tile(turn) + own;
    later.begin = gpu.load(problem.offsets + tile);
    later.end = tile + 1 < tiles ? gpu.load(problem.offsets + tile + 1) : problem.capacity;
  }
  // Before the first turn.
  SWAT_DEVICE void start(const Gpu& gpu) {
    look(gpu, 0);
    next = later;
    ask(gpu, 0);
    now = next;
    look(gpu, 1);
    next = later;
  }
  // Requests the words and values of a turn.
  SWAT_DEVICE void ask(const Gpu& gpu, uint32_t turn) {
    const uint32_t all = count(turn);
    for (uint32_t unit = 0, own = producer; own < all; ++unit, own += Gpu::kProducers) {
      unsigned char* const to = slot(turn, unit);
      const uint32_t word = (first_tile(turn) + own) * kWordsOfTile + lane;
      uint32_t* const words = reinterpret_cast<uint32_t*>(to) + lane;
      gpu.copy_word(words, problem.bitmap + word, word < problem.words);
      gpu.copy_word(words + 32, problem.bitmap + word + 32, word + 32 < problem.words);
      const uint32_t first = gpu.shuffle(next.begin, unit), last = gpu.shuffle(next.end, unit);
      const uint32_t before = early(first);
      uint32_t values = last - first + before;
      if (values > problem.room + 8) values = problem.room + 8;
      uint16_t* const own_values = reinterpret_cast<uint16_t*>(to + 4 * kWordsOfTile);
      for (uint32_t v = 8 * lane; v < values; v += 8 * 32) {
        const int64_t at = static_cast<int64_t>(first) + v - before;
        const int64_t left = static_cast<int64_t>(problem.capacity) - at;
        gpu.copy_part(own_values + v, problem.values + (left > 0 ? at : -static_cast<int64_t>(skew)),
                      left >= 8 ? 16 : left > 0 ? 2 * static_cast<uint32_t>(left) : 0);
      }
    }
    gpu.commit();
  }
  SWAT_DEVICE void before(const Gpu& gpu, uint32_t turn) {
    ask(gpu, turn + 1);
    look(gpu, turn + 2);
  }
  SWAT_DEVICE void after(const Gpu&, uint32_t) const {}
  // Scatters the values of a turn; those of the next are on their way.
  SWAT_DEVICE void put(const Gpu& gpu, uint32_t turn, uint32_t least, uint16_t* tile) {
    const uint32_t all = count(turn);
    for (uint32_t unit = 0, own = producer; own < all; ++unit, own += Gpu::kProducers) {
      put_unit(gpu, least, tile, slot(turn, unit), gpu.shuffle(now.begin, unit),
               (first_tile(turn) + own) * kTileValues - first_value(turn));
    }
    now = next;
    next = later;
  }
  // `start` is the first value of a tile of the bitmap, from that of the turn on: below zero, that is
  // far above, where the turn begins within the tile.
  SWAT_DEVICE void put_unit(const Gpu& gpu, uint32_t least, uint16_t* tile,
                            const unsigned char* slot, uint32_t first, uint32_t start) const {
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(slot);
    const uint16_t* const near = reinterpret_cast<const uint16_t*>(slot + 4 * kWordsOfTile);
    Entry* const table = reinterpret_cast<Entry*>(shared);
    const uint32_t low = words[lane], high = words[lane + 32];
    // Both halves at once, 16 bits for each: a half has 1024 values.
    const uint32_t counts = count_bits(low) | count_bits(high) << 16;
    const uint32_t before = gpu.scan(counts), sum = gpu.shuffle(before + counts, 31);
    table[lane] = {low, before & 0xffff};
    table[lane + 32] = {high, (sum & 0xffff) + (before >> 16)};
    const bool is_near = early(first) + (sum & 0xffff) + (sum >> 16) <= problem.room + 8;
    gpu.sync_warp();
    const Found found = {first, is_near ? near + early(first) : nullptr};
    const uint32_t in = problem.shape.in;
    if (is_regular) {
      const uint32_t row = start / in, all = kTileValues / in << pair;  // at most 64, of powers of two
      const auto at = [&](uint32_t i) {
        const uint32_t pixel = i >> pair, word = i & low_bits(pair);
        const Entry entry = table[pixel * words_of_pixel + first_channel / 32 + word];
        return Word{entry, tile + (row + pixel) * kPitch + 32 * word};
      };
      const auto place = [&](const Word& word, bool is_there, uint32_t bit, uint32_t value) {
        gpu.put_if(is_there, word.to, bit, value);
      };
      if (all > 32) {
        const Word words[2] = {at(lane), at(lane + 32)};
        put_words(gpu, least, found, words, place);
      } else {
        Word words[1] = {{{0, 0}, tile}};
        if (lane < all) words[0] = at(lane);
        put_words(gpu, least, found, words, place);
      }
    } else {
      for (uint32_t i = lane; i < kWordsOfTile; i += 32) {
        const uint32_t value = start + 32 * i;
        const bool is_in_turn = value < kPixels * in;
        const Word words[1] = {{is_in_turn ? table[i] : Entry{0, 0}, tile}};
        const uint32_t row = is_in_turn ? value / in : 0, channel = value - row * in;
        const auto place = [&](const Word&, bool is_there, uint32_t bit, uint32_t value) {
          uint32_t c = channel + bit, r = row;
          if (is_there) {
            while (c >= in) c -= in, ++r;
          }
          gpu.put_if(is_there && c - first_channel < M, tile, r * kPitch + c - first_channel, value);
        };
        put_words(gpu, least, found, words, place);
      }
    }
    gpu.sync_warp();  // before the slot and the table are used again
  }
  // Scatters words of a lane.
  template <uint32_t Words, typename Place>
  SWAT_DEVICE void put_words(const Gpu& gpu, uint32_t least, const Found& found,
                             const Word (&words)[Words], const Place& place) const {
    uint32_t bits[Words], counts[Words];
    SWAT_UNROLL
    for (uint32_t w = 0; w < Words; ++w) {
      bits[w] = words[w].entry.bits;
      counts[w] = count_bits(bits[w]);
    }
    const auto put = [&](uint32_t w, bool is_there, uint32_t bit, uint32_t value) {
      place(words[w], is_there, bit, value);
    };
    if (found.near != nullptr) {
      const auto load = [&](uint32_t w, bool, uint32_t s) {
        return gpu.take(found.near + words[w].entry.before + s);
      };
      scatter(gpu, bits, counts, least, load, put);
    } else {
      SWAT_UNROLL
      for (uint32_t w = 0; w < Words; ++w) {
        counts[w] = within(counts[w], found.first + words[w].entry.before, problem.capacity);
      }
      const uint16_t* const values = problem.values + found.first;
      const auto load = [&](uint32_t w, bool is_there, uint32_t s) {
        return gpu.load_if(is_there, values + words[w].entry.before + s);
      };
      scatter(gpu, bits, counts, least, load, put);
    }
  }
};

// Of pixels anywhere: eight lanes for each, with M / 8 channels each. Words are requested two turns
// before, the first values one.
template <typename Gpu, int M, int N>
struct GatherSource {
  static constexpr uint32_t kPixels = Tile<M, N>::kPixels, kPitch = Tile<M, N>::kPitchX;
  static constexpr uint32_t kLanes = 8, kBits = M / kLanes, kFirst = kBits < 8 ? kBits : 8;
  static constexpr uint32_t kPixelsOfStep = 32 / kLanes * Gpu::kProducers;
  static constexpr uint32_t kSteps = kPixels / kPixelsOfStep, kWords = kWordsOfTile / kLanes;
  static_assert(kBits % 8 == 0 && kBits <= 32 && kPixels % kPixelsOfStep == 0);
  static SWAT_INLINE uint32_t bytes(const Shape&, uint32_t) { return 0; }

  const Problem& problem;
  const uint32_t row, lane, in, tap, begin, chunks;
  const uint32_t channel, there;  // of a lane: the first, and how many, some may lie beyond the last
  // Of the turn after the next: a lane's share of the words that the pixel's tile of the bitmap has
  // before it, the words of its own channels, from which bit on, and what is kept before the tile.
  uint32_t words[kSteps][kWords], low[kSteps], high[kSteps], shift[kSteps], offset[kSteps];
  uint32_t own[kSteps];  // channels, none in the padding
  // Of the next turn: what is kept of the lane's channels, where, and the first values.
  uint32_t bits[kSteps], counts[kSteps], ranks[kSteps], first[kSteps][kFirst];

  SWAT_DEVICE GatherSource(const Gpu& gpu, const Problem& problem, const Part<M, N>& part,
                           unsigned char*)
      : problem(problem), row((gpu.thread() - 32 * kConsumers) / kLanes), lane(gpu.thread() % 32),
        in(part.in), tap(part.tap), begin(part.begin), chunks(part.end - part.begin),
        channel(lane % kLanes * kBits), there(channels(problem.shape, part.in + channel)) {}

  static SWAT_INLINE uint32_t channels(const Shape& shape, uint32_t from) {
    const uint32_t left = from < shape.in ? shape.in - from : 0;
    return left < kBits ? left : kBits;
  }

  SWAT_DEVICE void start(const Gpu& gpu) {
    look(gpu, 0);
    ask(gpu);
    look(gpu, 1);
  }
  SWAT_DEVICE void before(const Gpu& gpu, uint32_t) { gpu.commit(); }
  SWAT_DEVICE void after(const Gpu& gpu, uint32_t turn) {
    ask(gpu);
    look(gpu, turn + 2);
  }
  // Requests words.
  SWAT_DEVICE void look(const Gpu& gpu, uint32_t turn) {
    SWAT_UNROLL
    for (uint32_t e = 0; e < kSteps; ++e) {
      const uint32_t q = (begin + turn) * kPixels + e * kPixelsOfStep + row;
      const uint32_t pixel = turn < chunks && q < problem.shape.pixels
                                 ? problem.shape.input_pixel(q, tap)
                                 : kNowhere;
      low[e] = high[e] = shift[e] = offset[e] = own[e] = 0;
      SWAT_UNROLL
      for (uint32_t w = 0; w < kWords; ++w) words[e][w] = 0;
      if (pixel == kNowhere) continue;
      const uint32_t value = pixel * problem.shape.in + in, word = value / 32;
      const uint32_t tile = word / kWordsOfTile, start = tile * kWordsOfTile + lane % kLanes;
      offset[e] = gpu.load(problem.offsets + tile);
      SWAT_UNROLL
      for (uint32_t w = 0; w < kWords; ++w) {
        if (start + w * kLanes < word) words[e][w] = gpu.load(problem.bitmap + start + w * kLanes);
      }
      if (there == 0) continue;
      own[e] = there, shift[e] = (value + channel) % 32;
      low[e] = gpu.load(problem.bitmap + (value + channel) / 32);
      if (shift[e] + there > 32) high[e] = gpu.load(problem.bitmap + (value + channel) / 32 + 1);
    }
  }
  // Requests the first values of what `look` found.
  SWAT_DEVICE void ask(const Gpu& gpu) {
    SWAT_UNROLL
    for (uint32_t e = 0; e < kSteps; ++e) {
      bits[e] = join(low[e], high[e], shift[e]) & low_bits(own[e]);
      // What the tile keeps before the pixel, the first lane's word included.
      uint32_t sum = lane % kLanes == 0 ? count_bits(low[e] & low_bits(shift[e])) : 0;
      SWAT_UNROLL
      for (uint32_t w = 0; w < kWords; ++w) sum += count_bits(words[e][w]);
      SWAT_UNROLL
      for (uint32_t other = 1; other < kLanes; other *= 2) sum += gpu.shuffle(sum, lane ^ other);
      const uint32_t count = count_bits(bits[e]), before = gpu.scan(count);
      ranks[e] = offset[e] + sum + before - gpu.shuffle(before, lane / kLanes * kLanes);
      counts[e] = within(count, ranks[e], problem.capacity);
      SWAT_UNROLL
      for (uint32_t s = 0; s < kFirst; ++s) {
        first[e][s] = gpu.load_if(s < counts[e], problem.values + ranks[e] + s);
      }
    }
  }
  SWAT_DEVICE void put(const Gpu& gpu, uint32_t, uint32_t least, uint16_t* tile) {
    uint16_t* const to = tile + row * kPitch + channel;
    const auto place = [&](uint32_t e, bool is_there, uint32_t bit, uint32_t value) {
      gpu.put_if(is_there, to + e * kPixelsOfStep * kPitch, bit, value);
    };
    SWAT_UNROLL
    for (uint32_t s = 0; s < kFirst; ++s) {
      SWAT_UNROLL
      for (uint32_t e = 0; e < kSteps; ++e) {
        place(e, bits[e] != 0 && (first[e][s] & 0x7fff) >= least, lowest_bit(bits[e]), first[e][s]);
        bits[e] &= bits[e] - 1;
      }
    }
    if constexpr (kFirst < kBits) {
      const auto load = [&](uint32_t e, bool is_there, uint32_t s) {
        return gpu.load_if(is_there, problem.values + ranks[e] + s);
      };
      scatter(gpu, bits, counts, least, load, place, kFirst);
    }
  }
};

template <typename Gpu, int M, int N, bool kGathers>
struct SourceOf {
  using Type = RunSource<Gpu, M, N>;
};
template <typename Gpu, int M, int N>
struct SourceOf<Gpu, M, N, true> {
  using Type = GatherSource<Gpu, M, N>;
};

template <typename Gpu, int M, int N, bool kGathers>
SWAT_DEVICE void produce(const Gpu& gpu, const Problem& problem, uint32_t least, uint16_t* x_tiles,
                         unsigned char* shared) {
  using Layout = Tile<M, N>;
  const Part<M, N> part(problem, gpu.block());
  const uint32_t chunks = part.end - part.begin, thread = gpu.thread() - 32 * kConsumers;
  typename SourceOf<Gpu, M, N, kGathers>::Type source(gpu, problem, part, shared);
  source.start(gpu);
  for (uint32_t turn = 0; turn < chunks; ++turn) {
    source.before(gpu, turn);
    if (turn >= kRing) gpu.sync(empty(turn), Gpu::kBlock);
    uint16_t* const tile = x_tiles + turn % kRing * Layout::kValuesX;
    SWAT_UNROLL
    for (int v = 0; v < Layout::kValuesX; v += 8 * 32 * Gpu::kProducers) {
      const int own = v + 8 * static_cast<int>(thread);
      if (own < Layout::kValuesX) gpu.clear(tile + own);
    }
    gpu.wait(1);
    gpu.sync(kAmongProducers, 32 * Gpu::kProducers);  // the tile is clear, and what was requested there
    source.put(gpu, turn, least, tile);
    gpu.arrive(full(turn), Gpu::kBlock);
    source.after(gpu, turn);
  }
}

// ---- Consumers ----------------------------------------------------------------------------------

struct alignas(16) Four {
  float x, y, z, w;
};

template <typename Gpu, int M, int N>
SWAT_DEVICE void consume(const Gpu& gpu, const Problem& problem, uint16_t* x_tiles,
                         uint16_t* dy_tiles) {
  using Layout = Tile<M, N>;
  constexpr int kPixels = Layout::kPixels;
  const Shape& shape = problem.shape;
  const Part<M, N> part(problem, gpu.block());
  const uint32_t chunks = part.end - part.begin;
  const int thread = static_cast<int>(gpu.thread()), lane = thread % 32;
  const int warp = static_cast<int>(gpu.warp());

  // A thread copies 8 channels, the same of every so many pixels, chunk after chunk.
  constexpr int kAcross = N / 8, kDown = 32 * kConsumers / kAcross;
  static_assert(kPixels % kDown == 0);
  const uint32_t column = static_cast<uint32_t>(thread % kAcross) * 8;
  const bool has_column = part.out + column < shape.out;
  uint32_t q = part.begin * kPixels + static_cast<uint32_t>(thread / kAcross);
  const uint16_t* from = problem.dy + static_cast<uint64_t>(q) * shape.out + part.out + column;
  const int own = thread / kAcross * Layout::kPitchDy + static_cast<int>(column);
  uint32_t asked = 0, asked_stage = 0;
  const auto copy_dy = [&] {
    if (asked < chunks) {
      uint16_t* const to = dy_tiles + asked_stage * Layout::kValuesDy + own;
      SWAT_UNROLL
      for (int k = 0; k < kPixels / kDown; ++k) {
        const bool is_there = has_column && q + k * kDown < shape.pixels;
        gpu.copy_part(to + k * kDown * Layout::kPitchDy,
                      is_there ? from + static_cast<uint64_t>(k * kDown) * shape.out : problem.dy,
                      is_there ? 16 : 0);
      }
      from += static_cast<uint64_t>(kPixels) * shape.out;
      q += kPixels;
      ++asked;
      asked_stage = asked_stage + 1 == problem.stages ? 0 : asked_stage + 1;
    }
    gpu.commit();
  };

  float sums[Layout::kDown][2 * Layout::kAcross][4] = {};
  const int group = warp / (Layout::kWarpRows * Layout::kWarpColumns);
  const int first_row = warp / Layout::kWarpColumns % Layout::kWarpRows * Layout::kRows;
  const int first_column = warp % Layout::kWarpColumns * Layout::kColumns;
  const int first_pixel = group * kSteps * 16;
  const int own_x = (first_pixel + left_row(lane)) * Layout::kPitchX + first_row + left_column(lane);
  const int own_dy =
      (first_pixel + right_row(lane)) * Layout::kPitchDy + first_column + right_column(lane);
  uint32_t stage = 0;
  for (uint32_t s = 1; s < problem.stages; ++s) copy_dy();
  for (uint32_t turn = 0; turn < chunks; ++turn) {
    gpu.wait(static_cast<int>(problem.stages) - 2);
    gpu.sync(full(turn), Gpu::kBlock);  // dY and x of this turn are there
    copy_dy();  // to where all consumers have read, the turn before
    const uint16_t* const x = x_tiles + turn % kRing * Layout::kValuesX + own_x;
    const uint16_t* const dy = dy_tiles + stage * Layout::kValuesDy + own_dy;
    SWAT_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[Layout::kDown][4];
      SWAT_UNROLL
      for (int d = 0; d < Layout::kDown; ++d) {
        gpu.load_matrices(left[d], x + step * 16 * Layout::kPitchX + d * 16);
      }
      SWAT_UNROLL
      for (int a = 0; a < Layout::kAcross; ++a) {
        uint32_t right[4];
        gpu.load_matrices(right, dy + step * 16 * Layout::kPitchDy + a * 16);
        SWAT_UNROLL
        for (int d = 0; d < Layout::kDown; ++d) {
          gpu.multiply(sums[d][2 * a], left[d], right[0], right[1]);
          gpu.multiply(sums[d][2 * a + 1], left[d], right[2], right[3]);
        }
      }
    }
    if (turn + kRing < chunks) gpu.arrive(empty(turn), Gpu::kBlock);
    stage = stage + 1 == problem.stages ? 0 : stage + 1;
  }

  if constexpr (Layout::kGroups == 2) {
    // The second group's sums pass through shared memory to the first one.
    constexpr int kThreads = 32 * kConsumers / 2;
    static_assert(4 * M * N <= 2 * (kRing * Layout::kValuesX + 2 * Layout::kValuesDy));
    Four* const others = reinterpret_cast<Four*>(x_tiles) + thread % kThreads;
    gpu.sync(kAmongConsumers, 32 * kConsumers);  // all have multiplied
    SWAT_UNROLL
    for (int d = 0; d < Layout::kDown; ++d) {
      SWAT_UNROLL
      for (int a = 0; a < 2 * Layout::kAcross; ++a) {
        const float(&own)[4] = sums[d][a];
        if (group == 1) {
          others[(d * 2 * Layout::kAcross + a) * kThreads] = {own[0], own[1], own[2], own[3]};
        }
      }
    }
    gpu.sync(kAmongConsumers, 32 * kConsumers);
    if (group == 1) return;
    SWAT_UNROLL
    for (int d = 0; d < Layout::kDown; ++d) {
      SWAT_UNROLL
      for (int a = 0; a < 2 * Layout::kAcross; ++a) {
        const Four more = others[(d * 2 * Layout::kAcross + a) * kThreads];
        sums[d][a][0] += more.x, sums[d][a][1] += more.y;
        sums[d][a][2] += more.z, sums[d][a][3] += more.w;
      }
    }
  }

  const uint64_t first =
      (static_cast<uint64_t>(part.split) * shape.taps() + part.tap) * shape.in;
  SWAT_UNROLL
  for (int d = 0; d < Layout::kDown; ++d) {
    SWAT_UNROLL
    for (int a = 0; a < 2 * Layout::kAcross; ++a) {
      SWAT_UNROLL
      for (int which = 0; which < 4; which += 2) {
        const uint32_t i = part.in + first_row + d * 16 + sum_row(lane, which);
        const uint32_t o = part.out + first_column + a * 8 + sum_column(lane, which);
        if (i < shape.in && o < shape.out) {
          gpu.store(problem.partial + (first + i) * shape.out + o, sums[d][a][which],
                    sums[d][a][which + 1]);
        }
      }
    }
  }
}

// ---- The block ----------------------------------------------------------------------------------

template <typename Gpu, int M, int N, bool kGathers>
SWAT_INLINE uint32_t shared_bytes_of(const Shape& shape, uint32_t stages, uint32_t room) {
  using Layout = Tile<M, N>;
  return 2 * (kRing * Layout::kValuesX + stages * Layout::kValuesDy) +
         SourceOf<Gpu, M, N, kGathers>::Type::bytes(shape, room);
}

// Gives a problem as many stages and as much room as a block may have of `bytes` of shared memory.
template <typename Gpu, int M, int N, bool kGathers>
SWAT_INLINE bool fit(Problem& problem, uint32_t bytes) {
  const auto fits = [&](uint32_t stages, uint32_t room) {
    return shared_bytes_of<Gpu, M, N, kGathers>(problem.shape, stages, room) <= bytes;
  };
  // A tile keeps 205 values of 2,048 where a tenth is kept.
  problem.room = fits(4, 512) ? 512 : fits(3, 256) ? 256 : 0;
  problem.stages = kMostStages;
  while (problem.stages > 2 && !fits(problem.stages, problem.room)) --problem.stages;
  return fits(problem.stages, problem.room);
}

// `least` is the smallest magnitude that is kept, at least 1; `shared` starts at 16 bytes.
template <typename Gpu, int M, int N, bool kGathers>
SWAT_DEVICE void weight_gradient(const Gpu& gpu, const Problem& problem, uint32_t least,
                                 unsigned char* shared) {
  using Layout = Tile<M, N>;
  uint16_t* const x_tiles = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const dy_tiles = x_tiles + kRing * Layout::kValuesX;
  if (gpu.warp() < kConsumers) {
    gpu.template registers<true>();
    consume<Gpu, M, N>(gpu, problem, x_tiles, dy_tiles);
  } else {
    gpu.template registers<false>();
    produce<Gpu, M, N, kGathers>(
        gpu, problem, least, x_tiles,
        reinterpret_cast<unsigned char*>(dy_tiles + problem.stages * Layout::kValuesDy));
  }
}

}  // namespace conv
}  // namespace swat
