#!/usr/bin/env bash
# Stage 1 at the paper's size. Always pass --resume: it resumes the run, or starts it. Variables: see launch.sh.
#
#   scripts/pretrain_stage1.sh --resume
#   HOSTFILE=hosts MACHINE=13x8x80gb scripts/pretrain_stage1.sh --resume
#   MACHINE=1x24gb scripts/pretrain_stage1.sh --resume train.batch_size=16
CONFIG=${CONFIG:-configs/train/paper_stage1.yaml} exec "$(dirname "$0")/launch.sh" "$@"
