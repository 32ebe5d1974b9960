#!/usr/bin/env bash
# 16 cards, accuracy: 2 machines of 8, the published Ascend setting otherwise. Start it on both machines:
# bash test/train_full_16P.sh --data_path=DIR --master_addr=ADDRESS_OF_MACHINE_0 --node_rank=0      (1 on the other)
# One machine of 16 cards: --nnodes=1 --nproc=16 and no address.
kind=acc nproc=8 nnodes=2 epochs=100
extra=()
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
