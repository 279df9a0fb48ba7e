// Batch norm's two elementwise passes: `normalize`, with the selection of what is packed, and
// `gradient` in swat_jax/batch_norm.py.

#include "batch_norm.cuh"
#include "selection.cuh"

namespace swat {
namespace {

// ---- Forward -----------------------------------------------------------------------------------

// What is read besides x.
enum class Second { kNothing, kResidual, kKept };

// y = relu(x * factor + shift + residual), or relu(...) * kept_factor where a bit says that it is
// kept and else 0; stored as it is made.
template <typename T, bool kFixed, Second kSecond>
struct Normalize {
  static constexpr bool kResidual = kSecond == Second::kResidual;
  static constexpr bool kDrops = kSecond == Second::kKept;
  static constexpr int kStreams = kSecond == Second::kNothing ? 1 : 2;
  const T* x;
  const T* residual;     // if kResidual
  const uint32_t* kept;  // if kDrops
  T* y;
  uint32_t* positive;  // may be absent: bits that say where y > 0
  Parameters parameters;
  const float* coefficients;  // factor and shift of all channels, unless kFixed
  int64_t n;
  Remainder channels;
  bool relu, wide;
  float kept_factor;     // if kDrops
  float own[2][kOctet];  // of this thread, if kFixed

  __device__ void prepare() {
    if constexpr (kFixed) {
      uint32_t c = channels(threadIdx.x * kOctet);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        own[0][j] = parameters.factor(c);
        own[1][j] = parameters.shift(c);
        if (++c == channels.divisor) c = 0;
      }
    }
  }
  template <typename Queue>
  __device__ void request(const Queue& queue, int turn, int64_t i, bool whole = false) const {
    queue.request(turn, 0, x, i, n, wide, whole);
    if constexpr (kResidual) queue.request(turn, 1, residual, i, n, wide, whole);
    if constexpr (kDrops) {
      if (whole || i < n) queue.request_word(turn, 1, kept + i / 32);
    }
  }
  template <typename Queue>
  __device__ Octet<T> take(const Queue& queue, int turn, int64_t i, bool whole = false) const {
    Octet<T> added;
    uint32_t bits = 0;
    if constexpr (kResidual) added = queue.take(turn, 1);
    if constexpr (kDrops) bits = queue.take_word(turn, 1) >> (i % 32);
    return make(queue.take(turn, 0), added, bits, i, whole);
  }
  __device__ Octet<T> peek(int64_t i) const {
    Octet<T> added;
    uint32_t bits = 0;
    if constexpr (kResidual) added = load(residual, i, n, wide);
    if constexpr (kDrops) bits = load_bits(kept, i, n);
    return make(load(x, i, n, wide), added, bits, i, false);
  }
  __device__ void keep(const Octet<T>& octet, int64_t i, bool whole = false) const {
    store(octet, y, i, n, wide, whole);
    if (positive != nullptr) store_bits(positive, i, n, positive_flags(octet), whole);
  }

