// The weight gradient of a 1x1 convolution from packed activations, on Hopper.
//
// dW[i, o] = sum over pixels p of x[p, i] * dY[p, o], where x is packed. A block of threads has a
// multiprocessor for itself, and makes X input times Y output channels of dW over a range of chunks of P
// pixels; a second kernel adds up what the blocks of all ranges made, in their order.
//
// The warps of a block have three jobs, and only mbarriers between them:
//   - one warp has the copy engine bring chunks of dY, many chunks ahead;
//   - `kUnpackers` warps put the kept values of x into tiles of zeros. A warp takes a unit, 2,048
//     values, the unit of `offsets`, or two: the copy engine brought its words and values to shared
//     memory while the warp did the units before. One scan of the words' counts says where the values
//     of each begin, then a lane takes words of its own, clears their place, and scatters their values,
//     of which it reads four at once. Warps do not wait for each other, and several chunks are being
//     filled at any time;
//   - one or two warpgroups multiply by `wgmma`, with operands from shared memory, as they lie there:
//     channels side by side, pixels one below the other, "transposed" for both. dY as the left operand
//     goes through registers.
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
constexpr uint32_t kSlots = 3;        // units of a warp in shared memory, all but one on their way
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
// twice as many channels as the tile. kPasses: a unit of a warp is dealt with in one pass, or in two, one
// after the other, so that the warp asks for copies, waits, and tells others half as often.
template <typename T_, uint32_t X_, uint32_t Y_, bool kLeftIsX_, uint32_t P_, uint32_t kProducerGroups_,
          bool kHalf_ = false, uint32_t kPasses_ = 1>
struct Cut {
  using T = T_;
  static constexpr uint32_t X = X_, Y = Y_, P = P_, kPasses = kPasses_;
  static constexpr bool kLeftIsX = kLeftIsX_, kHalf = kHalf_;
  static constexpr uint32_t M = kLeftIsX ? X : Y, N = kLeftIsX ? Y : X;
  static constexpr uint32_t kConsumerGroups = M / 64, kProducerGroups = kProducerGroups_;
  static constexpr uint32_t kThreads = 128 * (kConsumerGroups + kProducerGroups);
  static constexpr uint32_t kUnpackers = 4 * kProducerGroups - 1;
  // Of `offsets`. A pass has two words for a lane: a tile, or half of two.
  static constexpr uint32_t kTilesOfPass = kHalf ? 2 : 1, kTilesOfUnit = kPasses * kTilesOfPass;
  static constexpr uint32_t kWordsOfPass = kTilesOfPass * kTileWords;
  static constexpr uint32_t kWordsOfUnit = kTilesOfUnit * kTileWords;
  static constexpr uint32_t kXBytes = X * P * 2, kYBytes = Y * P * 2;
  // Registers for a thread, of 64 K: what it starts with, and what it then has.
  static constexpr uint32_t kStart = 65536 / kThreads / 8 * 8;
  static constexpr uint32_t kProduces = kConsumerGroups == 2 ? (kProducerGroups == 2 ? 80 : 48)
                                                             : (kProducerGroups == 3 ? 96 : 72);
  static constexpr uint32_t kConsumes =
      (kStart * (kConsumerGroups + kProducerGroups) - kProduces * kProducerGroups) / kConsumerGroups / 8 * 8;
  // Columns of one `wgmma`. Its sums have to fit into the registers that a thread starts with: twice as
  // many would need 160.
  static constexpr uint32_t kEach = N > 128 ? 128 : N;
  // Values of a unit that there has to be room for: what 10 % makes, and a good part more.
  static constexpr uint32_t kLeastRoom = kTilesOfUnit == 2 ? 600 : 512;
  static_assert(kProduces <= kStart && kStart <= kConsumes && kConsumes <= 240 && kStart < 160);
  static_assert(M % 64 == 0 && N % kEach == 0 && X % 64 == 0 && Y % 64 == 0 && P % 16 == 0);
  static_assert(kTilesOfUnit <= 2);
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

// Shared memory, in bytes from a multiple of 1,024: tiles of x, tiles of dY, units, barriers of tiles,
// barriers of units.
template <typename C>
struct Shared {
  uint32_t dy, units, slot, barriers, arrivals, bytes;
  SWAT_INLINE Shared(uint32_t x_stages, uint32_t dy_stages, uint32_t room) {
    dy = x_stages * C::kXBytes;
    units = dy + dy_stages * C::kYBytes;
    // A copy begins at 16 bytes, up to seven values early; and lanes read up to 36 values too many.
    slot = 4 * C::kWordsOfUnit + 2 * (room + 48);
    barriers = units + C::kUnpackers * kSlots * slot;
    arrivals = barriers + 8 * 4 * kMostStages;
    bytes = arrivals + 8 * C::kUnpackers * kSlots + 1024;  // the start may have to be moved
  }
};

// ---- The hardware -------------------------------------------------------------------------------

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* of) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(of));
}

