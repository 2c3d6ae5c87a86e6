# make demo: the whole recipe on the embedded world. make test: the fast tests. make bench: side by side with peers.
# All set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1
WORKERS ?= 2

.PHONY: demo test test-all soak mutants bench lint clean

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	INSTRUCTAX=$(BIN)/instructax launch/local.sh --flags cpu -- run --config configs/demo.py --seeds $(SEEDS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow and not soak"

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not soak"

soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak

# Mutation testing of losses, RL arithmetic, masking and log-probabilities: hours on one core; goes on where it was.
# Small programs are cached as well, since every mutant compiles nearly the same ones.
mutants: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[mutants]"
	JAX_PLATFORMS=cpu JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(BIN)/mutmut run
	$(BIN)/mutmut results

# Every case against the peers, in a virtual environment of their own. BENCH takes its flags, as in
# make bench BENCH="--device gpu" or BENCH="--only sft --rounds 1".
bench: $(VENV)/installed .venv-bench/installed
	$(BIN)/python -m bench --peers .venv-bench/bin/python $(BENCH)

.venv-bench/installed: bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade pip
	.venv-bench/bin/python -m pip install --quiet --requirement bench/requirements.txt
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check src tests configs launch bench setup.py
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-bench .cache mutants
