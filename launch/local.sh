#!/usr/bin/env bash
# Train on all devices of this machine: launch/local.sh train.py experiment=quickstart …
# One rank a GPU, or two CPU ranks where there is none; RANKS=N overrides.
set -euo pipefail
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
if ((gpus == 0)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + ranks - 1) / ranks))}
fi
exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$ranks" "$@"
