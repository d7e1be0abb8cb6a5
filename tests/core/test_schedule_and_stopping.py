import math

import pytest

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.optimizer import warmup_cosine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.core.train.state import EarlyStopping


def test_linear_warmup_and_cosine_decay():
    rates = [warmup_cosine(step, max_steps=10, warmup_steps=4, lr=1.0, min_lr=0.1) for step in range(11)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[7] == pytest.approx(0.55)  # half-way down
    assert rates[10] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 6)))


def test_rate_is_constant_after_the_last_step():
    assert warmup_cosine(99, max_steps=10, warmup_steps=0, lr=1.0, min_lr=0.2) == pytest.approx(0.2)


def test_warmup_start_above_zero_over_the_whole_training():
    rates = [warmup_cosine(s, max_steps=2, warmup_steps=2, lr=1.0, warmup_start_lr=0.5) for s in range(3)]
    assert rates == pytest.approx([0.5, 0.75, 1.0])


def test_equal_rates_are_constant():
    assert {warmup_cosine(s, max_steps=7, warmup_steps=0, lr=0.3, min_lr=0.3) for s in range(9)} == {0.3}


def test_stops_after_patience_evaluations_without_improvement():
    stopping = EarlyStopping(patience=2)
    outcomes = [(stopping.update(value, step), stopping.should_stop) for step, value in enumerate([0.1, 0.3, 0.3, 0.2])]
    assert outcomes == [(True, False), (True, False), (False, False), (False, True)]  # equal is no gain
    assert (stopping.best, stopping.best_step) == (0.3, 1)


def test_improvement_resets_the_patience():
    stopping = EarlyStopping(patience=2)
    for step, value in enumerate([0.1, 0.0, 0.2, 0.0]):
        stopping.update(value, step)
    assert (stopping.waited, stopping.should_stop) == (1, False)


def test_nan_is_never_the_best():
    stopping = EarlyStopping(patience=1)
    assert not stopping.update(math.nan, 1)
    assert stopping.best is None
    assert stopping.should_stop


def test_stopping_state_round_trip():
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    for step, value in enumerate([0.5, 0.4, 0.3]):
        first.update(value, step)
    second.restore(first.to_dict())
    assert second == first
    assert second.update(0.4, 9) is False
    assert second.should_stop


def test_evaluation_without_patience():
    stopping = EarlyStopping(patience=1)
    stopping.update(0.5, 0)
    assert stopping.update(0.4, 1, uses_patience=False) is False
    assert not stopping.should_stop
    assert stopping.update(0.6, 2, uses_patience=False) is True, "the best is the best"
    stopping.update(0.4, 3)
    assert stopping.should_stop


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("min_learning_rate_ratio", 1.5),
        ("warmup_ratio", -0.1),
        ("warmup_start_ratio", 1.5),
        ("weight_decay", -1.0),
        ("max_grad_norm", -1.0),
        ("patience", 0),
        ("evaluate_every_steps", -1),
        ("checkpoint_every_steps", -1),
    ],
)
def test_invalid_training_setting_raises_with_its_value(name, value):
    with pytest.raises(ConfigError, match=rf"`{name}` is {value}, expected "):
        TrainingSettings(**{name: value})


def test_training_settings_report_all_problems():
    with pytest.raises(ConfigError, match=r"`batch_size` is 0.*`patience` is 0"):
        TrainingSettings(batch_size=0, patience=0)


def test_steps_of_evaluations_and_checkpoints():
    settings = TrainingSettings(epochs=2, batch_size=4, evaluate_every_steps=0, checkpoint_every_steps=2)
    steps = range(1, 7)  # 10 rows make 3 steps an epoch
    assert settings.steps_per_epoch(10) == 3
    assert [step for step in steps if settings.evaluation_is_due(step, 10)] == [3, 6]
    assert [step for step in steps if settings.checkpoint_is_due(step, 10)] == [2, 3, 4, 6]
    often = TrainingSettings(epochs=2, batch_size=4, evaluate_every_steps=4)
    assert [step for step in steps if often.evaluation_is_due(step, 10)] == [4, 6]  # and after the very last step
    assert [step for step in steps if often.checkpoint_is_due(step, 10)] == [4, 6]
