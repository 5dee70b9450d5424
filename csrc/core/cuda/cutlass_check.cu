// One CUTLASS GEMM instance per architecture family (bf16 inputs, fp32 accumulation and output, row-major x column-major). It
// proves in every CUDA build that the CUTLASS headers in use compile with our flags, ahead of the kernels that will be built on
// them.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm.h>

namespace fastlm::cuda {

using CheckGemm =
    cutlass::gemm::device::Gemm<cutlass::bfloat16_t, cutlass::layout::RowMajor, cutlass::bfloat16_t, cutlass::layout::ColumnMajor,
                                float, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
                                cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>,
                                cutlass::gemm::GemmShape<16, 8, 16>>;

// out (M, N) = a (M, K) @ b (N, K)^T. Returns 0 on success, CUTLASS's status otherwise.
int cutlass_check_gemm(int m, int n, int k, const void* a, const void* b, float* out, cudaStream_t stream) {
  CheckGemm gemm;
  const CheckGemm::Arguments arguments({m, n, k}, {static_cast<const cutlass::bfloat16_t*>(a), k},
                                       {static_cast<const cutlass::bfloat16_t*>(b), k}, {out, n}, {out, n}, {1.0f, 0.0f});
  return static_cast<int>(gemm(arguments, nullptr, stream));
}

}  // namespace fastlm::cuda
