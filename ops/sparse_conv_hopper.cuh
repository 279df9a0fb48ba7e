// The weight gradient of a 1x1 convolution from packed activations, on Hopper.
//
// dW[i, o] = sum over pixels p of x[p, i] * dY[p, o], where x is packed. A block of threads has a
// multiprocessor for itself, and makes X input times Y output channels of dW over a range of chunks of P
// pixels; a second kernel adds up what the blocks of all ranges made, in their order.
//
// The warps of a block have three jobs, and only mbarriers between them:
//   - one warp has the copy engine bring chunks of dY, many chunks ahead;
//   - `kUnpackers` warps put the kept values of x into tiles of zeros. A warp takes a unit, 2,048
//     values, the unit of `offsets`, or two: its words and values came to shared memory while the
//     warp did the units before. One scan of the words' counts says where the values of each begin,
//     then a lane takes words of its own, clears their place, and scatters their values. Warps do not
//     wait for each other, and several chunks are being filled at any time;
//   - one or two warpgroups multiply by `wgmma`, with both operands from shared memory, as they lie
//     there: channels side by side, pixels one below the other, "transposed" for both.
//
// A tile of C channels is C / 64 columns of P rows of 128 bytes, with their eight parts of 16 bytes
// exchanged: part `n` of row `p` lies where n ^ p % 8 says, the pattern of 128 bytes of the copy engine
// and of `wgmma`. So eight rows of one column (1,024 bytes) do not meet in banks.

#pragma once

#include <cstdint>
#include <type_traits>

#include "sparse_conv.cuh"
#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_fp16.h>
#endif

namespace swat {
namespace hopper {

constexpr uint32_t kTileWords = conv::kWordsOfTile, kTileValues = 32 * kTileWords;
constexpr uint32_t kSlots = 3;        // units of a warp in shared memory, two of them on their way
constexpr uint32_t kAtOnce = 4;       // values of a word that are put together
constexpr uint32_t kBatch = 32;       // units of a warp whose `offsets` are read together
constexpr uint32_t kMostStages = 8;

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
// The word of two units that belongs to a lane, where a tile has half of a pixel's channels. `word`, 0
// or 1, is that of the unit.
template <uint32_t X>
SWAT_INLINE uint32_t half_word(uint32_t lane, uint32_t block) {
  constexpr uint32_t kWords = X / 32;
  return lane / kWords * (2 * kWords) + block * kWords + lane % kWords;
}

// ---- The problem --------------------------------------------------------------------------------

struct Problem {
  const uint16_t* values;  // packed, `capacity` of them
  const uint32_t* bitmap;  // `words` of it
  const uint32_t* offsets;
  float* partial;          // (splits, in, out)
  uint32_t pixels, in, out;
  uint32_t capacity, words, splits;
  uint32_t x_stages, dy_stages;  // tiles in shared memory
  uint32_t room;                 // values of a unit there, a multiple of 8
};

// What a block is made of. X input channels by Y output channels, chunks of P pixels; the left operand
// of `wgmma`, 64 channels for each of its warpgroups, is x if kLeftIsX, else dY. kHalf: a pixel has
// twice as many channels as the tile.
template <typename T_, uint32_t X_, uint32_t Y_, bool kLeftIsX_, uint32_t P_, uint32_t kProducerGroups_,
          bool kHalf_ = false>
struct Cut {
  using T = T_;
  static constexpr uint32_t X = X_, Y = Y_, P = P_;
  static constexpr bool kLeftIsX = kLeftIsX_, kHalf = kHalf_;
  static constexpr uint32_t M = kLeftIsX ? X : Y, N = kLeftIsX ? Y : X;
  static constexpr uint32_t kConsumerGroups = M / 64, kProducerGroups = kProducerGroups_;
  static constexpr uint32_t kThreads = 128 * (kConsumerGroups + kProducerGroups);
  static constexpr uint32_t kUnpackers = 4 * kProducerGroups - 1;
  static constexpr uint32_t kTilesOfUnit = kHalf ? 2 : 1, kWordsOfUnit = kTilesOfUnit * kTileWords;
  static constexpr uint32_t kXBytes = X * P * 2, kYBytes = Y * P * 2;
  // Registers for a thread, of 64 K: what it starts with, and what it then has.
  static constexpr uint32_t kStart = 65536 / kThreads / 8 * 8;
  static constexpr uint32_t kProduces = kConsumerGroups == 1 ? 96 : kProducerGroups == 2 ? 80 : 48;
  static constexpr uint32_t kConsumes =
      (kStart * (kConsumerGroups + kProducerGroups) - kProduces * kProducerGroups) / kConsumerGroups / 8 * 8;
  // Columns of one `wgmma`. Its sums have to fit into the registers that a thread starts with: twice as
  // many would need 160.
  static constexpr uint32_t kEach = N > 128 ? 128 : N;
  static_assert(kConsumes <= 240 && kStart < 160);
  static_assert(M % 64 == 0 && N % kEach == 0 && X % 64 == 0 && Y % 64 == 0 && P % 16 == 0);
};

// The parts of dW that blocks make: those of the same pixels follow one another, so that they meet in
// the cache.
template <typename C>
struct Part {
  uint32_t split, in_block, out_block, begin, end;  // of chunks

