"""A teacher without a language model: an ensemble of trained students and item neighbours.

It exports the same teacher outputs as `llm2rec.teacher` and is evaluated like other teachers.
"""
