// Runs ops/sparse_conv_hopper.cuh on a CPU, thread by thread, and compares it with naive loops.
//
//   g++ -std=c++17 -O2 -I ops tests/emulate_sparse_conv_hopper.cpp -o emulate && ./emulate
//
// What the hardware does is done here by the PTX manual's words: products as late as they may be, when
// they are waited for, and what the copy engine brings at any time, piece by piece. Threads are coroutines
// that change where they wait, warps in an order that is drawn. Shared memory is full of NaN at first. So
// what is not waited for shows, and so do a wait that never ends and stores that no fence follows. That
// barriers are fenced before their first use, and registers before the first product, does not.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <utility>
#include <vector>

#define SWAT_EMULATE
#define __device__
#define __forceinline__ inline

struct CUtensorMap {};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index {
  uint32_t x;
};

namespace {

using Action = std::function<void()>;
using Groups = std::deque<std::vector<Action>>;  // the last one is open

Index threadIdx, blockIdx;
std::mt19937 dice(1);
std::vector<unsigned char> shared_memory(232448 + 1024);

[[noreturn]] void fail(const char* what) {
  std::printf("FAILED: %s (thread %u)\n", what, threadIdx.x);
  std::exit(1);
}

// Grows whenever somebody need not wait any longer.
uint64_t progress = 0;

// ---- Threads, and where they meet ---------------------------------------------------------------

struct Fiber {
  ucontext_t context;
  bool is_over = false;
  bool has_stored = false;  // since its last fence
  Groups products{1};
};
std::vector<Fiber> fibers;
alignas(64) char stacks[1024][65536];  // of one block after the other
ucontext_t scheduler;

void yield() { swapcontext(&fibers[threadIdx.x].context, &scheduler); }

struct Meeting {
  uint32_t need = 32, arrived = 0, generation = 0;
  uint64_t values[2][32] = {};
};
std::vector<Meeting> warps;
Meeting block;

// Waits for all of them; which of `values` holds what they brought.
uint32_t meet(Meeting& meeting, uint64_t value) {
  const uint32_t generation = meeting.generation;
  meeting.values[generation & 1][threadIdx.x % 32] = value;
  if (++meeting.arrived == meeting.need) {
    meeting.arrived = 0, ++meeting.generation, ++progress;
  } else {
    while (meeting.generation == generation) yield();
  }
  return generation & 1;
}
Meeting& own_warp() { return warps[threadIdx.x / 32]; }

// ---- What CUDA has ------------------------------------------------------------------------------

using std::max;
using std::min;

uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t lane) {
  Meeting& warp = own_warp();
  return static_cast<uint32_t>(warp.values[meet(warp, value)][lane % 32]);
}
uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  Meeting& warp = own_warp();
  const uint64_t* const values = warp.values[meet(warp, value)];
  return static_cast<uint32_t>(*std::max_element(values, values + 32));
}
void __syncwarp() { meet(own_warp(), 0); }
void __syncthreads() { meet(block, 0); }
uint32_t __popc(uint32_t value) { return static_cast<uint32_t>(__builtin_popcount(value)); }

// Global memory that may be read, and dY.
struct {
  const uint16_t* values;
  const uint32_t* bitmap;
  const uint32_t* offsets;
  uint64_t capacity, words, tiles;
  const uint16_t* dy;
  uint32_t pixels, channels, box;
} memory;

uint32_t __ldg(const uint32_t* from) {
  const bool is_offset = from >= memory.offsets && from < memory.offsets + memory.tiles;
  const bool is_word = from >= memory.bitmap && from < memory.bitmap + memory.words;
  if (!is_offset && !is_word) fail("offsets or words out of bounds");
  return *from;
}

float widen(uint16_t value) {
  const uint32_t word = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &word, 4);
  return wide;
}
uint16_t narrow(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return static_cast<uint16_t>(word >> 16);
}

}  // namespace

// ---- What the hardware does ---------------------------------------------------------------------

