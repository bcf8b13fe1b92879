#!/usr/bin/env bash
# On a machine with a GPU, no network needed: `bash scripts/gpu_check.sh OUTDIR`. The tests that use the GPU, then the
# benchmark beside the peers; bench.json, tests.xml and both logs in OUTDIR, a short table last. Nothing is installed:
# it runs with python3 (THERIA_PYTHON names another one) and the packages that it has.
# THERIA_TEST_WORKERS: test processes (8). THERIA_BENCH_MINUTES: after these no row is begun (5).
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: bash scripts/gpu_check.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${THERIA_PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

if ! command -v "$python" >/dev/null; then
    echo "gpu_check: $python is missing: put Python 3.11 or 3.12 on PATH, or name one in THERIA_PYTHON" >&2
    exit 1
fi
"$python" - <<'PYTHON' || exit 1
import importlib.util
import sys

found = {name: importlib.util.find_spec(name) is not None for name in ("torch", "triton", "pytest", "xdist", "hypothesis")}
missing = [name for name in ("torch", "triton", "pytest", "hypothesis") if not found[name]]
if missing:
    sys.exit(f"gpu_check: {sys.executable} lacks {', '.join(missing)}")
import torch
import triton

if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device")
print(f"gpu_check: {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
if not found["xdist"]:
    print("gpu_check: pytest-xdist is missing: the tests run in one process")
if importlib.util.find_spec("jvp_flash_attention") is None:
    print("gpu_check: jvp_flash_attention is missing: its rows stay empty (pip install jvp_flash_attention)")
PYTHON

failed=""
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n "${THERIA_TEST_WORKERS:-8}" --dist worksteal)
fi
echo "== tests (all of it in $out/tests.log)"
# -v: what failed is in the log also when the run is cut off. test_compile.py needs no GPU. pytest-benchmark, where it is
# installed, warns about xdist, and warnings are errors.
"$python" -m pytest -v -p no:cacheprovider -p no:benchmark "${workers[@]}" --junit-xml "$out/tests.xml" \
    --ignore tests/ops/triton/test_compile.py \
    tests/ops tests/test_attention_boundary_*.py tests/meta/test_capture.py tests/meta/test_products.py \
    >"$out/tests.log" 2>&1 || failed="$failed tests"
grep -E "^(FAILED|ERROR) |^=.*(passed|failed|error)|^[0-9]+ (passed|failed)" "$out/tests.log" | tail -40

echo "== benchmark (each row in $out/bench.log as it is made)"
"$python" scripts/bench.py --gpu --out "$out" --minutes "${THERIA_BENCH_MINUTES:-5}" \
    2>"$out/bench.log" || { failed="$failed benchmark"; tail -5 "$out/bench.log"; }

if [ -n "$failed" ]; then
    echo "gpu_check: failed:$failed" >&2
    exit 1
fi
