// Batch norm's two passes that add over rows: `statistics` and `gradient_sums` in
// swat_jax/batch_norm.py.

#include "batch_norm.cuh"

namespace swat {
namespace {

// Rows of one chunk that a thread looks at.
struct Walk {
  int64_t row, end, step, channel;
  bool works;

  __device__ Walk(int64_t rows, int64_t channels, int lanes, int width) {
    const int64_t each = (rows + gridDim.x - 1) / gridDim.x;
    const int own = static_cast<int>(threadIdx.x) / lanes;
    step = kThreads / lanes;
    row = blockIdx.x * each + own;
    end = min((blockIdx.x + 1) * each, rows);
    channel = (static_cast<int64_t>(blockIdx.y) * lanes + threadIdx.x % lanes) * width;
    works = own < step && channel < channels;
    if (!works) row = end;
  }
};

// Calls `add(values, row)` for every row of a walk, with V values of each of kStreams arrays: in
// octets through the queues, single values directly. `present` has a bit for every array there is.
template <typename T, int V, int kStreams, typename Add>
__device__ void for_each_row(const Walk& walk, int64_t channels, const T* const (&arrays)[kStreams],
                             unsigned present, uint4* shared, Add add) {
  T values[kStreams][V];
  if constexpr (V == 1) {
    for (int64_t row = walk.row; row < walk.end; row += walk.step) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (present >> s & 1) values[s][0] = arrays[s][row * channels + walk.channel];
      }
      add(values, row);
    }
  } else {
    using Queue = Streams<T, kStreams>;
    const Queue queue{shared};
    const auto request = [&](int turn) {
      const int64_t row = walk.row + turn * walk.step;
      if (row < walk.end) {
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          if (present >> s & 1) {
            const int64_t i = row * channels + walk.channel;
            queue.request(turn, s, arrays[s], i, i + kOctet, true);
          }
        }
      }
      queue.commit();
    };
    for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
    int turn = 0;
    for (int64_t row = walk.row; row < walk.end; row += walk.step, ++turn) {
      request(turn + Queue::kDepth - 1);
      queue.wait();
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (present >> s & 1) {
          const Octet<T> octet = queue.take(turn, s);
#pragma unroll
          for (int v = 0; v < V; ++v) values[s][v] = octet.v[v];
        }
      }
      add(values, row);
    }
  }
}

// Shared memory serves the queues first and the sums afterwards.
template <typename T, int V, int kStreams>
constexpr size_t shared_bytes() {
  return std::max(V == 1 ? 0 : Streams<T, kStreams>::kBytes, sizeof(ColumnScratch<V>));
}

