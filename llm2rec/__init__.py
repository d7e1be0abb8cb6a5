"""LLM recommendation, distilled: an iLoRA teacher, DLLM2Rec distillation, and a small student that can be served."""
