#!/usr/bin/env bash
# Test on a slurm cluster.
# Usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=...] tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
set -euo pipefail

if (($# < 4)); then
  sed -n '2,3s/^# //p' "$0"
  exit 2
fi
partition=$1 job_name=$2 config=$3 checkpoint=$4
tools=$(dirname "${BASH_SOURCE[0]}")
read -ra srun_args <<<"${SRUN_ARGS:-}"

exec srun -p "$partition" \
  --job-name="$job_name" \
  --gres=gpu:"${GPUS_PER_NODE:-8}" \
  --ntasks="${GPUS:-8}" \
  --ntasks-per-node="${GPUS_PER_NODE:-8}" \
  --cpus-per-task="${CPUS_PER_TASK:-5}" \
  --kill-on-bad-exit=1 \
  "${srun_args[@]}" \
  python -u "$tools/test.py" "$config" "$checkpoint" --launcher slurm "${@:5}"
