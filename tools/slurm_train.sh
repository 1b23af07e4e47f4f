#!/usr/bin/env bash
# Trains a config on Slurm with one process per GPU.
#
#   GPUS           number of GPUs and processes (default: 8)
#   GPUS_PER_NODE  GPUs of a machine (default: 8, or GPUS if that is less)
#   CPUS_PER_TASK  cores of a process (default: 5)
#   SRUN_ARGS      more options of srun, in one string
#   PORT           port on the first machine (default: MASTER_PORT, or 29500)
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]" >&2
    exit 2
fi
partition=$1 job=$2 config=$3 work_dir=$4
shift 4
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
if [ -n "${PORT:-}" ]; then export MASTER_PORT=$PORT; fi
# shellcheck disable=SC2086  # SRUN_ARGS are several words
exec srun --partition="$partition" --job-name="$job" \
    --gres="gpu:$per_node" --ntasks="$gpus" --ntasks-per-node="$per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$config" --work-dir="$work_dir" --launcher=slurm "$@"