namespace swat {
namespace hopper {
namespace {

unsigned char* at(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0 || address + bytes > shared_memory.size()) fail("address in shared memory");
  return &shared_memory[address];
}

struct Barrier {
  int64_t need = 0, pending = 0, bytes = 0;
  uint32_t phases = 0;
  void settle() {
    if (pending < 0) fail("more arrivals than a phase has");
    if (pending == 0 && bytes == 0) pending = need, ++phases, ++progress;
  }
};
std::map<uint32_t, Barrier> barriers;
Barrier& barrier(uint32_t address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("no barrier there");
  return found->second;
}
void barrier_init(uint32_t address, uint32_t count) { barriers[address] = Barrier{count, count, 0, 0}; }
void fence_barriers() {}
void barrier_arrive(uint32_t address) {
  const auto first = fibers.begin() + threadIdx.x / 32 * 32;
  const auto has_stored = [](const Fiber& one) { return one.has_stored; };
  if (std::any_of(first, first + 32, has_stored)) fail("products may not see what was stored");
  Barrier& one = barrier(address);
  --one.pending, one.settle();
}
void barrier_expect(uint32_t address, uint32_t bytes) {
  Barrier& one = barrier(address);
  one.bytes += bytes, --one.pending, one.settle();
}
void barrier_wait(uint32_t address, uint32_t parity) {
  while (((barrier(address).phases - 1) & 1) != parity) yield();
}

template <uint32_t, bool>
void set_registers() {}

// What the copy engine brings, in pieces that arrive in any order.
std::vector<Action> pieces;
void arrive(uint32_t address, uint32_t bytes) {
  Barrier& one = barrier(address);
  one.bytes -= bytes, one.settle();
}
void copy_parts(uint32_t to, const void* from, uint32_t bytes, uint32_t address) {
  const auto* const first = static_cast<const char*>(from);
  const auto holds = [&](const auto* begin, uint64_t count) {
    // The first part may begin early: what 16 bytes hold is there as a whole.
    return first + 16 > reinterpret_cast<const char*>(begin) &&
           first + bytes <= reinterpret_cast<const char*>(begin + count);
  };
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes == 0 || bytes % 16 != 0) fail("no whole parts");
  if (!holds(memory.values, memory.capacity) && !holds(memory.bitmap, memory.words)) {
    fail("a copy out of bounds");
  }
  const uint32_t half = dice() % (bytes / 16) * 16;
  for (const auto& [begin, end] : {std::pair(0u, half), std::pair(half, bytes)}) {
    if (begin == end) continue;
    pieces.push_back([=, begin = begin, end = end] {
      for (uint32_t b = begin; b < end; b += 16) std::memcpy(at(to + b, 16), first + b, 16);
      arrive(address, end - begin);
    });
  }
}

void store_word(uint32_t to, uint32_t word) { std::memcpy(at(to, 4), &word, 4); }
uint32_t load_word(uint32_t from) {
  uint32_t word;
  std::memcpy(&word, at(from, 4), 4);
  return word;
}
struct Four {
  uint32_t low, high;
};
template <int kOffset>
Four load_four(uint32_t from) {
  Four four;
  std::memcpy(&four, at(from + kOffset, 8), 8);
  return four;
}
uint32_t move_down(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits % 32);
}
uint32_t load_value_if(bool condition, const uint16_t* from) {
  if (!condition) return 0;
  if (from < memory.values || from >= memory.values + memory.capacity) fail("a value out of bounds");
  return *from;
}
void clear_part(uint32_t to) {
  std::memset(at(to, 16), 0, 16);
  fibers[threadIdx.x].has_stored = true;
}
void put_value(uint32_t to, uint32_t bits, uint32_t value, uint32_t least) {
  if (bits == 0 || (value & 0x7fff) < least) return;
  const uint16_t narrow = static_cast<uint16_t>(value);
  std::memcpy(at(to, 2), &narrow, 2);
  fibers[threadIdx.x].has_stored = true;
}
uint32_t highest_bit(uint32_t word) {
  return word == 0 ? ~0u : 31 - static_cast<uint32_t>(__builtin_clz(word));
}
uint32_t scan_lanes(uint32_t value) {
  Meeting& warp = own_warp();
  const uint64_t* const values = warp.values[meet(warp, value)];
  uint32_t sum = 0;
  for (uint32_t lane = 0; lane < threadIdx.x % 32; ++lane) sum += static_cast<uint32_t>(values[lane]);
  return sum;
}
void fence_stores() { fibers[threadIdx.x].has_stored = false; }

