// Packed tensors and back: `pack` and `unpack` in swat_jax/sparsity/packing.py.

#include "selection.cuh"

namespace swat {
namespace {

ffi::Error pack_op(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer threshold,
                ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> bitmap,
                ffi::Result<ffi::AnyBuffer> offsets, ffi::Result<ffi::AnyBuffer> overflow,
                ffi::Result<ffi::AnyBuffer> scratch) {
  constexpr const char* kOp = "pack";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "x", x, 1, batch));
  const int64_t n = x.dimensions().back();
  SWAT_RETURN_IF_ERROR(check_size(kOp, "x", n));
  SWAT_RETURN_IF_ERROR(check(kOp, "threshold", threshold, ffi::F32, batch));
  PackedShape shape;
  SWAT_RETURN_IF_ERROR(
      check_packed(kOp, x.element_type(), n, batch, *values, *bitmap, *offsets, shape));
  SWAT_RETURN_IF_ERROR(check(kOp, "overflow", *overflow, ffi::U32, batch));
  SWAT_RETURN_IF_ERROR(check(kOp, "scratch", *scratch, ffi::U32, batch * selection_words(n)));
  return with_type(kOp, "x", x.element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const Values<T> source(static_cast<const T*>(x.untyped_data()) + b * n, n);
      Selection<T> selection;
      selection.workspace =
          static_cast<uint32_t*>(scratch->untyped_data()) + b * selection_words(n);
      selection.n = n;
      selection.stored = static_cast<const float*>(threshold.untyped_data()) + b;
      selection.packed = shape.problem<T>(b, values->untyped_data(), bitmap->untyped_data(),
                                          offsets->untyped_data(), overflow->untyped_data());
      SWAT_RETURN_IF_ERROR(cuda_error(kOp, swat::pack(stream, source, source, selection)));
    }
    return ffi::Error::Success();
  });
}

// A tile is unpacked by one warp, in eight steps of one octet a lane.
constexpr int kTileSteps = kTile / (32 * kOctet);
static_assert(kTileSteps == 8);

// The flags of a lane in a tile, and where they lie among those of the tile.
struct TileFlags {
  uint32_t flags[2] = {};  // of four steps each

  __device__ __forceinline__ uint32_t operator[](int step) const {
    return flags[step / 4] >> (8 * (step % 4)) & 0xff;
  }
  __device__ __forceinline__ void set(int step, uint32_t found) {
    flags[step / 4] |= found << (8 * (step % 4));
  }
  // Of every step how many flags come before; returns how many there are.
  __device__ uint32_t rank(uint32_t (&first)[kTileSteps]) const {
    uint32_t total = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const WarpRanks ranks(flags[half]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        first[4 * half + k] = total + ranks.rank(k);
        total += ranks.total(k);
      }
    }
    return total;
  }
};

// The values of a tile come to shared memory side by side, and its lanes pick theirs. Values below
// `least` are left out.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Packed<T> packed, const float* least, int64_t n, T* to, bool wide) {
  extern __shared__ uint4 dynamic[];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  T* stage = reinterpret_cast<T*>(dynamic) + warp * kTile;
  const Limit<T> limit(*least);
  const bool filters = limit.wide != 0;
  const int64_t tiles = tiles_of(n);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  TileFlags next_flags;
  uint64_t next_offset = 0;
  const auto request = [&](int64_t of) {
    next_flags = TileFlags{};
    if (of >= tiles) return;
#pragma unroll
    for (int k = 0; k < kTileSteps; ++k) {
      next_flags.set(k, load_bits(packed.bitmap, of * kTile + (k * 32 + lane) * kOctet, n));
    }
    next_offset = __ldg(packed.offsets + of);
  };
  request(tile);
  for (; tile < tiles; tile += step) {
    const TileFlags flags = next_flags;
    const uint64_t offset = next_offset;
    request(tile + step);
    uint32_t first[kTileSteps];
    const uint32_t total = flags.rank(first);
    // Several loads are under way before the first is needed.
    constexpr int kAhead = 8;
    for (uint32_t i = lane; i < total; i += 32 * kAhead) {
      T values[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        // The same clamp as in the twin: a bitmap that promises too much stays in bounds.
        const uint64_t at = min(offset + i + 32 * k, packed.capacity - uint64_t{1});
        values[k] = packed.values[at];
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (i + 32 * k < total) stage[i + 32 * k] = values[k];
      }
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kTileSteps; ++k) {
      uint32_t at = first[k];
      Octet<T> octet;
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        // What is read without its flag is not used: a load costs less than a branch. The index
        // stays below kTile, since not all flags are set then.
        const uint32_t flag = flags[k] >> j & 1;
        const T found = stage[at];
        at += flag;
        octet.v[j] = flag != 0 ? found : from_float<T>(0.f);
      }
      if (filters) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          if (!limit.keeps(octet.v[j])) octet.v[j] = from_float<T>(0.f);
        }
      }
      store(octet, to, tile * kTile + (k * 32 + lane) * kOctet, n, wide);
    }
    __syncwarp();
  }
}

ffi::Error unpack_op(cudaStream_t stream, ffi::AnyBuffer values, ffi::AnyBuffer bitmap,
                  ffi::AnyBuffer offsets, ffi::AnyBuffer least,
                  ffi::Result<ffi::AnyBuffer> result) {
  constexpr const char* kOp = "unpack";
  int64_t batch = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "result", *result, 1, batch));
  const int64_t n = result->dimensions().back();
  SWAT_RETURN_IF_ERROR(check_size(kOp, "result", n));
  SWAT_RETURN_IF_ERROR(check(kOp, "least", least, ffi::F32, batch));
  PackedShape shape;
  SWAT_RETURN_IF_ERROR(
      check_packed(kOp, result->element_type(), n, batch, values, bitmap, offsets, shape));
  return with_type(kOp, "result", result->element_type(), [&](auto example) {
    using T = decltype(example);
    for (int64_t b = 0; b < batch; ++b) {
      const Packed<T> packed = shape.problem<T>(b, values.untyped_data(), bitmap.untyped_data(),
                                                offsets.untyped_data(), nullptr);
      T* to = static_cast<T*>(result->untyped_data()) + b * n;
      SWAT_RETURN_IF_ERROR(cuda_error(
          kOp, launch(stream, unpack_kernel<T>, sizeof(T) * kTile * kWarps,
                      (tiles_of(n) + kWarps - 1) / kWarps, packed,
                      static_cast<const float*>(least.untyped_data()) + b, n, to, is_wide(to))));
    }
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_pack, swat::pack_op,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // x
                                  .Arg<xla::ffi::AnyBuffer>()   // threshold
                                  .Ret<xla::ffi::AnyBuffer>()   // values
                                  .Ret<xla::ffi::AnyBuffer>()   // bitmap
                                  .Ret<xla::ffi::AnyBuffer>()   // offsets
                                  .Ret<xla::ffi::AnyBuffer>()   // overflow
                                  .Ret<xla::ffi::AnyBuffer>(),  // scratch
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_unpack, swat::unpack_op,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()   // values
                                  .Arg<xla::ffi::AnyBuffer>()   // bitmap
                                  .Arg<xla::ffi::AnyBuffer>()   // offsets
                                  .Arg<xla::ffi::AnyBuffer>()   // least
                                  .Ret<xla::ffi::AnyBuffer>(),  // x
                              {xla::ffi::Traits::kCmdBufferCompatible});
