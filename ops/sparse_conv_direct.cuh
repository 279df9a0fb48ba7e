// A convolution with single sparse weights on CUDA cores: what one block of threads does.
//
// A weight that is kept costs a warp one load of (value, place), the same for all lanes, and loads of
// activations from shared memory, one for every product: these are what decides the speed. So
// activations are staged as *units* of 16 bytes, four images of one channel at one place. A lane has
// places of its own, and a weight moves all of them by one constant: there is no arithmetic on
// indices, and lanes lie side by side, in different banks.
//
// A block makes a run of output units, kUnits for each lane, of kOutputs channels for each warp, which
// stay in registers. Chunk by chunk of input channels all threads stage what the run sees, with the
// zeros around it; then every warp walks through the lists of its channels (`compact`).
//
// Where whole windows of 3x3 weights are kept or dropped together (the granularity `channel`), a lane
// has four rows of one column instead, and an entry is a window: what a lane loads then serves several
// of its products, and half the loads are left.
//
// How places are numbered: all images of four lie below each other, rows follow one another. Zeros
// before the first column of a row are those after the last one of the row above, and so for images;
// with strides every phase of rows and columns has a plane of its own, in which it lies densely.
//
// Nothing here knows of CUDA but through `Gpu`, what threads do together and what only the hardware
// does: tests/emulate_sparse_conv_direct.cpp runs these very lines on a CPU.

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
namespace direct {

constexpr int kBlock = 256;  // threads
constexpr int kWarpsOfBlock = kBlock / 32;
constexpr uint32_t kImages = 4;     // of a unit
constexpr uint32_t kUnitBytes = 16;
constexpr uint32_t kBanks = 8;      // of 16 bytes
constexpr uint32_t kMultiple = 2;   // of entries in a list: they are taken in pairs
constexpr uint32_t kEntries = 32;   // that a warp has before it, one for every lane
constexpr uint32_t kWindows = 8;    // the same, of windows: four lanes for each
constexpr uint32_t kRoom = 16;      // values that a window has room for in the compact kernel
constexpr int kAhead = 2;           // units of four channels that a thread requests together
constexpr uint32_t kNowhere = ~0u;

SWAT_INLINE uint32_t up(uint32_t value, uint32_t divisor) { return (value + divisor - 1) / divisor; }
SWAT_INLINE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
SWAT_INLINE uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

SWAT_INLINE uint32_t to_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}
SWAT_INLINE float from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

struct alignas(16) Four {
  float v[4];
};
struct alignas(8) Entry {
  float value;
  uint32_t offset;  // bytes from where a lane's unit begins
};
struct alignas(16) Pair {
  Entry entries[2];
};
// Nine weights, the offset of an entry, and two that nobody reads.
struct Window {
  Four fours[3];
};

// ---- The problem --------------------------------------------------------------------------------

struct Shape {
  uint32_t images, height, width, in;  // of the input
  uint32_t rows, columns, out;         // of the output
  uint32_t window[2], strides[2];
  uint32_t lows[2];  // zeros before the first row and column

  SWAT_INLINE uint32_t taps() const { return window[0] * window[1]; }
  SWAT_INLINE uint32_t groups() const { return up(images, kImages); }
};

// Where everything lies, for runs of `run` slots, each of which is `strip` units below each other, chunks
// of `chunk` input channels, which are a power of two, and parts of `part` output columns.
struct Plan {
  Shape shape;
  uint32_t run, strip, chunk, part;
  uint32_t bits;       // of a channel in its chunk
  uint32_t parts, chunks;
  uint32_t strips;     // of an image
  uint32_t phases[2];  // of strides that the window has
  uint32_t taps[2];    // of a phase, at most
  uint32_t pitch;      // units from a row to the next one
  uint32_t tall;       // rows from four images to the next four
  uint32_t lanes;      // slots of an output row, some of which may be beyond its end
  uint32_t plane;      // units of one phase of a channel
  uint32_t channel, quad;  // units of one channel, and of four

