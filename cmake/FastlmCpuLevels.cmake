# CPU levels: the same kernel sources compiled several times, each with its own instruction set and namespace.
# FASTLM_BUILT_LEVELS is the list that is compiled; definitions FASTLM_HAVE_* tell the code which those are.
include(CheckCXXCompilerFlag)

set(fastlm_flags_default "")
set(fastlm_flags_avx2 -mavx2 -mfma -mf16c)
set(fastlm_flags_avx512 -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
# GCC 12 warns about its own AVX-512 intrinsics.
list(APPEND fastlm_flags_avx512 -Wno-maybe-uninitialized -Wno-uninitialized)
set(fastlm_flags_avx512_bf16 ${fastlm_flags_avx512} -mavx512bf16)
if(FASTLM_EMULATE_AVX512)
  # AVX2 code in which AVX-512 is spelled out (core/simd/emulate_avx512.h); any machine with AVX2 then runs these levels.
  find_path(FASTLM_SIMDE_DIR simde/x86/avx512.h REQUIRED)
  target_include_directories(fastlm_settings SYSTEM INTERFACE "${FASTLM_SIMDE_DIR}")
  target_compile_definitions(fastlm_settings INTERFACE FASTLM_EMULATED_LEVELS)
  set(fastlm_flags_avx512 ${fastlm_flags_avx2} -O1 -Wno-maybe-uninitialized -DFASTLM_EMULATE_AVX512=1)
  set(fastlm_flags_avx512_bf16 ${fastlm_flags_avx2} -O1 -Wno-maybe-uninitialized -DFASTLM_EMULATE_AVX512=2)
endif()

if("avx512_bf16" IN_LIST FASTLM_CPU_LEVELS AND NOT "avx512" IN_LIST FASTLM_CPU_LEVELS)
  list(APPEND FASTLM_CPU_LEVELS avx512) # families without a bf16 dot product use those kernels
endif()
set(FASTLM_BUILT_LEVELS default)
foreach(level avx2 avx512 avx512_bf16)
  string(TOUPPER ${level} upper)
  set(have 0)
  if(level IN_LIST FASTLM_CPU_LEVELS AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    string(REPLACE ";" " " flags "${fastlm_flags_${level}}")
    check_cxx_compiler_flag("${flags}" FASTLM_COMPILER_HAS_${upper})
    if(FASTLM_COMPILER_HAS_${upper})
      list(APPEND FASTLM_BUILT_LEVELS ${level})
      set(have 1)
    endif()
  endif()
  target_compile_definitions(fastlm_settings INTERFACE FASTLM_HAVE_${upper}=${have})
endforeach()
message(STATUS "fastlm: CPU levels ${FASTLM_BUILT_LEVELS}")

# The object library `<prefix>_<level>` of the sources in ARGN.
function(fastlm_add_cpu_level prefix level)
  set(target ${prefix}_${level})
  set(name ${level})
  if(level STREQUAL "default")
    set(name default_) # `default` is a C++ keyword
  endif()
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE fastlm_settings)
  target_compile_definitions(${target} PRIVATE FASTLM_CPU_LEVEL=${name})
  # -ffp-contract=off: a multiply-add is fused where the code says fma() and nowhere else, so results do not depend on how
  # the compiler happened to arrange a loop.
  target_compile_options(${target} PRIVATE
    -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti ${fastlm_flags_${level}})
endfunction()
