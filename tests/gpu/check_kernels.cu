// The kernels without JAX, for compute-sanitizer and for two streams at once.
//
//   nvcc -std=c++17 -O3 -arch=native -DSWAT_JAX_MOST_BLOCKS=3 -DSWAT_JAX_LEAST_GUESSED=40000 \
//        -I ops -isystem ops/third_party tests/gpu/check_kernels.cu -o check_kernels
//   # -arch=sm_90a on Hopper
//   ./check_kernels && compute-sanitizer --tool racecheck ./check_kernels 4 1
//
// Every problem runs forward and backward on each of two streams at the same time and is compared
// with what the host computes in double, and with its own first run bit by bit. Buffers lie between
// red zones, which must be untouched at the end.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "batch_norm.cu"
#include "batch_norm_relu.cu"
#include "compact.cu"
#include "dropout.cu"
#include "max_pool.cu"
#include "pack.cu"
#include "sparse_conv.cu"
#include "sparse_conv_direct.cu"
#include "sparse_conv_hopper.cu"
#include "sparse_conv_vector.cu"
#include "thresholds.cu"

namespace swat {
namespace {

int failures = 0;
int guesses = 0;  // that were right

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

void check_cuda(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

// Device memory between two red zones. Copies and memsets may return early, and no stream here waits
// for the default one.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    check_cuda(cudaMalloc(&memory_, bytes() + 2 * kZone), "cudaMalloc");
    check_cuda(cudaMemset(memory_, kRed, kZone), "cudaMemset");
    check_cuda(cudaMemset(memory_ + kZone + bytes(), kRed, kZone), "cudaMemset");
    check_cuda(cudaDeviceSynchronize(), "red zones");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(memory_); }
  T* get() const { return reinterpret_cast<T*>(memory_ + kZone); }
  void set(const std::vector<T>& from) const {
    check_cuda(cudaMemcpy(get(), from.data(), bytes(), cudaMemcpyHostToDevice), "to the device");
    check_cuda(cudaDeviceSynchronize(), "to the device");
  }
  std::vector<T> read() const {
    std::vector<T> to(count_);
    check_cuda(cudaMemcpy(to.data(), get(), bytes(), cudaMemcpyDeviceToHost), "to the host");
    return to;
  }
  void expect_zones_untouched(const char* what) const {
    std::vector<unsigned char> zone(kZone);
    for (const int64_t at : {int64_t{0}, kZone + static_cast<int64_t>(bytes())}) {
      check_cuda(cudaMemcpy(zone.data(), memory_ + at, kZone, cudaMemcpyDeviceToHost), "zone");
      for (const unsigned char byte : zone) {
        if (byte != kRed) return expect(false, what);
      }
    }
  }

 private:
  static constexpr int64_t kZone = 1024;
  static constexpr int kRed = 0xab;
  size_t bytes() const { return sizeof(T) * static_cast<size_t>(count_); }
  int64_t count_;
  char* memory_ = nullptr;
};

float host_float(float value) { return value; }
float host_float(__half value) { return __half2float(value); }
float host_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
std::vector<T> random_values(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) value = T(normal(generator));
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(T) * a.size()) == 0;
}

template <typename A, typename B>
bool close(const std::vector<A>& found, const std::vector<B>& expected, double bound) {
  double largest = 1;
  for (const B value : expected) largest = std::max(largest, std::abs(static_cast<double>(value)));
  for (size_t i = 0; i < found.size(); ++i) {
    if (!(std::abs(host_float(found[i]) - expected[i]) <= bound * largest)) return false;
  }
  return true;
}

// What a run leaves.
template <typename T>
struct Results {
  std::vector<T> y, unpacked, dz, dx, values;
  std::vector<uint32_t> bitmap, offsets, overflow;
  std::vector<float> mean, variance, thresholds, sum, moment;

  bool operator==(const Results& other) const {
    return same_bits(y, other.y) && same_bits(unpacked, other.unpacked) && same_bits(dz, other.dz) &&
           same_bits(dx, other.dx) && same_bits(values, other.values) &&
           same_bits(bitmap, other.bitmap) && same_bits(offsets, other.offsets) &&
           same_bits(overflow, other.overflow) && same_bits(mean, other.mean) &&
           same_bits(variance, other.variance) && same_bits(thresholds, other.thresholds) &&
           same_bits(sum, other.sum) && same_bits(moment, other.moment);
  }
};

// Batch norm with a residual and packing, forward and backward. `mode`: thresholds are exact, or a
// stored one is used, which keeps what it should or far too much.
enum class Thresholds { kExact, kStored, kFarTooLow };

