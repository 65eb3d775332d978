// The operators' arguments, checked: what Python's `ms_deform_attn` has promised, and what the kernels rely on.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "sampling.h"

namespace vit_adapter {

inline Grids grids_of(at::IntArrayRef sizes, int64_t tokens, const char* name) {
  TORCH_CHECK_VALUE(
      sizes.size() % 2 == 0 && sizes.size() <= 2 * kMaxLevels, name, " must be up to ", kMaxLevels,
      " pairs of height and width, but got ", sizes.size(), " numbers");
  Grids grids{};
  grids.count = static_cast<int>(sizes.size() / 2);
  int64_t start = 0;
  for (int level = 0; level < grids.count; ++level) {
    const int64_t height = sizes[2 * level], width = sizes[2 * level + 1];
    TORCH_CHECK_VALUE(height >= 0 && width >= 0, name, " holds a negative size: ", height, " by ", width);
    grids.height[level] = static_cast<int>(height);
    grids.width[level] = static_cast<int>(width);
    grids.start[level] = static_cast<int>(start);
    start += height * width;
  }
  TORCH_CHECK_VALUE(start == tokens, name, " hold ", start, " cells, but there are ", tokens, " tokens");
  TORCH_CHECK_VALUE(start <= std::numeric_limits<int>::max(), name, " hold more than 2^31 cells");
  return grids;
}

inline void check_type(const at::Tensor& tensor, const at::Tensor& value, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.device() == value.device(), name, " must be on value's device, ", value.device(), ", but is on ",
      tensor.device());
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == value.scalar_type() || tensor.scalar_type() == at::kFloat, name,
      " must be in value's dtype, ", value.scalar_type(), ", or in float32, but is in ", tensor.scalar_type());
}

// query_grids and points are given for the fused form only.
inline Problem problem_of(
    const at::Tensor& value, const at::Tensor& places, const at::Tensor& weights, at::IntArrayRef source_grids,
    std::optional<at::IntArrayRef> query_grids, int64_t points) {
  TORCH_CHECK_VALUE(value.dim() == 4, "value must be (batch, tokens, heads, channels), but has shape ", value.sizes());
  TORCH_CHECK_VALUE(
      weights.dim() == 4 && weights.size(0) == value.size(0) && weights.size(2) == value.size(2),
      "weights must be (batch, queries, heads, samples) for value ", value.sizes(), ", but have shape ",
      weights.sizes());
  TORCH_CHECK_VALUE(
      places.dim() == 5 && places.sizes().slice(0, 4) == weights.sizes() && places.size(4) == 2,
      "places must be (x, y) for each of the weights ", weights.sizes(), ", but have shape ", places.sizes());
  check_type(places, value, query_grids ? "offsets" : "locations");
  check_type(weights, value, query_grids ? "logits" : "weights");

  Problem problem{};
  problem.fused = query_grids.has_value();
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.queries = weights.size(1);
  problem.heads = static_cast<int>(value.size(2));
  problem.channels = static_cast<int>(value.size(3));
  problem.samples = static_cast<int>(weights.size(3));
  problem.source = grids_of(source_grids, problem.tokens, "source_grids");
  if (query_grids) {
    problem.query = grids_of(*query_grids, problem.queries, "query_grids");
  }
  const int levels = problem.source.count;
  problem.points = static_cast<int>(query_grids ? points : levels ? problem.samples / levels : 0);
  TORCH_CHECK_VALUE(
      problem.samples == levels * problem.points && 0 < problem.samples && problem.samples <= kMaxSamples,
      "a head takes 1 to ", kMaxSamples, " samples, equally many of each of ", levels, " levels, but got ",
      problem.samples, " samples for ", problem.points, " points");
  return problem;
}

}  // namespace vit_adapter