  SWAT_INLINE Plan(const Shape& shape, uint32_t run, uint32_t strip, uint32_t chunk, uint32_t part)
      : shape(shape), run(run), strip(strip), chunk(chunk), part(part) {
    for (bits = 0; (1u << bits) < chunk;) ++bits;
    parts = up(shape.columns, part), chunks = up(shape.in, chunk), strips = up(shape.rows, strip);
    uint32_t extents[2];
    for (int a = 0; a < 2; ++a) {
      const uint32_t input = a == 0 ? shape.height : shape.width;
      const uint32_t output = a == 0 ? shape.rows : part;
      phases[a] = least(shape.window[a], shape.strides[a]);
      taps[a] = up(shape.window[a], shape.strides[a]);
      if (shape.strides[a] == 1 && (a == 0 || parts == 1)) {
        // What is before the input is after the one before it.
        const uint32_t seen = output + shape.window[a] - 1, there = shape.lows[a] + input;
        extents[a] = most(input + most(shape.lows[a], seen > there ? seen - there : 0), output);
      } else {
        extents[a] = output + taps[a] - 1;
      }
    }
    tall = extents[0], pitch = extents[1];
    // Rows that are no multiple of the banks go on beyond their end, so that lanes lie side by side.
    lanes = part % kBanks == 0 ? part : pitch;
    plane = (rows() + taps[0] - 1) * pitch + taps[1] - 1;
    channel = phases[0] * phases[1] * plane;
    // Eight lanes store what they staged to eight banks, be it of one unit or of several.
    quad = up(4 * channel, kBanks) * kBanks + (chunk >= 4 * kBanks ? 1 : 4 * kBanks / chunk);
  }
  // Rows that a run can span.
  SWAT_INLINE uint32_t rows() const {
    const uint64_t image = static_cast<uint64_t>(strips) * lanes;
    const uint32_t lines = run % lanes == 0 ? run / lanes : (run - 2) / lanes + 2;
    uint32_t ends = (lines + strips - 2) / strips;  // of images
    if (run % image == 0) ends = static_cast<uint32_t>(run / image) - 1;
    if (image % run == 0) ends = 0;
    return lines * strip + ends * (most(tall, strips * strip) - strips * strip);
  }
  SWAT_INLINE uint32_t slots() const { return shape.groups() * strips * lanes; }  // of a part
  SWAT_INLINE uint32_t runs() const { return up(slots(), run); }
  // The number of a slot's first output row among all rows; the rows that it sees begin there, too.
  SWAT_INLINE uint32_t row(uint32_t slot) const {
    const uint32_t line = slot / lanes, group = line / strips;
    return group * tall + (line - group * strips) * strip;
  }
  // Where a channel of a chunk begins.
  SWAT_INLINE uint32_t at(uint32_t channel_of_chunk) const {
    return channel_of_chunk / 4 * quad + channel_of_chunk % 4 * channel;
  }
  // Where a tap is, from the first one on.
  SWAT_INLINE uint32_t place(uint32_t tap) const {
    const uint32_t y = tap / shape.window[1], x = tap - y * shape.window[1];
    const uint32_t phase = y % shape.strides[0] * phases[1] + x % shape.strides[1];
    return phase * plane + y / shape.strides[0] * pitch + x / shape.strides[1];
  }
  // The pixel of the first of four images that lies at a unit of a channel, of rows from `first` on.
  SWAT_INLINE uint32_t pixel(uint32_t unit, uint32_t first, uint32_t part_index) const {
    const uint32_t phase = unit / plane, at = unit - phase * plane;
    const uint32_t row = first + at / pitch, column = part_index * part + at % pitch;
    const uint32_t group = row / tall;
    // Below zero is far above the size.
    const uint32_t y = (row - group * tall) * shape.strides[0] + phase / phases[1] - shape.lows[0];
    const uint32_t x = column * shape.strides[1] + phase % phases[1] - shape.lows[1];
    if (y >= shape.height || x >= shape.width || group >= shape.groups()) return kNowhere;
    return (group * kImages * shape.height + y) * shape.width + x;
  }

