# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv with the pinned torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An unpinned torch pulls several GB of CUDA libraries.
TORCH := torch==2.13.0
OUT ?= out
OPTIMUM := .venv-optimum
LLAMA := $(OUT)/llama
LLAMA_SOURCE := llama-cpp-python==0.3.36
# Two tests at a time where there are two cores; a process of tests takes about 1 GB.
PARALLEL ?= -n logical --maxprocesses 4 --dist worksteal
SECONDS ?= 60

# Options of tests/needs.py: --install has Debian's packages installed, as root.
NEEDS ?=

.PHONY: demo wheels test test-full test-needs test-oldest audit lint docs docs-cli docs-chat docs-report fuzz android-tools android-test android-preview android-page android-arm64 apk format clean setup benchmarks benchmarks-summaries benchmarks-healing benchmarks-speed benchmarks-cost llama-bench

setup: $(VENV)/.ready $(VENV)/.kernels

# The operator library, in runtime/flrc_runtime: the installation builds it (with ziglang where there is no compiler), and
# this again what changed since.
KERNELS := $(shell find runtime/kernels -name '*.[ch]') runtime/kernels/build.py
$(VENV)/.kernels: $(KERNELS) $(VENV)/.ready
	$(BIN)/python runtime/kernels/build.py
	touch $@

$(VENV)/.ready: pyproject.toml hatch_build.py
	$(PYTHON) -c 'import sys; sys.exit("flrc-edge needs Python 3.11 or newer") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/flrc-edge demo -o $(OUT)/demo --overwrite

# A wheel for every platform, in out/wheels, each looked at; those of Linux are run, arm64's under qemu where it is there.
ZIGLANG := ziglang==0.17.1
wheels: setup
	$(BIN)/python -m pip install -q $(ZIGLANG)
	$(BIN)/python runtime/kernels/wheels.py $(OUT)/wheels

# In a random order, whose seed is printed first: PYTEST_ADDOPTS=--randomly-seed=SEED make test repeats it.
test: test-needs
	$(BIN)/python -m pytest -m 'not full' $(PARALLEL)

# What tests need beyond Python's packages, as far as it is to be had; says what cannot be run without.
test-needs: setup
	$(BIN)/python tests/needs.py $(NEEDS)

test-full: test-needs $(OPTIMUM)/.ready
	$(BIN)/flrc-edge pull smollm2-135m
	$(BIN)/flrc-edge pull gemma-3-270m
	$(BIN)/flrc-edge pull qwen2.5-coder-0.5b
	FLRC_EDGE_OPTIMUM=$(OPTIMUM)/bin/python $(BIN)/python -m pytest

