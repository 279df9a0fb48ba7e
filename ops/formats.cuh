// Float formats, octets of values, and how magnitudes are compared.
//
// Work is laid out in octets (8 consecutive values of the flattened tensor, one per thread and one
// byte of a bitmap) and tiles (one octet per thread of a block).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace swat {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kOctet = 8;
constexpr int kTile = kThreads * kOctet;  // TILE in swat_jax/sparsity/packing.py
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// ---- Float formats ------------------------------------------------------------------------------

// The magnitude of a float is its bit pattern without the sign; all NaNs count as the pattern one
// above infinity's, as in swat_jax/sparsity/top_k.py.
template <typename T>
struct Format;

template <>
struct Format<__nv_bfloat16> {
  static constexpr uint32_t kNan = 0x7f81;
  static __device__ uint32_t bits(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
  static __device__ float from_magnitude(uint32_t magnitude) {
    return __uint_as_float(magnitude << 16);
  }
};

template <>
struct Format<__half> {
  static constexpr uint32_t kNan = 0x7c01;
  static __device__ uint32_t bits(__half value) { return __half_as_ushort(value); }
  static __device__ float from_magnitude(uint32_t magnitude) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(magnitude)));
  }
};

template <>
struct Format<float> {
  static constexpr uint32_t kNan = 0x7f800001;
  static __device__ uint32_t bits(float value) { return __float_as_uint(value); }
  static __device__ float from_magnitude(uint32_t magnitude) { return __uint_as_float(magnitude); }
};

template <typename T>
__device__ __forceinline__ uint32_t unsigned_bits(T value) {
  return Format<T>::bits(value) & ((1u << (8 * sizeof(T) - 1)) - 1);
}
template <typename T>
__device__ __forceinline__ uint32_t magnitude(T value) {
  return min(unsigned_bits(value), Format<T>::kNan);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The smallest magnitude of T that reaches a magnitude of float32. No NaN is below kNan's.
template <typename T>
__device__ __forceinline__ uint32_t least_magnitude(uint32_t wide);
template <>
__device__ __forceinline__ uint32_t least_magnitude<float>(uint32_t wide) {
  return wide;
}
template <>
__device__ __forceinline__ uint32_t least_magnitude<__nv_bfloat16>(uint32_t wide) {
  return (wide + 0xffff) >> 16;
}
template <>
__device__ __forceinline__ uint32_t least_magnitude<__half>(uint32_t wide) {
  return wide >= Format<float>::kNan
             ? Format<__half>::kNan
             : __half_as_ushort(__float2half_ru(__uint_as_float(wide))) & 0x7fff;
}

// ---- Octets -------------------------------------------------------------------------------------

template <typename T>
struct alignas(16) Octet {
  T v[kOctet];
};

// Eight flags of four pairs, whose halves are all ones or all zeros.
__device__ __forceinline__ uint32_t flags_of(const uint32_t (&pairs)[kOctet / 2]) {
  // A byte of each, -1 or 0, times minus its weight.
  const int low = static_cast<int>(__byte_perm(pairs[0], pairs[1], 0x6420));
  const int high = static_cast<int>(__byte_perm(pairs[2], pairs[3], 0x6420));
  constexpr int kLow = static_cast<int>(0xf8fcfeffu), kHigh = static_cast<int>(0x80c0e0f0u);
  return static_cast<uint32_t>(__dp4a(low, kLow, __dp4a(high, kHigh, 0)));
}

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

// Two 16-bit values lie in one register, and are converted together.
template <typename T>
__device__ __forceinline__ void to_floats(const Octet<T>& octet, float (&to)[kOctet]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&octet);
#pragma unroll
  for (int p = 0; p < kOctet / 2; ++p) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      to[2 * p] = __uint_as_float(words[p] << 16);
      to[2 * p + 1] = __uint_as_float(words[p] & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[p]));
      to[2 * p] = pair.x, to[2 * p + 1] = pair.y;
    } else {
      to[2 * p] = octet.v[2 * p], to[2 * p + 1] = octet.v[2 * p + 1];
    }
  }
}

