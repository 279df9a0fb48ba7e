// Runs ops/sparse_conv_direct.cuh on a CPU, thread by thread, and compares it with naive loops.
//
//   g++ -std=c++17 -O1 -I ops -I tests tests/emulate_sparse_conv_direct.cpp -o emulate && ./emulate

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "emulated_block.hpp"
#include "sparse_conv_direct.cuh"

namespace {

using namespace swat::direct;
using emulated::Block;
using emulated::fail;
using emulated::Range;

struct Emulated {
  static uint32_t thread() { return Block::current()->thread; }
  static uint32_t warp() { return Block::current()->thread / 32; }
  static uint32_t block() { return Block::current()->index; }
  static void sync() { Block::current()->sync(); }
  static void sync_warp() { Block::current()->sync_warp(); }
  static uint32_t shuffle(uint32_t value, int lane) {
    return Block::current()->shuffle(value, static_cast<uint32_t>(lane));
  }
  static uint32_t load(const int32_t* from) {
    Block::current()->check_read(from, 4);
    return static_cast<uint32_t>(*from);
  }
  static uint32_t load_if(bool condition, const int32_t* from) { return condition ? load(from) : 0; }
  static float weight(const float* from, bool is_there) {
    if (is_there) Block::current()->check_read(from, 4);
    return is_there ? *from : 0.f;
  }
  static Four four(const float* from, bool is_there) {
    Four found = {{0.f, 0.f, 0.f, 0.f}};
    if (!is_there) return found;
    Block::current()->check_read(from, 16);
    std::memcpy(&found, from, 16);
    return found;
  }
  static void store(float* to, const Four& from) {
    Block::current()->check_write(to, 16);
    std::memcpy(to, &from, 16);
  }
};

struct Case {
  uint32_t images, height, width, in, out;
  uint32_t window[2], strides[2], lows[2];
  int highs[2];
  double share;  // of weights that are kept
  uint32_t chunk, part;  // 0: all columns
};

// Floats at an address that is a multiple of 16, with nothing behind them.
struct Aligned {
  explicit Aligned(size_t count, float fill) : memory(new float[count + 4]), size(count) {
    begin = memory.get();
    while (reinterpret_cast<uintptr_t>(begin) % 16 != 0) ++begin;
    std::fill(begin, begin + count, fill);
  }
  std::unique_ptr<float[]> memory;
  float* begin;
  size_t size;
};

// Everything is a whole number that is small enough for exact sums in any order.
template <int kUnits, int kOutputs, int kStrip = 1>
void run(const Case& one, unsigned seed) {
  std::mt19937 generator(seed);
  const auto size_of = [&](int axis, uint32_t size) {
    return static_cast<uint32_t>((static_cast<int>(size + one.lows[axis] - one.window[axis]) +
                                  one.highs[axis]) / static_cast<int>(one.strides[axis]) + 1);
  };
  const Shape shape = {one.images, one.height, one.width, one.in, size_of(0, one.height),
                       size_of(1, one.width), one.out, {one.window[0], one.window[1]},
                       {one.strides[0], one.strides[1]}, {one.lows[0], one.lows[1]}};
  const uint32_t part = one.part != 0 ? one.part : shape.columns;
  const Plan plan(shape, 32 * kUnits / kStrip, kStrip, one.chunk, part);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(generator() % 9) - 4); };

  Aligned x(static_cast<size_t>(one.images) * one.height * one.width * one.in, 0.f);
  for (size_t i = 0; i < x.size; ++i) x.begin[i] = draw();
  std::vector<float> weights(static_cast<size_t>(shape.taps()) * one.in * one.out, 0.f);
  for (size_t i = 0; i < weights.size(); ++i) {
    // One output channel has nothing, and another one everything.
    const uint32_t o = static_cast<uint32_t>(i % one.out);
    const double share = o == 1 ? 0.0 : o == 2 ? 1.0 : one.share;
    if (generator() % 10000 < share * 10000) weights[i] = draw();
  }
  // The compact form, by its definition: of single weights, or of windows.
  const uint32_t taps = kStrip == 1 ? 1 : shape.taps(), each = kStrip == 1 ? 1 : kRoom;
  const uint32_t size = shape.taps() / taps * one.chunk, multiple = kStrip == 1 ? kMultiple : 1;
  const size_t room = static_cast<size_t>(up(size, multiple)) * multiple * plan.chunks;
  std::vector<float> values;
  std::vector<int32_t> positions, starts;
  for (uint32_t o = 0; o < one.out; ++o) {
    const size_t begin = o * room;
    values.resize(begin * each), positions.resize(begin);
    const auto put = [&](const std::vector<float>& some, uint32_t position) {
      values.insert(values.end(), some.begin(), some.end());
      values.resize(values.size() + each - some.size(), 0.f);
      positions.push_back(static_cast<int32_t>(position));
    };
    for (uint32_t c = 0; c < plan.chunks; ++c) {
      starts.push_back(static_cast<int32_t>(positions.size() - begin));
      for (uint32_t p = 0; p < size; ++p) {
        const uint32_t i = c * one.chunk + p % one.chunk;
        if (i >= one.in) continue;
        std::vector<float> some;
        bool is_kept = false;
        for (uint32_t tap = p / one.chunk; tap < p / one.chunk + taps; ++tap) {
          some.push_back(weights[(tap * size_t{one.in} + i) * one.out + o]);
          is_kept |= some.back() != 0.f;
        }
        if (is_kept) put(some, p);
      }
      while ((positions.size() - begin) % multiple != 0) put({0.f}, 0);
    }
    starts.push_back(static_cast<int32_t>(positions.size() - begin));
  }
  // What lies beyond the last list is unspecified.
  values.resize(one.out * room * each, std::nanf("")), positions.resize(one.out * room, 1 << 30);

  Aligned y(static_cast<size_t>(one.images) * shape.rows * shape.columns * one.out, std::nanf(""));
  Aligned aligned(values.size(), 0.f);
  std::copy(values.begin(), values.end(), aligned.begin);
  const Problem<float> problem = {plan, x.begin, aligned.begin, positions.data(), starts.data(),
                                  y.begin, room};
  const std::vector<Range> readable = {
      Range::of(x.begin, x.size), Range::of(aligned.begin, aligned.size),
      Range::of(positions.data(), positions.size()), Range::of(starts.data(), starts.size())};
  constexpr size_t kZone = 4096;
  const uint32_t bytes = plan.bytes();
  for (uint64_t b = 0; b < Part<kUnits, kStrip, kOutputs>::blocks(plan); ++b) {
    // What was not written is NaN.
    std::vector<uint64_t> memory((bytes + 2 * kZone) / 8 + 4, ~uint64_t{0});
    unsigned char* start = reinterpret_cast<unsigned char*>(memory.data());
    while (reinterpret_cast<uintptr_t>(start) % 16 != 0) ++start;
    Block block(static_cast<uint32_t>(b), kBlock, seed + static_cast<unsigned>(b), readable,
                Range::of(y.begin, y.size));
    block.run([&] { forward<Emulated, kUnits, kStrip, kOutputs>(Emulated{}, problem, start + kZone); });
    for (size_t i = 0; i < kZone; ++i) {
      if (start[i] != 0xff || start[kZone + bytes + i] != 0xff) fail("shared memory out of bounds");
    }
  }

  size_t wrong = 0;
  std::vector<double> expected(one.out);
  for (uint32_t image = 0; image < one.images; ++image) {
    for (uint32_t r = 0; r < shape.rows; ++r) {
      for (uint32_t c = 0; c < shape.columns; ++c) {
        std::fill(expected.begin(), expected.end(), 0.0);
        for (uint32_t tap = 0; tap < shape.taps(); ++tap) {
          const int row = static_cast<int>(r * one.strides[0] + tap / one.window[1]) -
                          static_cast<int>(one.lows[0]);
          const int column = static_cast<int>(c * one.strides[1] + tap % one.window[1]) -
                             static_cast<int>(one.lows[1]);
          if (row < 0 || column < 0 || row >= static_cast<int>(one.height) ||
              column >= static_cast<int>(one.width)) {
            continue;
          }
          const size_t from = ((image * one.height + row) * one.width + column) * size_t{one.in};
          for (uint32_t i = 0; i < one.in; ++i) {
            for (uint32_t o = 0; o < one.out; ++o) {
              expected[o] += x.begin[from + i] * weights[(tap * one.in + i) * size_t{one.out} + o];
            }
          }
        }
        const size_t q = (image * shape.rows + r) * shape.columns + c;
        for (uint32_t o = 0; o < one.out; ++o) wrong += !(y.begin[q * one.out + o] == expected[o]);
      }
    }
  }
  std::printf("%s images %u height %u width %u in %u out %u window %u %u strides %u %u lows %u %u "
              "rows %u columns %u run %d strip %d chunk %u part %u bytes %u share %g\n",
              wrong == 0 ? "ok   " : "WRONG", one.images, one.height, one.width, one.in, one.out,
              one.window[0], one.window[1], one.strides[0], one.strides[1], one.lows[0], one.lows[1],
              shape.rows, shape.columns, 32 * kUnits, kStrip, one.chunk, part, bytes, one.share);
  if (wrong != 0) fail("not as by naive loops");
}

}  // namespace