// Where a byte lies in the pattern of 128 bytes.
uint32_t exchanged(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void copy_box(uint32_t to, const CUtensorMap*, uint32_t channel, uint32_t pixel, uint32_t address) {
  pieces.push_back([=] {
    for (uint32_t p = 0; p < memory.box; ++p) {
      for (uint32_t c = 0; c < 64; ++c) {
        const bool is_there = pixel + p < memory.pixels && channel + c < memory.channels;
        const uint16_t value =
            is_there ? memory.dy[static_cast<uint64_t>(pixel + p) * memory.channels + channel + c] : 0;
        std::memcpy(at(exchanged(to + p * 128 + c * 2), 2), &value, 2);
      }
    }
    arrive(address, memory.box * 128);
  });
}

void wgmma_fence() {}
void wgmma_commit() { fibers[threadIdx.x].products.emplace_back(); }
template <int kPending>
void wgmma_wait() {
  meet(own_warp(), 0);
  Groups& groups = fibers[threadIdx.x].products;
  for (; groups.size() - 1 > kPending; groups.pop_front()) {
    for (const Action& action : groups.front()) action();
  }
}
// Lane l gets values l % 4 * 2 and the next of column l / 4 of four matrices, whose rows of eight lanes
// say where they are: "transposed".
void load_matrices(uint32_t (&to)[4], uint32_t from) {
  Meeting& warp = own_warp();
  const uint64_t* const rows = warp.values[meet(warp, from)];
  const uint32_t lane = threadIdx.x % 32;
  uint16_t values[8];
  for (uint32_t v = 0; v < 8; ++v) {
    const uint64_t row = rows[v / 2 * 8 + lane % 4 * 2 + v % 2];
    std::memcpy(&values[v], at(static_cast<uint32_t>(row), 16) + lane / 4 * 2, 2);
  }
  std::memcpy(to, values, 16);
}
float operand(uint64_t descriptor, uint32_t channel, uint32_t pixel) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("a pattern of other than 128 bytes");
  const uint32_t address = start + channel % 64 * 2 + channel / 64 * leading + pixel % 8 * 128 +
                           pixel / 8 * stride;
  uint16_t value;
  std::memcpy(&value, at(exchanged(address), 2), 2);
  return widen(value);
}
template <uint32_t N>
struct Wgmma {
  template <typename T>
  static void multiply(float (&sums)[N / 2], uint64_t a, uint64_t b) {
    later(sums, b, [=](uint32_t row, uint32_t k) { return operand(a, row, k); });
  }
  // A warp has 16 rows, of which a lane has two values of two rows, and of two more columns. They are
  // read when the products are made, too.
  template <typename T>
  static void multiply(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b) {
    Meeting& warp = own_warp();
    const uint64_t* const met = warp.values[meet(warp, reinterpret_cast<uintptr_t>(&a[0]))];
    std::array<const uint32_t*, 32> all;
    for (uint32_t lane = 0; lane < 32; ++lane) all[lane] = reinterpret_cast<const uint32_t*>(met[lane]);
    later(sums, b, [=](uint32_t row, uint32_t k) {
      const uint32_t two = all[row % 8 * 4 + k % 8 / 2][row % 16 / 8 + k / 8 * 2];
      return widen(static_cast<uint16_t>(two >> k % 2 * 16));
    });
  }

 private:
  template <typename Left>
  static void later(float (&sums)[N / 2], uint64_t b, const Left& left) {
    float* const to = sums;
    const uint32_t thread = threadIdx.x % 128;
    fibers[threadIdx.x].products.back().push_back([=] {
      for (uint32_t n = 0; n < N / 8; ++n) {
        for (uint32_t r = 0; r < 4; ++r) {
          const uint32_t row = thread / 32 * 16 + thread % 32 / 4 + r / 2 * 8;
          const uint32_t column = n * 8 + thread % 4 * 2 + r % 2;
          for (uint32_t k = 0; k < 16; ++k) to[4 * n + r] += left(row, k) * operand(b, column, k);
        }
      }
    });
  }
};

}  // namespace
}  // namespace hopper
}  // namespace swat

#include "sparse_conv_hopper.cuh"

