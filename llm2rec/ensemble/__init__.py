"""A teacher without a language model: trained students and item neighbours, asked together.

It writes what `llm2rec.teacher` writes, for `llm2rec.distill` to read, and is judged as other teachers are.
"""