  SWAT_INLINE Part(const Problem& problem, uint32_t block) {
    const uint32_t ins = (problem.in + C::X - 1) / C::X, outs = (problem.out + C::Y - 1) / C::Y;
    in_block = block % ins, block /= ins;
    out_block = block % outs;
    split = block / outs;
    const uint64_t chunks = (problem.pixels + C::P - 1) / C::P;
    begin = static_cast<uint32_t>(chunks * split / problem.splits);
    end = static_cast<uint32_t>(chunks * (split + 1) / problem.splits);
  }
  static SWAT_INLINE uint32_t blocks_of(const Problem& problem) {
    return (problem.in + C::X - 1) / C::X * ((problem.out + C::Y - 1) / C::Y);
  }
};

// Shared memory, in bytes from a multiple of 1,024: tiles of x, tiles of dY, units, barriers.
template <typename C>
struct Shared {
  uint32_t dy, units, slot, barriers, bytes;
  SWAT_INLINE Shared(uint32_t x_stages, uint32_t dy_stages, uint32_t room) {
    dy = x_stages * C::kXBytes;
    units = dy + dy_stages * C::kYBytes;
    // A copy begins at 16 bytes, up to seven values early.
    slot = 4 * C::kWordsOfUnit + 2 * (room + 8);
    barriers = units + C::kUnpackers * kSlots * slot;
    bytes = barriers + 8 * 4 * kMostStages + 1024;  // the start may have to be moved
  }
};

// ---- The hardware -------------------------------------------------------------------------------

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* of) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(of));
}

// Barriers in shared memory: `full` and `empty` of every stage.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0]; }" ::"r"(barrier) : "memory");
}
// Arrives, and so many bytes are to come.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("{ .reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1; }" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// Waits until the phase of this parity is over; a new barrier looks as if one of parity 1 were.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

template <uint32_t kRegisters, bool kMore>
__device__ __forceinline__ void set_registers() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
}

