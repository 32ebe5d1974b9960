# Sourced by quickstart.sh and run_tests.sh: make_venv DIR LINE [REQUIREMENTS] makes or updates the virtual environment
# of a version line (evo_vit/lines.py). On a server PyTorch comes from its vendor; here the line's own is installed.

# line_needs LINE: sets $pythons (accepted interpreters, best first), $torch and $requirements, by the table of lines.
line_needs() {
    local needs
    needs=$("${PYTHON:-python3}" evo_vit/lines.py "$1") || exit $?
    eval "$needs"
}

# is_python COMMAND VERSION: whether COMMAND runs and is that Python.
is_python() {
    "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null
}

# which_python COMMAND: what tells that Python from others; nothing where it does not run.
which_python() {
    "$1" -c 'import sys; print(sys.base_prefix, sys.version)' 2>/dev/null || true
}

# find_python LINE: the interpreter, PYTHON if that is set, else the first found on PATH or among pyenv's.
find_python() {
    local version candidate line=$1
    for version in $pythons; do
        if [ -n "${PYTHON:-}" ]; then
            set -- "$PYTHON"
        else
            set -- "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python
        fi
        for candidate; do
            if is_python "$candidate" "$version"; then
                echo "$candidate"
                return
            fi
        done
    done
    echo "error: the line $line needs Python ${pythons// / or } and ${PYTHON:-none here} is not one; set PYTHON=/path/to/python" >&2
    return 2
}

make_venv() {
    local dir=$1 line=$2 extra=${3:-} python want
    line_needs "$line"
    want="$torch $(cat "$requirements" dependencies.txt ${extra:+"$extra"})"  # what the file names, or what it refers to
    if [ -n "${PYTHON:-}" ]; then
        python=$(find_python "$line")  # ends here where it is not one, before anything is removed
        [ "$(which_python "$python")" = "$(which_python "$dir/bin/python")" ] || rm -rf "$dir"
    fi
    if [ "$(cat "$dir/.installed" 2>/dev/null)" = "$want" ]; then
        return
    fi
    python=$(find_python "$line")
    echo "== virtual environment in $dir for the line $line (once; PyTorch is a large download)"
    # an earlier attempt may have left half of it
    "$dir/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$dir"
    "$dir/bin/python" -m pip install --quiet $torch -r "$requirements" ${extra:+-r "$extra"}
    echo "$want" > "$dir/.installed"
}
