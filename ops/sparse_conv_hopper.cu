// The weight gradient of a 1x1 convolution from packed activations, on Hopper: how it is launched.
// What a block does stands in sparse_conv_hopper.cuh.

#include "sparse_conv_hopper.cuh"

#include <cuda.h>

#include "launch_on_hopper.cuh"
#include "packing.cuh"

namespace swat {
namespace {

static_assert(hopper::kTileValues == kTile);

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    hopper_weight_gradient_kernel(const __grid_constant__ hopper::Problem problem,
                                  const __grid_constant__ CUtensorMap map, const float* least) {
  // Other architectures have none of this: there the kernel is empty, and `has` says so.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint4 dynamic[];  // as in the other files, which tests/gpu puts together
  hopper::make_part<C>(problem, &map, Limit<typename C::T>(*least).least,
                       (shared_address(dynamic) + 1023) / 1024 * 1024);
#endif
}

// Whether this GPU has the kernel: one that is empty needs next to no registers, and what warps give
// others has to be there.
template <typename C>
cudaError_t has(bool& found) {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, hopper_weight_gradient_kernel<C>);
  found = code == cudaSuccess && attributes.numRegs >= static_cast<int>(C::kStart);
  return code;
}

// `cuTensorMapEncodeTiled` of the driver that is there; nullptr if it has none. The library is not linked
// with the driver's, so that it loads without a GPU.
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);
EncodeTiled find_encode_tiled() {
  static const EncodeTiled found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                              cudaEnableDefault, &result);
#else
    const cudaError_t code =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    return code == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(entry)
               : nullptr;
  }();
  return found;
}

// dY as the copy engine sees it: pixels and channels, in boxes of `box_pixels` and 64. What a box has
// beyond the last of either becomes zero.
template <typename T>
cudaError_t describe(CUtensorMap& map, const void* dy, uint32_t pixels, uint32_t channels,
                     uint32_t box_pixels) {
  const EncodeTiled encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {channels, pixels}, strides[1] = {2ull * channels};
  const cuuint32_t box[2] = {64, box_pixels}, steps[2] = {1, 1};
  const CUresult code = encode_tiled(
      &map,
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(dy), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename C>
cudaError_t launch_cut(cudaStream_t stream, const conv::Problem& of, const float* least, bool& found,
                       uint32_t x_stages, uint32_t dy_stages) {
  const conv::Shape& shape = of.shape;
  if (!hopper::takes<C>(shape.in, shape.out)) return cudaSuccess;
  cudaError_t code = has<C>(found);
  if (code != cudaSuccess || !found) return code;
  hopper::Problem problem = {};
  problem.values = of.values, problem.bitmap = of.bitmap, problem.offsets = of.offsets;
  problem.partial = of.partial;
  problem.pixels = shape.pixels, problem.in = shape.in, problem.out = shape.out;
  problem.capacity = of.capacity, problem.words = of.words, problem.splits = of.splits;
  problem.x_stages = x_stages, problem.dy_stages = dy_stages;
  int device = 0, bytes = 0;
  code = cudaGetDevice(&device);
  if (code != cudaSuccess) return code;
  code = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code != cudaSuccess) return code;
  if (!hopper::fit<C>(problem, static_cast<uint32_t>(bytes))) return cudaErrorInvalidConfiguration;
  const uint32_t shared =
      hopper::Shared<C>(problem.x_stages, problem.dy_stages, problem.room).bytes;
  CUtensorMap map;
  code = describe<typename C::T>(map, of.dy, shape.pixels, shape.out, C::P);
  if (code != cudaSuccess) return code;
  code = cudaFuncSetAttribute(hopper_weight_gradient_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared));
  if (code != cudaSuccess) return code;
  hopper_weight_gradient_kernel<C>
      <<<hopper::Part<C>::blocks_of(problem) * problem.splits, C::kThreads, shared, stream>>>(
          problem, map, least);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_tile(cudaStream_t stream, const conv::Problem& problem, const float* least, int64_t m,
                        int64_t n, bool& found) {
  using hopper::Cut;
  const auto is = [&](int64_t a, int64_t b) { return m == a && n == b; };
  if (is(64, 64)) return launch_cut<Cut<T, 64, 64, true, 64, 3>>(stream, problem, least, found, 4, 4);
  if (is(64, 256)) return launch_cut<Cut<T, 64, 256, true, 32, 3>>(stream, problem, least, found, 6, 4);
  if (is(128, 128)) return launch_cut<Cut<T, 128, 128, true, 64, 2>>(stream, problem, least, found, 4, 4);
  if (is(128, 256)) return launch_cut<Cut<T, 128, 256, true, 32, 2>>(stream, problem, least, found, 8, 8);
  if (is(256, 64)) {
    // Warps that take two units at a time, where chunks are whole pairs of them.
    return problem.shape.in % 64 == 0
               ? launch_cut<Cut<T, 256, 64, false, 64, 4, false, 2>>(stream, problem, least, found, 4, 2)
               : launch_cut<Cut<T, 256, 64, false, 64, 4>>(stream, problem, least, found, 4, 2);
  }
  if (is(256, 128)) {
    return problem.shape.in == 512
               ? launch_cut<Cut<T, 256, 128, false, 32, 3, true>>(stream, problem, least, found, 6, 6)
               : launch_cut<Cut<T, 256, 128, false, 64, 2>>(stream, problem, least, found, 4, 4);
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_on_hopper(cudaStream_t stream, const conv::Problem& problem, bool is_half_precision,
                             const float* least, int64_t m, int64_t n, bool& found) {
  found = false;
  return is_half_precision ? launch_tile<__half>(stream, problem, least, m, n, found)
                           : launch_tile<__nv_bfloat16>(stream, problem, least, m, n, found);
}

}  // namespace swat
