// The CPU kernels of samba_decode_step: one table per CPU level, one entry per element type (index: DType).
#pragma once

#include "core/cpu_dispatch.h"
#include "ops/samba_decode_step/params.h"

namespace fastlm::samba_decode_step {

using Normalize = void (*)(const Norm&, int64_t begin, int64_t end);    // items: rows of the batch
using FormDecay = void (*)(const Decay&, int64_t begin, int64_t end);   // items: channels
using Multiply = void (*)(const Product&, int64_t begin, int64_t end);  // items: rows of the weight

struct Kernels {
  Normalize normalize[4];
  FormDecay decay[4];
  Multiply store[4];  // y = x weight^T
  Multiply add[4];    // y += x weight^T, y in acc
  Multiply gate[4];   // y = silu(x weight^T) * (x gated^T)
};

}  // namespace fastlm::samba_decode_step

FASTLM_DECLARE_CPU_KERNELS_TO_AVX512(samba_decode_step::Kernels, samba_decode_step)
