#!/usr/bin/env bash
# Starts `cogvideo train` under DeepSpeed's launcher; the other scripts choose the config and call this.
#
#   CONFIG=FILE [MACHINE=8x80gb] [HOSTFILE=FILE] [PROCESSES=N] scripts/launch.sh [key=value ...] [--resume]
#
# MACHINE    the name of a file in configs/deepspeed, without .yaml, or a path
# HOSTFILE   for several machines: a file with a line `host slots=8` for each. All machines need the repository, the
#            data and the run folder at the same paths, and passwordless ssh. The first one is the master.
# PROCESSES  the number of processes on a single machine; by default one per GPU
# NODE_RANK, MASTER_ADDR   set these if something else (SLURM) starts this script on every machine of HOSTFILE; it then
#            uses no ssh
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${CONFIG:-}" ]; then
    echo "$0: CONFIG is not set; give a training config, for example configs/train/paper_stage1.yaml" >&2
    exit 2
fi
machine=${MACHINE:-8x80gb}
[ -f "$machine" ] || machine=configs/deepspeed/$machine.yaml
if [ ! -f "$machine" ]; then
    echo "$0: no machine $machine; choose one of $(cd configs/deepspeed && echo *.yaml)" >&2
    exit 2
fi
where=()
[ -n "${HOSTFILE:-}" ] && where+=(--hostfile "$HOSTFILE")
[ -n "${PROCESSES:-}" ] && where+=(--num_accelerators "$PROCESSES")
[ -n "${NODE_RANK:-}" ] && where+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
[ -n "${MASTER_PORT:-}" ] && where+=(--master_port "$MASTER_PORT")

# SIGTERM, SIGHUP and Ctrl-C are passed on to the training processes, which save and stop. DeepSpeed's own command would
# exit at once and leave them running, so it runs in a process group of its own. Over ssh there are none in the group,
# which then gets the signal itself: DeepSpeed's command ends those of all machines, after 30 seconds by force.
set -m
deepspeed ${where[@]+"${where[@]}"} --module cogvideo train --config "$CONFIG" --config "$machine" "$@" &
group=$!
requested= stopped= tries=0
trap 'requested=1 stopped=129' HUP
trap 'requested=1 stopped=130' INT
trap 'requested=1 stopped=143' TERM
while true; do
    code=0
    wait "$group" || code=$?
    kill -0 "$group" 2>/dev/null || exit "${stopped:-$code}" # if it still runs, a signal interrupted the wait
    # retry until the processes exist, but not for ever
    while [ -n "$requested" ] && kill -0 "$group" 2>/dev/null; do
        if pkill -TERM -g "$group" -f -- "-m cogvideo "; then
            requested= tries=0
        elif { [ -n "${HOSTFILE:-}" ] && [ -z "${NODE_RANK:-}" ]; } || [ $((tries += 1)) -gt 30 ]; then
            kill -TERM -- "-$group" 2>/dev/null || true
            requested= tries=0
        else
            sleep 1
        fi
    done
done