template <typename T, bool kFixed>
class Problem {
 public:
  Problem(int64_t rows, int64_t channels, int64_t keep, Thresholds mode, unsigned seed)
      : rows_(rows), channels_(channels), n_(rows * channels), keep_(keep),
        mode_(mode), host_x_(random_values<T>(n_, seed)), host_more_(random_values<T>(n_, seed + 1)),
        host_dy_(random_values<T>(n_, seed + 2)), x_(n_), more_(n_), dy_(n_), y_(n_), unpacked_(n_),
        dz_(n_), dx_(n_), values_(capacity()), positive_(bitmap_words(n_)), bitmap_(bitmap_words(n_)),
        offsets_(tiles_of(n_)), overflow_(1), workspace_(selection_words(n_)), keeps_(2), plain_values_(capacity()),
        plain_bitmap_(bitmap_words(n_)), plain_offsets_(tiles_of(n_)), plain_overflow_(1),
        partial_(Cut::words(rows, channels)), refresh_(1), stored_(1), thresholds_(1),
        mean_(channels), variance_(channels), scale_(channels), bias_(channels), sum_(channels),
        moment_(channels), coefficients_(4 * channels) {
    x_.set(host_x_), more_.set(host_more_), dy_.set(host_dy_);
    keeps_.set({0, static_cast<uint32_t>(keep_)});
    refresh_.set({static_cast<uint8_t>(mode == Thresholds::kExact ? 1 : 0)});
    stored_.set({mode == Thresholds::kFarTooLow ? 0.125f : 2.0f});
    scale_.set(std::vector<float>(channels, 1.5f));
    bias_.set(std::vector<float>(channels, 0.25f));
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  ~Problem() { cudaStreamDestroy(stream_); }

  int64_t capacity() const { return std::min(keep_ + keep_ / 20 + 1, n_); }

  void start() {
    const bool wide = true;
    const Cut cut(rows_, channels_, wide);
    const bool octets = cut.width == kOctet;
    float2* partial = reinterpret_cast<float2*>(partial_.get());
    const Parameters parameters{mean_.get(), variance_.get(), scale_.get(), bias_.get(), 1e-5f};
    check_cuda(sum_rows(stream_, octets ? statistics_kernel<T, kOctet> : statistics_kernel<T, 1>,
                        octets ? shared_bytes<T, kOctet, 1>() : shared_bytes<T, 1, 1>(), cut, partial,
                        FinishStatistics<T>{{x_.get(), rows_, channels_}, mean_.get(),
                                            variance_.get()},
                        x_.get()),
               "statistics");
    const unsigned blocks = static_cast<unsigned>((channels_ + kThreads - 1) / kThreads);
    const uint32_t channels = static_cast<uint32_t>(channels_);
    coefficients_kernel<<<blocks, kThreads, 0, stream_>>>(parameters, channels, coefficients_.get());
    Normalize<T, kFixed, Second::kResidual> source;
    source.x = x_.get(), source.residual = more_.get(), source.y = y_.get();
    source.positive = positive_.get();
    source.parameters = parameters;
    source.coefficients = coefficients_.get();
    source.n = n_;
    source.channels = Remainder(channels);
    source.relu = true, source.wide = wide;
    Selection<T> selection;
    selection.workspace = workspace_.get();
    selection.n = n_;
    selection.ranks.words = keeps_.get();
    selection.refresh = refresh_.get(), selection.stored = stored_.get();
    selection.thresholds = thresholds_.get();
    selection.packed = packed();
    const Values<T> made(y_.get(), n_);
    check_cuda(pack(stream_, source, made, selection), "pack");
    start_plain(selection);
    check_cuda(launch(stream_, unpack_kernel<T>, sizeof(T) * kTile * kWarps,
                      (tiles_of(n_) + kWarps - 1) / kWarps, packed(),
                      static_cast<const float*>(thresholds_.get()), n_, unpacked_.get(), wide),
               "unpack");
    Gradients<T> gradients{x_.get(), dy_.get(), more_.get(), dz_.get(), positive_.get(),
                           parameters, Mask::kBits, 1.f};
    check_cuda(
        sum_rows(stream_,
                 octets ? gradient_sums_kernel<T, kOctet, true> : gradient_sums_kernel<T, 1, true>,
                 octets ? shared_bytes<T, kOctet, 3>() : shared_bytes<T, 1, 3>(), cut, partial,
                 FinishGradientSums{parameters, sum_.get(), moment_.get()}, gradients),
        "gradient sums");
    const GradientSums sums{sum_.get(), moment_.get(), 1.f / static_cast<float>(rows_)};
    gradient_coefficients_kernel<<<blocks, kThreads, 0, stream_>>>(parameters, sums, channels,
                                                                  coefficients_.get());
    Gradient<T, kFixed> gradient;
    gradient.x = x_.get(), gradient.dy = dz_.get(), gradient.through = more_.get();
    gradient.dx = dx_.get();
    gradient.parameters = parameters, gradient.sums = sums;
    gradient.coefficients = coefficients_.get();
    gradient.n = n_;
    gradient.channels = Remainder(channels);
    gradient.finds_sign = false, gradient.wide = wide;
    check_cuda(launch(stream_, map_kernel<T, Gradient<T, kFixed>>, Streams<T, 3>::kBytes,
                      tiles_of(n_), gradient, n_),
               "gradient");
  }

  Results<T> finish() {
    check_cuda(cudaStreamSynchronize(stream_), "stream");
    return {y_.read(),      unpacked_.read(), dz_.read(),         dx_.read(),   values_.read(),
            bitmap_.read(), offsets_.read(),  overflow_.read(),   mean_.read(), variance_.read(),
            thresholds_.read(), sum_.read(),  moment_.read()};
  }

  void compare(const Results<T>& found) const {
    const double bound = sizeof(T) == 4 ? 1e-4 : std::is_same_v<T, __half> ? 1e-2 : 4e-2;
    std::vector<double> mean(channels_), variance(channels_), sum(channels_), moment(channels_);
    for (int64_t i = 0; i < n_; ++i) mean[i % channels_] += host_float(host_x_[i]) / rows_;
    for (int64_t i = 0; i < n_; ++i) {
      const double off = host_float(host_x_[i]) - mean[i % channels_];
      variance[i % channels_] += off * off / rows_;
    }
    expect(close(found.mean, mean, 1e-4) && close(found.variance, variance, 1e-4), "statistics");
    const auto normal = [&](int64_t i) {
      const int64_t c = i % channels_;
      return (host_float(host_x_[i]) - mean[c]) / std::sqrt(variance[c] + 1e-5);
    };
    std::vector<double> y(n_), dz(n_), dx(n_);
    for (int64_t i = 0; i < n_; ++i) {
      y[i] = std::max(1.5 * normal(i) + 0.25 + host_float(host_more_[i]), 0.0);
      // Where the sign is the device's own: rounding may differ next to 0.
      const bool passes = host_float(found.y[i]) > 0;
      dz[i] = passes ? host_float(host_dy_[i]) + host_float(host_more_[i]) : 0.0;
      sum[i % channels_] += host_float(found.dz[i]);
      moment[i % channels_] += host_float(found.dz[i]) * normal(i);
    }
    expect(close(found.y, y, bound), "y");
    expect(close(found.dz, dz, bound), "dz");
    expect(close(found.sum, sum, 1e-3) && close(found.moment, moment, 1e-3), "gradient sums");
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t c = i % channels_;
      dx[i] = 1.5 / std::sqrt(variance[c] + 1e-5) *
                  (host_float(found.dz[i]) - sum[c] / rows_ - normal(i) * moment[c] / rows_) +
              host_float(host_more_[i]);
    }
    expect(close(found.dx, dx, bound), "dx");
    compare_packed(found);
  }

