# Thin on purpose: each target says in one line what it runs, so that every step can be typed where there is no make.
# `make PYTHON=python3.12` chooses the interpreter, `make VENV=~/envs/patchcore` the place of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
METADATA := settings.ini setup.py pyproject.toml

.PHONY: help demo test quick docs lab readme bench peers
help:
	@grep '^## ' Makefile

## make demo    pip install -e .         then patchcore_nb_run on the generated demo set
demo: $(VENV)/installed
	$(BIN)/patchcore_nb_run --gpu -1 --seed 0 --save_patchcore_model --save_segmentation_images --log_project demo --log_group filterbank demo_results patch_core -b filterbank -le layer2 -le layer3 sampler -p 0.1 approx_greedy_coreset dataset -d denim -d sieve -d cog demo demo_data

## make test    pip install -e '.[dev]'  then python tools/check_clean.py; ruff check; nbdev_test; nbdev_test --flags tutorial --path nbs/tutorials; python tools/pages.py; pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests
# Notebooks and files of tests run side by side, one a core; were each to take all cores besides, they would be three times as slow.
test: $(VENV)/installed-dev
	$(BIN)/python tools/check_clean.py
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --flags tutorial --path nbs/tutorials
	$(BIN)/python tools/pages.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests

## make quick   pip install -e '.[dev]'  then python tools/check_clean.py; ruff check; python tools/changed.py (the notebooks that differ from main); pytest of a few tests: three minutes
QUICK := $(addprefix tests/test_,house.py numerics.py guide.py)
quick: $(VENV)/installed-dev
	$(BIN)/python tools/check_clean.py
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/python tools/changed.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(QUICK)

## make docs    pip install -e '.[dev]'  then python tools/pages.py --render (the site, into _docs/; without Quarto by Sphinx, which takes pip install -e '.[docs]')
docs: $(VENV)/installed-dev
	command -v quarto >/dev/null || $(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python tools/pages.py --render

## make lab     pip install -e '.[dev]'  then jupyter lab --LabApp.default_url=/lab/tree/nbs/tutorials
lab: $(VENV)/installed-dev
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/tutorials

## make readme  pip install -e '.[dev]'  then python tools/readme.py (README.md and the other documents, from their notebooks)
readme: $(VENV)/installed-dev
	$(BIN)/python tools/readme.py

## make bench   pip install -e '.[dev]'  then python benchmarks/coreset.py and the others (about half an hour; results into benchmarks/results/)
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/coreset.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/embedding.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/scores.py
	$(BIN)/python benchmarks/relative.py
	$(BIN)/python benchmarks/contamination.py
	$(BIN)/python benchmarks/busy.py
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/backbones.py

## make peers   pip install -e '.[faiss]' pytest anomalib==2.7.0, in .venv-peers  then pytest tests/peers (the preset anomalib against anomalib itself; figures into benchmarks/results/peers.csv); python benchmarks/peers.py (time and memory beside anomalib and the reference's stages)
peers:
	test -x .venv-peers/bin/pip || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -e '.[faiss]' pytest anomalib==2.7.0
	.venv-peers/bin/python -m pytest tests/peers
	.venv-peers/bin/python benchmarks/peers.py

## make lowest.txt   uv pip compile (the lowest version of every requirement, for pip; faiss for the CPU, since that for the GPU asks for a newer torch)
lowest.txt: settings.ini
	printf "faiss-gpu; sys_platform == 'none'\nfaiss-cpu>=1.8" | uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python-version 3.10 --override - -q -o $@

# An environment that is older than the package's metadata is brought up to date; one that is not there is made.
# torch and torchvision must come from one index: both are requirements, so one pip command installs both.
$(VENV)/installed: $(METADATA)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/installed-dev: $(METADATA)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $(VENV)/installed $@
