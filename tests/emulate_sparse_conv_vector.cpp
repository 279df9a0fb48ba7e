// Runs ops/sparse_conv_vector.cuh on a CPU, thread by thread, and compares it with naive loops.
//
//   g++ -std=c++17 -O2 -I ops tests/emulate_sparse_conv_vector.cpp -o emulate && ./emulate
//
// What the hardware does is done here by the PTX manual's words. Threads are coroutines: they change
// only where they wait for each other, and a warp, drawn at random, goes as far as it can before
// another goes on. So a barrier that is missing shows. It also counts in how many turns the rows that
// are gathered come out of their banks.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "sparse_conv_vector.cuh"

namespace {

using namespace swat::vectors;

void fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// ---- A block of threads -------------------------------------------------------------------------

struct Range {
  const char* begin;
  const char* end;
  bool has(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    return from >= begin && from + bytes <= end;
  }
};

// What a lane gives its warp, and takes.
struct Words {
  uint32_t word[10];
};

class Block;
Block* current = nullptr;

class Block {
 public:
  Block(uint32_t index, unsigned seed, std::vector<Range> readable, std::vector<Range> writable,
        Range shared)
      : index(index), readable(readable), writable(writable), shared(shared), generator_(seed),
        fibers_(kBlock) {}

  void run(const std::function<void()>& body) {
    current = this;
    body_ = &body;
    static std::vector<std::vector<char>> stacks(kBlock, std::vector<char>(64 * 1024));
    for (int t = 0; t < kBlock; ++t) {
      Fiber& fiber = fibers_[t];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[t].data();
      fiber.context.uc_stack.ss_size = stacks[t].size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::start, 0);
    }
    while (true) {
      std::vector<int> ready;
      for (int w = 0; w < kWarpsOfBlock; ++w) {
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
  }

  // Waits for `count` threads that meet at the same place; the last one does `act`.
  struct Meeting {
    int arrived = 0;
    unsigned turn = 0;
  };
  template <typename Act>
  void meet(Meeting& meeting, int count, Act act) {
    if (++meeting.arrived == count) {
      meeting.arrived = 0;
      act();
      ++meeting.turn;
      return;
    }
    Fiber& fiber = fibers_[thread];
    fiber.meeting = &meeting, fiber.turn = meeting.turn;
    swapcontext(&fiber.context, &scheduler_);
    fiber.meeting = nullptr;
  }
  void meet_all() { meet(all_, kBlock, [] {}); }

  template <typename Act>
  const Words& exchange(const Words& own, Act act) {
    Warp& warp = warps_[thread / 32];
    const unsigned turn = warp.meeting.turn;
    warp.given[thread % 32] = own;
    meet(warp.meeting, 32, [&] { act(warp.given, warp.taken[turn % 2]); });
    return warp.taken[turn % 2][thread % 32];
  }

  static void check(const std::vector<Range>& ranges, const void* at, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("an access across its size");
    for (const Range& range : ranges) {
      if (range.has(at, bytes)) return;
    }
    fail(what);
  }
  void check_read(const void* at, size_t bytes) const {
    check(readable, at, bytes, "a read out of bounds");
  }
  void check_write(const void* at, size_t bytes) const {
    check(writable, at, bytes, "a write out of bounds");
  }
  unsigned char* at(uint32_t address, size_t bytes) const {
    if (address % bytes != 0) fail("an access to shared memory across its size");
    char* const to = const_cast<char*>(shared.begin) + address;
    if (!shared.has(to, bytes)) fail("shared memory out of bounds");
    return reinterpret_cast<unsigned char*>(to);
  }

  const uint32_t index;
  const std::vector<Range> readable, writable;
  const Range shared;
  uint32_t thread = 0;

 private:
  struct Fiber {
    ucontext_t context;
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
  Warp warps_[kWarpsOfBlock];
  Meeting all_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
};

// Eight rows that are read at once, and in how many turns they come.
uint64_t row_groups = 0, row_turns = 0;

// ---- Numbers ------------------------------------------------------------------------------------

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct Bfloat16 {
  static constexpr int kBits = 8;
  static float widen(uint32_t bits) { return as_float(bits << 16); }
  static uint16_t narrow(float value) {  // of no NaN
    const uint32_t wide = as_bits(value);
    return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
};

struct Float16 {
  static constexpr int kBits = 11;
  static float widen(uint32_t bits) {  // of finite numbers that are not too small
    if ((bits & 0x7fff) == 0) return 0.f;
    if ((bits >> 10 & 31) == 31) return std::nanf("");
    return as_float((bits & 0x8000) << 16 | (((bits & 0x7fff) << 13) + (112u << 23)));
  }
  static uint16_t narrow(float value) {
    if (value == 0.f) return 0;
    const uint32_t wide = as_bits(value), low = (wide & 0x7fffffff) - (112u << 23);
    return static_cast<uint16_t>(wide >> 16 & 0x8000) |
           static_cast<uint16_t>((low + 0xfff + (low >> 13 & 1)) >> 13);
  }
};

// ---- What the hardware does ---------------------------------------------------------------------

template <typename Format>
struct Emulated {
  static uint32_t thread() { return current->thread; }
  static uint32_t warp() { return current->thread / 32; }
  static uint32_t block() { return current->index; }
  static void sync() { current->meet_all(); }
  static uint32_t address(const unsigned char* at) {
    return static_cast<uint32_t>(reinterpret_cast<const char*>(at) - current->shared.begin);
  }

  static uint32_t scan(uint32_t value) {
    return current->exchange({{value}}, [](auto& given, auto& taken) {
      uint32_t total = 0;
      for (int l = 0; l < 32; ++l) taken[l].word[0] = total, total += given[l].word[0];
    }).word[0];
  }
  static uint32_t shuffle(uint32_t value, uint32_t lane) {
    return current->exchange({{value, lane}}, [](auto& given, auto& taken) {
      for (int l = 0; l < 32; ++l) taken[l].word[0] = given[given[l].word[1] % 32].word[0];
    }).word[0];
  }
  static uint32_t match(uint32_t value) {
    return current->exchange({{value}}, [](auto& given, auto& taken) {
      for (int l = 0; l < 32; ++l) {
        taken[l].word[0] = 0;
        for (int m = 0; m < 32; ++m) {
          taken[l].word[0] |= static_cast<uint32_t>(given[l].word[0] == given[m].word[0]) << m;
        }
      }
    }).word[0];
  }

  template <typename Value>
  static void write(Value* to, Value value) {
    current->check_write(to, sizeof(Value));
    *to = value;
  }
  static uint32_t load(const uint32_t* from) {
    current->check_read(from, 4);
    return *from;
  }
  static Row load_row(const uint16_t* from, bool is_there) {
    Row row = {};
    if (is_there) current->check_read(from, 16), std::memcpy(&row, from, 16);
    return row;
  }
  template <int kWords>
  static void load_words(uint32_t (&to)[kWords], const uint32_t* from, uint32_t lane) {
    constexpr int kEach = kWords < 4 ? kWords : 4;
    for (int part = 0; part < kWords / kEach; ++part) {
      const uint32_t* const own = from + part * 32 * kEach + lane * kEach;
      current->check_read(own, 4 * kEach);
      std::copy(own, own + kEach, to + part * kEach);
    }
  }
  static uint32_t transpose(uint32_t word) {
    return current->exchange({{word}}, [](auto& given, auto& taken) {
      const auto value = [&](int row, int column) {
        return given[row * 4 + column / 2].word[0] >> (16 * (column % 2)) & 0xffff;
      };
      for (int l = 0; l < 32; ++l) {
        taken[l].word[0] = value(l % 4 * 2, l / 4) | value(l % 4 * 2 + 1, l / 4) << 16;
      }
    }).word[0];
  }
  static void store_word(uint32_t to, uint32_t word) { std::memcpy(current->at(to, 4), &word, 4); }

  // Lanes 8 m to 8 m + 7 have the addresses of the rows of matrix m. Without .trans lane l gets of
  // each matrix row l / 4, columns 2 (l % 4) and the next; with it rows and columns change places.
  static void load_matrices(uint32_t (&to)[4], uint32_t from) {
    current->at(from, 16);
    const Words& taken = current->exchange({{from}}, [](auto& given, auto& taken) {
      const auto value = [&](int lane, int column) {
        uint16_t found;
        std::memcpy(&found, current->at(given[lane].word[0], 16) + 2 * column, 2);
        return static_cast<uint32_t>(found);
      };
      for (int l = 0; l < 32; ++l) {
        for (int m = 0; m < 4; ++m) {
          const int low = 8 * m + l % 4 * 2;
          taken[l].word[m] = value(low, l / 4) | value(low + 1, l / 4) << 16;
        }
      }
      for (int m = 0; m < 4; ++m) {
        std::vector<uint32_t> rows[kBanks];
        size_t most = 0;
        for (int l = 8 * m; l < 8 * m + 8; ++l) {
          auto& bank = rows[given[l].word[0] / kRow % kBanks];
          if (std::find(bank.begin(), bank.end(), given[l].word[0]) == bank.end()) {
            bank.push_back(given[l].word[0]);
          }
          most = std::max(most, bank.size());
        }
        row_groups += 1, row_turns += most;
      }
    });
    std::copy(taken.word, taken.word + 4, to);
  }

  // Fragments of mma.m16n8k16 for 16-bit values, as the manual lists them.
  static void multiply(float (&sums)[4], const uint32_t (&left)[4], uint32_t low, uint32_t high) {
    const Words own = {{left[0], left[1], left[2], left[3], low, high, as_bits(sums[0]),
                        as_bits(sums[1]), as_bits(sums[2]), as_bits(sums[3])}};
    const Words& taken = current->exchange(own, [](auto& given, auto& taken) {
      float a[16][16], b[16][8];
      for (int l = 0; l < 32; ++l) {
        const int group = l / 4, in_group = l % 4;
        for (int i = 0; i < 8; ++i) {
          const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
          const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
          a[row][column] = Format::widen(given[l].word[i / 2] >> (16 * (i % 2)) & 0xffff);
        }
        for (int i = 0; i < 4; ++i) {
          const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
          b[row][group] = Format::widen(given[l].word[4 + i / 2] >> (16 * (i % 2)) & 0xffff);
        }
      }
      for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
          const int row = i < 2 ? l / 4 : l / 4 + 8, column = l % 4 * 2 + (i & 1);
          float sum = as_float(given[l].word[6 + i]);
          for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
          taken[l].word[i] = as_bits(sum);
        }
      }
    });
    for (int i = 0; i < 4; ++i) sums[i] = as_float(taken.word[i]);
  }
  static uint32_t narrow(float first, float second) {
    return Format::narrow(first) | static_cast<uint32_t>(Format::narrow(second)) << 16;
  }
  template <int kWords>
  static void store_words(uint16_t* to, const uint32_t (&words)[kWords]) {
    current->check_write(to, sizeof(words));
    std::memcpy(to, words, sizeof(words));
  }
};

// ---- Problems -----------------------------------------------------------------------------------

struct Case {
  uint32_t images, size[2], in, out, window[2], strides[2], lows[2], highs[2];
  double share;  // of positions that are kept
  uint32_t height, chunk, blocks;
};

// Values at an address that is a multiple of 16, with nothing around them.
template <typename Value>
struct Aligned {
  explicit Aligned(size_t count) : memory(count * sizeof(Value) + 32, '\xff'), size(count) {
    begin = reinterpret_cast<Value*>(
        (reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  }
  Range range() const {
    const char* from = reinterpret_cast<const char*>(begin);
    return {from, from + size * sizeof(Value)};
  }
  std::vector<char> memory;
  Value* begin;
  size_t size;
};

// Everything is a whole number that is small enough for exact sums in any order.
template <typename Format, typename T>
double run(const Case& one, unsigned seed) {
  std::mt19937 generator(seed);
  uint32_t result[2];
  for (int axis = 0; axis < 2; ++axis) {
    result[axis] =
        (one.size[axis] + one.lows[axis] + one.highs[axis] - one.window[axis]) / one.strides[axis] + 1;
  }
  const Shape shape = {one.images, one.size[0], one.size[1], one.in, result[0], result[1], one.out,
                       {one.window[0], one.window[1]}, {one.strides[0], one.strides[1]},
                       {one.lows[0], one.lows[1]}};
  Problem problem = {Plan(shape, T::V, T::kLines, one.height, T::kWide, T::kOut, one.chunk),
                     nullptr, {}, nullptr, 0, 0};
  const Plan& plan = problem.plan;
  Aligned<uint16_t> x(size_t{one.images} * one.size[0] * one.size[1] * one.in);
  Aligned<uint16_t> kernel(size_t{shape.taps()} * one.in * one.out);
  Aligned<uint16_t> y(size_t{one.images} * result[0] * result[1] * one.out);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(generator() % 9) - 4); };
  for (size_t i = 0; i < x.size; ++i) x.begin[i] = Format::narrow(draw());
  for (size_t i = 0; i < kernel.size; i += T::V) {
    const bool is_kept = generator() % 10000 < one.share * 10000;
    for (int v = 0; v < T::V; ++v) {
      // Of what is kept single values are zero too; of what is not some zeros are negative.
      kernel.begin[i + v] = is_kept ? Format::narrow(draw()) : generator() % 2 != 0 ? 0x8000 : 0;
    }
  }
  const uint32_t segments = plan.groups * plan.chunks;
  Aligned<uint32_t> offsets(size_t{segments} * plan.room), steps(segments);
  Aligned<uint32_t> values(size_t{segments} * plan.room * T::V / 2);
  problem.x = x.begin, problem.y = y.begin;
  problem.lists = {offsets.begin, values.begin, steps.begin};
  problem.works = plan.works(), problem.blocks = std::min(one.blocks, problem.works);

