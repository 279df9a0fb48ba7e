// A convolution with single sparse weights on CUDA cores: `forward` in
// swat_jax/sparse_conv_direct.py. What a block does stands in sparse_conv_direct.cuh.

#include "sparse_conv_direct.cuh"

#include "handlers.cuh"

namespace swat {
namespace {

static_assert(direct::kBlock == kThreads);

struct DirectGpu {
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x; }
  // The same register for all lanes, so that branches on it are known to be taken together.
  static __device__ __forceinline__ uint32_t warp() {
    return __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
  }
  static __device__ __forceinline__ uint32_t block() { return blockIdx.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  static __device__ __forceinline__ uint32_t shuffle(uint32_t value, int lane) {
    return __shfl_sync(kFullWarp, value, lane);
  }
  static __device__ __forceinline__ uint32_t load(const int32_t* from) {
    return static_cast<uint32_t>(__ldg(from));
  }
  // What is not there is zero. As branches the conditions would cost several times as much.
  static __device__ __forceinline__ uint32_t load_if(bool condition, const int32_t* from) {
    uint32_t value;
    asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.global.nc.u32 %0, [%2]; }"
        : "=&r"(value)
        : "r"(static_cast<uint32_t>(condition)), "l"(from));
    return value;
  }
  static __device__ __forceinline__ float weight(const float* from, bool is_there) {
    return __uint_as_float(load_if(is_there, reinterpret_cast<const int32_t*>(from)));
  }
  template <typename T>
  static __device__ __forceinline__ float weight(const T* from, bool is_there) {
    uint16_t bits;
    asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; mov.u16 %0, 0; @p ld.global.nc.u16 %0, [%2]; }"
        : "=&h"(bits)
        : "r"(static_cast<uint32_t>(is_there)), "l"(from));
    return to_float(reinterpret_cast<const T&>(bits));
  }
  static __device__ __forceinline__ direct::Four four(const float* from, bool is_there) {
    float4 found = make_float4(0.f, 0.f, 0.f, 0.f);
    if (is_there) found = __ldg(reinterpret_cast<const float4*>(from));
    return {{found.x, found.y, found.z, found.w}};
  }
  template <typename T>
  static __device__ __forceinline__ direct::Four four(const T* from, bool is_there) {
    uint2 found = make_uint2(0, 0);
    if (is_there) found = __ldg(reinterpret_cast<const uint2*>(from));
    const T* const values = reinterpret_cast<const T*>(&found);
    return {{to_float(values[0]), to_float(values[1]), to_float(values[2]), to_float(values[3])}};
  }
  template <typename T>
  static __device__ __forceinline__ void store(T* to, const direct::Four& from) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(from.v[0], from.v[1], from.v[2], from.v[3]);
    } else {
      const T values[4] = {from_float<T>(from.v[0]), from_float<T>(from.v[1]),
                           from_float<T>(from.v[2]), from_float<T>(from.v[3])};
      uint2 word;
      memcpy(&word, values, sizeof(word));
      *reinterpret_cast<uint2*>(to) = word;
    }
  }
};

// Two blocks share a multiprocessor where their sums leave enough registers: while one stages, the
// other one multiplies.
template <typename T, int kUnits, int kStrip, int kOutputs>
__global__ void __launch_bounds__(kThreads, kUnits* kOutputs <= 16 ? 2 : 1)
    sparse_conv_direct_kernel(const __grid_constant__ direct::Problem<T> problem) {
  extern __shared__ uint4 dynamic[];
  direct::forward<DirectGpu, kUnits, kStrip, kOutputs>(
      DirectGpu{}, problem, reinterpret_cast<unsigned char*>(dynamic));
}

