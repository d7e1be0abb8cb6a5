"""A real engine in a run folder, rows made by hand, and ways to stop a run in the middle."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset

from llm2rec.core.run import Run
from llm2rec.core.train.batching import TrainingUnits
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.loop import Validation, train_step
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data.recdata import SEQUENCE_FEATURES
from llm2rec.data.splitting import EXAMPLE_FEATURES
from llm2rec.student.datamodule import Rows


@pytest.fixture
def fresh_processes():
    """Forget the state that Accelerate keeps per process, so that each test opens its engines like a new launch."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()  # of tests elsewhere: processes that a test forks would take it over
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def engine_in(folder, *, kind=Engine, seed=0, **training):
    """Open an engine the way a stage does, without TensorBoard and progress lines."""
    run = Run.start(folder, "student", {"seed": seed})
    return kind(run, seed=seed, training=TrainingSettings(**training), tensorboard=False)


class RowsObjective:
    """An `Objective` over rows ``0..n_rows-1``.

    Args:
        n_rows: Training rows.
        losses: Gives losses by name from the wrapped model, row numbers ``(B,)`` and the step.
        validate: Gives metrics from the steps done.
        frozen: Gives the frozen parameter groups of a step.
    """

    def __init__(self, n_rows, losses, validate=lambda step: {"ndcg@10": 0.0}, frozen=lambda step: ()):
        self.units = TrainingUnits(np.arange(n_rows))
        self._losses, self._validate, self._frozen = losses, validate, frozen

    def begin_step(self, step):
        return self._frozen(step.number)

    @contextmanager
    def losses(self, model, micro):
        yield self._losses(model, micro.units, micro.step)

    def example_ids(self, micro):
        return micro.units

    def validate(self, step):
        return Validation(self._validate(step))


def take_steps(engine, wrapped, objective, optimizer, start=0, stop=None):
    """The steps of `fit` alone, without evaluations and checkpoints; yields each step and its losses."""
    n_steps = engine.max_steps(objective.units.n_rows)
    for step in engine.steps(objective.units, start):
        if step.number == stop:
            return
        with engine.timed(step):
            losses = train_step(wrapped, objective, engine, optimizer, step, n_steps)
        yield step, losses


class Killed(Exception):
    """What takes the place of SIGKILL; nothing catches it."""


def killed_at(step):
    """An engine whose process ends just before global step ``step``."""

    class KilledEngine(Engine):
        def begin_step(self, number, *arguments, **options):
            if number == step:
                raise Killed
            return super().begin_step(number, *arguments, **options)

    return KilledEngine


def sequence_data(rows, n_items, max_length):
    """Rows ``(history, target)``, each the sequence of a user of its own."""
    items = np.array([item for history, target in rows for item in (*history, target)], np.int32)
    positions = np.array([len(history) for history, _ in rows])
    starts = np.cumsum(positions + 1) - positions - 1
    return Rows(items, np.arange(len(rows)), positions, starts, n_items, max_length)


def with_targets(rows, targets):
    """The same histories with other targets."""
    histories = zip(*rows.histories(), targets, strict=True)
    made = [(history[:length].tolist(), int(target)) for history, length, target in histories]
    return sequence_data(made, rows.n_items, rows.max_length)


def counting_rows(n_rows, n_items, max_length, seed=0):
    """Rows in which each item is followed by the next number: learnt in a few steps."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(n_rows):
        start, length = generator.integers(n_items), generator.integers(1, max_length + 1)
        items = [int(start + i) % n_items for i in range(length + 1)]
        rows.append((items[:-1], items[-1]))
    return sequence_data(rows, n_items, max_length)


def random_rows(n_rows, n_items, max_length, seed=0):
    """Rows without any pattern, so that validation goes up and down."""
    generator = np.random.default_rng(seed)
    rows = [
        (
            generator.integers(n_items, size=generator.integers(1, max_length + 1)).tolist(),
            int(generator.integers(n_items)),
        )
        for _ in range(n_rows)
    ]
    return sequence_data(rows, n_items, max_length)


def examples_of(sequences, history_length, held_out=0):
    """All prefixes of all users but the last ``held_out``, as `llm2rec.data` would write them."""
    rows = [
        {
            "example_id": 0,
            "user_id": str(user),
            "user_index": user,
            "position": position,
            "history": items[max(0, position - history_length) : position],
            "target": items[position],
            "timestamp": position,
        }
        for user, items in enumerate(sequences)
        for position in range(1, len(items) - held_out)
    ]
    rows = [row | {"example_id": number} for number, row in enumerate(rows)]
    return Dataset.from_list(rows, features=EXAMPLE_FEATURES)


def sequences_of(sequences):
    """The users' whole sequences, as `llm2rec.data` would write them."""
    rows = [
        {"user_index": user, "user_id": str(user), "items": items, "timestamps": list(range(len(items)))}
        for user, items in enumerate(sequences)
    ]
    return Dataset.from_list(rows, features=SEQUENCE_FEATURES)


def written(folder, name):
    """A run's ``metrics/<name>.json``."""
    return json.loads((folder / "metrics" / f"{name}.json").read_text())


def assert_same_weights(ours, theirs):
    """Compare two state dicts bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def out_of_memory_above(module, n_rows, *, in_backward=False):
    """Let training passes of more rows than this end as on a GPU that is too small; returns the rows of each pass.

    The error comes once the pass has drawn its dropout and moved its running statistics, or from its backward pass.
    """
    seen = []

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.")

    def hook(module, _, output):
        if module.training:
            seen.append(len(output))
            if len(output) > n_rows:
                output.register_hook(fail) if in_backward else fail()

    module.register_forward_hook(hook)
    return seen


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # a second, for few tests

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def events_of(folder):
    """The numbers in a run's TensorBoard files: name -> step -> value."""
    events = _events(folder)
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]}


def texts_of(folder):
    """The texts in a run's TensorBoard files by name, the last of each."""
    events = _events(folder)
    return {
        name.removesuffix("/text_summary"): events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        for name in events.Tags()["tensors"]
    }


def time_goes_by(monkeypatch, module):
    """A clock in the place of a module's ``time``, which stands still but for its ``wait``."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = clock.monotonic = lambda: clock.now

    def wait(seconds):
        clock.now += seconds

    clock.wait = wait
    monkeypatch.setattr(f"{module}.time", clock)
    return clock
