#!/usr/bin/env bash
# Train on all devices of this machine: launch/local.sh train.py experiment=quickstart …
# One rank a GPU, for as many of them as divide the batch, or one on all CPU cores without a GPU; RANKS=N overrides.
# RESTARTS=N restarts the ranks up to N times when one of them dies; they resume from the newest checkpoint.
set -euo pipefail
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
if [[ -z ${RANKS:-} && $gpus -gt 1 && $(basename "$1") == train.py ]]; then
    ranks=$("$python" -m launch.ranks "$gpus" "${@:2}")
fi
if ((gpus == 0)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
fi
# torch 2.13: else restarted ranks find old values in the store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trap '' USR1 # torchrun would die of it; ranks save and stop
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" --max-restarts="${RESTARTS:-0}" "$@"
