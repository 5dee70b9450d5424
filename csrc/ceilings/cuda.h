// What a GPU can do at best, one thing at a time: measured by kernels that do nothing else. Part of libfastlm_ops where CUDA is
// built; `_C` asks for it by name.
#pragma once

#include <string>
#include <vector>

#include "core/export.h"

namespace fastlm::ceilings {

// Per second of the device's own clock: operations, bytes or launches.
struct CudaRate {
  double best;
  double middle;  // of all tries
  int tries;
  double seconds;  // of the try in the middle
};

// fma: fp32 multiply-add, two operations each; exp2: ex2.approx; fma_exp2: both side by side, eight multiply-adds for an
// exponential, exponentials counted; read, copy: bytes (read plus written) of buffers far larger than the L2 cache; launch: empty
// kernels one behind the other on a stream.
FASTLM_API std::vector<std::string> cuda_names();

// Runs the kernel called `name` on the current device for about `seconds`.
// Throws std::invalid_argument for an unknown name or a time that is not in (0, 60], std::runtime_error with CUDA's text if a
// call fails.
FASTLM_API CudaRate measure_cuda(const std::string& name, double seconds);

}  // namespace fastlm::ceilings
