# Sourced by the launchers: the Ascend toolkit's environment, on a machine that has the toolkit; nothing elsewhere.
for toolkit in "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/nnae "$HOME/Ascend/ascend-toolkit"; do
    for set_env in "$toolkit/set_env.sh" "$toolkit/../set_env.sh"; do
        if [ -n "$toolkit" ] && [ -f "$set_env" ]; then
            set +u  # the vendor's file reads variables that may not be set
            . "$set_env"
            set -u
            export ASCEND_SLOG_PRINT_TO_STDOUT=0   # device logs go to files
            export ASCEND_GLOBAL_LOG_LEVEL=3       # errors only
            export ASCEND_GLOBAL_EVENT_ENABLE=0
            export TASK_QUEUE_ENABLE=1             # operators are queued while the host goes on
            export HCCL_WHITELIST_DISABLE=1        # cards of one server need no white list
            break 2
        fi
    done
done
