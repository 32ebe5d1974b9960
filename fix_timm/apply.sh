#!/usr/bin/env bash
# Puts mixup.py and optim_factory.py of this folder over those of an installed timm 0.4.12, by diff and patch.
# bash fix_timm/apply.sh [timm_path]      timm_path: .../site-packages/timm; found by itself where it is not given
set -euo pipefail
timm_path=${1:-}
case "$timm_path" in "" | /*) ;; *) timm_path=$PWD/$timm_path ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
fail() {
    echo "error: $1" >&2
    exit 2
}
if [ -z "$timm_path" ]; then
    timm_path=$("$python" -c 'import importlib.util as u; print(u.find_spec("timm").submodule_search_locations[0])' 2>/dev/null) ||
        fail "$python has no timm; install timm==0.4.12, or name its folder: bash fix_timm/apply.sh .../site-packages/timm"
fi
timm_path=${timm_path%/}
[ -f "$timm_path/version.py" ] || fail "$timm_path is no timm package: it has no version.py"
version=$(sed -n "s/^__version__ *= *['\"]\(.*\)['\"]/\1/p" "$timm_path/version.py")
[ "$version" = 0.4.12 ] || fail "$timm_path is timm $version and these files replace those of timm 0.4.12; main.py needs no patch"
command -v patch >/dev/null || fail "the program patch is not installed; install it with your system's package manager"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in data/mixup.py optim/optim_factory.py; do
    name=$(basename "$pair")
    if cmp -s "$timm_path/$pair" "fix_timm/$name"; then
        echo "$timm_path/$pair: already in place"
        continue
    fi
    diff -uN "$timm_path/$pair" "fix_timm/$name" > "$work/$name.patch" || [ $? -eq 1 ]
    patch --quiet -p0 "$timm_path/$pair" "$work/$name.patch"
    echo "$timm_path/$pair: replaced"
done
