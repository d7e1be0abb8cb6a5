"""Distillation of a teacher's outputs into a student (DLLM2Rec)."""