// Barriers in shared memory: `full` and `empty` of every stage, and one for every slot of a unit.
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

// The copy engine brings whole parts of 16 bytes, which count at the barrier.
__device__ __forceinline__ void copy_parts(uint32_t to, const void* from, uint32_t bytes,
                                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_word(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
__device__ __forceinline__ uint32_t load_word(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
}
// Four values, from a multiple of eight bytes.
struct Four {
  uint32_t low, high;
};
template <int kOffset>
__device__ __forceinline__ Four load_four(uint32_t from) {
  Four four;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];"
               : "=r"(four.low), "=r"(four.high)
               : "r"(from), "n"(kOffset));
  return four;
}
// The lower half of two words that are moved down by 0 or 16 bits.
__device__ __forceinline__ uint32_t move_down(uint32_t low, uint32_t high, uint32_t bits) {
  uint32_t moved;
  asm("shf.r.wrap.b32 %0, %1, %2, %3;" : "=r"(moved) : "r"(low), "r"(high), "r"(bits));
  return moved;
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
// Stores a value, the lower half of what is given, if its word has it, and it is large enough.
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
// The left operand of 16 pixels and a warp's 16 channels, from where they lie: lane l says where the
// eight channels l / 8 % 2 of pixel l / 16 * 8 + l % 8 are.
__device__ __forceinline__ void load_left(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}
template <uint32_t N>
struct Wgmma;

// 64 x N sums, of which a thread has N / 2, += 64 x 16 values times 16 x N values; the left ones from
// where they lie, or from registers. Names and places of sums, 32 at a time:
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
// Operands, and that what lies in shared memory is transposed; sums are added to.
#define SWAT_LIES "l"(a), "l"(b)
#define SWAT_HELD "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
#define SWAT_WGMMA(N, TYPE, NAMES, OPERANDS, FROM, ...)                                            \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n" #N         \
               "k16.f32." TYPE "." TYPE " {" NAMES "}, " OPERANDS "; }"                            \
               : __VA_ARGS__                                                                       \
               : SWAT_##FROM)
#define SWAT_MULTIPLY(N, LEFT, NAMES, OPERANDS, FROM, ...)                                         \
  template <typename T>                                                                            \
  static __device__ __forceinline__ void multiply(float (&d)[N / 2], LEFT, uint64_t b) {           \
    if constexpr (std::is_same_v<T, __half>) {                                                     \
      SWAT_WGMMA(N, "f16", NAMES, OPERANDS, FROM, __VA_ARGS__);                                    \
    } else {                                                                                       \
      SWAT_WGMMA(N, "bf16", NAMES, OPERANDS, FROM, __VA_ARGS__);                                   \
    }                                                                                              \
  }
template <>
struct Wgmma<64> {
  SWAT_MULTIPLY(64, uint64_t a, SWAT_NAMES_0, "%32, %33, p, 1, 1, 1, 1", LIES, SWAT_SUMS(d, 0))
};
template <>
struct Wgmma<128> {
  SWAT_MULTIPLY(128, uint64_t a, SWAT_NAMES_0 ", " SWAT_NAMES_1, "%64, %65, p, 1, 1, 1, 1", LIES,
                SWAT_SUMS(d, 0), SWAT_SUMS(d, 32))
  SWAT_MULTIPLY(128, const uint32_t (&a)[4], SWAT_NAMES_0 ", " SWAT_NAMES_1,
                "{%64, %65, %66, %67}, %68, p, 1, 1, 1", HELD, SWAT_SUMS(d, 0), SWAT_SUMS(d, 32))
};

#undef SWAT_MULTIPLY
#undef SWAT_WGMMA
#undef SWAT_HELD
#undef SWAT_LIES
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
  const uint32_t arrivals = base + shared.arrivals + unpacker * kSlots * 8;
  const uint32_t full = base + shared.barriers, empty = full + 8 * kMostStages;
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(problem.values) / 2 % 8);
  // The copy engine brings whole parts of 16 bytes: words that begin elsewhere are stored by the lanes,
  // and the last few of all values are read from where they are.
  const bool is_even = reinterpret_cast<uintptr_t>(problem.bitmap) % 16 == 0;
  const uint32_t whole = max((problem.capacity + skew) / 8 * 8, skew) - skew;

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
      if (end > whole) end = whole;
      run.count = end > run.begin ? end - run.begin : 0;
      // What does not fit is read from where it is.
      if (run.count > problem.room) run.count = problem.room;
    }
    return run;
  };
  Run now = look(0), next = look(1);
  // Copies begin at 16 bytes, so many values before.
  const auto early = [&](uint32_t begin) { return (begin + skew) % 8; };
  const auto ask = [&](uint32_t unit, bool is_next, uint32_t which) {
    if (unit >= own) return;
    const uint32_t slot = slots + which * shared.slot, arrival = arrivals + 8 * which;
    const uint32_t word = (first_tile + (unpacker + unit * warps) * C::kTilesOfUnit) * kTileWords;
    const bool is_whole = is_even && word + C::kWordsOfUnit <= problem.words;
    if (!is_whole) {
#pragma unroll 1
      for (uint32_t w = lane; w < C::kWordsOfUnit; w += 32) {
        store_word(slot + 4 * w, word + w < problem.words ? __ldg(problem.bitmap + word + w) : 0);
      }
      __syncwarp();
    }
    // The lane that knows where the values are.
    if (lane == unit % kBatch) {
      const uint32_t begin = is_next ? next.begin : now.begin, count = is_next ? next.count : now.count;
      const uint32_t bytes_of_words = is_whole ? 4 * C::kWordsOfUnit : 0;
      const uint32_t bytes = count > 0 ? (early(begin) + count + 7) / 8 * 16 : 0;
      barrier_expect(arrival, bytes_of_words + bytes);
      if (is_whole) copy_parts(slot, problem.bitmap + word, bytes_of_words, arrival);
      if (bytes > 0) {
        copy_parts(slot + 4 * C::kWordsOfUnit, problem.values + begin - early(begin), bytes, arrival);
      }
    }
  };

  // The chunk of the warp's unit, its stage, and the unit's number there; how both go on. That is no
  // more than one turn of the ring.
  Stage stage;
  uint32_t in_chunk = unpacker;
  while (in_chunk >= units_of_chunk) {
    in_chunk -= units_of_chunk;
    stage.step(problem.x_stages);
  }
  const uint32_t chunks_on = warps / units_of_chunk, units_on = warps % units_of_chunk;
  const auto go_on = [&] {
    in_chunk += units_on;
    stage.at += chunks_on;
    if (in_chunk >= units_of_chunk) in_chunk -= units_of_chunk, ++stage.at;
    if (stage.at >= problem.x_stages) stage.at -= problem.x_stages, ++stage.turn;
  };
  const auto wait_for_stage = [&] {
    if (stage.turn > 0) {
      barrier_wait(empty + 8 * stage.at, (stage.turn - 1) & 1);
    }
  };

  // Where a lane's words of a pass go in the tile of x, whether they are of that tile, and which of their
  // parts is cleared first. Passes of whole eights of pixels are alike: each goes so many bytes after the
  // one before.
  uint32_t own_places[2], rotations[2];
  bool is_own[2];
  const auto find_places = [&](uint32_t pass) {
#pragma unroll
    for (uint32_t w = 0; w < 2; ++w) {
      PixelWord at;
      if constexpr (C::kHalf) {
        constexpr uint32_t kWords = C::X / 32;
        at.pixel = (pass * 64 + w * 32 + lane) / kWords, at.word = lane % kWords;
        is_own[w] = true;
      } else {
        at = pixel_word(pass * kTileWords + w * 32 + lane, words_of_pixel, inverse);
        at.word -= part.in_block * (C::X / 32);
        is_own[w] = at.word < C::X / 32;
      }
      own_places[w] = place_of<C::P>(at.pixel, at.word);
      rotations[w] = clear_first(at.word, C::kHalf ? C::X / 32 : words_of_pixel) * 16;
    }
  };
  const bool are_alike = C::kWordsOfPass % (8 * words_of_pixel) == 0;
  const uint32_t bytes_of_pass = are_alike ? C::kWordsOfPass / words_of_pixel * 128 : 0;
  find_places(0);

