# Each target sets up .venv itself. PIP_FIND_LINKS may name a folder with a CPU build of torch; without one, uv picks
# the build that fits this machine (--torch-backend auto), so that no CUDA package lands where there is no GPU.
VENV := .venv
READY := $(VENV)/.ready
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
UV := UV_SYSTEM_CERTS=1 UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(VENV)/bin/uv
BACKEND := $(if $(wildcard $(PIP_FIND_LINKS)/torch-*),,--torch-backend auto)
CODE := mia tests benchmarks resources/example

.PHONY: demo test lint bench bench-gpu setup lock figure

demo: $(READY)  ## run the embedded example; opens nothing, prints where the report is
	$(RUN) snakemake --cores all --profile workflow/profiles/local
	@echo "open results/example/report.html"

# One worker a core, each on one thread; a file's tests stay together, and in order, so that the longest start first.
test: export OMP_NUM_THREADS = 1
test: $(READY)  ## every test, slow ones too
	$(RUN) python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(RUN) ruff check $(CODE)
	$(RUN) ruff format --check $(CODE)
	$(RUN) mypy
	$(RUN) snakefmt --check Snakefile workflow
	$(RUN) snakemake --lint

bench: export MALLOC_MMAP_THRESHOLD_ = 1073741824  # as the rules have it
bench: export MALLOC_TRIM_THRESHOLD_ = 1073741824
bench: $(READY)  ## speed, as ratios against a naive twin in the same run
	$(RUN) python -m benchmarks.features
	$(RUN) python -m benchmarks.evaluation
	$(RUN) python -m benchmarks.coverage
	$(RUN) python -m benchmarks.images
	$(RUN) python -m benchmarks.selection
	$(RUN) python -m benchmarks.search
	$(RUN) python -m benchmarks.embeddings
	$(RUN) python -m benchmarks.sanitize
	$(RUN) python -m benchmarks.classifiers
	$(RUN) python -m benchmarks.attacks

bench-gpu: $(READY)  ## one GPU with Stable Diffusion 1.x's shapes: matrix rate, UNet, decoder, the reference's loop, ours
	$(RUN) python -m benchmarks.gpu

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet uv==0.13.9
	$(UV) pip install --quiet --compile-bytecode --python $(VENV) $(BACKEND) -r requirements.lock
	$(UV) pip install --quiet --python $(VENV) --no-deps --editable .
	touch $@

lock:  ## after a change of pyproject.toml's dependencies; needs a CPU torch in PIP_FIND_LINKS, so that no CUDA package is locked
	sed -i 's/^torch==.*/&+cpu/' requirements.lock
	$(UV) pip compile --quiet --no-header --extra dev --python-version 3.11 pyproject.toml -o requirements.lock
	sed -i 's/+cpu$$//' requirements.lock

figure: $(READY)  ## the picture of the flow in the README; needs graphviz
	$(RUN) snakemake --rulegraph | sed -n '/^digraph/,$$p' | dot -Tsvg > docs/flow.svg
