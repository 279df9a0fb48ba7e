// Runs ops/sparse_conv.cuh on a CPU, thread by thread, and compares it with naive loops.
//
//   g++ -std=c++17 -O1 -I ops tests/emulate_sparse_conv.cpp -o emulate && ./emulate
//
// What the hardware does is done here by the PTX manual's words. Threads are coroutines: they change
// only where they wait for each other, and a warp, drawn at random, goes as far as it can before
// another goes on. Copies arrive at once or as late as they may. So a barrier that is missing shows.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "sparse_conv.cuh"

namespace {

using namespace swat::conv;

constexpr int kMostWarps = kConsumers + 8;

void fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// ---- A block of threads -------------------------------------------------------------------------

using Words = std::array<uint32_t, 10>;  // what a lane gives others, or takes

class Block;
Block* current = nullptr;

struct Range {
  const char* begin;
  const char* end;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, wide;  // what is read, and what is written: zeros follow
  void arrive() const {
    std::memset(to, 0, wide);
    std::memcpy(to, from, bytes);
  }
};

class Block {
 public:
  Block(int threads, uint32_t index, unsigned seed, std::vector<Range> readable, Range writable,
        Range shared)
      : index(index), readable(readable), writable(writable), shared(shared), generator_(seed), fibers_(threads) {}

  void run(const std::function<void()>& body) {
    current = this;
    body_ = &body;
    for (Fiber& fiber : fibers_) {
      fiber.stack.resize(96 * 1024);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::start, 0);
    }
    while (true) {
      std::vector<int> ready;
      for (int w = 0; w < static_cast<int>(fibers_.size()) / 32; ++w) {
        if (can_run(w)) ready.push_back(w);
      }
      if (ready.empty()) break;
      const int warp = ready[generator_() % ready.size()];
      while (can_run(warp)) {
        for (int lane = 0; lane < 32; ++lane) {
          Fiber& fiber = fibers_[warp * 32 + lane];
          if (!fiber.can_run()) continue;
          thread = static_cast<uint32_t>(warp * 32 + lane);
          swapcontext(&scheduler_, &fiber.context);
        }
      }
    }
    for (const Fiber& fiber : fibers_) {
      if (!fiber.done) fail("threads wait for each other forever");
    }
    for (const Meeting& meeting : barriers_) {
      if (meeting.arrived != 0) fail("threads came to a barrier that nobody waits for");
    }
  }

  // Waits for `count` threads that meet at the same place; the last one does `act`.
  struct Meeting {
    int arrived = 0, count = 0;
    unsigned turn = 0;
  };
  void meet(Meeting& meeting, int count, const std::function<void()>& act) {
    const unsigned turn = meeting.turn;
    arrive(meeting, count, act);
    if (meeting.turn != turn) return;
    Fiber& fiber = fibers_[thread];
    fiber.meeting = &meeting, fiber.turn = turn;
    swapcontext(&fiber.context, &scheduler_);
    fiber.meeting = nullptr;
  }
  static void arrive(Meeting& meeting, int count, const std::function<void()>& act) {
    if (meeting.arrived == 0) meeting.count = count;
    if (meeting.count != count) fail("threads come to a barrier with different numbers");
    if (++meeting.arrived != count) return;
    meeting.arrived = 0;
    act();
    ++meeting.turn;
  }
  unsigned draw() { return static_cast<unsigned>(generator_()); }
  Meeting& barrier(int number) {
    if (number < 1 || number > 15) fail("a barrier that devices do not have");
    return barriers_[number];
  }
  Meeting& warp_meeting() { return warps_[thread / 32].meeting; }

  // What the lanes of a warp give each other: `act(given, taken)`.
  template <typename Act>
  Words exchange(const Words& own, Act act) {
    Warp& warp = warps_[thread / 32];
    const unsigned turn = warp.meeting.turn;
    warp.given[thread % 32] = own;
    meet(warp.meeting, 32, [&] { act(warp.given, warp.taken[turn % 2]); });
    return warp.taken[turn % 2][thread % 32];
  }

