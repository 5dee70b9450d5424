// Every operator of fastlm on one page. Tensors of differentiable operators are positional: torch registers no gradient for
// keyword-only ones. Outputs that do not apply to a call are tensors of shape (0,).
// Letters: B batch, L length, D channels, N state size, G groups, S packed sequences, W filter width, H query heads, K head dim.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlm, m) {
  // ---- causal_conv1d ------------------------------------------------------------------------------------------------
  // Depthwise causal convolution with optional SiLU; final_states are the last W-1 inputs of each row or packed sequence.
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? seq_idx=None, Tensor? initial_states=None, "
      "str? activation=None, Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_states)");
  // Gradients of x, weight, bias and initial_states; the pre-activation is recomputed.
  m.def(
      "causal_conv1d_backward(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, "
      "Tensor? initial_states, str? activation, Tensor? cu_seqlens) -> (Tensor dx, Tensor dweight, Tensor dbias, "
      "Tensor dinitial_states)");
  // One or m tokens of decoding; conv_state is shifted in place, or written as a ring when cache_seqlens is given.
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, str? activation=None, "
      "Tensor? cache_seqlens=None, Tensor? conv_state_indices=None) -> Tensor");

  // ---- selective_scan -----------------------------------------------------------------------------------------------
  // Mamba-1 scan h_t = exp(dt A) h_{t-1} + dt B u, y = C h + D u, gated by z. chunk_states feed the backward pass.
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? delta_bias=None, bool delta_softplus=False, Tensor? initial_state=None, Tensor? cu_seqlens=None, *, "
      "bool return_all_states=False) -> (Tensor out, Tensor last_state, Tensor chunk_states, Tensor all_states)");
  // One gradient per input; states are recomputed chunk by chunk from chunk_states.
  m.def(
      "selective_scan_backward(Tensor dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, Tensor chunk_states, Tensor? initial_state, "
      "Tensor? cu_seqlens) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, "
      "Tensor ddelta_bias, Tensor dinitial_state)");
  // One token of decoding; state is updated in place.
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? dt_bias=None, bool dt_softplus=False, Tensor? state_batch_indices=None) -> Tensor");

  // ---- sliding_window_attention -------------------------------------------------------------------------------------
  // Softmax attention over a window of keys around the (bottom-right aligned) diagonal; lse is the log-sum-exp per row.
  m.def(
      "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, *, "
      "int[2] window_size=[-1, -1], bool causal=True, float? softmax_scale=None, float softcap=0.0, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None) -> (Tensor out, Tensor lse)");
  // Gradients of q, k and v; probabilities are recomputed from lse.
  m.def(
      "sliding_window_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, *, int[2] window_size, bool causal, float? softmax_scale, "
      "float softcap, SymInt? max_seqlen_q, SymInt? max_seqlen_k) -> (Tensor dq, Tensor dk, Tensor dv)");
  // m tokens of decoding on a ring buffer of keys and values (slot = position mod R), written in place.
  m.def(
      "sliding_window_attention_update(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor cache_seqlens, *, int[2] window_size, float? softmax_scale=None, Tensor? rotary_cos=None, "
      "Tensor? rotary_sin=None) -> Tensor");

  // ---- scan_swa -----------------------------------------------------------------------------------------------------
  // selective_scan and sliding_window_attention side by side, in one parallel region; each as its own operator.
  m.def(
      "scan_swa(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "bool delta_softplus, Tensor? initial_state, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, *, int[2] window_size, bool causal=True, "
      "float? softmax_scale=None, float softcap=0.0, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None) -> "
      "(Tensor scan_out, Tensor last_state, Tensor chunk_states, Tensor attn_out, Tensor lse)");

  // ---- samba_decode_step --------------------------------------------------------------------------------------------
  // One token per row through a Mamba block and a sliding-window block, norms and feed-forward layers included; states and
  // key/value rings are written in place. Returns the residual stream.
  m.def(
      "samba_decode_step(Tensor hidden, Tensor mamba_norm, Tensor in_proj, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A_log, Tensor D, Tensor out_proj, Tensor mamba_mlp_norm, "
      "Tensor mamba_w1, Tensor mamba_w2, Tensor mamba_w3, Tensor(a!) conv_state, Tensor(b!) scan_state, Tensor attn_norm, "
      "Tensor q_proj, Tensor k_proj, Tensor v_proj, Tensor o_proj, Tensor attn_mlp_norm, Tensor attn_w1, Tensor attn_w2, "
      "Tensor attn_w3, Tensor(c!) k_cache, Tensor(d!) v_cache, Tensor cache_seqlens, *, int[2] window_size, float eps=1e-5, "
      "float? softmax_scale=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None) -> Tensor");

  // ---- grin_route ---------------------------------------------------------------------------------------------------
  // Experts of every token: picks without replacement from masked softmaxes, the largest in eval, sampled in training (from noise
  // or from seed). topk_probs is p of each pick, before a weight is reduced; it has no gradient.
  m.def(
      "grin_route(Tensor router_logits, Tensor? noise=None, Tensor? seed=None, Tensor? valid=None, *, int top_k=2, "
      "float jitter_eps=0.01, bool training=False, str estimator='v2') -> (Tensor topk_weights, Tensor topk_ids, "
      "Tensor expert_counts, Tensor topk_probs)");
  // The estimator's gradient of router_logits; probabilities are recomputed from the logits and the earlier picks.
  m.def(
      "grin_route_backward(Tensor dtopk_weights, Tensor router_logits, Tensor topk_ids, *, float jitter_eps, bool training, "
      "str estimator) -> Tensor drouter_logits");

  // ---- moe_dispatch -------------------------------------------------------------------------------------------------
  // Stable counting sort of a router's picks by expert: where each expert's rows begin, and both directions of the permutation.
  m.def("moe_plan(Tensor topk_ids, SymInt num_experts) -> (Tensor offsets, Tensor perm, Tensor inv)");
  // One product per group of rows, each with its own matrix; empty groups and rows behind the last group allowed.
  m.def("grouped_gemm(Tensor a, Tensor b, Tensor offsets, *, bool trans_b=True) -> Tensor");
  // Gradients of both matrices; that of an empty group's matrix is 0.
  m.def(
      "grouped_gemm_backward(Tensor dout, Tensor a, Tensor b, Tensor offsets, *, bool trans_b, bool need_da, bool need_db) -> "
      "(Tensor da, Tensor db)");
  // Weighted sum over each token's experts of down_proj[e] (act(gate) * up), no token dropped. gate_up feeds the backward pass.
  m.def(
      "moe_experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, Tensor topk_weights, "
      "Tensor? gate_up_proj_bias=None, Tensor? down_proj_bias=None, Tensor? grad_weights=None, *, str activation=\"silu\", "
      "bool keep_gate_up=False) -> (Tensor out, Tensor gate_up)");
  // One gradient per floating input but grad_weights; gate_up is recomputed where it is (0,).
  m.def(
      "moe_experts_backward(Tensor dout, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor topk_ids, "
      "Tensor topk_weights, Tensor? gate_up_proj_bias, Tensor? down_proj_bias, Tensor? grad_weights, Tensor gate_up, *, "
      "str activation, bool need_dhidden_states, bool need_dproj, bool need_dtopk_weights) -> (Tensor dhidden_states, "
      "Tensor dgate_up_proj, Tensor ddown_proj, Tensor dtopk_weights, Tensor dgate_up_proj_bias, Tensor ddown_proj_bias)");

  // ---- slm_loss -----------------------------------------------------------------------------------------------------
  // Per-token negative log-likelihood, log-sum-exp and entropy of a linear head; ignored tokens have 0. No (T, V) buffer.
  m.def(
      "linear_nll(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias=None, *, int ignore_index=-100, "
      "float softcap=0.0, bool return_entropy=False) -> (Tensor nll, Tensor lse, Tensor entropy)");
  // Logits are recomputed, for the tokens with a gradient only.
  m.def(
      "linear_nll_backward(Tensor? dnll, Tensor? dlse, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor labels, "
      "Tensor? bias, Tensor lse, Tensor entropy, *, int ignore_index, float softcap, bool need_dhidden, bool need_dweight, "
      "bool need_dbias) -> (Tensor dhidden, Tensor dweight, Tensor dbias)");
  // The keep_ratio largest scores, exactly, of all tokens or of each packed sequence. threshold: the smallest selected score, inf
  // without any; counts: eligible and finite, selected, equal to the threshold.
  m.def(
      "select_tokens(Tensor score, Tensor eligible, Tensor? cu_seqlens=None, *, float keep_ratio, str tie_break='index', "
      "int seed=0) -> (Tensor mask, Tensor threshold, Tensor counts)");
}
