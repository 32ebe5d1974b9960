#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own.
# bash test/run_tests.sh [--line LINE|all] [--slow | --share] [pytest arguments]
#   --line   a version line of evo_vit/lines.py, the current one if not given; on the others without the tests that no line can change
#   --slow   also those that take minutes
#   --share  the default ones and the few slow ones that every change has to pass
set -euo pipefail
cd "$(dirname "$0")/.."
. test/venv.sh
line=current which=default
while [ $# -gt 0 ]; do
    case "$1" in
        --line) line=${2:?error: --line needs the name of a line, or all}; shift 2 ;;
        --line=*) line=${1#*=}; shift ;;
        --slow) which=slow; shift ;;
        --share) which=share; shift ;;
        *) break ;;
    esac
done
if [ "$line" = all ]; then
    failed=""
    trap 'exit 130' INT  # pytest takes the signal for itself
    for one in $("${PYTHON:-python3}" evo_vit/lines.py); do
        echo "== line $one"
        bash test/run_tests.sh --line "$one" $([ "$which" = default ] || echo "--$which") "$@" || failed+=" $one"
    done
    if [ -n "$failed" ]; then
        echo "error: tests failed on the lines$failed" >&2
        exit 1
    fi
    exit
fi
# The pages are opened in a real browser. Root on Debian gets it installed, others are told.
install_chromium() {
    if command -v chromedriver >/dev/null; then
        return
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "== Chromium and its driver, for the tests of the pages (once)"
        apt-get update -qq >/dev/null 2>&1 || true
        if DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null 2>&1; then
            return
        fi
    fi
    echo "note: there is no Chromium with its driver, so the tests of the pages are skipped" \
        "(Debian: apt-get install chromium chromium-driver)"
}
once=""
if [ "$line" = current ]; then
    install_chromium
else
    once=" and not once"
fi
make_venv ".venv-test-$line" "$line" test/unit/requirements.txt
case "$which" in
    default) marks=(-m "not slow$once") ;;
    share) marks=(-m "(not slow or share)$once") ;;
    slow) marks=(-m "(slow or not slow)$once") ;;
esac
# As many tests at a time as there are cores, up to four, each with one thread. OpenMP's threads sleep while they wait: where
# those of two processes spin, they slow one another down many times over.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
marks+=(-n $((cores < 4 ? cores : 4)) --dist worksteal)
exec ".venv-test-$line/bin/python" -m pytest ${marks[@]+"${marks[@]}"} "$@"
