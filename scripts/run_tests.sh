#!/usr/bin/env bash
# Make the environment and run the tests. `--all` adds the slow ones; further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements.txt requirements-sim.txt requirements-dev.txt
require_offscreen_rendering

# One thread per process: threads that spin while they wait make small models slower, not faster.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
arguments=()
selection=(-m "not slow")
for argument in "$@"; do
    if [ "$argument" = --all ]; then selection=(); else arguments+=("$argument"); fi
done
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
exec "$PYTHON" -m pytest "${selection[@]}" "${arguments[@]}"
