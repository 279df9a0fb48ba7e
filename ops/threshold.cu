// The K-th largest magnitude, exactly: `threshold` in swat_jax/sparsity/top_k.py.

#include "handlers.cuh"
#include "histogram.cuh"

namespace swat {
namespace {

constexpr int64_t kCountWords = sizeof(Counts) / sizeof(uint32_t);

// `refresh` says whether the threshold is searched for, or is `stored`.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    threshold_kernel(Values<T> values, Ranks ranks, const uint8_t* refresh, const float* stored,
                     Counts* counts, float* threshold) {
  extern __shared__ uint4 dynamic[];
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  if (*refresh == 0) {
    if (thread == 0) *threshold = *stored;
    return;
  }
  uint32_t* words = reinterpret_cast<uint32_t*>(counts);
  for (uint32_t i = thread; i < kCountWords; i += gridDim.x * kThreads) words[i] = 0;
  const auto grid = cooperative_groups::this_grid();
  grid.sync();
  find_thresholds<T, kUsualDepth<T>>(grid, values, ranks, kAsk, counts, threshold, dynamic);
}

ffi::Error threshold(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer keep,
                     ffi::AnyBuffer refresh, ffi::AnyBuffer stored,
                     ffi::Result<ffi::AnyBuffer> result, ffi::Result<ffi::AnyBuffer> scratch) {
  constexpr const char* kOp = "threshold";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", x, 1, batch));
  const int64_t n = x.dimensions().back();
  SWAT_RETURN_IF_ERROR(check_size(kOp, "x", n));
  SWAT_RETURN_IF_ERROR(check(kOp, "keep", keep, ffi::U32, 2 * batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "refresh", refresh, ffi::PRED, batch, 1));
  SWAT_RETURN_IF_ERROR(check(kOp, "stored", stored, ffi::F32, batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "result", *result, ffi::F32, batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * kCountWords));
  return with_type(kOp, "x", x.element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const Values<T> values(static_cast<const T*>(x.untyped_data()) + b * n, n);
      Ranks ranks;
      ranks.words = static_cast<const uint32_t*>(keep.untyped_data()) + 2 * b;
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, launch_together(stream, threshold_kernel<T>, kCountBytes + Streams<T, 1>::kBytes,
                               tiles_of(n), kAnyBlocks, values, ranks,
                               static_cast<const uint8_t*>(refresh.untyped_data()) + b,
                               static_cast<const float*>(stored.untyped_data()) + b,
                               static_cast<Counts*>(scratch->untyped_data()) + b,
                               static_cast<float*>(result->untyped_data()) + b)));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_threshold, swat::threshold,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Arg<xla::ffi::AnyBuffer>()   // keep
                                  .Arg<xla::ffi::AnyBuffer>()   // refresh
                                  .Arg<xla::ffi::AnyBuffer>()   // stored
                                  .Ret<xla::ffi::AnyBuffer>()   // threshold
                                  .Ret<xla::ffi::AnyBuffer>(),  // scratch
                              {xla::ffi::Traits::kCmdBufferCompatible});
