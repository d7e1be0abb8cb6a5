"""The training loop: equal to the textbook loop, one host read per step, resumable after a kill."""

import json
import os
import signal
from collections import Counter
from functools import partial

import pytest
import torch
from engine_helpers import Killed, RowsObjective, assert_same_weights, engine_in, killed_at, time_goes_by
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm2rec.core.errors import CheckpointError, Interrupted
from llm2rec.core.processes import Termination
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import fit, train_step
from llm2rec.core.train.optimizer import adamw

N_ROWS, EPOCHS = 30, 3
SETTINGS = {"epochs": EPOCHS, "batch_size": 8, "learning_rate": 0.05, "max_grad_norm": 0.5}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


INPUTS = torch.randn(N_ROWS, 5, generator=torch.Generator().manual_seed(1)).double()
TARGETS = torch.arange(N_ROWS) % 3


def losses(model, rows, step):
    return {"loss": nn.functional.cross_entropy(model(INPUTS[rows]), TARGETS[rows], reduction="none")}


def trained(folder, kind=None, validate=lambda step: {"ndcg@10": float(step)}, **settings):
    """Weights after `fit`, and the run's validation history."""
    model, arguments = network(), {} if kind is None else {"kind": kind}
    engine = engine_in(folder, **arguments, **{**SETTINGS, **settings})
    objective = RowsObjective(N_ROWS, losses, validate=validate)
    fit(model, objective, engine, adamw(model, 0.05, 0.0), description="test")
    return model, json.loads((folder / "metrics" / "validation.json").read_text())


@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_fit_equals_the_textbook_loop(tmp_path, micro_batch_size):
    model, written = trained(tmp_path, micro_batch_size=micro_batch_size)
    expected, engine = network(), engine_in(tmp_path / "order", **SETTINGS)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05, weight_decay=0.0)
    means, rows = [], 0
    for step in engine.steps(RowsObjective(N_ROWS, losses).units):
        loss = nn.functional.cross_entropy(expected(INPUTS[step.units]), TARGETS[step.units])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        means.append((step.epoch, loss.item() * len(step.units)))
        rows += len(step.units)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    logged = [entry["train/loss"] for entry in written["history"]]
    by_epoch = [sum(loss for number, loss in means if number == epoch) / N_ROWS for epoch in range(EPOCHS)]
    assert logged == pytest.approx(by_epoch, rel=1e-9)
    assert (rows, written["best_step"]) == (EPOCHS * N_ROWS, 12)


def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, written = trained(tmp_path / "whole", checkpoint_every_steps=1)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", killed_at(6), checkpoint_every_steps=1)
    resumed, again = trained(tmp_path / "killed", checkpoint_every_steps=1)
    assert_same_weights(whole.state_dict(), resumed.state_dict())
    assert written == again


def test_the_history_is_written_after_every_evaluation(tmp_path):
    """A search reads it while the run goes on."""
    file, seen = tmp_path / "metrics" / "validation.json", []

    def validate(step):
        seen.append(len(json.loads(file.read_text())["history"]) if file.is_file() else None)
        return {"ndcg@10": float(step)}

    trained(tmp_path, validate=validate)
    assert seen == [None, 1, 2]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers and sizes read from tensors."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name().split(".")[0]
        if name in self.READS:
            self.counts[name] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("micro_batch_size", [8, 1])
def test_step_synchronises_with_the_device_once(tmp_path, micro_batch_size):
    """`Tensor.tolist` of the step's three numbers, whatever the number of micro-batches."""
    model = network()
    engine = engine_in(tmp_path, micro_batch_size=micro_batch_size, **SETTINGS)
    objective = RowsObjective(N_ROWS, losses)
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.05, 0.0))
    steps = engine.steps(objective.units)
    train_step(wrapped, objective, engine, optimizer, next(steps), 12)
    lists, read = [], torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(len(tensor)) or read(tensor))
        train_step(wrapped, objective, engine, optimizer, next(steps), 12)
    steps.close()
    assert not reads.counts
    assert lists == [3]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_training_after_its_step_which_is_stored(tmp_path, number, name):
    class SignalledEngine(Engine):
        def begin_step(self, step, *arguments, **options):
            if step == 6 and not self.has_checkpoint:
                os.kill(os.getpid(), number)
            return super().begin_step(step, *arguments, **options)

    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in a shell's background
    with pytest.raises(Interrupted, match=f"{name} received; step 7 is stored") as caught:
        trained(tmp_path / "ended", SignalledEngine, evaluate_every_steps=50)
    assert caught.value.signal_number == number
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_does_not_wait(monkeypatch):
    clock = time_goes_by(monkeypatch, "llm2rec.core.processes")
    clock.now = 5.0
    termination = Termination()
    with termination.awaited():
        for _ in range(2):  # from the terminal, and again from the launcher of several processes
            os.kill(os.getpid(), signal.SIGINT)
        clock.wait(5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert termination.received == {signal.SIGINT}


@pytest.mark.parametrize(("every", "best_step"), [(2, 2), (50, 6)])
def test_a_run_can_be_finished_with_what_it_has_trained(tmp_path, every, best_step):
    """With its best weights, or, if it was never evaluated, with those of its checkpoint."""

    def validate(step):
        return {"ndcg@10": float(-step)}

    settings = {"evaluate_every_steps": every, "checkpoint_every_steps": 2}
    with pytest.raises(Killed):
        trained(tmp_path, killed_at(6), validate=validate, **settings)
    finished, written = trained(tmp_path, partial(Engine, finish=True), validate=validate, **settings)
    assert (written["steps"], written["best_step"]) == (6, best_step)
    expected, _ = trained(tmp_path / "other", validate=validate, evaluate_every_steps=best_step)
    assert_same_weights(finished.state_dict(), expected.state_dict())
    assert json.loads((tmp_path / "run.json").read_text())["ended_early"] is True


def test_nothing_trained_cannot_be_finished(tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint to finish with"):
        trained(tmp_path, partial(Engine, finish=True))
