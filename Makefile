# Every target makes the environment it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTO_VENV := .venv-proto
PROTO_INSTALLED := $(PROTO_VENV)/.installed
STUBS := lookalike/v1
# The package carries the server's binary; of what it asks for, the server needs nothing.
MILVUS_VENV := .venv-milvus
MILVUS_INSTALLED := $(MILVUS_VENV)/.installed
MILVUS := milvus==2.3.5
# Which of its tests, as pytest's -k takes it: all of them take ten minutes, since a server's writes take a second each.
MILVUS_TESTS ?=
# Stubs of this generator import on every protobuf and grpcio from 5.29 and 1.71 on, so users need no upgrade. The list is
# whole and installed as it is: the generator asks for an older protobuf than its typing plugin, and runs on the newer.
PROTO_TOOLS := grpcio-tools==1.71.2 grpcio==1.85.1 mypy-protobuf==5.1.0 protobuf==7.36.2 setuptools==80.9.0 \
	types-protobuf==7.35.1.20260906 typing-extensions==4.16.0

.PHONY: help demo test test-slow test-hostile test-milvus test-clients fuzz check format proto proto-check breaking clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(PROTO_INSTALLED): Makefile
	$(PROTO_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(PROTO_TOOLS)
	touch $@

$(MILVUS_INSTALLED): Makefile
	$(MILVUS_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(MILVUS_VENV)
	$(MILVUS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MILVUS)
	touch $@

demo: $(INSTALLED) ## train, calibrate, index, serve and ask, on handwritten digits
	$(BIN)/lookalike demo

test: $(INSTALLED) ## the default suite, under 5 minutes on two cores
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(INSTALLED) ## the longer tests
	$(BIN)/python -m pytest -m slow

fuzz: $(INSTALLED) ## look for inputs that break decoders and parsers, two minutes each; atheris guides it where it installs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]' || true
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --runs 1000000 --seconds 120

test-hostile: $(INSTALLED) ## the longer tests of clients that dawdle, vanish, cancel and send nonsense
	$(BIN)/python -m pytest -m slow tests/service/test_hostile.py

test-milvus: $(INSTALLED) $(MILVUS_INSTALLED) ## the contract of gallery engines on a Milvus server
	LOOKALIKE_MILVUS_SERVER=$(CURDIR)/$(MILVUS_VENV)/bin/milvus-server OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m milvus -k '$(MILVUS_TESTS)' tests/index/test_milvus_server.py

test-clients: $(INSTALLED) ## the clients of examples/: Node (needs npm), grpcurl, buf curl, k6, Ray Data
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	npm ci --no-audit --no-fund --ignore-scripts --prefix examples/node
	CLIENTS_REQUIRED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/examples

check: $(INSTALLED) proto-check breaking ## format, lint, types, import arrows, the wire contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/hadolint Dockerfile

format: $(INSTALLED) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# $(1) is the folder to write lookalike/v1 into.
generate = PATH=$(CURDIR)/$(PROTO_VENV)/bin:$$PATH $(PROTO_VENV)/bin/python -m grpc_tools.protoc \
	-I proto -I third_party/googleapis --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	$(wildcard proto/lookalike/v1/*.proto) && rm $(1)/$(STUBS)/common_pb2_grpc.py* $(1)/$(STUBS)/operations_pb2_grpc.py*

proto: $(PROTO_INSTALLED) ## regenerate the committed stubs
	$(call generate,.)

proto-check: $(PROTO_INSTALLED)
	rm -rf build/stubs && mkdir -p build/stubs
	$(call generate,build/stubs)
	cp $(STUBS)/__init__.py build/stubs/$(STUBS)/
	diff -r -x __pycache__ build/stubs/$(STUBS) $(STUBS) || { echo "stubs are stale: run 'make proto' and commit them"; exit 1; }

breaking: $(INSTALLED) ## refuse wire changes that break clients of main
	@if git rev-parse --quiet --verify main >/dev/null; \
	then $(BIN)/buf breaking --against '.git#branch=main'; \
	else echo "no branch main here to compare the wire contract with"; fi

clean: ## remove what make made
	rm -rf $(VENV) $(PROTO_VENV) $(MILVUS_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
