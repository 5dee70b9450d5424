// How a call of selective_scan on CPU is set up: parameters, how it is cut, and its forward pass as pieces of work, which an
// operator that runs the scan beside something else takes among its own.
#pragma once

#include <algorithm>
#include <vector>

#include "adapter/tensor.h"
#include "ops/selective_scan/checks.h"
#include "ops/selective_scan/cpu/kernels.h"

namespace fastlm::selective_scan {

// Pieces of work to cut a call into. More would share out better, but narrower blocks of channels visit every page of every
// tensor more often: 64 pieces instead of 16 cost a sixth of the time at D = 2048, most of it in page walks.
constexpr int64_t kWantedItems = 16;
constexpr int64_t kGrain = 16384;  // state-steps worth another thread

inline int64_t grain(int64_t work_per_item) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_per_item)); }

Activation activation(const Tensor& t);
Parameter parameter(const OptionalTensor& t);
Projection projection(const Tensor& t);  // B or C, and their gradients, of selective_scan

// A gradient of B or C in the layout of the original: (B, L, N) or (B, L, G, N) memory if its states are contiguous.
Tensor empty_projection(const Tensor& like);

Plan make_plan(const Params& p);
ChannelArrays make_arrays(const Params& p, const Plan& plan);

// The arguments that forward and backward share.
struct Inputs {
  Tensor u, delta, A, B, C;
  OptionalTensor D, z, delta_bias;
  bool delta_softplus;
  OptionalTensor initial_state, cu_seqlens;
};

// Everything but the sequences, of the tensors as they are.
void fill_params(Params& p, const Inputs& in, const Tensor& chunk_states);

// The tensors as the kernels read them. Those that have unit stride neither over D nor over L are copied once, and the copies are
// kept here, as is all that the parameters point to.
struct Call {
  Inputs in;
  std::vector<Sequence> sequences;

  Call(const char* op, const Inputs& inputs);
  void fill(Params& p, const Tensor& chunk_states) const;
};

// The arguments of a decoding step, and what the kernel reads of them.
struct UpdateInputs {
  Tensor state, x, dt, A, B, C;
  OptionalTensor D, z, dt_bias;
  bool dt_softplus;
};
void fill_update(UpdateParams& p, const UpdateInputs& in, const Tensor& out);

// A forward pass: all pieces of `prepare` must be done before one of `scan` begins. Checks all arguments.
class Forward {
 public:
  Forward(const char* op, const Inputs& inputs, bool return_all_states);
  Forward(const Forward&) = delete;
  Forward& operator=(const Forward&) = delete;

  int64_t prepare_pieces() const { return empty_ ? 0 : p_.groups * plan_.padded_dim / kChannelAlign; }
  int64_t scan_pieces() const { return empty_ ? 0 : p_.num_sequences * plan_.num_blocks; }
  void prepare(int64_t begin, int64_t end) const;
  void scan(int64_t begin, int64_t end) const;
  int64_t prepare_work() const { return 4 * kChannelAlign * plan_.padded_state; }  // of a piece, in state-steps
  int64_t scan_work() const { return p_.batch * p_.seqlen / p_.num_sequences * plan_.block * plan_.padded_state; }

  Tensor out, last_state, chunk_states, all_states;

 private:
  Call call_;
  ForwardParams p_{};
  bool empty_;
  Plan plan_{};
  ChannelArrays arrays_{};
  Tensor prepared_;
  int kernel_;
};

}  // namespace fastlm::selective_scan