template <typename T>
__device__ __forceinline__ Octet<T> from_floats(const float (&from)[kOctet]) {
  Octet<T> octet;
  PairOf<T>* pairs = reinterpret_cast<PairOf<T>*>(&octet);
#pragma unroll
  for (int p = 0; p < kOctet / 2; ++p) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      pairs[p] = __floats2bfloat162_rn(from[2 * p], from[2 * p + 1]);
    } else if constexpr (std::is_same_v<T, __half>) {
      pairs[p] = __floats2half2_rn(from[2 * p], from[2 * p + 1]);
    } else {
      octet.v[2 * p] = from[2 * p], octet.v[2 * p + 1] = from[2 * p + 1];
    }
  }
  return octet;
}

// max(value, 0) of each: NaN passes, and -0 becomes 0.
template <typename T>
__device__ __forceinline__ void rectify(Octet<T>& octet) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2) {
    PairOf<T>* pairs = reinterpret_cast<PairOf<T>*>(&octet);
    const PairOf<T> zeros{from_float<T>(0.f), from_float<T>(0.f)};
#pragma unroll
    for (int p = 0; p < kOctet / 2; ++p) pairs[p] = __hmax2_nan(pairs[p], zeros);
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(octet.v[j]) : "f"(octet.v[j]));
    }
  }
#else
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (to_float(octet.v[j]) <= 0.f) octet.v[j] = from_float<T>(0.f);
  }
#endif
}

// A bit for every value whose magnitude is at least `least`, which is 1 or more and at most kNan.
template <typename T>
__device__ __forceinline__ uint32_t flags_from(const Octet<T>& octet, uint32_t least) {
  if constexpr (sizeof(T) == 2) {
    // Magnitudes above the next smaller one, which is a number; and what is none.
    const uint32_t bits = (least - 1) * 0x10001u;
    const PairOf<T> below = *reinterpret_cast<const PairOf<T>*>(&bits);
    const PairOf<T>* pairs = reinterpret_cast<const PairOf<T>*>(&octet);
    uint32_t found[kOctet / 2];
#pragma unroll
    for (int p = 0; p < kOctet / 2; ++p) found[p] = __hgtu2_mask(__habs2(pairs[p]), below);
    return flags_of(found);
  } else {
    uint32_t flags = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) flags |= (magnitude(octet.v[j]) >= least ? 1u : 0u) << j;
    return flags;
  }
}

// A bit for every value that is greater than 0.
template <typename T>
__device__ __forceinline__ uint32_t positive_flags(const Octet<T>& octet) {
  if constexpr (sizeof(T) == 2) {
    const PairOf<T> zeros{from_float<T>(0.f), from_float<T>(0.f)};
    const PairOf<T>* pairs = reinterpret_cast<const PairOf<T>*>(&octet);
    uint32_t found[kOctet / 2];
#pragma unroll
    for (int p = 0; p < kOctet / 2; ++p) found[p] = __hgt2_mask(pairs[p], zeros);
    return flags_of(found);
  } else {
    uint32_t flags = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) flags |= (octet.v[j] > 0 ? 1u : 0u) << j;
    return flags;
  }
}

// A limit that magnitudes are compared with. Thresholds travel as float32, which holds those of the
// narrower formats exactly, and others that lie between two of theirs.
template <typename T>
struct Limit {
  uint32_t wide;   // magnitude in float32
  uint32_t least;  // magnitude in T, at least 1: zeros are never kept
  __device__ explicit Limit(float threshold)
      : wide(magnitude(threshold)), least(max(least_magnitude<T>(wide), 1u)) {}
  __device__ bool keeps(T value) const { return unsigned_bits(value) >= least; }
  __device__ uint32_t flags(const Octet<T>& octet) const { return flags_from(octet, least); }
  // Of those values the ones that equal it.
  __device__ uint32_t ties(const Octet<T>& octet) const {
    uint32_t equal = 0;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      equal |= (magnitude(to_float(octet.v[j])) == wide ? 1u : 0u) << j;
    }
    return equal & flags(octet);
  }
};

}  // namespace swat