// Copies that are on their way until `copies_wait`: a word, or zero; the first bytes of 16.
__device__ __forceinline__ void copy_word(uint32_t to, const uint32_t* from, bool is_there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(is_there ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_part(uint32_t to, const uint16_t* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_whole(uint32_t to, const uint16_t* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t load_word(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
}
template <int kOffset>
__device__ __forceinline__ uint32_t load_value(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(value) : "r"(from), "n"(kOffset));
  return value;
}
__device__ __forceinline__ uint32_t load_global_if(bool condition, const uint16_t* from) {
  uint32_t value;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.global.nc.u16 %0, [%2]; }"
               : "=&r"(value)
               : "r"(static_cast<uint32_t>(condition)), "l"(from));
  return value;
}
__device__ __forceinline__ void clear_part(uint32_t to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0));
}
// Stores a value if its word has it, and it is large enough.
__device__ __forceinline__ void put_value(uint32_t to, uint32_t bits, uint32_t value, uint32_t least) {
  asm volatile(
      "{ .reg .pred p; .reg .u32 m; setp.ne.u32 p, %1, 0; and.b32 m, %2, 0x7fff; "
      "setp.ge.and.u32 p, m, %3, p; @p st.shared.u16 [%0], %2; }" ::"r"(to),
      "r"(bits), "r"(value), "r"(least));
}
// Which is the highest bit; of no bits ~0.
__device__ __forceinline__ uint32_t highest_bit(uint32_t word) {
  uint32_t bit;
  asm("bfind.u32 %0, %1;" : "=r"(bit) : "r"(word));
  return bit;
}
__device__ __forceinline__ uint32_t without_bit(uint32_t word, uint32_t bit) {
  uint32_t one;  // or none
  asm("shl.b32 %0, 1, %1;" : "=r"(one) : "r"(bit));
  return word ^ one;
}
// The sum of all lanes before.
__device__ __forceinline__ uint32_t scan_lanes(uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    asm volatile(
        "{ .reg .pred p; .reg .u32 o; shfl.sync.up.b32 o|p, %0, %1, 0, 0xffffffff; @p add.u32 %0, %0, o; }"
        : "+r"(sum)
        : "r"(step));
  }
  return sum - value;
}

// What was stored becomes visible to `wgmma`.
__device__ __forceinline__ void fence_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The copy engine brings 64 channels of some pixels of dY; what lies beyond the last channel or pixel
// becomes zero, and counts.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t channel,
                                         uint32_t pixel, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(channel), "r"(pixel), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <uint32_t N>
struct Wgmma;

// 64 x N sums, of which a thread has N / 2, += 64 x 16 values times 16 x N values. Names and places of sums,
// 32 at a time:
#define SWAT_NAMES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SWAT_NAMES_1 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SWAT_EIGHT(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define SWAT_SUMS(d, i) \
  SWAT_EIGHT(d, i), SWAT_EIGHT(d, i + 8), SWAT_EIGHT(d, i + 16), SWAT_EIGHT(d, i + 24)
// Both operands transposed; sums are added to.
#define SWAT_WGMMA(N, TYPE, NAMES, A, B, ...)                                                            \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
               "." TYPE " {" NAMES "}, %" #A ", %" #B ", p, 1, 1, 1, 1; }"                               \
               : __VA_ARGS__                                                                             \
               : "l"(a), "l"(b))
#define SWAT_DEFINE_WGMMA(N, NAMES, A, B, ...)                                       \
  template <>                                                                        \
  struct Wgmma<N> {                                                                  \
    template <typename T>                                                            \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) { \
      if constexpr (std::is_same_v<T, __half>) {                                     \
        SWAT_WGMMA(N, "f16", NAMES, A, B, __VA_ARGS__);                              \
      } else {                                                                       \
        SWAT_WGMMA(N, "bf16", NAMES, A, B, __VA_ARGS__);                             \
      }                                                                              \
    }                                                                                \
  };
SWAT_DEFINE_WGMMA(64, SWAT_NAMES_0, 32, 33, SWAT_SUMS(d, 0))
SWAT_DEFINE_WGMMA(128, SWAT_NAMES_0 ", " SWAT_NAMES_1, 64, 65, SWAT_SUMS(d, 0), SWAT_SUMS(d, 32))
#undef SWAT_DEFINE_WGMMA
#undef SWAT_WGMMA
#undef SWAT_SUMS
#undef SWAT_EIGHT
#undef SWAT_NAMES_1
#undef SWAT_NAMES_0

#endif  // __CUDACC__

#if defined(__CUDACC__) || defined(SWAT_EMULATE)

