// Vectors of W numbers, as wide as the compiler's target, with loads from every storage type. GCC and clang.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

namespace vit_adapter {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A, int W>
struct VectorOf {
  typedef A type __attribute__((vector_size(sizeof(A) * W)));
};
template <typename A, int W>
using Vector = typename VectorOf<A, W>::type;

template <typename To, typename From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
inline V load_bits(const T* source) {
  V vector;
  std::memcpy(&vector, source, sizeof(vector));
  return vector;
}

template <int W>
inline Vector<float, W> load(const float* source) {
  return load_bits<Vector<float, W>>(source);
}

template <int W>
inline Vector<double, W> load(const double* source) {
  return load_bits<Vector<double, W>>(source);
}

template <int W>
inline Vector<float, W> load(const c10::BFloat16* source) {
  const auto bits = load_bits<Vector<uint16_t, W>>(source);
  return bits_as<Vector<float, W>>(__builtin_convertvector(bits, Vector<uint32_t, W>) << 16);
}

template <int W>
inline Vector<float, W> load(const c10::Half* source) {
  const auto bits = __builtin_convertvector(load_bits<Vector<uint16_t, W>>(source), Vector<uint32_t, W>);
  // Exponent and fraction move to their places in a float; the product corrects the exponent's bias by 112,
  // subnormal numbers included. Infinite and not-a-number keep the greatest exponent.
  const auto magnitude = bits_as<Vector<float, W>>((bits & 0x7fff) << 13) * 0x1p112f;
  const auto special = bits_as<Vector<uint32_t, W>>((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return bits_as<Vector<float, W>>(bits_as<Vector<uint32_t, W>>(magnitude) | special | (bits & 0x8000) << 16);
}

template <typename A, typename V>
inline void store(A* target, const V& vector) {
  std::memcpy(target, &vector, sizeof(vector));
}

// Sum of the vector's numbers, halves first: the same order whatever the target.
template <int W, typename A>
inline A sum_of(const Vector<A, W>& vector) {
  if constexpr (W == 1) {
    return vector[0];
  } else {
    Vector<A, W / 2> low, high;
    std::memcpy(&low, &vector, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(low), sizeof(high));
    return sum_of<W / 2, A>(low + high);
  }
}

}  // namespace vit_adapter
