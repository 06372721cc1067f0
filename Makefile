# `make demo` and `make test` need nothing but python3 >= 3.11 (and a C++ compiler, where there is one).
# Each sets up .venv by itself; a second run skips what is done. Which build of PyTorch comes, CPU or CUDA, is up to pip's
# own settings (for the CPU build: PIP_EXTRA_INDEX_URL, see pytorch.org).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard src/steno/kernels/csrc/*)
SANITIZED := build/sanitized
# two processes, whose threads would be in each other's way; a file's tests stay together, as they share what is slow to make
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# true where the compiler is gcc and has its runtimes of the sanitizers
HAS_SANITIZERS = (for name in asan ubsan; do test -e "$$($(CXX) -print-file-name=lib$$name.so 2>/dev/null)" || exit 1; done)

RESULTS := benchmarks/results
FIGURES := docs/figures

.PHONY: demo test test-native test-vllm slow lint model bench-speed bench-codec peers peers-bench results results-rows clean

demo: model
	@$(BIN)/steno ask "Which statement is used for conditional execution?" \
		--recipe "shorthand @ 43%" --max-new-tokens 48

test: lint model $(VENV)/.browser
	$(PYTEST)
	@if $(HAS_SANITIZERS); then $(MAKE) test-native; else echo "no gcc with its sanitizers: test-native is left out"; fi

# the native kernels under gcc's sanitizers, which must be loaded first; python itself frees little at its end. What they
# report goes to the terminal, as they end the process before pytest shows what it caught
test-native: $(SANITIZED)/.built
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	LD_PRELOAD="$$(ldd $(SANITIZED)/steno/kernels/_native*.so | awk '/lib(asan|ubsan)/ {print $$3}' | xargs)" \
		$(BIN)/python -m pytest -n 2 --capture=sys tests/kernels tests/codec/test_rans.py -k "not triton" \
		--sanitized-library $(abspath $(SANITIZED))/steno/kernels

# vLLM's CPU build in an environment of its own (over 2 GB), and in it what `import steno` needs beside
test-vllm: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/peers/install.py vllm
	.peers/vllm/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gguf
	$(BIN)/python -m pytest -m vllm tests/integrations

# with examples drawn anew, where the everyday suite has the same each time
slow: model
	$(BIN)/python -m pytest -m slow --hypothesis-profile explore
	$(PYTEST) --hypothesis-profile explore

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks examples setup.py
	$(BIN)/ruff format --check src tests benchmarks examples setup.py
	$(BIN)/mypy

model: $(VENV)/.installed
	@$(BIN)/python -c "import steno; steno.load()"

# hours on two cores; decode goes on where it was interrupted; peers only where `make peers` was run before
bench-speed: model $(VENV)/.installed-bench
	$(BIN)/python benchmarks/kernels.py --json $(RESULTS)/kernels-cpu.jsonl
	$(BIN)/python benchmarks/decode.py --json $(RESULTS)/decode-cpu.jsonl --resume
	$(BIN)/python benchmarks/prefill.py --json $(RESULTS)/prefill-cpu.jsonl
	$(BIN)/python benchmarks/prefill.py --json $(RESULTS)/prefill-cpu.jsonl --draw $(FIGURES)/prefill.svg
	if test -d .peers; then $(BIN)/python benchmarks/peers.py --json $(RESULTS)/peers-cpu.jsonl; fi
	$(BIN)/python benchmarks/report.py

# other projects, each in its own environment under .peers (over 5 GB); some: make peers PEERS="kvpress transformers"; docs/peers.md
peers: $(VENV)/.installed
	$(BIN)/python benchmarks/peers/install.py $(PEERS)

# minutes on two cores; LMCache only where `make peers PEERS=lmcache` was run before
bench-codec: model $(VENV)/.installed-dev
	$(BIN)/python benchmarks/codec.py --json $(RESULTS)/codec.jsonl

peers-bench: model
	$(BIN)/python benchmarks/peers.py --json benchmarks/results/peers-cpu.jsonl

# docs/results.md and its figures, and what docs/methods.md says was measured, from the rows of the repository
results: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/results_page.py
	$(BIN)/python benchmarks/methods_page.py

# these rows, hours on two cores; goes on where it was interrupted; peers only where `make peers` was run before
results-rows: model
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results_rows.py

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steno needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e .
	touch $@

# not after .installed, as each compiles the native kernels
$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $(VENV)/.installed $@

# the report is tested in a real browser; where none is there and none can be installed, that test is skipped and says so
$(VENV)/.browser: $(VENV)/.installed-dev
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| { [ "$$(id -u)" = 0 ] && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium: the browser test of the report will be skipped"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt matplotlib altair vl-convert-python
	touch $@

$(SANITIZED)/.built: $(VENV)/.installed-dev setup.py $(NATIVE)
	@$(HAS_SANITIZERS) || { echo "this needs gcc with its sanitizers (libasan, libubsan)"; exit 1; }
	CC=$(CXX) CXX=$(CXX) $(BIN)/python setup.py -q build_ext --sanitize --force \
		--build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info src/steno/kernels/_native*.so