// Mean and variance from sums of (x - shift) and its square, where the shift is near the mean: the
// mean of four rows. Without it the difference of two large numbers would lose the variance.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    statistics_kernel(const T* x, int64_t rows, int64_t channels, int lanes, uint32_t* counters,
                      float2* partial, float* mean, float* variance) {
  extern __shared__ uint4 dynamic[];
  const Walk walk(rows, channels, lanes, V);
  const auto shift_of = [=](int64_t channel) {
    float sum = 0.f;
    for (int k = 0; k < 4; ++k) sum += to_float(x[rows * k / 4 * channels + channel]);
    return sum * 0.25f;
  };
  float shift[V], first[V] = {}, second[V] = {};
  if (walk.works) {
#pragma unroll
    for (int v = 0; v < V; ++v) shift[v] = shift_of(walk.channel + v);
  }
  const T* const arrays[1] = {x};
  for_each_row<T, V>(walk, channels, arrays, 1u, dynamic, [&](const T(&values)[1][V], int64_t) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float value = to_float(values[0][v]) - shift[v];
      first[v] += value;
      second[v] = fmaf(value, value, second[v]);
    }
  });
  __syncthreads();
  sum_columns<V>(first, second, lanes, channels, counters, partial,
                 *reinterpret_cast<ColumnScratch<V>*>(dynamic),
                 [=](int64_t channel, double sum, double squares) {
                   const double offset = sum / static_cast<double>(rows);
                   const double spread = squares / static_cast<double>(rows) - offset * offset;
                   mean[channel] = static_cast<float>(shift_of(channel) + offset);
                   // The comparison lets NaN through.
                   variance[channel] = spread < 0 ? 0.f : static_cast<float>(spread);
                 });
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_sums_kernel(Gradient<T> gradient, int64_t rows, int64_t channels, int lanes,
                         uint32_t* counters, float2* partial, float* sum, float* sum_normalized) {
  extern __shared__ uint4 dynamic[];
  const Walk walk(rows, channels, lanes, V);
  float mean[V], factor[V], shift[V], first[V] = {}, second[V] = {};
  if (walk.works) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t c = static_cast<uint32_t>(walk.channel + v);
      mean[v] = gradient.parameters.mean[c];
      factor[v] = gradient.parameters.factor(c);
      shift[v] = gradient.parameters.shift(c);
    }
  }
  const bool two = gradient.dy2 != nullptr;
  const T* const arrays[3] = {gradient.x, gradient.dy, gradient.dy2};
  // The bits of the row after this one are on their way while this one is added.
  const auto bits_of = [&](int64_t row) -> uint32_t {
    if (gradient.mask != Mask::kBits || row >= walk.end) return ~0u;
    const int64_t i = row * channels + walk.channel;
    const uint32_t bits = __ldg(reinterpret_cast<const uint8_t*>(gradient.positive) + i / kOctet);
    return V == 1 ? bits >> (i % kOctet) : bits;
  };
  uint32_t ahead[3] = {bits_of(walk.row), bits_of(walk.row + walk.step),
                       bits_of(walk.row + 2 * walk.step)};
  for_each_row<T, V>(
      walk, channels, arrays, two ? 7u : 3u, dynamic, [&](const T(&values)[3][V], int64_t row) {
        const uint32_t bits = ahead[0];
        ahead[0] = ahead[1];
        ahead[1] = ahead[2];
        ahead[2] = bits_of(row + 3 * walk.step);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float x = to_float(values[0][v]);
          float dz = to_float(values[1][v]);
          if (two) dz += to_float(values[2][v]);
          bool passes = bits >> v & 1;
          if (gradient.mask == Mask::kSign) {
            passes = to_float(from_float<T>(normalized(x, factor[v], shift[v]))) > 0.f;
          }
          if (!passes) dz = 0.f;
          first[v] += dz;
          second[v] = fmaf(dz, x - mean[v], second[v]);
        }
      });
  __syncthreads();
  const Parameters parameters = gradient.parameters;
  sum_columns<V>(first, second, lanes, channels, counters, partial,
                 *reinterpret_cast<ColumnScratch<V>*>(dynamic),
                 [=](int64_t channel, double total, double moment) {
                   const double deviation = parameters.deviation(static_cast<uint32_t>(channel));
                   sum[channel] = static_cast<float>(total);
                   sum_normalized[channel] = static_cast<float>(moment * deviation);
                 });
}

// Starts one block for every part of a cut.
template <typename Kernel, typename... Args>
cudaError_t launch_cut(cudaStream_t stream, Kernel kernel, size_t shared, const Cut& cut,
                       const Args&... args) {
  const cudaError_t code = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  kernel<<<cut.grid(), kThreads, shared, stream>>>(args...);
  return cudaGetLastError();
}

