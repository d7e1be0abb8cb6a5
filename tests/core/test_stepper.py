"""Steps are atomic: non-finite losses and gradients, out-of-memory errors, loss spikes."""

import json
import logging
import re
from collections import Counter

import pytest
import torch
from accelerate import debug_launcher
from engine_helpers import RowsObjective, assert_same_weights, engine_in, out_of_memory_above, take_steps
from safetensors.torch import load_file
from torch import nn

from llm2rec.core.errors import ConfigError, NonFiniteError, OutOfMemoryError
from llm2rec.core.train.checkpoint import optimizer_tensors
from llm2rec.core.train.optimizer import adamw
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.trackers import SpikeDetector

N_ROWS = 24  # 3 steps an epoch


def network():
    """Dropout and running statistics, both of which a failed pass changes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))


def trained(engine, model=None, *, poison=None, start=0, stop=None, save=False):
    """Train a network over all rows; ``poison(step, rows, loss)`` may change the losses."""
    model = model or network()
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(N_ROWS, 5, generator=generator), torch.arange(N_ROWS) % 3
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.1, 0.0))
    if start:
        engine.load_checkpoint(model, optimizer)
    wrapped.train()

    def losses(wrapped, rows, step):
        values = nn.functional.cross_entropy(wrapped(inputs[rows]), targets[rows], reduction="none")
        return {"loss": poison(step, rows, values) if poison else values}

    for step, _ in take_steps(engine, wrapped, RowsObjective(N_ROWS, losses), optimizer, start, stop):
        if save:
            engine.save_checkpoint(model, optimizer, {"step": step.number + 1})
    return model, optimizer


SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1}


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_retry_equals_smaller_micro_batches(tmp_path, caplog, in_backward):
    model = network()
    seen = out_of_memory_above(model, 3, in_backward=in_backward)
    engine = engine_in(tmp_path / "lowered", micro_batch_size=8, **SETTINGS)
    with caplog.at_level(logging.WARNING):
        trained(engine, model)
    assert seen[:3] == [8, 4, 2]
    assert max(seen[3:]) == 2, "no step after it tries more again"
    assert engine.n_micro_batches == 4
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(";", 1)[1] for message in messages] == [
        f" retrying with micro_batch_size={half}; the effective batch size stays 8" for half in (4, 2)
    ]
    small, _ = trained(engine_in(tmp_path / "small", micro_batch_size=2, **SETTINGS))
    assert_same_weights(model.state_dict(), small.state_dict())  # running statistics too


def test_out_of_memory_at_a_later_step(tmp_path):
    """Earlier steps keep their effect."""

    def after_two(module, n_rows):
        fails = Counter()

        def hook(module, _, output):
            fails["passes"] += module.training
            if module.training and fails["passes"] > 2 and len(output) > n_rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        module.register_forward_hook(hook)

    model = network()
    after_two(model, 4)
    trained(engine_in(tmp_path / "lowered", micro_batch_size=8, **SETTINGS), model)
    expected = network()
    trained(engine_in(tmp_path / "first", micro_batch_size=8, **SETTINGS), expected, stop=2, save=True)
    (tmp_path / "rest").mkdir()
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "rest" / "checkpoints")
    expected, _ = trained(engine_in(tmp_path / "rest", micro_batch_size=4, **SETTINGS), start=2)
    assert_same_weights(model.state_dict(), expected.state_dict())


def test_resumed_run_keeps_the_reduced_micro_batch_size(tmp_path):
    def ended(folder, stop):
        model = network()
        out_of_memory_above(model, 4)
        trained(engine_in(tmp_path / folder, micro_batch_size=8, **SETTINGS), model, stop=stop, save=stop is not None)
        return model.state_dict()

    expected = ended("whole", None)
    ended("resumed", 3)
    engine = engine_in(tmp_path / "resumed", micro_batch_size=8, **SETTINGS)
    model, _ = trained(engine, start=3)  # on a GPU that would take more
    assert engine.n_micro_batches == 2
    assert_same_weights(model.state_dict(), expected)


def test_single_row_out_of_memory_raises_with_remedies(tmp_path):
    model = without_statistics()  # batch normalisation takes no single row
    seen = out_of_memory_above(model, 0)
    with pytest.raises(OutOfMemoryError, match=r"at step 0 with micro-batches of 1 rows \(CUDA.*use shorter histories"):
        trained(engine_in(tmp_path, micro_batch_size=8, **SETTINGS), model)
    assert seen == [8, 4, 2, 1]


def test_whole_steps_are_not_split(tmp_path):
    model, engine = network(), engine_in(tmp_path, micro_batch_size=8, **SETTINGS)
    out_of_memory_above(model, 4)
    engine.stepper.whole_steps = "distill.dros.in_ranking=broadcast"
    with pytest.raises(OutOfMemoryError, match=r"distill\.dros\.in_ranking=broadcast needs one micro-batch per step"):
        trained(engine, model)


def test_other_errors_are_not_retried(tmp_path):
    model = network()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(engine_in(tmp_path, micro_batch_size=8, **SETTINGS), model)
    assert len(seen) == 1


class BadBackward(torch.autograd.Function):
    """Keeps a loss and gives it a non-finite gradient."""

    @staticmethod
    def forward(ctx, losses):
        return losses.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def bad_loss(steps, row=None):
    return lambda step, rows, losses: losses * torch.nan if step in steps and (row is None or row in rows) else losses


def bad_gradient(steps):
    return lambda step, rows, losses: BadBackward.apply(losses) if step in steps else losses


@pytest.mark.parametrize(("poison", "what"), [(bad_loss([2]), "loss"), (bad_gradient([2]), "gradient norm")])
def test_non_finite_number_raises_with_step_and_examples(tmp_path, poison, what):
    model = network()
    expected, _ = trained(engine_in(tmp_path / "before", micro_batch_size=8, **SETTINGS), stop=2)
    with pytest.raises(NonFiniteError, match=rf"the {what} is not finite at step 2, over .* examples (\d+, ){{7}}\d+;"):
        trained(engine_in(tmp_path / "bad", micro_batch_size=8, **SETTINGS), model, poison=poison)
    assert_same_weights(model.state_dict(), expected.state_dict())


def test_only_the_micro_batch_with_the_bad_loss_is_reported(tmp_path):
    with pytest.raises(NonFiniteError, match=r"training examples (\d+, )?7(, \d+)?; lower"):
        trained(engine_in(tmp_path, micro_batch_size=2, **SETTINGS), poison=bad_loss(range(9), row=7))


@pytest.mark.parametrize("poison", [bad_loss([1, 4]), bad_gradient([1, 4])])
@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_skipped_step_changes_nothing(tmp_path, caplog, poison, micro_batch_size):
    """Weights, running statistics and Adam's averages are as without its rows."""
    settings = {**SETTINGS, "micro_batch_size": micro_batch_size, "nonfinite": "skip", "max_skipped": 2}
    with caplog.at_level(logging.WARNING):
        model, optimizer = trained(engine_in(tmp_path / "skipped", **settings), poison=poison)
    assert [record.getMessage().rsplit("; ", 1)[1] for record in caplog.records] == [
        f"skipped ({number} of at most 2)" for number in (1, 2)
    ]
    expected, other = without_steps([1, 4], engine_in(tmp_path / "without", **settings))
    assert_same_weights(model.state_dict(), expected.state_dict())
    assert_same_weights(optimizer_tensors(model, optimizer), optimizer_tensors(expected, other))