int main() {
  unsigned seed = 0;
  for (const double share : {0.1, 0.0, 1.0, 0.5}) {
    run<2, 8>({5, 7, 7, 20, 12, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 8, 0}, ++seed);
    run<2, 8>({3, 8, 8, 8, 68, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 16, 0}, ++seed);
    run<4, 4>({9, 9, 10, 8, 36, {3, 3}, {2, 2}, {1, 1}, {1, 1}, share, 4, 0}, ++seed);
    run<1, 8>({4, 5, 19, 12, 8, {1, 1}, {1, 1}, {0, 0}, {0, 0}, share, 4, 8}, ++seed);
  }
  // Windows as a whole.
  for (const double share : {0.1, 0.0, 1.0, 0.02}) {
    run<4, 4, 4>({5, 7, 7, 20, 36, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 8, 0}, ++seed);
    run<4, 8, 4>({3, 8, 8, 24, 68, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 32, 0}, ++seed);
    run<4, 4, 4>({2, 13, 28, 8, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 4, 8}, ++seed);
  }
  run<4, 4, 4>({50, 2, 2, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3, 4, 0}, ++seed);
  run<4, 4, 4>({9, 5, 6, 4, 4, {3, 3}, {1, 1}, {0, 2}, {2, 0}, 0.3, 4, 0}, ++seed);
  run<4, 4, 4>({9, 5, 6, 4, 4, {3, 3}, {1, 1}, {0, 0}, {0, 0}, 0.3, 4, 3}, ++seed);
  run<4, 4, 4>({9, 16, 16, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3, 4, 0}, ++seed);
  run<4, 4, 4>({21, 14, 14, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3, 4, 0}, ++seed);
  // Images that are many, large, or have a few pixels; parts of columns.
  run<2, 8>({50, 2, 2, 4, 4, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.3, 4, 0}, ++seed);
  run<2, 8>({130, 1, 1, 40, 8, {1, 1}, {1, 1}, {0, 0}, {0, 0}, 0.3, 32, 0}, ++seed);
  run<2, 16>({2, 14, 14, 36, 140, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.1, 32, 0}, ++seed);
  run<4, 8>({1, 12, 28, 8, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.1, 8, 8}, ++seed);
  run<2, 8>({1, 6, 28, 8, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.1, 8, 14}, ++seed);
  run<2, 8>({3, 11, 28, 4, 8, {3, 3}, {2, 2}, {0, 0}, {1, 1}, 0.2, 4, 8}, ++seed);
  run<2, 8>({5, 16, 16, 4, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.2, 4, 0}, ++seed);
  // Windows, strides and paddings of all kinds.
  run<2, 8>({3, 7, 6, 16, 8, {1, 1}, {2, 2}, {0, 0}, {0, 0}, 0.3, 16, 0}, ++seed);
  run<2, 8>({3, 7, 6, 16, 8, {1, 1}, {1, 1}, {1, 0}, {2, 1}, 0.3, 16, 0}, ++seed);
  run<1, 8>({3, 7, 6, 16, 8, {3, 2}, {1, 3}, {1, 1}, {1, 0}, 0.3, 8, 0}, ++seed);
  run<1, 8>({3, 9, 8, 8, 8, {5, 7}, {3, 2}, {4, 2}, {0, 6}, 0.2, 8, 0}, ++seed);
  run<1, 8>({3, 7, 6, 8, 8, {3, 3}, {1, 1}, {0, 0}, {0, 0}, 0.2, 8, 0}, ++seed);
  run<1, 8>({3, 7, 6, 8, 8, {2, 2}, {1, 1}, {0, 0}, {-1, -2}, 0.2, 8, 0}, ++seed);
  run<1, 8>({3, 4, 4, 8, 8, {2, 2}, {1, 1}, {3, 4}, {3, 2}, 0.2, 8, 0}, ++seed);
  run<1, 8>({2, 5, 4, 8, 8, {7, 7}, {1, 1}, {3, 3}, {3, 3}, 0.2, 8, 3}, ++seed);
  std::printf("everything as by naive loops\n");
  return 0;
}
