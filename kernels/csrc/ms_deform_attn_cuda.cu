// Multi-scale deformable attention on CUDA devices: launches of the kernels in ms_deform_attn.cuh.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <type_traits>

#include "arguments.h"
#include "ms_deform_attn.cuh"
#include "operators.h"
#include "sampling.h"

namespace vit_adapter {
namespace {

template <typename F>
void with_type(at::ScalarType type, F function) {
  switch (type) {
    case at::kFloat:
      return function(float());
    case at::kBFloat16:
      return function(__nv_bfloat16());
    case at::kHalf:
      return function(__half());
    default:
      TORCH_CHECK_TYPE(false, "on CUDA, ms_deform_attn takes float32, bfloat16 and float16, but got ", type);
  }
}

template <typename T>
const T* data_of(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
Source<T> source_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.scalar_type() == at::kFloat};
}

template <typename T>
Target<T> target_of(at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.scalar_type() == at::kFloat};
}

bool is_aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

unsigned checked_blocks(int64_t blocks) {
  TORCH_CHECK_VALUE(blocks <= std::numeric_limits<int>::max(), "too many queries for one launch: split the batch");
  return static_cast<unsigned>(blocks);
}

at::Tensor run_forward(
    const Problem& problem, const at::Tensor& value, const at::Tensor& places, const at::Tensor& weights) {
  const c10::cuda::CUDAGuard device(value.device());
  at::Tensor output =
      at::empty({problem.batch, problem.queries, int64_t{problem.heads} * problem.channels}, value.options());
  if (output.numel() == 0) {
    return output;
  }
  const auto source = value.contiguous(), where = places.contiguous(), how_much = weights.contiguous();
  with_type(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    with_variant<T>(problem, is_aligned(source), [&](auto variant) {
      using V = decltype(variant);
      const unsigned blocks = checked_blocks(blocks_of<V>(problem));
      forward_kernel<V><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          problem, data_of<T>(source), source_of<T>(where), source_of<T>(how_much),
          static_cast<T*>(output.mutable_data_ptr()));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

// The greatest number that any sum in value's gradient can reach: every query once with its whole attention.
at::Tensor bound_of(const Problem& problem, const at::Tensor& grad_output, const at::Tensor& weights) {
  at::Tensor bound = grad_output.abs().amax().to(at::kFloat).mul_(problem.queries);
  return problem.fused ? bound : bound.mul_(weights.abs().amax()).mul_(problem.samples);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> run_backward(
    const Problem& problem, const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& places,
    const at::Tensor& weights) {
  const c10::cuda::CUDAGuard device(value.device());
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  at::Tensor grad_value = at::zeros(value.sizes(), value.options().dtype(deterministic ? at::kLong : at::kFloat));
  at::Tensor grad_places = at::empty(places.sizes(), places.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  if (grad_output.numel() == 0) {
    return {grad_value.to(value.scalar_type()), grad_places.zero_(), grad_weights.zero_()};
  }
  const auto grad = grad_output.to(value.scalar_type()).contiguous();
  const auto source = value.contiguous(), where = places.contiguous(), how_much = weights.contiguous();
  const at::Tensor bound = deterministic ? bound_of(problem, grad, how_much) : at::Tensor();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor result;
  with_type(value.scalar_type(), [&](auto type) {
    using T = decltype(type);
    with_variant<T>(problem, is_aligned(source) && is_aligned(grad), [&](auto variant) {
      using V = decltype(variant);
      const unsigned blocks = checked_blocks(blocks_of<V>(problem));
      const auto launch = [&](auto sum) {
        backward_kernel<V, decltype(sum)><<<blocks, kThreads, 0, stream>>>(
            problem, data_of<T>(grad), data_of<T>(source), source_of<T>(where), source_of<T>(how_much), sum,
            target_of<T>(grad_places), target_of<T>(grad_weights));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (deterministic) {
        launch(FixedSum{
            static_cast<unsigned long long*>(grad_value.mutable_data_ptr()), data_of<float>(bound)});
      } else {
        launch(FloatSum{static_cast<float*>(grad_value.mutable_data_ptr())});
      }
    });
    if (deterministic) {
      result = at::empty(value.sizes(), value.options());
      const unsigned blocks = checked_blocks((result.numel() + kThreads - 1) / kThreads);
      from_fixed_kernel<T><<<blocks, kThreads, 0, stream>>>(
          data_of<long long>(grad_value), data_of<float>(bound), result.numel(),
          static_cast<T*>(result.mutable_data_ptr()));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    } else {
      result = grad_value.to(value.scalar_type());
    }
  });
  return {result, grad_places, grad_weights};
}

}  // namespace
}  // namespace vit_adapter

TORCH_LIBRARY_IMPL(vit_adapter, CUDA, library) {
  vit_adapter::Operators<vit_adapter::run_forward, vit_adapter::run_backward>::register_in(library);
}