  void check_read(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    for (const Range& range : readable) {
      if (from >= range.begin && from + bytes <= range.end) return;
    }
    fail("a read out of bounds");
  }
  void check_shared(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    if (from < shared.begin || from + bytes > shared.end) fail("shared memory out of bounds");
  }
  void check_write(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    if (from < writable.begin || from + bytes > writable.end) fail("a write out of bounds");
  }

  std::vector<std::vector<Copy>>& groups() { return fibers_[thread].groups; }

  const uint32_t index;
  const std::vector<Range> readable;
  const Range writable, shared;
  uint32_t thread = 0;

 private:
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    std::vector<std::vector<Copy>> groups = {{}};
    Meeting* meeting = nullptr;
    unsigned turn = 0;
    bool done = false;
    bool can_run() const { return !done && (meeting == nullptr || meeting->turn != turn); }
  };
  struct Warp {
    Meeting meeting;
    Words given[32], taken[2][32];
  };
  static void start() {
    Block& block = *current;
    const uint32_t own = block.thread;
    (*block.body_)();
    block.fibers_[own].done = true;
  }
  bool can_run(int warp) const {
    for (int lane = 0; lane < 32; ++lane) {
      if (fibers_[warp * 32 + lane].can_run()) return true;
    }
    return false;
  }

  std::mt19937 generator_;
  std::vector<Fiber> fibers_;
  Warp warps_[kMostWarps];
  Meeting barriers_[16];
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
};

// ---- Numbers ------------------------------------------------------------------------------------

struct Bfloat16 {
  static float widen(uint32_t bits) {
    const uint32_t wide = bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static uint16_t narrow(float value) {  // of what fits exactly
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    return static_cast<uint16_t>(wide >> 16);
  }
};

struct Float16 {
  static float widen(uint32_t bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits & 0x8000 ? -1.f : 1.f;
    if (exponent == 31) {
      return fraction != 0 ? std::numeric_limits<float>::quiet_NaN()
                           : sign * std::numeric_limits<float>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25);
  }
  static uint16_t narrow(float value) {  // of small whole numbers
    if (std::isnan(value)) return 0x7e00;
    if (value == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::abs(value), &exponent);
    const auto bits = static_cast<uint32_t>(exponent + 14) << 10 | static_cast<uint32_t>(fraction * 2048 - 1024);
    if (widen(bits) != std::abs(value)) fail("no float16");
    return static_cast<uint16_t>(bits | (value < 0) << 15);
  }
};

// ---- What the hardware does ---------------------------------------------------------------------

template <typename Format, int Producers>
struct Emulated {
  static constexpr int kProducers = Producers, kBlock = 32 * (kConsumers + kProducers);
  template <bool>
  static void registers() {}

  static uint32_t thread() { return current->thread; }
  static uint32_t warp() { return current->thread / 32; }
  static uint32_t block() { return current->index; }
  static void sync(int barrier, int count) { current->meet(current->barrier(barrier), count, [] {}); }
  static void arrive(int barrier, int count) {
    Block::arrive(current->barrier(barrier), count, [] {});
  }
  static void sync_warp() { current->meet(current->warp_meeting(), 32, [] {}); }

  template <typename Act>
  static uint32_t reduce(uint32_t value, Act act) {
    return current->exchange({value}, [&](auto& given, auto& taken) {
      for (int l = 0; l < 32; ++l) taken[l] = {act(given, l)};
    })[0];
  }
  static uint32_t largest(uint32_t value) {
    return reduce(value, [](auto& given, int) {
      uint32_t found = 0;
      for (int l = 0; l < 32; ++l) found = std::max(found, given[l][0]);
      return found;
    });
  }
  static uint32_t scan(uint32_t value) {
    return reduce(value, [](auto& given, int lane) {
      uint32_t total = 0;
      for (int l = 0; l < lane; ++l) total += given[l][0];
      return total;
    });
  }
  static uint32_t shuffle(uint32_t value, uint32_t lane) {
    return current->exchange({value, lane}, [](auto& given, auto& taken) {
      for (int l = 0; l < 32; ++l) taken[l] = {given[given[l][1] % 32][0]};
    })[0];
  }

