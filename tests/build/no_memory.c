/* Preloaded in front of the C library: requests of aligned memory, which is how kernels get theirs, fail on demand. */
#include <stdlib.h>

int fail_every = 0; /* 0: never; n: every n-th request from here on */
static int requests = 0;

void* aligned_alloc(size_t alignment, size_t size) {
  void* memory = NULL;
  const int number = __atomic_add_fetch(&requests, 1, __ATOMIC_RELAXED);
  if (fail_every != 0 && number % fail_every == 0) return NULL;
  return posix_memalign(&memory, alignment, size) == 0 ? memory : NULL;
}
