# The engine with every extra, for x86-64 Linux with NVIDIA GPUs. It is built from a clone:
#
#   docker build -t dice-align .
#   docker run --rm --gpus all --shm-size 8g -v dice-cache:/cache -v "$PWD:/work" dice-align run --rounds 2
#
# No image of this file was ever built: where it was written there is no Docker engine. What was checked is in
# docs/installing.md. The base image, Rust, and requirements/gpu.txt (torch, transformers, TRL, vLLM and Ray, with
# hashes) belong together; tests/packaging/test_container.py compares them.

# The version of `rust-version` in Cargo.toml.
FROM rust:1.88-slim-bookworm AS builder
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/build.txt requirements/build.txt
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
COPY Cargo.toml Cargo.lock pyproject.toml README.md LICENSE ./
COPY benches benches
COPY rust rust
COPY cli cli
COPY dice_py dice_py
RUN PATH="/opt/build/bin:$PATH" maturin build --release --locked --out /wheels

# torch and vLLM bring CUDA's libraries and compiler with them. Its version here is that of requirements/gpu.txt.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# Triton and vLLM compile kernels on first use: they need a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/gpu.txt /tmp/gpu.txt
RUN python3 -m venv /opt/dice \
    && /opt/dice/bin/pip install --no-cache-dir --no-deps --require-hashes -r /tmp/gpu.txt
COPY --from=builder /wheels /tmp/wheels
RUN /opt/dice/bin/pip install --no-cache-dir --no-deps /tmp/wheels/*.whl \
    && useradd --create-home --uid 10001 dice \
    && mkdir --parents /cache /work \
    && chown dice:dice /cache /work
# Models of the hub, worlds, measurements and converted files outlive the container.
ENV PATH="/opt/dice/bin:$PATH" HF_HOME=/cache/huggingface DICE_CACHE=/cache/dice
VOLUME /cache
WORKDIR /work
USER 10001
ENTRYPOINT ["dice"]
CMD ["--help"]