ffi::Error statistics(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> mean,
                      ffi::Result<ffi::AnyBuffer> variance, ffi::Result<ffi::AnyBuffer> scratch) {
  constexpr const char* kOp = "batch_norm_statistics";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", x, 2, batch));
  const auto dims = x.dimensions();
  const int64_t rows = dims[dims.size() - 2], channels = dims[dims.size() - 1];
  SWAT_RETURN_IF_ERROR(check_rows(kOp, rows, channels));
  const int64_t words = Cut::words(rows, channels);
  SWAT_RETURN_IF_ERROR(check(kOp, "mean", *mean, ffi::F32, batch * channels));
  SWAT_RETURN_IF_ERROR(check(kOp, "variance", *variance, ffi::F32, batch * channels));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * words));
  return with_type(kOp, "x", x.element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const T* from = static_cast<const T*>(x.untyped_data()) + b * rows * channels;
      uint32_t* counters = static_cast<uint32_t*>(scratch->untyped_data()) + b * words;
      const Cut cut(rows, channels, is_wide(from));
      SWAT_RETURN_IF_ERROR(
          cuda_error(kOp, cudaMemsetAsync(counters, 0, cut.columns * sizeof(uint32_t), stream)));
      const bool octets = cut.width == kOctet;
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, launch_cut(stream, octets ? statistics_kernel<T, kOctet> : statistics_kernel<T, 1>,
                          octets ? shared_bytes<T, kOctet, 1>() : shared_bytes<T, 1, 1>(), cut, from,
                          rows, channels, cut.lanes, counters,
                          reinterpret_cast<float2*>(counters + (channels + 1) / 2 * 2),
                          static_cast<float*>(mean->untyped_data()) + b * channels,
                          static_cast<float*>(variance->untyped_data()) + b * channels)));
    }
    return ffi::Error::Success();
  });
}

ffi::Error gradient_sums(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                         ffi::AnyBuffer dy2, ffi::AnyBuffer positive, ffi::AnyBuffer mean,
                         ffi::AnyBuffer variance, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                         ffi::Result<ffi::AnyBuffer> sum,
                         ffi::Result<ffi::AnyBuffer> sum_normalized,
                         ffi::Result<ffi::AnyBuffer> scratch, float epsilon, bool relu) {
  constexpr const char* kOp = "batch_norm_gradient_sums";
  GradientShape shape;
  SWAT_RETURN_IF_ERROR(check_gradient(kOp, x, dy, dy2, positive, mean, variance, scale, bias, shape));
  const int64_t rows = shape.rows, channels = shape.channels, n = rows * channels;
  const int64_t words = Cut::words(rows, channels);
  SWAT_RETURN_IF_ERROR(check(kOp, "sum", *sum, ffi::F32, shape.batch * channels));
  SWAT_RETURN_IF_ERROR(
      check(kOp, "sum_normalized", *sum_normalized, ffi::F32, shape.batch * channels));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, shape.batch * words));
  return with_type(kOp, "x", x.element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < shape.batch; ++b) {
      Gradient<T> gradient(x, dy, dy2, positive, b, n, relu);
      gradient.parameters = {part<float>(mean, b * channels), part<float>(variance, b * channels),
                             part<float>(scale, b * channels), part<float>(bias, b * channels),
                             epsilon};
      uint32_t* counters = static_cast<uint32_t*>(scratch->untyped_data()) + b * words;
      const Cut cut(rows, channels, gradient.is_wide());
      SWAT_RETURN_IF_ERROR(
          cuda_error(kOp, cudaMemsetAsync(counters, 0, cut.columns * sizeof(uint32_t), stream)));
      const bool octets = cut.width == kOctet;
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp,
          launch_cut(stream, octets ? gradient_sums_kernel<T, kOctet> : gradient_sums_kernel<T, 1>,
                     octets ? shared_bytes<T, kOctet, 3>() : shared_bytes<T, 1, 3>(), cut, gradient,
                     rows, channels, cut.lanes, counters,
                     reinterpret_cast<float2*>(counters + (channels + 1) / 2 * 2),
                     static_cast<float*>(sum->untyped_data()) + b * channels,
                     static_cast<float*>(sum_normalized->untyped_data()) + b * channels)));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_batch_norm_statistics, swat::statistics,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Ret<xla::ffi::AnyBuffer>()   // mean
                                  .Ret<xla::ffi::AnyBuffer>()   // variance
                                  .Ret<xla::ffi::AnyBuffer>(),  // scratch
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_batch_norm_gradient_sums, swat::gradient_sums,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Arg<xla::ffi::AnyBuffer>()  // dy2, or empty
                                  .Arg<xla::ffi::AnyBuffer>()  // positive, or empty
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()  // sum
                                  .Ret<xla::ffi::AnyBuffer>()  // sum_normalized
                                  .Ret<xla::ffi::AnyBuffer>()  // scratch
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("relu"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