// What is at `barrier + 8 * stage`, and in which turn of the ring.
struct Stage {
  uint32_t at = 0, turn = 0;
  __device__ __forceinline__ void step(uint32_t stages) {
    if (++at == stages) at = 0, ++turn;
  }
};

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
  const uint32_t full = base + shared.barriers, empty = full + 8 * kMostStages;
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(problem.values) / 2 % 8);

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
      if (end > problem.capacity) end = problem.capacity;
      run.count = end > run.begin ? end - run.begin : 0;
      // What does not fit is read from where it is.
      if (run.count > problem.room) run.count = problem.room;
    }
    return run;
  };
  Run now = look(0), next = look(1);
  const auto find = [&](uint32_t unit, bool is_next) {
    const uint32_t begin = is_next ? next.begin : now.begin, count = is_next ? next.count : now.count;
    return Run{__shfl_sync(kAll, begin, unit % kBatch), __shfl_sync(kAll, count, unit % kBatch)};
  };
  // Copies begin at 16 bytes, so many values before.
  const auto early = [&](uint32_t begin) { return (begin + skew) % 8; };
  const auto ask = [&](uint32_t unit, bool is_next, uint32_t slot) {
    if (unit < own) {
      const uint32_t tile = first_tile + (unpacker + unit * warps) * C::kTilesOfUnit;
      const uint32_t word = tile * kTileWords + lane;
#pragma unroll
      for (uint32_t w = 0; w < C::kWordsOfUnit; w += 32) {
        const bool is_there = word + w < problem.words;
        copy_word(slot + 4 * (lane + w), problem.bitmap + (is_there ? word + w : 0), is_there);
      }
      const Run run = find(unit, is_next);
      if (run.count > 0) {
        const uint32_t before = early(run.begin), count = run.count + before;
        const uint16_t* const from = problem.values + run.begin - before;
        // Whole parts, but for the last one of all values.
        const bool is_last = problem.capacity - run.begin < run.count + 8;
#pragma unroll 1
        for (uint32_t v = 8 * lane; v < count; v += 8 * 32) {
          const uint32_t to = slot + 4 * C::kWordsOfUnit + 2 * v;
          if (is_last) {
            copy_part(to, from + v, 2 * min(count - v, 8u));
          } else {
            copy_whole(to, from + v);
          }
        }
      }
    }
    copies_commit();
  };

  // The chunk of the warp's unit, its stage, and the unit's number there.
  Stage stage;
  uint32_t in_chunk = unpacker;
  const auto wait_for_stage = [&] {
    if (stage.turn > 0) {
      barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1);
    }
  };
  const auto find_chunk = [&] {
    while (in_chunk >= units_of_chunk) {
      in_chunk -= units_of_chunk;
      stage.step(problem.x_stages);
    }
  };

  ask(0, false, slots);
  ask(1, false, slots + shared.slot);
  uint32_t use = 0, fill = 2;  // slots
  for (uint32_t unit = 0; unit < own; ++unit) {
    if (unit % kBatch == 0 && unit > 0) {
      now = next;
      next = look(unit / kBatch + 1);
    }
    ask(unit + 2, (unit + 2) / kBatch != unit / kBatch, slots + fill * shared.slot);
    const uint32_t words = slots + use * shared.slot, near = words + 4 * C::kWordsOfUnit;
    use = use + 1 == kSlots ? 0 : use + 1;
    fill = fill + 1 == kSlots ? 0 : fill + 1;
    find_chunk();
    const Run run = find(unit, false);
    copies_wait<2>();
    __syncwarp();

    // The kept values of the unit before each word; those of two words share a register.
    uint32_t read[C::kTilesOfUnit][2], before[C::kTilesOfUnit], sums[C::kTilesOfUnit], total = 0;
#pragma unroll
    for (uint32_t t = 0; t < C::kTilesOfUnit; ++t) {
      read[t][0] = load_word(words + 4 * (t * kTileWords + lane));
      read[t][1] = load_word(words + 4 * (t * kTileWords + lane + 32));
    }
#pragma unroll
    for (uint32_t t = 0; t < C::kTilesOfUnit; ++t) {
      const uint32_t counts = __popc(read[t][0]) | __popc(read[t][1]) << 16;
      before[t] = scan_lanes(counts);
      sums[t] = __shfl_sync(kAll, before[t] + counts, 31);
      total += (sums[t] & 0xffff) + (sums[t] >> 16);
    }
    // A lane's words: what they have, how much is kept before, where they go.
    uint32_t bits[2], ranks[2], places[2], rotations[2];
    bool is_own[2];
#pragma unroll
    for (uint32_t w = 0; w < 2; ++w) {
      PixelWord at;
      if constexpr (C::kHalf) {
        const uint32_t word = half_word<C::X>(lane, part.in_block);
        bits[w] = load_word(words + 4 * (w * kTileWords + word));
        const uint32_t both = __shfl_sync(kAll, before[w], word % 32);
        ranks[w] = word < 32 ? both & 0xffff : (both >> 16) + (sums[w] & 0xffff);
        if (w == 1) ranks[w] += (sums[0] & 0xffff) + (sums[0] >> 16);
        constexpr uint32_t kWords = C::X / 32;
        at.pixel = (in_chunk * 64 + w * 32 + lane) / kWords, at.word = lane % kWords;
        is_own[w] = true;
      } else {
        bits[w] = read[0][w];
        ranks[w] = w == 0 ? before[0] & 0xffff : (before[0] >> 16) + (sums[0] & 0xffff);
        at = pixel_word(in_chunk * kTileWords + w * 32 + lane, words_of_pixel, inverse);
        at.word -= part.in_block * (C::X / 32);
        is_own[w] = at.word < C::X / 32;
        if (!is_own[w]) bits[w] = 0;
      }
      places[w] = base + stage.at * C::kXBytes + place_of<C::P>(at.pixel, at.word);
      rotations[w] = clear_first(at.word, C::kHalf ? C::X / 32 : words_of_pixel) * 16;
    }
    const uint32_t counts[2] = {static_cast<uint32_t>(__popc(bits[0])),
                                static_cast<uint32_t>(__popc(bits[1]))};
    const uint32_t most = __reduce_max_sync(kAll, max(counts[0], counts[1]));
    const auto clear = [&] {
      wait_for_stage();
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
    const auto place = [&](uint32_t w, uint32_t value) {
      const uint32_t bit = highest_bit(bits[w]);
      put_value(places[w] ^ 2 * bit, bits[w], value, least);
      bits[w] = without_bit(bits[w], bit);
    };
    // From the last value of each word to its first, so that its highest bit is the next. The first
    // values are read before the place is clear. What is read beyond a word is not used, and lies in
    // the unit's own memory.
    if (total <= run.count) {
      uint32_t from[2], values[kAtOnce][2];
      const auto load = [&](uint32_t (&to)[kAtOnce][2]) {
#pragma unroll
        for (uint32_t w = 0; w < 2; ++w) {
          to[0][w] = load_value<0>(from[w]);
          to[1][w] = load_value<-2>(from[w]);
          to[2][w] = load_value<-4>(from[w]);
          to[3][w] = load_value<-6>(from[w]);
          from[w] -= 2 * kAtOnce;
        }
      };
      static_assert(kAtOnce == 4);
#pragma unroll
      for (uint32_t w = 0; w < 2; ++w) {
        from[w] = near + 2 * (early(run.begin) + ranks[w] + counts[w]) - 2;
      }
      load(values);
      clear();
      for (uint32_t g = kAtOnce;; g += kAtOnce) {
        uint32_t later[kAtOnce][2];
        const bool goes_on = g < most;
        if (goes_on) load(later);
#pragma unroll
        for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) place(w, values[s][w]);
        }
        if (!goes_on) break;
#pragma unroll
        for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) values[s][w] = later[s][w];
        }
      }
    } else {
      clear();
      uint32_t left[2] = {counts[0], counts[1]};
#pragma unroll 1
      for (uint32_t g = 0; g < most; g += kAtOnce) {
        uint32_t values[kAtOnce][2];
#pragma unroll
        for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) {
            // A bitmap that promises too much stays in bounds: what is not there is below `least`.
            const uint32_t rank = run.begin + ranks[w] + left[w] - 1 - s;
            values[s][w] = load_global_if(s < left[w] && rank < problem.capacity, problem.values + rank);
          }
        }
