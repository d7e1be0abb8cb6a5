# syntax=docker/dockerfile:1
# The machine that experiments run on: tools, compilers, no code of ours. env_shell/start_experiment_container.sh mounts
# the checkout at /workspace and sets up .venv there from poetry.lock.
#
#   docker build --tag llm2rec:gpu .                          for NVIDIA GPUs: CUDA and torch come with the base image
#   docker build --tag llm2rec:cpu --build-arg DEVICE=cpu .   for machines without
ARG DEVICE=gpu

# The tag follows poetry.lock: the same torch, built for the same CUDA, whose compilers DeepSpeed builds its kernels with.
# .venv takes the torch that is there (env_shell/setup.sh), so that image and container do not each hold one.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel AS gpu
ENV LLM2REC_TORCH=base

FROM ubuntu:24.04 AS cpu
ENV LLM2REC_TORCH=cpu

# One of the two above.
# hadolint ignore=DL3006
FROM ${DEVICE}

# Packages and lists stay in the builder's caches, not in the image.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    rm -f /etc/apt/apt.conf.d/docker-clean \
    && apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential \
        ca-certificates \
        curl \
        git \
        python3 \
        python3-venv

# In an environment of its own, so that Poetry's dependencies and the project's never meet.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python3 -m venv /usr/local/lib/poetry \
    && /usr/local/lib/poetry/bin/pip install "poetry>=2.0,<3.0" \
    && ln -s /usr/local/lib/poetry/bin/poetry /usr/local/bin/poetry

# The container runs as the caller, who is not in /etc/passwd and does not own the mounted checkout.
# Whoever starts it without naming a user is not root either: start_experiment_container.sh names the caller, and nobody
# (65534) is the user of all others.
RUN git config --system --add safe.directory /workspace
USER 65534:65534

WORKDIR /workspace

CMD ["bash"]
