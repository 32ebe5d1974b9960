# What the four launchers share. A launcher sets `kind` (acc or perf), `nproc`, `epochs` and `extra`, then sources this file
# with its own arguments.
#
#   --data_path=DIR    the data set's top folder (required)     --output_dir=DIR   results, save/ in the repository if not given
#   --model=NAME       EvoLeViT_256_384                         --epochs=N         100 (accuracy) or 1 (performance)
#   --batch-size=N     128, for each process                    --device_id=N      first card, 0
#   --input-size=N     384                                      --nproc=N          processes; NPROC=N does the same
#   -- FLAGS           everything after -- goes to main.py as it is
# Values follow = or a space. PYTHON=... names the interpreter, python3 if it is not set.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
nproc=${NPROC:-$nproc}
network=Evo-LeViT
model=EvoLeViT_256_384 batch_size=128 input_size=384 device_id=0 data_path="" output_dir=$root/save

while [ $# -gt 0 ]; do
    case "$1" in
        --) shift; break ;;
        --*=*) name=${1%%=*} value=${1#*=}; shift ;;
        --*) name=$1; [ $# -ge 2 ] || fail "$1 has no value"; value=$2; shift 2 ;;
        *) fail "unknown argument $1; arguments are --data_path, --model, --batch-size, --input-size, --output_dir, --epochs, --device_id, --nproc, and -- before flags of main.py" ;;
    esac
    case "$name" in
        --data_path|--data-path) data_path=$value ;;
        --output_dir|--output-dir) output_dir=$value ;;
        --model) model=$value ;;
        --batch-size|--batch_size) batch_size=$value ;;
        --input-size|--input_size) input_size=$value ;;
        --epochs) epochs=$value ;;
        --device_id|--device-id) device_id=$value ;;
        --nproc) nproc=$value ;;
        *) fail "unknown argument $name; arguments are --data_path, --model, --batch-size, --input-size, --output_dir, --epochs, --device_id, --nproc, and -- before flags of main.py" ;;
    esac
done
for name in batch_size input_size epochs nproc device_id; do
    case "${!name}" in ''|*[!0-9]*) fail "--$name ${!name} is not a whole number" ;; esac
done
[ "$nproc" -ge 1 ] || fail "--nproc $nproc starts no process"
[ -n "$data_path" ] || fail "--data_path is missing: give the data set's top folder, --data_path=/data/imagenet"
[ -d "$data_path" ] || fail "--data_path: there is no folder $data_path"
data_path=$(cd "$data_path" && pwd)
case "$output_dir" in /*) ;; *) output_dir=$PWD/$output_dir ;; esac
cd "$root"
. test/env_npu.sh

# The device, in the first line; too few cards end here, before anything is moved or written.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # main.py imports torch_npu itself
flags=("$@")
device=$("$python" -m runtime.machine.devices "$nproc" "$device_id" ${flags[@]+"${flags[@]}"}) || exit $?
echo "$device"

log_dir=test/output/$device_id
log=$log_dir/train_$device_id.log
if [ -d "$log_dir" ]; then
    number=1
    while [ -e "$log_dir.previous-$number" ]; do number=$((number + 1)); done
    mv "$log_dir" "$log_dir.previous-$number"
    echo "The logs of an earlier run now lie in $log_dir.previous-$number"
fi
mkdir -p "$log_dir"
echo "Training; follow it with: tail -f $root/$log"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
fi
export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
export MASTER_PORT=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

pids=()
stop_all() {  # stop_all SECONDS: asks every process to save and stop, and ends those that have not after so long
    trap - INT TERM
    kill "${pids[@]}" 2>/dev/null || true
    for ((second = 0; second < $1; second++)); do
        alive=0
        for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && alive=1; done
        [ "$alive" -eq 1 ] || return 0
        sleep 1
    done
    kill -9 "${pids[@]}" 2>/dev/null || true
}
trap 'echo "Stopping after this update, for at most a minute" >&2; stop_all 60; tail -n 1 "$log" >&2
      echo "error: stopped by a signal; the log is $log" >&2; exit 130' INT TERM

start=$SECONDS
for ((rank = 0; rank < nproc; rank++)); do
    env $([ "$nproc" -eq 1 ] || echo "RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$nproc LOCAL_WORLD_SIZE=$nproc") \
        "$python" -u main.py --data_path "$data_path" --model "$model" --batch-size "$batch_size" \
        --input-size "$input_size" --epochs "$epochs" --output_dir "$output_dir" --device_id "$device_id" \
        ${extra[@]+"${extra[@]}"} ${flags[@]+"${flags[@]}"} >>"$log" 2>&1 </dev/null &
    pids+=($!)
done

# The first process that fails takes the others down.
code=0
for ((left = nproc; left > 0; left--)); do
    wait -n || { code=$?; break; }
done
if [ "$code" -ne 0 ]; then
    stop_all 10
    echo "error: training ended with exit code $code; the last lines of $log:" >&2
    tail -n 15 "$log" >&2
    exit "$code"
fi
"$python" test/report.py "$output_dir/summary.json" "$log_dir" "$network" "$kind" "$((SECONDS - start))"
