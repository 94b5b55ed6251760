// Several arrays in one allocation.
//
// A layout is a struct whose constructor takes its arrays from an arena. Its size is not written
// down anywhere: the constructor runs twice with the same arguments. The first run uses an arena
// without memory. It hands out null pointers and adds up the sizes, which tells how much memory to
// allocate. The second run uses that memory and yields the pointers.
#pragma once

#include "vocabulary.h"

namespace naslora {

// Hands out consecutive arrays, each aligned to `kAlignment` bytes if the memory is.
template <int kAlignment>
class Arena {
 public:
  NASLORA_HOST_DEVICE explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  NASLORA_HOST_DEVICE T* take(int64_t count) {
#if defined(__CUDA_ARCH__)
    // A block always has its memory. A test for null would hide from the compiler that it is shared
    // memory, and every access would use a generic address.
    char* array = memory_ + size_;
#else
    char* array = memory_ ? memory_ + size_ : nullptr;
#endif
    size_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(array);
  }

  // Bytes of all arrays handed out so far.
  NASLORA_HOST_DEVICE size_t size() const { return size_; }

 private:
  char* memory_;
  size_t size_ = 0;
};

// The first run: how many bytes a layout takes.
template <typename Layout, typename Arena, typename... Arguments>
size_t measure(const Arguments&... arguments) {
  Arena arena(nullptr);
  Layout(arena, arguments...);
  return arena.size();
}

}  // namespace naslora