  // Shared memory: activations, entries of every warp, places of taps, pixels of units.
  static constexpr uint32_t kRing = kEntries + kMultiple;  // one pair is read in advance
  SWAT_INLINE uint32_t entries_at() const { return chunk / 4 * quad * kUnitBytes; }
  SWAT_INLINE uint32_t places_at() const {
    const auto each = strip == 1 ? kRing * sizeof(Entry) : kWindows * sizeof(Window);
    return entries_at() + kWarpsOfBlock * 2 * static_cast<uint32_t>(each);
  }
  SWAT_INLINE uint32_t pixels_at() const { return places_at() + 4 * shape.taps(); }
  SWAT_INLINE uint32_t bytes() const { return pixels_at() + 4 * channel; }
};

template <typename T>
struct Problem {
  Plan plan;
  const T* x;
  const T* values;  // of the compact kernel, `room` for each output channel, or so many windows
  const int32_t* positions;
  const int32_t* starts;
  T* y;
  uint64_t room;
};

// What one block makes: blocks of the same pixels follow one another, so that they meet in the cache.
// The units of a lane are kStrip below each other, of slots that are 32 apart.
template <int kUnits, int kStrip, int kOutputs>
struct Part {
  static constexpr int kSlots = kUnits / kStrip;  // of a lane
  static constexpr uint32_t kRun = 32 * kSlots, kOut = kWarpsOfBlock * kOutputs;
  static_assert(kSlots * kStrip == kUnits && kOutputs % 4 == 0);
  uint32_t first, part, out;  // the first slot, the part of the columns, the first output channel

  SWAT_INLINE Part(const Plan& plan, uint32_t block) {
    const uint32_t outs = up(plan.shape.out, kOut);
    out = block % outs * kOut, block /= outs;
    part = block % plan.parts;
    first = block / plan.parts * kRun;
  }
  static SWAT_INLINE uint64_t blocks(const Plan& plan) {
    return static_cast<uint64_t>(up(plan.shape.out, kOut)) * plan.parts * plan.runs();
  }
};

// ---- Staging ------------------------------------------------------------------------------------

// Channels of a chunk to shared memory, all threads together, four channels of four images at a time.
// `units` of each channel; a place that is in no image gets zeros.
template <typename Gpu, typename T>
SWAT_DEVICE void stage(const Gpu& gpu, const Problem<T>& problem, uint32_t chunk, uint32_t units,
                       const uint32_t* pixels, unsigned char* to) {
  const Plan& plan = problem.plan;
  const Shape& shape = plan.shape;
  const uint32_t quads = plan.chunk / 4, size = shape.height * shape.width;
  const uint32_t quad = gpu.thread() & (quads - 1), channel = chunk * plan.chunk + quad * 4;
  const uint32_t step = kBlock >> (plan.bits - 2), end = shape.images * size;
  const T* const x = problem.x + channel;
  for (uint32_t unit = gpu.thread() >> (plan.bits - 2); unit < units; unit += kAhead * step) {
    Four loaded[kAhead][kImages];
    SWAT_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t own = unit + a * step;
      const uint32_t pixel = own < units && channel < shape.in ? pixels[own] : kNowhere;
      SWAT_UNROLL
      for (uint32_t i = 0; i < kImages; ++i) {
        // Images after the last one are not there.
        const uint32_t at = pixel + i * size;
        loaded[a][i] = gpu.four(x + static_cast<uint64_t>(at) * shape.in,
                                pixel != kNowhere && at < end);
      }
    }
    SWAT_UNROLL
    for (int a = 0; a < kAhead; ++a) {
      const uint32_t own = unit + a * step;
      if (own >= units) break;
      Four* const four = reinterpret_cast<Four*>(to) + quad * plan.quad + own;
      SWAT_UNROLL
      for (int c = 0; c < 4; ++c) {
        four[c * plan.channel] = {{loaded[a][0].v[c], loaded[a][1].v[c], loaded[a][2].v[c],
                                   loaded[a][3].v[c]}};
      }
    }
  }
}

