// Per-thread working memory that outlives a call, so that kernels never allocate in a loop.
#pragma once

#include <cstddef>

namespace fastlm {

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread; contents are whatever the last user left.
// Valid until the same thread asks again. Returns nullptr only if memory is exhausted.
void* thread_scratch(size_t bytes);

}  // namespace fastlm
