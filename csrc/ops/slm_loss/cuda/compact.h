// The tokens that count, as a list on the device: for products over some rows only, whose number the host does not know.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastlm::slm_loss::cuda {

// Token t counts if labels[t] is in [0, vocab) and not ignore_index and, where there are gradients, one of them is not 0 at t;
// NaN is not 0. Everything is contiguous and on the device; nothing is read that lies elsewhere, whatever the labels are.
struct CompactParams {
  int64_t tokens;      // T, from 0 to 2^31 - 1
  const void* labels;  // (T,) int64_t, or int32_t
  bool labels_64;
  int64_t ignore_index, vocab;
  const void*
      gradients[3];  // (T,) float, or double if `doubles`; null: not there. All null: every token with such a label counts
  bool doubles;

  int32_t* positions;  // (T,): the tokens that count, ascending; what comes after them is not written
  int32_t* count;      // (1,)
  void* workspace;     // compact_workspace_bytes(T), aligned to 4 bytes; need not be cleared
};

// Tokens are cut into as many tiles at most: every block of the second launch adds up their numbers. Tests ask for fewer.
constexpr int64_t kMostTiles = 1024;

int64_t compact_workspace_bytes(int64_t tokens, int64_t most_tiles = kMostTiles);

// Two launches, the second of which reads T / 8 bytes that the first wrote. The list depends on nothing but the flags.
cudaError_t launch_compact(const CompactParams& p, cudaStream_t stream, int64_t most_tiles = kMostTiles);

}  // namespace fastlm::slm_loss::cuda