template <typename T, int kUnits, int kStrip, int kOutputs>
cudaError_t launch_direct(cudaStream_t stream, const direct::Problem<T>& problem) {
  const auto kernel = sparse_conv_direct_kernel<T, kUnits, kStrip, kOutputs>;
  const uint32_t shared = problem.plan.bytes();
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  // As many blocks as fit: the cache beside shared memory has nothing to keep.
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
  if (code != cudaSuccess) return code;
  const uint64_t blocks = direct::Part<kUnits, kStrip, kOutputs>::blocks(problem.plan);
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(problem);
  return cudaGetLastError();
}

constexpr int64_t kStrip = 4;  // rows of a lane where windows are kept as a whole

// TILES and WINDOW_TILES in swat_jax/sparse_conv_direct.py: pixels and output channels of a block.
template <typename T>
cudaError_t launch_direct_tile(cudaStream_t stream, const direct::Problem<T>& problem,
                               int64_t pixels, int64_t outputs, bool windows, bool& found) {
  const auto is = [&](int64_t p, int64_t o) { return pixels == p && outputs == o; };
  found = true;
  if (windows) {
    if (is(512, 32)) return launch_direct<T, 4, 4, 4>(stream, problem);
    if (is(512, 64)) return launch_direct<T, 4, 4, 8>(stream, problem);
  } else {
    if (is(256, 64)) return launch_direct<T, 2, 1, 8>(stream, problem);
    if (is(256, 128)) return launch_direct<T, 2, 1, 16>(stream, problem);
    if (is(512, 32)) return launch_direct<T, 4, 1, 4>(stream, problem);
    if (is(512, 64)) return launch_direct<T, 4, 1, 8>(stream, problem);
    if (is(128, 64)) return launch_direct<T, 1, 1, 8>(stream, problem);
  }
  found = false;
  return cudaSuccess;
}

inline bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

