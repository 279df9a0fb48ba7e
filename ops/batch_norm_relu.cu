// Batch norm's two elementwise passes: `normalize`, with the selection of what is packed, and
// `gradient` in swat_jax/batch_norm.py.

#include "batch_norm.cuh"
#include "selection.cuh"

namespace swat {
namespace {

// ---- Forward -----------------------------------------------------------------------------------

// NaN passes, and -0 becomes 0.
__device__ __forceinline__ float rectified(float value) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(value) : "f"(value));
  return value;
#else
  return value <= 0.f ? 0.f : value;
#endif
}

// y = relu(x * factor + shift + residual), stored as it is made.
template <typename T, bool kFixed>
struct Normalize {
  static constexpr int kStreams = 2;
  const T* x;
  const T* residual;   // may be absent
  T* y;
  uint32_t* positive;  // may be absent: bits that say where y > 0
  Parameters parameters;
  const float* coefficients;  // factor and shift of all channels, unless kFixed
  int64_t n;
  uint32_t channels;
  bool relu, wide;
  float own[2][kOctet];  // of this thread, if kFixed

  __device__ void prepare() {
    if constexpr (kFixed) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const uint32_t c = (threadIdx.x * kOctet + j) % channels;
        own[0][j] = parameters.factor(c);
        own[1][j] = parameters.shift(c);
      }
    }
  }
  struct Given {
    Octet<T> x, residual;
  };
  template <typename Queue>
  __device__ void request(const Queue& queue, int turn, int64_t i, bool whole = false) const {
    queue.request(turn, 0, x, i, n, wide, whole);
    if (residual != nullptr) queue.request(turn, 1, residual, i, n, wide, whole);
  }
  template <typename Queue>
  __device__ Octet<T> take(const Queue& queue, int turn, int64_t i, bool whole = false) const {
    Given given;
    given.x = queue.take(turn, 0);
    if (residual != nullptr) given.residual = queue.take(turn, 1);
    return make(given, i, own, whole);
  }
  __device__ Octet<T> peek(int64_t i) const {
    Given given;
    given.x = load(x, i, n, wide);
    if (residual != nullptr) given.residual = load(residual, i, n, wide);
    // A sample may meet other channels than the walk.
    float other[2][kOctet];
    if constexpr (kFixed) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const uint32_t c = channel_of(i + j, channels);
        other[0][j] = parameters.factor(c);
        other[1][j] = parameters.shift(c);
      }
    }
    return make(given, i, other, false);
  }
  __device__ Octet<T> make(const Given& given, int64_t i, const float (&fixed)[2][kOctet],
                           bool whole) const {
    float loaded[2][kOctet];
    if constexpr (!kFixed) load_coefficients(coefficients, channels, i, loaded);
    Octet<T> octet;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      float value = kFixed ? normalized(to_float(given.x.v[j]), fixed[0][j], fixed[1][j])
                           : normalized(to_float(given.x.v[j]), loaded[0][j], loaded[1][j]);
      if (residual != nullptr) value += to_float(given.residual.v[j]);
      if (relu) value = rectified(value);
      octet.v[j] = from_float<T>(value);
    }
    if (!whole && i + kOctet > n) {
      // What lies beyond the end must not be counted.
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (i + j >= n) octet.v[j] = from_float<T>(0.f);
      }
    }
    return octet;
  }
  __device__ void keep(const Octet<T>& octet, int64_t i, bool whole = false) const {
    store(octet, y, i, n, wide, whole);
    if (positive != nullptr) store_bits(positive, i, n, positive_flags(octet));
  }
};

template <typename T, typename Source>
__global__ void __launch_bounds__(kThreads) map_kernel(Source source, int64_t n) {
  extern __shared__ uint4 dynamic[];
  source.prepare();
  for_each_octet<T>(source, n, dynamic,
                    [&](const Octet<T>& octet, int64_t i) { source.keep(octet, i); });
}

__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(Parameters parameters, uint32_t channels, float* to) {
  const uint32_t c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= channels) return;
  to[c] = parameters.factor(c);
  to[channels + c] = parameters.shift(c);
}

// What is selected: nothing, exactly, or as a flag on the device says.
enum SelectionMode : int64_t { kNothing = 0, kExact = 1, kByFlag = 2 };

