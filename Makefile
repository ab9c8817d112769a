# `make book` and `make test` set everything up by themselves. `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3))
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
# Two processes with two threads each crawl on two cores; one thread each does not.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

say = @printf '\n\033[1m== %s\033[0m\n' $(1)

.PHONY: help
help: ## List what make can do.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(call say,"installing into .venv (a few minutes; 3 GB)")
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv .venv
	set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[notebooks,book,test,edge]' \
	  | grep --line-buffered -E '^(Collecting|Installing|Successfully|ERROR)' | cut -c1-100
	@touch $(READY)

.PHONY: book
book: $(READY) weights-if-possible ## Render the book to .build/html, from the executed notebooks.
	$(call say,"rendering the book")
	$(BIN)/python -m sphinx -W --keep-going -b html -d .build/doctrees book .build/html
	@echo "open .build/html/index.html"

PRINT := $(BIN)/python -m sphinx -W --keep-going -t print -d .build/print/doctrees

.PHONY: pdf
pdf: $(READY) ## Print the book to .build/decoders-taken-apart.pdf. Needs Chromium or Chrome.
	@$(BIN)/python book/print.py
	$(call say,"putting all pages on one")
	$(PRINT) -b singlehtml book .build/print/html
	$(call say,"printing it; this takes a minute or two")
	$(BIN)/python book/print.py .build/print/html/index.html .build/decoders-taken-apart.pdf

.PHONY: epub
epub: $(READY) ## Write the book for e-readers to .build/decoders-taken-apart.epub.
	$(call say,"writing the book for e-readers")
	rm -rf .build/print/epub
	$(PRINT) -b epub book .build/print/epub
	mv .build/print/epub/decoders-taken-apart.epub .build/

# Without reordering, the slow files begin early: those of the browser and the classroom.
.PHONY: test
test: $(READY) ## Run all tests, with every notebook run again and compared.
	+$(MAKE) --no-print-directory -j $(WORKERS) lint book
	$(call say,"testing the package and the book")
	BUILT_BOOK=$(CURDIR)/.build/html $(BIN)/python -m pytest tests -n $(WORKERS) \
	  --dist loadfile --no-loadscope-reorder
	$(call say,"running every notebook again and comparing its outputs")
	set -e; chapters=$$($(BIN)/python notebooks/execute.py --runnable); test -n "$$chapters"; \
	ANNOTATED_SRC_PROGRESS=$(CURDIR)/.build/progress.json \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --nbval --nbval-current-env $$chapters

.PHONY: lint
lint: $(READY) ## Check style (ruff) and types (pyright).
	$(call say,"checking style and types")
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.PHONY: notebooks
notebooks: $(READY) weights-if-possible ## Run the notebooks that changed, and write their outputs.
	$(call say,"running the chapters that changed")
	$(BIN)/python notebooks/execute.py

.PHONY: lab
lab: $(READY) ## Open the notebooks in JupyterLab.
	$(BIN)/jupyter lab notebooks

.PHONY: weights
weights: $(READY) ## Fetch and convert the real model, and print its folder.
	@$(BIN)/python -m annotated_src.weights

.PHONY: weights-if-possible
weights-if-possible: $(READY)
	$(call say,"the real model")
	@$(BIN)/python -m annotated_src.weights \
	  || $(BIN)/python notebooks/execute.py --runnable > /dev/null

SEED ?= 1
.PHONY: exercises
exercises: $(READY) ## Write notebooks for a class, and a course for nbgrader, to .build/exercises.
	$(call say,"writing the exercises of all chapters")
	$(BIN)/python -m annotated_src.classroom --seed $(SEED)

.PHONY: equality
equality: $(READY) ## Write the book's table of equality with the original ChatGLM-6B.
	WRITE_EQUALITY=1 $(BIN)/python -m pytest tests/test_golden.py -q

.PHONY: kills
kills: $(READY) ## Write the book's page of which mistakes the exercises catch.
	$(BIN)/python tests/exercises/kills.py

.PHONY: bench
bench: $(READY) weights-if-possible ## Measure speed beside transformers, llama.cpp and a device's runtime.
	$(call say,"measuring for some twenty minutes; the machine should do nothing else")
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[bench]' \
	  || echo "no llama.cpp to compare with: xllamacpp could not be installed"
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench --edge

.PHONY: clean
clean: ## Remove .venv and everything built. The real model in its cache folder stays.
	rm -rf .venv .build *.egg-info .pytest_cache .ruff_cache
