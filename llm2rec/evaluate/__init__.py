"""Compare finished runs: test metrics, latency, tables, charts and a report."""
