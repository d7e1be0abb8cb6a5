"""Estimates memory, time and disk of a job before it starts."""
