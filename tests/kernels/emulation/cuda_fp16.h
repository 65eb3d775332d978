// Stands in for CUDA's header of this name, through the compiler's own half precision.
#pragma once

struct __half {
  _Float16 number;
};

inline float __half2float(__half number) {
  return static_cast<float>(number.number);
}

inline __half __float2half(float number) {
  return {static_cast<_Float16>(number)};
}
