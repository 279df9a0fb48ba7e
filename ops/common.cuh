// What the kernels share: float formats, wide loads, block scans, and the checks of the handlers.
//
// Work is laid out in octets (8 consecutive values of the flattened tensor, one per thread and one
// byte of a bitmap) and tiles (one octet per thread of a block).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace swat {

namespace ffi = ::xla::ffi;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kOctet = 8;
constexpr int kTile = kThreads * kOctet;  // TILE in swat_jax/sparsity/packing.py
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// ---- Float formats -----------------------------------------------------------------------------

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

// ---- Octets ------------------------------------------------------------------------------------

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

// What is rarely needed is not inlined: loops have to fit into the instruction cache.
template <typename T>
__device__ __noinline__ Octet<T> load_singly(const T* from, int64_t i, int64_t n) {
  Octet<T> octet;
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    octet.v[j] = i + j < n ? __ldcg(from + i + j) : from_float<T>(0.f);
  }
  return octet;
}

template <typename T>
__device__ __noinline__ void store_singly(Octet<T> octet, T* to, int64_t i, int64_t n) {
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if (i + j < n) to[i + j] = octet.v[j];
  }
}

// Values i..i+7 of n; what lies beyond counts as 0. `wide`: the array starts at 16 bytes. They may
// have been written by this kernel, by any block, before a barrier of the grid.
template <typename T>
__device__ __forceinline__ Octet<T> load(const T* from, int64_t i, int64_t n, bool wide) {
  if (!wide || i + kOctet > n) return load_singly(from, i, n);
  Octet<T> octet;
  const uint4* source = reinterpret_cast<const uint4*>(from + i);
  uint4* target = reinterpret_cast<uint4*>(&octet);
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(octet) / sizeof(uint4)); ++w) {
    target[w] = __ldcg(source + w);
  }
  return octet;
}

template <typename T>
__device__ __forceinline__ void store(const Octet<T>& octet, T* to, int64_t i, int64_t n,
                                      bool wide, bool whole = false) {
  if (!whole && (!wide || i + kOctet > n)) return store_singly(octet, to, i, n);
  const uint4* source = reinterpret_cast<const uint4*>(&octet);
  uint4* target = reinterpret_cast<uint4*>(to + i);
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(octet) / sizeof(uint4)); ++w) target[w] = source[w];
}

inline bool is_wide(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A bitmap is an array of 32-bit words, of which every byte belongs to one octet.
inline int64_t bitmap_words(int64_t n) { return (n + 31) / 32; }

// The bits of the octet at i, below n; those of the last octet with zeros to the end of its word.
__device__ __forceinline__ void store_bits(uint32_t* bitmap, int64_t i, int64_t n, uint32_t bits) {
  if (i >= n) return;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(bitmap);
  bytes[static_cast<uint64_t>(i) / kOctet] = static_cast<uint8_t>(bits);
  if (i + kOctet < n) return;
  for (int64_t byte = i / kOctet + 1; byte % 4 != 0; ++byte) bytes[byte] = 0;
}

__device__ __forceinline__ uint32_t load_bits(const uint32_t* bitmap, int64_t i, int64_t n) {
  return i < n ? __ldg(reinterpret_cast<const uint8_t*>(bitmap) + i / kOctet) : 0;
}

// ---- Streams -----------------------------------------------------------------------------------

// A thread's queues of octets on their way from memory: requested early, used late, so that many are
// in flight while few registers hold them. They wait in shared memory, where a thread sees only what
// it asked for itself. Before compute capability 8.0 they are loaded when they are requested.
template <typename T>
constexpr int kUsualDepth = sizeof(T) == 2 ? 4 : 2;

template <typename T, int kStreams, int kLength = kUsualDepth<T>>
struct Streams {
  static constexpr int kDepth = kLength;
  static constexpr int kPlanes = sizeof(Octet<T>) / sizeof(uint4);
  static constexpr size_t kBytes = sizeof(uint4) * kThreads * kPlanes * kStreams * kDepth;

  uint4* memory;  // shared, kBytes of it

  __device__ uint4* slot(int turn, int stream, int plane) const {
    return memory + ((turn % kDepth * kStreams + stream) * kPlanes + plane) * kThreads +
           threadIdx.x;
  }
  // Values i..i+7 of n, as in `load`. `whole`: they are known to be there, and at 16 bytes.
  __device__ void request(int turn, int stream, const T* from, int64_t i, int64_t n, bool wide,
                          bool whole = false) const {
#if __CUDA_ARCH__ >= 800
    if (whole || (wide && i + kOctet <= n)) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(slot(turn, stream, plane)));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
                     "l"(reinterpret_cast<const uint4*>(from + i) + plane)
                     : "memory");
      }
      return;
    }
