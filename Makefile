# make train   a trained ranker and its metrics, from a fresh clone
# make test    the tests        make lint   ruff and mypy
# make studies KUAIRAND=DIR   what the papers claim, tried: every study and one report; some 9 CPU-hours, and it goes on
# make test-slow   the tests that `make test` leaves out for their time: rehearsals of benchmarks, further cases
# make test-all    all of these tests with every extra installed, in an environment of its own: nothing is skipped but what needs a TPU or GPU
# make docs    the documentation as a site in site/, which needs no network
# make test-beam   the tests of `prepare --beam`, in an environment of its own: Beam refuses the newest NumPy and Arrow
# make test-oldest   the tests with the oldest supported versions (constraints-oldest.txt), in an environment of its own

PYTHON  ?= $(shell command -v python3.12 || command -v python3)
VENV    ?= .venv
BEAM    ?= .venv-beam
ALL     ?= .venv-all
OLDEST  ?= .venv-oldest
DATA    ?= data/complete_journey
RUN     ?= runs/complete_journey
SPLIT   ?= test
STUDIES ?= studies
BIN     := $(VENV)/bin
INSTALL  = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# pip would write the bytecode of 9,000 modules on one core, which takes a minute. Files of templates are no Python: they are passed over.
COMPILE  = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# XLA on a CPU takes fresh memory for the temporaries of every step; huge pages make a step about 15 % shorter.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: train studies has-kuairand test test-slow test-all test-beam test-oldest lint docs clean
.DELETE_ON_ERROR:

train: $(VENV)/.demo
	test -f $(DATA)/tokenrec.json || $(BIN)/python -m tokenrec prepare complete_journey --out $(DATA)
	$(BIN)/python -m tokenrec train --config=configs/complete_journey.py --data $(DATA) --workdir $(RUN)
	$(BIN)/python -m tokenrec evaluate --workdir $(RUN) --split $(SPLIT) --baselines --samples 3000 --json $(RUN)/eval.json

# KUAIRAND is the folder of the official archive, which `tokenrec prepare kuairand --download pure` fetches.
# The search for rates ends a day before what the other studies of KuaiRand-Pure report.
KUAIRAND_SEARCH := kuairand_pure_rivals
KUAIRAND_STUDIES := kuairand_pure_rivals_seeds kuairand_pure_rivals_nio kuairand_pure_ablations
JOURNEY_STUDIES := complete_journey_rivals complete_journey_rivals_full complete_journey_length complete_journey_scaling
STUDY = $(BIN)/python -m tokenrec study --side-by-side 2

studies: has-kuairand $(VENV)/.dev
	test -f data/kuairand_pure/tokenrec.json || $(BIN)/python -m tokenrec prepare kuairand --root $(KUAIRAND) \
	    --out data/kuairand_pure --valid-from 2022-05-03 --test-from 2022-05-05
	test -f data/complete_journey/tokenrec.json || $(BIN)/python -m tokenrec prepare complete_journey --out data/complete_journey
	test -f data/kuairand_pure_tune/tokenrec.json || $(BIN)/python -m tokenrec prepare kuairand --root $(KUAIRAND) \
	    --out data/kuairand_pure_tune --valid-from 2022-05-02 --test-from 2022-05-03
	$(STUDY) --config=configs/studies/$(KUAIRAND_SEARCH).py --data data/kuairand_pure_tune --out $(STUDIES)/$(KUAIRAND_SEARCH)
	set -e; for name in $(KUAIRAND_STUDIES); do \
	    $(STUDY) --config=configs/studies/$$name.py --data data/kuairand_pure --out $(STUDIES)/$$name; done
	set -e; for name in $(JOURNEY_STUDIES); do \
	    $(STUDY) --config=configs/studies/$$name.py --data data/complete_journey --out $(STUDIES)/$$name; done
	$(BIN)/python -m benchmarks.study_states --study $(STUDIES)/kuairand_pure_ablations --data data/kuairand_pure \
	    --models tokenformer transformer 4F-no-static
	$(BIN)/python -m benchmarks.collapse --work $(STUDIES)/collapse --out $(STUDIES)/collapse/result
	$(BIN)/python -m tokenrec report $(patsubst %,--study $(STUDIES)/%,$(KUAIRAND_SEARCH) $(KUAIRAND_STUDIES) $(JOURNEY_STUDIES)) \
	    --out $(STUDIES)/report

has-kuairand:
	@test -d "$(KUAIRAND)" || { echo "make studies reads KuaiRand-Pure: KUAIRAND='$(KUAIRAND)' is no folder; see docs/guides/data.md" >&2; exit 2; }

# A worker per core; each one runs XLA on eight virtual devices, so more than eight workers gain nothing.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m slow

test-all: $(ALL)/.all
	$(ALL)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "slow or not slow" -rs

test-beam: $(BEAM)/.beam
	$(BEAM)/bin/python -m pytest tests/data/beam/test_beam.py

test-oldest: $(OLDEST)/.oldest
	$(OLDEST)/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "slow or not slow" -rs

lint: $(VENV)/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The variable silences a notice of the theme about the next major version of MkDocs, which is not used.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(ALL) $(BEAM) $(OLDEST) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python $(ALL)/bin/python $(BEAM)/bin/python $(OLDEST)/bin/python: %/bin/python:
	@test -n "$(PYTHON)" || { echo "tokenrec needs Python 3.12 or later: none found; set PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c "import sys; v = sys.version.split()[0]; sys.version_info >= (3, 12) or sys.exit('tokenrec needs Python 3.12 or later, $(PYTHON) is ' + v + '; set PYTHON=/path/to/python3.12')"
	$(PYTHON) -m venv $*

# The interpreter is order-only: its time changes with the system's Python, not with what is installed here.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[demo]"
	$(COMPILE)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[demo,dev]"
	$(COMPILE)
	touch $@ $(VENV)/.demo

$(ALL)/.all: pyproject.toml constraints.txt | $(ALL)/bin/python
	$(ALL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[baselines,demo,dev,mlflow,peers,report,text,wandb]"
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	$(COMPILE)
	touch $@

$(BEAM)/.beam: pyproject.toml constraints-beam.txt | $(BEAM)/bin/python
	$(BEAM)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints-beam.txt -e ".[beam]" pytest tokenizers
	touch $@

$(OLDEST)/.oldest: pyproject.toml constraints-oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[demo,dev]"
	touch $@
