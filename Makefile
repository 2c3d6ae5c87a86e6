# make demo: the whole recipe on the embedded world. make test: the fast tests. Both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 1
WORKERS ?= 2
# JAX on CPU gives memory back to the kernel after every step and takes it again; keep the pages.
KEEP_PAGES := GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1

.PHONY: demo test test-all soak lint clean

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	$(KEEP_PAGES) $(BIN)/instructax run --config configs/demo.py --seeds $(SEEDS)

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not soak"

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not soak"

soak: $(VENV)/installed
	$(BIN)/python -m pytest -m soak

lint: $(VENV)/installed
	$(BIN)/ruff check src tests configs setup.py
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache
