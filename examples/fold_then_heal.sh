#!/usr/bin/env bash
# Fold on one machine, then train the folded model back towards the original with several processes (one per GPU).
#
# bash examples/fold_then_heal.sh MODEL TEXT OUT [PROCESSES] [further options of kvfold heal]
set -euo pipefail
model=$1 text=$2 out=$3 processes=${4:-2}

kvfold compress "$model" --kv-budget 1/8 --data "$text" --out "$out.folded"
# copy $out.folded, the original and the text to the machine with the GPUs; on several machines add torchrun's --nnodes
torchrun --nproc-per-node "$processes" -m kvfold heal "$out.folded" --teacher "$model" --data "$text" --out "$out" "${@:5}"
kvfold evaluate "$out" --against "$model" --data "$text"
