import re

import pytest
import torch
from engine_helpers import (
    Killed,
    assert_same_weights,
    counting_rows,
    engine_in,
    killed_at,
    out_of_memory_above,
    random_rows,
    written,
)
from safetensors.torch import load_file

from llm2rec.core.errors import CheckpointError, NonFiniteError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.train.engine import Engine
from llm2rec.student.evaluator import rank_targets
from llm2rec.student.models import build_model
from llm2rec.student.trainer_baseline import train_baseline

N, L = 12, 4
BUILD = {"sasrec": {"n_blocks": 1}, "gru4rec": {"hidden_width": 16}, "caser": {}}
SETTINGS = {"epochs": 3, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01, "max_grad_norm": 0.5}
SETTINGS |= {"min_learning_rate_ratio": 0.1, "warmup_ratio": 0.2, "weight_decay": 0.1}
TRAIN, VALIDATION = random_rows(37, N, L), random_rows(20, N, L, seed=1)  # 5 steps an epoch, the last with 5 rows


def student(name="sasrec", seed=0):
    torch.manual_seed(seed)
    return build_model(name, n_items=N, width=16, max_length=L, dropout=0.2, **BUILD[name])


def train_in(
    folder, *, kind=Engine, name="sasrec", seed=0, model_seed=0, train=TRAIN, validation=VALIDATION, **changes
):
    engine = engine_in(folder, kind=kind, seed=seed, **{**SETTINGS, **changes})
    return train_baseline(student(name, model_seed), train, validation, engine)


@pytest.mark.parametrize("name", BUILD)
def test_a_simple_pattern_is_learnt(tmp_path, name):
    settings = {"epochs": 40, "batch_size": 64, "micro_batch_size": 64, "learning_rate": 0.02}
    engine = engine_in(tmp_path, **settings)
    model = train_baseline(student(name), counting_rows(256, N, L), counting_rows(40, N, L, seed=1), engine)
    assert not model.training
    metrics = ranking_metrics(rank_targets(model, counting_rows(60, N, L, seed=2), engine))
    assert metrics["hr@1"] == 1
    history = written(tmp_path, "validation")["history"]
    assert history[-1]["train/loss"] < history[0]["train/loss"] / 2


def test_first_loss_is_that_of_random_guessing(tmp_path):
    train_in(tmp_path, epochs=1, learning_rate=1e-9)
    loss = written(tmp_path, "validation")["history"][0]["train/loss"]
    assert loss == pytest.approx(torch.tensor(float(N)).log().item(), rel=0.01)  # a mean over rows, in nats


@pytest.mark.parametrize(
    ("killed_before", "checkpoint_every_steps", "resumed_from"),
    [
        (1, 0, None),  # before the first checkpoint: from the start again
        (5, 0, 5),  # right after an epoch's checkpoint
        (8, 0, 5),
        (8, 2, 8),  # in the middle of an epoch, losses half summed up
        (14, 3, 12),
    ],
)
@pytest.mark.parametrize("name", BUILD)
def test_killed_and_resumed_run_equals_uninterrupted_run(
    tmp_path, caplog, name, killed_before, checkpoint_every_steps, resumed_from
):
    changes = {"name": name, "checkpoint_every_steps": checkpoint_every_steps}
    whole = train_in(tmp_path / "whole", **changes)
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        train_in(broken, kind=killed_at(killed_before), **changes)
    caplog.set_level("INFO")
    resumed = train_in(broken, model_seed=0 if resumed_from is None else 7, **changes)  # weights come from the file
    assert re.findall(r"resuming at step_(\d+)", caplog.text) == (
        [] if resumed_from is None else [f"{resumed_from:09d}"]
    )
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    ours, theirs = (written(folder, "validation") for folder in (broken, tmp_path / "whole"))
    assert ours == theirs
    assert [entry["step"] for entry in ours["history"]] == [5, 10, 15]
    assert load_file(broken / "best.safetensors").keys() == load_file(tmp_path / "whole" / "best.safetensors").keys()


def test_run_killed_twice_equals_uninterrupted_run(tmp_path):
    whole = train_in(tmp_path / "whole", checkpoint_every_steps=1)
    for step in (3, 11):
        with pytest.raises(Killed):
            train_in(tmp_path / "broken", kind=killed_at(step), checkpoint_every_steps=1)
    resumed = train_in(tmp_path / "broken", model_seed=3, checkpoint_every_steps=1)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


def test_run_killed_between_best_weights_and_checkpoint_equals_uninterrupted_run(tmp_path):
    class KilledWhenSaving(Engine):
        def save_checkpoint(self, model, optimizer, state):
            if state["step"] == 10:
                raise Killed
            super().save_checkpoint(model, optimizer, state)

    whole = train_in(tmp_path / "whole")
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", kind=KilledWhenSaving)
    assert_same_weights(train_in(tmp_path / "broken", model_seed=3).state_dict(), whole.state_dict())
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


