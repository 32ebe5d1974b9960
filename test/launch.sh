# What the launchers share. A launcher sets `kind` (acc or perf), `nproc`, `nnodes`, `epochs` and `extra`, then sources this file
# with its own arguments.
#
#   --data_path=DIR    folder or http address of the data (required)
#   --output_dir=DIR   results, save/ in the repository if not given
#   --model=NAME       EvoLeViT_256_384                         --epochs=N         100 (accuracy) or 1 (performance)
#   --batch-size=N     128, for each process                    --device_id=N      first card, 0
#   --input-size=N     384                                      --nproc=N          processes; NPROC=N does the same
#   --nnodes=N         machines, 1 (16P: 2), of --nproc processes --node_rank=N    this machine among them, from 0 on
#   --master_addr=A    address of machine 0                     --master_port=P    a free port of machine 0, 29500
#   -- FLAGS           everything after -- goes to main.py as it is, which runs in the repository: paths are from there
# With several machines the script is started on each of them, with the same arguments but --node_rank; torchrun starts the
# processes, where PyTorch has it (1.9 on).
# Values follow = or a space. PYTHON=... names the interpreter, python3 if it is not set.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
nproc=${NPROC:-$nproc}
node_rank="" master_addr="" master_port=29500
network=Evo-LeViT
model=EvoLeViT_256_384 batch_size=128 input_size=384 device_id=0 data_path="" output_dir=$root/save

arguments="arguments are --data_path, --model, --batch-size, --input-size, --output_dir, --epochs, --device_id, --nproc, --nnodes, --node_rank, --master_addr, --master_port, and -- before flags of main.py"

while [ $# -gt 0 ]; do
    case "$1" in
        -h|--help) echo "usage: bash $0 --data_path=DIR [...]"; sed -n '5,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
        --) shift; break ;;
        --*=*) name=${1%%=*} value=${1#*=}; shift ;;
        --*) name=$1; [ $# -ge 2 ] || fail "$1 has no value"; value=$2; shift 2 ;;
        *) fail "unknown argument $1; $arguments" ;;
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
        --nnodes) nnodes=$value ;;
        --node_rank|--node-rank) node_rank=$value ;;
        --master_addr|--master-addr) master_addr=$value ;;
        --master_port|--master-port) master_port=$value ;;
        *) fail "unknown argument $name; $arguments" ;;
    esac
done
whole() {  # whole NAME...: those variables are whole numbers, or it ends here; 08 becomes 8
    for name; do
        case "${!name}" in
            '' | *[!0-9]*) fail "--$name ${!name} is not a whole number" ;;
            ??????????*) fail "--$name ${!name} is too large a number" ;;
        esac
        printf -v "$name" %d "$((10#${!name}))"
    done
}
whole batch_size input_size epochs nproc device_id nnodes master_port
if [ "$nnodes" -eq 1 ]; then node_rank=${node_rank:-0}; fi
[ -n "$node_rank" ] || fail "--node_rank is missing: with --nnodes=$nnodes give each machine its number, from 0 on"
whole node_rank
[ "$nproc" -ge 1 ] || fail "--nproc $nproc starts no process"
[ "$nnodes" -ge 1 ] || fail "--nnodes $nnodes: there is no machine to start on"
[ "$node_rank" -lt "$nnodes" ] || fail "--node_rank $node_rank: the $nnodes machines are numbered from 0 to $((nnodes - 1))"
[ "$nnodes" -eq 1 ] || [ -n "$master_addr" ] || fail "--master_addr is missing: with --nnodes=$nnodes give the address of machine 0, and --node_rank on each machine"
[ "$master_port" -ge 1 ] && [ "$master_port" -le 65535 ] || fail "--master_port $master_port is no port; they go from 1 to 65535"
[ "$nnodes" -eq 1 ] || "$python" -c 'import socket, sys; socket.getaddrinfo(sys.argv[1], None)' "$master_addr" 2>/dev/null \
    || fail "--master_addr $master_addr: this machine knows no such address"
[ -n "$data_path" ] || fail "--data_path is missing: give the data set's top folder, --data_path=/data/imagenet"
# a shell leaves the ~ of --name=~/path as it is
case "$data_path" in "~/"*) data_path=$HOME/${data_path#"~/"} ;; esac
case "$output_dir" in "~/"*) output_dir=$HOME/${output_dir#"~/"} ;; esac
case "$data_path" in
    http://* | https://*) ;;
    *) [ -d "$data_path" ] || fail "--data_path: there is no folder $data_path"
       data_path=$(cd "$data_path" && pwd) ;;
