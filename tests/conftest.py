"""What every test stands on: no network, no tokenizer threads, and one torch thread a worker."""

import os

# Before any test imports a Hugging Face library, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers that each take all cores are slower than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
