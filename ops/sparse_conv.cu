// The weight gradient of a convolution from packed activations: `weight_gradient` in
// swat_jax/sparse_convolution.py. What a block does stands in sparse_conv.cuh; for pixels that follow one
// another Hopper has a kernel of its own, in sparse_conv_hopper.cu.

#include "sparse_conv.cuh"

#include <algorithm>
#include <limits>

#include "instructions.cuh"
#include "launch_on_hopper.cuh"
#include "packing.cuh"

namespace swat {
namespace {

static_assert(32 * conv::kWordsOfTile == kTile);

// Where pixels are gathered Hopper moves registers from warps to others, so that there are as many
// producers as consumers. Elsewhere a block with many sums has room for half as many.
constexpr int kMoving = 8, kStaying = 4;
#if __CUDA_ARCH_FEAT_SM90_ALL
#define SWAT_MOVES_REGISTERS 1
#endif
// Two blocks share a multiprocessor where their sums, or pixels to gather, leave enough registers.
SWAT_INLINE constexpr int blocks_at_once(int sums, bool gathers) {
  return sums <= 4096 && !gathers ? 2 : 1;
}

// The hardware, of compute capability 8.0 at least.
template <typename T, int Producers>
struct Gpu {
  static constexpr int kProducers = Producers, kBlock = 32 * (conv::kConsumers + kProducers);
  // A multiprocessor has 64 K of them: 512 threads start with 128.
  template <bool kConsumes>
  static __device__ __forceinline__ void registers() {
#ifdef SWAT_MOVES_REGISTERS
    if constexpr (kProducers == kMoving) {
      if constexpr (kConsumes) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
      } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
      }
    }
#endif
  }
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x; }
  // The same register for all lanes, so that branches on it are known to be taken together.
  static __device__ __forceinline__ uint32_t warp() {
    return __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
  }
  static __device__ __forceinline__ uint32_t block() { return blockIdx.x; }
  // Waits until `count` threads came to a barrier; `arrive` comes there without waiting.
  static __device__ __forceinline__ void sync(int barrier, int count) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
  }
  static __device__ __forceinline__ void arrive(int barrier, int count) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
  }
  static __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  static __device__ __forceinline__ uint32_t scan(uint32_t value) { return warp_scan(value); }
  static __device__ __forceinline__ uint32_t shuffle(uint32_t value, uint32_t lane) {
    return __shfl_sync(kFullWarp, value, static_cast<int>(lane));
  }
  static __device__ __forceinline__ uint32_t largest(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(kFullWarp, value);
#else
    return value;
#endif
  }
  static __device__ __forceinline__ uint32_t load(const uint32_t* from) { return __ldg(from); }
  static __device__ __forceinline__ uint32_t load_if(bool condition, const uint16_t* from) {
    return load_value_if(condition, from);
  }
  static __device__ __forceinline__ uint32_t take(const uint16_t* from) {
    uint32_t value;
    asm volatile("{ .reg .u16 h; ld.shared.u16 h, [%1]; cvt.u32.u16 %0, h; }"
                 : "=r"(value)
                 : "r"(shared_address(from))
                 : "memory");
    return value;
  }
  static __device__ __forceinline__ void put_if(bool condition, uint16_t* to, uint32_t index,
                                                uint32_t value) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.u16 [%1], %2; }" ::"r"(
            static_cast<uint32_t>(condition)),
        "r"(shared_address(to) + 2 * index), "r"(value)
        : "memory");
  }
  static __device__ __forceinline__ void store(float* to, float first, float second) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  }
  // 16 bytes of shared memory become zero.
  static __device__ __forceinline__ void clear(uint16_t* to) {
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
  // The first `bytes` of 16 to shared memory, the others become zeros: of none nothing is read. They
  // are on their way until `wait`.
  static __device__ __forceinline__ void copy_part(uint16_t* to, const uint16_t* from,
                                                   uint32_t bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
#endif
  }
  // A word, or zero.
  static __device__ __forceinline__ void copy_word(uint32_t* to, const uint32_t* from,
                                                   bool is_there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(is_there ? 4 : 0)
                 : "memory");
#endif
  }
  // Ends a group of copies; `wait` leaves at most so many of the last groups on their way.
  static __device__ __forceinline__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  static __device__ __forceinline__ void wait(int pending) {
    static_assert(conv::kMostStages == 8);
    switch (pending) {
      case 6: return wait_for<6>();
      case 5: return wait_for<5>();
      case 4: return wait_for<4>();
      case 3: return wait_for<3>();
      case 2: return wait_for<2>();
      case 1: return wait_for<1>();
      default: return wait_for<0>();
    }
  }
  static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const uint16_t* from) {
    swat::load_matrices(to, shared_address(from));
  }
  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4],
                                                  uint32_t low, uint32_t high) {
    multiply_matrices<T>(sums, left, low, high);
  }

 private:
  template <int kPending>
  static __device__ __forceinline__ void wait_for() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
  }
};