#pragma unroll
        for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) place(w, values[s][w]);
        }
#pragma unroll
        for (uint32_t w = 0; w < 2; ++w) left[w] = left[w] > kAtOnce ? left[w] - kAtOnce : 0;
      }
    }
    // `wgmma` sees it, and the slot is free.
    fence_stores();
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8 * stage.at);
    in_chunk += warps;
  }
  copies_wait<0>();
}

// ---- Bringing dY --------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void bring(const Problem& problem, const CUtensorMap* map,
                                      const Part<C>& part, const Shared<C>& shared, uint32_t base) {
  const uint32_t full = base + shared.barriers + 8 * 2 * kMostStages, empty = full + 8 * kMostStages;
  Stage stage;
  for (uint32_t chunk = part.begin; chunk < part.end; ++chunk) {
    if (stage.turn > 0) barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1);
    const uint32_t barrier = full + 8 * stage.at;
    const uint32_t to = base + shared.dy + stage.at * C::kYBytes;
    barrier_expect(barrier, C::kYBytes);
#pragma unroll
    for (uint32_t column = 0; column < C::Y / 64; ++column) {
      copy_box(to + column * C::P * 128, map, part.out_block * C::Y + column * 64, chunk * C::P, barrier);
    }
    stage.step(problem.dy_stages);
  }
}

