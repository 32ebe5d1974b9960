#!/usr/bin/env bash
# 1 card, speed: an epoch of at most 1,000 updates, images/s without the first 5.
# bash test/train_performance_1P.sh --data_path=DIR      (the other arguments stand in test/launch.sh)
kind=perf nproc=1 nnodes=1 epochs=1
extra=(--max-steps 1000)
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
