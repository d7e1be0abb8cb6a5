"""The Hydra configuration. This file makes the folder a package, which the wheel carries as `llm2rec.conf`."""
