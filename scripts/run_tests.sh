#!/usr/bin/env bash
# Make the environment and run the tests. `--all` adds the slow ones; further arguments go to pytest.
# Tests of pages (--html) open them in chromium (`apt-get install chromium`) and are skipped where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
simulators=(requirements-sim.txt requirements-gym.txt requirements-aloha.txt)
# LIBERO is 1.7 GB on disk, so its tests are among the slow ones.
if [[ " $* " = *" --all "* ]]; then simulators+=(requirements-libero.txt); fi
make_environment requirements.txt requirements-convert.txt "${simulators[@]}" requirements-dev.txt
export ALL_SIMULATORS=1 # a simulator's tests fail where its packages are missing, instead of being skipped
# openpi's client asks for numpy 1 but runs on 2, trackio for Pillow 12 but runs on 13, and vla-eval for more than its
# client uses: taken alone, since what they need is installed already.
"$PYTHON" -c 'import openpi_client, trackio, vla_eval' 2>/dev/null ||
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps openpi-client==0.1.2 trackio==0.43.0 \
        vla-eval==0.8.0
require_offscreen_rendering

# One thread per process: threads that spin while they wait make small models slower, not faster.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
# Saved checkpoints are flushed to the disk, and chromium keeps its profile and its shared memory in TMPDIR; in memory, where
# there is room, that takes no time.
if [ -w /dev/shm ] && [ "$(df --output=avail -m /dev/shm | tail -1)" -gt 4096 ]; then
    export PYTEST_DEBUG_TEMPROOT=/dev/shm TMPDIR=/dev/shm
fi
arguments=()
selection=(-m "not slow")
for argument in "$@"; do
    if [ "$argument" = --all ]; then selection=(); else arguments+=("$argument"); fi
done
# The whole suite runs in two processes, a file each: most tests wait for processes that they start.
if [ ${#arguments[@]} -eq 0 ]; then arguments=(-n 2 --dist loadfile); fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
exec "$PYTHON" -m pytest "${selection[@]}" "${arguments[@]}"
