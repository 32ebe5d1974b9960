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
if [ "$line" = current ]; then
    install_chromium
fi
make_venv ".venv-test-$line" "$line" test/unit/requirements.txt
exec ".venv-test-$line/bin/python" -m pytest ${which[@]+"${which[@]}"} "$@"
