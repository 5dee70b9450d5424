// How a token's experts are spread over lanes: four to a lane, so that a lane's random numbers are one block of Philox and its
// logits one load; as few lanes as hold them all, so that a warp takes up to 16 tokens at once.
#pragma once

#include "core/cuda/launch.h"
#include "core/integers.h"
#include "ops/grin_route/params.h"

namespace fastlm::grin_route::cuda {

constexpr int kThreads = 128;
constexpr int kQuad = 4;
constexpr int64_t kBlocksPerSm = 16;
constexpr int64_t kMostExperts = (int64_t{1} << 31) - 1024;  // their numbers are int32

// Calls f.template operator()<kLanes, kPieces>(): lanes of a token and fours of experts in a lane's registers, 0 where they are
// read from memory again for each pick.
template <class T, class F>
cudaError_t visit_form(int64_t experts, F&& f) {
  if (experts > kMostExperts) return cudaErrorInvalidValue;
  if constexpr (sizeof(T) < 8) {
    if (experts <= 2 * kQuad) return f.template operator()<2, 1>();
    if (experts <= 4 * kQuad) return f.template operator()<4, 1>();
    if (experts <= 8 * kQuad) return f.template operator()<8, 1>();
    if (experts <= 16 * kQuad) return f.template operator()<16, 1>();
    if (experts <= 32 * kQuad) return f.template operator()<32, 1>();
    if (experts <= 64 * kQuad) return f.template operator()<32, 2>();
  }
  return f.template operator()<32, 0>();
}

inline dim3 grid_of(int64_t tokens, int lanes) {
  const int64_t most = fastlm::cuda::current_device().num_sms * kBlocksPerSm;
  return dim3(fastlm::cuda::limited(ceil_div(tokens * lanes, kThreads), most));
}

// Whether four logits of a token can be loaded at once.
inline bool whole_quads(const Params& p, int64_t element_bytes) {
  return p.logits_expert_stride == 1 && p.logits_token_stride % kQuad == 0 && p.num_experts % kQuad == 0 &&
         reinterpret_cast<uintptr_t>(p.logits) % static_cast<uintptr_t>(element_bytes == 2 ? 8 : 16) == 0;
}

}  // namespace fastlm::grin_route::cuda