  void expect_zones_untouched() const {
    y_.expect_zones_untouched("around y");
    unpacked_.expect_zones_untouched("around what was unpacked");
    dz_.expect_zones_untouched("around dz");
    dx_.expect_zones_untouched("around dx");
    values_.expect_zones_untouched("around packed values");
    positive_.expect_zones_untouched("around signs");
    bitmap_.expect_zones_untouched("around the bitmap");
    offsets_.expect_zones_untouched("around offsets");
    workspace_.expect_zones_untouched("around the workspace");
    partial_.expect_zones_untouched("around partial sums");
    thresholds_.expect_zones_untouched("around thresholds");
    overflow_.expect_zones_untouched("around the overflow count");
    mean_.expect_zones_untouched("around means");
    sum_.expect_zones_untouched("around sums");
  }

 private:
  Packed<T> packed() const {
    Packed<T> packed;
    packed.values = values_.get(), packed.bitmap = bitmap_.get(), packed.offsets = offsets_.get();
    packed.overflow = overflow_.get();
    packed.capacity = static_cast<uint32_t>(capacity());
    return packed;
  }

  // Packs y again as devices of compute capability 7.5 do.
  void start_plain(Selection<T> selection) {
    selection.refresh = nullptr, selection.stored = thresholds_.get();
    selection.thresholds = nullptr;
    selection.packed.values = plain_values_.get();
    selection.packed.bitmap = plain_bitmap_.get();
    selection.packed.offsets = plain_offsets_.get();
    selection.packed.overflow = plain_overflow_.get();
    const Values<T> made(y_.get(), n_);
    check_cuda(launch_together(stream_, pack_kernel<T, Values<T>, 1, 1>, kPackBytes<T, 1, 1, 1>,
                               spans_of<T, 1>(n_), kMostBlocks, made, made, selection),
               "pack in short spans");
  }

  // By the rules of swat_jax/sparsity/packing.py, from the device's own y.
  void compare_packed(const Results<T>& found) const {
    std::vector<float> magnitudes(n_);
    for (int64_t i = 0; i < n_; ++i) magnitudes[i] = std::abs(host_float(found.y[i]));
    auto sorted = magnitudes;
    std::nth_element(sorted.begin(), sorted.begin() + keep_ - 1, sorted.end(), std::greater<>());
    const float exact = sorted[keep_ - 1];
    const auto kept_by = [&](float limit) {
      int64_t count = 0;
      for (const float value : magnitudes) count += value >= limit && value > 0;
      return count;
    };
    const float given = mode_ == Thresholds::kFarTooLow ? 0.125f : 2.0f;
    const bool uses_given = mode_ != Thresholds::kExact && kept_by(given) <= capacity();
    const float limit = uses_given ? given : exact;
    expect(found.thresholds[0] == limit, "threshold");
    // A guess may have kept more than the threshold does: whatever is as large as the smallest.
    float least = limit;
    if (mode_ == Thresholds::kExact && n_ >= kLeastGuessed) {
      for (int64_t i = 0; i < n_; ++i) {
        if (found.bitmap[i / 32] >> (i % 32) & 1) least = std::min(least, magnitudes[i]);
      }
      if (least < limit) ++guesses, expect(kept_by(least) <= capacity(), "room for a guess");
    }
    expect(is_packed(magnitudes, found.y, least, found.values, found.bitmap, found.offsets,
                     found.overflow[0]),
           "packed form");
    expect(is_packed(magnitudes, found.y, limit, plain_values_.read(), plain_bitmap_.read(),
                     plain_offsets_.read(), plain_overflow_.read()[0]),
           "packed in short spans");
    bool same = true;
    for (int64_t i = 0; i < n_; ++i) {
      const bool kept = (found.bitmap[i / 32] >> (i % 32) & 1) && magnitudes[i] >= limit;
      same &= host_float(found.unpacked[i]) == (kept ? host_float(found.y[i]) : 0.f);
    }
    expect(same, "unpacked");
  }

  bool is_packed(const std::vector<float>& magnitudes, const std::vector<T>& y, float limit,
                 const std::vector<T>& values, const std::vector<uint32_t>& bitmap,
                 const std::vector<uint32_t>& offsets, uint32_t overflow) const {
    int64_t above = 0, position = 0, wanted = 0;
    for (const float value : magnitudes) above += value > limit;
    int64_t room = capacity() - above;
    bool same = true;
    for (int64_t i = 0; i < n_; ++i) {
      if (i % kTile == 0) same &= offsets[i / kTile] == position;
      bool kept = magnitudes[i] >= limit && magnitudes[i] > 0;
      wanted += kept;
      if (kept && magnitudes[i] == limit) kept = room-- > 0;
      same &= (bitmap[i / 32] >> (i % 32) & 1) == kept;
      if (kept) same &= host_float(values[position++]) == host_float(y[i]);
    }
    for (int64_t i = position; i < capacity(); ++i) same &= host_float(values[i]) == 0.f;
    return same && overflow == wanted - position;
  }

