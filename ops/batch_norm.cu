// Batch norm's two passes that add over rows: `statistics` and `gradient_sums` in
// swat_jax/batch_norm.py.

#include "batch_norm.cuh"

namespace swat {
namespace {

// Rows that a thread looks at. The grid goes from the last row to the first: what was written last
// is likely still in the cache, and what is read last will be when the next pass begins.
struct Walk {
  int64_t row, step, channel;  // the first of them, how far down the next one is

  __device__ Walk(int64_t rows, int64_t channels, int lanes, int width) {
    const int own = static_cast<int>(threadIdx.x) / lanes, together = kThreads / lanes;
    step = static_cast<int64_t>(gridDim.x) * together;
    channel = (static_cast<int64_t>(blockIdx.y) * lanes + threadIdx.x % lanes) * width;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * together + own;
    row = first < rows ? first + (rows - 1 - first) / step * step : -1;
    if (own >= together || channel >= channels) row = -1;
  }
  __device__ bool works() const { return row >= 0; }
};

// Calls `add(values, row)` for every row of a walk, with V values of each of kStreams arrays: in
// octets through the queues, single values directly. `present` has a bit for every array there is.
template <typename T, int V, int kStreams, typename Add>
__device__ void for_each_row(const Walk& walk, int64_t channels, const T* const (&arrays)[kStreams],
                             unsigned present, uint4* shared, Add add) {
  float values[kStreams][V];
  if constexpr (V == 1) {
    for (int64_t row = walk.row; row >= 0; row -= walk.step) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (present >> s & 1) values[s][0] = to_float(arrays[s][row * channels + walk.channel]);
      }
      add(values, row);
    }
  } else {
    using Queue = Streams<T, kStreams>;
    const Queue queue{shared};
    const auto request = [&](int turn) {
      const int64_t row = walk.row - turn * walk.step;
      if (row >= 0) {
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
          if (present >> s & 1) {
            const int64_t i = row * channels + walk.channel;
            queue.request(turn, s, arrays[s], i, i + kOctet, true, true);
          }
        }
      }
      queue.commit();
    };
    for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
    int turn = 0;
    for (int64_t row = walk.row; row >= 0; row -= walk.step, ++turn) {
      request(turn + Queue::kDepth - 1);
      queue.wait();
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        if (present >> s & 1) to_floats(queue.take(turn, s), values[s]);
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

// What is near the mean of a channel: the mean of four rows.
template <typename T>
struct Shift {
  const T* x;
  int64_t rows, channels;
  __device__ float operator()(int64_t channel) const {
    float sum = 0.f;
    for (int k = 0; k < 4; ++k) sum += to_float(x[rows * k / 4 * channels + channel]);
    return sum * 0.25f;
  }
};

// Mean and variance come from sums of (x - shift) and its square. Without the shift the difference
// of two large numbers would lose the variance.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3)
    statistics_kernel(const T* x, int64_t rows, int64_t channels, int lanes, float2* partial) {
  extern __shared__ uint4 dynamic[];
  const Walk walk(rows, channels, lanes, V);
  const Shift<T> shift_of{x, rows, channels};
  float shift[V], first[V] = {}, second[V] = {};
  if (walk.works()) {
#pragma unroll
    for (int v = 0; v < V; ++v) shift[v] = shift_of(walk.channel + v);
  }
  const T* const arrays[1] = {x};
  for_each_row<T, V>(walk, channels, arrays, 1u, dynamic, [&](const float(&values)[1][V], int64_t) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float value = values[0][v] - shift[v];
      first[v] += value;
      second[v] = fmaf(value, value, second[v]);
    }
  });
  __syncthreads();
  sum_columns<V>(first, second, lanes, channels, partial,
                 *reinterpret_cast<ColumnScratch<V>*>(dynamic));
}

template <typename T>
struct FinishStatistics {
  Shift<T> shift_of;
  float *mean, *variance;
  __device__ void operator()(int64_t channel, double sum, double squares) const {
    const double rows = static_cast<double>(shift_of.rows), offset = sum / rows;
    const double spread = squares / rows - offset * offset;
    mean[channel] = static_cast<float>(shift_of(channel) + offset);
    // The comparison lets NaN through.
    variance[channel] = spread < 0 ? 0.f : static_cast<float>(spread);
  }
};

// Where the gradient passes on: everywhere, where y is positive again, or where a bit says so.
enum class Mask { kNone, kSign, kBits };

template <typename T>
struct Gradients {
  const T* x;
  const T* dy;
  const T* dy2;              // may be absent
  T* dz;                     // may be absent
  const uint32_t* positive;  // with Mask::kBits
  Parameters parameters;
  Mask mask;
  float factor;  // of dy; 1 unless kMayKeep
};