ffi::Error batch_norm_relu(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer mean,
                           ffi::AnyBuffer variance, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                           ffi::AnyBuffer residual, ffi::AnyBuffer keep, ffi::AnyBuffer refresh,
                           ffi::AnyBuffer stored, ffi::Result<ffi::AnyBuffer> y,
                           ffi::Result<ffi::AnyBuffer> positive,
                           ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> bitmap,
                           ffi::Result<ffi::AnyBuffer> offsets,
                           ffi::Result<ffi::AnyBuffer> overflow,
                           ffi::Result<ffi::AnyBuffer> thresholds,
                           ffi::Result<ffi::AnyBuffer> scratch, float epsilon, bool relu,
                           int64_t mode) {
  constexpr const char* kOp = "batch_norm_relu";
  Problems problems;
  SWAT_RETURN_IF_ERROR(problems.of(kOp, x));
  const int64_t batch = problems.batch, channels = problems.channels, n = problems.size();
  const ffi::DataType type = problems.type;
  const Vectors vectors{mean, variance, scale, bias, epsilon};
  SWAT_RETURN_IF_ERROR(vectors.check(kOp, problems));
  SWAT_RETURN_IF_ERROR(check_optional(kOp, "residual", residual, type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(check(kOp, "y", *y, type, batch * n, 2));
  if (positive->element_count() > 0) {
    SWAT_RETURN_IF_ERROR(check(kOp, "positive", *positive, ffi::U32, batch * bitmap_words(n)));
  }
  const bool selects = mode != kNothing;
  const int64_t coefficient_words = is_fixed(channels) ? 0 : (2 * channels + 63) / 64 * 64;
  const int64_t words = coefficient_words + (selects ? selection_words(n) : 0);
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * words));
  PackedShape shape;
  int64_t selections = 0;
  if (selects) {
    if (mode < 0 || mode > kByFlag) return invalid("batch_norm_relu: mode must be 0 to 2");
    SWAT_RETURN_IF_ERROR(check_size(kOp, "x", n));
    selections = count_of(*thresholds) / batch;
    if (selections < 1 || selections > kMaxSelections) {
      return invalid("batch_norm_relu: thresholds must be 1 or 2, got " +
                     std::to_string(selections));
    }
    SWAT_RETURN_IF_ERROR(check(kOp, "thresholds", *thresholds, ffi::F32, batch * selections));
    SWAT_RETURN_IF_ERROR(check(kOp, "keep", keep, ffi::U32, batch * selections * 2));
    if (mode == kByFlag) {
      SWAT_RETURN_IF_ERROR(check(kOp, "refresh", refresh, ffi::PRED, batch, 1));
      SWAT_RETURN_IF_ERROR(check(kOp, "stored", stored, ffi::F32, batch * selections));
    }
    SWAT_RETURN_IF_ERROR(check_packed(kOp, type, n, batch, *values, *bitmap, *offsets, shape));
    SWAT_RETURN_IF_ERROR(check(kOp, "overflow", *overflow, ffi::U32, batch));
  }
  return with_type(kOp, "x", type, [&](auto example) {
    using T = decltype(example);
    const auto run = [&](auto fixed) -> ffi::Error {
      constexpr bool kFixed = decltype(fixed)::value;
      using Source = Normalize<T, kFixed>;
      for (int64_t b = 0; b < batch; ++b) {
        uint32_t* memory = static_cast<uint32_t*>(scratch->untyped_data()) + b * words;
        Source source;
        source.x = part<T>(x, b * n);
        source.residual = part<T>(residual, b * n);
        source.y = static_cast<T*>(y->untyped_data()) + b * n;
        source.positive = positive->element_count() == 0
                              ? nullptr
                              : static_cast<uint32_t*>(positive->untyped_data()) +
                                    b * bitmap_words(n);
        source.parameters = vectors.of(b, channels);
        source.n = n;
        source.channels = static_cast<uint32_t>(channels);
        source.relu = relu;
        source.wide = is_wide(source.x) && is_wide(source.residual) && is_wide(source.y);
        source.coefficients = nullptr;
        if constexpr (!kFixed) {
          float* coefficients = reinterpret_cast<float*>(memory);
          source.coefficients = coefficients;
          const unsigned blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
          coefficients_kernel<<<blocks, kThreads, 0, stream>>>(source.parameters, source.channels,
                                                               coefficients);
          SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetLastError()));
        }
        if (!selects) {
          SWAT_RETURN_IF_ERROR(cuda_error(
              kOp, launch(stream, map_kernel<T, Source>, Streams<T, Source::kStreams>::kBytes,
                          tiles_of(n), source, n)));
          continue;
        }
        Selection<T> selection;
        selection.workspace = memory + coefficient_words;
        selection.n = n;
        selection.ranks.words =
            static_cast<const uint32_t*>(keep.untyped_data()) + 2 * b * selections;
        selection.ranks.count = static_cast<int>(selections);
        if (mode == kByFlag) {
          selection.refresh = static_cast<const uint8_t*>(refresh.untyped_data()) + b;
          selection.stored = static_cast<const float*>(stored.untyped_data()) + b * selections;
        }
        selection.thresholds = static_cast<float*>(thresholds->untyped_data()) + b * selections;
        selection.packed = shape.problem<T>(b, values->untyped_data(), bitmap->untyped_data(),
                                            offsets->untyped_data(), overflow->untyped_data());
        const Values<T> made(source.y, n);
        SWAT_RETURN_IF_ERROR(cuda_error(kOp, search(stream, source, made, selection)));
        SWAT_RETURN_IF_ERROR(cuda_error(kOp, pack(stream, source, made, selection)));
      }
      return ffi::Error::Success();
    };
    return is_fixed(channels) ? run(std::true_type{}) : run(std::false_type{});
  });
}