esac
case "$output_dir" in /*) ;; *) output_dir=$PWD/$output_dir ;; esac
cd "$root"
. test/env_npu.sh

"$python" -c 'import torch' 2>/dev/null || fail "$python cannot import torch; set PYTHON=... to one that can"

# The device, in the first line; too few cards end here, before anything is moved or written.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0  # main.py imports torch_npu itself
flags=("$@")
for flag in ${flags[@]+"${flags[@]}"}; do  # the figures of this run are looked for in its folder
    case "$flag" in --output_dir | --output_dir=* | --output-dir | --output-dir=*) fail "give $flag before --" ;; esac
done
device=$("$python" -m runtime.machine.devices "$nproc" "$device_id" ${flags[@]+"${flags[@]}"}) || exit $?
echo "$device"

log_dir=test/output/$device_id$([ "$node_rank" -eq 0 ] || echo "_machine_$node_rank")  # machines may share the folder
mkdir -p test/output
other=$(cat "$log_dir.lock" 2>/dev/null || true)
if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then  # on other cards by ASCEND_RT_VISIBLE_DEVICES, say
    log_dir=$log_dir.$$
    echo "Another run (process $other) logs to ${log_dir%.*}; this one's logs go to $log_dir"
fi
echo $$ > "$log_dir.lock"
trap 'rm -f "$log_dir.lock"' EXIT
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
if [ "$nnodes" -gt 1 ]; then
    export MASTER_ADDR=$master_addr MASTER_PORT=$master_port
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
trap 'echo "Stopping after this batch, for at most a minute" >&2; stop_all 60; tail -n 1 "$log" >&2
      echo "error: stopped by a signal; the log is $log" >&2; exit 130' INT TERM

start=$SECONDS
command=(main.py --data_path "$data_path" --model "$model" --batch-size "$batch_size" --input-size "$input_size"
         --epochs "$epochs" --output_dir "$output_dir" --device_id "$device_id"
         ${extra[@]+"${extra[@]}"} ${flags[@]+"${flags[@]}"})
if [ "$nnodes" -gt 1 ] && "$python" -c 'import torch.distributed.run' 2>/dev/null; then
    echo "Machine $node_rank of $nnodes; they wait for one another at $MASTER_ADDR, port $MASTER_PORT. Where one waits for long, \
another has ended with an error, --nnodes, --nproc, the address or the port differ, or two have one --node_rank"
    "$python" -u -m torch.distributed.run --nnodes "$nnodes" --node_rank "$node_rank" --nproc_per_node "$nproc" \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${command[@]}" >>"$log" 2>&1 </dev/null &
    pids=($!)
else
    size=$((nnodes * nproc))
    for ((rank = 0; rank < nproc; rank++)); do
        # also for a single one: another launcher's variables may be left over
        RANK=$((node_rank * nproc + rank)) LOCAL_RANK=$rank WORLD_SIZE=$size LOCAL_WORLD_SIZE=$nproc \
            "$python" -u "${command[@]}" >>"$log" 2>&1 </dev/null &
        pids+=($!)
    done
fi

# The first process that fails takes the others down.
code=0 waiting=("${pids[@]}")  # wait -n would do, but for bash 4.2
while [ "${#waiting[@]}" -gt 0 ]; do
    running=()
    for pid in "${waiting[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then running+=("$pid"); else wait "$pid" || { code=$?; break 2; }; fi
    done
    waiting=(${running[@]+"${running[@]}"})
    [ "${#waiting[@]}" -eq 0 ] || sleep 0.2
done
if [ "$code" -ne 0 ]; then
    stop_all 10
    # torchrun ends with 1 whatever the process ended with, and its own report hides what the process said
    said=$([ "$nnodes" -eq 1 ] || grep -E '^(process [0-9].*: )?error: ' "$log" | tail -n 1 || true)
    if [ -n "$said" ]; then
        process_code=$(sed -n 's/^ *exitcode *: *\([0-9][0-9]*\) .*/\1/p' "$log" | tail -n 1)
        code=${process_code:-$code}
        printf 'error: training ended with exit code %s; from %s:\n%s\n' "$code" "$log" "$said" >&2
    else
        echo "error: training ended with exit code $code; the last lines of $log:" >&2
        tail -n 15 "$log" >&2
    fi
    exit "$code"
fi
if [ "$node_rank" -gt 0 ]; then
    echo "Done; machine 0 prints the figures"
    exit 0
fi
for flag in ${flags[@]+"${flags[@]}"}; do
    case "$flag" in --eval | --write-teacher-labels | --write-teacher-labels=*)
        tail -n 5 "$log"  # no training, so its figures are others
        exit 0 ;;
    esac
done
if [ ! -e "$output_dir/summary.json" ]; then
    echo "Stopped before its end, as a signal asked; its state lies in $output_dir: start again with -- --resume auto"
    exit 0
fi
"$python" test/report.py "$output_dir/summary.json" "$log_dir" "$network" "$kind" "$((SECONDS - start))"
