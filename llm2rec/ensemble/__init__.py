"""A teacher made of students, item neighbours, title neighbours of a language model without training, and LLM teachers.

It exports the same teacher outputs as `llm2rec.teacher` and is evaluated like other teachers.
"""