template <typename T, int V, bool kMayKeep>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_sums_kernel(Gradients<T> gradients, int64_t rows, int64_t channels, int lanes,
                         float2* partial) {
  extern __shared__ uint4 dynamic[];
  const Walk walk(rows, channels, lanes, V);
  float mean[V], factor[V], shift[V], first[V] = {}, second[V] = {};
  if (walk.works()) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t c = static_cast<uint32_t>(walk.channel + v);
      mean[v] = gradients.parameters.mean[c];
      factor[v] = gradients.parameters.factor(c);
      shift[v] = gradients.parameters.shift(c);
    }
  }
  const bool two = gradients.dy2 != nullptr, keeps = kMayKeep && gradients.dz != nullptr;
  const T* const arrays[3] = {gradients.x, gradients.dy, gradients.dy2};
  // The bits of the row after this one are on their way while this one is added.
  const auto bits_of = [&](int64_t row) -> uint32_t {
    if (gradients.mask != Mask::kBits || row < 0) return ~0u;
    const int64_t i = row * channels + walk.channel;
    const uint32_t bits = __ldg(reinterpret_cast<const uint8_t*>(gradients.positive) + i / kOctet);
    return V == 1 ? bits >> (i % kOctet) : bits;
  };
  uint32_t ahead[3] = {bits_of(walk.row), bits_of(walk.row - walk.step),
                       bits_of(walk.row - 2 * walk.step)};
  for_each_row<T, V>(
      walk, channels, arrays, two ? 7u : 3u, dynamic, [&](const float(&values)[3][V], int64_t row) {
        const uint32_t bits = ahead[0];
        ahead[0] = ahead[1];
        ahead[1] = ahead[2];
        ahead[2] = bits_of(row - 3 * walk.step);
        uint32_t passes = bits;
        if (gradients.mask == Mask::kSign) {
          float y[V];
#pragma unroll
          for (int v = 0; v < V; ++v) y[v] = normalized(values[0][v], factor[v], shift[v]);
          if constexpr (V == kOctet) {
            passes = positive_flags(from_floats<T>(y));
          } else {
            passes = to_float(from_float<T>(y[0])) > 0.f ? 1 : 0;
          }
        }
        float dz[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          dz[v] = values[1][v];
          if (two) dz[v] += values[2][v];
          if constexpr (kMayKeep) dz[v] *= gradients.factor;
          if ((passes >> v & 1) == 0) dz[v] = 0.f;
        }
        if (keeps) {
          const int64_t i = row * channels + walk.channel;
          if constexpr (V == kOctet) {
            const Octet<T> kept = from_floats<T>(dz);
            store(kept, gradients.dz, i, i + kOctet, true, true);
            to_floats(kept, dz);
          } else {
            const T kept = from_float<T>(dz[0]);
            gradients.dz[i] = kept;
            dz[0] = to_float(kept);
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          first[v] += dz[v];
          second[v] = fmaf(dz[v], values[0][v] - mean[v], second[v]);
        }
      });
  __syncthreads();
  sum_columns<V>(first, second, lanes, channels, partial,
                 *reinterpret_cast<ColumnScratch<V>*>(dynamic));
}

struct FinishGradientSums {
  Parameters parameters;
  float *sum, *sum_normalized;
  __device__ void operator()(int64_t channel, double total, double moment) const {
    sum[channel] = static_cast<float>(total);
    sum_normalized[channel] =
        static_cast<float>(moment * parameters.deviation(static_cast<uint32_t>(channel)));
  }
};

// Starts one block for every part of a cut, then adds up what they found.
template <typename Kernel, typename Finish, typename... Args>
cudaError_t sum_rows(cudaStream_t stream, Kernel kernel, size_t shared, const Cut& cut,
                     float2* partial, const Finish& finish, const Args&... args) {
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  kernel<<<cut.grid(), kThreads, shared, stream>>>(args..., cut.rows, cut.channels, cut.lanes,
                                                   partial);
  code = cudaGetLastError();
  if (code != cudaSuccess) return code;
  finish_kernel<<<static_cast<unsigned>((cut.channels + 31) / 32), kThreads, 0, stream>>>(
      partial, cut.chunks, cut.channels, finish);
  return cudaGetLastError();
}

// Where a problem's partial sums lie in the scratch memory.
float2* partial_of(ffi::AnyBuffer& scratch, int64_t problem, const Problems& problems) {
  return reinterpret_cast<float2*>(static_cast<uint32_t*>(scratch.untyped_data()) +
                                   problem * Cut::words(problems.rows, problems.channels));
}

