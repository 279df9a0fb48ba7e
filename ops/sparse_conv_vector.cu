// A convolution with weights that are kept or dropped as vectors of output channels: `forward` in
// swat_jax/vector_convolution.py. What a block does stands in sparse_conv_vector.cuh.

#include "sparse_conv_vector.cuh"

#include <algorithm>
#include <type_traits>

#include "blocks.cuh"
#include "handlers.cuh"
#include "instructions.cuh"

namespace swat {
namespace {

static_assert(vectors::kBlock == kThreads);

// The hardware, of compute capability 8.0 at least.
template <typename T>
struct VectorGpu {
  static __device__ __forceinline__ uint32_t thread() { return threadIdx.x; }
  // The same register for all lanes, so that branches on it are known to be taken together.
  static __device__ __forceinline__ uint32_t warp() {
    return __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
  }
  static __device__ __forceinline__ uint32_t block() { return blockIdx.x; }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  static __device__ __forceinline__ uint32_t scan(uint32_t value) { return warp_scan(value); }
  static __device__ __forceinline__ uint32_t shuffle(uint32_t value, uint32_t lane) {
    return __shfl_sync(kFullWarp, value, static_cast<int>(lane));
  }
  // The lanes of the warp that have the same value.
  static __device__ __forceinline__ uint32_t match(uint32_t value) {
    return __match_any_sync(kFullWarp, value);
  }
  static __device__ __forceinline__ uint32_t address(const void* shared) {
    return shared_address(shared);
  }
  template <typename Value>
  static __device__ __forceinline__ void write(Value* to, Value value) {
    *to = value;
  }
  static __device__ __forceinline__ uint32_t load(const uint32_t* from) { return __ldg(from); }
  // 16 bytes, zeros if they are not there: then nothing is read. Others find them in L2: L1 is for
  // the lists.
  static __device__ __forceinline__ vectors::Row load_row(const uint16_t* from, bool is_there) {
    vectors::Row row;
    asm("{ .reg .pred p; setp.ne.u32 p, %4, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
        "mov.u32 %3, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5]; }"
        : "=&r"(row.words[0]), "=&r"(row.words[1]), "=&r"(row.words[2]), "=&r"(row.words[3])
        : "r"(static_cast<uint32_t>(is_there)), "l"(from));
    return row;
  }
  // The values that a lane has of a step: 2 or 4 words, or 4 and 4 behind those of all lanes.
  static __device__ __forceinline__ void load_words(uint32_t (&to)[2], const uint32_t* from,
                                                    uint32_t lane) {
    const uint2 found = __ldg(reinterpret_cast<const uint2*>(from) + lane);
    to[0] = found.x, to[1] = found.y;
  }
  static __device__ __forceinline__ void load_words(uint32_t (&to)[4], const uint32_t* from,
                                                    uint32_t lane) {
    const uint4 found = __ldg(reinterpret_cast<const uint4*>(from) + lane);
    to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
  }
  static __device__ __forceinline__ void load_words(uint32_t (&to)[8], const uint32_t* from,
                                                    uint32_t lane) {
    const uint4 low = __ldg(reinterpret_cast<const uint4*>(from) + lane);
    const uint4 high = __ldg(reinterpret_cast<const uint4*>(from) + 32 + lane);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }
  // A matrix of 8 x 8 values, of which lane 4 r + q has columns 2 q and 2 q + 1 of row r.
  static __device__ __forceinline__ uint32_t transpose(uint32_t word) {
    uint32_t result = 0;
#if __CUDA_ARCH__ >= 800
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(word));
#endif
    return result;
  }
  static __device__ __forceinline__ void store_word(uint32_t to, uint32_t word) {
    swat::store_word(to, word);
  }
  static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
    swat::load_matrices(to, from);
  }
  static __device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&left)[4],
                                                  uint32_t low, uint32_t high) {
    multiply_matrices<T>(sums, left, low, high);
  }
  // Two values of 16 bits, the first one low.
  static __device__ __forceinline__ uint32_t narrow(float first, float second) {
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 two = __floats2half2_rn(first, second);
      return *reinterpret_cast<const uint32_t*>(&two);
    } else {
      const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
      return *reinterpret_cast<const uint32_t*>(&two);
    }
  }
  static __device__ __forceinline__ void store_words(uint16_t* to, const uint32_t (&words)[1]) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  }
  static __device__ __forceinline__ void store_words(uint16_t* to, const uint32_t (&words)[2]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  }
  static __device__ __forceinline__ void store_words(uint16_t* to, const uint32_t (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <int V>
__global__ void __launch_bounds__(kThreads)
    arrange_kernel(const __grid_constant__ vectors::Plan plan, vectors::Lists lists,
                   const uint16_t* kernel) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 dynamic[];
  vectors::arrange<VectorGpu<__half>, V>(VectorGpu<__half>{}, plan, lists, kernel,
                                         reinterpret_cast<unsigned char*>(dynamic));
#endif
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
    forward_kernel(const __grid_constant__ vectors::Problem problem) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ uint4 dynamic[];
  vectors::forward<VectorGpu<T>, Tile>(VectorGpu<T>{}, problem,
                                       reinterpret_cast<unsigned char*>(dynamic));
#endif
}

template <int V>
cudaError_t launch_arrange(cudaStream_t stream, const vectors::Plan& plan,
                           const vectors::Lists& lists, const uint16_t* kernel) {
  arrange_kernel<V><<<plan.groups * plan.chunks, kThreads, vectors::arrange_bytes(plan), stream>>>(
      plan, lists, kernel);
  return cudaGetLastError();
}

template <typename T, typename Tile>
cudaError_t launch_forward(cudaStream_t stream, vectors::Problem& problem) {
  const auto kernel = forward_kernel<T, Tile>;
  const uint32_t shared = problem.plan.shared_bytes();
  unsigned blocks = 0;
  const cudaError_t code = resident_blocks(kernel, shared, problem.works, blocks);
  if (code != cudaSuccess) return code;
  problem.blocks = blocks;
  kernel<<<blocks, kThreads, shared, stream>>>(problem);
  return cudaGetLastError();
}

// The tiles there are: TILES in swat_jax/vector_convolution.py. `found` says whether this is one.
template <typename T, int V>
cudaError_t launch_tiles(cudaStream_t stream, vectors::Problem& problem,
                         ffi::Span<const int64_t> tile, bool& found) {
  found = true;
  const auto is = [&](int64_t lines, int64_t wide, int64_t out) {
    return tile[0] == lines && tile[1] == wide && tile[2] == out;
  };
  if (is(4, 8, 128)) return launch_forward<T, vectors::Tile<V, 4, 8, 128>>(stream, problem);
  if (is(8, 4, 128)) return launch_forward<T, vectors::Tile<V, 8, 4, 128>>(stream, problem);
  if (is(8, 8, 64)) return launch_forward<T, vectors::Tile<V, 8, 8, 64>>(stream, problem);
  if (is(4, 8, 64)) return launch_forward<T, vectors::Tile<V, 4, 8, 64>>(stream, problem);
  found = false;
  return cudaSuccess;
}

// Calls `body` with a constant that is the vector.
template <typename Body>
cudaError_t with_vector(int64_t vector, Body&& body) {
  if (vector == 8) return body(std::integral_constant<int, 8>{});
  if (vector == 16) return body(std::integral_constant<int, 16>{});
  return body(std::integral_constant<int, 32>{});
}

// What both handlers are told.
struct Options {
  ffi::Span<const int64_t> window, strides, lows, tile;
  int64_t vector, height, chunk;
};

// The problem, without its images and their sizes.
ffi::Error checked_shape(const char* op, const Options& options, int64_t in, int64_t out,
                         vectors::Shape& shape) {
  if (options.window.size() != 2 || options.strides.size() != 2 || options.lows.size() != 2 ||
      options.tile.size() != 3) {
    return invalid(std::string(op) + ": window, strides and lows must have two numbers, and tile three");
  }
  if (options.vector != 8 && options.vector != 16 && options.vector != 32) {
    return invalid(std::string(op) + ": vector must be 8, 16 or 32, got " +
                   std::to_string(options.vector));
  }
  bool fits = in % 8 == 0 && out % options.vector == 0;
  for (const int64_t size : {in, out}) fits = fits && size >= 1 && size <= 65536;
  for (int axis = 0; axis < 2; ++axis) {
    for (const int64_t size : {options.window[axis], options.strides[axis]}) {
      fits = fits && size >= 1 && size <= vectors::kMostWindow;
    }
    fits = fits && options.lows[axis] >= 0 && options.lows[axis] <= 65536;
  }
  if (!fits) {
    return invalid(std::string(op) + ": in must be a multiple of 8, out one of vector, window and "
                   "strides be at most " + std::to_string(vectors::kMostWindow) + ", and lows from 0 on");
  }
  const int64_t lines = options.tile[0], height = options.height, chunk = options.chunk;
  for (const int64_t size : options.tile) fits = fits && size >= 1 && size <= 1024;
  if (!fits || height < 1 || height > lines || lines % height != 0) {
    return invalid(std::string(op) + ": height must divide the tile's lines, got " +
                   std::to_string(height));
  }
  if (chunk < vectors::kSlice || chunk > 1024 || (chunk & (chunk - 1)) != 0) {
    return invalid(std::string(op) + ": chunk must be a power of 2 from 32 to 1024, got " +
                   std::to_string(chunk));
  }
  const auto pair = [](ffi::Span<const int64_t> from, uint32_t (&to)[2]) {
    to[0] = static_cast<uint32_t>(from[0]), to[1] = static_cast<uint32_t>(from[1]);
  };
  shape = {1, 1, 1, static_cast<uint32_t>(in), 1, 1, static_cast<uint32_t>(out), {}, {}, {}};
  pair(options.window, shape.window);
  pair(options.strides, shape.strides);
  pair(options.lows, shape.lows);
  return ffi::Error::Success();
}

vectors::Plan plan_of(const vectors::Shape& shape, const Options& options) {
  const auto word = [](int64_t value) { return static_cast<uint32_t>(value); };
  return vectors::Plan(shape, word(options.vector), word(options.tile[0]), word(options.height),
                       word(options.tile[1]), word(options.tile[2]), word(options.chunk));
}

// Of every problem of a batch.
template <typename Offsets, typename Values, typename Steps>
ffi::Error check_lists(const char* op, const vectors::Plan& plan, int64_t batch, Offsets& offsets,
                       Values& values, Steps& steps) {
  const int64_t segments = batch * plan.groups * plan.chunks, entries = segments * plan.room;
  SWAT_RETURN_IF_ERROR(check(op, "offsets", offsets, ffi::U32, entries));
  SWAT_RETURN_IF_ERROR(check(op, "values", values, ffi::U32, entries * plan.vector / 2, 16));
  return check(op, "steps", steps, ffi::U32, segments);
}
template <typename Offsets, typename Values, typename Steps>
vectors::Lists lists_of(const vectors::Plan& plan, int64_t problem, Offsets& offsets, Values& values,
                        Steps& steps) {
  const int64_t segments = int64_t{plan.groups} * plan.chunks, entries = segments * plan.room;
  const auto part = [&](auto& buffer, int64_t count) {
    return static_cast<uint32_t*>(buffer.untyped_data()) + problem * count;
  };
  return {part(offsets, entries), part(values, entries * plan.vector / 2), part(steps, segments)};
}

ffi::Error check_type(const char* op, const char* name, ffi::DataType type) {
  if (type != ffi::BF16 && type != ffi::F16) {
    return invalid(std::string(op) + ": " + name + " must be bfloat16 or float16, got element type " +
                   std::to_string(static_cast<int>(type)));
  }
  if (has_queues()) return ffi::Error::Success();
  return invalid(std::string(op) + ": needs a GPU of compute capability 8.0 or newer");
}

int64_t axis(ffi::Span<const int64_t> dims, size_t from_end) { return dims[dims.size() - from_end]; }

ffi::Error sparse_conv_vector_lists(cudaStream_t stream, ffi::AnyBuffer kernel,
                                    ffi::Result<ffi::AnyBuffer> offsets,
                                    ffi::Result<ffi::AnyBuffer> values,
                                    ffi::Result<ffi::AnyBuffer> steps, ffi::Span<const int64_t> window,
                                    ffi::Span<const int64_t> strides, ffi::Span<const int64_t> lows,
                                    ffi::Span<const int64_t> tile, int64_t vector, int64_t height,
                                    int64_t chunk) {
  constexpr const char* kOp = "sparse_conv_vector_lists";
  const Options options = {window, strides, lows, tile, vector, height, chunk};
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "kernel", kernel, 4, batch));
  const auto dims = kernel.dimensions();
  vectors::Shape shape;
  SWAT_RETURN_IF_ERROR(checked_shape(kOp, options, axis(dims, 2), axis(dims, 1), shape));
  if (axis(dims, 4) != window[0] || axis(dims, 3) != window[1]) {
    return invalid(std::string(kOp) + ": kernel must begin with the sizes of window");
  }
  const vectors::Plan plan = plan_of(shape, options);
  const ffi::DataType type = kernel.element_type();
  SWAT_RETURN_IF_ERROR(check_type(kOp, "kernel", type));
  const int64_t count = count_of(kernel);
  SWAT_RETURN_IF_ERROR(check(kOp, "kernel", kernel, type, count, 16));
  SWAT_RETURN_IF_ERROR(check_lists(kOp, plan, batch, *offsets, *values, *steps));
  for (int64_t b = 0; b < batch; ++b) {
    const vectors::Lists lists = lists_of(plan, b, *offsets, *values, *steps);
    const uint16_t* const own = static_cast<const uint16_t*>(kernel.untyped_data()) + b * (count / batch);
    const cudaError_t code = with_vector(vector, [&](auto number) {
      return launch_arrange<decltype(number)::value>(stream, plan, lists, own);
    });
    SWAT_RETURN_IF_ERROR(cuda_error(kOp, code));
  }
  return ffi::Error::Success();
}

