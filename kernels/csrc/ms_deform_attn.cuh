// Multi-scale deformable attention: CUDA device code, without PyTorch, so that the tests can also run it on a CPU.
//
// A group of LANES threads computes one head of one query. First its lanes resolve the samples, each lane its own
// ones, into shared memory; then all lanes together stream each sample's four pixels, every lane its own channels.
// A block's groups are neighbouring queries of the same head, whose pixels overlap.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sampling.h"

namespace vit_adapter {

constexpr int kThreads = 128;  // of a block
constexpr int kBlocks = 8;     // on a multiprocessor at once: 64 registers a thread, half of the greatest occupancy
constexpr unsigned kWholeWarp = 0xffffffffu;

// What a kernel is compiled for. PACKET numbers are loaded at once; CHANNELS and SAMPLES of 0 stand for any number.
template <typename T_, int PACKET_, int LANES_, int CHANNELS_, int SAMPLES_>
struct Variant {
  using T = T_;
  static constexpr int PACKET = PACKET_, LANES = LANES_, CHANNELS = CHANNELS_, SAMPLES = SAMPLES_;
  static constexpr int GROUPS = kThreads / LANES;
  static constexpr int SAMPLE_SLOTS = SAMPLES ? SAMPLES : kMaxSamples;
};

// Calls function(Variant) with the variant for a problem. Aligned: all pointers to T are multiples of 16 bytes.
template <typename T, typename F>
void with_variant(const Problem& problem, bool aligned, F function) {
  constexpr int packet = 16 / sizeof(T);
  if (aligned && problem.channels == 64 && problem.samples == 12) {
    function(Variant<T, packet, 64 / packet, 64, 12>());
  } else if (aligned && problem.channels == 64 && problem.samples == 4) {
    function(Variant<T, packet, 64 / packet, 64, 4>());
  } else if (aligned && problem.channels == 32 && problem.samples == 12) {
    function(Variant<T, packet, 32 / packet, 32, 12>());
  } else if (aligned && problem.channels == 32 && problem.samples == 4) {
    function(Variant<T, packet, 32 / packet, 32, 4>());
  } else {
    function(Variant<T, 1, 32, 0, 0>());
  }
}

template <typename V>
int64_t blocks_of(const Problem& problem) {
  return problem.batch * problem.heads * ((problem.queries + V::GROUPS - 1) / V::GROUPS);
}

__device__ __forceinline__ float to_float(float number) {
  return number;
}
__device__ __forceinline__ float to_float(__half number) {
  return __half2float(number);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 number) {
  return __bfloat162float(number);
}

__device__ __forceinline__ void from_float(float number, float& result) {
  result = number;
}
__device__ __forceinline__ void from_float(float number, __half& result) {
  result = __float2half(number);
}
__device__ __forceinline__ void from_float(float number, __nv_bfloat16& result) {
  result = __float2bfloat16(number);
}

// Numbers that are moved in one instruction.
template <typename T, int N>
struct alignas(N * sizeof(T)) Packet {
  T number[N];
};

template <int N, typename T>
__device__ __forceinline__ Packet<T, N> load(const T* source) {
  return *reinterpret_cast<const Packet<T, N>*>(source);
}

// Numbers of type T, or float where `single` says so.
template <typename T>
struct Source {
  const void* data;
  bool single;
  __device__ __forceinline__ float operator[](int64_t i) const {
    return single ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
  }
};

template <typename T>
struct Target {
  void* data;
  bool single;
  __device__ __forceinline__ void set(int64_t i, float number) const {
    if (single) {
      static_cast<float*>(data)[i] = number;
    } else {
      from_float(number, static_cast<T*>(data)[i]);
    }
  }
};

template <int LANES>
__device__ __forceinline__ float group_maximum(float number) {
#pragma unroll
  for (int distance = LANES / 2; distance; distance /= 2) {
    number = fmaxf(number, __shfl_xor_sync(kWholeWarp, number, distance, LANES));
  }
  return number;
}

template <int LANES>
__device__ __forceinline__ float group_sum(float number) {
#pragma unroll
  for (int distance = LANES / 2; distance; distance /= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance, LANES);
  }
  return number;
}

