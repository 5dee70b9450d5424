#!/bin/sh
# The CUDA operators on the emulated device (csrc/core/cuda/emulation) under the address and undefined-behaviour sanitizers: what the
# tests of the operators ask of the CPU twins, asked of the sources of the CUDA twins. Usage: emulate_cuda.sh BIN [pytest arguments]
# sm_90a for everything, sm_80 for what has other kernels there; threads run in another order for either. Needs the headers of the CUDA
# toolkit; no GPU, nothing of its speed.
# SANITIZE=address compiles and runs in two thirds of the time.
set -eu
bin=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build/emulate-cuda"
"$bin/cmake" -S "$root" -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" -DFASTLM_EMULATE_CUDA=ON -DFASTLM_CUDA=OFF \
  "-DFASTLM_SANITIZE=${SANITIZE:-address;undefined}" "-DFASTLM_CPU_LEVELS=default" \
  "-DFASTLM_OPS=causal_conv1d;selective_scan;sliding_window_attention;scan_swa;samba_decode_step;grin_route;moe_dispatch;slm_loss"
"$bin/cmake" --build "$build" --parallel "${JOBS:-2}"
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
tests() {
  folder=$1
  shift
  for name in "$@"; do
    for file in "$root/tests/$folder/test_$name"*.py; do echo "$file"; done
  done
}
# What has kernels of its own on sm_90a, and what has not. Of products of matrices, whose tiles are large whatever the size, a few.
some="$(tests cuda attention_tiles scan_forms) $(tests ops sliding_window scan_swa)"
all="$(tests cuda device_values) $(tests ops causal_conv1d selective_scan selective_state samba_decode select_tokens grin_route)"
products="$(tests ops grouped_gemm moe_experts moe_dispatch linear_nll)"
few="past_a_tile_bfloat16 or everything or transposed_bfloat16 or softcap_entropy or rows_behind or past_a_tile-"
left_out="not compile and not opcheck and not large_call and not every_level and not threads"
run() {
  FASTLM_EMULATED_ARCH=$1 FASTLM_EMULATED_SCHEDULE=$2
  export FASTLM_EMULATED_ARCH FASTLM_EMULATED_SCHEDULE
  shift 2
  LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64:max_malloc_fill_size=268435456:malloc_fill_byte=255 \
    UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$root/python" FASTLM_LIBRARY_DIR="$build" FASTLM_CPU_CAPABILITY= \
    "$bin/python" -m pytest -q -p no:cacheprovider --capture=sys -n "${JOBS:-2}" --dist worksteal \
    -k "$left_out" "$@"
}
# The tests' paths hold no spaces but the checkout's own.
run 90 2 $all $some "$@"
run 80 1 $some "$@"
run 90 0 $products "$@" -k "($few) and $left_out and not gradcheck"
run 80 1 $products "$@" -k "($few) and $left_out and not gradcheck"
# Devices whose blocks have 99 KB of shared memory: what needs more must go another way.
small="$(tests cuda scan_forms) $(tests ops sliding_window_attention scan_swa causal_conv1d select_tokens samba_decode grin_route)"
run 86 0 $small "$@" -k "(one_launch or test_matches_reference or past_a_tile) and $left_out"
