// Lets a C++ compiler read what TVM writes for CUDA: the threads of a block are fibers that take turns, and meet at barriers.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(n)
using std::max, std::min;
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };

struct Index { unsigned x = 0, y = 0, z = 0; };
struct Barrier { unsigned arrived = 0, generation = 0; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread;
  bool done;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current;
static bool moved;
static Barrier block_barrier, warp_barriers[32];
static char slots[1024][8];
static std::function<void()> body;
static Index blockIdx;
#define threadIdx (fibers[current].thread)

static void meet(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) barrier = {0, generation + 1}, moved = true;
  while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}
static void __syncthreads() { meet(block_barrier, fibers.size()); }
template <class T> T exchange(T value, unsigned lane) {
  Barrier& warp = warp_barriers[current / 32];
  std::memcpy(slots[current], &value, sizeof value);
  meet(warp, 32);
  std::memcpy(&value, slots[current / 32 * 32 + lane % 32], sizeof value);
  meet(warp, 32);
  return value;
}
#define LANE (current % 32)
#define __shfl_sync(mask, value, lane, width) exchange(value, lane)
#define __shfl_xor_sync(mask, value, bits, width) exchange(value, LANE ^ (bits))
#define __shfl_up_sync(mask, value, by, width) exchange(value, LANE >= unsigned(by) ? LANE - (by) : LANE)
#define __shfl_down_sync(mask, value, by, width) exchange(value, LANE + (by) < 32 ? LANE + (by) : LANE)
#define __activemask() 0xffffffffu

static void thread_main() {
  body();
  fibers[current].done = moved = true;
  swapcontext(&fibers[current].context, &scheduler);
}
// 0 when every block ended; 1 when threads of one wait for others that will not come: a barrier that not all reach.
static int launch(const int64_t* size, std::function<void()> kernel) {
  body = kernel;
  fibers.resize(size[3] * size[4] * size[5]);
  for (int64_t block = 0; block < size[0] * size[1] * size[2]; ++block) {
    blockIdx = {unsigned(block % size[0]), unsigned(block / size[0] % size[1]), unsigned(block / size[0] / size[1])};
    for (unsigned t = 0; t < fibers.size(); ++t) {
      Fiber& fiber = fibers[t];
      fiber.stack.resize(1 << 16);
      fiber.thread = {unsigned(t % size[3]), unsigned(t / size[3] % size[4]), unsigned(t / size[3] / size[4])};
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, thread_main, 0);
    }
    for (bool running = true; running;) {
      running = moved = false;
      for (current = 0; current < fibers.size(); ++current) {
        if (!fibers[current].done) running = true, swapcontext(&scheduler, &fibers[current].context);
      }
      if (running && !moved) return 1;
    }
  }
  return 0;
}
