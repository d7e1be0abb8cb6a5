"""TensorBoard files of a run, read back."""

import numpy as np
import pytest
import torch
from engine_helpers import RowsObjective, events_of, texts_of, time_goes_by
from torch import nn

from llm2rec.core.host_memory import resident_bytes
from llm2rec.core.run import Run
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import fit
from llm2rec.core.train.optimizer import adamw
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.trackers import Throughput, memory_in_use

N_ROWS = 11


def trained(folder, tensorboard=True):
    """A run of two epochs, evaluated after each; returns its weights."""
    torch.manual_seed(0)
    model, inputs = nn.ModuleDict({"body": nn.Linear(5, 4), "head": nn.Linear(4, 3)}), torch.randn(N_ROWS, 5)
    run, training = Run.start(folder, "student", {"seed": 0}), TrainingSettings(epochs=2, batch_size=4)
    engine = Engine(run, seed=0, training=training, tensorboard=tensorboard)

    def losses(_, rows, step):
        engine.count(tokens=10 * len(rows))
        outputs = model["head"](torch.tanh(model["body"](inputs[rows])))
        return {"loss": outputs.square().mean(dim=1), "loss_part": outputs[:, 0]}

    objective = RowsObjective(N_ROWS, losses, validate=lambda step: {"ndcg@10": step / 10})
    fit(model, objective, engine, adamw(model, 0.01, 0.0, {"head": 0.5}), description="test")
    engine.log_text("recommendations", "| a | b |")
    engine.close()
    return model.state_dict()


class TestOneRun:
    def test_numbers(self, tmp_path):
        trained(tmp_path)
        shown = events_of(tmp_path)
        assert {name.split("/")[0] for name in shown} == {"train", "val", "learning_rate", "speed", "memory"}
        assert all(list(values) == [3, 6] for values in shown.values()), "one value at each evaluation"
        assert {"train/loss", "train/loss_part", "train/grad_norm"} <= shown.keys()
        assert shown["val/ndcg@10"] == pytest.approx({3: 0.3, 6: 0.6})
        assert shown["learning_rate/rest"] == pytest.approx({3: 1e-3, 6: 1e-3})
        assert shown["learning_rate/head"] == pytest.approx({3: 5e-4, 6: 5e-4})
        rows, tokens = (shown[f"speed/{name}_per_second"] for name in ("rows", "tokens"))
        assert all(tokens[step] == pytest.approx(10 * rows[step]) for step in rows)
        assert shown["memory/process_gib"][6] == pytest.approx(resident_bytes() / 2**30, rel=0.5)

    def test_texts(self, tmp_path):
        trained(tmp_path)
        assert texts_of(tmp_path) == {"recommendations": "| a | b |"}

    def test_logging_does_not_change_weights(self, tmp_path):
        shown, quiet = trained(tmp_path / "shown"), trained(tmp_path / "quiet", tensorboard=False)
        assert all(torch.equal(shown[name], quiet[name]) for name in quiet)
        assert not (tmp_path / "quiet" / "tensorboard").exists()


def test_throughput_excludes_time_between_steps(monkeypatch):
    clock, throughput = time_goes_by(monkeypatch, "llm2rec.core.train.trackers"), Throughput()
    for _ in range(4):
        with throughput.timed():
            clock.wait(0.5)
        throughput.count(rows=3)
        clock.wait(100)
    assert throughput.scalars() == {"speed/rows_per_second": 6.0}
    assert throughput.scalars() == {}, "counted once"


def test_memory_in_use():
    before = memory_in_use(torch.device("cpu"))["memory/process_gib"]
    held = np.ones(2**28, np.uint8)
    grown = memory_in_use(torch.device("cpu"))["memory/process_gib"] - before
    assert grown == pytest.approx(held.nbytes / 2**30, rel=0.1)