// Sums four numbers over the group: lane i gets the sum of number i % 4, for the price of one and a half sums.
template <int LANES>
__device__ __forceinline__ float group_sum_of_four(int lane, float first, float second, float third, float fourth) {
  const bool odd = lane & 1, high = lane & 2;
  float low_pair = odd ? second : first, high_pair = odd ? fourth : third;
  low_pair += __shfl_xor_sync(kWholeWarp, odd ? first : second, 1, LANES);
  high_pair += __shfl_xor_sync(kWholeWarp, odd ? third : fourth, 1, LANES);
  float number = high ? high_pair : low_pair;
  number += __shfl_xor_sync(kWholeWarp, high ? low_pair : high_pair, 2, LANES);
#pragma unroll
  for (int distance = 4; distance < LANES; distance *= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance, LANES);
  }
  return number;
}

struct Sample {
  int pixel;      // source token of the top-left corner, also where that is outside
  int corners;    // bit i: corner i is inside
  int width;      // of the level
  float attention;
  float right, below;
};

// What a thread works on.
struct Work {
  int lane, group;
  bool live;       // false: a group beyond the last query, which repeats the last one and stores nothing
  int head;
  int64_t row;     // of the output and of the queries' heads: (picture * queries + query) * heads + head
  int64_t query, source;  // source: where the head's channels of the picture's first token begin
};

template <typename V>
__device__ __forceinline__ Work work_of(const Problem& problem) {
  Work work;
  work.lane = threadIdx.x % V::LANES;
  work.group = threadIdx.x / V::LANES;
  const int64_t chunks = (problem.queries + V::GROUPS - 1) / V::GROUPS;
  const int64_t picture_head = blockIdx.x / chunks, picture = picture_head / problem.heads;
  work.head = static_cast<int>(picture_head - picture * problem.heads);
  work.query = (blockIdx.x - picture_head * chunks) * V::GROUPS + work.group;
  work.live = work.query < problem.queries;
  if (!work.live) {
    work.query = problem.queries - 1;
  }
  const int channels = V::CHANNELS ? V::CHANNELS : problem.channels;
  work.row = (picture * problem.queries + work.query) * problem.heads + work.head;
  work.source = (picture * problem.tokens * problem.heads + work.head) * channels;
  return work;
}

// Fills the group's samples: attention by a softmax over the lanes, places in pixels.
template <typename V>
__device__ __forceinline__ void resolve(
    const Problem& problem, const Work& work, const Source<typename V::T>& places,
    const Source<typename V::T>& weights, Sample* samples) {
  const int length = V::SAMPLES ? V::SAMPLES : problem.samples;
  float greatest = -INFINITY, total = 0;
  if (problem.fused) {
    for (int i = work.lane; i < length; i += V::LANES) {
      greatest = fmaxf(greatest, weights[work.row * length + i]);
    }
    greatest = group_maximum<V::LANES>(greatest);
    for (int i = work.lane; i < length; i += V::LANES) {
      total += expf(weights[work.row * length + i] - greatest);
    }
    total = group_sum<V::LANES>(total);
  }
  int grid = 0;
  while (problem.fused && grid + 1 < problem.query.count && work.query >= problem.query.start[grid + 1]) {
    ++grid;
  }
  const int columns = problem.fused ? problem.query.width[grid] : 1;
  const int rows = problem.fused ? problem.query.height[grid] : 1;
  const int cell = static_cast<int>(work.query) - (problem.fused ? problem.query.start[grid] : 0);
  const int row = cell / columns, column = cell - row * columns;
  for (int i = work.lane; i < length; i += V::LANES) {
    const int level = i / problem.points;
    const int height = problem.source.height[level], width = problem.source.width[level];
    const float x = places[2 * (work.row * length + i)], y = places[2 * (work.row * length + i) + 1];
    const auto place = problem.fused
        ? locate(base_of<float>(column, columns, width) + x, base_of<float>(row, rows, height) + y, height, width)
        : locate(x * width - 0.5f, y * height - 0.5f, height, width);
    const float weight = weights[work.row * length + i];
    Sample sample;
    sample.pixel = problem.source.start[level] + place.y * width + place.x;
    sample.corners = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      sample.corners |= (pixel_of(place, corner, height, width) >= 0) << corner;
    }
    sample.width = width;
    sample.attention = problem.fused ? expf(weight - greatest) / total : weight;
    sample.right = place.right;
    sample.below = place.below;
    samples[i] = sample;
  }
  __syncwarp();
}

