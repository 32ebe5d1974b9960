#!/usr/bin/env bash
# 8 cards, speed: an epoch of at most 1,000 updates, images/s without the first 5.
# bash test/train_performance_8P.sh --data_path=DIR      (the other arguments stand in test/launch.sh)
kind=perf nproc=8 nnodes=1 epochs=1
extra=(--max-steps 1000)
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