ffi::Error statistics(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> mean,
                      ffi::Result<ffi::AnyBuffer> variance, ffi::Result<ffi::AnyBuffer> scratch) {
  constexpr const char* kOp = "batch_norm_statistics";
  Problems problems;
  SWAT_RETURN_IF_ERROR(problems.of(kOp, x));
  const int64_t batch = problems.batch, rows = problems.rows, channels = problems.channels;
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "mean", *mean));
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "variance", *variance));
  SWAT_RETURN_IF_ERROR(
      check(kOp, "scratch", *scratch, ffi::U32, batch * Cut::words(rows, channels), sizeof(float2)));
  return with_type(kOp, "x", problems.type, [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const T* from = part<T>(x, b * problems.size());
      const Cut cut(rows, channels, is_wide(from));
      const bool octets = cut.width == kOctet;
      const FinishStatistics<T> finish{{from, rows, channels},
                                       static_cast<float*>(mean->untyped_data()) + b * channels,
                                       static_cast<float*>(variance->untyped_data()) + b * channels};
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, sum_rows(stream, octets ? statistics_kernel<T, kOctet> : statistics_kernel<T, 1>,
                        octets ? shared_bytes<T, kOctet, 1>() : shared_bytes<T, 1, 1>(), cut,
                        partial_of(*scratch, b, problems), finish, from)));
    }
    return ffi::Error::Success();
  });
}

ffi::Error gradient_sums(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                         ffi::AnyBuffer dy2, ffi::AnyBuffer positive, ffi::AnyBuffer mean,
                         ffi::AnyBuffer variance, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                         ffi::Result<ffi::AnyBuffer> sum,
                         ffi::Result<ffi::AnyBuffer> sum_normalized,
                         ffi::Result<ffi::AnyBuffer> dz, ffi::Result<ffi::AnyBuffer> scratch,
                         float epsilon, bool relu, float factor) {
  constexpr const char* kOp = "batch_norm_gradient_sums";
  Problems problems;
  SWAT_RETURN_IF_ERROR(problems.of(kOp, x));
  const int64_t batch = problems.batch, rows = problems.rows, channels = problems.channels;
  const int64_t n = problems.size();
  const Vectors vectors{mean, variance, scale, bias, epsilon};
  SWAT_RETURN_IF_ERROR(vectors.check(kOp, problems));
  SWAT_RETURN_IF_ERROR(check(kOp, "dy", dy, problems.type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(check_optional(kOp, "dy2", dy2, problems.type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(check_optional(kOp, "dz", *dz, problems.type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(
      check_optional(kOp, "positive", positive, ffi::U32, batch * bitmap_words(n), 4));
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "sum", *sum));
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "sum_normalized", *sum_normalized));
  SWAT_RETURN_IF_ERROR(
      check(kOp, "scratch", *scratch, ffi::U32, batch * Cut::words(rows, channels), sizeof(float2)));
  return with_type(kOp, "x", problems.type, [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      Gradients<T> gradients;
      gradients.x = part<T>(x, b * n);
      gradients.dy = part<T>(dy, b * n);
      gradients.dy2 = part<T>(dy2, b * n);
      gradients.dz = const_cast<T*>(part<T>(*dz, b * n));
      gradients.positive = part<uint32_t>(positive, b * bitmap_words(n));
      gradients.parameters = vectors.of(b, channels);
      gradients.mask = !relu                             ? Mask::kNone
                       : gradients.positive != nullptr ? Mask::kBits
                                                         : Mask::kSign;
      gradients.factor = factor;
      const Cut cut(rows, channels,
                    is_wide(gradients.x) && is_wide(gradients.dy) && is_wide(gradients.dy2) &&
                        is_wide(gradients.dz));
      const bool octets = cut.width == kOctet;
      auto kernel = octets ? gradient_sums_kernel<T, kOctet, true>
                           : gradient_sums_kernel<T, 1, true>;
      // Fewer registers, which are scarce.
      const bool keeps = gradients.dz != nullptr || factor != 1.f;
      if (octets && !keeps) kernel = gradient_sums_kernel<T, kOctet, false>;
      const FinishGradientSums finish{
          gradients.parameters, static_cast<float*>(sum->untyped_data()) + b * channels,
          static_cast<float*>(sum_normalized->untyped_data()) + b * channels};
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, sum_rows(stream, kernel,
                        octets ? shared_bytes<T, kOctet, 3>() : shared_bytes<T, 1, 3>(), cut,
                        partial_of(*scratch, b, problems), finish, gradients)));
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
                                  .Ret<xla::ffi::AnyBuffer>()  // dz, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // scratch
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("relu")
                                  .Attr<float>("factor"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