// ---- Products -----------------------------------------------------------------------------------

// sums += the products of `count` entries, of which there are pairs.
template <int kUnits>
SWAT_DEVICE void multiply(const Entry* entries, uint32_t count, const unsigned char* activations,
                          const uint32_t (&bases)[kUnits], float (&sums)[kUnits][4]) {
  const Pair* const pairs = reinterpret_cast<const Pair*>(entries);
  Pair now = pairs[0];
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (uint32_t i = 1; i <= count / 2; ++i) {
    const Pair next = pairs[i];
    Four loaded[2][kUnits];
    SWAT_UNROLL
    for (int e = 0; e < 2; ++e) {
      SWAT_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        loaded[e][u] =
            *reinterpret_cast<const Four*>(activations + (bases[u] + now.entries[e].offset));
      }
    }
    SWAT_UNROLL
    for (int e = 0; e < 2; ++e) {
      SWAT_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        SWAT_UNROLL
        for (int v = 0; v < 4; ++v) sums[u][v] += now.entries[e].value * loaded[e][u].v[v];
      }
    }
    now = next;
  }
}

// The same for windows of 3x3 and a lane's units below each other, `pitch` bytes apart.
template <int kUnits>
SWAT_DEVICE void multiply_windows(const Window* windows, uint32_t count,
                                  const unsigned char* activations, uint32_t base, uint32_t pitch,
                                  float (&sums)[kUnits][4]) {
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (uint32_t i = 0; i < count; ++i) {
    Four weights[3];
    SWAT_UNROLL
    for (int q = 0; q < 3; ++q) weights[q] = windows[i].fours[q];
    const uint32_t start = base + to_bits(weights[2].v[1]);
    SWAT_UNROLL
    for (int x = 0; x < 3; ++x) {
      Four loaded[kUnits + 2];
      SWAT_UNROLL
      for (int r = 0; r < kUnits + 2; ++r) {
        loaded[r] = *reinterpret_cast<const Four*>(activations + (start + r * pitch) +
                                                   x * kUnitBytes);
      }
      SWAT_UNROLL
      for (int y = 0; y < 3; ++y) {
        const float weight = weights[(3 * y + x) / 4].v[(3 * y + x) % 4];
        SWAT_UNROLL
        for (int u = 0; u < kUnits; ++u) {
          SWAT_UNROLL
          for (int v = 0; v < 4; ++v) sums[u][v] += weight * loaded[u + y].v[v];
        }
      }
    }
  }
}

// ---- Lists --------------------------------------------------------------------------------------

// What a warp has before it of a list of the compact kernel: requested early, then put into shared
// memory for all lanes.
template <typename Gpu, typename T, int kUnits>
struct Weights {
  using Element = Entry;
  static constexpr uint32_t kEach = kEntries, kRing = Plan::kRing;
  const uint32_t lane;
  const uint32_t* places;
  uint32_t bases[kUnits];
  float value = 0.f;
  uint32_t position = 0;

  SWAT_DEVICE Weights(const Gpu& gpu, const uint32_t* places)
      : lane(gpu.thread() % 32), places(places) {}

  // Entries [from, to) of the list that begins at `list`.
  SWAT_DEVICE void request(const Gpu& gpu, const Problem<T>& problem, uint64_t list, uint32_t from,
                           uint32_t to) {
    const bool is_there = from + lane < to;
    value = gpu.weight(problem.values + list + from + lane, is_there);
    position = gpu.load_if(is_there, problem.positions + list + from + lane);
  }
  SWAT_DEVICE void put(const Gpu&, const Plan& plan, Entry* to) const {
    const uint32_t channel = position & (plan.chunk - 1);
    to[lane] = {value, (places[position >> plan.bits] + plan.at(channel)) * kUnitBytes};
  }
  SWAT_DEVICE void multiply_all(const Plan&, const Entry* entries, uint32_t count,
                                const unsigned char* activations, float (&sums)[kUnits][4]) const {
    multiply(entries, count, activations, bases, sums);
  }
};

