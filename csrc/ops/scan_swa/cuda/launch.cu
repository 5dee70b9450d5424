// Which calls are fused, and how.
#include "ops/scan_swa/cuda/launch.h"

#include "core/cuda/launch.h"
#include "ops/selective_scan/cuda/launch.h"
#include "ops/sliding_window_attention/cuda/hopper.h"

namespace fastlm::scan_swa::cuda {

bool fuses(const selective_scan::ForwardParams& scan, DType scan_dtype, const sliding_window_attention::Params& attention,
           DType attention_dtype) {
  const bool short_elements = scan_dtype == DType::kBFloat16 || scan_dtype == DType::kFloat16;
  const bool hopper = sliding_window_attention::cuda::hopper_forward_applies(attention, attention_dtype);
  const int64_t most_head = hopper ? kMostHopperHead : 256;
  const bool fits = hopper || warps_shared_bytes<bfloat16>(attention.head_dim) <= fastlm::cuda::current_device().max_shared_bytes;
  return short_elements && scan_dtype == attention_dtype && scan.state <= 16 && attention.head_dim <= most_head && fits &&
         selective_scan::cuda::plan_split(scan).part == 0;
}

cudaError_t launch_fused(const selective_scan::cuda::ForwardCall& scan, const sliding_window_attention::Params& attention,
                         DType dtype, cudaStream_t stream) {
  const bool bf16 = dtype == DType::kBFloat16;
  if (sliding_window_attention::cuda::hopper_forward_applies(attention, dtype)) {
    return bf16 ? launch_hopper<bfloat16>(scan, attention, stream) : launch_hopper<float16>(scan, attention, stream);
  }
  return bf16 ? launch_warps<bfloat16>(scan, attention, stream) : launch_warps<float16>(scan, attention, stream);
}

}  // namespace fastlm::scan_swa::cuda