  const auto in_block = [&](uint32_t index, uint32_t bytes, std::vector<Range> readable,
                            std::vector<Range> writable, auto body) {
    Aligned<unsigned char> memory(bytes);
    Block block(index, seed + index, readable, writable, memory.range());
    block.run([&] { body(memory.begin); });
    // Nobody writes behind what was asked for.
    const char* const end = memory.range().end;
    for (const char* at = end; at < memory.memory.data() + memory.memory.size(); ++at) {
      if (*at != '\xff') fail("shared memory out of bounds");
    }
  };
  for (uint32_t segment = 0; segment < segments; ++segment) {
    in_block(segment, arrange_bytes(plan), {kernel.range()},
             {offsets.range(), values.range(), steps.range()}, [&](unsigned char* shared) {
               arrange<Emulated<Format>, T::V>(Emulated<Format>{}, plan, problem.lists, kernel.begin,
                                               shared);
             });
  }
  if (plan.shared_bytes() > 227 * 1024) fail("more shared memory than devices have");
  row_groups = row_turns = 0;
  for (uint32_t block = 0; block < problem.blocks; ++block) {
    in_block(block, plan.shared_bytes(),
             {x.range(), offsets.range(), values.range(), steps.range()}, {y.range()},
             [&](unsigned char* shared) {
               forward<Emulated<Format>, T>(Emulated<Format>{}, problem, shared);
             });
  }

