// Per-channel quantities of batch norm: how threads find them, and sums over all rows.
//
// x is (rows, channels), channels last. Elementwise passes walk the flattened tensor in octets; if
// the number of channels divides a tile, a thread meets the same eight channels in every tile and
// keeps what belongs to them in registers.

#pragma once

#include "blocks.cuh"
#include "handlers.cuh"
#include "memory.cuh"

namespace swat {

// The remainder of an index divided by the number of channels, which is below 2**31. Multiplying by
// the inverse is exact for indices below 2**32 (Lemire, Kaser and Kurz 2019, "Faster remainder by
// direct computation").
struct Remainder {
  uint64_t inverse = 0;
  uint32_t divisor = 1;

  Remainder() = default;
  explicit Remainder(uint32_t divisor) : inverse(~uint64_t{0} / divisor + 1), divisor(divisor) {}
  __device__ __forceinline__ uint32_t operator()(int64_t i) const {
    if (i >> 32 != 0) return static_cast<uint32_t>(static_cast<uint64_t>(i) % divisor);
    return static_cast<uint32_t>(__umul64hi(inverse * static_cast<uint64_t>(i), divisor));
  }
};

inline bool is_fixed(int64_t channels) { return channels <= kTile && kTile % channels == 0; }

// What the forward pass needs of a channel: y = x * factor + shift.
struct Parameters {
  const float* mean;
  const float* variance;
  const float* scale;
  const float* bias;
  float epsilon;

  __device__ float factor(uint32_t c) const { return rsqrtf(variance[c] + epsilon) * scale[c]; }
  __device__ float shift(uint32_t c) const { return fmaf(-mean[c], factor(c), bias[c]); }
  __device__ float deviation(uint32_t c) const { return rsqrtf(variance[c] + epsilon); }
};

// The one place where x is normalised: passes that recompute the sign of y must agree on it.
__device__ __forceinline__ float normalized(float x, float factor, float shift) {
  return fmaf(x, factor, shift);
}

// `count` per-channel arrays for the octet at flat index i, from memory: (count, channels) floats.
template <int kCount>
__device__ __forceinline__ void load_coefficients(const float* from, const Remainder& remainder,
                                                  int64_t i, float (&to)[kCount][kOctet]) {
  const uint32_t channels = remainder.divisor;
  uint32_t c = remainder(i);
  if (channels % kOctet == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float* row = from + static_cast<size_t>(k) * channels + c;
      if (channels % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const float4 low = __ldg(reinterpret_cast<const float4*>(row));
        const float4 high = __ldg(reinterpret_cast<const float4*>(row) + 1);
        to[k][0] = low.x, to[k][1] = low.y, to[k][2] = low.z, to[k][3] = low.w;
        to[k][4] = high.x, to[k][5] = high.y, to[k][6] = high.z, to[k][7] = high.w;
      } else {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) to[k][j] = __ldg(row + j);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) to[k][j] = __ldg(from + static_cast<size_t>(k) * channels + c);
      if (++c == channels) c = 0;
    }
  }
}

// ---- Sums over rows ----------------------------------------------------------------------------

// How a (rows, channels) tensor is cut for column sums: a block takes `lanes` groups of V channels
// and one row group in every `chunks`. The cut depends on the shape and on whether the tensor is
// aligned, so sums have the same bits on every device.
struct Cut {
  int64_t rows, channels;
  int width;  // V
  int lanes;
  int64_t columns;  // blocks side by side
  int64_t chunks;

  Cut(int64_t rows, int64_t channels, bool wide) : rows(rows), channels(channels) {
    width = wide && channels % kOctet == 0 ? kOctet : 1;
    const int64_t groups = channels / width;
    const int64_t most = width == 1 ? kMostWidth : kMostWidth / kOctet;
    lanes = static_cast<int>(std::min(groups, most));
    // Lanes that divide the groups leave no thread without work.
    for (int64_t divisor = lanes; divisor >= 4; --divisor) {
      if (groups % divisor == 0) {
        lanes = static_cast<int>(divisor);
        break;
      }
    }
    lanes = std::max(lanes, 1);
    columns = std::max<int64_t>((groups + lanes - 1) / lanes, 1);
    chunks = std::max<int64_t>(std::min((kBlocks + columns - 1) / columns, most_chunks(rows)), 1);
  }

  static constexpr int64_t kBlocks = 396;  // three for every multiprocessor of a large device
  static constexpr int64_t kLeastRows = 128;
  static constexpr int64_t kMostWidth = 128;  // channels of a block
  static int64_t most_chunks(int64_t rows) {
    return std::min(kBlocks, (rows + kLeastRows - 1) / kLeastRows);
  }
  // Scratch in 32-bit words: two partial sums a channel and chunk.
  static int64_t words(int64_t rows, int64_t channels) {
    return channels * 2 * std::max<int64_t>(most_chunks(rows), 1);
  }
  dim3 grid() const { return dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(columns)); }
};