__device__ __forceinline__ int64_t token_of(const Sample& sample, int corner) {
  return sample.pixel + (corner & 1) + (corner >> 1) * sample.width;
}

template <typename V>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(
    const __grid_constant__ Problem problem, const typename V::T* __restrict__ value,
    const Source<typename V::T> places, const Source<typename V::T> weights, typename V::T* __restrict__ output) {
  using T = typename V::T;
  __shared__ Sample shared_samples[V::GROUPS * V::SAMPLE_SLOTS];
  const Work work = work_of<V>(problem);
  Sample* samples = shared_samples + work.group * V::SAMPLE_SLOTS;
  resolve<V>(problem, work, places, weights, samples);

  const int channels = V::CHANNELS ? V::CHANNELS : problem.channels;
  const int length = V::SAMPLES ? V::SAMPLES : problem.samples;
  const int64_t distance = static_cast<int64_t>(problem.heads) * channels;  // of tokens
  for (int channel = work.lane * V::PACKET; channel < channels; channel += V::LANES * V::PACKET) {
    const T* source = value + work.source + channel;
    float sum[V::PACKET] = {};
    for (int i = 0; i < length; ++i) {
      const Sample sample = samples[i];
      const Place<float> place{0, 0, sample.right, sample.below};
      Packet<T, V::PACKET> pixels[4] = {};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (sample.corners >> corner & 1) {
          pixels[corner] = load<V::PACKET>(source + token_of(sample, corner) * distance);
        }
      }
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const float weight = share_of(place, corner) * sample.attention;
#pragma unroll
        for (int k = 0; k < V::PACKET; ++k) {
          sum[k] = fmaf(weight, to_float(pixels[corner].number[k]), sum[k]);
        }
      }
    }
    if (work.live) {
      Packet<T, V::PACKET> result;
#pragma unroll
      for (int k = 0; k < V::PACKET; ++k) {
        from_float(sum[k], result.number[k]);
      }
      *reinterpret_cast<Packet<T, V::PACKET>*>(output + work.row * channels + channel) = result;
    }
  }
}

// Where value's gradient is summed up in float, in whatever order the threads come.
struct FloatSum {
  float* data;

  template <int N>
  __device__ __forceinline__ void add(int64_t i, float factor, const float* numbers) const {
    if constexpr (N % 4 == 0) {
#pragma unroll
      for (int k = 0; k < N; k += 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        const float4 four = make_float4(
            factor * numbers[k], factor * numbers[k + 1], factor * numbers[k + 2], factor * numbers[k + 3]);
        atomicAdd(reinterpret_cast<float4*>(data + i + k), four);
#else
        for (int j = k; j < k + 4; ++j) {
          atomicAdd(data + i + j, factor * numbers[j]);
        }
#endif
      }
    } else {
      for (int k = 0; k < N; ++k) {
        atomicAdd(data + i + k, factor * numbers[k]);
      }
    }
  }
};

// 2^n such that `bound`, the greatest possible sum, becomes at most 2^62. Not finite if the bound is not.
__device__ __forceinline__ double fixed_scale(const float* bound) {
  return isfinite(*bound) && *bound > 0 ? exp2(61.0 - ilogbf(*bound)) : *bound == 0 ? 1.0 : NAN;
}

// Where it is summed up in whole numbers of 64 bits: the same sum in every order.
struct FixedSum {
  unsigned long long* data;
  const float* bound;

