# Finds the headers and libraries of the torch installed beside the Python interpreter, and makes the target Torch::stable.
#
# torch's own CMake package is not used: it overrides CMAKE_CUDA_ARCHITECTURES, edits global flags and wants a whole CUDA toolkit.
# The interpreter is asked without PYTHONPATH, so that the answer is the user's torch even inside an isolated build.
#
# Sets: TorchStable_FOUND, TorchStable_VERSION, TorchStable_INCLUDE_DIR, TorchStable_LIBRARY_DIR, TorchStable_CUDA_VERSION ("" for CPU builds)

execute_process(
  COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE
          "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_torch.py"
  OUTPUT_VARIABLE _torch_answer ERROR_VARIABLE _torch_error RESULT_VARIABLE _torch_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT _torch_status EQUAL 0)
  # Build front ends that make a fresh environment (uv, build) have torch only there, on PYTHONPATH.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_torch.py"
    OUTPUT_VARIABLE _torch_answer ERROR_VARIABLE _torch_error RESULT_VARIABLE _torch_status
    OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(_torch_status EQUAL 0)
  list(GET _torch_answer 0 TorchStable_VERSION)
  list(GET _torch_answer 1 TorchStable_INCLUDE_DIR)
  list(GET _torch_answer 2 TorchStable_LIBRARY_DIR)
  list(LENGTH _torch_answer _torch_fields)
  set(TorchStable_CUDA_VERSION "")
  if(_torch_fields GREATER 3)
    list(GET _torch_answer 3 TorchStable_CUDA_VERSION)
  endif()
else()
  message(FATAL_ERROR "fastlm needs torch 2.11 or newer in this environment and found none; "
                      "install it first (pip install torch), then repeat the command.")
endif()
if(TorchStable_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "fastlm needs torch 2.11 or newer, found ${TorchStable_VERSION}; "
                      "upgrade it first (pip install --upgrade torch), then repeat the command.")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable
  REQUIRED_VARS TorchStable_INCLUDE_DIR TorchStable_LIBRARY_DIR VERSION_VAR TorchStable_VERSION)

if(TorchStable_FOUND AND NOT TARGET Torch::stable)
  add_library(Torch::stable INTERFACE IMPORTED)
  target_include_directories(Torch::stable SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  # 2.11: the oldest torch that may load the library.
  target_compile_definitions(Torch::stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
  # Linked, though nothing needs it at link time: torch opens its libraries locally, so the loader must see the dependency.
  target_link_libraries(Torch::stable INTERFACE
    "-Wl,--no-as-needed" "${TorchStable_LIBRARY_DIR}/libtorch_cpu.so" "-Wl,--as-needed")
endif()
