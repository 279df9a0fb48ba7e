// The compact form of a sparse kernel: `compact` in swat_jax/sparsity/compact.py.
//
// A block takes 32 output channels, one for every lane, and one chunk of input channels; its warps
// share the chunk's positions, each a run of them. One pass counts what is kept, for every segment;
// the next one adds up the segments before its own, counts once more, run by run, and writes.

#include "handlers.cuh"

namespace swat {
namespace {

constexpr int kLanes = 32;

struct Kept {
  int taps, in, out;
  int vector, chunk, multiple;
  int groups, chunks, room;  // of all segments of a group

  __host__ __device__ int positions() const { return taps * chunk; }
};

// What one thread reads: the positions of its warp's run of one output channel.
template <typename T>
struct Run {
  const T* weights;
  int output, first, begin, end;
  bool is_there;

  __device__ Run(const Kept& kept, const T* kernel) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    output = static_cast<int>(blockIdx.x) * kLanes + static_cast<int>(threadIdx.x) % kLanes;
    first = static_cast<int>(blockIdx.y) * kept.chunk;
    begin = static_cast<int>(static_cast<int64_t>(kept.positions()) * warp / kWarps);
    end = static_cast<int>(static_cast<int64_t>(kept.positions()) * (warp + 1) / kWarps);
    is_there = output < kept.out;
    weights = kernel + output;
  }
  // `use(position, value, is_kept)` for each, all lanes of a warp together.
  template <typename Use>
  __device__ void for_each(const Kept& kept, Use use) const {
    // The lanes that share positions.
    const uint32_t own = static_cast<uint32_t>((uint64_t{1} << kept.vector) - 1)
                         << threadIdx.x % kLanes / kept.vector * kept.vector;
    int tap = begin / kept.chunk, channel = begin - tap * kept.chunk;
#pragma unroll 8
    for (int position = begin; position < end; ++position) {
      T value = from_float<T>(0.f);
      if (is_there && first + channel < kept.in) {
        value = __ldg(weights + (static_cast<int64_t>(tap) * kept.in + first + channel) * kept.out);
      }
      // NaN is not zero.
      const uint32_t found = __ballot_sync(kFullWarp, to_float(value) != 0.f);
      use(position, value, (found & own) != 0);
      if (++channel == kept.chunk) channel = 0, ++tap;
    }
  }
};

// Of segment (group, chunk) how long it is, to starts[group, chunk + 1].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    count_kept_kernel(const Kept kept, const T* kernel, int32_t* starts) {
  __shared__ int counts[kWarps][kLanes];
  const Run<T> run(kept, kernel);
  int count = 0;
  run.for_each(kept, [&](int, T, bool is_kept) { count += is_kept ? 1 : 0; });
  counts[threadIdx.x / kLanes][threadIdx.x % kLanes] = count;
  __syncthreads();
  if (threadIdx.x >= kLanes || !run.is_there || run.output % kept.vector != 0) return;
  int total = 0;
  for (int w = 0; w < kWarps; ++w) total += counts[w][threadIdx.x];
  total = (total + kept.multiple - 1) / kept.multiple * kept.multiple;
  starts[static_cast<int64_t>(run.output / kept.vector) * (kept.chunks + 1) + blockIdx.y + 1] = total;
}

// `lengths` are of the pass before, which others still read: starts go elsewhere.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    write_kept_kernel(const Kept kept, const T* kernel, const int32_t* lengths, T* values,
                      int32_t* positions, int32_t* starts) {
  __shared__ int counts[kWarps][kLanes], begins[kLanes];
  const Run<T> run(kept, kernel);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t group = run.output / kept.vector;
  const bool is_first = run.is_there && run.output % kept.vector == 0;
  int count = 0;
  run.for_each(kept, [&](int, T, bool is_kept) { count += is_kept ? 1 : 0; });
  counts[warp][lane] = count;
  if (warp == 0) {
    const int own = static_cast<int>(blockIdx.y);
    int begin = 0;
    if (run.is_there) {
      for (int c = 1; c <= own; ++c) begin += lengths[group * (kept.chunks + 1) + c];
    }
    begins[lane] = begin;
    if (is_first) {
      int32_t* const to = starts + group * (kept.chunks + 1) + own;
      to[0] = begin;
      if (own + 1 == kept.chunks) to[1] = begin + lengths[group * (kept.chunks + 1) + own + 1];
    }
  }
  __syncthreads();
  if (!run.is_there) count = 0;
  int at = begins[lane];
  for (int w = 0; w < warp; ++w) at += counts[w][lane];
  int64_t to = group * kept.room + at;
  const auto write = [&](int position, T value) {
    values[to * kept.vector + run.output % kept.vector] = value;
    if (is_first) positions[to] = position;
    ++to;
  };
  run.for_each(kept, [&](int position, T value, bool is_kept) {
    if (is_kept && run.is_there) write(position, value);
  });
  if (warp + 1 != kWarps || !run.is_there) return;
  for (int length = at + count - begins[lane]; length % kept.multiple != 0; ++length) {
    write(0, from_float<T>(0.f));
  }
}

