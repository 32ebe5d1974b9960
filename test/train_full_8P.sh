#!/usr/bin/env bash
# 8 cards, accuracy: the published Ascend setting, EvoLeViT_256_384 at 384 pixels, 128 images a card, 100 epochs.
# bash test/train_full_8P.sh --data_path=DIR      (the other arguments stand in test/launch.sh)
kind=acc nproc=8 nnodes=1 epochs=100
extra=()
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
