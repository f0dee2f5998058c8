#!/usr/bin/env bash
# Stage 2 at the paper's size. Always pass --resume: it resumes the run, or starts it. Variables: see launch.sh.
#
#   scripts/pretrain_stage2.sh --resume
#   HOSTFILE=hosts MACHINE=13x8x80gb scripts/pretrain_stage2.sh --resume
#   MACHINE=1x24gb scripts/pretrain_stage2.sh --resume train.batch_size=16
CONFIG=${CONFIG:-configs/train/paper_stage2.yaml} exec "$(dirname "$0")/launch.sh" "$@"
