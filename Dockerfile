# The serving image: `lookalike serve` with what it imports and nothing else, run by an unprivileged user.
# docs/deployment.md says how to build and run it.

ARG PYTHON_IMAGE=python:3.11-slim

# ---- The list of dependencies: the only part of pyproject.toml whose change makes the next stage run again. ----
FROM ${PYTHON_IMAGE} AS requirements

WORKDIR /src
COPY deploy/requirements.py pyproject.toml ./
RUN python requirements.py serve onnx < pyproject.toml > requirements.txt

# ---- Everything that lookalike depends on. ----
FROM ${PYTHON_IMAGE} AS dependencies

# The wheels here carry no CUDA; docs/deployment.md says how to have some that do.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PYTHON=/opt/venv

RUN python -m venv --without-pip /opt/venv

WORKDIR /src
COPY constraints.txt ./
# Both from the one index, since torchvision's operators load only into the torch they were built for; all the rest
# comes from PyPI. A constraint of 2.14.1 also accepts the build 2.14.1+cpu, so the next step keeps what is here.
RUN pip install --no-deps ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} --constraint constraints.txt torch torchvision
COPY --from=requirements /src/requirements.txt ./
RUN pip install --constraint constraints.txt --requirement requirements.txt

# ---- lookalike itself, without training/ (.dockerignore leaves it out). ----
FROM ${PYTHON_IMAGE} AS wheel

WORKDIR /src
COPY . ./
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# ---- What runs. ----
FROM ${PYTHON_IMAGE} AS serving

# Numeric, so that an orchestrator can tell that it is not root. A new volume mounted on /data takes over its owner.
RUN groupadd --gid 10001 lookalike \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin lookalike \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data

COPY --from=dependencies /opt/venv /opt/venv
# pip compiles lookalike in any case; the variable keeps pip's own bytecode out of the one layer that releases change.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    PYTHONDONTWRITEBYTECODE=1 pip --python /opt/venv install --no-cache-dir --no-deps --no-index /wheel/*.whl

ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1

USER 10001:10001
VOLUME /data
EXPOSE 50051

# A large model may take a minute to load and warm; failures count only after that.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["lookalike", "health", "--target", "127.0.0.1:50051"]

# All addresses, or nobody outside would reach it: that needs TLS (LOOKALIKE_TLS_CERTIFICATE and LOOKALIKE_TLS_KEY), or
# LOOKALIKE_INSECURE=1 where the port is published on a trusted network alone. The image chooses neither.
# Exec form: the server itself receives SIGTERM, upon which it drains.
ENTRYPOINT ["lookalike"]
CMD ["serve", "--bundle", "/bundle", "--data", "/data", "--host", "0.0.0.0", "--port", "50051"]
