# The sources of every operator family, listed by hand, relative to csrc/ops/<family>. <OP>_ADAPTER: checks and the CPU twin;
# <OP>_KERNELS: compiled once per CPU level; <OP>_CUDA_ADAPTER and <OP>_CUDA: the CUDA twin; <OP>_NEEDS: families whose kernels it runs.
set(FASTLM_FAMILIES causal_conv1d selective_scan sliding_window_attention scan_swa
                    samba_decode_step grin_route moe_dispatch slm_loss)
set(FASTLM_BF16_DOT_FAMILIES sliding_window_attention moe_dispatch slm_loss) # the only ones the level avx512_bf16 compiles anew

macro(fastlm_sources family)
  cmake_parse_arguments(_sources "" "" "ADAPTER;KERNELS;CUDA_ADAPTER;CUDA;NEEDS" ${ARGN})
  foreach(_kind IN ITEMS ADAPTER KERNELS CUDA_ADAPTER CUDA)
    list(TRANSFORM _sources_${_kind} PREPEND "csrc/ops/${family}/")
    set(${family}_${_kind} ${_sources_${_kind}})
  endforeach()
  set(${family}_NEEDS ${_sources_NEEDS})
endmacro()

fastlm_sources(causal_conv1d
  ADAPTER checks.cpp fill.cpp cpu.cpp
  KERNELS cpu/forward.cpp cpu/backward.cpp cpu/update.cpp
  CUDA_ADAPTER cuda.cpp
  CUDA cuda/forward_rows.cu cuda/forward_channels.cu cuda/backward_rows.cu cuda/backward_channels.cu cuda/update.cu)
fastlm_sources(selective_scan
  ADAPTER checks.cpp call.cpp cpu.cpp
  KERNELS cpu/forward.cpp cpu/backward.cpp cpu/update.cpp
  CUDA_ADAPTER cuda.cpp cuda_backward.cpp cuda_update.cpp
  CUDA cuda/launch.cu cuda/forward_bf16.cu cuda/forward_fp16.cu cuda/forward_float.cu cuda/forward_double.cu
       cuda/backward_launch.cu cuda/backward_bf16.cu cuda/backward_fp16.cu cuda/backward_float.cu cuda/backward_double.cu
       cuda/update.cu)
fastlm_sources(sliding_window_attention
  ADAPTER checks.cpp call.cpp cpu.cpp
  KERNELS cpu/forward.cpp cpu/backward.cpp cpu/update.cpp
  CUDA_ADAPTER cuda.cpp cuda_update.cpp
  CUDA cuda/launch.cu cuda/forward_bf16.cu cuda/forward_fp16.cu cuda/backward_bf16.cu cuda/backward_fp16.cu
       cuda/generic_float.cu cuda/generic_double.cu cuda/update.cu cuda/hopper_forward.cu cuda/hopper_forward_64.cu
       cuda/hopper_forward_128.cu cuda/hopper_forward_256.cu cuda/hopper_backward.cu cuda/hopper_backward_64.cu
       cuda/hopper_backward_128.cu)
fastlm_sources(scan_swa
  NEEDS selective_scan sliding_window_attention
  ADAPTER cpu.cpp
  CUDA_ADAPTER cuda.cpp
  CUDA cuda/launch.cu cuda/warps_bf16.cu cuda/warps_fp16.cu cuda/hopper_bf16.cu cuda/hopper_fp16.cu)
fastlm_sources(samba_decode_step
  NEEDS causal_conv1d selective_scan sliding_window_attention
  ADAPTER checks.cpp cpu.cpp
  KERNELS cpu/dense.cpp
  CUDA_ADAPTER cuda.cpp
  CUDA cuda/phases.cu cuda/whole.cu)
fastlm_sources(grin_route
  ADAPTER checks.cpp cpu.cpp
  KERNELS cpu/forward.cpp cpu/backward.cpp
  CUDA_ADAPTER cuda.cpp
  CUDA cuda/forward.cu cuda/backward.cu)
fastlm_sources(moe_dispatch
  ADAPTER checks.cpp plan.cpp cpu.cpp experts.cpp
  KERNELS cpu/forward.cpp cpu/backward.cpp
  CUDA_ADAPTER cuda_plan.cpp cuda.cpp cuda_call.cpp cuda_experts.cpp cuda_experts_backward.cpp
  CUDA cuda/plan.cu cuda/gemm.cu cuda/gemm_bf16.cu cuda/gemm_fp16.cu cuda/gemm_float.cu cuda/gemm_double.cu
       cuda/experts.cu cuda/experts_gate_bf16.cu cuda/experts_gate_fp16.cu cuda/experts_gate_float.cu
       cuda/experts_down_bf16.cu cuda/experts_down_fp16.cu cuda/experts_down_float.cu
       cuda/experts_backward_bf16.cu cuda/experts_backward_fp16.cu cuda/experts_backward_float.cu)
fastlm_sources(slm_loss
  ADAPTER checks.cpp select.cpp cpu.cpp
  KERNELS cpu/pack.cpp cpu/forward.cpp cpu/backward.cpp
  CUDA_ADAPTER cuda.cpp cuda_select.cpp
  CUDA cuda/select.cu cuda/compact.cu cuda/plan.cu cuda/rows.cu cuda/forward_bf16.cu cuda/forward_fp16.cu
       cuda/forward_float.cu cuda/backward_bf16.cu cuda/backward_fp16.cu cuda/backward_float.cu)