  int64_t rows_, channels_, n_, keep_;
  Thresholds mode_;
  std::vector<T> host_x_, host_more_, host_dy_;
  Buffer<T> x_, more_, dy_, y_, unpacked_, dz_, dx_, values_;
  Buffer<uint32_t> positive_, bitmap_, offsets_, overflow_, workspace_, keeps_;
  // What old devices run: short queues and spans.
  Buffer<T> plain_values_;
  Buffer<uint32_t> plain_bitmap_, plain_offsets_, plain_overflow_, partial_;
  Buffer<uint8_t> refresh_;
  Buffer<float> stored_, thresholds_, mean_, variance_, scale_, bias_, sum_, moment_,
      coefficients_;
  cudaStream_t stream_ = nullptr;
};

template <typename T, bool kFixed>
void run(int64_t rows, int64_t channels, double share, Thresholds mode, int repeats) {
  const int64_t keep = std::max<int64_t>(static_cast<int64_t>(share * rows * channels), 1);
  Problem<T, kFixed> one(rows, channels, keep, mode, 1), other(rows, channels, keep, mode, 2);
  one.start();
  const Results<T> first = one.finish();
  other.start();
  const Results<T> second = other.finish();
  one.compare(first);
  other.compare(second);
  for (int repeat = 0; repeat < repeats; ++repeat) {
    one.start(), other.start();
    expect(one.finish() == first && other.finish() == second, "the same bits on two streams");
  }
  one.expect_zones_untouched();
  other.expect_zones_untouched();
}

void run_max_pool() {
  // 3x3 windows at stride 2, one row and column of padding: winners drawn at random.
  const int size = 9, results = 5, images = 3;
  const int64_t channels = 16;
  const int64_t n = int64_t{images} * results * results * channels;
  Buffer<uint8_t> winner(n);
  Buffer<float> dy(n), dx(int64_t{images} * size * size * channels);
  std::vector<uint8_t> winners(n);
  std::mt19937 generator(3);
  for (uint8_t& value : winners) value = static_cast<uint8_t>(4 + generator() % 5);
  const auto gradient = random_values<float>(n, 4);
  winner.set(winners), dy.set(gradient);
  const PoolAxis axis{size, results, 3, 2, 1};
  max_pool_gradient_kernel<float, kOctet, uint32_t><<<dim3(1, images * size), kThreads>>>(
      winner.get(), dy.get(), dx.get(), axis, axis, channels, images * size);
  check_cuda(cudaDeviceSynchronize(), "max pool");
  double total = 0, expected = 0;
  for (const float value : dx.read()) total += value;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t pixel = i / channels, row = pixel / results % results, column = pixel % results;
    const int64_t y = row * 2 - 1 + winners[i] / 3, x = column * 2 - 1 + winners[i] % 3;
    if (y >= 0 && y < size && x >= 0 && x < size) expected += gradient[i];
  }
  expect(std::abs(total - expected) < 1e-3, "max pool gradient");
  dx.expect_zones_untouched("around the gradient of max pooling");
}

// Thresholds of many tensors, some of which are stored, on two streams at once.
template <typename T>
void run_thresholds(int64_t scale, int repeats) {
  const std::vector<int64_t> sizes = {1, 5000 * scale + 1, 0, 64, 2048, 3 * kTile + 5, 100 * scale};
  const int count = static_cast<int>(sizes.size());
  struct Problem {
    explicit Problem(int64_t count)
        : counts(count * kCountsOfOne), stored(count), found(count), keep(2 * count),
          refresh(count) {}
    Buffer<uint32_t> counts;
    Buffer<float> stored, found;
    Buffer<uint32_t> keep;
    Buffer<uint8_t> refresh;
    cudaStream_t stream;
  };
  std::vector<uint32_t> keep;
  std::vector<uint8_t> refresh;
  std::vector<float> stored, expected;
  std::vector<std::unique_ptr<Buffer<T>>> memory;
  int64_t tiles = 0;
  Tensors<T> tensors;
  tensors.count = count;
  for (int t = 0; t < count; ++t) {
    const int64_t n = sizes[t];
    const auto values = random_values<T>(n, 20 + t);
    memory.push_back(std::make_unique<Buffer<T>>(n));
    if (n > 0) memory.back()->set(values);
    std::vector<float> magnitudes;
    for (const T value : values) magnitudes.push_back(std::abs(host_float(value)));
    std::sort(magnitudes.rbegin(), magnitudes.rend());
    const int64_t kept = n / 10 + 1;
    keep.insert(keep.end(), {0, static_cast<uint32_t>(kept)});
    refresh.push_back(t != 4);
    stored.push_back(0.25f * static_cast<float>(t + 1));
    expected.push_back(t == 4 ? stored.back() : kept <= n ? magnitudes[kept - 1] : 0.f);
    tensors.from[t] = memory.back()->get();
    tensors.sizes[t] = static_cast<uint32_t>(n);
    tiles += std::max<int64_t>(tiles_of(n), 1);
    tensors.ends[t] = static_cast<uint32_t>(tiles);
  }
  Problem problems[2] = {Problem(count), Problem(count)};
  for (Problem& one : problems) {
    one.stored.set(stored), one.keep.set(keep), one.refresh.set(refresh);
    check_cuda(cudaStreamCreateWithFlags(&one.stream, cudaStreamNonBlocking), "stream");
  }
  for (int i = 0; i < repeats; ++i) {
    for (Problem& one : problems) {
      tensors.keep = one.keep.get(), tensors.refresh = one.refresh.get();
      tensors.counts = one.counts.get();
      for (int t = 0; t < count; ++t) {
        tensors.stored[t] = one.stored.get() + t, tensors.thresholds[t] = one.found.get() + t;
      }
      check_cuda(launch_together(one.stream, thresholds_kernel<T>, 0, tiles, kAnyBlocks, tensors),
                 "thresholds");
    }
    check_cuda(cudaDeviceSynchronize(), "thresholds");
    for (Problem& one : problems) expect(one.found.read() == expected, "thresholds of many");
  }
  for (Problem& one : problems) {
    one.counts.expect_zones_untouched("around the counts of many");
    one.found.expect_zones_untouched("around the thresholds of many");
    check_cuda(cudaStreamDestroy(one.stream), "stream");
  }
}