  static uint32_t load(const uint32_t* from) {
    current->check_read(from, 4);
    return *from;
  }
  static uint32_t load_if(bool condition, const uint16_t* from) {
    if (condition) current->check_read(from, 2);
    return condition ? *from : 0;
  }
  static uint32_t take(const uint16_t* from) {
    current->check_shared(from, 2);
    return *from;
  }
  static void put_if(bool condition, uint16_t* to, uint32_t index, uint32_t value) {
    if (!condition) return;
    current->check_shared(to + index, 2);
    to[index] = static_cast<uint16_t>(value);
  }
  static void store(float* to, float first, float second) {
    current->check_write(to, 8);
    if (reinterpret_cast<uintptr_t>(to) % 8 != 0) fail("a store across 8 bytes");
    to[0] = first, to[1] = second;
  }
  static void clear(uint16_t* to) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("a store across 16 bytes");
    std::memset(to, 0, 16);
  }
  static void copy_part(uint16_t* to, const uint16_t* from, uint32_t bytes) {
    if (bytes > 16) fail("a copy of more than 16 bytes");
    request({to, from, bytes, 16});
  }
  static void copy_word(uint32_t* to, const uint32_t* from, bool is_there) {
    request({to, from, is_there ? 4u : 0u, 4});
  }
  static void request(const Copy& copy) {
    if (reinterpret_cast<uintptr_t>(copy.to) % copy.wide != 0 ||
        reinterpret_cast<uintptr_t>(copy.from) % copy.wide != 0) {
      fail("a copy that is not aligned");
    }
    if (copy.bytes != 0) current->check_read(copy.from, copy.bytes);
    current->check_shared(copy.to, copy.wide);
    if (current->draw() % 2 != 0) return copy.arrive();
    // What is on its way may be anything.
    std::memset(copy.to, 0xff, copy.wide);
    current->groups().back().push_back(copy);
  }
  static void commit() { current->groups().push_back({}); }
  static void wait(int pending) {
    auto& groups = current->groups();
    // The last one is still open.
    while (static_cast<int>(groups.size()) - 1 > pending) {
      for (const Copy& copy : groups.front()) copy.arrive();
      groups.erase(groups.begin());
    }
  }

  // Lanes 8 m to 8 m + 7 have the addresses of the rows of matrix m. Without .trans lane l gets of
  // each matrix row l / 4, columns 2 (l % 4) and the next; with it rows and columns change places.
  static void load_matrices(uint32_t (&to)[4], const uint16_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a matrix across 16 bytes");
    const auto address = reinterpret_cast<uint64_t>(from);
    const Words own = {static_cast<uint32_t>(address),
                                       static_cast<uint32_t>(address >> 32)};
    const auto taken = current->exchange(own, [](auto& given, auto& taken) {
      const auto row_of = [&](int lane) {
        return reinterpret_cast<const uint16_t*>(static_cast<uint64_t>(given[lane][1]) << 32 |
                                                 given[lane][0]);
      };
      for (int l = 0; l < 32; ++l) {
        for (int m = 0; m < 4; ++m) {
          const uint32_t low = row_of(8 * m + l % 4 * 2)[l / 4];
          const uint32_t high = row_of(8 * m + l % 4 * 2 + 1)[l / 4];
          taken[l][m] = low | high << 16;
        }
      }
    });
    std::copy(taken.begin(), taken.begin() + 4, to);
  }

