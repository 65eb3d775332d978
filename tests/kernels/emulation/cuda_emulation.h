// As much of CUDA as ms_deform_attn.cuh uses, on a CPU: one fiber a thread, one block after another.
//
// Between two warp-wide operations every lane runs alone, in an order that the caller chooses, so a result that
// hangs on a missing barrier changes with the order. Lanes of a warp must all meet at the same operation, told apart
// by its line in the source; anything else ends the program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;

enum class Order { ascending, descending, permuted };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  int line = 0;  // of the warp-wide operation that it waits at
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::function<void()> kernel;
  unsigned block = 0;
  int current = 0;
  float exchanged[1024];
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulation: %s (line %d)\n", what, line);
  std::exit(2);
}

inline void run_thread() {
  machine.kernel();
  Fiber& fiber = machine.fibers[machine.current];
  fiber.done = true;
  swapcontext(&fiber.context, &machine.scheduler);
}

// The thread stops here until every lane of its warp has come to the same line.
inline void meet(int line) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.line = line;
  swapcontext(&fiber.context, &machine.scheduler);
}

inline int lane_at(int turn, Order order) {
  switch (order) {
    case Order::ascending:
      return turn;
    case Order::descending:
      return kWarp - 1 - turn;
    default:
      return (turn * 13 + 5) % kWarp;
  }
}

inline void run_warp(int first, Order order) {
  for (;;) {
    for (int turn = 0; turn < kWarp; ++turn) {
      machine.current = first + lane_at(turn, order);
      swapcontext(&machine.scheduler, &machine.fibers[machine.current].context);
    }
    const Fiber& leader = machine.fibers[first];
    for (int lane = 1; lane < kWarp; ++lane) {
      const Fiber& fiber = machine.fibers[first + lane];
      if (fiber.done != leader.done || (!leader.done && fiber.line != leader.line)) {
        fail("lanes of one warp are at different operations", fiber.line);
      }
    }
    if (leader.done) {
      return;
    }
  }
}

inline void launch(unsigned blocks, int threads, Order order, std::function<void()> kernel) {
  machine.kernel = std::move(kernel);
  for (machine.block = 0; machine.block < blocks; ++machine.block) {
    machine.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : machine.fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_thread, 0);
    }
    for (int first = 0; first < threads; first += kWarp) {  // no kernel here has a barrier over a whole block
      run_warp(order == Order::descending ? threads - kWarp - first : first, order);
    }
  }
}

struct Thread {
  struct {
    operator unsigned() const { return static_cast<unsigned>(machine.current); }
  } x;
};
struct BlockIndex {
  struct {
    operator unsigned() const { return machine.block; }
  } x;
};

}  // namespace emulation

inline emulation::Thread threadIdx;
inline emulation::BlockIndex blockIdx;

inline void __syncwarp(int line = __builtin_LINE()) {
  emulation::meet(line);
}

inline float __shfl_xor_sync(unsigned mask, float number, int distance, int width, int line = __builtin_LINE()) {
  using emulation::machine;
  if (mask != 0xffffffffu || distance <= 0 || distance >= width) {
    emulation::fail("a shuffle that leaves its group", line);
  }
  const int thread = machine.current;
  machine.exchanged[thread] = number;
  emulation::meet(line);
  const float received = machine.exchanged[thread ^ distance];
  emulation::meet(line);
  return received;
}

template <typename T>
inline void atomicAdd(T* target, T number) {
  *target += number;
}
inline void atomicAdd(float4* target, float4 number) {
  *target = {target->x + number.x, target->y + number.y, target->z + number.z, target->w + number.w};
}

inline long long __double2ll_rn(double number) {
  return std::llrint(number);
}
using std::isfinite;