ffi::Error sparse_conv_direct(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer values,
                              ffi::AnyBuffer positions, ffi::AnyBuffer starts,
                              ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> window,
                              ffi::Span<const int64_t> strides, ffi::Span<const int64_t> lows,
                              ffi::Span<const int64_t> tile, int64_t chunk, int64_t columns,
                              bool windows) {
  constexpr const char* kOp = "sparse_conv_direct";
  if (window.size() != 2 || strides.size() != 2 || lows.size() != 2 || tile.size() != 2) {
    return invalid(std::string(kOp) + ": window, strides, lows and tile must have two numbers each");
  }
  int64_t batch = 1, batch_of_y = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", x, 4, batch));
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "y", *y, 4, batch_of_y));
  const auto last = [](auto dims, size_t from_end) { return dims[dims.size() - from_end]; };
  const auto input = x.dimensions(), output = y->dimensions();
  const int64_t images = last(input, 4), in = last(input, 1), out = last(output, 1);
  bool fits = batch == batch_of_y && last(output, 4) == images && in % 4 == 0 && out % 4 == 0;
  for (const int64_t size : {in, out, window[0], window[1], strides[0], strides[1]}) {
    fits = fits && size >= 1 && size <= 65536;
  }
  for (const int64_t low : {lows[0], lows[1]}) fits = fits && low >= 0 && low <= 65536;
  for (size_t axis = 1; axis <= 4; ++axis) {
    fits = fits && last(input, axis) >= 1 && last(output, axis) >= 1;
  }
  if (!fits || window[0] * window[1] > 4096) {
    return invalid(std::string(kOp) + ": y (images, rows, columns, out) must fit x (images, height, "
                   "width, in), with channels that are multiples of 4, and window, of at most 4096 "
                   "taps, strides and lows be in range");
  }
  if (!is_power_of_two(chunk) || chunk < 4 || chunk > 256 || columns < 1 ||
      columns > last(output, 2)) {
    return invalid(std::string(kOp) + ": chunk must be a power of two from 4 to 256, and columns 1 to " +
                   std::to_string(last(output, 2)) + "; got " + std::to_string(chunk) + ", " +
                   std::to_string(columns));
  }
  // Pixels and units are 32-bit words, zeros around them included.
  const double pads = static_cast<double>(window[0] + lows[0]) * (window[1] + lows[1]);
  const double places = (static_cast<double>(last(input, 3)) + last(output, 3)) *
                        (static_cast<double>(last(input, 2)) + last(output, 2)) + pads;
  if ((static_cast<double>(images) + 4) * places >= 2147483648.0) {
    return invalid(std::string(kOp) + ": x and y must have fewer than 2**31 pixels, with zeros around "
                   "them");
  }
  const auto word = [](int64_t value) { return static_cast<uint32_t>(value); };
  const direct::Shape shape = {
      word(images),         word(last(input, 3)),  word(last(input, 2)), word(in),
      word(last(output, 3)), word(last(output, 2)), word(out),
      {word(window[0]), word(window[1])}, {word(strides[0]), word(strides[1])},
      {word(lows[0]), word(lows[1])}};
  if (windows && (window[0] != 3 || window[1] != 3 || strides[0] != 1 || strides[1] != 1)) {
    return invalid(std::string(kOp) + ": windows must be 3x3 at stride 1 to be kept as a whole");
  }
  const int64_t strip = windows ? kStrip : 1, run = tile[0] / direct::kImages / strip;
  if (run < 32 || run > 1024) return invalid(std::string(kOp) + ": tile has no pixels");
  const direct::Plan plan(shape, word(run), word(strip), word(chunk), word(columns));
  const ffi::DataType type = x.element_type();
  const int64_t multiple = windows ? 1 : direct::kMultiple, each = windows ? direct::kRoom : 1;
  const int64_t size = windows ? chunk : plan.shape.taps() * chunk, chunks = plan.chunks;
  const int64_t room = (size + multiple - 1) / multiple * multiple * chunks;
  const int64_t of_x = count_of(x) / batch, of_y = count_of(*y) / batch;
  SWAT_RETURN_IF_ERROR(check(kOp, "x", x, type, batch * of_x, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "y", *y, type, batch * of_y, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "values", values, type, batch * out * room * each, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "positions", positions, ffi::S32, batch * out * room));
  SWAT_RETURN_IF_ERROR(check(kOp, "starts", starts, ffi::S32, batch * out * (chunks + 1)));
  int device = 0, most = 0;
  SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetDevice(&device)));
  SWAT_RETURN_IF_ERROR(cuda_error(
      kOp, cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  const double bytes = static_cast<double>(plan.channel) * chunk * direct::kUnitBytes;
  if (bytes > most || static_cast<int64_t>(plan.bytes()) > most) {
    return invalid(std::string(kOp) + ": chunk and columns need " + std::to_string(bytes) +
                   " bytes of shared memory and more, and the GPU has " + std::to_string(most));
  }
  return with_type(kOp, "x", type, [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const direct::Problem<T> problem = {
          plan,
          static_cast<const T*>(x.untyped_data()) + b * of_x,
          static_cast<const T*>(values.untyped_data()) + b * out * room * each,
          static_cast<const int32_t*>(positions.untyped_data()) + b * out * room,
          static_cast<const int32_t*>(starts.untyped_data()) + b * out * (chunks + 1),
          static_cast<T*>(y->untyped_data()) + b * of_y,
          static_cast<uint64_t>(room)};
      bool found = false;
      const cudaError_t code = launch_direct_tile<T>(stream, problem, tile[0], tile[1],
                                                        windows, found);
      if (!found) {
        return invalid(std::string(kOp) + ": there is no tile of " + std::to_string(tile[0]) +
                       " pixels and " + std::to_string(tile[1]) + " channels");
      }
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, code));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_sparse_conv_direct, swat::sparse_conv_direct,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .Arg<xla::ffi::AnyBuffer>()  // positions
                                  .Arg<xla::ffi::AnyBuffer>()  // starts
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("lows")
                                  .Attr<xla::ffi::Span<const int64_t>>("tile")
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("columns")
                                  .Attr<bool>("windows"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
