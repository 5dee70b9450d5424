// The CPU kernels of grin_route: one table per CPU level, one entry per element type (index: DType). Items are tokens; a run of
// them may begin and end anywhere.
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/grin_route/params.h"

namespace fastlm::grin_route {

using Forward = void (*)(const ForwardParams&, int64_t begin, int64_t end);
using Backward = void (*)(const BackwardParams&, int64_t begin, int64_t end);

struct ForwardKernels {
  Forward forward[4];
};

struct BackwardKernels {
  Backward backward[4];
};

}  // namespace fastlm::grin_route

FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(grin_route::ForwardKernels, grin_route_forward)
FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(grin_route::BackwardKernels, grin_route_backward)
