#!/bin/sh
# The operator tests under the address and undefined-behaviour sanitizers. Usage: sanitize.sh BIN [pytest arguments]
# LEVELS ("default;avx2") names the CPU levels to compile; otherwise all that this machine runs are. The tests run on the highest one,
# and those named test_every_level on the others. Only libfastlm_ops is instrumented; Python and torch are not, so the runtime is
# preloaded and leaks are not looked for. The first finding ends the process that ran into it.
set -eu
bin=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build/sanitize"
levels=${LEVELS:-$("$bin/python" -c 'import fastlm; print(*fastlm._C.supported_cpu_capabilities(), sep=";")')}
"$bin/cmake" -S "$root" -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" \
  "-DFASTLM_SANITIZE=address;undefined" "-DFASTLM_CPU_LEVELS=$levels" -DFASTLM_CUDA=OFF
"$bin/cmake" --build "$build" --parallel "${JOBS:-2}"
preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
# Fresh memory is full of NaN, also what a kernel takes as working memory.
# --capture=sys: a report is written by the process that it ends, so pytest must leave the file descriptor alone.
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=64:max_malloc_fill_size=268435456:malloc_fill_byte=255 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$root/python" FASTLM_LIBRARY_DIR="$build" FASTLM_CPU_CAPABILITY= \
  "$bin/python" -m pytest -q -p no:cacheprovider --capture=sys -n "${JOBS:-2}" "$root/tests/ops" \
  -k "not compile and not opcheck" "$@"