# The environment that export --graph optimum runs optimum-onnx in: it needs transformers 4, flrc-edge has 5.
$(OPTIMUM)/.ready:
	test -x $(OPTIMUM)/bin/python || $(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install -q $(TORCH)
	$(OPTIMUM)/bin/python -m pip install -q 'optimum-onnx>=0.1' onnxruntime
	touch $@

# The fast tests on the oldest versions that pyproject.toml names (torch as ever): an environment of its own.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m 'not full'

$(OLDEST)/.ready: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q uv $(TORCH)
	$(OLDEST)/bin/uv pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct -e '.[all]' $(TORCH)
	$(OLDEST)/bin/uv pip freeze -q --python $(OLDEST)/bin/python --exclude-editable > $(OLDEST)/versions.txt
	$(OLDEST)/bin/uv pip install -q --python $(OLDEST)/bin/python -c $(OLDEST)/versions.txt \
		pytest hypothesis openai pyyaml pexpect pyte rich hatchling
	touch $@

# Known vulnerabilities of what is installed; asks the package index.
audit: setup
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --skip-editable

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, in out/site; a broken link or a name that is not there is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# Writes the page of all commands' help anew; a test compares it.
docs-cli: setup
	$(BIN)/python -m flrc_edge.cli.help_pages > docs/cli.md

# Draws the picture of a chat anew: the demo's bundle, asked in a real terminal.
docs-chat: setup
	test -d $(OUT)/demo/bundle || $(MAKE) demo
	$(BIN)/python docs/record_chat.py $(OUT)/demo/bundle

# Makes a measured report of a model in three stages and looks at it in headless Chromium ($CHROMIUM or on the PATH).
docs-report: setup
	test -d node_modules/axe-core || npm install --no-save --ignore-scripts --no-audit --no-fund playwright-core axe-core
	test -d $(OUT)/report-lr || $(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/report-lr --stages .95,.9,.85 --boundaries 24,64 --storage pivoted --dtype int8 --tokens 16384
	test -d $(OUT)/report-onnx || $(BIN)/flrc-edge export $(OUT)/report-lr -o $(OUT)/report-onnx
	$(BIN)/flrc-edge report $(OUT)/report-onnx -o $(OUT)/report-onnx.html --measure --dense smollm2-135m
	$(BIN)/flrc-edge report $(OUT)/report-lr -o $(OUT)/report-lr.html
	node docs/check_report.mjs $(OUT)/report-lr.html $(OUT)
	node docs/check_report.mjs $(OUT)/report-onnx.html $(OUT)
	cp $(OUT)/report-desktop-light.png $(OUT)/report-narrow-dark.png docs/images

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the Android demo's engine runs on: onnxruntime's Java API and libraries, pinned by SHA-256, in the user's cache.
android-tools: setup
	$(BIN)/python android_demo/tools/fetch_tools.py

# The app's page in a browser, with the engine behind it.
android-preview: android-tools
	$(BIN)/python android_demo/tools/preview.py $(BUNDLE)

# The page in headless Chromium ($CHROMIUM or on the PATH) at 360 and 412 px, light and dark; writes its screenshots.
android-page: android-tools
	test -d node_modules/axe-core || npm install --no-save --ignore-scripts --no-audit --no-fund playwright-core axe-core
	node android_demo/tools/check_page.mjs $(BIN)/python $(BUNDLE) $(OUT)

# The app, signed with a debug key that is made in the user's cache (or with --key of build_apk.py).
apk: setup
	$(BIN)/python android_demo/tools/build_apk.py $(OUT)/flrc-edge.apk

# A bundle on the arm64 library that is inside the APK, under qemu, beside this machine's.
android-arm64: android-tools
	$(BIN)/python android_demo/tools/arm64_check.py $(BUNDLE)

# Fuzzes every reader of what a stranger may have written, SECONDS each; what is found is in out/fuzz.
fuzz: setup
	$(BIN)/python -m pip install -q -e '.[fuzz]'
	for target in $$($(BIN)/python -c 'from tests.fuzz.targets import TARGETS; print(*TARGETS)'); do \
	  $(BIN)/python -m tests.fuzz.fuzz $$target $(SECONDS) || exit 1; done

# With APK=file, on the classes that are in an APK, turned back from dex, instead of the sources'.
android-test: android-tools
	FLRC_EDGE_APK=$(APK) $(BIN)/python -m pytest tests/android

# Measures every figure of docs/benchmarks.md again, in about eight hours on two cores; nothing else may run meanwhile.
# Statistics are cached by what they are measured on, so an interrupted run goes on where it was.
MIXTURE := --calibration wikitext2:.4 --calibration austen:.3 --calibration chat:.3
SAVE := --save docs/benchmarks.json
COMPARE := $(BIN)/flrc-edge compare
benchmarks: setup
	$(BIN)/flrc-edge pull smollm2-135m
	$(BIN)/flrc-edge pull qwen2.5-coder-0.5b
	$(COMPARE) smollm2-135m --keep .9,.8,.7,.6 --recipe svd-llm --recipe flra-gw2 --recipe flra-gw2-two-sided --recipe spectrum-one-sided --recipe measured-two-sided --storage both --windows 8 --tokens 73728 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --keep .9,.8,.7,.6 --recipe svd-llm --recipe flra-gw2 --recipe measured-two-sided --storage both --windows 8 --tokens 73728 --calibration wikitext2:.35 --calibration austen:.45 --calibration chat:.2 $(SAVE)
	$(COMPARE) qwen2.5-coder-0.5b --keep .9,.8,.7,.6 --recipe svd-llm --recipe flra-gw2 --recipe measured-two-sided --storage both --windows 4 --tokens 40960 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --frontier --keep .8,.6 --bits 7,6,5.5,5,4.5,4,3.5,3 --storage pivoted --windows 4 --tokens 73728 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --joint --keep .9,.8,.7,.6 --tokens 73728 $(MIXTURE) $(SAVE)
	$(COMPARE) qwen2.5-coder-0.5b --joint --keep .9,.8,.7,.6 --tokens 40960 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --keep .8 --recipe svd-llm --recipe asvd --recipe flra-gw2 --recipe measured-two-sided --asvd-window 256 --windows 8 --tokens 73728 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --keep .8 --recipe svd-llm --recipe flra-gw2 --recipe measured-two-sided --recipe measured-two-sided-corrected --storage both --windows 8 --tokens 73728 $(MIXTURE) $(SAVE)
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/keep-80 --keep .8 --storage pivoted --tokens 73728 $(MIXTURE) --overwrite
	$(BIN)/flrc-edge heal $(OUT)/bench/keep-80 -o $(OUT)/bench/keep-80-healed --minutes 60 --train all $(MIXTURE) --overwrite $(SAVE)
	$(COMPARE) smollm2-135m --keep .8 --recipe svd-llm --checkpoint $(OUT)/bench/keep-80-healed --windows 8 --tokens 73728 $(MIXTURE) $(SAVE)
	$(COMPARE) smollm2-135m --formats $(SAVE)
	$(BIN)/flrc-edge demo -o $(OUT)/demo --overwrite $(SAVE)

# What compressing takes, over tokens and over parameters.
benchmarks-cost: setup
	$(BIN)/flrc-edge pull smollm2-135m
	$(BIN)/flrc-edge pull gemma-3-270m
	$(BIN)/flrc-edge pull qwen2.5-coder-0.5b
	$(BIN)/flrc-edge estimate smollm2-135m --check 4096,8192,16384,32768 $(SAVE)
	$(BIN)/flrc-edge estimate gemma-3-270m --check 4096 $(SAVE)
	$(BIN)/flrc-edge estimate qwen2.5-coder-0.5b --check 4096 $(SAVE)

# The boundaries are set, for the ones that compress would find are those of a constant stage: falling ranks lose to it.
# Summaries need texts that are not shipped: FLRC_EDGE_DATA names a folder with dialogsum/ and cnndm100/.
SUMMARIES = --no-text --dense $(OUT)/bench/dense-fp32 --summarize $(FLRC_EDGE_DATA)/dialogsum/dialogsum.dev.jsonl --summarize $(FLRC_EDGE_DATA)/cnndm100/train_sample.csv --samples 50
benchmarks-summaries: setup
	@test -d "$(FLRC_EDGE_DATA)/dialogsum" || { echo "skipped: FLRC_EDGE_DATA names no folder with dialogsum/"; exit 1; }
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/dense --keep 1 --overwrite
	$(BIN)/flrc-edge export $(OUT)/bench/dense -o $(OUT)/bench/dense-fp32 --dtype fp32 --overwrite
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/stages --stages .9,.8,.7 --boundaries 32,64 --storage pivoted --tokens 73728 $(MIXTURE) --overwrite
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/uniform --keep .8 --allocator uniform --factorization one-sided --tokens 73728 $(MIXTURE) --overwrite
	$(BIN)/flrc-edge export $(OUT)/bench/stages -o $(OUT)/bench/stages-int8 --dtype int8 --overwrite
	$(BIN)/flrc-edge export $(OUT)/bench/uniform -o $(OUT)/bench/uniform-int8 --dtype int8 --overwrite
	$(BIN)/flrc-edge eval $(OUT)/bench/stages-int8 $(SUMMARIES) $(SAVE)
	$(BIN)/flrc-edge eval $(OUT)/bench/uniform-int8 $(SUMMARIES) $(SAVE)
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/flra --keep .8 --allocator fisher --factorization one-sided --tokens 73728 $(MIXTURE) --overwrite
	$(BIN)/flrc-edge export $(OUT)/bench/flra -o $(OUT)/bench/flra-int8 --dtype int8 --overwrite
	$(BIN)/flrc-edge eval $(OUT)/bench/flra-int8 $(SUMMARIES) $(SAVE)

# Healing on more text than is shipped: WikiText-2's validation part, and the novels that are not held out.
NOVELS := emma mansfieldpark northangerabbey prideprejudice sensesensibility
LONG = --calibration $(FLRC_EDGE_DATA)/wikitext2/wiki.valid.raw:.4 $(NOVELS:%=--calibration $(FLRC_EDGE_DATA)/austen/%.txt:.07) --calibration chat:.25
benchmarks-healing: setup
	@test -d "$(FLRC_EDGE_DATA)/austen" || { echo "skipped: FLRC_EDGE_DATA names no folder with austen/ and wikitext2/"; exit 1; }
	$(BIN)/flrc-edge compress smollm2-135m -o $(OUT)/bench/keep-80 --keep .8 --storage pivoted --tokens 73728 $(MIXTURE) --overwrite
	$(BIN)/flrc-edge heal $(OUT)/bench/keep-80 -o $(OUT)/bench/keep-80-healed-more --minutes 60 --train all $(LONG) --overwrite $(SAVE)
	$(COMPARE) smollm2-135m --keep .8 --recipe svd-llm --checkpoint $(OUT)/bench/keep-80-healed-more --windows 8 --tokens 73728 $(MIXTURE) $(SAVE)

# Speed and memory beside onnxruntime-genai and llama.cpp (docs/benchmarking.md), in about an hour; nothing else may run
# meanwhile. Ours are int4 with a scale in up to 128 inputs; the dense model also in blocks of 32, which is what
# onnxruntime-genai and Q4_0 have.
SPEED := -p 64,512 -c 64,1024,4096 --threads 2 --loading --operators --busy 2
MODEL_FOLDER = $$($(BIN)/flrc-edge pull $(1) --json | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["path"])')
EXPORT = $(BIN)/flrc-edge export --overwrite --dtype
define speed
	$(BIN)/flrc-edge pull $(1)
	test -f $(OUT)/bench/$(1).gguf || $(BIN)/flrc-edge pull $(1) --gguf $(OUT)/bench/$(1).gguf
	test -f $(OUT)/bench/$(1)-q4_0.gguf || $(LLAMA)/llama-quantize --allow-requantize --pure $(OUT)/bench/$(1).gguf $(OUT)/bench/$(1)-q4_0.gguf Q4_0
	$(BIN)/python -m onnxruntime_genai.models.builder -i $(call MODEL_FOLDER,$(1)) -o $(OUT)/bench/$(1)-genai -p int4 -e cpu -c $(OUT)/bench/genai-cache
	$(BIN)/flrc-edge compress $(1) -o $(OUT)/bench/$(1)-1 --keep 1 --overwrite
	$(EXPORT) int4 $(OUT)/bench/$(1)-1 -o $(OUT)/bench/$(1)-dense-32
	$(EXPORT) int4/128 $(OUT)/bench/$(1)-1 -o $(OUT)/bench/$(1)-dense
	for keep in .8 .6 .4; do $(BIN)/flrc-edge compress $(1) -o $(OUT)/bench/$(1)$$keep --keep $$keep $(2) $(MIXTURE) --overwrite && $(EXPORT) int4/128 $(OUT)/bench/$(1)$$keep -o $(OUT)/bench/$(1)-keep$$keep || exit 1; done
	$(BIN)/flrc-edge compress $(1) -o $(OUT)/bench/$(1)-3 --stages .8,.6,.4 --boundaries 32,64 $(2) $(MIXTURE) --overwrite
	$(EXPORT) int4/128 $(OUT)/bench/$(1)-3 -o $(OUT)/bench/$(1)-stages
	PATH="$(LLAMA):$$PATH" $(BIN)/flrc-edge bench $(foreach kind,dense-32 keep.8 keep.6 keep.4 stages,$(OUT)/bench/$(1)-$(kind)) --baseline $(OUT)/bench/$(1)-dense --peer genai=$(OUT)/bench/$(1)-genai --peer llama.cpp=$(OUT)/bench/$(1)-q4_0.gguf $(SPEED) $(SAVE)
endef
benchmarks-speed: setup $(LLAMA)/.ready
	mkdir -p $(OUT)/bench
	$(call speed,smollm2-135m,--tokens 73728)
	$(call speed,qwen2.5-coder-0.5b,--tokens 4096)  # speed does not depend on them
	$(BIN)/python -m flrc_edge.readme_speed README.md docs/benchmarks.json

# llama.cpp for the processor of this machine, from the source that llama-cpp-python ships: llama-bench, llama-quantize.
# GCC 12 drops what is written to the argument of _tile_loadconfig (llama.cpp's pull request 26954): on a processor with
# AMX llama-bench would end with SIGSEGV.
llama-bench: $(LLAMA)/.ready

$(LLAMA)/.ready: $(VENV)/.ready
	rm -rf $(LLAMA)/source && mkdir -p $(LLAMA)/source
	$(BIN)/python -m pip download -q --no-deps --no-binary llama-cpp-python -d $(LLAMA) $(LLAMA_SOURCE)
	tar -xzf $(LLAMA)/llama_cpp_python-*.tar.gz -C $(LLAMA)/source --strip-components 1
	sed -i.orig 's/^ *_tile_loadconfig(&tc);/__asm__ volatile("" : : "m"(tc)); &/' $(LLAMA)/source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
	cmake -S $(LLAMA)/source/vendor/llama.cpp -B $(LLAMA)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF $(LLAMA_FLAGS)
	cmake --build $(LLAMA)/build --target llama-bench llama-quantize -j 2
	cp $(LLAMA)/build/bin/llama-bench $(LLAMA)/build/bin/llama-quantize $(LLAMA)/
	touch $@

clean:
	rm -rf $(VENV) $(OPTIMUM) $(OUT) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f runtime/flrc_runtime/flrc_kernels.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
