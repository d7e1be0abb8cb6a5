"""The LLM teacher: prompts, the iLoRA recommender, its training and its outputs."""

import logging

# PEFT imports bitsandbytes, which warns on a CPU that it found no downloaded kernel for 4 bit; it has its own.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
