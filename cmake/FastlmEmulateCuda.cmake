# The CUDA twins as host code on an emulated device (csrc/core/cuda/emulation), registered for the CPU: what the tests of an operator
# say about its CPU twin, they then say about the source of its CUDA twin. Needs the headers of the CUDA toolkit, no compiler for it.
find_program(FASTLM_NVCC nvcc HINTS /usr/local/cuda/bin)
get_filename_component(_nvcc "${FASTLM_NVCC}" REALPATH)
get_filename_component(_toolkit "${_nvcc}/../.." ABSOLUTE)
find_path(FASTLM_CUDA_HEADERS cuda_bf16.h HINTS "${_toolkit}/include" /usr/local/cuda/include REQUIRED)

set(emulated_kernels csrc/core/cuda/tensor_map.cu csrc/core/cuda/gemm/gemm.cu ${cuda_sources})
set(emulated_sources csrc/core/cuda/emulation/run.cpp csrc/adapter/cuda.cpp ${cuda_adapter_sources} ${emulated_kernels})
list(FILTER emulated_kernels INCLUDE REGEX "\\.cu$")
set_source_files_properties(${emulated_kernels} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
add_library(fastlm_emulated_cuda OBJECT ${emulated_sources})
target_link_libraries(fastlm_emulated_cuda PRIVATE fastlm_settings Torch::stable)
target_include_directories(fastlm_emulated_cuda SYSTEM PRIVATE "${FASTLM_CUDA_HEADERS}")
target_compile_definitions(fastlm_emulated_cuda PRIVATE FASTLM_EMULATE_CUDA "FASTLM_CUDA_ARCHITECTURES=\"80\"")
# -O1 after every other -O: kernels unrolled for a device take long to compile at -O3.
target_compile_options(fastlm_emulated_cuda PRIVATE -O1 -Wno-unknown-pragmas)
target_link_libraries(fastlm_ops PRIVATE fastlm_emulated_cuda)