// ---- Backward ----------------------------------------------------------------------------------

// dx = factor * (dz - mean(dz) - normalized x * mean(dz * normalized x)) + through.
// Coefficients of a channel: factor, shift, slope and constant, so that y = factor * x + shift and
// dx = factor * dz + slope * x + constant.
constexpr int kGradientCoefficients = 4;

struct GradientSums {
  const float* sum;
  const float* sum_normalized;
  float inverse_count;
};

__device__ inline void gradient_coefficients(const Parameters& parameters, const GradientSums& sums,
                                             uint32_t c, float (&to)[kGradientCoefficients]) {
  const float factor = parameters.factor(c);
  const float slope =
      -factor * parameters.deviation(c) * (sums.sum_normalized[c] * sums.inverse_count);
  to[0] = factor;
  to[1] = parameters.shift(c);
  to[2] = slope;
  to[3] = -factor * (sums.sum[c] * sums.inverse_count) - slope * parameters.mean[c];
}

// `finds_sign`: dy passes where y, found again, is positive.
template <typename T, bool kFixed>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const T* from, const T* dys, const T* through, T* to, Parameters parameters,
                    GradientSums sums, const float* coefficients, int64_t n, uint32_t channels,
                    bool finds_sign, bool wide) {
  extern __shared__ uint4 dynamic[];
  using Queue = Streams<T, 3>;
  const Queue queue{dynamic};
  float c[kGradientCoefficients][kOctet];
  if constexpr (kFixed) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      float own[kGradientCoefficients];
      gradient_coefficients(parameters, sums, (threadIdx.x * kOctet + j) % channels, own);
#pragma unroll
      for (int k = 0; k < kGradientCoefficients; ++k) c[k][j] = own[k];
    }
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTile;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x * kOctet, ahead = i;
  const auto request = [&](int turn) {
    if (ahead < n) {
      queue.request(turn, 0, from, ahead, n, wide);
      queue.request(turn, 1, dys, ahead, n, wide);
      if (through != nullptr) queue.request(turn, 2, through, ahead, n, wide);
    }
    queue.commit();
    ahead += stride;
  };
  for (int turn = 0; turn < Queue::kDepth - 1; ++turn) request(turn);
  for (int turn = 0; i < n; i += stride, ++turn) {
    request(turn + Queue::kDepth - 1);
    queue.wait();
    if constexpr (!kFixed) load_coefficients(coefficients, channels, i, c);
    const Octet<T> x = queue.take(turn, 0), dy = queue.take(turn, 1);
    Octet<T> more, result;
    if (through != nullptr) more = queue.take(turn, 2);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const float value = to_float(x.v[j]);
      float dz = to_float(dy.v[j]);
      if (finds_sign) {
        const T y = from_float<T>(normalized(value, c[0][j], c[1][j]));
        if (!(to_float(y) > 0.f)) dz = 0.f;
      }
      float out = fmaf(c[0][j], dz, fmaf(c[2][j], value, c[3][j]));
      if (through != nullptr) out += to_float(more.v[j]);
      result.v[j] = from_float<T>(out);
    }
    store(result, to, i, n, wide);
  }
}