// ---- Multiplying --------------------------------------------------------------------------------

// Where an operand lies; `wgmma` adds 16 pixels by 16 * 128 bytes.
template <uint32_t P>
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  // From 64 channels to the next, from eight pixels to the next; the pattern of 128 bytes.
  constexpr uint64_t kLeading = P * 128, kStride = 1024;
  return static_cast<uint64_t>(at >> 4 & 0x3fff) | kLeading >> 4 << 16 | kStride >> 4 << 32 | 1ull << 62;
}

template <typename C>
__device__ __forceinline__ void multiply(const Problem& problem, const Part<C>& part,
                                         const Shared<C>& shared, uint32_t base, uint32_t warp) {
  const uint32_t lane = threadIdx.x % 32, group = warp / 4;
  const uint32_t x_full = base + shared.barriers, x_empty = x_full + 8 * kMostStages;
  const uint32_t y_full = x_empty + 8 * kMostStages, y_empty = y_full + 8 * kMostStages;
  constexpr uint32_t kEach = C::kEach;
  float sums[C::N / kEach][kEach / 2];
#pragma unroll
  for (uint32_t n = 0; n < C::N / 2; ++n) sums[n / (kEach / 2)][n % (kEach / 2)] = 0.f;
  Stage x, y;
  const uint64_t x_at = descriptor<C::P>(base + (C::kLeftIsX ? group * C::P * 128 : 0));
  const uint64_t y_at = descriptor<C::P>(base + shared.dy + (C::kLeftIsX ? 0 : group * C::P * 128));
  uint32_t x_before = 0, y_before = 0;  // barriers of the chunk before
  for (uint32_t chunk = part.begin; chunk < part.end; ++chunk) {
    barrier_wait(x_full + 8 * x.at, x.turn & 1);
    barrier_wait(y_full + 8 * y.at, y.turn & 1);
    const uint64_t own_x = x_at + x.at * (C::kXBytes / 16), own_y = y_at + y.at * (C::kYBytes / 16);
    const uint64_t left = C::kLeftIsX ? own_x : own_y, right = C::kLeftIsX ? own_y : own_x;
    wgmma_fence();
#pragma unroll
    for (uint32_t k = 0; k < C::P / 16; ++k) {
#pragma unroll
      for (uint32_t n = 0; n < C::N / kEach; ++n) {
        Wgmma<kEach>::template multiply<typename C::T>(sums[n], left + k * 128,
                                                       right + k * 128 + n * (kEach / 64) * (C::P * 8));
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // those of the chunk before are over
    if (chunk > part.begin && lane == 0) {
      barrier_arrive(x_before);
      barrier_arrive(y_before);
    }
    x_before = x_empty + 8 * x.at, y_before = y_empty + 8 * y.at;
    x.step(problem.x_stages);
    y.step(problem.dy_stages);
  }
  wgmma_wait<0>();

  // Of the 64 x N sums a lane has pairs of every eight columns, in two rows.
  float* const to = problem.partial + static_cast<uint64_t>(part.split) * problem.in * problem.out;
  const uint32_t first_row = warp * 16 + lane / 4, first_column = lane % 4 * 2;
#pragma unroll
  for (uint32_t n = 0; n < C::N / 8; ++n) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = first_row + 8 * half, column = first_column + 8 * n;
      const float* const own = &sums[n / (kEach / 8)][n % (kEach / 8) * 4 + 2 * half];
      const float one = own[0], two = own[1];
      if constexpr (C::kLeftIsX) {
        const uint32_t i = part.in_block * C::X + row, o = part.out_block * C::Y + column;
        if (i < problem.in && o < problem.out) {
          *reinterpret_cast<float2*>(to + static_cast<uint64_t>(i) * problem.out + o) =
              make_float2(one, two);
        }
      } else {
        const uint32_t i = part.in_block * C::X + column, o = part.out_block * C::Y + row;
        if (i < problem.in && o < problem.out) {
          to[static_cast<uint64_t>(i) * problem.out + o] = one;
          to[static_cast<uint64_t>(i + 1) * problem.out + o] = two;
        }
      }
    }
  }
}