// The same, of windows: four lanes for each.
template <typename Gpu, typename T, int kUnits>
struct Windows {
  using Element = Window;
  static constexpr uint32_t kEach = kWindows, kRing = kWindows;
  const uint32_t own, quarter;
  uint32_t bases[1];
  Four four = {{0.f, 0.f, 0.f, 0.f}};
  uint32_t position = 0;

  SWAT_DEVICE Windows(const Gpu& gpu, const uint32_t*)
      : own(gpu.thread() % 32 / 4), quarter(gpu.thread() % 4) {}

  SWAT_DEVICE void request(const Gpu& gpu, const Problem<T>& problem, uint64_t list, uint32_t from,
                           uint32_t to) {
    const bool is_there = from + own < to && quarter < 3;
    const uint64_t at = list + from + own;
    four = gpu.four(problem.values + at * kRoom + quarter * 4, is_there);
    position = gpu.load_if(is_there, problem.positions + at);
  }
  SWAT_DEVICE void put(const Gpu&, const Plan& plan, Window* to) const {
    if (quarter == 3) return;
    Four mine = four;
    if (quarter == 2) mine.v[1] = from_bits(plan.at(position) * kUnitBytes);
    to[own].fours[quarter] = mine;
  }
  SWAT_DEVICE void multiply_all(const Plan& plan, const Window* windows, uint32_t count,
                                const unsigned char* activations, float (&sums)[kUnits][4]) const {
    multiply_windows(windows, count, activations, bases[0], plan.pitch * kUnitBytes, sums);
  }
};

template <typename Gpu, typename T, int kUnits, int kStrip>
struct ListOf {
  using Type = Windows<Gpu, T, kUnits>;
};
template <typename Gpu, typename T, int kUnits>
struct ListOf<Gpu, T, kUnits, 1> {
  using Type = Weights<Gpu, T, kUnits>;
};

// ---- The block ----------------------------------------------------------------------------------

