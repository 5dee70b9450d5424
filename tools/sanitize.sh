#!/bin/sh
# The operator tests under the address and undefined-behaviour sanitizers. Usage: sanitize.sh BIN [pytest arguments]
# Only libfastlm_ops is instrumented; Python and torch are not, so the runtime is preloaded and leaks are not looked for.
set -eu
bin=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build/sanitize"
"$bin/cmake" -S "$root" -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  "-DFASTLM_SANITIZE=address;undefined" "-DFASTLM_CPU_LEVELS=default;avx2" -DFASTLM_CUDA=OFF
"$bin/cmake" --build "$build"
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$root/python" FASTLM_LIBRARY_DIR="$build" \
  "$bin/python" -m pytest -q -p no:cacheprovider "$root/tests/ops" -k "not compile and not opcheck" "$@"