  // Fragments of mma.m16n8k16 for 16-bit values, as the manual lists them.
  static void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t low, uint32_t high) {
    Words own = {left[0], left[1], left[2], left[3], low, high};
    std::memcpy(&own[6], &sums, sizeof(sums));
    const auto taken = current->exchange(own, [](auto& given, auto& taken) {
      float a[16][16], b[16][8];
      for (int l = 0; l < 32; ++l) {
        const int group = l / 4, in_group = l % 4;
        for (int i = 0; i < 8; ++i) {
          const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
          const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
          a[row][column] = Format::widen(given[l][i / 2] >> (16 * (i % 2)) & 0xffff);
        }
        for (int i = 0; i < 4; ++i) {
          const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
          b[row][group] = Format::widen(given[l][4 + i / 2] >> (16 * (i % 2)) & 0xffff);
        }
      }
      for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
          const int row = i < 2 ? l / 4 : l / 4 + 8, column = l % 4 * 2 + (i & 1);
          float sum;
          std::memcpy(&sum, &given[l][6 + i], 4);
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          std::memcpy(&taken[l][i], &sum, 4);
        }
      }
    });
    std::memcpy(&sums, taken.data(), sizeof(sums));
  }
};

// ---- Problems -----------------------------------------------------------------------------------

struct Case {
  uint32_t images, height, width, in, out;
  uint32_t window[2];
  int strides[2], lows[2], highs[2];
  double share;  // of values that are kept
  uint32_t splits;
  uint32_t bytes = 227 * 1024;  // of shared memory
};

// 16-bit values at an address that is a multiple of 16, with nothing behind them.
struct Aligned {
  explicit Aligned(size_t count) : memory(new uint64_t[count / 4 + 4]), size(count) {
    begin = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 15) / 16 * 16);
  }
  std::unique_ptr<uint64_t[]> memory;
  uint16_t* begin;
  size_t size;
};

template <typename Pointer>
Range range_of(Pointer begin, size_t count) {
  const char* from = reinterpret_cast<const char*>(begin);
  return {from, from + count * sizeof(*begin)};
}