ffi::Error sparse_conv_vector_forward(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer offsets,
                                      ffi::AnyBuffer values, ffi::AnyBuffer steps,
                                      ffi::Result<ffi::AnyBuffer> y, ffi::Span<const int64_t> window,
                                      ffi::Span<const int64_t> strides, ffi::Span<const int64_t> lows,
                                      ffi::Span<const int64_t> tile, int64_t vector, int64_t height,
                                      int64_t chunk) {
  constexpr const char* kOp = "sparse_conv_vector_forward";
  const Options options = {window, strides, lows, tile, vector, height, chunk};
  int64_t batch = 1, batch_of_y = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", x, 4, batch));
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "y", *y, 4, batch_of_y));
  const auto input = x.dimensions(), result = y->dimensions();
  vectors::Shape shape;
  SWAT_RETURN_IF_ERROR(checked_shape(kOp, options, axis(input, 1), axis(result, 1), shape));
  bool fits = batch == batch_of_y && axis(input, 4) == axis(result, 4);
  double pixels = 1, results = 1;
  for (size_t from_end = 2; from_end <= 4; ++from_end) {
    for (const int64_t size : {axis(input, from_end), axis(result, from_end)}) {
      fits = fits && size >= 1 && size < int64_t{1} << 24;
    }
    pixels *= static_cast<double>(axis(input, from_end));
    results *= static_cast<double>(axis(result, from_end));
  }
  if (!fits || pixels >= 2147483648.0 || results >= 2147483648.0) {
    return invalid(std::string(kOp) + ": x (images, height, width, in) and y (images, rows, columns, "
                   "out) must fit each other and have fewer than 2**31 pixels");
  }
  shape.images = static_cast<uint32_t>(axis(input, 4));
  shape.height = static_cast<uint32_t>(axis(input, 3));
  shape.width = static_cast<uint32_t>(axis(input, 2));
  shape.rows = static_cast<uint32_t>(axis(result, 3));
  shape.columns = static_cast<uint32_t>(axis(result, 2));
  vectors::Problem problem = {plan_of(shape, options), nullptr, {}, nullptr, 0, 0};
  const ffi::DataType type = x.element_type();
  SWAT_RETURN_IF_ERROR(check_type(kOp, "x", type));
  const int64_t count = count_of(x), count_of_y = count_of(*y);
  SWAT_RETURN_IF_ERROR(check(kOp, "x", x, type, count, 16));
  SWAT_RETURN_IF_ERROR(check(kOp, "y", *y, type, count_of_y, 16));
  SWAT_RETURN_IF_ERROR(check_lists(kOp, problem.plan, batch, offsets, values, steps));
  problem.works = problem.plan.works();
  for (int64_t b = 0; b < batch; ++b) {
    problem.x = static_cast<const uint16_t*>(x.untyped_data()) + b * (count / batch);
    problem.y = static_cast<uint16_t*>(y->untyped_data()) + b * (count_of_y / batch);
    problem.lists = lists_of(problem.plan, b, offsets, values, steps);
    bool found = false;
    const cudaError_t code = with_vector(vector, [&](auto number) {
      constexpr int V = decltype(number)::value;
      return type == ffi::BF16 ? launch_tiles<__nv_bfloat16, V>(stream, problem, tile, found)
                               : launch_tiles<__half, V>(stream, problem, tile, found);
    });
    SWAT_RETURN_IF_ERROR(cuda_error(kOp, code));
    if (!found) {
      return invalid(std::string(kOp) + ": there is no tile of " + std::to_string(tile[0]) +
                     " lines of " + std::to_string(tile[1]) + " pixels in " + std::to_string(tile[2]) +
                     " channels");
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_sparse_conv_vector_lists, swat::sparse_conv_vector_lists,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // kernel
                                  .Ret<xla::ffi::AnyBuffer>()  // offsets
                                  .Ret<xla::ffi::AnyBuffer>()  // values
                                  .Ret<xla::ffi::AnyBuffer>()  // steps
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("lows")
                                  .Attr<xla::ffi::Span<const int64_t>>("tile")
                                  .Attr<int64_t>("vector")
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("chunk"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_sparse_conv_vector_forward, swat::sparse_conv_vector_forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // offsets
                                  .Arg<xla::ffi::AnyBuffer>()  // values
                                  .Arg<xla::ffi::AnyBuffer>()  // steps
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("lows")
                                  .Attr<xla::ffi::Span<const int64_t>>("tile")
                                  .Attr<int64_t>("vector")
                                  .Attr<int64_t>("height")
                                  .Attr<int64_t>("chunk"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
