"""Finished runs side by side: test metrics, latency, a table and a picture."""
