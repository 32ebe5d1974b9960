# Sourced by the launchers: the Ascend toolkit's environment, on a machine that has the toolkit; nothing elsewhere.
# What is set already stays. How long HCCL waits follows --dist-timeout (runtime/machine/processes.py).
# "PTA" below is the vendor's "Ascend Extension for PyTorch 7.1.0, environment variables".

# set_if_unset NAME VALUE
set_if_unset() {
    if [ -z "${!1:-}" ]; then
        export "$1=$2"
    fi
}

for toolkit in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/nnae "$HOME/Ascend/ascend-toolkit"; do
    for set_env in "$toolkit/set_env.sh" "$toolkit/../set_env.sh"; do
        if [ -n "$toolkit" ] && [ -f "$set_env" ]; then
            set +u  # the vendor's file reads variables that may not be set
            . "$set_env"
            set -u
            set_if_unset ASCEND_SLOG_PRINT_TO_STDOUT 0  # device logs go to files (CANN 8.5, environment variables)
            set_if_unset ASCEND_GLOBAL_LOG_LEVEL 3      # errors only (the same)
            set_if_unset ASCEND_GLOBAL_EVENT_ENABLE 0   # no event logs (the same)
            set_if_unset HCCL_WHITELIST_DISABLE 1       # cards of one server need no white list (the same)
            # Overflow gives inf, by which the loss scale adapts: A2 and A3 cards' default. Atlas training cards (910A)
            # saturate whatever this says (CANN 8.0, INF_NAN_MODE_ENABLE).
            set_if_unset INF_NAN_MODE_ENABLE 1
            # (the lines 1.5 and 1.8 run on a Python whose library does not know versions)
            case "$("${PYTHON:-python3}" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null)" in
                1.*|"")
                    set_if_unset TASK_QUEUE_ENABLE 1 ;;  # operators are queued while the host goes on
                *)
                    # Two queues, for training whose host is the bottleneck, at some device memory (MindStudio 8.3.0,
                    # "Pipeline Optimization"; PTA, TASK_QUEUE_ENABLE).
                    set_if_unset TASK_QUEUE_ENABLE 2
                    # Threads that launch operators get cores of their own, loader processes the others: the vendor's
                    # recommendation where cores are bound at all (PTA, CPU_AFFINITY_CONF; since 6.0.0).
                    set_if_unset CPU_AFFINITY_CONF 2
                    # Less fragmentation; needs driver 23.0 (CANN 8.0, PYTORCH_NPU_ALLOC_CONF).
                    set_if_unset PYTORCH_NPU_ALLOC_CONF expandable_segments:True ;;
            esac
            break 2
        fi
    done
done