#pragma unroll
  for (uint32_t unit = 0; unit < kSlots - 1; ++unit) ask(unit, false, unit);
  Stage slot;
  for (uint32_t unit = 0; unit < own; ++unit) {
    if (unit % kBatch == 0 && unit > 0) {
      now = next;
      next = look(unit / kBatch + 1);
    }
    // The slot of the unit before is free.
    const uint32_t ahead = unit + kSlots - 1;
    ask(ahead, ahead / kBatch != unit / kBatch, slot.at == 0 ? kSlots - 1 : slot.at - 1);
    const uint32_t begin = __shfl_sync(kAll, now.begin, unit % kBatch);
    const uint32_t present = __shfl_sync(kAll, now.count, unit % kBatch);
    const uint32_t words_of_unit = slots + slot.at * shared.slot;
    const uint32_t near = words_of_unit + 4 * C::kWordsOfUnit + 2 * early(begin);
    barrier_wait(arrivals + 8 * slot.at, slot.turn & 1);
    slot.step(kSlots);

    uint32_t passed = 0;  // kept values of the passes before
#pragma unroll 1
    for (uint32_t pass = 0; pass < C::kPasses; ++pass) {
      const uint32_t words = words_of_unit + pass * 4 * C::kWordsOfPass;
      // The kept values of the pass before each word; those of two words share a register.
      uint32_t read[C::kTilesOfPass][2], before[C::kTilesOfPass], sums[C::kTilesOfPass], total = passed;
#pragma unroll
      for (uint32_t t = 0; t < C::kTilesOfPass; ++t) {
        read[t][0] = load_word(words + 4 * (t * kTileWords + lane));
        read[t][1] = load_word(words + 4 * (t * kTileWords + lane + 32));
      }
#pragma unroll
      for (uint32_t t = 0; t < C::kTilesOfPass; ++t) {
        const uint32_t counts = __popc(read[t][0]) | __popc(read[t][1]) << 16;
        before[t] = scan_lanes(counts);
        sums[t] = __shfl_sync(kAll, before[t] + counts, 31);
        total += (sums[t] & 0xffff) + (sums[t] >> 16);
      }
      // A lane's words: what they have, how much of the unit is kept before, where they go.
      uint32_t bits[2], ranks[2], places[2];
      if (!are_alike) find_places(in_chunk * C::kPasses + pass);
#pragma unroll
      for (uint32_t w = 0; w < 2; ++w) {
        ranks[w] = passed;
        if constexpr (C::kHalf) {
          const uint32_t word = half_word<C::X>(lane, part.in_block);
          bits[w] = load_word(words + 4 * (w * kTileWords + word));
          const uint32_t both = __shfl_sync(kAll, before[w], word % 32);
          ranks[w] += word < 32 ? both & 0xffff : (both >> 16) + (sums[w] & 0xffff);
          if (w == 1) ranks[w] += (sums[0] & 0xffff) + (sums[0] >> 16);
        } else {
          bits[w] = is_own[w] ? read[0][w] : 0;
          ranks[w] += w == 0 ? before[0] & 0xffff : (before[0] >> 16) + (sums[0] & 0xffff);
        }
        places[w] = base + stage.at * C::kXBytes + (in_chunk * C::kPasses + pass) * bytes_of_pass +
                    own_places[w];
      }
      const uint32_t counts[2] = {static_cast<uint32_t>(__popc(bits[0])),
                                  static_cast<uint32_t>(__popc(bits[1]))};
      const uint32_t most = __reduce_max_sync(kAll, max(counts[0], counts[1]));
      const auto clear = [&] {
        if (pass == 0) wait_for_stage();
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
      // From the first value of each word to its last, so that its lowest bit is the next: what is then
      // left of the word is known at once, and only the store waits for the number of the bit.
      const auto put = [&](uint32_t w, uint32_t value) {
        const uint32_t left = bits[w] & (bits[w] - 1);
        put_value(places[w] ^ 2 * highest_bit(bits[w] ^ left), bits[w], value, least);
        bits[w] = left;
      };
      if (total <= present) {
        // Four values at once, from a multiple of eight bytes: lanes side by side have few of them, and
        // those of one half of the lanes mostly lie in 128 bytes, so a read takes two turns of the banks
        // for four values of a lane, as it would for one. A word's first value is one of the first four;
        // they are moved down by what lies before it. The first ones are read before the place is clear.
        // What is read after a word's values is not used, and lies in the unit's own memory.
        uint32_t from[2], down[2];
        bool is_second[2];  // of two words, each of two values
        Four here[2], above[2], last[2];
#pragma unroll
        for (uint32_t w = 0; w < 2; ++w) {
          const uint32_t first = near + 2 * ranks[w];
          is_second[w] = (first & 4) != 0;
          down[w] = first % 4 * 8;
          from[w] = first & ~7u;
          here[w] = load_four<0>(from[w]), above[w] = load_four<8>(from[w]);
          last[w] = load_four<16>(from[w]);
        }
        static_assert(kAtOnce == 4);
        const auto put_four = [&](const Four (&four)[2], const Four (&after)[2]) {
          uint32_t first[2], second[2];
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) {
            const uint32_t a = is_second[w] ? four[w].high : four[w].low;
            const uint32_t b = is_second[w] ? after[w].low : four[w].high;
            const uint32_t c = is_second[w] ? after[w].high : after[w].low;
            first[w] = move_down(a, b, down[w]), second[w] = move_down(b, c, down[w]);
          }
          put(0, first[0]), put(1, first[1]), put(0, first[0] >> 16), put(1, first[1] >> 16);
          put(0, second[0]), put(1, second[1]), put(0, second[0] >> 16), put(1, second[1] >> 16);
        };
        clear();
        if (most > 0) put_four(here, above);
        if (most > kAtOnce) put_four(above, last);
#pragma unroll 1
        for (uint32_t g = 2 * kAtOnce; g < most; g += kAtOnce) {
          Four after[2];
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) after[w] = load_four<24>(from[w]), from[w] += 8;
          put_four(last, after);
#pragma unroll
          for (uint32_t w = 0; w < 2; ++w) last[w] = after[w];
        }
      } else {
        clear();
#pragma unroll 1
        for (uint32_t g = 0; g < most; g += kAtOnce) {
          uint32_t values[kAtOnce][2];
#pragma unroll
          for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
            for (uint32_t w = 0; w < 2; ++w) {
              // A bitmap that promises too much stays in bounds: what is not there is below `least`.
              const uint32_t rank = begin + ranks[w] + g + s;
              const bool is_there = g + s < counts[w] && rank < problem.capacity;
              values[s][w] = load_global_if(is_there, problem.values + rank);
            }
          }
#pragma unroll
          for (uint32_t s = 0; s < kAtOnce; ++s) {
#pragma unroll
            for (uint32_t w = 0; w < 2; ++w) put(w, values[s][w]);
          }
        }
      }
      passed = total;
    }
    // `wgmma` sees it, and the slot is free.
    fence_stores();
    __syncwarp();
    if (lane == 0) barrier_arrive(full + 8 * stage.at);
    go_on();
  }
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
  // Where a lane reads dY as the left operand: a row of eight channels, by the pattern of 128 bytes.
  const uint32_t left_at = base + shared.dy + group * C::P * 128 + (lane / 16 * 8 + lane % 8) * 128 +
                           ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
  constexpr uint32_t kEach = C::kEach;
  float sums[C::N / kEach][kEach / 2];
