// Per-thread working memory: grows to the largest request, freed with the thread.
#include "core/scratch.h"

#include <cstdlib>

namespace fastlm {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local size_t failed_bytes = 0;

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Buffer buffer;
#if defined(__SANITIZE_ADDRESS__)
  const size_t rounded = (bytes + 63) / 64 * 64;  // exactly what was asked for, so that a step beyond it is seen
  const bool fits = rounded == buffer.size;
#else
  const size_t rounded = (bytes + 4095) / 4096 * 4096;
  const bool fits = bytes <= buffer.size;
#endif
  if (!fits) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, rounded);
    buffer.size = buffer.data == nullptr ? 0 : rounded;
    if (buffer.data == nullptr) failed_bytes = bytes;
  }
  return buffer.data;
}

size_t take_scratch_failure() {
  const size_t bytes = failed_bytes;
  failed_bytes = 0;
  return bytes;
}

}  // namespace fastlm
