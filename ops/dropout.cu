// Which values dropout keeps, as a bitmap: `draw` in swat_jax/dropout_bits.py.

#include "handlers.cuh"
#include "memory.cuh"

namespace swat {
namespace {

// Four random words of a counter and a key: Philox4x32-10 (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3", 2011).
__device__ __forceinline__ uint4 philox(uint64_t index, uint2 key) {
  uint4 c = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0, 0};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    constexpr uint32_t kX = 0xd2511f53u, kZ = 0xcd9e8d57u;
    c = {__umulhi(kZ, c.z) ^ c.y ^ key.x, kZ * c.z, __umulhi(kX, c.x) ^ c.w ^ key.y, kX * c.x};
    key = {key.x + 0x9e3779b9u, key.y + 0xbb67ae85u};
  }
  return c;
}

// A word of the bitmap for every thread in turn. `dropped`: below it 16 random bits drop a value.
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const uint32_t* key, uint32_t dropped, int64_t n, uint32_t* bitmap) {
  const uint2 words = {key[0], key[1]};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i * 32 < n; i += step) {
    uint32_t kept = 0;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const uint4 random = philox(static_cast<uint64_t>(i) * 4 + part, words);
      const uint32_t found[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        kept |= ((found[word] & 0xffff) >= dropped ? 1u : 0u) << (8 * part + 2 * word);
        kept |= (found[word] >> 16 >= dropped ? 1u : 0u) << (8 * part + 2 * word + 1);
      }
    }
    // There is nothing beyond the end.
    if (n - i * 32 < 32) kept &= (1u << (n - i * 32)) - 1;
    bitmap[i] = kept;
  }
}

ffi::Error draw_op(cudaStream_t stream, ffi::AnyBuffer key, ffi::Result<ffi::AnyBuffer> bitmap,
                   int64_t n, int64_t dropped) {
  constexpr const char* kOp = "dropout_bits";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "bitmap", *bitmap, 1, batch));
  if (n < 0 || dropped < 0 || dropped > (1 << 16)) {
    return invalid(std::string(kOp) + ": n must be 0 or more and dropped 0 to 65536, got " +
                   std::to_string(n) + " and " + std::to_string(dropped));
  }
  SWAT_RETURN_IF_ERROR(check(kOp, "key", key, ffi::U32, 2 * batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "bitmap", *bitmap, ffi::U32, batch * bitmap_words(n)));
  if (n == 0) return ffi::Error::Success();
  for (int64_t b = 0; b < batch; ++b) {
    SWAT_RETURN_IF_ERROR(cuda_error(
        kOp, launch(stream, draw_kernel, 0, (bitmap_words(n) + kThreads - 1) / kThreads,
                    static_cast<const uint32_t*>(key.untyped_data()) + 2 * b,
                    static_cast<uint32_t>(dropped), n,
                    static_cast<uint32_t*>(bitmap->untyped_data()) + b * bitmap_words(n))));
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_dropout_bits, swat::draw_op,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Ret<xla::ffi::AnyBuffer>()  // bitmap
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("dropped"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
