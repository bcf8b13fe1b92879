#!/usr/bin/env bash
# Trains: `bash scripts/train.sh [hydra overrides]`. The first run makes .venv; later ones start in seconds.
# THERIA_TORCH=cpu|cuda chooses the build of torch, THERIA_PYTHON the interpreter, THERIA_VENV another place than .venv.
set -euo pipefail
. "$(dirname "$0")/lib/environment.sh"
prepare_environment experiments
exec "$VENV_PYTHON" -m experiments.train "$@"