 private:
  __device__ Octet<T> make(const Octet<T>& given, const Octet<T>& added, uint32_t bits, int64_t i,
                           bool whole) const {
    float loaded[2][kOctet], values[kOctet], more[kOctet];
    if constexpr (!kFixed) load_coefficients(coefficients, channels, i, loaded);
    to_floats(given, values);
    if constexpr (kResidual) to_floats(added, more);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      if constexpr (kFixed) {
        values[j] = normalized(values[j], own[0][j], own[1][j]);
      } else {
        values[j] = normalized(values[j], loaded[0][j], loaded[1][j]);
      }
      if constexpr (kResidual) values[j] += more[j];
      if constexpr (kDrops) values[j] = (bits >> j & 1) != 0 ? values[j] * kept_factor : 0.f;
    }
    Octet<T> octet = from_floats<T>(values);
    if (relu) rectify(octet);
    if (!whole && i + kOctet > n) {
      // What lies beyond the end must not be counted.
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (i + j >= n) octet.v[j] = from_float<T>(0.f);
      }
    }
    return octet;
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
                           ffi::AnyBuffer residual, ffi::AnyBuffer kept, ffi::AnyBuffer keep,
                           ffi::AnyBuffer refresh, ffi::AnyBuffer stored,
                           ffi::Result<ffi::AnyBuffer> y,
                           ffi::Result<ffi::AnyBuffer> positive,
                           ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> bitmap,
                           ffi::Result<ffi::AnyBuffer> offsets,
                           ffi::Result<ffi::AnyBuffer> overflow,
                           ffi::Result<ffi::AnyBuffer> thresholds,
                           ffi::Result<ffi::AnyBuffer> scratch, float epsilon, bool relu,
                           float kept_factor, int64_t mode) {
  constexpr const char* kOp = "batch_norm_relu";
  Problems problems;
  SWAT_RETURN_IF_ERROR(problems.of(kOp, x));
  const int64_t batch = problems.batch, channels = problems.channels, n = problems.size();
  const ffi::DataType type = problems.type;
  const Vectors vectors{mean, variance, scale, bias, epsilon};
  SWAT_RETURN_IF_ERROR(vectors.check(kOp, problems));
  SWAT_RETURN_IF_ERROR(check_optional(kOp, "residual", residual, type, batch * n, 2));
  SWAT_RETURN_IF_ERROR(
      check_optional(kOp, "kept", kept, ffi::U32, batch * bitmap_words(n), sizeof(uint32_t)));
  if (residual.element_count() > 0 && kept.element_count() > 0) {
    return invalid("batch_norm_relu: kept must be empty where there is a residual");
  }
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
    const auto run = [&](auto fixed, auto second) -> ffi::Error {
      constexpr bool kFixed = decltype(fixed)::value;
      using Source = Normalize<T, kFixed, decltype(second)::value>;
      for (int64_t b = 0; b < batch; ++b) {
        uint32_t* memory = static_cast<uint32_t*>(scratch->untyped_data()) + b * words;
        Source source;
        source.x = part<T>(x, b * n);
        source.residual = part<T>(residual, b * n);
        source.kept = part<uint32_t>(kept, b * bitmap_words(n));
        source.kept_factor = kept_factor;
        source.y = static_cast<T*>(y->untyped_data()) + b * n;
        source.positive = positive->element_count() == 0
                              ? nullptr
                              : static_cast<uint32_t*>(positive->untyped_data()) +
                                    b * bitmap_words(n);
        source.parameters = vectors.of(b, channels);
        source.n = n;
        source.channels = Remainder(static_cast<uint32_t>(channels));
        source.relu = relu;
        source.wide = is_wide(source.x) && is_wide(source.residual) && is_wide(source.y);
        source.coefficients = nullptr;
        if constexpr (!kFixed) {
          float* coefficients = reinterpret_cast<float*>(memory);
          source.coefficients = coefficients;
          const unsigned blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
          coefficients_kernel<<<blocks, kThreads, 0, stream>>>(
              source.parameters, source.channels.divisor, coefficients);
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
        SWAT_RETURN_IF_ERROR(cuda_error(kOp, pack(stream, source, made, selection)));
      }
      return ffi::Error::Success();
    };
    const auto run_fixed = [&](auto second) {
      return is_fixed(channels) ? run(std::true_type{}, second) : run(std::false_type{}, second);
    };
    if (residual.element_count() > 0) {
      return run_fixed(std::integral_constant<Second, Second::kResidual>{});
    }
    if (kept.element_count() > 0) {
      return run_fixed(std::integral_constant<Second, Second::kKept>{});
    }
    return run_fixed(std::integral_constant<Second, Second::kNothing>{});
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

// dx, stored as it is made. `finds_sign`: dy passes where y, found again, is positive.
template <typename T, bool kFixed>
struct Gradient {
  static constexpr int kStreams = 3;
  const T *x, *dy;
  const T* through;  // may be absent
  T* dx;
  Parameters parameters;
  GradientSums sums;
  const float* coefficients;  // of all channels, unless kFixed
  int64_t n;
  Remainder channels;
  bool finds_sign, wide;
  float own[kGradientCoefficients][kOctet];  // of this thread, if kFixed

  __device__ void prepare() {
    if constexpr (kFixed) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        float found[kGradientCoefficients];
        gradient_coefficients(parameters, sums, (threadIdx.x * kOctet + j) % channels.divisor, found);
#pragma unroll
        for (int k = 0; k < kGradientCoefficients; ++k) own[k][j] = found[k];
      }
    }
  }
  template <typename Queue>
  __device__ void request(const Queue& queue, int turn, int64_t i) const {
    queue.request(turn, 0, x, i, n, wide);
    queue.request(turn, 1, dy, i, n, wide);
    if (through != nullptr) queue.request(turn, 2, through, i, n, wide);
  }
  template <typename Queue>
  __device__ Octet<T> take(const Queue& queue, int turn, int64_t i) const {
    float loaded[kGradientCoefficients][kOctet], values[kOctet], dz[kOctet];
    if constexpr (!kFixed) load_coefficients(coefficients, channels, i, loaded);
    const auto c = [&](int k, int j) {
      if constexpr (kFixed) {
        return own[k][j];
      } else {
        return loaded[k][j];
      }
    };
    to_floats(queue.take(turn, 0), values);
    to_floats(queue.take(turn, 1), dz);
    if (finds_sign) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const T y = from_float<T>(normalized(values[j], c(0, j), c(1, j)));
        if (!(to_float(y) > 0.f)) dz[j] = 0.f;
      }
    }
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      values[j] = fmaf(c(0, j), dz[j], fmaf(c(2, j), values[j], c(3, j)));
    }
    if (through != nullptr) {
      float more[kOctet];
      to_floats(queue.take(turn, 2), more);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) values[j] += more[j];
    }
    return from_floats<T>(values);
  }
  __device__ void keep(const Octet<T>& octet, int64_t i) const { store(octet, dx, i, n, wide); }
};

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
    const auto run = [&](auto fixed) -> ffi::Error {
      using Source = Gradient<T, decltype(fixed)::value>;
      for (int64_t b = 0; b < batch; ++b) {
        Source source;
        source.x = part<T>(x, b * n);
        source.dy = part<T>(dy, b * n);
        source.through = part<T>(through, b * n);
        source.dx = static_cast<T*>(dx->untyped_data()) + b * n;
        source.parameters = vectors.of(b, channels);
        source.sums = {part<float>(sum, b * channels), part<float>(sum_normalized, b * channels),
                       inverse_count};
        source.n = n;
        source.channels = Remainder(static_cast<uint32_t>(channels));
        source.finds_sign = relu;
        source.wide = is_wide(source.x) && is_wide(source.dy) && is_wide(source.through) &&
                      is_wide(source.dx);
        source.coefficients = nullptr;
        if constexpr (!decltype(fixed)::value) {
          float* coefficients = static_cast<float*>(scratch->untyped_data()) + b * words;
          source.coefficients = coefficients;
          const unsigned blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
          gradient_coefficients_kernel<<<blocks, kThreads, 0, stream>>>(
              source.parameters, source.sums, source.channels.divisor, coefficients);
          SWAT_RETURN_IF_ERROR(cuda_error(kOp, cudaGetLastError()));
        }
        SWAT_RETURN_IF_ERROR(cuda_error(
            kOp, launch(stream, map_kernel<T, Source>, Streams<T, Source::kStreams>::kBytes,
                        tiles_of(n), source, n)));
      }
      return ffi::Error::Success();
    };
    return is_fixed(channels) ? run(std::true_type{}) : run(std::false_type{});
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
                                  .Arg<xla::ffi::AnyBuffer>()  // kept, or empty
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
                                  .Attr<float>("kept_factor")
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
