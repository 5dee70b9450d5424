#!/bin/sh
# The AVX-512 levels, emulated (SIMDe, package libsimde-dev), against the reference. Usage: emulate.sh BIN [pytest arguments]
# The level `default` runs the process, so that the tests of the other levels mean the two emulated ones.
set -eu
bin=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build="$root/build/emulate"
if ! [ -f /usr/include/simde/x86/avx512.h ]; then
  echo "SIMDe is not installed (Debian: apt-get install libsimde-dev); the AVX-512 levels were not emulated"
  exit 0
fi
"$bin/cmake" -S "$root" -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$bin/python" \
  -Dpybind11_DIR="$("$bin/python" -m pybind11 --cmakedir)" -DFASTLM_EMULATE_AVX512=ON -DFASTLM_CUDA=OFF \
  "-DFASTLM_CPU_LEVELS=default;avx512;avx512_bf16"
"$bin/cmake" --build "$build" --parallel "${JOBS:-2}"
PYTHONPATH="$root/python" FASTLM_LIBRARY_DIR="$build" FASTLM_CPU_CAPABILITY=default \
  "$bin/python" -m pytest -q -p no:cacheprovider -n "${JOBS:-2}" "$root/tests/ops" -k "level" "$@"