// ---- The block ----------------------------------------------------------------------------------

// `base` is where shared memory starts, a multiple of 1,024; `least` the smallest magnitude that is kept,
// at least 1.
template <typename C>
__device__ __forceinline__ void make_part(const Problem& problem, const CUtensorMap* map, uint32_t least,
                                          uint32_t base) {
  const Shared<C> shared(problem.x_stages, problem.dy_stages, problem.room);
  const Part<C> part(problem, blockIdx.x);
  // The same register for all lanes, so that branches on it are known to be taken together.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    const uint32_t units = C::P * problem.in / (kTileValues * C::kTilesOfUnit);
    const uint32_t barriers = base + shared.barriers;
    for (uint32_t s = 0; s < kMostStages; ++s) {
      barrier_init(barriers + 8 * s, units);
      barrier_init(barriers + 8 * (kMostStages + s), 4 * C::kConsumerGroups);
      barrier_init(barriers + 8 * (2 * kMostStages + s), 1);
      barrier_init(barriers + 8 * (3 * kMostStages + s), 4 * C::kConsumerGroups);
    }
    fence_barriers();
  }
  __syncthreads();
  if (warp < 4 * C::kConsumerGroups) {
    set_registers<C::kConsumes, true>();
    multiply<C>(problem, part, shared, base, warp);
  } else {
    set_registers<C::kProduces, false>();
    const uint32_t producer = warp - 4 * C::kConsumerGroups;
    if (producer == C::kUnpackers) {
      if (threadIdx.x % 32 == 0) bring<C>(problem, map, part, shared, base);
    } else {
      unpack<C>(problem, part, shared, base, producer, least);
    }
  }
}

#endif  // __CUDACC__ or SWAT_EMULATE

// ---- What is launched ------------------------------------------------------------------------------

// Whether a cut takes so many channels: a chunk is whole units, and those of a tile whole columns.
template <typename C>
bool takes(uint32_t in, uint32_t out) {
  const bool fits = C::kHalf ? in == 2 * C::X : in <= conv::kMostRun && in % 32 == 0;
  return fits && C::P * in % (kTileValues * C::kTilesOfUnit) == 0 && out % 8 == 0;
}

// Gives a problem the stages it asks for, or fewer, and room for as many values of a unit as there is
// memory for.
template <typename C>
bool fit(Problem& problem, uint32_t bytes) {
  constexpr uint32_t kLeast = C::kHalf ? 640 : 512, kMost = kTileValues * C::kTilesOfUnit;
  const auto fits = [&](uint32_t room) {
    return Shared<C>(problem.x_stages, problem.dy_stages, room).bytes <= bytes;
  };
  while (!fits(kLeast)) {
    uint32_t& more = problem.x_stages * C::kXBytes > problem.dy_stages * C::kYBytes ? problem.x_stages
                                                                                    : problem.dy_stages;
    if (more == 2) return false;
    --more;
  }
  problem.room = kLeast;
  while (problem.room < kMost && fits(problem.room + 64)) problem.room += 64;
  return true;
}

}  // namespace hopper
}  // namespace swat
