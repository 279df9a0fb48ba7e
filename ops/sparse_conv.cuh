// The weight gradient of a convolution from packed activations: what one block of threads does.
//
// dW[tap, i, o] = sum over output pixels q of x[pixel of q under tap, i] * dY[q, o], which is a matrix
// product over pixels. A block makes a tile of M input and N output channels of one tap, over a range
// of chunks of 32 pixels; `sparse_conv.cu` adds up what the blocks of all ranges made.
//
// A chunk passes through three stations, each one turn of the loop before the next:
//   1. a table of words of the bitmap, each with how many values are kept before it;
//   2. every thread finds its piece there, M / 8 channels of one pixel, and requests the kept values,
//      which follow one another in memory;
//   3. they are put into a tile of zeros in shared memory, and tensor cores multiply it with dY's,
//      which was copied there meanwhile.
// So a turn has one barrier, and no load is waited for in the turn that requested it.
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

constexpr int kBlock = 256;       // threads
constexpr int kWarpsOfBlock = kBlock / 32;
constexpr int kPixels = 32;       // of a chunk
constexpr int kSteps = kPixels / 16;  // of the tensor cores in a chunk
constexpr uint32_t kWordsOfTile = 64;  // of a bitmap, for every entry of `offsets`
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
  SWAT_INLINE uint32_t chunks() const { return (pixels + kPixels - 1) / kPixels; }
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
    begin = static_cast<uint32_t>(static_cast<uint64_t>(shape.chunks()) * split / problem.splits);
    end = static_cast<uint32_t>(static_cast<uint64_t>(shape.chunks()) * (split + 1) / problem.splits);
  }
  static uint32_t blocks(const Shape& shape, uint32_t splits) {
    return (shape.in + M - 1) / M * ((shape.out + N - 1) / N) * shape.taps() * splits;
  }
};

// ---- Layout of a tile ---------------------------------------------------------------------------

// Warps lie over the M x N sums of a block in rows and columns.
template <int M, int N>
struct Tile {
  static constexpr int kWarpRows = M >= 256 ? 4 : 2, kWarpColumns = kWarpsOfBlock / kWarpRows;
  static constexpr int kRows = M / kWarpRows, kColumns = N / kWarpColumns;  // of sums of a warp
  static constexpr int kDown = kRows / 16, kAcross = kColumns / 16;
  static constexpr int kStages = N >= 256 ? 3 : N >= 128 ? 4 : 6;  // chunks of dY in shared memory
  // Rows in shared memory end with 16 bytes that nobody uses: eight rows then lie in eight banks.
  static constexpr int kPitchX = M + 8, kPitchDy = N + 8;
  static constexpr int kValuesX = kPixels * kPitchX, kValuesDy = kPixels * kPitchDy;
  static constexpr uint32_t kBytes = 2 * (2 * kValuesX + kStages * kValuesDy);  // without the tables
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0 && kRows * kWarpRows == M &&
                kColumns * kWarpColumns == N);
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

// ---- Tables -------------------------------------------------------------------------------------

struct Entry {
  uint32_t bits, before;  // a word, and how many values are kept before it
};

// Of pixels that follow one another: all words from the beginning of a tile of the bitmap on.
template <typename Gpu, int M>
struct RunTable {
  static constexpr int kEach = 2;  // tiles for every warp
  static constexpr uint32_t kMostIn = 960;
  static SWAT_INLINE uint32_t tiles(uint32_t in) {
    const uint32_t values = kPixels * in, tile = 32 * kWordsOfTile;
    return values / tile + (values % tile == 0 ? 0 : 2);
  }
  static SWAT_INLINE uint32_t entries(uint32_t in) { return tiles(in) * kWordsOfTile; }
  static SWAT_INLINE uint32_t first_tile(const Shape& shape, uint32_t chunk) {
    return chunk * kPixels * shape.in / (32 * kWordsOfTile);
  }

  const uint32_t warp, lane, count;  // of tiles
  uint32_t words[kEach][2], offsets[kEach];

  SWAT_DEVICE RunTable(const Gpu& gpu, const Shape& shape)
      : warp(gpu.warp()), lane(gpu.thread() % 32), count(tiles(shape.in)) {}

