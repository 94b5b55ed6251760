// Builds the CUDA sources for the CPU, so that tests can run the kernels without a GPU.
//
// Blocks run one after another. The threads of a block are coroutines that run until they reach a
// barrier. There each waits until all threads of its block have arrived or, at a shuffle or a
// warp's barrier, all threads of its warp. Undefined behaviour of barriers ends the process with a
// message: a barrier that a thread of the group skips, or threads that wait at different barriers.
// Shared memory holds NaN when a block begins. It is an allocation of exactly the size asked for,
// so that AddressSanitizer detects accesses beyond it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __ldg(address) (*(address))
#define __stwb(address, value) (*(address) = (value))
#define __syncthreads() emulation::wait(true, __LINE__)
#define __syncwarp() emulation::wait(false, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle_xor(value, lanes, __LINE__)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- The functions of the CUDA runtime that launching uses --------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostShared = 48 * 1024;
constexpr size_t kStack = 128 * 1024;

struct Launch {
  const char* kernel;
  unsigned blocks_x, blocks_y;
  int threads;
  size_t shared_bytes;
};
inline std::vector<Launch> launches;  // since Python last read them
inline bool idle = false;             // whether launches do nothing, to time what is around them

struct Group {  // a block or a warp
  int size, arrived, ended;
  int line;  // of the barrier where the arrived threads wait
};

struct Thread {
  enum { ready, waiting, ended } state;
  bool started;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  jmp_buf resume;  // for a started thread: unlike getcontext, setjmp makes no system call
  char exchange[2][8];
  int parity;
};

inline std::vector<Thread> threads;
inline Group block, warps[kMostThreads / kWarp];
inline int current, count;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::unique_ptr<char[]> shared;
inline std::mutex busy;

[[noreturn]] inline void fail(const char* what, int line) {
  fprintf(stderr, "CUDA emulation: block (%u, %u), thread %d, line %d: %s\n", blockIdx.x,
          blockIdx.y, current, line, what);
  abort();
}

inline char* shared_memory() { return shared.get(); }
inline Group& warp_of(int thread) { return warps[thread / kWarp]; }

// Continues `to` where it stopped. Returns when another thread switches back to `self`.
inline void switch_context(Thread& self, Thread& to) {
#if defined(__SANITIZE_ADDRESS__)  // it requires that longjmp stays on one stack
  volatile bool back = false;
  getcontext(&self.context);
  if (back) return;
  back = true;
  setcontext(&to.context);
#else
  if (_setjmp(self.resume)) return;
  if (to.started) _longjmp(to.resume, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

// Continues the next thread that can run, or the scheduler if all threads have ended.
inline void switch_thread() {
  Thread& self = threads[current];
  int next = current;
  do next = (next + 1) % count;
  while (threads[next].state != Thread::ready && next != current);
  if (next == current) {
    if (block.ended < count) fail("every thread that still runs is waiting", block.line);
    setcontext(&scheduler);
  }
  current = next;
  threadIdx.x = static_cast<unsigned>(next);
  switch_context(self, threads[next]);
}

// Waits until the whole block or warp has arrived.
inline void wait(bool whole_block, int line) {
  Group& group = whole_block ? block : warp_of(current);
  if (group.ended) fail("this barrier waits for threads that have ended", line);
  if (group.arrived && group.line != line) fail("other threads wait at another barrier", line);
  group.line = line;
  threads[current].state = Thread::waiting;
  if (++group.arrived < group.size) return switch_thread();
  group.arrived = 0;
  const int first = whole_block ? 0 : current / kWarp * kWarp;
  for (int i = first; i < first + group.size; ++i) threads[i].state = Thread::ready;
}

template <typename T>
T shuffle_xor(T value, int lanes, int line) {
  static_assert(sizeof(T) <= 8, "a register or two");
  Thread& self = threads[current];
  const int other = current ^ lanes;
  if (other >= count) fail("a shuffle with a lane that does not exist", line);
  const int parity = self.parity;  // two slots: no lane is more than one shuffle ahead of another
  self.parity = 1 - parity;
  memcpy(self.exchange[parity], &value, sizeof(T));
  wait(false, line);
  memcpy(&value, threads[other].exchange[parity], sizeof(T));
  return value;
}

inline void thread_main() {
  body();
  Group& warp = warp_of(current);
  if (block.arrived || warp.arrived) fail("ends while others wait at a barrier", block.line);
  ++block.ended, ++warp.ended;
  threads[current].state = Thread::ended;
  switch_thread();
}

inline void run_block(size_t shared_bytes) {
  memset(shared.get(), 0xff, shared_bytes);  // NaN
  block = {count, 0, 0, 0};
  for (int w = 0; w * kWarp < count; ++w)
    warps[w] = {count - w * kWarp < kWarp ? count - w * kWarp : kWarp, 0, 0, 0};
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.state = Thread::ready;
    thread.started = false;
    thread.parity = 0;
    getcontext(&thread.context);
    ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), kStack);  // of the previous block
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, thread_main, 0);
  }
  // When all threads have ended, setcontext returns here.
  volatile bool finished = false;
  getcontext(&scheduler);
  if (finished) return;
  finished = true;
  current = 0;
  threadIdx = dim3(0, 0, 0);
  threads[0].started = true;
  setcontext(&threads[0].context);
}

inline cudaError_t launch(const char* name, std::function<void()> kernel, dim3 grid,
                          int block_threads, size_t shared_bytes) {
  if (!grid.x || !grid.y || block_threads < 1 || block_threads > kMostThreads)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kMostShared) return cudaErrorInvalidValue;
  if (idle) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(busy);
  launches.push_back({name, grid.x, grid.y, block_threads, shared_bytes});
  if (threads.empty()) threads = std::vector<Thread>(kMostThreads);
  body = std::move(kernel);
  count = block_threads;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(block_threads));
  shared.reset(new char[shared_bytes]);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(shared_bytes);
  return cudaSuccess;
}

}  // namespace emulation
