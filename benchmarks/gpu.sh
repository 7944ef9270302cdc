#!/usr/bin/env bash
# Everything that waits for a GPU, in under 10 minutes, with the machine's own python3 and no installs:
#   bash benchmarks/gpu.sh [OUT]
# OUT (default results/gpu) gets one file per benchmark; hardware.txt names the machine. With DATA (a text file), it trains the lab
# models instead, one after the other, for SECONDS_EACH each; a model that is not finished goes on in the next call:
#   DATA=books-train.txt.xz VALID="books-valid.txt wikitext2-valid.txt" CONFIGS=books-llama bash benchmarks/gpu.sh
set -uo pipefail
failed=0
trap 'failed=1; echo "failed: $BASH_COMMAND" >&2' ERR  # what fails does not take the rest with it
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
layers=${LAYERS:-4}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || echo "no GPU"
  $python -c "import torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"; } | tee "$out/hardware.txt"

workers=$($python -c "import xdist; print('-n 12')" 2> /dev/null || true)
# shellcheck disable=SC2086 # an option and its value, or nothing
$python -m pytest -q $workers tests/gpu tests/contracts/test_runtime.py tests/unit/test_quantize.py tests/unit/test_triton_kernels.py 2>&1 \
  | tee "$out/tests.txt" | tail -3
$python benchmarks/packed_kernels.py --markdown "$out/packed-kernels.md"

bench() { # NAME, then options
  name=$1; shift
  $python -m kvfold bench --layers "$layers" --batch "${BATCH:-32}" "$@" --plot "$out/$name.svg" --markdown "$out/$name.md" | tee "$out/$name.txt" | tail -1 > "$out/$name.json"
}

# Grouped-query attention at long contexts: keys rebuilt on read, read as they lie, and plain bits.
for batch in 4 32; do
  for context in 8192 32768; do
    [ "$batch-$context" = 32-32768 ] || BATCH=$batch bench "llama3-8b-$batch-$context" --shape llama3-8b --context "$context" --steps 8 --prefills 0 \
      --preset auto:kv_budget=0.125 --preset auto:kv_budget=0.125,prefer=speed --preset int4:kv_budget=null
  done
done

# Speed tables of arXiv 2406.07056 at 2,048 cached tokens: random weights of the published geometries, LAYERS of their layers.
for context in ${CONTEXTS:-2048 8192}; do
  bench "llama2-7b-$context" --shape llama2-7b --context "$context" --kv-heads 16 --kv-heads 8 --preset int8 --preset int4 --preset fp8 \
    --preset auto:kv_budget=0.25,prefer=speed --preset auto:kv_budget=0.25
done
# Packed numbers by torch's operations, beside Triton's kernels above.
KVFOLD_NATIVE=0 bench llama2-7b-2048-torch --shape llama2-7b --context 2048 --preset int8 --preset int4 --preset auto:kv_budget=0.25,prefer=speed
bench llama2-13b-2048 --shape llama2-13b --context 2048 --kv-heads 20 --kv-heads 10
# The nine configurations of arXiv 2406.09297, all of Pythia-160M's layers.
bench mlkv-pythia-160m --shape pythia-160m --layers 12 --dtype float16 --memory "${MEMORY:-8GB}" --context 2048 \
  $(printf -- '--preset %s ' MHA-144 GQA-48 MLKV-48 MQA-12 MLKV-12 MLKV-6 MLKV-4 MLKV-2 MLKV-1)
bench bloomz-7b1-2048 --shape bloomz-7b1 --context 2048 --kv-heads 16 --kv-heads 8 --kv-heads 4

# The same in vLLM, where it is installed.
if $python -c "import vllm" 2> /dev/null; then
  BATCH=32 bench llama3-8b-vllm --shape llama3-8b --engine vllm --context 8k --steps 64 --rounds 1 --memory 2GB \
    --preset auto:kv_budget=0.125 --preset auto:kv_budget=0.125,prefer=speed --preset int4:kv_budget=null
fi

$python -m kvfold compare kvfold/demo_model/books-6l --preset gqa --preset svd_w --preset svd_a:width.latent=group \
  --preset svd_a --preset int4:kv_budget=null --preset auto --kv-budget 1/2 --kv-budget 1/6 --num-samples 64 --seq-len 256 --out "$scratch/compare" | tail -1 > "$out/compare.json"

# Folding Llama-2-7B's shape: time and memory.
$python benchmarks/fold_llama2_7b.py --folder "$scratch" --layers "$layers" --preset svd_w | tail -1 | tee "$out/fold.json"

# Recovery training, with the packaged model's own text: does it run, and how fast.
$python -m kvfold compress kvfold/demo_model/books-6l --preset gqa --kv-heads 3 --out "$scratch/gqa" | tail -1 > /dev/null
cat README.md docs/*.md > "$scratch/text.txt"
$python -m kvfold heal "$scratch/gqa" --teacher kvfold/demo_model/books-6l --data "$scratch/text.txt" --seq-len 256 --max-tokens 32768 \
  --set bf16=true --out "$scratch/healed" | tail -1 | tee "$out/heal.json"
exit $failed
