// Geometry of one bilinear sample, shared by every device. Plain C++ that g++, clang and nvcc compile alike
// (constexpr functions run on the device through --expt-relaxed-constexpr, which PyTorch always passes).
#pragma once

#include <cstdint>

namespace vit_adapter {

constexpr int kMaxLevels = 8;    // of the source, and grids of the queries
constexpr int kMaxSamples = 64;  // levels times points

// Token grids of one sequence, in the order of its tokens. Travels by value: no device reads it from memory.
struct Grids {
  int count;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

// All sizes of one call. Fused: places are offsets in pixels around the query's own place, and weights are logits.
// Otherwise places are 0 to 1 across the level, and weights are taken as they are.
struct Problem {
  bool fused;
  int64_t batch, tokens, queries;
  int heads, channels, samples, points;
  Grids source, query;  // no query grids unless fused
};

// Top-left of the four pixels around a sample, and how far the sample is on the way to the right and lower ones.
template <typename A>
struct Place {
  int x, y;
  A right, below;
};

// (x, y) is in pixels with (0, 0) at the centre of the first. A place that touches no pixel, not-a-number
// included, has no pixel inside: see pixel_of.
template <typename A>
constexpr Place<A> locate(A x, A y, int height, int width) {
  const bool inside = (x > -1) & (y > -1) & (x < width) & (y < height);
  const A near_x = inside ? x : A(-2), near_y = inside ? y : A(-2);
  const int truncated_x = static_cast<int>(near_x), truncated_y = static_cast<int>(near_y);
  const int left = truncated_x - (near_x < truncated_x), top = truncated_y - (near_y < truncated_y);
  return {left, top, near_x - left, near_y - top};
}

// Corners are numbered 0 to 3: top left, top right, bottom left, bottom right. -1 where the corner is outside.
template <typename A>
constexpr int pixel_of(const Place<A>& place, int corner, int height, int width) {
  const int x = place.x + (corner & 1), y = place.y + (corner >> 1);
  const bool inside = (x >= 0) & (x < width) & (y >= 0) & (y < height);
  return inside ? y * width + x : -1;
}

template <typename A>
constexpr A share_of(const Place<A>& place, int corner) {
  return (corner & 1 ? place.right : 1 - place.right) * (corner & 2 ? place.below : 1 - place.below);
}

// Derivatives of the interpolated number by x and y, in pixels, given the number at each corner (0 outside).
template <typename A>
constexpr A slope_x(const Place<A>& place, A top_left, A top_right, A bottom_left, A bottom_right) {
  return (1 - place.below) * (top_right - top_left) + place.below * (bottom_right - bottom_left);
}

template <typename A>
constexpr A slope_y(const Place<A>& place, A top_left, A top_right, A bottom_left, A bottom_right) {
  return (1 - place.right) * (bottom_left - top_left) + place.right * (bottom_right - top_right);
}

// Where the centre of a query's cell lies in a source level, along one axis, in pixels of the level.
template <typename A>
constexpr A base_of(int index, int query_size, int source_size) {
  return (index + A(0.5)) * source_size / query_size - A(0.5);
}

}  // namespace vit_adapter
