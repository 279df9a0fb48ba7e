// The gradient of max pooling from which value won: `gradient` in swat_jax/max_pool.py.

#include <limits>

#include "handlers.cuh"
#include "memory.cuh"

namespace swat {
namespace {

struct PoolAxis {
  int size, results;  // of the input and of the result
  int window, stride, low;

  // The last window that covers `at`, and the first.
  __device__ int last(int at) const { return min((at + low) / stride, results - 1); }
  __device__ int first(int at) const {
    const int reach = at + low - window;
    return reach < 0 ? 0 : reach / stride + 1;
  }
  __device__ int position(int at, int result) const { return at + low - result * stride; }
};

template <int V>
struct alignas(V) Winners {
  uint8_t v[V];
};

// V channels of one input value a thread, of a line of pixels after the other. Its windows are
// visited so that its position in them rises, as in the twin. Index counts the units of a line:
// divisions of 64 bits would cost more than the memory does.
template <typename T, int V, typename Index>
__global__ void __launch_bounds__(kThreads)
    max_pool_gradient_kernel(const uint8_t* winner, const T* dy, T* dx, PoolAxis rows,
                             PoolAxis columns, int64_t channels, int64_t lines) {
  const Index groups = static_cast<Index>(channels / V);
  const Index unit = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (unit >= columns.size * groups) return;
  const Index group = unit % groups;
  const int x = static_cast<int>(unit / groups);
  const int first_column = columns.first(x), last_column = columns.last(x);
  for (int64_t line = blockIdx.y; line < lines; line += gridDim.y) {
    const int64_t image = line / rows.size;
    const int y = static_cast<int>(line - image * rows.size);
    const int first_row = rows.first(y);
    float sums[V] = {};
    for (int r = rows.last(y); r >= first_row; --r) {
      for (int c = last_column; c >= first_column; --c) {
        const int64_t at =
            ((image * rows.results + r) * columns.results + c) * channels +
            static_cast<int64_t>(group) * V;
        const uint32_t position =
            static_cast<uint32_t>(rows.position(y, r) * columns.window + columns.position(x, c));
        const Winners<V> won = *reinterpret_cast<const Winners<V>*>(winner + at);
        if constexpr (V == kOctet) {
          const Octet<T> values = load(dy, at, at + kOctet, true);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[v] += won.v[v] == position ? to_float(values.v[v]) : 0.f;
        } else {
          sums[0] += won.v[0] == position ? to_float(dy[at]) : 0.f;
        }
      }
    }
    const int64_t to = line * columns.size * channels + static_cast<int64_t>(unit) * V;
    if constexpr (V == kOctet) {
      store(from_floats<T>(sums), dx, to, to + kOctet, true, true);
    } else {
      dx[to] = from_float<T>(sums[0]);
    }
  }
}

ffi::Error max_pool_gradient(cudaStream_t stream, ffi::AnyBuffer winner, ffi::AnyBuffer dy,
                             ffi::Result<ffi::AnyBuffer> dx, ffi::Span<const int64_t> window,
                             ffi::Span<const int64_t> strides, ffi::Span<const int64_t> lows) {
  constexpr const char* kOp = "max_pool_gradient";
  int64_t batch = 1, results = 1;
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "dx", *dx, 3, batch));
  SWAT_RETURN_IF_ERROR(split_batch(kOp, "dy", dy, 3, results));
  if (batch != results) {
    return invalid("max_pool_gradient: dy must have " + std::to_string(batch) +
                   " images as dx has, got " + std::to_string(results));
  }
  if (window.size() != 2 || strides.size() != 2 || lows.size() != 2) {
    return invalid("max_pool_gradient: window, strides and lows must have two numbers each");
  }
  const auto to = dx->dimensions(), from = dy.dimensions();
  for (size_t axis = 0; axis < 2; ++axis) {
    const int64_t most = std::numeric_limits<int>::max() / 2;
    if (window[axis] < 1 || window[axis] > most || strides[axis] < 1 || strides[axis] > most ||
        lows[axis] < 0 || lows[axis] > most || to[to.size() - 3 + axis] > most) {
      return invalid("max_pool_gradient: window, strides, lows and dx are out of range");
    }
  }
  const auto axis_of = [&](size_t axis) {
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    return PoolAxis{number(to[to.size() - 3 + axis]), number(from[from.size() - 3 + axis]),
                    number(window[axis]), number(strides[axis]), number(lows[axis])};
  };
  const PoolAxis rows = axis_of(0), columns = axis_of(1);
  const int64_t channels = to.back(), values = count_of(*dx);
  SWAT_RETURN_IF_ERROR(
      check(kOp, "dy", dy, dx->element_type(), batch * rows.results * columns.results * channels, 2));
  SWAT_RETURN_IF_ERROR(check(kOp, "winner", winner, ffi::U8, count_of(dy), 1));
  if (values == 0) return ffi::Error::Success();
  return with_type(kOp, "dx", dx->element_type(), [&](auto example) {
    using T = decltype(example);
    const T* gradients = static_cast<const T*>(dy.untyped_data());
    const uint8_t* winners = static_cast<const uint8_t*>(winner.untyped_data());
    T* target = static_cast<T*>(dx->untyped_data());
    const bool octets = channels % kOctet == 0 && is_wide(gradients) && is_wide(target) &&
                        reinterpret_cast<uintptr_t>(winners) % kOctet == 0;
    const int64_t units = columns.size * (octets ? channels / kOctet : channels);  // of a line
    const int64_t lines = batch * rows.size;
    const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads),
                    static_cast<unsigned>(std::min<int64_t>(lines, 65535)));
    const auto run = [&](auto kernel) {
      kernel<<<grid, kThreads, 0, stream>>>(winners, gradients, target, rows, columns, channels,
                                            lines);
      return cuda_error(kOp, cudaGetLastError());
    };
    if (units >= int64_t{1} << 31) {
      return octets ? run(max_pool_gradient_kernel<T, kOctet, int64_t>)
                    : run(max_pool_gradient_kernel<T, 1, int64_t>);
    }
    return octets ? run(max_pool_gradient_kernel<T, kOctet, uint32_t>)
                  : run(max_pool_gradient_kernel<T, 1, uint32_t>);
  });
}

}  // namespace
}  // namespace swat

XLA_FFI_DEFINE_HANDLER_SYMBOL(swat_jax_max_pool_gradient, swat::max_pool_gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // winner
                                  .Arg<xla::ffi::AnyBuffer>()  // dy
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Attr<xla::ffi::Span<const int64_t>>("window")
                                  .Attr<xla::ffi::Span<const int64_t>>("strides")
                                  .Attr<xla::ffi::Span<const int64_t>>("lows"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
