// Threads and memory of the CPU kernels.
#pragma once

#include "../shared/arena.h"
#include "kernels.h"

namespace naslora {
namespace {

// Calls body(begin, end) for ranges that together are [0, count), on torch's threads.
template <typename Body>
void parallel_tasks(int64_t count, const Body& body) {
  run_tasks(
      count,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// An array that lives for one call.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(count ? static_cast<T*>(host_allocate(count * sizeof(T))) : nullptr) {}
  ~Buffer() { host_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

using ScratchArena = Arena<64>;  // bytes of a cache line

// Places a layout in the scratch memory of the calling thread. arena.h explains why its constructor
// runs twice. An earlier layout of this thread becomes invalid.
template <typename Layout, typename... Arguments>
Layout place_in_scratch(const Arguments&... arguments) {
  const size_t bytes = measure<Layout, ScratchArena>(arguments...);
  ScratchArena arena(thread_scratch(bytes));
  return Layout(arena, arguments...);
}

template <typename T>
void fill(T* data, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

}  // namespace
}  // namespace naslora
