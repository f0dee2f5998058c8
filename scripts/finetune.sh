#!/usr/bin/env bash
# Finetunes a trained or converted checkpoint on your own data. Variables: see launch.sh; CONFIG chooses the stage.
#
#   cogvideo convert --from cogvideo-stage1 --to models/stage1          # published (SAT) files -> ours
#   cogvideo prepare --config configs/data/paper.yaml ...   # your clips
#   scripts/finetune.sh models/stage1 runs/my_clips run_dir=runs/finetuned_stage1 optimiser.lr=2e-5 train.steps=2000
#
# The first argument is init.checkpoint. If it is of the same task, all weights are loaded; otherwise only the trunk,
# from which the temporal channel is initialised too (init.temporal=copy loads that channel instead: stage 2 from
# stage 1).
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT CLIPS [key=value ...] [--resume]" >&2
    exit 2
fi
checkpoint=$1 clips=$2
shift 2
CONFIG=${CONFIG:-configs/train/paper_stage1.yaml} exec "$(dirname "$0")/launch.sh" \
    init.checkpoint="$checkpoint" data.path="$clips" "$@"