  SWAT_DEVICE void load(const Gpu& gpu, const Problem& problem, uint32_t chunk, uint32_t, uint32_t) {
    SWAT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const uint32_t own = warp + e * kWarpsOfBlock;
      if (own >= count) break;  // all lanes of the warp
      const uint32_t tile = first_tile(problem.shape, chunk) + own;
      const uint32_t at = tile * kWordsOfTile + lane;
      const bool is_there = tile * kWordsOfTile < problem.words;
      offsets[e] = is_there ? gpu.load(problem.offsets + tile) : 0;
      words[e][0] = at < problem.words ? gpu.load(problem.bitmap + at) : 0;
      words[e][1] = at + 32 < problem.words ? gpu.load(problem.bitmap + at + 32) : 0;
    }
  }
  SWAT_DEVICE void store(const Gpu& gpu, Entry* table) const {
    SWAT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const uint32_t own = warp + e * kWarpsOfBlock;
      if (own >= count) break;
      // Both halves at once, 16 bits for each: a half has 1024 values.
      const uint32_t counts = count_bits(words[e][0]) | count_bits(words[e][1]) << 16;
      const uint32_t before = gpu.scan(counts);
      const uint32_t low = gpu.shuffle(before + counts, 31) & 0xffff;
      Entry* const to = table + own * kWordsOfTile + lane;
      to[0] = {words[e][0], offsets[e] + (before & 0xffff)};
      to[32] = {words[e][1], offsets[e] + low + (before >> 16)};
    }
  }
  // Where a piece begins, from the first value of a chunk on.
  struct Place {
    uint32_t value;
    SWAT_INLINE Place(const Shape& shape, uint32_t row, uint32_t in, uint32_t channel)
        : value(row * shape.in + in + channel) {}
  };
  // The word from a place on, of which `count` bits are wanted.
  static SWAT_INLINE Entry find(const Shape& shape, const Entry* table, uint32_t chunk, Place place,
                                uint32_t count) {
    const uint32_t value = chunk * kPixels * shape.in % (32 * kWordsOfTile) + place.value;
    const Entry* const at = table + value / 32;
    const uint32_t shift = value % 32, high = shift + count > 32 ? at[1].bits : 0;
    return {join(at->bits, high, shift), at->before + count_bits(at->bits & low_bits(shift))};
  }
};

// Of pixels anywhere: for every pixel of the chunk the words of its channels from the first on.
template <typename Gpu, int M>
struct GatherTable {
  static constexpr int kEach = kPixels / kWarpsOfBlock;  // pixels for every warp
  static constexpr uint32_t kWords = M / 32;
  static SWAT_INLINE uint32_t entries(uint32_t) { return kPixels * kWords; }

  const uint32_t warp, lane;
  uint32_t earlier[kEach], words[kEach], offsets[kEach], shifts[kEach];

  SWAT_DEVICE GatherTable(const Gpu& gpu, const Shape&)
      : warp(gpu.warp()), lane(gpu.thread() % 32) {}

  SWAT_DEVICE void load(const Gpu& gpu, const Problem& problem, uint32_t chunk, uint32_t tap,
                        uint32_t in) {
    SWAT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const uint32_t q = chunk * kPixels + warp * kEach + e;
      const uint32_t pixel =
          q < problem.shape.pixels ? problem.shape.input_pixel(q, tap) : kNowhere;
      earlier[e] = words[e] = offsets[e] = shifts[e] = 0;
      if (pixel == kNowhere) continue;  // all lanes of the warp
      const uint32_t value = pixel * problem.shape.in + in, word = value / 32;
      const uint32_t tile = word / kWordsOfTile, start = tile * kWordsOfTile;
      shifts[e] = value % 32;
      offsets[e] = gpu.load(problem.offsets + tile);
      // What is kept in the tile before the word.
      uint32_t low = 0, high = 0;
      if (start + lane < word) low = gpu.load(problem.bitmap + start + lane);
      if (start + 32 + lane < word) high = gpu.load(problem.bitmap + start + 32 + lane);
      if (lane <= kWords && word + lane < problem.words) {
        words[e] = gpu.load(problem.bitmap + word + lane);
      }
      earlier[e] = count_bits(low) + count_bits(high);
    }
  }
  SWAT_DEVICE void store(const Gpu& gpu, Entry* table) const {
    SWAT_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const uint32_t before = offsets[e] + gpu.sum(earlier[e]);
      const uint32_t first = gpu.shuffle(words[e], 0) & low_bits(shifts[e]);
      const uint32_t bits = join(words[e], gpu.shuffle(words[e], (lane + 1) % 32), shifts[e]);
      const uint32_t rank = before + count_bits(first) + gpu.scan(count_bits(bits));
      const uint32_t row = warp * kEach + e;
      if (lane < kWords) table[row * kWords + lane] = {bits, rank};
    }
  }
  struct Place {
    uint32_t entry, shift;
    SWAT_INLINE Place(const Shape&, uint32_t row, uint32_t, uint32_t channel)
        : entry(row * kWords + channel / 32), shift(channel % 32) {}
  };
  static SWAT_INLINE Entry find(const Shape&, const Entry* table, uint32_t, Place place, uint32_t) {
    const Entry at = table[place.entry];
    return {at.bits >> place.shift, at.before + count_bits(at.bits & low_bits(place.shift))};
  }
};

