# `make demo` and `make test` need nothing but Python 3.11 or newer and a network.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
CLEAN := .clean-venv/bin
SHARED ?= ../shared
REALDATA ?= build/realdata
BROWSED = 'synthetic_vowel,synthetic_number,synthetic_events,synthetic_tags'

FUZZ_SECONDS ?= 120

.PHONY: demo test check docs wheel-demo realdata families bench browser gpu fuzz escape chaos lock clean

demo: .venv/installed  ## install, export the baseline encoder, score it on the built-in suite
	$(BIN)/xares-onnx export logmel -o logmel.onnx
	$(BIN)/xares-onnx evaluate logmel.onnx --suite synthetic

test: .venv/installed-third-party  ## install and run the tests
	@# in the order of their names: by their number of tests, the few slow ones of Ray's would run last, on one core
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: .venv/installed  ## format, lint, types, import layers, pages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: .venv/installed  ## write the command line's reference anew, and build the pages into build/site
	$(BIN)/python docs/reference.py > docs/cli.md.part && mv docs/cli.md.part docs/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel-demo: .venv/installed  ## build the wheel, install it into a clean environment, run four tasks of the demo from there
	rm -rf dist build/lib build/bdist.* .clean-venv
	$(BIN)/python -m build --wheel --outdir dist .
	@# the wheel holds every module, task and schema of the tree, and nothing else
	diff <(git ls-files xares_onnx models exporters tasks | sed -E 's,^(models|exporters|tasks)/,xares_onnx/\1/,' \
	         | grep -vxE 'xares_onnx/(models|exporters|tasks)' | sort) \
	     <($(BIN)/python -m zipfile -l dist/*.whl | awk '/^xares_onnx\// {print $$1}' | sort)
	$(PYTHON) -m venv .clean-venv
	$(CLEAN)/pip install --quiet --constraint requirements.lock torch==2.13.0
	$(CLEAN)/pip install --quiet --constraint requirements.lock dist/*.whl
	cd dist && ../$(CLEAN)/xares-onnx export logmel -o logmel.onnx
	cd dist && ../$(CLEAN)/xares-onnx evaluate logmel.onnx --tasks $(BROWSED) --cache cache

realdata: .venv/installed-resemblyzer logmel.onnx resemblyzer.onnx  ## build real audio, score both encoders on it
	test -d $(REALDATA)/env || $(BIN)/python $(SHARED)/realdata/build.py $(REALDATA) $(SHARED)/xares_tasks.json
	$(BIN)/xares-onnx evaluate logmel.onnx --data $(REALDATA)/env
	$(BIN)/xares-onnx evaluate resemblyzer.onnx --data $(REALDATA)/env
	$(BIN)/xares-onnx evaluate resemblyzer.onnx --data $(REALDATA)/env --protocol xares --output results/resemblyzer-xares.json

families: .venv/installed  ## export every family with a checkpoint at real size, random weights: parity at 10 s, and speed
	PYTHONPATH=tests/helpers $(BIN)/python bench/families.py

bench: .venv/installed-resemblyzer logmel.onnx resemblyzer.onnx  ## speed and memory, as ratios within one run
	$(BIN)/python bench/host.py model resemblyzer.onnx
	$(BIN)/python bench/adapters.py resemblyzer.onnx
	PYTHONPATH=tests/helpers $(BIN)/python bench/layers.py
	$(BIN)/python bench/heads.py
	$(BIN)/python bench/kinds.py resemblyzer.onnx
	$(BIN)/python bench/frames.py
	$(BIN)/python bench/rerun.py logmel.onnx
	$(BIN)/python bench/memory.py resemblyzer.onnx
	$(BIN)/python bench/packing.py logmel.onnx
	$(BIN)/python bench/walls.py

gpu: .venv/installed-resemblyzer  ## what a CUDA device does: agreement with the CPU, scores, throughput, heads
	$(BIN)/python bench/gpu.py --folder build/gpu --output build/gpu/gpu.json

fuzz: .venv/installed  ## look for bytes that break a reader, guided by coverage; FUZZ_SECONDS for each of ten readers
	$(BIN)/pip install --quiet atheris
	for reader in audio shard task dimension declared model table result arrays stored; do \
	  PYTHONPATH=tests/helpers $(BIN)/python tests/fuzz.py $$reader -max_total_time=$(FUZZ_SECONDS) || exit; done

escape: .venv/installed  ## try every way out of a model's process: network, programs, files
	$(BIN)/python -m pytest tests/hostile/test_walls.py -v

chaos: .venv/installed  ## kill the worker, the parent and the disk twenty times; every rerun must end as if nothing had been
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos.py
	MOMENTS=16 $(BIN)/python -m pytest tests/hostile/test_surroundings.py -k moment

browser: .venv/installed logmel.onnx  ## a report in Chromium (apt-get install chromium): console, requests, contrast, keys, pictures
	mkdir -p build/browser
	PYTHONPATH=tests/helpers $(BIN)/python -c "from random_checkpoints import *; save_speech('wav2vec2', Path('build/browser/checkpoint'))"
	$(BIN)/xares-onnx export wav2vec2 build/browser/checkpoint -o build/browser/random.onnx
	$(BIN)/xares-onnx evaluate logmel.onnx --tasks $(BROWSED) --output build/browser/logmel.json --quiet
	$(BIN)/xares-onnx evaluate build/browser/random.onnx --tasks $(BROWSED) --taps all-layers --output build/browser/random.json --quiet
	$(BIN)/python tests/browser.py build/browser build/browser/logmel.json build/browser/random.json --data build

lock:  ## resolve the newest versions into requirements.lock, in a fresh environment
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet '.[dev]'
	build/lock/bin/pip freeze --exclude xares-onnx > build/lock/frozen
	@# torch without its build tag; of onnxruntime the lines for both kinds of platform, the other one's version as it was
	{ grep '^#' requirements.lock; \
	  sed -e '/^onnxruntime/d' -e 's/^\(torch==[0-9.]*\).*/\1/' build/lock/frozen; \
	  grep '^onnxruntime-gpu' requirements.lock | sed "s/==[0-9.]*/$$(grep -o '==.*' <(grep '^onnxruntime-gpu' build/lock/frozen))/"; \
	  grep '^onnxruntime=' requirements.lock; } > build/lock/requirements
	mv build/lock/requirements requirements.lock

%.onnx: .venv/installed-resemblyzer
	$(BIN)/xares-onnx export $* -o $@

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# The wheel carries a pretrained model; its dependencies (a compiled voice detector among them) are not needed to export it.
.venv/installed-resemblyzer: .venv/installed
	$(BIN)/pip install --quiet --no-deps resemblyzer==0.1.4
	touch $@

# The wheels of the first two carry ONNX models, which is all that the tests use of them. X-ARES brings a package called
# `tasks`, so it lies in a folder of its own, which only its process sees.
.venv/installed-third-party: .venv/installed-resemblyzer
	$(BIN)/pip install --quiet --no-deps silero-vad==6.2.3 basic-pitch==0.4.0
	$(BIN)/pip install --quiet --no-deps --target .venv/x-ares xares==0.1.3 \
	  loguru==0.7.3 pandas==3.1.1 python-dateutil==2.9.0.post0 pytorch-ignite==0.5.5 six==1.17.0
	touch $@

clean:
	rm -rf .venv .clean-venv dist build *.egg-info logmel.onnx resemblyzer.onnx