__global__ void __launch_bounds__(kThreads)
    gradient_coefficients_kernel(Parameters parameters, GradientSums sums, uint32_t channels,
                                 float* to) {
  const uint32_t c = blockIdx.x * kThreads + threadIdx.x;
  if (c >= channels) return;
  float own[kGradientCoefficients];
  gradient_coefficients(parameters, sums, c, own);
  for (int k = 0; k < kGradientCoefficients; ++k) {
    to[static_cast<size_t>(k) * channels + c] = own[k];
  }
}

ffi::Error gradient(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::AnyBuffer mean,
                    ffi::AnyBuffer variance, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                    ffi::AnyBuffer sum, ffi::AnyBuffer sum_normalized, ffi::AnyBuffer through,
                    ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> scratch,
                    float epsilon, bool relu, float inverse_count) {
  constexpr const char* kOp = "batch_norm_gradient";
  Problems problems;
  SWAT_RETURN_IF_ERROR(problems.of(kOp, x));
  const int64_t batch = problems.batch, channels = problems.channels, n = problems.size();
  const ffi::DataType type = problems.type;
  const Vectors vectors{mean, variance, scale, bias, epsilon};
  SWAT_RETURN_IF_ERROR(vectors.check(kOp, problems));
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "sum", sum));
  SWAT_RETURN_IF_ERROR(problems.check_vector(kOp, "sum_normalized", sum_normalized));
  SWAT_RETURN_IF_ERROR(check(kOp, "dy", dy, type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(check_optional(kOp, "through", through, type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(check(kOp, "dx", *dx, type, batch * n, 2));
  const int64_t words =
      is_fixed(channels) ? 0 : (kGradientCoefficients * channels + 63) / 64 * 64;
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * words));
  return with_type(kOp, "x", type, [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const Parameters parameters = vectors.of(b, channels);
      const GradientSums sums{part<float>(sum, b * channels),
                              part<float>(sum_normalized, b * channels), inverse_count};
      const T* from = part<T>(x, b * n);
      const T* dys = part<T>(dy, b * n);
      const T* more = part<T>(through, b * n);
      T* to = static_cast<T*>(dx->untyped_data()) + b * n;
      const bool wide = is_wide(from) && is_wide(dys) && is_wide(more) && is_wide(to);
      const uint32_t c = static_cast<uint32_t>(channels);
      float* coefficients = static_cast<float*>(scratch->untyped_data()) + b * words;
      if (!is_fixed(channels)) {
        gradient_coefficients_kernel<<<(c + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
            parameters, sums, c, coefficients);
        SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetLastError()));
      }
      const auto kernel = is_fixed(channels) ? gradient_kernel<T, true> : gradient_kernel<T, false>;
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, launch(stream, kernel, Streams<T, 3>::kBytes, tiles_of(n), from, dys, more, to,
                      parameters, sums, static_cast<const float*>(coefficients), n, c, relu, wide)));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_batch_norm_relu, swat::batch_norm_relu,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Arg<xla::ffi::AnyBuffer>()  // residual, or empty
                                  .Arg<xla::ffi::AnyBuffer>()  // keep, or empty
                                  .Arg<xla::ffi::AnyBuffer>()  // refresh, or empty
                                  .Arg<xla::ffi::AnyBuffer>()  // stored, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // positive, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // values, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // bitmap, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // offsets, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // overflow, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // thresholds, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // scratch
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("relu")
                                  .Attr<int64_t>("mode"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_batch_norm_gradient, swat::gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Arg<xla::ffi::AnyBuffer>()  // sum
                                  .Arg<xla::ffi::AnyBuffer>()  // sum_normalized
                                  .Arg<xla::ffi::AnyBuffer>()  // through, or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Ret<xla::ffi::AnyBuffer>()  // scratch
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("relu")
                                  .Attr<float>("inverse_count"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