// `shared` starts at 16 bytes.
template <typename Gpu, int kUnits, int kStrip, int kOutputs, typename T>
SWAT_DEVICE void forward(const Gpu& gpu, const Problem<T>& problem, unsigned char* shared) {
  using List = typename ListOf<Gpu, T, kUnits, kStrip>::Type;
  using Element = typename List::Element;
  using Own = Part<kUnits, kStrip, kOutputs>;
  const Plan& plan = problem.plan;
  const Shape& shape = plan.shape;
  const Own part(plan, gpu.block());
  const uint32_t lane = gpu.thread() % 32, warp = gpu.warp();
  Element* const ring =
      reinterpret_cast<Element*>(shared + plan.entries_at()) + warp * 2 * List::kRing;
  uint32_t* const places = reinterpret_cast<uint32_t*>(shared + plan.places_at());
  uint32_t* const pixels = reinterpret_cast<uint32_t*>(shared + plan.pixels_at());

  const uint32_t end = least(part.first + plan.run, plan.slots());
  const uint32_t top = plan.row(part.first);
  // What this run sees, of a phase; a run that lies well needs less than there is room for.
  const uint32_t rows = plan.row(end - 1) - top + kStrip - 1 + plan.taps[0];
  const uint32_t seen = rows * plan.pitch + plan.taps[1] - 1;
  const uint32_t units = plan.channel - plan.plane + seen;
  for (uint32_t t = gpu.thread(); t < shape.taps(); t += kBlock) places[t] = plan.place(t);
  for (uint32_t u = gpu.thread(); u < units; u += kBlock) {
    pixels[u] = plan.pixel(u, top, part.part);
  }
  List entries(gpu, places);
  SWAT_UNROLL
  for (int s = 0; s < Own::kSlots; ++s) {
    // What is beyond the end computes something, and stores nothing.
    const uint32_t slot = least(part.first + s * 32 + lane, end - 1);
    entries.bases[s] = ((plan.row(slot) - top) * plan.pitch + slot % plan.lanes) * kUnitBytes;
  }
  float sums[kOutputs][kUnits][4];
  SWAT_UNROLL
  for (int j = 0; j < kOutputs; ++j) {
    SWAT_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      SWAT_UNROLL
      for (int v = 0; v < 4; ++v) sums[j][u][v] = 0.f;
    }
  }

  // Lane j knows where list j begins and ends.
  const uint32_t out = part.out + warp * kOutputs;
  const bool has_list = lane < kOutputs && out + lane < shape.out;
  const int32_t* const starts =
      problem.starts + static_cast<uint64_t>(has_list ? out + lane : 0) * (plan.chunks + 1);
  uint32_t low = 0, high = 0;
  if (has_list) high = gpu.load(starts);
  const uint64_t first_list = static_cast<uint64_t>(out) * problem.room;
  uint32_t turn = 0;
  gpu.sync();  // the tables are there

  for (uint32_t chunk = 0; chunk < plan.chunks; ++chunk) {
    low = high;
    if (has_list) high = gpu.load(starts + chunk + 1);
    uint64_t list = first_list;
    uint32_t begin = gpu.shuffle(low, 0), stop = gpu.shuffle(high, 0);
    entries.request(gpu, problem, list, begin, stop);
    stage(gpu, problem, chunk, units, pixels, shared);
    gpu.sync();  // activations are there
    SWAT_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      // After the last list comes one that has nothing.
      const uint32_t next_begin = gpu.shuffle(low, j + 1), next_stop = gpu.shuffle(high, j + 1);
      bool has_more;
      do {  // the first entries of this list are on their way
        Element* const own = ring + turn * List::kRing;
        turn ^= 1;
        entries.put(gpu, plan, own);
        const uint32_t count = least(stop - begin, List::kEach);
        begin += List::kEach;
        has_more = begin < stop;
        if (!has_more) list += problem.room;
        entries.request(gpu, problem, list, has_more ? begin : next_begin,
                        has_more ? stop : next_stop);
        gpu.sync_warp();  // entries are there, and nobody reads those of the turn before
        entries.multiply_all(plan, own, count, shared, sums[j]);
      } while (has_more);
      begin = next_begin, stop = next_stop;
    }
    gpu.sync();  // nobody reads activations any more
  }

  SWAT_UNROLL
  for (int u = 0; u < kUnits; ++u) {
    const uint32_t slot = part.first + u / kStrip * 32 + lane, line = slot / plan.lanes;
    const uint32_t group = line / plan.strips;
    const uint32_t row = (line - group * plan.strips) * kStrip + u % kStrip;
    const uint32_t own = slot - line * plan.lanes, column = part.part * plan.part + own;
    if (slot >= end || row >= shape.rows || own >= plan.part || column >= shape.columns) continue;
    SWAT_UNROLL
    for (uint32_t i = 0; i < kImages; ++i) {
      const uint32_t image = group * kImages + i;
      if (image >= shape.images) break;
      const uint64_t pixel = (static_cast<uint64_t>(image) * shape.rows + row) * shape.columns + column;
      T* const to = problem.y + pixel * shape.out + out;
      SWAT_UNROLL
      for (int j = 0; j < kOutputs; j += 4) {
        if (out + j >= shape.out) break;
        gpu.store(to + j, {{sums[j][u][i], sums[j + 1][u][i], sums[j + 2][u][i], sums[j + 3][u][i]}});
      }
    }
  }
}

}  // namespace direct
}  // namespace swat
