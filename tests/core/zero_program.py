"""Program for a test: train with a group that is frozen in some steps, stop in the middle, and resume."""

import sys
from pathlib import Path

import torch
from engine_helpers import RowsObjective, engine_in, take_steps
from safetensors.torch import save_file
from torch import nn

from llm2rec.core.train.optimizer import adamw

N_ROWS, N_STEPS = 12, 9
FROZEN = (0, 1, 4, 5)  # steps; from the very first, when there is no state yet


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.projector = nn.Linear(5, 7), nn.Linear(5, 7)
        self.projector.bias.requires_grad_(False)  # so that sizes do not divide by the number of processes

    def forward(self, inputs, with_projector):
        hidden = self.body(inputs)
        return hidden + self.projector(inputs) if with_projector else hidden + 0 * self.projector.weight.sum()


def train(folder, steps):
    """Resume from the checkpoint in ``folder``, if there is one, up to the last of ``steps``; returns the model."""
    engine = engine_in(folder, epochs=N_STEPS, batch_size=N_ROWS, micro_batch_size=3, learning_rate=0.05)
    torch.manual_seed(0)
    model = Model()
    inputs, targets = torch.randn(N_ROWS, 5), torch.randn(N_ROWS, 7)
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.05, 0.1, {"projector": 1.0}))
    state = engine.load_checkpoint(model, optimizer)

    def losses(wrapped, rows, step):
        return {"loss": (wrapped(inputs[rows], step not in FROZEN) - targets[rows]).square().mean(dim=1)}

    objective = RowsObjective(N_ROWS, losses, frozen=lambda step: ("projector",) if step in FROZEN else ())
    for _ in take_steps(engine, wrapped, objective, optimizer, 0 if state is None else state["step"], stop=steps):
        pass
    engine.save_checkpoint(model, optimizer, {"step": steps})
    return engine, model


def main(folder, stops):
    """Train up to each of the steps in ``stops``, with new objects each time."""
    for steps in stops:
        engine, model = train(folder, steps)
    if engine.is_main:
        save_file(
            {name: weight.detach().clone() for name, weight in model.named_parameters()}, folder / "end.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(steps) for steps in sys.argv[2:]])