#endif
    const Octet<T> octet = load(from, i, n, wide);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      *slot(turn, stream, plane) = reinterpret_cast<const uint4*>(&octet)[plane];
    }
  }
  // Ends the requests of one turn, of which there must be one for every turn.
  __device__ void commit() const {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  // Waits until what was requested kDepth - 1 turns ago is here.
  __device__ void wait() const {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - 1) : "memory");
#endif
  }
  __device__ Octet<T> take(int turn, int stream) const {
    Octet<T> octet;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      reinterpret_cast<uint4*>(&octet)[plane] = *slot(turn, stream, plane);
    }
    return octet;
  }
};

// Stores the values that have a flag one after the other, from an address in shared memory on. As
// branches the conditions would cost several times as much.
template <typename T>
__device__ __forceinline__ void append(const Octet<T>& octet, uint32_t flags, unsigned address) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&octet);
#pragma unroll
  for (int j = 0; j < kOctet; ++j) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t value = j % 2 == 0 ? words[j / 2] : words[j / 2] >> 16;
      asm volatile(
          "{ .reg .pred p; .reg .b32 t; .reg .b16 v, w; and.b32 t, %1, %3; setp.ne.u32 p, t, 0; "
          "mov.b32 {v, w}, %2; @p st.shared.b16 [%0], v; @p add.u32 %0, %0, 2; }"
          : "+r"(address)
          : "r"(flags), "r"(value), "r"(1u << j)
          : "memory");
    } else {
      asm volatile(
          "{ .reg .pred p; .reg .b32 t; and.b32 t, %1, %3; setp.ne.u32 p, t, 0; "
          "@p st.shared.b32 [%0], %2; @p add.u32 %0, %0, 4; }"
          : "+r"(address)
          : "r"(flags), "r"(words[j]), "r"(1u << j)
          : "memory");
    }
  }
}

// Counts in shared memory where a condition holds; the same goes for it.
__device__ __forceinline__ void count_if(uint32_t condition, uint32_t* counter) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(counter));
  asm volatile(
      "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p red.shared.add.u32 [%1], 1; }" ::"r"(condition),
      "r"(address)
      : "memory");
}

// ---- Sources -----------------------------------------------------------------------------------

// A Source makes values of what it reads: `request` and `take` go through a queue, `peek` reads
// directly, `keep` stores what was made. Beyond the end it makes zeros. `whole`: the octet is known
// not to reach beyond the end, and `is_wide`.

// Values that lie in memory.
template <typename T>
struct Values {
  static constexpr int kStreams = 1;
  const T* from;
  int64_t n;
  bool wide;
  Values(const T* from, int64_t n) : from(from), n(n), wide(is_wide(from)) {}
  __device__ void prepare() {}
  template <typename Queue>
  __device__ void request(const Queue& queue, int turn, int64_t i, bool whole = false) const {
    queue.request(turn, 0, from, i, n, wide, whole);
  }
  template <typename Queue>
  __device__ Octet<T> take(const Queue& queue, int turn, int64_t, bool = false) const {
    return queue.take(turn, 0);
  }
  __device__ Octet<T> peek(int64_t i) const { return load(from, i, n, wide); }
  __device__ void keep(const Octet<T>&, int64_t, bool = false) const {}
};

// Walks over all octets of a Source: `use(octet, i)` for each. Threads end where their octets end.
template <typename T, int kDepth = kUsualDepth<T>, typename Source, typename Use>
__device__ void for_each_octet(const Source& source, int64_t n, uint4* shared, Use use) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  const Queue queue{shared};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTile;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kOctet, ahead = i;
  const auto request = [&](int turn) {
    if (ahead < n) source.request(queue, turn, ahead);
    queue.commit();
    ahead += stride;
  };
  for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
  for (int turn = 0; i < n; i += stride, ++turn) {
    request(turn + Queue::kDepth - 1);
    queue.wait();
    use(source.take(queue, turn, i), i);
  }
}

// ---- Warps and blocks --------------------------------------------------------------------------

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullWarp, value);
#else
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
#endif
}

// Exclusive prefix sum over the lanes of a warp.
template <typename Number>
__device__ __forceinline__ Number warp_scan(Number value) {
  Number sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number other = __shfl_up_sync(kFullWarp, sum, step);
    if (static_cast<int>(threadIdx.x) % 32 >= step) sum += other;
  }
  return sum - value;
}

// Exclusive prefix sum over the threads of a block.
// `totals` is shared memory that nobody else uses until the next barrier of the caller.
__device__ __forceinline__ uint64_t block_scan(uint64_t value, uint64_t (&totals)[kWarps],
                                               uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t in_warp = warp_scan(value);
  if (lane == 31) totals[warp] = in_warp + value;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += totals[w];
    total += totals[w];
  }
  return before + in_warp;
}

