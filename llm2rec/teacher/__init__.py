"""The LLM teacher: prompts, the iLoRA recommender, its training and what it writes down."""
