# Sourced by quickstart.sh and run_tests.sh: make_venv DIR REQUIREMENTS... makes or updates a virtual environment.

# The interpreter: PYTHON if set, else python3.11, else python3.
find_python() {
    local python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=$(command -v python3.11 || command -v python3 || true)
    fi
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "error: Python 3.10 to 3.13 is needed and '${python:-python3}' is not one; set PYTHON=/path/to/python3.11" >&2
        exit 2
    fi
    echo "$python"
}

make_venv() {
    local dir=$1
    shift
    local want
    want=$(cat "$@")
    if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$want" ]; then
        return
    fi
    local python
    python=$(find_python)
    echo "== virtual environment in $dir (once; PyTorch is a large download)"
    [ -x "$dir/bin/python" ] || "$python" -m venv "$dir"
    local files=()
    for file in "$@"; do files+=(-r "$file"); done
    "$dir/bin/python" -m pip install --quiet "${files[@]}"
    echo "$want" > "$dir/.installed"
}
