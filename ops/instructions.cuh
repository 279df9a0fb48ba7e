// Instructions that C++ has no word for, and that several kernels use.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace swat {

__device__ __forceinline__ uint32_t shared_address(const void* of) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(of));
}
__device__ __forceinline__ void store_word(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
// A value, or zero: then nothing is read. As branches the conditions would cost several times as much.
__device__ __forceinline__ uint32_t load_value_if(bool condition, const uint16_t* from) {
  uint32_t value;
  asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.global.nc.u16 %0, [%2]; }"
      : "=&r"(value)
      : "r"(static_cast<uint32_t>(condition)), "l"(from));
  return value;
}
// Four matrices of 8 x 8 values, transposed; lane l says where row l % 8 of matrix l / 8 begins.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
#endif
}
// 16 x 8 sums += 16 x 16 values times 16 x 8 values.
template <typename T>
__device__ __forceinline__ void multiply_matrices(float (&sums)[4], const uint32_t (&left)[4], uint32_t low,
                                                  uint32_t high) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high));
  }
#endif
}

}  // namespace swat