namespace {

using namespace swat::hopper;

// ---- A block ------------------------------------------------------------------------------------

Action body;
void enter() {
  body();
  fibers[threadIdx.x].is_over = true, ++progress;
  yield();
}

void run_block(uint32_t index, uint32_t threads) {
  for (unsigned char& byte : shared_memory) byte = dice() % 2 ? 0xff : 0x7f;  // NaN, or large
  barriers.clear(), pieces.clear();
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Meeting>(threads / 32);
  block = Meeting(), block.need = threads;
  blockIdx.x = index;
  for (uint32_t thread = 0; thread < threads; ++thread) {
    Fiber& fiber = fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[thread];
    fiber.context.uc_stack.ss_size = sizeof stacks[thread];
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<uint32_t> order(threads / 32);
  for (uint32_t w = 0; w < order.size(); ++w) order[w] = w;
  const uint32_t mood = dice() % 3;       // some warps are slow
  const uint32_t haste = 1 + dice() % 3;  // so is the copy engine
  uint64_t before = progress;
  for (uint32_t still = 0;; still = progress == before ? still + 1 : 0, before = progress) {
    if (still > 2000) fail("everybody waits");
    std::shuffle(order.begin(), order.end(), dice);
    bool any = false;
    for (const uint32_t w : order) {
      const auto first = fibers.begin() + w * 32;
      const bool goes_on = std::any_of(first, first + 32, [](const Fiber& one) { return !one.is_over; });
      any = any || goes_on;
      const bool is_slow = (mood == 1 && w % 3 == 0) || (mood == 2 && w < 8);
      if (!goes_on || (is_slow && dice() % 8 != 0)) continue;
      for (threadIdx.x = w * 32; threadIdx.x < (w + 1) * 32; ++threadIdx.x) {
        Fiber& fiber = fibers[threadIdx.x];
        const uint32_t thread = threadIdx.x;
        if (!fiber.is_over) swapcontext(&scheduler, &fiber.context);
        threadIdx.x = thread;
      }
    }
    while (!pieces.empty() && dice() % 4 < haste) {
      const size_t which = dice() % pieces.size();
      pieces[which]();
      pieces.erase(pieces.begin() + static_cast<std::ptrdiff_t>(which));
    }
    if (!any) break;
  }
  if (!pieces.empty()) fail("a copy that nobody waited for");
}

// ---- A problem ----------------------------------------------------------------------------------

struct Given {
  uint32_t pixels, in, out;
  double share;           // of x that is kept
  uint32_t splits = 1;
  uint32_t least = 1;     // smaller magnitudes are left out
  uint32_t shift = 0;     // values begin so many after a multiple of 16 bytes
  double present = 1;     // the share of them that there is room for
  uint32_t word = 0;      // so do words
};

template <typename C>
void check(const Given& of, uint32_t x_stages, uint32_t dy_stages) {
  const uint64_t n = static_cast<uint64_t>(of.pixels) * of.in;
  // Whole numbers from 1 to 4, of either sign: sums are exact.
  const uint32_t words = static_cast<uint32_t>((n + 31) / 32);
  std::vector<uint16_t> x(n, 0), dy(static_cast<uint64_t>(of.pixels) * of.out), kept;
  std::vector<uint32_t> space(words + 7, 0), offsets;
  uint32_t* bitmap = space.data();
  while (reinterpret_cast<uintptr_t>(bitmap) % 16 != 0) ++bitmap;
  bitmap += of.word;
  for (uint64_t i = 0; i < n; ++i) {
    if (i % kTileValues == 0) offsets.push_back(static_cast<uint32_t>(kept.size()));
    // One unit is kept as a whole: it does not fit into a slot.
    if (i / kTileValues != 3 && dice() % 1000 >= of.share * 1000) continue;
    x[i] = narrow((1.f + dice() % 4) * (dice() % 2 ? 1.f : -1.f));
    kept.push_back(x[i]);
    bitmap[i / 32] |= 1u << i % 32;
  }
  const uint32_t capacity = std::max(1u, static_cast<uint32_t>(kept.size() * of.present));
  uint64_t rank = 0;
  for (uint64_t i = 0; i < n; ++i) {
    if ((bitmap[i / 32] >> i % 32 & 1) == 0) continue;
    if (rank++ >= capacity || (x[i] & 0x7fffu) < of.least) x[i] = 0;
  }
  std::vector<uint16_t> place(capacity + 64, 0x4111);
  uint16_t* values = place.data();
  while (reinterpret_cast<uintptr_t>(values) % 16 != 0) ++values;
  values += of.shift;
  std::copy_n(kept.begin(), std::min<size_t>(capacity, kept.size()), values);
  for (uint16_t& value : dy) value = narrow(static_cast<float>(dice() % 9) - 4.f);

  Problem problem = {};
  const uint32_t sums = of.in * of.out;
  std::vector<float> partial(static_cast<uint64_t>(of.splits) * sums, NAN);
  problem.values = values, problem.bitmap = bitmap, problem.offsets = offsets.data();
  problem.partial = partial.data(), problem.pixels = of.pixels, problem.in = of.in, problem.out = of.out;
  problem.capacity = capacity, problem.words = words;
  problem.splits = of.splits, problem.x_stages = x_stages, problem.dy_stages = dy_stages;
  if (!takes<C>(of.in, of.out)) fail("these channels are not taken");
  // Little room, so that the unit that is kept as a whole does not fit.
  if (!fit<C>(problem, Shared<C>(x_stages, dy_stages, C::kLeastRoom).bytes)) fail("no room");
  if (problem.room != C::kLeastRoom || problem.x_stages != x_stages) fail("another cut than was asked for");
  memory = {values, bitmap, offsets.data(), capacity, words, offsets.size(), dy.data(), of.pixels, of.out,
            C::P};
  body = [&] { make_part<C>(problem, nullptr, of.least, 1024); };
  for (uint32_t b = 0; b < Part<C>::blocks_of(problem) * of.splits; ++b) run_block(b, C::kThreads);

  for (uint32_t i = 0; i < of.in; ++i) {
    for (uint32_t o = 0; o < of.out; ++o) {
      double expected = 0, found = 0;
      for (uint32_t p = 0; p < of.pixels; ++p) {
        expected += widen(x[static_cast<uint64_t>(p) * of.in + i]) *
                    widen(dy[static_cast<uint64_t>(p) * of.out + o]);
      }
      for (uint32_t s = 0; s < of.splits; ++s) {
        found += partial[static_cast<uint64_t>(s) * sums + i * of.out + o];
      }
      if (!(found == expected)) {
        std::printf("FAILED: (%u, %u) of %u -> %u is %g, not %g\n", i, o, of.in, of.out, found, expected);
        std::exit(1);
      }
    }
  }
  std::printf("%u x %u, chunks of %u, passes %u: %u pixels, %u -> %u, %.0f %%\n", C::X, C::Y, C::P,
              C::kPasses, of.pixels, of.in, of.out, 100 * of.share);
  std::fflush(stdout);
}

struct T {};

}  // namespace

int main() {
  const uint32_t two = narrow(2.f);
  // As in launch_tile of sparse_conv_hopper.cu, but for the number of tiles in shared memory.
  check<Cut<T, 64, 64, true, 64, 3>>({1003, 64, 64, 0.1, 1, 1, 3}, 2, 2);
  check<Cut<T, 64, 64, true, 64, 3>>({200, 96, 72, 0.2, 5, two, 6}, 2, 3);  // more splits than chunks
  check<Cut<T, 64, 64, true, 64, 3>>({4400, 32, 8, 0.1, 1, 1, 2}, 2, 2);    // 35 units for a warp
  check<Cut<T, 64, 64, true, 64, 3>>({700, 32, 64, 0.2, 1, 1, 2}, 3, 2);
  check<Cut<T, 64, 256, true, 32, 3>>({403, 64, 256, 0.1, 1, two, 1}, 6, 4);
  check<Cut<T, 128, 128, true, 64, 2>>({300, 128, 128, 0.2, 2, two, 5, 1, 3}, 2, 2);
  check<Cut<T, 128, 256, true, 32, 2>>({300, 128, 256, 0.1, 1, 1, 2}, 2, 2);
  check<Cut<T, 256, 64, false, 64, 4, false, 2>>({803, 256, 64, 0.1, 1, two, 1}, 4, 2);
  check<Cut<T, 256, 64, false, 64, 4, false, 2>>({500, 256, 64, 0.1, 1, two, 4, 0.6, 1}, 3, 2);
  check<Cut<T, 256, 64, false, 64, 4, false, 2>>({300, 320, 64, 0.1, 2, 1, 4}, 2, 2);
  check<Cut<T, 256, 64, false, 64, 4>>({300, 288, 64, 0.2, 2, 1, 4}, 4, 2);
  check<Cut<T, 256, 128, false, 64, 2>>({300, 192, 128, 0.2, 1, 1, 4}, 2, 2);
  check<Cut<T, 256, 128, false, 32, 3, true>>({203, 512, 128, 0.1, 2, two, 7}, 2, 2);
  check<Cut<T, 256, 128, false, 32, 3, true>>({170, 512, 64, 0.1, 1, 1, 6, 0.5}, 3, 2);
  std::printf("everything as by naive loops\n");
}
