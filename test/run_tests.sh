#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own.
# bash test/run_tests.sh [--line 1.5|1.8|current] [--slow] [pytest arguments]      --slow: those that take minutes, too
set -euo pipefail
cd "$(dirname "$0")/.."
. test/venv.sh
line=current
which=(-m "not slow")
while [ $# -gt 0 ]; do
    case "$1" in
        --line) line=${2:?error: --line needs one of 1.5, 1.8, current}; shift 2 ;;
        --line=*) line=${1#*=}; shift ;;
        --slow) which=(); shift ;;
        *) break ;;
    esac
done
make_venv ".venv-test-$line" "$line" test/unit/requirements.txt
exec ".venv-test-$line/bin/python" -m pytest ${which[@]+"${which[@]}"} "$@"
