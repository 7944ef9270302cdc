#!/usr/bin/env bash
# Everything that waits for a GPU, in under 10 minutes, with the machine's own python3 and no installs:
#   bash benchmarks/gpu.sh [OUT]
# OUT (default results/gpu) gets one file per benchmark; hardware.txt names the machine. With DATA (a text file), it trains the lab
# models instead, one after the other, for SECONDS_EACH each; a model that is not finished goes on in the next call:
#   DATA=books-train.txt.xz VALID="books-valid.txt wikitext2-valid.txt" CONFIGS=books-llama bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
python=${PYTHON:-python3}

if [ -n "${DATA:-}" ]; then
  for config in ${CONFIGS:-books-llama books-qwen3 books-neox books-bloom}; do
    # shellcheck disable=SC2086 # VALID is a list
    $python lab/pretrain.py --config "$config" --data "$DATA" --valid ${VALID:-} --max-seconds "${SECONDS_EACH:-120}" | tail -2
  done
  exit
fi

out=${1:-results/gpu}
layers=${LAYERS:-8}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || echo "no GPU"
  $python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"; } | tee "$out/hardware.txt"

$python -m pytest -q tests/gpu tests/contracts/test_runtime.py tests/unit/test_quantize.py 2>&1 | tee "$out/tests.txt" | tail -3

$python -m kvfold.cli compare kvfold/models/books-6l --preset gqa --preset svd_w --preset svd_a:width.latent=group \
  --preset svd_a --preset int4:kv_budget=null --preset auto --kv-budget 1/2 --kv-budget 1/6 --num-samples 64 --seq-len 256 --out "$scratch/compare" | tail -1 > "$out/compare.json"

# The MLKV paper's nine configurations at Pythia-160M's shape: bytes, largest batch, tokens/s.
$python benchmarks/mlkv_table.py --batch "${BATCH:-32}" --memory "${MEMORY:-8}" --dtype float16 --markdown "$out/mlkv-table.md" \
  | tail -1 > "$out/mlkv-table.json"

# A decode step of Llama-2-7B's shape (random weights, as many layers as LAYERS), where the cache outweighs the weights.
$python benchmarks/fold_llama2_7b.py --folder "$scratch" --layers "$layers" --preset svd_w --keep | tail -1 | tee "$out/fold.json"
$python benchmarks/fold_llama2_7b.py --folder "$scratch" --layers "$layers" --preset gqa --keep | tail -1 > /dev/null
for preset in identity int8 int4 fp8; do
  $python benchmarks/fold_llama2_7b.py --folder "$scratch" --layers "$layers" --preset $preset --kv-budget 1 --keep | tail -1 > /dev/null
done
for context in ${CONTEXTS:-2048 8192}; do
  $python benchmarks/decode_step.py "$scratch/llama2-7b-$layers-layers" "$scratch"/folded-{svd_w,gqa,identity,int8,int4,fp8} \
    --dtype bfloat16 --batch "${BATCH:-32}" --context "$context" --markdown "$out/decode-step-$context.md"
done