void run_dropout(int64_t scale) {
  const int64_t n = 10000 * scale + 7, words = bitmap_words(n);
  Buffer<uint32_t> key(2), bitmap(words);
  key.set({0, 0});
  check_cuda(launch(nullptr, draw_kernel, 0, 3, key.get(), 19661u, n, bitmap.get()), "dropout");
  check_cuda(cudaDeviceSynchronize(), "dropout");
  const auto found = bitmap.read();
  int64_t kept = 0;
  for (const uint32_t word : found) kept += __builtin_popcount(word);
  expect(std::abs(static_cast<double>(kept) - 0.7 * n) < 5 * std::sqrt(0.21 * n), "share kept");
  // The first hash is 6627e8d5 e169c58d bc57ac4c 9b00dbd8, by its authors.
  expect((found[0] & 0xff) == 0xff, "known answer");
  expect(found.back() >> (n % 32) == 0, "beyond the end");
  bitmap.expect_zones_untouched("around what dropout keeps");
}

bool is_hopper() {
  int device = 0, major = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "capability");
  return major == 9;
}

// The weight gradient from packed activations, of small whole numbers, whose sums are exact.
template <typename T, int M, int N, bool kGathers, bool kOnHopper = false>
void run_sparse_conv(conv::Shape shape, uint32_t images, double share, uint32_t splits, int repeats) {
  shape.pixels = images * shape.rows * shape.columns;
  const int64_t n = int64_t{images} * shape.height * shape.width * shape.in;
  const int64_t sums = int64_t{shape.taps()} * shape.in * shape.out;
  std::mt19937 generator(5);
  std::vector<float> x(n, 0.f);
  std::vector<uint32_t> bitmap(bitmap_words(n), 0), offsets;
  std::vector<T> values, dy(int64_t{shape.pixels} * shape.out);
  for (int64_t i = 0; i < n; ++i) {
    if (i % kTile == 0) offsets.push_back(static_cast<uint32_t>(values.size()));
    if (generator() % 1000 >= share * 1000) continue;
    const float value = static_cast<float>(1 + generator() % 4);
    bitmap[i / 32] |= 1u << i % 32;
    values.push_back(T(value));
    if (value >= 2.f) x[i] = value;  // 1 is left out
  }
  if (values.empty()) values.push_back(T(0.f));
  for (T& value : dy) value = T(static_cast<float>(static_cast<int>(generator() % 9) - 4));
  std::vector<double> expected(sums, 0.0);
  for (uint32_t q = 0; q < shape.pixels; ++q) {
    for (uint32_t tap = 0; tap < shape.taps(); ++tap) {
      const uint32_t pixel = shape.input_pixel(q, tap);
      if (pixel == conv::kNowhere) continue;
      for (uint32_t i = 0; i < shape.in; ++i) {
        const double factor = x[int64_t{pixel} * shape.in + i];
        if (factor == 0) continue;
        for (uint32_t o = 0; o < shape.out; ++o) {
          expected[(int64_t{tap} * shape.in + i) * shape.out + o] +=
              factor * host_float(dy[int64_t{q} * shape.out + o]);
        }
      }
    }
  }
  Buffer<T> packed(values.size()), gradient(dy.size());
  Buffer<uint32_t> bits(bitmap.size()), starts(offsets.size());
  Buffer<float> least(1);
  packed.set(values), gradient.set(dy), bits.set(bitmap), starts.set(offsets), least.set({2.f});
  std::vector<std::unique_ptr<Buffer<float>>> partial, result;
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    partial.push_back(std::make_unique<Buffer<float>>(splits * sums));
    result.push_back(std::make_unique<Buffer<float>>(sums));
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int s = 0; s < 2; ++s) {
      const conv::Problem problem = {shape,
                                     reinterpret_cast<const uint16_t*>(packed.get()),
                                     bits.get(),
                                     starts.get(),
                                     reinterpret_cast<const uint16_t*>(gradient.get()),
                                     partial[s]->get(),
                                     static_cast<uint32_t>(values.size()),
                                     static_cast<uint32_t>(bitmap.size()),
                                     splits};
      if constexpr (kOnHopper) {
        bool found = false;
        check_cuda(launch_on_hopper(streams[s], problem, std::is_same_v<T, __half>, least.get(), M, N,
                                    found),
                   "weight gradient on Hopper");
        expect(found, "a kernel for Hopper: compile with -arch=sm_90a");
      } else {
        check_cuda(launch_tiles<T, M, N, kGathers>(streams[s], problem, least.get()),
                   "weight gradient");
      }
      check_cuda(add_splits(streams[s], partial[s]->get(), splits, sums, result[s]->get()),
                 "sums of splits");
    }
    check_cuda(cudaDeviceSynchronize(), "weight gradient");
    for (const auto& one : result) {
      const auto found = one->read();
      bool same = true;
      for (int64_t i = 0; i < sums; ++i) same &= found[i] == expected[i];
      if (!same) std::printf("tile %d x %d, gathers %d, Hopper %d:\n", M, N, kGathers, kOnHopper);
      expect(same, "weight gradient from packed activations");
    }
  }
  for (int s = 0; s < 2; ++s) {
    partial[s]->expect_zones_untouched("around the parts of weight gradients");
    result[s]->expect_zones_untouched("around the weight gradient");
    check_cuda(cudaStreamDestroy(streams[s]), "stream");
  }
}