template <int V>
struct ColumnScratch {
  float sums[2][kThreads * V];
};

// Adds up two sums per channel over the rows of a block. `first` and `second` are this thread's, for
// its V channels; `scratch` is shared.
template <int V>
__device__ void sum_columns(const float (&first)[V], const float (&second)[V], int lanes,
                            int64_t channels, float2* partial, ColumnScratch<V>& scratch) {
  const int rows = kThreads / lanes, width = lanes * V;
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int64_t start = static_cast<int64_t>(blockIdx.y) * width;  // first channel of the block
  if (row < rows) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      scratch.sums[0][row * width + lane * V + v] = first[v];
      scratch.sums[1][row * width + lane * V + v] = second[v];
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < width; column += kThreads) {
    if (start + column >= channels) continue;
    float a = 0.f, b = 0.f;
    for (int r = 0; r < rows; ++r) {
      a += scratch.sums[0][r * width + column];
      b += scratch.sums[1][r * width + column];
    }
    partial[blockIdx.x * channels + start + column] = make_float2(a, b);
  }
}

// Adds the chunks, always in the same order, and calls `finish(channel, first, second)` once per
// channel. A warp takes every eighth chunk of 32 channels.
template <typename Finish>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const float2* partial, int64_t chunks, int64_t channels, Finish finish) {
  __shared__ double totals[2][kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double a = 0, b = 0;
  if (channel < channels) {
#pragma unroll 8
    for (int64_t chunk = warp; chunk < chunks; chunk += kWarps) {
      const float2 sums = partial[chunk * channels + channel];
      a += sums.x;
      b += sums.y;
    }
  }
  totals[0][warp][lane] = a;
  totals[1][warp][lane] = b;
  __syncthreads();
  if (warp != 0 || channel >= channels) return;
  for (int other = 1; other < kWarps; ++other) {
    a += totals[0][other][lane];
    b += totals[1][other][lane];
  }
  finish(channel, a, b);
}

// ---- Handlers ----------------------------------------------------------------------------------

inline ffi::Error check_rows(const char* op, int64_t rows, int64_t channels) {
  if (rows >= 1 && channels >= 1 && channels < (int64_t{1} << 31)) return ffi::Error::Success();
  return invalid(std::string(op) + ": x must have at least one row and 1 to 2**31 - 1 channels, got " +
                 std::to_string(rows) + " and " + std::to_string(channels));
}

// Where a problem begins in an operand; nothing if the operand is absent (empty).
template <typename T>
const T* part(ffi::AnyBuffer& buffer, int64_t offset) {
  return buffer.element_count() == 0 ? nullptr
                                     : static_cast<const T*>(buffer.untyped_data()) + offset;
}

inline ffi::Error check_optional(const char* op, const char* name, ffi::AnyBuffer& buffer,
                                 ffi::DataType type, int64_t count, size_t alignment) {
  if (buffer.element_count() == 0) return ffi::Error::Success();
  return check(op, name, buffer, type, count, alignment);
}

// A batch of (rows, channels) tensors, and what belongs to their channels.
struct Problems {
  int64_t batch = 1, rows = 0, channels = 0;
  ffi::DataType type = ffi::DataType::INVALID;

  int64_t size() const { return rows * channels; }
  ffi::Error of(const char* op, ffi::AnyBuffer& x) {
    SWAT_RETURN_IF_ERROR(split_batch(op, "x", x, 2, batch));
    const auto dims = x.dimensions();
    rows = dims[dims.size() - 2];
    channels = dims[dims.size() - 1];
    type = x.element_type();
    return check_rows(op, rows, channels);
  }
  ffi::Error check_vector(const char* op, const char* name, ffi::AnyBuffer& vector) const {
    return check(op, name, vector, ffi::F32, batch * channels);
  }
};

struct Vectors {
  ffi::AnyBuffer &mean, &variance, &scale, &bias;
  float epsilon;

  ffi::Error check(const char* op, const Problems& problems) const {
    SWAT_RETURN_IF_ERROR(problems.check_vector(op, "mean", mean));
    SWAT_RETURN_IF_ERROR(problems.check_vector(op, "variance", variance));
    SWAT_RETURN_IF_ERROR(problems.check_vector(op, "scale", scale));
    return problems.check_vector(op, "bias", bias);
  }
  Parameters of(int64_t problem, int64_t channels) const {
    const int64_t at = problem * channels;
    return {part<float>(mean, at), part<float>(variance, at), part<float>(scale, at),
            part<float>(bias, at), epsilon};
  }
};

}  // namespace swat
