// Multi-scale deformable attention on the CPU: vectorised over a head's channels, blocks of queries in parallel.
//
// A block is up to 16 neighbouring queries of one head. Its samples are located together, vectorised over the
// queries; then each query's pixels are gathered, vectorised over the channels. Blocks follow each other by head and
// in upright strips, so that the pixels which neighbouring queries share are still in a near cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "operators.h"
#include "sampling.h"
#include "vectors.h"

namespace vit_adapter {
namespace {

constexpr int kBlock = 16;
constexpr int kCacheLine = 64;  // bytes

// Neighbouring queries in one row of a query grid. (The general form has no query grids, hence no row and column.)
struct Block {
  int64_t first;
  int count, grid, row, column;
};

std::vector<Block> blocks_of(const Problem& problem) {
  std::vector<Block> blocks;
  if (!problem.fused) {
    for (int64_t first = 0; first < problem.queries; first += kBlock) {
      blocks.push_back({first, static_cast<int>(std::min<int64_t>(kBlock, problem.queries - first)), 0, 0, 0});
    }
    return blocks;
  }
  const Grids& grids = problem.query;
  for (int grid = 0; grid < grids.count; ++grid) {
    for (int column = 0; column < grids.width[grid]; column += kBlock) {
      const int count = std::min(kBlock, grids.width[grid] - column);
      for (int row = 0; row < grids.height[grid]; ++row) {
        const int64_t first = grids.start[grid] + static_cast<int64_t>(row) * grids.width[grid] + column;
        blocks.push_back({first, count, grid, row, column});
      }
    }
  }
  return blocks;
}

// e^x for x <= 0 to two units in the last place, in operations that compilers vectorise: 2^n times a polynomial of
// the rest (Cephes' expf). Not-a-number stays so.
inline float exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = static_cast<float>(static_cast<int>(clamped * 1.44269504f - 0.5f));
  const float rest = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float polynomial = 1.9875691500e-4f;
  polynomial = polynomial * rest + 1.3981999507e-3f;
  polynomial = polynomial * rest + 8.3334519073e-3f;
  polynomial = polynomial * rest + 4.1665795894e-2f;
  polynomial = polynomial * rest + 1.6666665459e-1f;
  polynomial = polynomial * rest + 5.0000001201e-1f;
  polynomial = polynomial * rest * rest + rest + 1.0f;
  return polynomial * bits_as<float>((static_cast<int>(n) + 127) << 23);
}

inline double exponential(double x) {
  return std::exp(x);
}

// The samples of a block, the queries innermost.
template <typename A>
struct Samples {
  alignas(64) A places[2 * kMaxSamples][kBlock];       // x, y, x, y ... in pixels of the level
  alignas(64) A attention[kMaxSamples][kBlock];        // after the softmax
  alignas(64) A shares[4 * kMaxSamples][kBlock];       // bilinear share of each corner
  alignas(64) int32_t pixels[4 * kMaxSamples][kBlock];  // source token of each corner; -1 outside
};

template <typename F>
void with_type(at::ScalarType type, F function) {
  switch (type) {
    case at::kFloat:
      return function(float());
    case at::kDouble:
      return function(double());
    case at::kBFloat16:
      return function(c10::BFloat16());
    case at::kHalf:
      return function(c10::Half());
    default:
      TORCH_CHECK_TYPE(false, "ms_deform_attn takes float32, float64, bfloat16 and float16, but got ", type);
  }
}

// Rows of `length` numbers, `stride` apart, as columns of a block.
template <typename A>
void read(const at::Tensor& source, int64_t begin, int64_t stride, int count, int length, A (*columns)[kBlock]) {
  with_type(source.scalar_type(), [&](auto type) {
    const auto* row = source.const_data_ptr<decltype(type)>() + begin;
    for (int query = 0; query < count; ++query, row += stride) {
      for (int i = 0; i < length; ++i) {
        columns[i][query] = static_cast<A>(row[i]);
      }
    }
  });
  for (int i = 0; i < length && count < kBlock; ++i) {
    std::fill(columns[i] + count, columns[i] + kBlock, A(0));
  }
}

template <typename A>
void write(const A (*columns)[kBlock], int count, int length, at::Tensor& target, int64_t begin, int64_t stride) {
  with_type(target.scalar_type(), [&](auto type) {
    auto* row = target.mutable_data_ptr<decltype(type)>() + begin;
    for (int query = 0; query < count; ++query, row += stride) {
      for (int i = 0; i < length; ++i) {
        row[i] = static_cast<decltype(type)>(columns[i][query]);
      }
    }
  });
}

template <typename A>
void softmax(A (*logits)[kBlock], int length) {
  alignas(64) A greatest[kBlock], total[kBlock] = {};
  std::copy_n(logits[0], kBlock, greatest);
  for (int i = 1; i < length; ++i) {
#pragma omp simd
    for (int query = 0; query < kBlock; ++query) {
      greatest[query] = logits[i][query] > greatest[query] ? logits[i][query] : greatest[query];
    }
  }
  for (int i = 0; i < length; ++i) {
#pragma omp simd
    for (int query = 0; query < kBlock; ++query) {
      logits[i][query] = exponential(logits[i][query] - greatest[query]);
      total[query] += logits[i][query];
    }
  }
  for (int i = 0; i < length; ++i) {
#pragma omp simd
    for (int query = 0; query < kBlock; ++query) {
      logits[i][query] /= total[query];
    }
  }
}

// From offsets around the query's own place, or from locations of 0 to 1, to pixels of each sample's level.
template <typename A>
void to_pixels(const Problem& problem, const Block& block, A (*places)[kBlock]) {
  for (int i = 0; i < problem.samples; ++i) {
    const int level = i / problem.points, width = problem.source.width[level], height = problem.source.height[level];
    A *x = places[2 * i], *y = places[2 * i + 1];
    if (problem.fused) {
      const int columns = problem.query.width[block.grid], rows = problem.query.height[block.grid];
      const A base_y = base_of<A>(block.row, rows, height);
#pragma omp simd
      for (int query = 0; query < kBlock; ++query) {
        x[query] += base_of<A>(block.column + query, columns, width);
        y[query] += base_y;
      }
    } else {
#pragma omp simd
      for (int query = 0; query < kBlock; ++query) {
        x[query] = x[query] * width - A(0.5);
        y[query] = y[query] * height - A(0.5);
      }
    }
  }
}

template <typename A>
void resolve(
    const Problem& problem, const Block& block, int64_t picture, int head, const at::Tensor& places,
    const at::Tensor& weights, Samples<A>& samples) {
  const int length = problem.samples;
  const int64_t row = ((picture * problem.queries + block.first) * problem.heads + head) * length;
  const int64_t stride = static_cast<int64_t>(problem.heads) * length;
  read(places, 2 * row, 2 * stride, block.count, 2 * length, samples.places);
  read(weights, row, stride, block.count, length, samples.attention);
  to_pixels(problem, block, samples.places);
  if (problem.fused) {
    softmax(samples.attention, length);
  }
  for (int i = 0; i < length; ++i) {
    const int level = i / problem.points, width = problem.source.width[level], height = problem.source.height[level];
    const int start = problem.source.start[level];
    const A *x = samples.places[2 * i], *y = samples.places[2 * i + 1];
    for (int corner = 0; corner < 4; ++corner) {
      A* shares = samples.shares[4 * i + corner];
      int32_t* pixels = samples.pixels[4 * i + corner];
#pragma omp simd
      for (int query = 0; query < kBlock; ++query) {
        const auto place = locate(x[query], y[query], height, width);
        const int pixel = pixel_of(place, corner, height, width);
        shares[query] = share_of(place, corner);
        pixels[query] = pixel < 0 ? -1 : start + pixel;
      }
    }
  }
}

// The pixels that one query of one head touches.
template <typename A>
struct Touched {
  int count;
  int64_t token[4 * kMaxSamples];  // times the distance of tokens: where the head's channels begin
  A weight[4 * kMaxSamples];       // bilinear share times attention
  int corner[4 * kMaxSamples];     // sample * 4 + corner
};

template <typename A>
void collect(const Samples<A>& samples, int length, int query, int64_t stride, Touched<A>& touched) {
  int count = 0;
  for (int corner = 0; corner < 4 * length; ++corner) {
    const int pixel = samples.pixels[corner][query];
    touched.token[count] = pixel * stride;
    touched.weight[count] = samples.shares[corner][query] * samples.attention[corner / 4][query];
    touched.corner[count] = corner;
    count += pixel >= 0;
  }
  touched.count = count;
}

// Asks for the channels of the touched pixels ahead of their use. Always inline: GCC takes a function that only
// prefetches for one without effect, and drops its calls.
template <typename T, typename A>
[[gnu::always_inline]] inline void prefetch(const T* source, const Touched<A>& touched, int channels) {
  for (int i = 0; i < touched.count; ++i) {
    for (int channel = 0; channel < channels; channel += kCacheLine / sizeof(T)) {
      __builtin_prefetch(source + touched.token[i] + channel);
    }
  }
}

// Calls function(query, touched) for each query of a block, while the next one's pixels in `sources` are on their way.
// No sources: nothing is asked for ahead.
template <typename A, typename F, typename... Sources>
void for_queries(
    const Problem& problem, const Samples<A>& samples, const Block& block, F function, const Sources*... sources) {
  const int64_t distance = static_cast<int64_t>(problem.heads) * problem.channels;
  Touched<A> touched[2];
  collect(samples, problem.samples, 0, distance, touched[0]);
  for (int query = 0; query < block.count; ++query) {
    if (query + 1 < block.count) {
      Touched<A>& next = touched[(query + 1) % 2];
      collect(samples, problem.samples, query + 1, distance, next);
      (prefetch(sources, next, problem.channels), ...);
    }
    function(query, touched[query % 2]);
  }
}

// Whether pixels are worth asking for ahead: few samples for each mean that it is seldom in a near cache already.
// Measured: for injectors (2 samples a pixel) a third faster so, for extractors (21) a tenth slower.
inline bool is_far(const Problem& problem) {
  return problem.queries * problem.samples < 8 * problem.tokens;
}

// K vectors of W channels: the weighted sum of the touched pixels.
template <int W, int K, typename T, typename A>
void gather(const T* value, const Touched<A>& touched, T* output) {
  Vector<A, W> sum[K] = {};
  for (int i = 0; i < touched.count; ++i) {
    const T* pixel = value + touched.token[i];
    for (int k = 0; k < K; ++k) {
      sum[k] += touched.weight[i] * load<W>(pixel + k * W);
    }
  }
  for (int k = 0; k < K; ++k) {
    for (int channel = 0; channel < W; ++channel) {
      output[k * W + channel] = static_cast<T>(sum[k][channel]);
    }
  }
}

// K vectors of W channels: the output's gradient goes to the touched pixels, its product with each pixel to
// `dots`, one corner a row of a block.
template <int W, int K, typename T, typename A>
void scatter(const T* grad_output, const T* value, const Touched<A>& touched, A* grad_value, A* dots) {
  Vector<A, W> grad[K];
  for (int k = 0; k < K; ++k) {
    grad[k] = load<W>(grad_output + k * W);
  }
  for (int i = 0; i < touched.count; ++i) {
    const T* pixel = value + touched.token[i];
    A* grad_pixel = grad_value + touched.token[i];
    Vector<A, W> dot = {};
    for (int k = 0; k < K; ++k) {
      dot += grad[k] * load<W>(pixel + k * W);
      store(grad_pixel + k * W, load<W>(grad_pixel + k * W) + touched.weight[i] * grad[k]);
    }
    dots[touched.corner[i] * kBlock] += sum_of<W, A>(dot);
  }
}

// Calls function(first channel, K as a constant) for groups of K vectors that together are `channels` wide.
template <int W, typename F>
void for_channels(int channels, F function) {
  int channel = 0;
  for (; channel + 4 * W <= channels; channel += 4 * W) {
    function(channel, std::integral_constant<int, 4>());
  }
  if (channel + 2 * W <= channels) {
    function(channel, std::integral_constant<int, 2>());
    channel += 2 * W;
  }
  if (channel < channels) {
    function(channel, std::integral_constant<int, 1>());
  }
}

struct Gradients {
  at::Tensor value, places, weights;
};

template <int W, typename T, typename A>
void forward(
    const Problem& problem, const at::Tensor& value, const at::Tensor& places, const at::Tensor& weights,
    at::Tensor& output) {
  const auto blocks = blocks_of(problem);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const int64_t stride = static_cast<int64_t>(problem.heads) * problem.channels;
  const bool far = is_far(problem);
  at::parallel_for(0, problem.batch * problem.heads * count, 4, [&](int64_t begin, int64_t end) {
    Samples<A> samples;
    for (int64_t task = begin; task < end; ++task) {
      const Block& block = blocks[task % count];
      const int64_t picture = task / count / problem.heads;
      const int head = static_cast<int>(task / count % problem.heads);
      resolve(problem, block, picture, head, places, weights, samples);
      const T* source =
          value.const_data_ptr<T>() + picture * problem.tokens * stride + head * problem.channels;
      T* target = output.mutable_data_ptr<T>() + (picture * problem.queries + block.first) * stride +
          head * problem.channels;
      const auto gather_query = [&](int query, const Touched<A>& touched) {
        for_channels<W>(problem.channels, [&](int channel, auto k) {
          gather<W, decltype(k)::value>(source + channel, touched, target + query * stride + channel);
        });
      };
      far ? for_queries(problem, samples, block, gather_query, source)
          : for_queries(problem, samples, block, gather_query);
    }
  });
}

// From the dot products of the output's gradient with each corner: the gradients of places (in their own unit) and
// of weights or logits.
template <typename A>
void finish(const Problem& problem, const A (*dots)[kBlock], Samples<A>& samples, A (*grad_weights)[kBlock]) {
  alignas(64) A mean[kBlock] = {};
  for (int i = 0; i < problem.samples; ++i) {
    const int level = i / problem.points, width = problem.source.width[level], height = problem.source.height[level];
    A *x = samples.places[2 * i], *y = samples.places[2 * i + 1];
    const A *attention = samples.attention[i], (*corners)[kBlock] = dots + 4 * i;
    const A unit_x = problem.fused ? A(1) : A(width), unit_y = problem.fused ? A(1) : A(height);
#pragma omp simd
    for (int query = 0; query < kBlock; ++query) {
      const auto place = locate(x[query], y[query], height, width);
      const A dot[4] = {corners[0][query], corners[1][query], corners[2][query], corners[3][query]};
      A interpolated = 0;
      for (int corner = 0; corner < 4; ++corner) {
        interpolated += share_of(place, corner) * dot[corner];
      }
      grad_weights[i][query] = interpolated;
      mean[query] += attention[query] * interpolated;
      x[query] = attention[query] * unit_x * slope_x(place, dot[0], dot[1], dot[2], dot[3]);
      y[query] = attention[query] * unit_y * slope_y(place, dot[0], dot[1], dot[2], dot[3]);
    }
  }
  for (int i = 0; i < problem.samples && problem.fused; ++i) {
#pragma omp simd
    for (int query = 0; query < kBlock; ++query) {
      grad_weights[i][query] = samples.attention[i][query] * (grad_weights[i][query] - mean[query]);
    }
  }
}

// One thread owns a head of a picture, so no two add to the same pixel, and always in the same order.
template <int W, typename T, typename A>
void backward(
    const Problem& problem, const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& places,
    const at::Tensor& weights, Gradients& gradients) {
  const auto blocks = blocks_of(problem);
  const int length = problem.samples;
  const int64_t stride = static_cast<int64_t>(problem.heads) * problem.channels;
  const bool far = is_far(problem);
  at::parallel_for(0, problem.batch * problem.heads, 1, [&](int64_t begin, int64_t end) {
    Samples<A> samples;
    alignas(64) A dots[4 * kMaxSamples][kBlock], grad_weights[kMaxSamples][kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t picture = task / problem.heads;
      const int head = static_cast<int>(task % problem.heads);
      const int64_t source = picture * problem.tokens * stride + head * problem.channels;
      const T* pixels = value.const_data_ptr<T>() + source;
      A* grad_pixels = gradients.value.mutable_data_ptr<A>() + source;
      for (const Block& block : blocks) {
        resolve(problem, block, picture, head, places, weights, samples);
        std::fill_n(dots[0], 4 * length * kBlock, A(0));
        const T* grad = grad_output.const_data_ptr<T>() +
            (picture * problem.queries + block.first) * stride + head * problem.channels;
        const auto scatter_query = [&](int query, const Touched<A>& touched) {
          for_channels<W>(problem.channels, [&](int channel, auto k) {
            scatter<W, decltype(k)::value>(
                grad + query * stride + channel, pixels + channel, touched, grad_pixels + channel, dots[0] + query);
          });
        };
        far ? for_queries(problem, samples, block, scatter_query, pixels, grad_pixels)
            : for_queries(problem, samples, block, scatter_query);
        finish(problem, dots, samples, grad_weights);
        const int64_t row = ((picture * problem.queries + block.first) * problem.heads + head) * length;
        const int64_t distance = static_cast<int64_t>(problem.heads) * length;
        write(samples.places, block.count, 2 * length, gradients.places, 2 * row, 2 * distance);
        write(grad_weights, block.count, length, gradients.weights, row, distance);
      }
    }
  });
}

// Calls function(T, A, W): storage type, accumulation type, and the widest vector that divides the channels.
template <typename F>
void with_vectors(const at::Tensor& value, F function) {
  with_type(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr int widest = kVectorBytes / sizeof(A);
    if (value.size(3) % widest == 0) {
      function(T(), A(), std::integral_constant<int, widest>());
    } else if (value.size(3) % 4 == 0) {
      function(T(), A(), std::integral_constant<int, 4>());
    } else {
      function(T(), A(), std::integral_constant<int, 1>());
    }
  });
}