def without_steps(left_out, engine, model=None, stop=None):
    """A training without some of its steps."""
    whole = engine.steps
    engine.steps = lambda *arguments: (each for each in whole(*arguments) if each.number not in left_out)
    return trained(engine, model, stop=stop)


def test_max_skipped_applies_across_resumes(tmp_path):
    settings = {**SETTINGS, "micro_batch_size": 8, "nonfinite": "skip", "max_skipped": 1}
    trained(engine_in(tmp_path, **settings), poison=bad_loss([1]), stop=3, save=True)
    with pytest.raises(NonFiniteError, match=r"not finite at step 4,.*1 steps have been skipped already"):
        trained(engine_in(tmp_path, **settings), poison=bad_loss([4]), start=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonfinite": "ignore"}, r"`nonfinite` is 'ignore', expected 'stop' or 'skip'"),
        ({"max_skipped": -1}, "`max_skipped` is -1, expected 0 or more"),
        ({"spike_ratio": 0.5}, r"`spike_ratio` is 0\.5, expected 0 \(off\) or above 1"),
        ({"keep_checkpoints": 0}, "`keep_checkpoints` is 0, expected at least 1"),
    ],
)
def test_invalid_settings_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings(**changes)


def without_statistics():
    """Running statistics differ among processes."""
    model = network()
    model[1] = nn.Identity()
    return model


