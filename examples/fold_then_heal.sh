#!/usr/bin/env bash
# Fold on one machine, then train the folded model back towards the original with several processes (one per GPU).
#
# bash examples/fold_then_heal.sh MODEL TEXT HELD_OUT OUT [PROCESSES] [further options of kvfold heal]; HELD_OUT: text that is not
# trained on
set -euo pipefail
model=$1 text=$2 held_out=$3 out=$4 processes=${5:-2}

kvfold compress "$model" --kv-budget 1/8 --data "$text" --out "$out.folded"
# copy $out.folded, the original and the text to the machine with the GPUs; on several machines add torchrun's --nnodes
torchrun --nproc-per-node "$processes" -m kvfold heal "$out.folded" --teacher "$model" --data "$text" --out "$out" \
  --eval-data "$held_out" "${@:6}"
kvfold evaluate "$out" --against "$model" --data "$held_out"
