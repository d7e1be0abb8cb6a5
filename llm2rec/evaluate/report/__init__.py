"""The report of a comparison: ``report.html``, ``report.md`` and ``report.json``."""
