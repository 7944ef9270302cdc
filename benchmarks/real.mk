# Measurements on SmolLM2-135M (make real-models), each into a file of results/.

.PHONY: results-real-frontier results-real-kivi results-real-auto results-real-ablation results-real-calibration \
  results-real-depth results-real-tasks results-real-tasks-three results-real-recall results-dropped results-scored results-dropped-speed \
  results-scored-4096 results-published-4096 results-real-context results-reading results-read-some results-real-speed \
  results-real-vllm results-real-vllm-float32 results-real results-nats

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
FOLDS := $(addprefix runs/auto-,quarter eighth sixteenth) $(addprefix runs/speed-,quarter eighth) runs/vllm-eighth
$(FOLDS): | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --kv-budget $(if $(findstring quarter,$@),1/4,$(if $(findstring eighth,$@),1/8,1/16)) $(if $(findstring speed,$@),--prefer speed) $(if $(findstring vllm,$@),--runtime vllm) \
	  --data $(CALIBRATION) --out $@ --run-dir runs/real-run
runs/int4-rotated: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset int4_rotated --out $@ --run-dir runs/real-run
results-real-tasks: runs/auto-quarter runs/auto-eighth runs/int4-rotated
	$(BIN)/python benchmarks/task_scores.py $(REAL) $^ --tasks $(TASKS) --limit 500 --markdown results/real-tasks.md
# Of three tasks, in half an hour on a core: make results-real-tasks-three THREE="lambada_openai.jsonl arc_easy.jsonl piqa.jsonl"
results-real-tasks-three: runs/auto-eighth
	$(BIN)/python benchmarks/task_scores.py $(REAL) $^ --tasks $(THREE) --limit 250 --markdown results/real-tasks-three.md
results-real-recall: runs/auto-eighth
	$(MAKE) results-recall MODEL=$(REAL) FOLDED=runs/auto-eighth LENGTHS=1024,4096

# What caches that drop tokens still know of 1,024, beside others: make results-dropped VALID=... CALIBRATION=..., in 45 minutes.
# Interrupted, these commands go on behind the last fold that was asked.
ROWS := --rows runs/rows
DROPPED := $(addprefix runs/dropped/,windows-quarter windows-eighth windows-quarter-int4 duo_attention-quarter streaming_llm-quarter int4 auto-sixteenth)
runs/dropped/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(firstword $(subst -, ,$*)) --context $(if $(findstring auto,$*),2048,1024) \
	  $(if $(findstring int4,$*),$(if $(findstring windows,$*),--set bits.method=integer --set length.kept=0.25),\
	  --kv-budget $(if $(findstring quarter,$*),1/4,$(if $(findstring eighth,$*),1/8,1/16))) \
	  --data $(CALIBRATION) --out $@ --run-dir runs/dropped-run
results-dropped: $(DROPPED)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 16 $(ROWS) \
	  --markdown results/dropped-tokens-smollm2-135m.md

# The same of caches that keep what a scorer chooses, ours and published ones: make results-scored VALID=... CALIBRATION=..., in an hour
RULES := kvzip snapkv adakv pyramidkv h2o expected_attention tova keydiff knorm
OBSERVED := observed-quarter observed-quarter-alone observed-eighth observed-quarter-int4 observed-quarter-int4-turned
SCORED := $(addprefix runs/scored/,$(OBSERVED) foreseen-quarter foreseen-quarter-whole windows-quarter $(RULES:%=%-quarter))
runs/scored/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(firstword $(subst -, ,$*)) --context 1024 --data $(CALIBRATION) --out $@ --run-dir runs/dropped-run \
	  $(if $(findstring int4,$*),--set bits.method=integer --set length.kept=0.25,--kv-budget $(if $(findstring eighth,$*),1/8,1/4)) \
	  $(if $(findstring turned,$*),--set width.method=orthogonal) $(if $(findstring windows,$*)$(findstring whole,$*),--set length.prompt=whole) \
	  $(if $(findstring alone,$*),--set length.matched=false)
results-scored: $(SCORED)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 16 $(ROWS) \
	  --markdown results/scored-tokens-smollm2-135m.md

# What choosing takes of a prompt, and what a step takes behind it, of the same folds: make results-dropped-speed CALIBRATION=..., in
# ten minutes on a quiet machine
DROPPING := $(addprefix runs/scored/,windows-quarter observed-quarter foreseen-quarter snapkv-quarter h2o-quarter)
results-dropped-speed: $(DROPPING)
	$(BIN)/kvfold bench $^ --against $(REAL) --batch 1 --context 1024 --prefills 9 --steps 8 --threads 2 --markdown results/dropped-prompts-smollm2-135m.md
	$(BIN)/kvfold bench $^ --against $(REAL) --batch 1 --context 4096 --prefills 3 --steps 8 --threads 2 --markdown results/dropped-prompts-4096-smollm2-135m.md
	$(BIN)/kvfold bench $^ --against $(REAL) --batch 4 --context 8192 --prefills 0 --steps 8 --threads 2 --markdown results/dropped-steps-smollm2-135m.md

