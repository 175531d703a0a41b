# Sourced by the other scripts: one virtual environment, made once and brought up to date when requirements change.
#   make_environment requirements.txt requirements-sim.txt ...     then use "$PYTHON"
# VENV names another folder than .venv; PYTHON_BIN another interpreter than python3.11 or python3.

make_environment() {
    local venv="${VENV:-.venv}" base="${PYTHON_BIN:-}"
    if [ -z "$base" ]; then
        base=$(command -v python3.11 || command -v python3) || {
            echo "error: no python3.11 on the PATH; install it, or set PYTHON_BIN" >&2
            return 1
        }
    fi
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $base is $("$base" --version); Python 3.11 or newer is needed: set PYTHON_BIN" >&2
        return 1
    }
    PYTHON="$venv/bin/python"
    local stamp="$venv/.requirements" wanted
    [ -x "$PYTHON" ] || "$base" -m venv "$venv"
    wanted=$(cat "$stamp" 2>/dev/null || true)
    local file missing=()
    for file in "$@"; do
        case "$wanted" in
        *"$(cksum "$file")"*) ;;
        *) missing+=("$file") ;;
        esac
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    echo "installing ${missing[*]} into $venv"
    local arguments=()
    for file in "$@"; do arguments+=(-r "$file"); done
    # torch alone first: named exactly, it is taken from wherever pip is set up to find it.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
    { printf '%s\n' "$wanted"; for file in "$@"; do cksum "$file"; done; } >"$stamp"
}

# Off-screen rendering: a GPU renders through EGL; without one MuJoCo needs OSMesa.
require_offscreen_rendering() {
    if [ -n "${MUJOCO_GL:-}" ] || command -v nvidia-smi >/dev/null 2>&1; then return 0; fi
    if "$PYTHON" -c 'import ctypes.util, sys; sys.exit(ctypes.util.find_library("OSMesa") is None)'; then return 0; fi
    local install="apt-get install -y libosmesa6"
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" -eq 0 ]; then
        echo "installing libosmesa6 for off-screen rendering"
        (apt-get update && $install) >/dev/null || {
            echo "error: '$install' failed; run it by hand, then start again" >&2
            return 1
        }
    elif command -v apt-get >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        (sudo -n apt-get update && sudo -n $install) >/dev/null
    else
        echo "error: MuJoCo can't render off-screen: no GPU and no OSMesa. Run: sudo apt-get update && sudo $install" >&2
        return 1
    fi
}
