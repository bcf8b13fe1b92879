# Sourced by train.sh and test.sh. `prepare_environment EXTRAS` enters the repository, makes sure that the environment
# holds the project with these extras (scripts/lib/bootstrap.py does the work) and sets VENV_PYTHON.
# Written for bash 3.2 and later, because macOS has no newer one.

THERIA_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# probe_python INTERPRETER: 0 it will do; 3 older than 3.11; 4 newer than the tests cover; 5 no venv; other: does not run
probe_python() {
    "$1" - <<'PYTHON' 2>/dev/null
import sys
if sys.version_info < (3, 11):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(5)
sys.exit(4 if sys.version_info >= (3, 13) else 0)
PYTHON
}

fail() {
    printf 'theria: %s\n' "$@" >&2
    exit 1
}

# find_python: prints the interpreter to build the environment with; 3.11 and 3.12 come before newer ones
find_python() {
    local candidate status newer="" without_venv="" old=""
    if [ -n "${THERIA_PYTHON:-}" ]; then
        status=0
        probe_python "$THERIA_PYTHON" || status=$?
        case $status in
            0 | 4) echo "$THERIA_PYTHON" && return ;;
            3) fail "THERIA_PYTHON=$THERIA_PYTHON is older than Python 3.11." ;;
            5) fail "THERIA_PYTHON=$THERIA_PYTHON has no venv module." ;;
            *) fail "THERIA_PYTHON=$THERIA_PYTHON does not run." ;;
        esac
    fi
    for candidate in python3 python3.12 python3.11 python python3.13 python3.14; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        status=0
        probe_python "$candidate" || status=$?
        case $status in
            0) echo "$candidate" && return ;;
            3) old=$candidate ;;
            4) newer=${newer:-$candidate} ;;
            5) without_venv=${without_venv:-$candidate} ;;
        esac
    done
    if [ -n "$newer" ]; then
        echo "theria: no Python 3.11 or 3.12 here; using $newer, which the tests do not cover" >&2
        echo "$newer" && return
    fi
    if [ -n "$without_venv" ]; then
        fail "$without_venv is here, but without its venv module." \
            "Install it (Debian, Ubuntu: apt install python3-venv), or name another interpreter: THERIA_PYTHON=/path/to/python3.11"
    fi
    fail "Python 3.11 or 3.12 is needed${old:+; $old is older}. Looked for python3, python3.11, python3.12 and python on PATH." \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12)," \
        "or name one that is elsewhere: THERIA_PYTHON=/path/to/python3.11 bash scripts/train.sh"
}

prepare_environment() {
    local python
    python=$(find_python)
    THERIA_VENV=${THERIA_VENV:-$THERIA_ROOT/.venv}
    case $THERIA_VENV in /*) ;; *) THERIA_VENV=$PWD/$THERIA_VENV ;; esac
    cd "$THERIA_ROOT"
    "$python" scripts/lib/bootstrap.py --venv "$THERIA_VENV" --extras "$1"
    VENV_PYTHON="$THERIA_VENV/bin/python"
}