def test_training_depends_only_on_the_seed(tmp_path):
    first, same, other = (
        train_in(tmp_path / folder, seed=seed, epochs=1) for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same_weights(first.state_dict(), same.state_dict())
    assert not torch.equal(first.input_items.weight, other.input_items.weight)


def test_micro_batches_do_not_change_training(tmp_path):
    weights = []
    for micro in (8, 3, 1):
        engine = engine_in(tmp_path / str(micro), **{**SETTINGS, "epochs": 2, "micro_batch_size": micro})
        model = student("gru4rec")
        model.dropout.p = 0.0  # which rows are dropped does depend on the division
        weights.append(train_baseline(model, TRAIN, VALIDATION, engine).state_dict())
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0], rtol=1e-4, atol=1e-5)


def test_early_stopping_keeps_the_best_weights(tmp_path):
    engine = engine_in(tmp_path, **{**SETTINGS, "epochs": 100, "patience": 3, "learning_rate": 0.05})
    model = train_baseline(student(), TRAIN, VALIDATION, engine)
    told = written(tmp_path, "validation")
    values = [entry["val/ndcg@10"] for entry in told["history"]]
    best = max(range(len(values)), key=values.__getitem__)
    assert len(values) == best + 4 < 100  # three evaluations without a gain, then the end
    assert told["best"] == values[best]
    assert told["best_step"] == told["history"][best]["step"]
    assert ranking_metrics(rank_targets(model, VALIDATION, engine))["ndcg@10"] == pytest.approx(values[best])
    assert_same_weights(
        load_file(tmp_path / "best.safetensors"),
        {name: p.detach() for name, p in model.named_parameters()},
    )


def test_stopped_run_stays_stopped_when_resumed(tmp_path):
    changes = {"epochs": 100, "patience": 2, "learning_rate": 0.05}
    first = train_in(tmp_path, **changes)
    told = written(tmp_path, "validation")
    again = train_in(tmp_path, model_seed=5, **changes)
    assert_same_weights(again.state_dict(), first.state_dict())
    assert written(tmp_path, "validation") == told


def test_zero_epochs_leave_the_student_unchanged(tmp_path):
    model = train_in(tmp_path, epochs=0)
    assert_same_weights(model.state_dict(), student().state_dict())
    assert written(tmp_path, "validation")["best"] is None
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_within_an_epoch(tmp_path):
    train_in(tmp_path, epochs=2, evaluate_every_steps=4)
    assert [entry["step"] for entry in written(tmp_path, "validation")["history"]] == [4, 8, 10]


def test_select_on_selects_the_weights(tmp_path):
    engine = engine_in(tmp_path, **SETTINGS)
    train_baseline(student(), TRAIN, VALIDATION, engine, select_on="hr@1")
    told = written(tmp_path, "validation")
    assert told["select_on"] == "hr@1"
    assert told["best"] == max(entry["val/hr@1"] for entry in told["history"])


def test_resuming_another_model_raises(tmp_path):
    train_in(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train_in(tmp_path, epochs=1, name="gru4rec")


def test_diverging_run_raises_with_the_step_and_keeps_its_checkpoint(tmp_path):
    engine = engine_in(tmp_path, **{**SETTINGS, "checkpoint_every_steps": 1})
    model = student()
    calls = []

    def poison(*_):
        calls.append(None)
        if len(calls) == 8:  # 3 micro-batches a step: in the third step
            model.input_items.weight.data[0] = torch.nan

    model.register_forward_pre_hook(poison)
    with pytest.raises(
        NonFiniteError, match=r"the loss is not finite at step 2, over the training examples \d+(, \d+)*; lower"
    ):
        train_baseline(model, TRAIN, VALIDATION, engine)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "step_000000002"
    assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_retry_equals_smaller_micro_batches(tmp_path, in_backward):
    expected = train_in(tmp_path / "small", micro_batch_size=2)
    model, engine = student(), engine_in(tmp_path / "lowered", **{**SETTINGS, "micro_batch_size": 8})
    seen = out_of_memory_above(model, 2, in_backward=in_backward)
    train_baseline(model, TRAIN, VALIDATION, engine)
    assert seen[:3] == [8, 4, 2]
    assert_same_weights(model.state_dict(), expected.state_dict())
    assert written(tmp_path / "lowered", "validation") == written(tmp_path / "small", "validation")


def test_training_continues_after_skipped_steps(tmp_path):
    model, engine = student(), engine_in(tmp_path, **{**SETTINGS, "nonfinite": "skip", "max_skipped": 1})
    calls = []

    def poison(module, _, users):
        calls.append(None)
        return users * torch.nan if len(calls) == 8 else users  # in the third step

    model.register_forward_hook(poison)
    train_baseline(model, TRAIN, VALIDATION, engine)
    history = written(tmp_path, "validation")["history"]
    assert [entry["step"] for entry in history] == [5, 10, 15]
    assert all(entry["train/loss"] == entry["train/loss"] for entry in history)
