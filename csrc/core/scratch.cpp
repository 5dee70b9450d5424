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

}  // namespace

void* thread_scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (bytes > buffer.size) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, rounded);
    buffer.size = buffer.data == nullptr ? 0 : rounded;
  }
  return buffer.data;
}

}  // namespace fastlm
