#!/usr/bin/env bash
# Without arguments: ruff, pyright and every test. With arguments: `bash scripts/test.sh [pytest arguments]`, pytest alone.
# The first run makes .venv. THERIA_TORCH, THERIA_PYTHON, THERIA_VENV: see train.sh. THERIA_TEST_WORKERS: processes (2).
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
prepare_environment experiments,dev

if [ $# -gt 0 ]; then
    exec "$VENV_PYTHON" -m pytest "$@"
fi

failed=""
check() { # check NAME COMMAND...: runs the command and goes on, so that one run shows every failure
    local name=$1
    shift
    echo "== $name"
    "$@" || failed="$failed $name"
}

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one thread a process: the workers share the cores
check ruff-check "$VENV_PYTHON" -m ruff check .
check ruff-format "$VENV_PYTHON" -m ruff format --check .
check pyright "$VENV_PYTHON" -m pyright --pythonpath "$VENV_PYTHON"
check pytest "$VENV_PYTHON" -m pytest -n "${THERIA_TEST_WORKERS:-2}" --dist worksteal
if [ -n "$failed" ]; then
    echo "theria: failed:$failed" >&2
    exit 1
fi
echo "theria: all checks passed"