template <typename T>
void run_sparse_convs(uint32_t scale, int repeats) {
  const auto plain = [&](uint32_t pixels, uint32_t in, uint32_t out) {
    return conv::Shape{1, pixels, in, 1, pixels, out, 0, {1, 1}, {1, 1}, {0, 0}};
  };
  for (const double share : {0.1, 1.0}) {
    run_sparse_conv<T, 64, 64, false>(plain(50 * scale + 1, 40, 72), 2, share, 2, repeats);
    run_sparse_conv<T, 64, 256, false>(plain(50 * scale, 64, 256), 2, share, 3, repeats);
    run_sparse_conv<T, 128, 128, false>(plain(40 * scale, 264, 128), 2, share, 2, repeats);
    run_sparse_conv<T, 128, 256, false>(plain(40 * scale, 128, 264), 2, share, 2, repeats);
    run_sparse_conv<T, 256, 64, false>(plain(40 * scale + 7, 256, 64), 2, share, 2, repeats);
    if (!is_hopper()) continue;
    run_sparse_conv<T, 64, 64, false, true>(plain(50 * scale + 1, 32, 72), 2, share, 2, repeats);
    run_sparse_conv<T, 64, 256, false, true>(plain(50 * scale, 64, 256), 2, share, 3, repeats);
    run_sparse_conv<T, 128, 128, false, true>(plain(40 * scale, 96, 128), 2, share, 2, repeats);
    run_sparse_conv<T, 128, 256, false, true>(plain(40 * scale, 128, 264), 2, share, 2, repeats);
    run_sparse_conv<T, 256, 64, false, true>(plain(40 * scale + 7, 256, 64), 2, share, 2, repeats);
    run_sparse_conv<T, 256, 128, false, true>(plain(40 * scale + 3, 512, 128), 2, share, 2, repeats);
    run_sparse_conv<T, 256, 128, false, true>(plain(40 * scale, 256, 136), 2, share, 9, repeats);
  }
  const conv::Shape stride = {9, 8, 136, 5, 4, 72, 0, {3, 3}, {2, 2}, {1, 1}};
  run_sparse_conv<T, 128, 128, true>(stride, scale, 0.2, 2, repeats);
  const conv::Shape window = {7, 6, 24, 7, 6, 16, 0, {3, 3}, {1, 1}, {1, 1}};
  run_sparse_conv<T, 64, 64, true>(window, scale, 0.2, 2, repeats);
}

// A convolution with single sparse weights, and the compact form that it takes, of small whole numbers.
template <typename T, int kUnits, int kOutputs, int kRows = 1>
void run_sparse_conv_direct(const direct::Shape& shape, uint32_t chunk, uint32_t part, double share,
                            int repeats) {
  const direct::Plan plan(shape, 32 * kUnits / kRows, kRows, chunk, part);
  const int64_t in = shape.in, out = shape.out, taps = shape.taps();
  const int64_t pixels = int64_t{shape.rows} * shape.columns * shape.images;
  // Single weights, or windows as vectors.
  const bool windows = kRows > 1;
  const int64_t each = windows ? direct::kRoom : 1;
  const int64_t room = windows ? int64_t{chunk} * plan.chunks
                               : (taps * chunk + taps * chunk % 2) * plan.chunks;
  std::mt19937 generator(6);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(generator() % 7) - 3); };
  std::vector<T> x(int64_t{shape.images} * shape.height * shape.width * in);
  std::vector<T> weights(taps * in * out, T(0.f));
  for (T& value : x) value = T(draw());
  for (T& value : weights) {
    if (generator() % 1000 < share * 1000) value = T(draw());
  }
  std::vector<double> expected(pixels * out, 0.0);
  for (int64_t q = 0; q < pixels; ++q) {
    const int64_t image = q / (shape.rows * shape.columns);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = q / shape.columns % shape.rows * shape.strides[0] + tap / shape.window[1] -
                        shape.lows[0];
      const int64_t z = q % shape.columns * shape.strides[1] + tap % shape.window[1] - shape.lows[1];
      if (y < 0 || z < 0 || y >= shape.height || z >= shape.width) continue;
      for (int64_t i = 0; i < in; ++i) {
        const double factor = host_float(x[((image * shape.height + y) * shape.width + z) * in + i]);
        for (int64_t o = 0; o < out; ++o) {
          expected[q * out + o] += factor * host_float(weights[(tap * in + i) * out + o]);
        }
      }
    }
  }
  if (windows) {
    std::vector<T> turned(in * out * each, T(0.f));
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t i = 0; i < in * out; ++i) turned[i * each + tap] = weights[tap * in * out + i];
    }
    weights = turned;
  }
  Buffer<T> input(x.size()), kernel(weights.size());
  input.set(x), kernel.set(weights);
  const Kept kept = {static_cast<int>(windows ? 1 : taps),
                     static_cast<int>(in),
                     static_cast<int>(out * each),
                     static_cast<int>(each),
                     static_cast<int>(chunk),
                     windows ? 1 : static_cast<int>(direct::kMultiple),
                     static_cast<int>(out),
                     static_cast<int>(plan.chunks),
                     static_cast<int>(room)};
  const dim3 blocks(static_cast<unsigned>((out * each + kLanes - 1) / kLanes), plan.chunks);
  struct Side {
    Buffer<T> values, y;
    Buffer<int32_t> positions, starts, lengths;
    cudaStream_t stream;
  };
  std::vector<std::unique_ptr<Side>> sides;
  for (int s = 0; s < 2; ++s) {
    const int64_t words = out * (plan.chunks + 1);
    sides.push_back(std::unique_ptr<Side>(
        new Side{Buffer<T>(out * room * each), Buffer<T>(pixels * out), Buffer<int32_t>(out * room),
                 Buffer<int32_t>(words), Buffer<int32_t>(words), nullptr}));
    check_cuda(cudaStreamCreateWithFlags(&sides[s]->stream, cudaStreamNonBlocking), "stream");
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (const auto& side : sides) {
      count_kept_kernel<T><<<blocks, kThreads, 0, side->stream>>>(kept, kernel.get(),
                                                                  side->lengths.get());
      write_kept_kernel<T><<<blocks, kThreads, 0, side->stream>>>(
          kept, kernel.get(), side->lengths.get(), side->values.get(), side->positions.get(),
          side->starts.get());
      const direct::Problem<T> problem = {plan, input.get(), side->values.get(),
                                          side->positions.get(), side->starts.get(),
                                          side->y.get(), static_cast<uint64_t>(room)};
      const auto code = launch_direct<T, kUnits, kRows, kOutputs>(side->stream, problem);
      check_cuda(code, "a convolution with single weights");
    }
    check_cuda(cudaDeviceSynchronize(), "a convolution with single weights");
    for (const auto& side : sides) {
      const auto found = side->y.read();
      bool same = true;
      for (size_t i = 0; i < found.size(); ++i) {
        same &= host_float(found[i]) == host_float(T(static_cast<float>(expected[i])));
      }
      if (!same) std::printf("%d units, %d outputs:\n", kUnits, kOutputs);
      expect(same, "a convolution with single weights");
    }
  }
  for (const auto& side : sides) {
    side->y.expect_zones_untouched("around the output of a sparse convolution");
    side->values.expect_zones_untouched("around the values of a compact kernel");
    side->positions.expect_zones_untouched("around the positions of a compact kernel");
    side->starts.expect_zones_untouched("around the starts of a compact kernel");
    check_cuda(cudaStreamDestroy(side->stream), "stream");
  }
}