# And of 4,096 tokens, by the same folds and by one whose shares were measured there (half an hour), in an hour and a half
runs/scored/observed-4096: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset observed --kv-budget 1/4 --context 4096 --seq-len 4096 --num-samples 4 \
	  --data $(CALIBRATION) --out $@ --run-dir runs/dropped-run
results-scored-4096: $(addprefix runs/scored/,observed-4096 observed-quarter foreseen-quarter windows-quarter)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 4096 --sequences 16 $(ROWS) \
	  --markdown results/scored-tokens-4096-smollm2-135m.md

# The same of published scorers, of half as many contexts, in an hour and kvzip, which takes longer than all others
results-published-4096: $(addprefix runs/scored/,$(RULES:%=%-quarter))
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 4096 --sequences 8 $(ROWS) \
	  --markdown results/published-tokens-4096-smollm2-135m.md

# What a thirty-second of the bytes still knows of 4,096 tokens, by the length of calibration text: make results-real-context VALID=...
# CALIBRATION=..., in an hour and a half
BY_CONTEXT := $(addprefix runs/context/,auto-1024-16 auto-2048-8 auto-4096-4 auto-4096-8)
runs/context/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --kv-budget 1/32 --context 4096 --data $(CALIBRATION) --out $@ --run-dir runs/context-run \
	  --seq-len $(word 2,$(subst -, ,$*)) --num-samples $(word 3,$(subst -, ,$*))
results-real-context: $(BY_CONTEXT)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 4096 --sequences 16 $(ROWS) \
	  --markdown results/context-4096-smollm2-135m.md

# What steps lose that read some of the stored tokens: make results-reading VALID=... CALIBRATION=..., in 40 minutes
READ := $(addprefix runs/reading/,quest-0.125 quest-0.25 lead-0.125 lead-0.25 lead-0.125-32 sampled-0.125 sampled-0.25 magicpig-0.25)
runs/reading/%: | $(VENV)/installed
	$(BIN)/kvfold compress $(REAL) --preset $(word 1,$(subst -, ,$*)) --set length.share=$(word 2,$(subst -, ,$*)) --set length.least=64 \
	  $(if $(word 3,$(subst -, ,$*)),--set length.leading=$(word 3,$(subst -, ,$*))) $(if $(findstring lead,$*)$(findstring sampled,$*),--kv-budget 1) \
	  --data $(CALIBRATION) --out $@ --run-dir runs/reading-run
results-reading: $(READ)
	$(BIN)/python benchmarks/dropped_tokens.py $(REAL) $^ --data $(VALID) --context 1024 --sequences 8 $(ROWS) --markdown results/reading-smollm2-135m.md

# A decode step of two layers of Llama-3-8B's shape that reads some of 16,384 stored tokens
LEAD := lead:length.leading=16,kv_budget=1.0
results-read-some: $(VENV)/installed
	$(BIN)/kvfold bench --shape llama3-8b --layers 2 --dtype bfloat16 $(DECODE) --batch 4 --context 16384 --steps 10 --preset $(LEAD) \
	  --preset $(LEAD),length.share=0.0625 --preset quest --markdown results/decode-step-read-some.md

# What a step takes beside the original, on a quiet machine
SPEEDS := runs/auto-quarter runs/auto-eighth runs/auto-sixteenth runs/int4-rotated
PREFERRED := runs/speed-quarter runs/speed-eighth
results-real-speed: $(SPEEDS) $(PREFERRED)
	for batch in 1 8; do \
	  $(BIN)/kvfold bench $(SPEEDS) $(PREFERRED) --against $(REAL) --context 2048 --dtype bfloat16 --batch $$batch --prefills 1 \
	    --markdown results/real-speed-batch-$$batch.md || exit 1; done

# Under vLLM (the environment of make test-vllm): tokens per second where the original's cache holds one request and a quarter, and
# steps where all fit, compiled as `vllm serve` does: make results-real-vllm CALIBRATION=..., in 35 minutes and the folds' on a quiet machine
SERVED := runs/auto-quarter runs/vllm-eighth runs/speed-eighth
BY_VLLM := $(SERVED) --against $(REAL) --engine vllm
FULL_CACHE := --batch 8 --context 256 --steps 256 --memory 16MiB --rounds 2
results-real-vllm: $(SERVED) $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/kvfold bench $(BY_VLLM) $(FULL_CACHE) --markdown results/real-vllm.md
	$(VLLM_VENV)/bin/kvfold bench $(BY_VLLM) $(FULL_CACHE) --compiled --markdown results/real-vllm-compiled.md
	for batch in 1 8; do \
	  $(VLLM_VENV)/bin/kvfold bench $(BY_VLLM) --batch $$batch --context 480 --steps 64 --memory 1GiB --compiled \
	    --markdown results/real-vllm-steps-batch-$$batch.md || exit 1; done

# The same in float32, which processors without AVX-512 serve faster than bfloat16; in eight minutes and the folds'
results-real-vllm-float32: $(SERVED) $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/kvfold bench $(BY_VLLM) $(FULL_CACHE) --rounds 1 --dtype float32 --markdown results/real-vllm-float32.md

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
