# make demo       the default recipe, its control and its report
# make check      format, lint, types and the fast tests: a minute, while editing
# make test       the tests
# make miniature  the default recipe over five seeds: runs/miniature/report.md
# make paper      the paper's figures in miniature: runs/paper/report.md
# make variants   SPIN next to its variants in miniature: runs/variants/report.md (an hour)
# make gsm8k      one iteration on real text (needs data/gsm8k, see configs/gsm8k.toml)
# make smollm2    a real model of 135M parameters (see configs/smollm2-135m.toml; docs/smollm2.md)
# make base       remake the miniature's base model

PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/torchrun --standalone
# The miniature's steps are too small to be shared by threads.
TINY := OMP_NUM_THREADS=1 $(RUN)

.PHONY: demo check test miniature paper variants gsm8k smollm2 base clean

demo: .venv/runtime
	$(TINY) train.py --iter 0-3
	@echo "The control: continued SFT on the same data, for the same steps"
	$(TINY) train.py --iter 0-3 --run.dir=runs/tiny/control --model.base=runs/tiny/base/model --train.objective=sft
	$(TINY) evaluate.py --iter base,0-3

check: .venv/dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow" tests

test: .venv/dev
	$(BIN)/python -m pytest tests

miniature: .venv/runtime
	$(BIN)/python -m miniature.paper --figures 2 --seeds 5 --out runs/miniature

paper: .venv/runtime
	$(BIN)/python -m miniature.paper --seeds 4 --out runs/paper

variants: .venv/runtime
	$(BIN)/python -m miniature.variants --seeds 5 --out runs/variants

gsm8k: .venv/dev data/mistral/tokenizer.model
	$(RUN) train.py --config configs/gsm8k.toml --iter 0

SMOLLM2 := --config configs/smollm2-135m.toml --iter 0-1
smollm2: .venv/runtime
	$(BIN)/python -m benchmarks.texts --select data/gsm8k
	$(RUN) train.py $(SMOLLM2)
	$(RUN) train.py $(SMOLLM2) --run.dir=runs/smollm2/control \
	    --model.base=runs/smollm2/base/model --train.objective=sft
	$(RUN) evaluate.py $(SMOLLM2:0-1=base,0-1)
	$(BIN)/python -m benchmarks.texts --data data/gsm8k/short-heldout.jsonl --out runs/smollm2 \
	    SFT=runs/smollm2/base/evaluation \
	    "SPIN 0=runs/smollm2/iter0/evaluation" "SPIN 1=runs/smollm2/iter1/evaluation" \
	    "SFT 0=runs/smollm2/control/iter0/evaluation" "SFT 1=runs/smollm2/control/iter1/evaluation"

base: .venv/runtime
	$(BIN)/python -m miniature.world --seed 0 --out runs/tiny-base/world
	$(TINY) train.py --sft --config configs/tiny-base.toml
	mkdir -p miniature/seed0/base
	cp runs/tiny-base/world/sft.jsonl runs/tiny-base/world/heldout.jsonl miniature/seed0
	cp runs/tiny-base/base/model/* miniature/seed0/base

data/mistral/tokenizer.model: .venv/dev
	mkdir -p $(@D)
	cp "$$($(BIN)/python -c 'import mistral_common, pathlib; print(pathlib.Path(mistral_common.__file__).parent)')/data/tokenizer.model.v1" $@

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing requirements.txt (PyTorch is large: some minutes)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv runs