#pragma unroll
  for (uint32_t n = 0; n < C::N / 2; ++n) sums[n / (kEach / 2)][n % (kEach / 2)] = 0.f;
  const uint64_t x_at = descriptor<C::P>(base + (C::kLeftIsX ? group * C::P * 128 : 0));
  Stage x, y;
  const auto give_back = [&](uint32_t x_stage, uint32_t y_stage) {
    if (lane == 0) {
      barrier_arrive(x_empty + 8 * x_stage);
      barrier_arrive(y_empty + 8 * y_stage);
    }
  };
  uint32_t x_before = 0, y_before = 0;  // stages of the chunk before
  for (uint32_t chunk = part.begin; chunk < part.end; ++chunk) {
    barrier_wait(x_full + 8 * x.at, x.turn & 1);
    barrier_wait(y_full + 8 * y.at, y.turn & 1);
    const uint64_t own_x = x_at + x.at * (C::kXBytes / 16);
    if constexpr (C::kLeftIsX) {
      const uint64_t own_y = descriptor<C::P>(base + shared.dy) + y.at * (C::kYBytes / 16);
      wgmma_fence();
#pragma unroll
      for (uint32_t k = 0; k < C::P / 16; ++k) {
#pragma unroll
        for (uint32_t n = 0; n < C::N / kEach; ++n) {
          Wgmma<kEach>::template multiply<typename C::T>(
              sums[n], own_x + k * 128, own_y + k * 128 + n * (kEach / 64) * (C::P * 8));
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // those of the chunk before are over
      if (chunk > part.begin) give_back(x_before, y_before);
      x_before = x.at, y_before = y.at;
    } else {
      // dY is read once for two products. They have to be over before its registers are written again,
      // so tiles are given back at once, which unpacking warps wait for.
      const uint32_t from = left_at + y.at * C::kYBytes;
      uint32_t left[C::P / 16][4];
#pragma unroll
      for (uint32_t k = 0; k < C::P / 16; ++k) load_left(left[k], from + k * 16 * 128);
      wgmma_fence();
#pragma unroll
      for (uint32_t k = 0; k < C::P / 16; ++k) {
#pragma unroll
        for (uint32_t n = 0; n < C::N / kEach; ++n) {
          Wgmma<kEach>::template multiply<typename C::T>(
              sums[n], left[k], own_x + k * 128 + n * (kEach / 64) * (C::P * 8));
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      give_back(x.at, y.at);
    }
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
    for (uint32_t u = 0; u < C::kUnpackers * kSlots; ++u) barrier_init(base + shared.arrivals + 8 * u, 1);
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
  const auto fits = [&](uint32_t room) {
    return Shared<C>(problem.x_stages, problem.dy_stages, room).bytes <= bytes;
  };
  while (!fits(C::kLeastRoom)) {
    uint32_t& more = problem.x_stages * C::kXBytes > problem.dy_stages * C::kYBytes ? problem.x_stages
                                                                                    : problem.dy_stages;
    if (more == 2) return false;
    --more;
  }
  problem.room = C::kLeastRoom;
  while (problem.room < kTileValues * C::kTilesOfUnit && fits(problem.room + 8)) problem.room += 8;
  return true;
}

}  // namespace hopper
}  // namespace swat