  template <int N>
  __device__ __forceinline__ void add(int64_t i, float factor, const float* numbers) const {
    const double scale = fixed_scale(bound);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const long long fixed = __double2ll_rn(static_cast<double>(factor) * numbers[k] * scale);
      atomicAdd(data + i + k, static_cast<unsigned long long>(fixed));
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) from_fixed_kernel(
    const long long* __restrict__ fixed, const float* __restrict__ bound, int64_t count, T* __restrict__ result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    from_float(static_cast<float>(static_cast<double>(fixed[i]) / fixed_scale(bound)), result[i]);
  }
}

template <typename V, typename Sum>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(
    const __grid_constant__ Problem problem, const typename V::T* __restrict__ grad_output,
    const typename V::T* __restrict__ value, const Source<typename V::T> places,
    const Source<typename V::T> weights, const Sum grad_value, const Target<typename V::T> grad_places,
    const Target<typename V::T> grad_weights) {
  __shared__ Sample shared_samples[V::GROUPS * V::SAMPLE_SLOTS];
  __shared__ float shared_gradients[V::GROUPS * V::SAMPLE_SLOTS * 3];  // of a sample: weight, x, y
  const Work work = work_of<V>(problem);
  Sample* samples = shared_samples + work.group * V::SAMPLE_SLOTS;
  float* gradients = shared_gradients + work.group * V::SAMPLE_SLOTS * 3;
  resolve<V>(problem, work, places, weights, samples);

  const int channels = V::CHANNELS ? V::CHANNELS : problem.channels;
  const int length = V::SAMPLES ? V::SAMPLES : problem.samples;
  const int64_t distance = static_cast<int64_t>(problem.heads) * channels;  // of tokens
  for (int i = 0; i < length; ++i) {
    const Sample sample = samples[i];
    const Place<float> place{0, 0, sample.right, sample.below};
    float dots[4] = {};
    for (int channel = work.lane * V::PACKET; channel < channels; channel += V::LANES * V::PACKET) {
      const auto packet = load<V::PACKET>(grad_output + work.row * channels + channel);
      float grad[V::PACKET];
#pragma unroll
      for (int k = 0; k < V::PACKET; ++k) {
        grad[k] = to_float(packet.number[k]);
      }
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        if (sample.corners >> corner & 1) {
          const int64_t pixel = work.source + channel + token_of(sample, corner) * distance;
          const auto numbers = load<V::PACKET>(value + pixel);
#pragma unroll
          for (int k = 0; k < V::PACKET; ++k) {
            dots[corner] = fmaf(grad[k], to_float(numbers.number[k]), dots[corner]);
          }
          if (work.live) {
            grad_value.template add<V::PACKET>(pixel, share_of(place, corner) * sample.attention, grad);
          }
        }
      }
    }
    float interpolated = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      interpolated = fmaf(share_of(place, corner), dots[corner], interpolated);
    }
    // Interpolation and slopes are linear in the dots, so they may come before the sum over the lanes.
    const float sum = group_sum_of_four<V::LANES>(
        work.lane, interpolated, slope_x(place, dots[0], dots[1], dots[2], dots[3]),
        slope_y(place, dots[0], dots[1], dots[2], dots[3]), 0.0f);
    if (work.lane < 3) {
      gradients[3 * i + work.lane] = sum;
    }
  }
  __syncwarp();

  float mean = 0;
  if (problem.fused) {
    for (int i = work.lane; i < length; i += V::LANES) {
      mean += samples[i].attention * gradients[3 * i];
    }
    mean = group_sum<V::LANES>(mean);
  }
  for (int i = work.lane; i < length && work.live; i += V::LANES) {
    const int level = i / problem.points;
    const float attention = samples[i].attention;
    const float unit_x = problem.fused ? 1 : problem.source.width[level];
    const float unit_y = problem.fused ? 1 : problem.source.height[level];
    grad_weights.set(work.row * length + i, problem.fused ? attention * (gradients[3 * i] - mean) : gradients[3 * i]);
    grad_places.set(2 * (work.row * length + i), attention * unit_x * gradients[3 * i + 1]);
    grad_places.set(2 * (work.row * length + i) + 1, attention * unit_y * gradients[3 * i + 2]);
  }
}

}  // namespace vit_adapter