// ---- Pieces -------------------------------------------------------------------------------------

// What one thread unpacks of a chunk: kBits channels of one pixel, eight threads for a pixel.
template <typename Gpu, typename Table, int M>
struct Piece {
  static constexpr int kThreadsOfPixel = kBlock / kPixels, kBits = M / kThreadsOfPixel;
  static constexpr int kSlots = kBits < 16 ? kBits : 16;  // values that wait in registers
  static constexpr int kGroup = 4;
  static_assert(kBits % 8 == 0 && kBits <= 32);

  const uint32_t row, channel;
  const typename Table::Place place;
  const uint32_t there;  // channels, some of which may lie beyond the last one
  uint32_t bits, count, before;
  uint32_t most;  // of the warp
  uint32_t waiting[kSlots];

  SWAT_DEVICE Piece(const Gpu& gpu, const Shape& shape, uint32_t in)
      : row(gpu.thread() / kThreadsOfPixel), channel(gpu.thread() % kThreadsOfPixel * kBits),
        place(shape, row, in, channel), there(channels(shape, in + channel)) {}

  static SWAT_INLINE uint32_t channels(const Shape& shape, uint32_t from) {
    const uint32_t left = from < shape.in ? shape.in - from : 0;
    return left < kBits ? left : kBits;
  }

  SWAT_DEVICE void load(const Gpu& gpu, const Problem& problem, const Entry* table, uint32_t chunk) {
    bits = count = before = 0;
    if (there > 0 && chunk * kPixels + row < problem.shape.pixels) {
      const Entry found = Table::find(problem.shape, table, chunk, place, there);
      bits = found.bits & low_bits(there);
      before = found.before;
      count = count_bits(bits);
      // A bitmap that promises too much stays in bounds.
      const uint32_t room = before < problem.capacity ? problem.capacity - before : 0;
      if (count > room) count = room;
    }
    most = gpu.largest(count);
    const uint16_t* const values = problem.values + before;
    SWAT_UNROLL
    for (int g = 0; g < kSlots; g += kGroup) {
      if (g < static_cast<int>(most)) {
        SWAT_UNROLL
        for (int s = g; s < g + kGroup; ++s) {
          waiting[s] = gpu.load_if(s < static_cast<int>(count), values + s);
        }
      }
    }
  }

  // Values below `least` are left out; no NaN is.
  SWAT_DEVICE void store(const Gpu& gpu, const Problem& problem, uint32_t least, uint16_t* tile,
                         int pitch) {
    uint16_t* const to = tile + row * pitch + channel;
    constexpr int kParts = kBits / 8;
    const int own = static_cast<int>(channel) / kBits;
    SWAT_UNROLL
    for (int p = 0; p < kParts; ++p) {
      // Threads of a pixel begin at different banks.
      gpu.clear(to + (p + own * kParts / kThreadsOfPixel) % kParts * 8);
    }
    uint32_t left = bits;
    const auto put = [&](bool is_there, uint32_t value) {
      gpu.put_if(is_there && (value & 0x7fff) >= least, to + lowest_bit(left), value);
      left &= left - 1;
    };
    SWAT_UNROLL
    for (int g = 0; g < kSlots; g += kGroup) {
      if (g < static_cast<int>(most)) {
        SWAT_UNROLL
        for (int s = g; s < g + kGroup; ++s) {
          put(s < static_cast<int>(count), waiting[s]);
        }
      }
    }
    if constexpr (kSlots < kBits) {
      for (uint32_t s = kSlots; s < count; ++s) put(true, gpu.load_if(true, problem.values + before + s));
    }
  }
};

// ---- The block ----------------------------------------------------------------------------------

template <typename Gpu, int M, bool kGathers>
struct TableOf {
  using Type = RunTable<Gpu, M>;
};
template <typename Gpu, int M>
struct TableOf<Gpu, M, true> {
  using Type = GatherTable<Gpu, M>;
};

template <typename Gpu, int M, int N, bool kGathers>
SWAT_INLINE uint32_t shared_bytes_of(const Shape& shape) {
  const uint32_t entries = TableOf<Gpu, M, kGathers>::Type::entries(shape.in);
  return Tile<M, N>::kBytes + 2 * entries * static_cast<uint32_t>(sizeof(Entry));
}