template <typename T>
void run_sparse_convs_direct(uint32_t scale, int repeats) {
  for (const double share : {0.1, 1.0}) {
    const direct::Shape small = {scale + 2, 7, 7, 40, 7, 7, 36, {3, 3}, {1, 1}, {1, 1}};
    run_sparse_conv_direct<T, 2, 8>(small, 16, 7, share, repeats);
    run_sparse_conv_direct<T, 2, 16>(small, 32, 7, share, repeats);
    run_sparse_conv_direct<T, 4, 8>(small, 16, 7, share, repeats);
    run_sparse_conv_direct<T, 4, 4, 4>(small, 16, 7, share / 9, repeats);
    run_sparse_conv_direct<T, 4, 8, 4>(small, 16, 7, share, repeats);
  }
  const direct::Shape wide = {scale / 4 + 1, 9, 28, 12, 9, 28, 68, {3, 3}, {1, 1}, {1, 1}};
  run_sparse_conv_direct<T, 4, 4>(wide, 8, 8, 0.2, repeats);
  const direct::Shape stride = {scale + 1, 9, 8, 20, 5, 4, 12, {3, 3}, {2, 2}, {1, 1}};
  run_sparse_conv_direct<T, 1, 8>(stride, 8, 4, 0.2, repeats);
}

