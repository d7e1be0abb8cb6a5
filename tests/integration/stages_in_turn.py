"""A program: run stages one after the other in the processes of one launch, and note the gradients of each step.

    torchrun --nproc-per-node 2 stages_in_turn.py JOBS.json

The file holds a list of ``[folder, stage, overrides]``. Starting the libraries takes longer than such stages, so that
all of a test's stages share it. Each stage is the command that a user types; its folder gets ``norms.json``, the norm
of the gradient of each optimizer step, before clipping, and ``held.json``, how many of the frozen numbers the first
process holds between two passes.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.tensor import DTensor

from llm2rec.core.train.stepper import Stepper

NORMS: list[float] = []
HELD: list[int] = []


def held(parameter):
    """Numbers of a parameter in this process's memory: of a sharded one, its part."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if getattr(parameter, "ds_numel", 0) > parameter.numel() else parameter.numel()


class WatchedStepper:
    """What is added to `Stepper`."""

    clip = Stepper.clip_gradients

    def clip_gradients(self):
        WatchedStepper.clip(self)
        NORMS.append(float(self._total))
        HELD.append(sum(held(each) for each in self._model.parameters() if not each.requires_grad))


def main(jobs):
    Stepper.clip_gradients = WatchedStepper.clip_gradients
    PartialState.destroy_process_group = lambda *_: None  # the next stage goes on in it
    for folder, stage, overrides in jobs:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        NORMS.clear()
        HELD.clear()
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        sys.argv = [f"llm2rec.{stage}", *overrides]
        import_module(f"llm2rec.{stage}.__main__").main()
        if int(os.environ.get("RANK", "0")) == 0:
            (Path(folder) / "norms.json").write_text(json.dumps(NORMS))
            (Path(folder) / "held.json").write_text(json.dumps(HELD))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
