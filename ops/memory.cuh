// Wide loads and stores, bitmaps, queues of loads, and the sources of values that kernels walk over.

#pragma once

#include <cstddef>

#include "formats.cuh"

namespace swat {

// ---- Loads and stores ---------------------------------------------------------------------------

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

__host__ __device__ inline bool is_wide(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// A bitmap is an array of 32-bit words, of which every byte belongs to one octet.
inline int64_t bitmap_words(int64_t n) { return (n + 31) / 32; }

// The bits of the octet at i, below n; those of the last octet with zeros to the end of its word.
// `whole`: it is known to be there, and not the last of its word's tail.
__device__ __forceinline__ void store_bits(uint32_t* bitmap, int64_t i, int64_t n, uint32_t bits,
                                           bool whole = false) {
  if (!whole && i >= n) return;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(bitmap);
  bytes[static_cast<uint64_t>(i) / kOctet] = static_cast<uint8_t>(bits);
  if (whole || i + kOctet < n) return;
  for (int64_t byte = i / kOctet + 1; byte % 4 != 0; ++byte) bytes[byte] = 0;
}

__device__ __forceinline__ uint32_t load_bits(const uint32_t* bitmap, int64_t i, int64_t n) {
  return i < n ? __ldg(reinterpret_cast<const uint8_t*>(bitmap) + i / kOctet) : 0;
}

// ---- Streams ------------------------------------------------------------------------------------

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
  // One 32-bit word.
  __device__ void request_word(int turn, int stream, const uint32_t* from) const {
    uint4* const to = slot(turn, stream, 0);
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
#else
    to->x = __ldg(from);
#endif
  }
  __device__ uint32_t take_word(int turn, int stream) const { return slot(turn, stream, 0)->x; }
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

// ---- Sources ------------------------------------------------------------------------------------

// A Source makes values of what it reads: `request` and `take` go through a queue, `peek` reads
// directly, at the place of the thread in some tile; `keep` stores what was made. Beyond the end it
// makes zeros. `whole`: the octet is known not to reach beyond the end, and `is_wide`.

// Values that lie in memory.
template <typename T>
struct Values {
  static constexpr int kStreams = 1;
  const T* from;
  int64_t n;
  bool wide;
  __host__ __device__ Values(const T* from, int64_t n) : from(from), n(n), wide(is_wide(from)) {}
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

// Walks over octets of a Source: `use(octet, i)` for each. Of `count` octets of this thread
// `place(turn)` says where they begin.
template <typename T, int kDepth = kUsualDepth<T>, typename Source, typename Place, typename Use>
__device__ void for_octets_at(const Source& source, int64_t count, uint4* shared, Place place,
                              Use use) {
  using Queue = Streams<T, Source::kStreams, kDepth>;
  const Queue queue{shared};
  const auto request = [&](int64_t turn) {
    if (turn < count) source.request(queue, static_cast<int>(turn), place(turn));
    queue.commit();
  };
  for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
  for (int64_t turn = 0; turn < count; ++turn) {
    request(turn + Queue::kDepth - 1);
    queue.wait();
    const int64_t i = place(turn);
    use(source.take(queue, static_cast<int>(turn), i), i);
  }
}

// The same over all octets. Threads end where their octets end.
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

}  // namespace swat
