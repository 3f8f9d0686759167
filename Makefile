# Two commands set everything up on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test check bench schema clean

demo: .venv/run            ## train both mountain LoRAs on the embedded miniature and show what came out
	$(PY) demo.py

test: .venv/dev            ## what CI runs
	$(PY) -m pytest -m "not net"

check: .venv/dev           ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: .venv/run           ## time a training step against its limit and against the uncached way
	$(PY) benchmarks/train.py

schema: .venv/run          ## write cfg/schema.json, with which editors complete the keys
	$(PY) train_lora.py --schema > cfg/schema.json

.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:                     ## remove what runs wrote, not the miniature
	rm -rf log out ckpt/cache ckpt/mountain ckpt/mountain_up ckpt/*.safetensors