// Where pixels are gathered every architecture has one of the two numbers of producers: `launch_tiles`
// takes that.
template <typename T, int Producers, int M, int N, bool kGathers>
__global__ void __launch_bounds__(32 * (conv::kConsumers + Producers), blocks_at_once(M* N, kGathers))
    weight_gradient_kernel(const __grid_constant__ conv::Problem problem, const float* least) {
#if __CUDA_ARCH__ >= 800
#ifdef SWAT_MOVES_REGISTERS
  constexpr bool kIsCompiled = Producers == (kGathers ? kMoving : kStaying);
#else
  constexpr bool kIsCompiled = Producers == kStaying;
#endif
  if constexpr (kIsCompiled) {
    using Own = Gpu<T, Producers>;
    extern __shared__ uint4 dynamic[];
    conv::weight_gradient<Own, M, N, kGathers>(Own{}, problem, Limit<T>(*least).least,
                                               reinterpret_cast<unsigned char*>(dynamic));
  }
#endif
}

// Adds up the parts of all splits, always in the same order: every warp a run of them, then the warps.
// A block makes 128 sums.
constexpr int kAddWarps = 16;
__global__ void __launch_bounds__(32 * kAddWarps)
    add_splits_kernel(const float* partial, uint32_t splits, int64_t count, float* to) {
  __shared__ float4 shared[kAddWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * 4;
  const uint32_t begin = splits * warp / kAddWarps, end = splits * (warp + 1) / kAddWarps;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  const auto add = [&](const float4& more) {
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  };
  if (i < count) {
#pragma unroll 8
    for (uint32_t s = begin; s < end; ++s) {
      add(*reinterpret_cast<const float4*>(partial + s * count + i));
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= count) return;
  for (int w = 1; w < kAddWarps; ++w) add(shared[w][lane]);
  *reinterpret_cast<float4*>(to + i) = sum;
}

cudaError_t add_splits(cudaStream_t stream, const float* partial, uint32_t splits, int64_t sums,
                       float* to) {
  add_splits_kernel<<<static_cast<unsigned>((sums + 127) / 128), 32 * kAddWarps, 0, stream>>>(
      partial, splits, sums, to);
  return cudaGetLastError();
}

template <typename T, int Producers, int M, int N, bool kGathers>
cudaError_t launch_producers(cudaStream_t stream, conv::Problem problem, const float* least) {
  using Own = Gpu<T, Producers>;
  const auto kernel = weight_gradient_kernel<T, Producers, M, N, kGathers>;
  int device = 0, of_block = 0, of_all = 0, reserved = 0;
  cudaError_t code = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(of_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (code != cudaSuccess) return code;
  const int each = of_all / blocks_at_once(M * N, kGathers) - reserved;
  if (!conv::fit<Own, M, N, kGathers>(problem, static_cast<uint32_t>(std::min(of_block, each)))) {
    return cudaErrorInvalidConfiguration;
  }
  const uint32_t shared =
      conv::shared_bytes_of<Own, M, N, kGathers>(problem.shape, problem.stages, problem.room);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  kernel<<<conv::Part<M, N>::blocks(problem.shape, problem.splits), Own::kBlock, shared, stream>>>(
      problem, least);
  return cudaGetLastError();
}

template <typename T, int M, int N, bool kGathers>
cudaError_t launch_tiles(cudaStream_t stream, const conv::Problem& problem, const float* least) {
  if constexpr (kGathers) {
    cudaFuncAttributes found;
    const cudaError_t code =
        cudaFuncGetAttributes(&found, weight_gradient_kernel<T, kMoving, M, N, kGathers>);
    if (code != cudaSuccess) return code;
    // One that this architecture has not is empty, and needs next to none.
    if (found.numRegs > 64) {
      return launch_producers<T, kMoving, M, N, kGathers>(stream, problem, least);
    }
  }
  return launch_producers<T, kStaying, M, N, kGathers>(stream, problem, least);
}

// The tiles there are: TILES in swat_jax/sparse_convolution.py. `found` says whether this is one.
template <typename T>
cudaError_t launch_weight_gradient(cudaStream_t stream, const conv::Problem& problem,
                                   const float* least, int64_t m, int64_t n, bool gathers,
                                   bool& found) {
  found = true;
  const auto is = [&](int64_t a, int64_t b) { return m == a && n == b; };
  if (gathers) {
    if (is(64, 64)) return launch_tiles<T, 64, 64, true>(stream, problem, least);
    if (is(128, 128)) return launch_tiles<T, 128, 128, true>(stream, problem, least);
    if (is(128, 256)) return launch_tiles<T, 128, 256, true>(stream, problem, least);
    if (is(256, 128)) return launch_tiles<T, 256, 128, true>(stream, problem, least);
  } else {
    if (is(64, 64)) return launch_tiles<T, 64, 64, false>(stream, problem, least);
    if (is(64, 256)) return launch_tiles<T, 64, 256, false>(stream, problem, least);
    if (is(128, 128)) return launch_tiles<T, 128, 128, false>(stream, problem, least);
    if (is(128, 256)) return launch_tiles<T, 128, 256, false>(stream, problem, least);
    if (is(256, 64)) return launch_tiles<T, 256, 64, false>(stream, problem, least);
    if (is(256, 128)) return launch_tiles<T, 256, 128, false>(stream, problem, least);
  }
  found = false;
  return cudaSuccess;
}

ffi::Error sparse_conv_weight_gradient(cudaStream_t stream, ffi::AnyBuffer values,
                                       ffi::AnyBuffer bitmap, ffi::AnyBuffer offsets,
                                       ffi::AnyBuffer least, ffi::AnyBuffer dy,
                                       ffi::Result<ffi::AnyBuffer> dw,
                                       ffi::Result<ffi::AnyBuffer> scratch,
                                       ffi::Span<const int64_t> input, ffi::Span<const int64_t> strides,
                                       ffi::Span<const int64_t> lows, ffi::Span<const int64_t> tile,
                                       int64_t splits, bool gathers) {
  constexpr const char* kOp = "sparse_conv_weight_gradient";
  if (input.size() != 2 || strides.size() != 2 || lows.size() != 2 || tile.size() != 2) {
    return invalid(std::string(kOp) + ": input, strides, lows and tile must have two numbers each");
  }
  int64_t batch = 1, batch_of_dy = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "dw", *dw, 4, batch));
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "dy", dy, 4, batch_of_dy));
  const auto last = [](auto dims, size_t from_end) { return dims[dims.size() - from_end]; };
  const auto kernel = dw->dimensions(), result = dy.dimensions();
  const int64_t images = last(result, 4), rows = last(result, 3), columns = last(result, 2);
  const int64_t in = last(kernel, 2), out = last(kernel, 1);
  const int64_t most = std::numeric_limits<int>::max() / 4;
  bool fits = batch == batch_of_dy && last(result, 1) == out && in % 8 == 0 && out % 8 == 0;
  for (const int64_t size : {last(kernel, 4), last(kernel, 3), in, out, strides[0], strides[1]}) {
    fits = fits && size >= 1 && size <= 65536;
  }
  for (const int64_t size : {images, rows, columns, input[0], input[1]}) {
    fits = fits && size >= 1 && size <= most;
  }
  for (const int64_t low : {lows[0], lows[1]}) fits = fits && low >= 0 && low <= 65536;
  if (!fits) {
    return invalid(std::string(kOp) + ": dy (images, rows, columns, out) must fit dw (height, width, "
                   "in, out), with channels that are multiples of 8, and input, strides and lows be in "
                   "range");
  }
  const double everything = static_cast<double>(images) * input[0] * input[1] * in;
  if (everything >= 4294967296.0 ||
      static_cast<double>(images) * rows * columns >= 2147483648.0 - conv::pixels_of(64, 64)) {
    return invalid(std::string(kOp) + ": the input must have fewer than 2**32 values, and dy fewer "
                   "than 2**31 pixels");
  }
  const int64_t n = images * input[0] * input[1] * in;
  const int64_t pixels = images * rows * columns, sums = count_of(*dw) / batch;
  conv::Problem problem;
  problem.shape = {static_cast<uint32_t>(input[0]),
                   static_cast<uint32_t>(input[1]),
                   static_cast<uint32_t>(in),
                   static_cast<uint32_t>(rows),
                   static_cast<uint32_t>(columns),
                   static_cast<uint32_t>(out),
                   static_cast<uint32_t>(pixels),
                   {static_cast<uint32_t>(last(kernel, 4)), static_cast<uint32_t>(last(kernel, 3))},
                   {static_cast<int>(strides[0]), static_cast<int>(strides[1])},
                   {static_cast<int>(lows[0]), static_cast<int>(lows[1])}};
  const conv::Shape& shape = problem.shape;
  if (!gathers && (!shape.is_plain() || in > conv::kMostRun)) {
    return invalid(std::string(kOp) + ": gathers must be true but for windows of 1 at stride 1 and " +
                   "at most " + std::to_string(conv::kMostRun) +
                   " input channels");
  }
  const uint32_t chunks = shape.chunks(conv::pixels_of(tile[0], tile[1]));
  if (splits < 1 || splits > chunks) {
    return invalid(std::string(kOp) + ": splits must be 1 to " + std::to_string(chunks) + ", got " +
                   std::to_string(splits));
  }
  PackedShape packed;
  const ffi::DataType type = dy.element_type();
  if (type != ffi::BF16 && type != ffi::F16) {
    return invalid(std::string(kOp) + ": dy must be bfloat16 or float16, got element type " +
                   std::to_string(static_cast<int>(type)));
  }
  SWAT_RETURN_IF_ERROR(check_packed(kOp, type, n, batch, values, bitmap, offsets, packed));
  SWAT_RETURN_IF_ERROR(check(kOp, "least", least, ffi::F32, batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "dy", dy, type, batch * pixels * out, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "dw", *dw, ffi::F32, batch * sums, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::F32, batch * splits * sums, 16));
  if (!has_queues()) {
    return invalid(std::string(kOp) + ": needs a GPU of compute capability 8.0 or newer");
  }
  for (int64_t b = 0; b < batch; ++b) {
    problem.values = static_cast<const uint16_t*>(values.untyped_data()) + b * packed.capacity;
    problem.bitmap = static_cast<const uint32_t*>(bitmap.untyped_data()) + b * bitmap_words(n);
    problem.offsets = static_cast<const uint32_t*>(offsets.untyped_data()) + b * tiles_of(n);
    problem.dy = static_cast<const uint16_t*>(dy.untyped_data()) + b * pixels * out;
    problem.partial = static_cast<float*>(scratch->untyped_data()) + b * splits * sums;
    problem.capacity = static_cast<uint32_t>(packed.capacity);
    problem.words = static_cast<uint32_t>(bitmap_words(n));
    problem.splits = static_cast<uint32_t>(splits);
    const float* const limit = static_cast<const float*>(least.untyped_data()) + b;
    bool found = false;
    if (!gathers) {
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, launch_on_hopper(stream, problem, type == ffi::F16, limit, tile[0], tile[1], found)));
    }
    const auto run = [&](auto example) {
      return launch_weight_gradient<decltype(example)>(stream, problem, limit, tile[0], tile[1],
                                                       gathers, found);
    };
    if (!found) {
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, type == ffi::BF16 ? run(__nv_bfloat16{}) : run(__half{})));
    }
    if (!found) {
      return invalid(std::string(kOp) + ": there is no tile of " + std::to_string(tile[0]) + " x " +
                     std::to_string(tile[1]) + " channels");
    }
    SWAT_RETURN_IF_ERROR(cuda_error(
        kOp, add_splits(stream, problem.partial, problem.splits, sums,
                        static_cast<float*>(dw->untyped_data()) + b * sums)));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_sparse_conv_weight_gradient,
                              swat::sparse_conv_weight_gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .Arg<xla::ffi::AnyBuffer>()  // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()  // offsets
                                  .Arg<xla::ffi::AnyBuffer>()  // least
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Ret<xla::ffi::AnyBuffer>()  // dw
                                  .Ret<xla::ffi::AnyBuffer>()  // scratch
                                  .Attr<xla::ffi::Span<const int64_t>>("input")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("lows")
                                  .Attr<xla::ffi::Span<const int64_t>>("tile")
                                  .Attr<int64_t>("splits")
                                  .Attr<bool>("gathers"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
