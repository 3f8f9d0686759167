# Two commands set everything up on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test soak check bench gpu schema miniature clean

demo: .venv/run            ## train both mountain LoRAs on the embedded miniature, show what came out, and morph
	$(PY) demo.py

test: .venv/dev            ## what CI runs
	$(PY) -m pytest -m "not net"

soak: .venv/dev            ## half an hour of kills and damaged input; its last line is JSON
	$(PY) tests/soak.py minutes=30 seed=0

check: .venv/dev           ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: .venv/run           ## time a training step, a morph and a picture against other ways
	$(PY) benchmarks/train.py
	$(PY) benchmarks/morph.py
	$(PY) benchmarks/style.py

minutes ?= 8
gpu: .venv/dev             ## what a GPU does with all this, in minutes=8; peer=PATH device=cpu base=narrow; its last line is JSON
	$(PY) benchmarks/gpu.py $(foreach key,minutes peer device base,$(if $($(key)),$(key)=$($(key))))

schema: .venv/run          ## write the schemas with which editors complete the keys of configs
	$(PY) train_lora.py --schema > cfg/schema.json
	$(PY) morph.py --schema > cfg/morph/schema.json
	$(PY) invert.py --schema > cfg/invert/schema.json
	$(PY) generate.py --schema > cfg/generate/schema.json
	$(PY) style_transfer.py --schema > cfg/style_transfer/schema.json

.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

miniature: .venv/run       ## train the embedded base from nothing into out/miniature: hours, resumable
	miniature/run.sh

clean:                     ## remove what runs wrote, not the miniature
	rm -rf log out ckpt/cache ckpt/mountain ckpt/mountain_up ckpt/*.safetensors