  size_t wrong = 0;
  std::vector<double> sums(one.out);
  for (size_t pixel = 0; pixel < y.size / one.out; ++pixel) {
    const size_t column = pixel % result[1], row = pixel / result[1] % result[0];
    const size_t image = pixel / result[1] / result[0];
    std::fill(sums.begin(), sums.end(), 0.0);
    for (uint32_t tap = 0; tap < shape.taps(); ++tap) {
      const size_t in_row = row * one.strides[0] + tap / one.window[1] - one.lows[0];
      const size_t in_column = column * one.strides[1] + tap % one.window[1] - one.lows[1];
      if (in_row >= one.size[0] || in_column >= one.size[1]) continue;
      for (uint32_t i = 0; i < one.in; ++i) {
        const double factor = Format::widen(
            x.begin[((image * one.size[0] + in_row) * one.size[1] + in_column) * one.in + i]);
        const uint16_t* const weights = kernel.begin + (size_t{tap} * one.in + i) * one.out;
        for (uint32_t o = 0; o < one.out; ++o) sums[o] += factor * Format::widen(weights[o]);
      }
    }
    for (uint32_t o = 0; o < one.out; ++o) {
      const float found = Format::widen(y.begin[pixel * one.out + o]);
      wrong += !(found == Format::widen(Format::narrow(static_cast<float>(sums[o]))));
    }
  }
  const double turns = row_groups == 0 ? 1.0 : static_cast<double>(row_turns) / row_groups;
  std::printf("%s %ux%ux%ux%u -> %u window %ux%u stride %ux%u vector %d tile %dx%dx%d/%u chunk %u share "
              "%g: turns %.2f\n",
              wrong == 0 ? "ok    " : "WRONG ", one.images, one.size[0], one.size[1], one.in, one.out,
              one.window[0], one.window[1], one.strides[0], one.strides[1], T::V, T::kLines, T::kWide,
              T::kOut, one.height, one.chunk, one.share, turns);
  if (wrong != 0) fail("not as by naive loops");
  return turns;
}

}  // namespace

int main() {
  unsigned seed = 0;
  const auto square = [](uint32_t images, uint32_t size, uint32_t in, uint32_t out, double share,
                         uint32_t chunk) {
    return Case{images, {size, size}, in, out, {3, 3}, {1, 1}, {1, 1}, {1, 1}, share, 4, chunk, 2};
  };
  // Rows of a list at 80 % zeros: in banks that differ as far as can be.
  if (run<Bfloat16, Tile<16, 4, 8, 128>>(square(8, 8, 128, 128, 0.2, 64), ++seed) > 1.4) {
    fail("rows lie in the same banks");
  }
  // Tiles, vectors, sizes around theirs; nothing, some and everything kept.
  for (const double share : {0.0, 0.25, 1.0}) {
    run<Bfloat16, Tile<16, 4, 8, 128>>(square(5, 5, 40, 48, share, 32), ++seed);
    run<Bfloat16, Tile<32, 4, 8, 128>>(square(9, 9, 24, 160, share, 32), ++seed);
  }
#ifndef SWAT_JAX_FEW_CASES  // the others do not find more faults
  run<Float16, Tile<8, 4, 8, 128>>(square(3, 7, 72, 136, 0.2, 64), ++seed);
  run<Float16, Tile<16, 8, 4, 128>>(
      {17, {4, 4}, 40, 64, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.2, 4, 32, 1}, ++seed);
  run<Float16, Tile<32, 8, 4, 128>>(
      {9, {9, 6}, 32, 32, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.2, 8, 32, 3}, ++seed);
  run<Bfloat16, Tile<16, 8, 8, 64>>(
      {4, {11, 9}, 40, 80, {3, 3}, {1, 1}, {0, 2}, {2, 0}, 0.2, 8, 32, 2}, ++seed);
  run<Bfloat16, Tile<32, 8, 8, 64>>(
      {8, {8, 8}, 64, 64, {1, 1}, {1, 1}, {0, 0}, {0, 0}, 0.2, 8, 64, 1}, ++seed);
  run<Float16, Tile<16, 4, 8, 64>>(
      {3, {9, 11}, 16, 32, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 0.3, 4, 32, 2}, ++seed);
  run<Bfloat16, Tile<32, 4, 8, 64>>(
      {11, {6, 18}, 72, 64, {1, 1}, {2, 2}, {0, 0}, {0, 0}, 0.2, 4, 128, 1}, ++seed);
  run<Bfloat16, Tile<8, 4, 8, 64>>(
      {2, {8, 7}, 24, 72, {2, 3}, {3, 2}, {1, 0}, {0, 1}, 0.3, 2, 32, 2}, ++seed);
  run<Float16, Tile<8, 8, 4, 128>>(
      {2, {7, 9}, 8, 16, {5, 4}, {1, 2}, {2, 3}, {2, 0}, 0.3, 4, 32, 2}, ++seed);
  run<Bfloat16, Tile<8, 8, 8, 64>>(
      {1, {1, 1}, 8, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 0.5, 4, 32, 1}, ++seed);
#endif
  std::printf("everything as by naive loops\n");
  return 0;
}
