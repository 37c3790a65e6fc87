# The steps themselves are listed in scripts/check.py. PYTHON is that of the environment; .venv is what user_dir_setup.py makes.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: check fast docs tables

# What CI runs.
check:
	bash .ci/run

fast:
	$(PYTHON) -m scripts.check fast

docs:
	$(PYTHON) -m scripts.check docs

# The parts of pages that are generated: from the registry, from the flags, from obtained.tsv.
tables:
	$(PYTHON) scripts/make_table.py --readme
	$(PYTHON) -m scripts.make_docs