// Everything is a whole number that is small enough for exact sums in any order.
template <typename Format, int M, int N, bool kGathers, int Producers = 8>
void run(const Case& one, unsigned seed) {
  using Own = Emulated<Format, Producers>;
  std::mt19937 generator(seed);
  Shape shape = {one.height, one.width, one.in, 0, 0, one.out, 0,
                 {one.window[0], one.window[1]}, {one.strides[0], one.strides[1]},
                 {one.lows[0], one.lows[1]}};
  const auto size_of = [&](int axis, uint32_t size) {
    return (static_cast<int>(size) + one.lows[axis] + one.highs[axis] -
            static_cast<int>(one.window[axis])) / one.strides[axis] + 1;
  };
  shape.rows = size_of(0, one.height), shape.columns = size_of(1, one.width);
  shape.pixels = one.images * shape.rows * shape.columns;
  const uint32_t n = one.images * one.height * one.width * one.in;

  // The packed form, by its definition.
  std::vector<float> x(n, 0.f);
  const uint32_t words = (n + 31) / 32, least = Format::narrow(2.f);
  std::vector<uint32_t> bitmap(words, 0), offsets;
  std::vector<uint16_t> values;
  for (uint32_t i = 0; i < n; ++i) {
    if (i % 2048 == 0) offsets.push_back(static_cast<uint32_t>(values.size()));
    if (generator() % 10000 >= one.share * 10000) continue;
    const float value = (generator() % 2 != 0 ? 1.f : -1.f) * static_cast<float>(1 + generator() % 4);
    bitmap[i / 32] |= 1u << i % 32;
    values.push_back(Format::narrow(value));
    if (std::abs(value) >= 2.f) x[i] = value;  // what is smaller is left out
  }
  const uint32_t capacity = static_cast<uint32_t>(std::max<size_t>(values.size(), 1));
  Aligned packed(capacity + 8);
  uint16_t* const first_value = packed.begin + seed % 8;  // of many problems they begin anywhere
  std::copy(values.begin(), values.end(), first_value);
  Aligned dy(static_cast<size_t>(shape.pixels) * one.out);
  std::vector<float> wide(dy.size);
  for (size_t i = 0; i < dy.size; ++i) {
    wide[i] = static_cast<float>(static_cast<int>(generator() % 9) - 4);
    dy.begin[i] = Format::narrow(wide[i]);
  }

  const uint32_t splits = std::min(one.splits, shape.chunks(pixels_of(M, N)));
  const size_t sums = static_cast<size_t>(shape.taps()) * one.in * one.out;
  std::vector<float> partial(splits * sums, std::nanf(""));
  Problem problem = {shape,    first_value, bitmap.data(), offsets.data(), dy.begin, partial.data(),
                     capacity, words,       splits,        0,              0};
  if (!fit<Own, M, N, kGathers>(problem, one.bytes)) {
    fail("more shared memory than devices have");
  }
  const std::vector<Range> readable = {
      range_of(packed.begin, first_value - packed.begin + capacity), range_of(bitmap.data(), bitmap.size()),
      range_of(offsets.data(), offsets.size()), range_of(dy.begin, dy.size)};
  const uint32_t bytes = 
      shared_bytes_of<Own, M, N, kGathers>(shape, problem.stages, problem.room);
  constexpr size_t kZone = 4096;
  for (uint32_t b = 0; b < Part<M, N>::blocks(shape, splits); ++b) {
    std::vector<uint64_t> memory((bytes + 2 * kZone) / 8 + 2, ~uint64_t{0});
    unsigned char* start = reinterpret_cast<unsigned char*>(memory.data());
    start += 15 - (reinterpret_cast<uintptr_t>(start) + 15) % 16;
    Block block(Own::kBlock, b, seed + b, readable, range_of(partial.data(), partial.size()),
                range_of(start + kZone, bytes));
    block.run([&] {
      weight_gradient<Own, M, N, kGathers>(Own{}, problem, least,
                                                        start + kZone);
    });
    for (size_t i = 0; i < kZone; ++i) {
      if (start[i] != 0xff || start[kZone + bytes + i] != 0xff) fail("shared memory out of bounds");
    }
  }

  size_t wrong = 0;
  for (uint32_t tap = 0; tap < shape.taps(); ++tap) {
    std::vector<double> expected(static_cast<size_t>(one.in) * one.out, 0.0);
    for (uint32_t image = 0; image < one.images; ++image) {
      for (uint32_t r = 0; r < shape.rows; ++r) {
        for (uint32_t c = 0; c < shape.columns; ++c) {
          const int row = static_cast<int>(r) * one.strides[0] - one.lows[0] +
                          static_cast<int>(tap / one.window[1]);
          const int column = static_cast<int>(c) * one.strides[1] - one.lows[1] +
                             static_cast<int>(tap % one.window[1]);
          if (row < 0 || column < 0 || row >= static_cast<int>(one.height) ||
              column >= static_cast<int>(one.width)) {
            continue;
          }
          const size_t from = ((image * one.height + row) * one.width + column) * size_t{one.in};
          const size_t q = (image * shape.rows + r) * shape.columns + c;
          for (uint32_t i = 0; i < one.in; ++i) {
            if (x[from + i] == 0.f) continue;
            for (uint32_t o = 0; o < one.out; ++o) {
              expected[i * size_t{one.out} + o] += x[from + i] * wide[q * one.out + o];
            }
          }
        }
      }
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      double found = 0;
      for (uint32_t s = 0; s < splits; ++s) found += partial[s * sums + tap * expected.size() + i];
      wrong += !(found == expected[i]);
    }
  }
  std::printf("%s %ux%ux%ux%u -> %u window %ux%u stride %dx%d tile %dx%d%s splits %u share %g stages %u room %u\n",
              wrong == 0 ? "ok    " : "WRONG ", one.images, one.height, one.width, one.in, one.out,
              one.window[0], one.window[1], one.strides[0], one.strides[1], M, N,
              kGathers ? " gathered" : "", splits, one.share, problem.stages, problem.room);
  if (wrong != 0) fail("not as by naive loops");
}

Case pointwise(uint32_t pixels, uint32_t in, uint32_t out, double share, uint32_t splits,
               uint32_t bytes = 227 * 1024) {
  return {1, 1, pixels, in, out, {1, 1}, {1, 1}, {0, 0}, {0, 0}, share, splits, bytes};
}

}  // namespace