// A large tensor comes fresh from the system each time (malloc keeps nothing above 32 MiB). Filling it in huge pages
// instead of small ones more than halves the time of the largest calls. Where there are none, the advice does nothing.
at::Tensor in_huge_pages(at::Tensor tensor) {
#ifdef __linux__
  constexpr size_t kLarge = size_t{32} << 20;
  constexpr std::uintptr_t kPage = 4096;
  if (tensor.nbytes() >= kLarge) {
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data_ptr());
    const auto first = (address + kPage - 1) / kPage * kPage, last = (address + tensor.nbytes()) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

at::Tensor run_forward(
    const Problem& problem, const at::Tensor& value, const at::Tensor& places, const at::Tensor& weights) {
  at::Tensor output = in_huge_pages(
      at::empty({problem.batch, problem.queries, int64_t{problem.heads} * problem.channels}, value.options()));
  const auto source = value.contiguous(), where = places.contiguous(), how_much = weights.contiguous();
  with_vectors(value, [&](auto type, auto accumulator, auto width) {
    forward<decltype(width)::value, decltype(type), decltype(accumulator)>(problem, source, where, how_much, output);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(
    const Problem& problem, const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& places,
    const at::Tensor& weights) {
  const auto accumulation = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Gradients gradients{
      at::zeros(value.sizes(), value.options().dtype(accumulation)),
      in_huge_pages(at::empty(places.sizes(), places.options())),
      in_huge_pages(at::empty(weights.sizes(), weights.options()))};
  const auto grad = grad_output.to(value.scalar_type()).contiguous();
  const auto source = value.contiguous(), where = places.contiguous(), how_much = weights.contiguous();
  with_vectors(value, [&](auto type, auto accumulator, auto width) {
    backward<decltype(width)::value, decltype(type), decltype(accumulator)>(
        problem, grad, source, where, how_much, gradients);
  });
  return {gradients.value.to(value.scalar_type()), gradients.places, gradients.weights};
}

}  // namespace
}  // namespace vit_adapter

TORCH_LIBRARY_IMPL(vit_adapter, CPU, library) {
  vit_adapter::Operators<vit_adapter::run_forward, vit_adapter::run_backward>::register_in(library);
}
