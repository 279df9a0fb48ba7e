// The weight gradient from packed activations by what only Hopper has.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sparse_conv.cuh"

namespace swat {

// Launches it for pixels that follow one another. `found` says whether this GPU has a kernel for these
// channels with tiles of `m` input and `n` output channels; if not, nothing was launched. `float16` or
// bfloat16 operands.
cudaError_t launch_on_hopper(cudaStream_t stream, const conv::Problem& problem, bool is_half_precision,
                             const float* least, int64_t m, int64_t n, bool& found);

}  // namespace swat
