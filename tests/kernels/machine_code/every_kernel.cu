// Every kernel once, for a look at its machine code.
#include "ms_deform_attn.cuh"

using namespace vit_adapter;

template <typename T>
void launch_all() {
  with_variant<T>(Problem{}, true, [](auto variant) {  // compiles its argument for every variant
    using V = decltype(variant);
    forward_kernel<V><<<1, kThreads>>>({}, nullptr, {}, {}, nullptr);
    backward_kernel<V, FloatSum><<<1, kThreads>>>({}, nullptr, nullptr, {}, {}, FloatSum{}, {}, {});
    backward_kernel<V, FixedSum><<<1, kThreads>>>({}, nullptr, nullptr, {}, {}, FixedSum{}, {}, {});
  });
  from_fixed_kernel<T><<<1, kThreads>>>(nullptr, nullptr, 0, nullptr);
}

template void launch_all<float>();
template void launch_all<__half>();
template void launch_all<__nv_bfloat16>();