def together(folder):
    """In each of two processes: both react in the same way to an error of the second one."""
    torch.set_num_threads(1)
    model, engine = without_statistics(), engine_in(folder / "lowered", micro_batch_size=4, **SETTINGS)
    seen = out_of_memory_above(model, 2 if engine.rank == 1 else 99)
    trained(engine, model)
    assert seen[:2] == [4, 2]
    assert max(seen[1:]) == 2
    assert engine.n_micro_batches == 2
    small, _ = trained(engine_in(folder / "small", micro_batch_size=2, **SETTINGS), without_statistics())
    assert_same_weights(model.state_dict(), small.state_dict())

    bad = {**SETTINGS, "micro_batch_size": 2, "nonfinite": "skip", "max_skipped": 1}
    engine, model = engine_in(folder / "bad", **bad), without_statistics()
    with pytest.raises(NonFiniteError) as raised:
        trained(engine, model, poison=bad_loss([1, 3]) if engine.rank == 1 else None)
    (folder / f"message_{engine.rank}").write_text(str(raised.value))
    expected, _ = without_steps([1], engine_in(folder / "without", **bad), without_statistics(), stop=3)
    assert_same_weights(model.state_dict(), expected.state_dict())


@pytest.mark.slow
def test_processes_agree(tmp_path):
    debug_launcher(together, args=(tmp_path,), num_processes=2)
    first, second = ((tmp_path / f"message_{rank}").read_text() for rank in range(2))
    assert first == second
    assert re.search(r"step 3, over the training examples (\d+, ){3}\d+; .* 1 steps have been skipped already", first)


def test_spike_warns_once_relative_to_the_median(caplog):
    detector = SpikeDetector("loss", 10)
    values = [1.0] * 15 + [50.0] + [1.0] * 5 + [11.0, 12.0, float("nan"), 1.0, 9.0, 30.0]
    with caplog.at_level(logging.WARNING):
        spikes = [step for step, value in enumerate(values) if detector.add(value, step)]
    assert spikes == [21, 22, 26], "the first comes too early to know"
    assert [record.getMessage() for record in caplog.records] == [
        "step 21: the loss is 11, 11 times the median of the last 21 steps (1)",
        "step 26: the loss is 30, 30 times the median of the last 25 steps (1)",
    ]
    again = SpikeDetector("loss", 10)
    again.restore(json.loads(json.dumps(detector.to_dict())))
    assert again.to_dict() == detector.to_dict()
    assert not SpikeDetector("loss", 0).add(1e9, 0)


def test_median_follows_a_lasting_change():
    detector = SpikeDetector("loss", 10)
    spikes = [detector.add(1.0 if step < 64 else 20.0, step) for step in range(128)]
    assert 20 < sum(spikes) < 40, "until half of the window is new"
    assert detector.median == 20


def test_spikes_are_logged_and_detector_state_is_saved(tmp_path, caplog):
    settings = {**SETTINGS, "epochs": 7, "micro_batch_size": 8}
    with caplog.at_level(logging.WARNING):
        trained(
            engine_in(tmp_path, **settings),
            poison=lambda step, rows, losses: losses * (1e6 if step == 18 else 1),
            stop=19,
            save=True,
        )
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(" is ")[0] for message in messages] == [
        "step 18: the loss",
        "step 18: the gradient norm",
    ]
    state = json.loads((tmp_path / "checkpoints" / "step_000000019" / "state.json").read_text())
    assert len(state["steps"]["grad_norm"]["values"]) == 19


def test_checkpoint_of_a_skipped_step_has_finite_weights(tmp_path):
    settings = {**SETTINGS, "micro_batch_size": 8, "nonfinite": "skip"}
    trained(engine_in(tmp_path, **settings), poison=bad_loss([2]), stop=3, save=True)
    stored = load_file(tmp_path / "checkpoints" / "step_000000003" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in stored.values())