int main() {
  unsigned seed = 0;
  // Sizes around those of tiles, chunks and words; nothing, some and everything kept.
  for (const double share : {0.3, 0.1, 0.0, 1.0}) {
    run<Bfloat16, 64, 64, false, 4>(pointwise(100, 64, 64, share, 2), ++seed);
    run<Bfloat16, 64, 256, false>(pointwise(70, 64, 256, share, 1), ++seed);
    run<Bfloat16, 128, 128, false>(pointwise(97, 128, 128, share, 3), ++seed);
    run<Bfloat16, 128, 256, false>(pointwise(64, 120, 264, share, 1), ++seed);
    run<Bfloat16, 256, 64, false>(pointwise(161, 256, 64, share, 2), ++seed);
    run<Bfloat16, 256, 128, false>(pointwise(161, 512, 72, share, 1), ++seed);
    run<Bfloat16, 128, 128, true>(
        {1, 5, 7, 136, 72, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 1}, ++seed);
    run<Bfloat16, 64, 64, true, 4>(
        {3, 7, 6, 40, 24, {1, 1}, {2, 2}, {0, 0}, {0, 0}, share, 1}, ++seed);
  }
  run<Float16, 64, 64, false, 4>(pointwise(333, 24, 8, 0.2, 5), ++seed);
  run<Float16, 64, 256, false>(pointwise(31, 8, 304, 0.2, 1), ++seed);
  run<Float16, 128, 128, false>(pointwise(65, 504, 136, 0.15, 2), ++seed);
  // What devices have at least, and chunks that are slow or fast to come.
  constexpr uint32_t kLeast = 99 * 1024;
  run<Float16, 64, 64, false, 4>(pointwise(500, 64, 64, 0.1, 1, kLeast / 2), ++seed);
  run<Float16, 64, 256, false>(pointwise(290, 64, 200, 0.1, 1, kLeast), ++seed);
  run<Float16, 128, 128, false>(pointwise(200, 512, 128, 0.1, 1, kLeast), ++seed);
  run<Float16, 128, 256, false, 4>(pointwise(100, 512, 256, 0.1, 1, kLeast), ++seed);
  run<Float16, 256, 64, false, 4>(pointwise(200, 504, 64, 0.1, 1, kLeast), ++seed);
  run<Float16, 256, 64, false>(pointwise(300, 128, 64, 0.1, 1, kLeast), ++seed);
  run<Float16, 256, 128, false>(pointwise(300, 256, 64, 0.1, 1, kLeast), ++seed);
  run<Float16, 256, 128, true, 4>({1, 9, 8, 264, 72, {1, 1}, {1, 1}, {0, 0}, {0, 0}, 0.1, 1}, ++seed);
  run<Float16, 128, 256, true>({1, 9, 8, 512, 72, {1, 1}, {2, 2}, {0, 0}, {0, 0}, 0.1, 1}, ++seed);
  run<Float16, 128, 256, false>(pointwise(33, 200, 256, 0.1, 2), ++seed);
  run<Float16, 256, 64, false>(pointwise(129, 264, 40, 0.1, 1), ++seed);
  run<Float16, 256, 64, false>(pointwise(1, 512, 64, 0.5, 1), ++seed);
  run<Float16, 128, 128, true>(pointwise(37, 2048, 128, 0.1, 1), ++seed);
  run<Float16, 64, 64, true>({2, 6, 5, 64, 72, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 0.2, 2}, ++seed);
  run<Float16, 64, 64, true, 4>({2, 6, 5, 24, 16, {3, 2}, {2, 1}, {0, 1}, {1, 0}, 0.2, 7}, ++seed);
  run<Float16, 128, 128, true>({1, 4, 9, 1032, 8, {1, 1}, {2, 3}, {1, 2}, {0, 1}, 0.1, 1}, ++seed);
  std::printf("everything as by naive loops\n");
  return 0;
}
