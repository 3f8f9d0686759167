# Two commands set everything up on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --quiet --disable-pip-version-check
TESTS := $(PY) -m pytest -n auto --dist worksteal
HELP := COLUMNS=100 PYTHON_COLORS=0 $(PY)
SCRIPTS := train_lora generate style_transfer edit drag animate morph invert mix_lora
VERBS := inspect mix scale resize convert merge extract diff retrain

.PHONY: demo test quick times soak check bench figures gpu texts schema help-texts miniature clean

demo: .venv/run            ## train both mountain LoRAs on the embedded miniature, show what came out, and morph
	$(PY) demo.py

test: .venv/dev            ## all tests, on all processors
	$(TESTS) -m "not net"

quick: .venv/dev           ## before each commit: what takes no time, and a run of each script
	$(TESTS) -m "not net and not slow"

times: .venv/dev           ## all tests, and what each takes into tests/times.json
	$(TESTS) -m "not net" --times

soak: .venv/dev            ## half an hour of kills and damaged input; its last line is JSON
	$(PY) tests/soak.py minutes=30 seed=0

check: .venv/dev           ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: .venv/run           ## time a step, a morph and a picture against other ways, and against docs/SPEED.md
	$(PY) benchmarks/bench.py

figures: .venv/run         ## the numbers and pictures of README and docs anew: hours, goes on where it was stopped
	$(PY) benchmarks/figures.py

minutes ?= 8
gpu: .venv/dev             ## what a GPU does, in minutes=8; peer=PATH device=cpu base=narrow; its last line is JSON
	$(PY) benchmarks/gpu.py $(foreach key,minutes peer device base,$(if $($(key)),$(key)=$($(key))))

texts: schema help-texts   ## write what is committed and follows from the keys of the configs

schema: .venv/run          ## write the schemas with which editors complete the keys of configs
	$(PY) train_lora.py --schema > cfg/schema.json
	$(PY) morph.py --schema > cfg/morph/schema.json
	$(PY) invert.py --schema > cfg/invert/schema.json
	$(PY) generate.py --schema > cfg/generate/schema.json
	$(PY) style_transfer.py --schema > cfg/style_transfer/schema.json
	$(PY) edit.py --schema > cfg/edit/schema.json
	$(PY) drag.py --schema > cfg/drag/schema.json
	$(PY) animate.py --schema > cfg/animate/schema.json

help-texts: .venv/run      ## write what --help prints into docs/help
	for name in $(SCRIPTS); do $(HELP) $$name.py --help > docs/help/$$name.txt || exit 1; done
	for verb in $(VERBS); do $(HELP) mix_lora.py $$verb --help > docs/help/mix_lora_$$verb.txt || exit 1; done

.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	@echo "installing  requirements.txt into .venv"
	@$(PIP) -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	@echo "installing  requirements-dev.txt into .venv"
	@$(PIP) -r requirements-dev.txt
	touch $@

miniature: .venv/run       ## train the embedded base from nothing into out/miniature: hours, resumable
	miniature/run.sh

clean:                     ## remove what runs wrote, not the miniature
	rm -rf log out ckpt/cache ckpt/mountain ckpt/mountain_up ckpt/*.safetensors
