// Per-thread working memory that outlives a call, so that kernels never allocate in a loop.
#pragma once

#include <cstddef>

namespace fastlm {

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread; contents are whatever the last user left.
// Valid until the same thread asks again. Returns nullptr if memory is exhausted: the kernel returns at once, and the parallel
// loop it runs in throws when all threads are done (adapter/parallel.h).
[[nodiscard]] void* thread_scratch(size_t bytes);

// The size of the calling thread's last request that failed since this was asked before; 0: none did.
size_t take_scratch_failure();

}  // namespace fastlm
