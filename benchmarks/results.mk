# Measurements on lab models and in published geometries, each into a file of results/.

.PHONY: results results-frontier results-auto results-lab results-multi-head results-mla results-bits results-width \
  results-one-side results-ablation results-autoencoder results-on-read results-mla-export results-stock results-depth \
  results-mlkv results-healing results-real-healing results-7b results-7b-layer results-speed results-vllm \
  results-recall results-measured results-long

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

# A decode step of two layers of Llama's shapes at a quarter and an eighth: latents that queries meet as they lie, and keys rebuilt on
# read, from one latent per layer and from one per four heads (of Llama-3-8B per two, of eight), on a quiet machine
BY_GROUP = small:kv_budget=$(1),width.latent=group,width.group_size=$(2)
ON_READ = auto:kv_budget=$(1),prefer=speed auto:kv_budget=$(1) $(call BY_GROUP,$(1),$(2)) small:kv_budget=$(1)
results-on-read: $(VENV)/installed
	$(BIN)/kvfold bench $(SHAPE) --steps 4 $(addprefix --preset ,fast:kv_budget=0.25 $(call ON_READ,0.25,4) $(call ON_READ,0.125,4)) \
	  --markdown results/decode-step-on-read.md
	$(BIN)/kvfold bench $(subst llama2-7b,llama3-8b,$(SHAPE)) --steps 4 $(addprefix --preset ,$(call ON_READ,0.25,2) $(call ON_READ,0.125,2)) \
	  --markdown results/decode-step-on-read-llama3-8b.md

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

# Whether a folded model still finds what stands far back: make results-recall MODEL=folder FOLDED=folder [LENGTHS=512,2048]
FOLDED ?= $(error give FOLDED=FOLDER, which kvfold wrote)
LENGTHS ?= auto
results-recall: $(VENV)/installed
	mkdir -p runs
	$(BIN)/kvfold evaluate $(FOLDED) --against $(MODEL) --recall $(LENGTHS) > runs/recall.txt
	tail -n 1 runs/recall.txt > results/recall-$(notdir $(FOLDED)).json

# Bytes shared out by expected nats, by measured damage and equally: make results-measured MODEL=... VALID=... SHIFTED=... CALIBRATION=...
APART := width.method=fisher,width.rope=on_read,$(PLAIN)
results-measured: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) --preset auto:$(APART) --preset auto:$(APART),allocate=measured --preset auto:$(APART),allocate=uniform \
	  --kv-budget 1/4 --kv-budget 1/8 --kv-budget 1/16 --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) \
	  --eval-data $(SHIFTED) --max-tokens 8192 --out runs/measured-$(notdir $(MODEL))
	cp runs/measured-$(notdir $(MODEL))/table.md results/measured-$(notdir $(MODEL)).md

# Loss by position in a long text: make results-long MODEL=folder FOLDED=folder VALID=text [LONG="--seq-len 4096 --windows 4"]
LONG ?= --seq-len 8192 --windows 1
results-long: $(VENV)/installed
	$(BIN)/python benchmarks/long_context.py $(FOLDED) --against $(MODEL) --data $(VALID) $(LONG) \
	  --markdown results/long-context-$(notdir $(FOLDED)).md --plot results/long-context-$(notdir $(FOLDED)).svg
