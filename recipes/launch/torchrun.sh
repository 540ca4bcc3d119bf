#!/usr/bin/env bash
# Train on several machines. The same line on each of them, with a place of OUTPUT and corpus that all can read:
#
#   HEAD=first-machine NODES=2 GPUS=8 recipes/launch/torchrun.sh recipes/qwen3-paper.yaml sharding=fsdp2
#
# A machine that dies may come back with the same line: the others wait for it, and the run goes on from its last
# save. HEAD itself must stay, since it holds the rendezvous.
set -euo pipefail

# With the store that torchrun shares, a machine that comes back never learns where the others are (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
    --rdzv-id "${RUN:-orthrus}" \
    --max-restarts "${RESTARTS:-10}" \
    -m orthrus.cli.app train "$@"