// Whether this block is the last of the grid to get here; all that the others wrote is visible.
__device__ __forceinline__ bool is_last_block(uint32_t* arrived, uint32_t blocks, uint32_t& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared = atomicAdd(arrived, 1u);
  __syncthreads();
  const bool last = shared == blocks - 1;
  if (last) __threadfence();
  return last;
}

// ---- Handlers ----------------------------------------------------------------------------------

inline ffi::Error invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("swat_jax: " + message);
}

inline ffi::Error cuda_error(const char* op, cudaError_t code) {
  if (code == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("swat_jax: ") + op + ": " + cudaGetErrorString(code));
}

#define SWAT_RETURN_IF_ERROR(expression)              \
  do {                                                \
    ::xla::ffi::Error swat_error = (expression);      \
    if (swat_error.failure()) return swat_error;      \
  } while (0)

template <typename Buffer>
int64_t count_of(Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

// Refuses a buffer of another type, another number of values, or at an odd address.
template <typename Buffer>
ffi::Error check(const char* op, const char* name, Buffer& buffer, ffi::DataType type,
                 int64_t count, size_t alignment = 4) {
  if (buffer.element_type() != type) {
    return invalid(std::string(op) + ": " + name + " must have element type " +
                   std::to_string(static_cast<int>(type)) + ", got " +
                   std::to_string(static_cast<int>(buffer.element_type())));
  }
  if (count_of(buffer) != count) {
    return invalid(std::string(op) + ": " + name + " must have " + std::to_string(count) +
                   " values, got " + std::to_string(count_of(buffer)));
  }
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % alignment != 0) {
    return invalid(std::string(op) + ": " + name + " must start at a multiple of " +
                   std::to_string(alignment) + " bytes");
  }
  return ffi::Error::Success();
}

inline bool is_supported(ffi::DataType type) {
  return type == ffi::F32 || type == ffi::BF16 || type == ffi::F16;
}

// Calls `body` with a value of the C++ type that `type` stands for.
template <typename Body>
ffi::Error with_type(const char* op, const char* name, ffi::DataType type, Body&& body) {
  switch (type) {
    case ffi::F32: return body(float{});
    case ffi::BF16: return body(__nv_bfloat16{});
    case ffi::F16: return body(__half{});
    default:
      return invalid(std::string(op) + ": " + name +
                     " must be float32, bfloat16 or float16, got element type " +
                     std::to_string(static_cast<int>(type)));
  }
}

// Leading axes are independent problems (`jax.vmap`); the last `rank` axes are one problem.
template <typename Buffer>
ffi::Error split_batch(const char* op, const char* name, Buffer& buffer, size_t rank,
                       int64_t& batch) {
  const auto dims = buffer.dimensions();
  if (dims.size() < rank) {
    return invalid(std::string(op) + ": " + name + " must have at least " + std::to_string(rank) +
                   " axes, got " + std::to_string(dims.size()));
  }
  batch = 1;
  for (size_t axis = 0; axis + rank < dims.size(); ++axis) batch *= dims[axis];
  return ffi::Error::Success();
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}

// Whether a block may have as much shared memory.
inline bool has_shared_memory(size_t bytes) {
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         static_cast<size_t>(most) >= bytes;
}

// Blocks that live as long as there is work: as many as the device holds at once, at most `work`.
template <typename Kernel>
cudaError_t resident_blocks(Kernel kernel, size_t shared, int64_t work, unsigned& blocks) {
  if (shared > 0) {
    const cudaError_t code = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (code != cudaSuccess) return code;
  }
  int each = 0;
  const cudaError_t code =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
  if (code != cudaSuccess) return code;
  const int64_t most = static_cast<int64_t>(std::max(each, 1)) * multiprocessors();
  blocks = static_cast<unsigned>(std::max<int64_t>(std::min(most, work), 1));
  return cudaSuccess;
}

template <typename Kernel, typename... Args>
cudaError_t launch(cudaStream_t stream, Kernel kernel, size_t shared, int64_t work,
                   const Args&... args) {
  unsigned blocks = 0;
  const cudaError_t code = resident_blocks(kernel, shared, work, blocks);
  if (code != cudaSuccess) return code;
  kernel<<<blocks, kThreads, shared, stream>>>(args...);
  return cudaGetLastError();
}

// The same, at most `most` blocks, for a kernel whose blocks wait for each other: all of them run at
// once, or the launch fails.
template <typename Kernel, typename... Args>
cudaError_t launch_together(cudaStream_t stream, Kernel kernel, size_t shared, int64_t work,
                            unsigned most, Args... args) {
  unsigned blocks = 0;
  const cudaError_t code = resident_blocks(kernel, shared, work, blocks);
  if (code != cudaSuccess) return code;
  void* pointers[] = {&args...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(std::min(blocks, most)), dim3(kThreads), pointers, shared,
                                     stream);
}

}  // namespace swat