ffi::Error compact(cudaStream_t stream, ffi::AnyBuffer kernel, ffi::Result<ffi::AnyBuffer> values,
                   ffi::Result<ffi::AnyBuffer> positions, ffi::Result<ffi::AnyBuffer> starts,
                   ffi::Result<ffi::AnyBuffer> lengths, int64_t vector, int64_t chunk,
                   int64_t multiple) {
  constexpr const char* kOp = "compact";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "kernel", kernel, 4, batch));
  const auto dims = kernel.dimensions();
  const auto last = [&](size_t from_end) { return dims[dims.size() - from_end]; };
  const int64_t in = last(2), out = last(1), most = int64_t{1} << 31;
  if (last(4) < 1 || last(3) < 1 || last(4) > 65536 || last(3) > 65536 || in < 1 || out < 1 ||
      in >= most || out >= most) {
    return invalid(std::string(kOp) + ": kernel (height, width, in, out) must have a window of 1 to "
                   "65536 rows and columns, and channels");
  }
  if (vector < 1 || vector > kLanes || kLanes % vector != 0 || out % vector != 0 || chunk < 1 ||
      chunk >= most || multiple < 1 || multiple >= most) {
    return invalid(std::string(kOp) + ": vector must divide 32 and the output channels, chunk and "
                   "multiple must be at least 1; got " + std::to_string(vector) + ", " +
                   std::to_string(chunk) + ", " + std::to_string(multiple));
  }
  const int64_t taps = last(4) * last(3), chunks = (in + chunk - 1) / chunk;
  const double size = static_cast<double>(taps) * static_cast<double>(chunk);
  if ((size + static_cast<double>(multiple)) * static_cast<double>(chunks) >= 2147483648.0 ||
      chunks > 65535) {
    return invalid(std::string(kOp) + ": kernel must have fewer than 2**31 entries of a group, and at "
                   "most 65535 chunks");
  }
  const int64_t room = (taps * chunk + multiple - 1) / multiple * multiple * chunks;
  const int64_t groups = out / vector, words = groups * (chunks + 1);
  const ffi::DataType type = kernel.element_type();
  SWAT_RETURN_IF_ERROR(check(kOp, "values", *values, type, batch * groups * room * vector, 2));
  SWAT_RETURN_IF_ERROR(check(kOp, "positions", *positions, ffi::S32, batch * groups * room));
  SWAT_RETURN_IF_ERROR(check(kOp, "starts", *starts, ffi::S32, batch * words));
  SWAT_RETURN_IF_ERROR(check(kOp, "lengths", *lengths, ffi::S32, batch * words));
  const Kept kept = {static_cast<int>(taps),     static_cast<int>(in),    static_cast<int>(out),
                     static_cast<int>(vector),   static_cast<int>(chunk), static_cast<int>(multiple),
                     static_cast<int>(groups),   static_cast<int>(chunks), static_cast<int>(room)};
  const dim3 blocks(static_cast<unsigned>((out + kLanes - 1) / kLanes), static_cast<unsigned>(chunks));
  return with_type(kOp, "kernel", type, [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const T* const from = static_cast<const T*>(kernel.untyped_data()) + b * taps * in * out;
      int32_t* const counted = static_cast<int32_t*>(lengths->untyped_data()) + b * words;
      count_kept_kernel<T><<<blocks, kThreads, 0, stream>>>(kept, from, counted);
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetLastError()));
      write_kept_kernel<T><<<blocks, kThreads, 0, stream>>>(
          kept, from, counted, static_cast<T*>(values->untyped_data()) + b * groups * room * vector,
          static_cast<int32_t*>(positions->untyped_data()) + b * groups * room,
          static_cast<int32_t*>(starts->untyped_data()) + b * words);
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetLastError()));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_compact, swat::compact,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // kernel
                                  .Ret<xla::ffi::AnyBuffer>()  // values
                                  .Ret<xla::ffi::AnyBuffer>()  // positions
                                  .Ret<xla::ffi::AnyBuffer>()  // starts
                                  .Ret<xla::ffi::AnyBuffer>()  // lengths
                                  .Attr<int64_t>("vector")
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("multiple"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
