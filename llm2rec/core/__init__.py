"""What every stage stands on: errors, paths, metrics, seeds, the run folder and the engine over Accelerate."""
