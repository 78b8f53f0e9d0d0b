#!/usr/bin/env bash
# Train on several GPUs of one or more machines.
# Usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] tools/dist_train.sh CONFIG GPUS [options of train.py]
set -euo pipefail

if (($# < 2)); then
  sed -n '2,3s/^# //p' "$0"
  exit 2
fi
config=$1 gpus=$2
tools=$(dirname "${BASH_SOURCE[0]}")

# Standard output is left to the tool.
python "$tools/misc/check_devices.py" "${0##*/}" "$gpus" >&2

exec python -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$gpus" \
  "$tools/train.py" "$config" --launcher pytorch "${@:3}"
