// What the dispatcher calls: the operators of schema.cpp, the same for every device, in terms of how the device runs a
// problem forward and backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace vit_adapter {

template <auto run_forward, auto run_backward>
struct Operators {
  using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

  static at::Tensor attend(
      const at::Tensor& value, const at::Tensor& offsets, const at::Tensor& logits, at::IntArrayRef source_grids,
      at::IntArrayRef query_grids, int64_t points) {
    return run_forward(problem_of(value, offsets, logits, source_grids, query_grids, points), value, offsets, logits);
  }

  static Gradients attend_backward(
      const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& offsets, const at::Tensor& logits,
      at::IntArrayRef source_grids, at::IntArrayRef query_grids, int64_t points) {
    const Problem problem = problem_of(value, offsets, logits, source_grids, query_grids, points);
    return run_backward(problem, grad_output, value, offsets, logits);
  }

  static at::Tensor sample(
      const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights, at::IntArrayRef source_grids) {
    return run_forward(
        problem_of(value, locations, weights, source_grids, std::nullopt, 0), value, locations, weights);
  }

  static Gradients sample_backward(
      const at::Tensor& grad_output, const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights,
      at::IntArrayRef source_grids) {
    const Problem problem = problem_of(value, locations, weights, source_grids, std::nullopt, 0);
    return run_backward(problem, grad_output, value, locations, weights);
  }

  static void register_in(torch::Library& library) {
    library.impl("ms_deform_attn", &attend);
    library.impl("ms_deform_attn_backward", &attend_backward);
    library.impl("ms_deform_attn_sample", &sample);
    library.impl("ms_deform_attn_sample_backward", &sample_backward);
  }
};

}  // namespace vit_adapter
