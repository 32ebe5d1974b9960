#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own: bash test/run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. test/venv.sh
make_venv .venv-test requirements.txt test/unit/requirements.txt
exec .venv-test/bin/python -m pytest "$@"
