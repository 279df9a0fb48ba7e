// A block of threads on a CPU, for kernels that know the hardware only through what they are given.
//
// Threads are coroutines: they change only where they wait for each other, and a warp, drawn at random,
// goes as far as it can before another goes on. So a barrier that is missing shows, be it of the block
// or of a warp, whose lanes go one after the other.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

namespace emulated {

inline void fail(const char* what) {
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

// Addresses that may be read or written.
struct Range {
  const char* begin;
  const char* end;

  template <typename Pointer>
  static Range of(Pointer begin, size_t count) {
    const char* from = reinterpret_cast<const char*>(begin);
    return {from, from + count * sizeof(*begin)};
  }
  bool holds(const void* at, size_t bytes) const {
    const char* from = static_cast<const char*>(at);
    return from >= begin && from + bytes <= end;
  }
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(uint32_t index, int threads, unsigned seed, std::vector<Range> readable, Range writable)
      : index(index), readable(std::move(readable)), writable(writable), generator_(seed),
        fibers_(static_cast<size_t>(threads)), warps_(static_cast<size_t>(threads / 32)) {}

  void run(const std::function<void()>& body) {
    current() = this;
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
      std::vector<size_t> ready;
      for (size_t w = 0; w < warps_.size(); ++w) {
        if (can_run(w)) ready.push_back(w);
      }
      if (ready.empty()) break;
      const size_t warp = ready[generator_() % ready.size()];
      while (can_run(warp)) {
        for (size_t lane = 0; lane < 32; ++lane) {
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

  void sync() { meet(all_, static_cast<int>(fibers_.size()), [] {}); }
  void sync_warp() { meet(warps_[thread / 32].meeting, 32, [] {}); }
  // The value of another lane.
  uint32_t shuffle(uint32_t value, uint32_t lane) {
    Warp& warp = warps_[thread / 32];
    const unsigned turn = warp.meeting.turn;
    warp.given[thread % 32] = value;
    // What was given is kept for a turn: the next one may begin before all lanes have read.
    meet(warp.meeting, 32, [&] {
      for (int l = 0; l < 32; ++l) warp.taken[turn % 2][l] = warp.given[l];
    });
    return warp.taken[turn % 2][lane % 32];
  }

  void check_read(const void* at, size_t bytes) const {
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("a read at an odd address");
    for (const Range& range : readable) {
      if (range.holds(at, bytes)) return;
    }
    fail("a read out of bounds");
  }
  void check_write(const void* at, size_t bytes) const {
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0) fail("a write at an odd address");
    if (!writable.holds(at, bytes)) fail("a write out of bounds");
  }

  const uint32_t index;
  const std::vector<Range> readable;
  const Range writable;
  uint32_t thread = 0;

 private:
  struct Meeting {
    int arrived = 0;
    unsigned turn = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Meeting* meeting = nullptr;
    unsigned turn = 0;
    bool done = false;
    bool can_run() const { return !done && (meeting == nullptr || meeting->turn != turn); }
  };
  struct Warp {
    Meeting meeting;
    uint32_t given[32], taken[2][32];
  };

  // Waits for `count` threads that meet at the same place; the last one does `act`.
  void meet(Meeting& meeting, int count, const std::function<void()>& act) {
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
  static void start() {
    Block& block = *current();
    const uint32_t own = block.thread;
    (*block.body_)();
    block.fibers_[own].done = true;
  }
  bool can_run(size_t warp) const {
    for (size_t lane = 0; lane < 32; ++lane) {
      if (fibers_[warp * 32 + lane].can_run()) return true;
    }
    return false;
  }

  std::mt19937 generator_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Meeting all_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
};

}  // namespace emulated
