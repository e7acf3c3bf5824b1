# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT := out

# The exact versions of constraints.txt were tested on x86-64 Linux with Python 3.11; elsewhere pyproject's ranges hold.
TESTED := $(shell $(PYTHON) -c 'import platform as p, sys; print(int(p.machine() == "x86_64" and p.system() == "Linux" and sys.version_info[:2] == (3, 11)))' 2>/dev/null)
CONSTRAINTS := $(if $(filter 1,$(TESTED)),--constraint constraints.txt)

# Threads that wait for each other by spinning make a busy machine crawl. On a quiet one they are quicker, as speed is measured.
demo test lab: export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test bench results lab clean

demo: $(INSTALLED)
	@mkdir -p $(OUT)
	@echo "Running the notebooks on the bundled pictures: about ten minutes on two cores."
	@for notebook in notebooks/*.ipynb; do \
		echo; echo "== $$notebook"; \
		$(BIN)/papermill $$notebook $(OUT)/$$(basename $$notebook) -p profile sample || exit 1; \
		$(BIN)/taco-nb export $(OUT)/$$(basename $$notebook) || exit 1; \
	done
	@echo
	@echo "All notebooks have run. Open this page first, in any browser:"
	@echo "    $(CURDIR)/$(OUT)/01_baseline.html"
	@echo "The others lie beside it. To play with the notebooks themselves: make lab, and there $(OUT)/01_baseline.ipynb."

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

bench: $(INSTALLED)
	$(BIN)/taco-nb bench --out $(OUT)/bench

# CHECK=1 measures only what takes seconds, and fails if a page is stale; ONLY=codecs measures that one.
results: $(INSTALLED)
	$(BIN)/taco-nb results $(if $(CHECK),--check,$(ONLY))

lab: $(INSTALLED)
	$(BIN)/jupyter lab

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit("Python 3.10 to 3.12 is needed, but $(PYTHON) is %d.%d. Say which: make demo PYTHON=python3.11" % v)'
	@echo "Installing into $(VENV)/. The first time this takes about 4 minutes and 7 GB, most of it for PyTorch with CUDA."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]' $(CONSTRAINTS)
	@touch $@
