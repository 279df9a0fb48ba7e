// Instructions that only Hopper has, and others that only its kernel uses: barriers in shared memory, the
// copy engine, loads and stores by address, `wgmma`. A function for each, and nothing of what a kernel
// makes of them. Where SWAT_EMULATE is defined (tests/emulate_sparse_conv_hopper.cpp) the same functions
// for a CPU are there already, with those of instructions.cuh.

#pragma once

#ifndef SWAT_EMULATE

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "instructions.cuh"

namespace swat {
namespace hopper {

// Barriers in shared memory.
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

}  // namespace hopper
}  // namespace swat

#endif  // SWAT_EMULATE
