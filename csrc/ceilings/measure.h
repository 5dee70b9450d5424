// Times the loops of kernels.h on one or several threads.
#pragma once

#include <string>
#include <vector>

namespace fastlm::ceilings {

// Operations (bytes for `read` and `copy`) per second, summed over the threads.
struct Rate {
  double per_cpu_second;   // clock: CPU time of each thread, so what the cores would do if nobody else used them
  double per_wall_second;  // clock: time passed from the common start to the last thread's end
};

// Names that the CPU level in use can measure: fma, exp2, dot_bf16, read, copy.
std::vector<std::string> names();

// Runs the loop called `name` for about `seconds` on `threads` threads at once.
// Throws std::invalid_argument for an unknown name, a time that is not in (0, 60] or a thread count below 1.
Rate measure(const std::string& name, double seconds, int threads);

}  // namespace fastlm::ceilings
