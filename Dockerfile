# The machine that experiments run on: CUDA compilers (DeepSpeed builds its kernels with them) and tools, no code of ours.
# env_shell/start_experiment_container.sh mounts the checkout at /workspace and sets up .venv there from poetry.lock.
#
# The tag follows poetry.lock: the same torch, built for the same CUDA.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-devel

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential \
        ca-certificates \
        curl \
        git \
        python3 \
        python3-venv \
    && rm -rf /var/lib/apt/lists/*

# In an environment of its own, so that Poetry's dependencies and the project's never meet.
RUN python3 -m venv /usr/local/lib/poetry \
    && /usr/local/lib/poetry/bin/pip install --no-cache-dir "poetry>=2.0,<3.0" \
    && ln -s /usr/local/lib/poetry/bin/poetry /usr/local/bin/poetry

# The container runs as the caller, who is not in /etc/passwd and does not own the mounted checkout.
# Whoever starts it without naming a user is not root either: start_experiment_container.sh names the caller, and nobody
# (65534) is the user of all others.
RUN git config --system --add safe.directory /workspace
USER 65534:65534

WORKDIR /workspace

CMD ["bash"]
