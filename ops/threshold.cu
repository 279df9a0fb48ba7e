// The K-th largest magnitude, exactly: `threshold` in swat_jax/sparsity/top_k.py.

#include "selection.cuh"

namespace swat {
namespace {

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
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * selection_words(n)));
  return with_type(kOp, "x", x.element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const Values<T> values(static_cast<const T*>(x.untyped_data()) + b * n, n);
      Selection<T> selection;
      selection.workspace =
          static_cast<uint32_t*>(scratch->untyped_data()) + b * selection_words(n);
      selection.n = n;
      selection.ranks.words = static_cast<const uint32_t*>(keep.untyped_data()) + 2 * b;
      selection.refresh = static_cast<const uint8_t*>(refresh.untyped_data()) + b;
      selection.stored = static_cast<const float*>(stored.untyped_data()) + b;
      selection.thresholds = static_cast<float*>(result->untyped_data()) + b;
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, search(stream, values, values, selection)));
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