// A convolution with vectors of weights, of small whole numbers, whose sums are exact.
template <typename T, typename Tile>
void run_sparse_conv_vector(vectors::Shape shape, double share, uint32_t height, uint32_t chunk,
                            int repeats) {
  vectors::Problem problem = {vectors::Plan(shape, Tile::V, Tile::kLines, height, Tile::kWide, Tile::kOut,
                                            chunk),
                              nullptr, {}, nullptr, 0, 0};
  const vectors::Plan& plan = problem.plan;
  problem.works = plan.works();
  std::mt19937 generator(6);
  const auto draw = [&] { return static_cast<float>(static_cast<int>(generator() % 9) - 4); };
  std::vector<T> x(int64_t{shape.images} * shape.height * shape.width * shape.in);
  std::vector<T> kernel(int64_t{shape.taps()} * shape.in * shape.out);
  std::vector<T> expected(int64_t{shape.images} * shape.rows * shape.columns * shape.out);
  for (T& value : x) value = T(draw());
  for (size_t i = 0; i < kernel.size(); i += Tile::V) {
    const bool is_kept = generator() % 1000 < share * 1000;
    for (int v = 0; v < Tile::V; ++v) kernel[i + v] = T(is_kept ? draw() : 0.f);
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    const size_t o = i % shape.out, pixel = i / shape.out, column = pixel % shape.columns;
    const size_t row = pixel / shape.columns % shape.rows, image = pixel / shape.columns / shape.rows;
    double sum = 0;
    for (uint32_t tap = 0; tap < shape.taps(); ++tap) {
      const size_t y = row * shape.strides[0] + tap / shape.window[1] - shape.lows[0];
      const size_t z = column * shape.strides[1] + tap % shape.window[1] - shape.lows[1];
      if (y >= shape.height || z >= shape.width) continue;
      for (size_t in = 0; in < shape.in; ++in) {
        sum += host_float(x[((image * shape.height + y) * shape.width + z) * shape.in + in]) *
               host_float(kernel[(tap * shape.in + in) * shape.out + o]);
      }
    }
    expected[i] = T(static_cast<float>(sum));
  }
  Buffer<T> input(x.size()), weights(kernel.size());
  input.set(x), weights.set(kernel);
  const int64_t segments = int64_t{plan.groups} * plan.chunks, entries = segments * plan.room;
  std::vector<std::unique_ptr<Buffer<uint32_t>>> offsets, values, steps;
  std::vector<std::unique_ptr<Buffer<T>>> result;
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    offsets.push_back(std::make_unique<Buffer<uint32_t>>(entries));
    values.push_back(std::make_unique<Buffer<uint32_t>>(entries * Tile::V / 2));
    steps.push_back(std::make_unique<Buffer<uint32_t>>(segments));
    result.push_back(std::make_unique<Buffer<T>>(expected.size()));
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (int s = 0; s < 2; ++s) {
      problem.x = reinterpret_cast<const uint16_t*>(input.get());
      problem.y = reinterpret_cast<uint16_t*>(result[s]->get());
      problem.lists = {offsets[s]->get(), values[s]->get(), steps[s]->get()};
      check_cuda(launch_arrange<Tile::V>(streams[s], plan, problem.lists,
                                         reinterpret_cast<const uint16_t*>(weights.get())),
                 "lists of vectors");
      check_cuda((launch_forward<T, Tile>(streams[s], problem)), "product with vectors");
    }
    check_cuda(cudaDeviceSynchronize(), "product with vectors");
    for (const auto& one : result) {
      const auto found = one->read();
      bool same = true;
      for (size_t i = 0; i < found.size(); ++i) same &= host_float(found[i]) == host_float(expected[i]);
      if (!same) std::printf("vector %d, tile %d x %d x %d:\n", Tile::V, Tile::kLines, Tile::kWide, Tile::kOut);
      expect(same, "product with vectors of weights");
    }
  }
  for (int s = 0; s < 2; ++s) {
    offsets[s]->expect_zones_untouched("around the positions of vectors");
    values[s]->expect_zones_untouched("around the values of vectors");
    steps[s]->expect_zones_untouched("around the lengths of lists");
    result[s]->expect_zones_untouched("around the product with vectors");
    check_cuda(cudaStreamDestroy(streams[s]), "stream");
  }
}

template <typename T>
void run_sparse_conv_vectors(uint32_t scale, int repeats) {
  scale = std::min(scale, 8u);  // the host takes long
  const auto same = [&](uint32_t images, uint32_t size, uint32_t in, uint32_t out) {
    return vectors::Shape{images, size, size, in, size, size, out, {3, 3}, {1, 1}, {1, 1}};
  };
  using vectors::Tile;
  for (const double share : {0.0, 0.2, 1.0}) {
    run_sparse_conv_vector<T, Tile<16, 4, 8, 128>>(same(2 * scale, 9, 40, 144), share, 4, 32, repeats);
  }
  run_sparse_conv_vector<T, Tile<8, 4, 8, 128>>(same(scale, 8, 24, 72), 0.2, 4, 32, repeats);
  run_sparse_conv_vector<T, Tile<32, 4, 8, 128>>(same(2 * scale, 7, 40, 64), 0.2, 4, 32, repeats);
  run_sparse_conv_vector<T, Tile<16, 8, 4, 128>>(same(4 * scale, 4, 40, 32), 0.2, 4, 32, repeats);
  run_sparse_conv_vector<T, Tile<32, 8, 8, 64>>({scale, 12, 9, 72, 12, 9, 64, {1, 1}, {1, 1}, {0, 0}}, 0.2,
                                                8, 32, repeats);
  run_sparse_conv_vector<T, Tile<16, 4, 8, 64>>({scale, 12, 9, 40, 4, 5, 64, {1, 3}, {3, 2}, {0, 1}}, 0.2, 4,
                                                32, repeats);
}

template <typename T>
void run_all(int64_t scale, int repeats) {
  run_thresholds<T>(scale, repeats);
  for (const Thresholds mode : {Thresholds::kExact, Thresholds::kStored, Thresholds::kFarTooLow}) {
    run<T, true>(1000 * scale + 3, 64, 0.1, mode, repeats);
    run<T, true>(1000 * scale, 64, 0.5, mode, repeats);
    run<T, false>(333 * scale, 96, 0.1, mode, repeats);
    run<T, false>(97, 33, 0.1, mode, repeats);
  }
}

}  // namespace
}  // namespace swat

// `check_kernels [SCALE [REPEATS]]`: how large problems are, and how often they run on two streams.
int main(int argc, char** argv) {
  const int64_t scale = argc > 1 ? std::atoll(argv[1]) : 1;
  const int repeats = argc > 2 ? std::atoi(argv[2]) : 2;
  swat::run_all<float>(scale, repeats);
  swat::run_all<__nv_bfloat16>(scale, repeats);
  swat::run_all<__half>(scale, repeats);
  swat::run_sparse_convs<__nv_bfloat16>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_convs<__half>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_convs_direct<float>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_convs_direct<__nv_bfloat16>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_convs_direct<__half>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_conv_vectors<__nv_bfloat16>(static_cast<uint32_t>(scale), repeats);
  swat::run_sparse_conv_vectors<__half>(static_cast<uint32_t>(scale), repeats);
  swat::run_max_pool();
  swat::run_dropout(scale);
  swat::expect(swat::guesses > 0, "guesses");
  if (swat::failures == 0) std::printf("all kernels ok\n");
  return swat::failures == 0 ? 0 : 1;
}
