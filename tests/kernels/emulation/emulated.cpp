// Runs the CUDA kernels of ms_deform_attn.cuh under emulation: a problem and its arrays come in on the standard
// input, results go out on the standard output. Compile with -DELEMENT=float (or __half, __nv_bfloat16).
#include "cuda_emulation.h"

#include "ms_deform_attn.cuh"

using namespace vit_adapter;
using T = ELEMENT;

namespace {

enum Task : int64_t { kForward, kBackward, kDeterministicBackward };

void read_bytes(void* target, size_t size) {
  if (std::fread(target, 1, size, stdin) != size) {
    emulation::fail("the input is too short", 0);
  }
}

int64_t read_number() {
  int64_t number;
  read_bytes(&number, sizeof(number));
  return number;
}

Grids read_grids() {
  Grids grids{};
  grids.count = static_cast<int>(read_number());
  int start = 0;
  for (int level = 0; level < grids.count; ++level) {
    grids.height[level] = static_cast<int>(read_number());
    grids.width[level] = static_cast<int>(read_number());
    grids.start[level] = start;
    start += grids.height[level] * grids.width[level];
  }
  return grids;
}

// An array that begins 16-byte aligned, or right after such a place.
struct Array {
  std::vector<char> bytes;
  size_t begin;

  Array(size_t size, bool aligned) : bytes(size + 64), begin(0) {
    while ((reinterpret_cast<uintptr_t>(bytes.data()) + begin) % 16 != (aligned ? 0 : sizeof(T))) {
      ++begin;
    }
  }
  void* data() { return bytes.data() + begin; }
};

Array read_array(size_t size, bool aligned = true) {
  Array array(size, aligned);
  read_bytes(array.data(), size);
  return array;
}

void write_array(Array& array, size_t size) {
  std::fwrite(array.data(), 1, size, stdout);
}

}  // namespace

int main() {
  const int64_t task = read_number();
  const auto order = static_cast<emulation::Order>(read_number());
  const bool single = read_number(), aligned = read_number();
  Problem problem{};
  problem.fused = read_number();
  problem.batch = read_number();
  problem.tokens = read_number();
  problem.queries = read_number();
  problem.heads = static_cast<int>(read_number());
  problem.channels = static_cast<int>(read_number());
  problem.samples = static_cast<int>(read_number());
  problem.points = static_cast<int>(read_number());
  problem.source = read_grids();
  problem.query = read_grids();
  float bound;
  read_bytes(&bound, sizeof(bound));

  const size_t rows = problem.batch * problem.queries * problem.heads;
  const size_t values = problem.batch * problem.tokens * problem.heads * problem.channels;
  const size_t weight_size = rows * problem.samples * (single ? sizeof(float) : sizeof(T));
  Array value = read_array(values * sizeof(T), aligned);
  Array places = read_array(2 * weight_size), weights = read_array(weight_size);
  const Source<T> where{places.data(), single}, how_much{weights.data(), single};
  const auto* source = static_cast<const T*>(value.data());

  const size_t output_size = rows * problem.channels * sizeof(T);
  if (task == kForward) {
    Array output(output_size, true);
    with_variant<T>(problem, aligned, [&](auto variant) {
      using V = decltype(variant);
      emulation::launch(static_cast<unsigned>(blocks_of<V>(problem)), kThreads, order, [&] {
        forward_kernel<V>(problem, source, where, how_much, static_cast<T*>(output.data()));
      });
    });
    write_array(output, output_size);
    return 0;
  }

  Array grad_output = read_array(output_size);
  const size_t sum_size = values * (task == kBackward ? sizeof(float) : sizeof(int64_t));
  Array sums(sum_size, true), grad_places(2 * weight_size, true), grad_weights(weight_size, true);
  with_variant<T>(problem, aligned, [&](auto variant) {
    using V = decltype(variant);
    const auto run = [&](auto sum) {
      emulation::launch(static_cast<unsigned>(blocks_of<V>(problem)), kThreads, order, [&] {
        backward_kernel<V>(
            problem, static_cast<const T*>(grad_output.data()), source, where, how_much, sum,
            Target<T>{grad_places.data(), single}, Target<T>{grad_weights.data(), single});
      });
    };
    if (task == kBackward) {
      run(FloatSum{static_cast<float*>(sums.data())});
    } else {
      run(FixedSum{static_cast<unsigned long long*>(sums.data()), &bound});
    }
  });
  if (task == kBackward) {
    write_array(sums, sum_size);
  } else {
    Array result(values * sizeof(float), true);
    const auto blocks = static_cast<unsigned>((values + kThreads - 1) / kThreads);
    emulation::launch(blocks, kThreads, order, [&] {
      from_fixed_kernel(
          static_cast<const long long*>(sums.data()), &bound, static_cast<int64_t>(values),
          static_cast<float*>(result.data()));
    });
    write_array(result, values * sizeof(float));
  }
  write_array(grad_places, 2 * weight_size);
  write_array(grad_weights, weight_size);
}
