// What the handlers share: checks of operands, and launches.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "formats.cuh"
#include "xla/ffi/api/ffi.h"

namespace swat {

namespace ffi = ::xla::ffi;

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

// Positions and counts are 32-bit words.
inline ffi::Error check_size(const char* op, const char* name, int64_t n) {
  if (n < (int64_t{1} << 32)) return ffi::Error::Success();
  return invalid(std::string(op) + ": " + name + " must have fewer than 2**32 values, got " +
                 std::to_string(n));
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

// Whether the device copies to shared memory on its own, and has enough of it: 99 KB for a block.
inline bool has_queues() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 8;
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

constexpr unsigned kAnyBlocks = ~0u;

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