// `least` is the smallest magnitude that is kept, at least 1; `shared` starts at 16 bytes.
template <typename Gpu, int M, int N, bool kGathers>
SWAT_DEVICE void weight_gradient(const Gpu& gpu, const Problem& problem, uint32_t least,
                                 unsigned char* shared) {
  using Layout = Tile<M, N>;
  using Table = typename TableOf<Gpu, M, kGathers>::Type;
  const Shape& shape = problem.shape;
  const Part<M, N> part(problem, gpu.block());
  uint16_t* const x_tiles = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const dy_tiles = x_tiles + 2 * Layout::kValuesX;
  Entry* const tables = reinterpret_cast<Entry*>(shared + Layout::kBytes);
  const uint32_t entries = Table::entries(shape.in), chunks = part.end - part.begin;
  const int thread = static_cast<int>(gpu.thread()), lane = thread % 32;
  const int warp = static_cast<int>(gpu.warp());

  // Chunks are counted from the first of this block. What is not there has no stations.
  // A thread copies 8 channels, the same of every so many pixels, chunk after chunk.
  constexpr int kAcross = N / 8, kDown = kBlock / kAcross;
  const uint32_t column = static_cast<uint32_t>(thread % kAcross) * 8;
  const bool has_column = part.out + column < shape.out;
  uint32_t q = part.begin * kPixels + static_cast<uint32_t>(thread / kAcross);
  const uint16_t* from = problem.dy + static_cast<uint64_t>(q) * shape.out + part.out + column;
  const int own = thread / kAcross * Layout::kPitchDy + static_cast<int>(column);
  const auto copy_dy = [&](uint32_t turn) {
    if (turn < chunks) {
      uint16_t* const to = dy_tiles + turn % Layout::kStages * Layout::kValuesDy + own;
      SWAT_UNROLL
      for (int k = 0; k < kPixels / kDown; ++k) {
        gpu.copy(to + k * kDown * Layout::kPitchDy, from + static_cast<uint64_t>(k * kDown) * shape.out,
                 has_column && q + k * kDown < shape.pixels);
      }
      from += static_cast<uint64_t>(kPixels) * shape.out;
      q += kPixels;
    }
    gpu.commit();
  };
  Table table(gpu, shape);
  Piece<Gpu, Table, M> piece(gpu, shape, part.in);
  const auto load_table = [&](uint32_t turn) {
    if (turn < chunks) table.load(gpu, problem, part.begin + turn, part.tap, part.in);
  };
  const auto store_table = [&](uint32_t turn) {
    if (turn < chunks) table.store(gpu, tables + turn % 2 * entries);
  };
  const auto load_piece = [&](uint32_t turn) {
    if (turn < chunks) piece.load(gpu, problem, tables + turn % 2 * entries, part.begin + turn);
  };
  const auto store_piece = [&](uint32_t turn) {
    if (turn < chunks) {
      piece.store(gpu, problem, least, x_tiles + turn % 2 * Layout::kValuesX, Layout::kPitchX);
    }
  };

  float sums[Layout::kDown][2 * Layout::kAcross][4] = {};
  const int first_row = warp / Layout::kWarpColumns * Layout::kRows;
  const int first_column = warp % Layout::kWarpColumns * Layout::kColumns;
  const auto multiply = [&](uint32_t turn) {
    const uint16_t* const x = x_tiles + turn % 2 * Layout::kValuesX +
                              left_row(lane) * Layout::kPitchX + first_row + left_column(lane);
    const uint16_t* const dy = dy_tiles + turn % Layout::kStages * Layout::kValuesDy +
                               right_row(lane) * Layout::kPitchDy + first_column +
                               right_column(lane);
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
  };

  for (uint32_t turn = 0; turn + 1 < Layout::kStages; ++turn) copy_dy(turn);
  for (uint32_t turn = 0; turn < 2; ++turn) load_table(turn), store_table(turn);
  gpu.sync();
  load_piece(0);
  store_piece(0);
  for (uint32_t turn = 0; turn < chunks; ++turn) {
    gpu.template wait<Layout::kStages - 2>();
    gpu.sync();  // dY and x of this turn are there, and so is the table of the next
    copy_dy(turn + Layout::kStages - 1);
    load_table(turn + 2);
    load_piece(turn + 1);
    multiply(turn);
    store_piece(turn + 1);
    store_table(turn + 2);
  }

  const uint64_t first = (static_cast<uint64_t>(part.split) * shape.taps() + part.tap) * shape.in;
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

}  // namespace conv
}  // namespace swat
