"""Training moves LoRA and gate alone, and gate inputs come from the cache."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import assert_same_weights, events_of, out_of_memory_above, texts_of, with_targets
from teacher_helpers import build, engine_in, fit, randomise, split, teacher_rows

from llm2rec.core.errors import ConfigError
from llm2rec.core.run import Run
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import prepare
from llm2rec.data.toy import Toy
from llm2rec.student.datamodule import Rows, SeenItems
from llm2rec.teacher.evaluator import rank_targets
from llm2rec.teacher.gate_cache import GateCache
from llm2rec.teacher.settings import ExportSettings, TeacherSettings

TRAINING = {"epochs": 3, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 1.0}


def train(model, data, folder, **changes):
    engine = engine_in(folder, **{**TRAINING, **changes})
    rows = [split(data, name) for name in ("train", "validation")]
    return fit(model, *(teacher_rows(model, each, np.arange(len(each))) for each in rows), engine)


def history(folder):
    return json.loads((folder / "metrics" / "validation.json").read_text())["history"]


def check_only_the_adapter_moved(model, before, vectors):
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".ilora_" in name for name in trained)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= trained
    # Every B and the gate; A too, whose gradient is zero in the first step only.
    assert moved == trained
    assert torch.equal(model.item_vectors, vectors)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_moves_lora_and_gate_alone_and_lowers_the_loss(kind, data, llm_folder, tmp_path):
    model, _ = build(kind, llm_folder, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vectors = model.item_vectors.clone()
    train(model, data, tmp_path)
    check_only_the_adapter_moved(model, before, vectors)
    losses = [entry["train/loss"] for entry in history(tmp_path)]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]


def test_int8_weights_stay_and_the_adapter_trains_on_a_cpu(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data, precision="int8")
    assert recipe.precision == "int8"
    quantised = [p for p in model.parameters() if p.dtype == torch.int8]
    assert len(quantised) == 14
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    train(model, data, tmp_path, epochs=2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    losses = [entry["train/loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]


def test_micro_batches_change_nothing_but_memory(data, llm_folder, tmp_path):
    found = {}
    for micro in (16, 5, 1):
        model = train(
            build("llama", llm_folder, data)[0], data, tmp_path / str(micro), epochs=1, micro_batch_size=micro
        )
        weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        found[micro] = weights, [entry["train/loss"] for entry in history(tmp_path / str(micro))]
    for micro in (5, 1):
        assert found[micro][1] == pytest.approx(found[16][1], rel=1e-5)
        for name, value in found[16][0].items():
            torch.testing.assert_close(found[micro][0][name], value, rtol=2e-3, atol=2e-4)


def test_no_epochs_leave_the_teacher_untrained(data, llm_folder, tmp_path):
    model, _ = build("llama", llm_folder, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, data, tmp_path, epochs=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_tensorboard_shows_gates_rates_speed_and_prompts(data, llm_folder, tmp_path):
    model, _ = build("llama", llm_folder, data)
    train_rows, validation_rows = (
        teacher_rows(model, each, np.arange(len(each))) for each in (split(data, "train"), split(data, "validation"))
    )
    training = TrainingSettings(**{**TRAINING, "epochs": 2})
    engine = Engine(Run(tmp_path, "teacher", {}), seed=1, training=training)
    fit(model, train_rows, validation_rows, engine)
    engine.close()

    shown = events_of(tmp_path)
    gates = {f"train/gate_use_{expert}" for expert in range(model.tuner.ilora_gate["default"].num_experts)}
    assert {*gates, "train/gate_entropy", "train/loss", "val/ndcg@10"} <= shown.keys()
    assert shown["learning_rate/ilora_gate"] == shown["learning_rate/rest"]
    for step, rows in shown["speed/rows_per_second"].items():
        tokens = shown["speed/tokens_per_second"][step]
        assert tokens / rows == pytest.approx(train_rows.token_counts.mean()), "every row once an epoch"
    prompts = texts_of(tmp_path)["prompts"].split("\n\n")
    assert len(prompts) == 3
    for row, prompt in enumerate(prompts):
        assert prompt.startswith("    ")
        history, lengths = train_rows.data.histories(np.array([row]))
        last = int(history[0, lengths[0] - 1])
        assert data.items[last]["title"] in prompt


def test_validation_ranks_equal_those_of_log_probs(data, llm_folder, tmp_path):
    model = randomise(build("llama", llm_folder, data)[0]).eval()
    rows = split(data, "validation")
    ranks = rank_targets(model, teacher_rows(model, rows, np.arange(len(rows))), engine_in(tmp_path), batch_tokens=150)
    log_probs = model.log_probs(*rows.histories())
    own = log_probs.gather(1, rows.targets.long().unsqueeze(1))
    assert torch.equal(ranks, (log_probs >= own).sum(dim=1) - 1)


def test_a_target_that_its_history_shows_is_ranked_where_what_was_seen_is_left_out(data, llm_folder, tmp_path):
    """As for students: the target is in the running, all that the user had before besides it is not."""
    model = randomise(build("llama", llm_folder, data)[0]).eval()
    rows = split(data, "validation")
    last = rows.histories()[0][np.arange(len(rows)), rows.lengths - 1]
    rows = with_targets(rows, last)
    seen = SeenItems(Rows.of(data, "validation"))
    asked = teacher_rows(model, rows, np.arange(len(rows)))
    ranks = rank_targets(model, asked, engine_in(tmp_path / "seen"), seen=seen)
    model.exclude_history = False
    everything = model.log_probs(*rows.histories())
    expected = []
    for row, target in enumerate(last.tolist()):
        left = set(range(data.n_items)) - set(seen.pairs(np.array([row]))[1].tolist()) - {target}
        expected.append(sum(bool(everything[row, item] >= everything[row, target]) for item in left))
    assert ranks.tolist() == expected
    model.exclude_history = True
    alone = rank_targets(model, asked, engine_in(tmp_path / "alone"))
    assert (alone.numpy() >= data.n_items - rows.lengths).all(), "the teacher excludes its history"


# ---- gate inputs -----------------------------------------------------------------------------------------------------


def cache_for(model, identity, engine, folder, block_rows=40):
    return GateCache(model, identity, engine, folder, block_rows=block_rows, batch_tokens=300)


def counted(monkeypatch, model, fails_after=None):
    """Count rows that the frozen base is asked for; optionally die after some batches."""
    calls, compute = [], model.frozen_vectors

    def frozen_vectors(tokens):
        if fails_after is not None and len(calls) >= fails_after:
            raise KeyboardInterrupt
        calls.append(len(tokens.input_ids))
        return compute(tokens)

    monkeypatch.setattr(model, "frozen_vectors", frozen_vectors)
    return calls


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_cached_gates_equal_gates_computed_on_the_fly(kind, data, llm_folder, engine, tmp_path):
    model, recipe = build(kind, llm_folder, data)
    train_rows, numbers = split(data), np.arange(0, len(split(data)), 2)
    cached = cache_for(model, recipe.identity, engine, tmp_path / "cache").rows(train_rows, numbers)
    direct = teacher_rows(model, train_rows, numbers)
    np.testing.assert_allclose(cached.gate_inputs, direct.gate_inputs, rtol=1e-4, atol=1e-5)
    assert cached.token_counts.tolist() == direct.token_counts.tolist()
    gates = [model.tuner.gate(torch.from_numpy(each.gate_inputs)) for each in (cached, direct)]
    torch.testing.assert_close(*gates, rtol=1e-4, atol=1e-5)


def test_a_second_look_up_computes_nothing(data, llm_folder, engine, tmp_path, monkeypatch):
    model, recipe = build("llama", llm_folder, data)
    rows, numbers = split(data), np.arange(len(split(data)))
    calls = counted(monkeypatch, model)
    cache = cache_for(model, recipe.identity, engine, tmp_path / "cache")
    first = cache.rows(rows, numbers)
    assert sum(calls) == len(numbers)
    again = cache_for(randomise(model), recipe.identity, engine, tmp_path / "cache").rows(rows, numbers)
    assert sum(calls) == len(numbers)
    assert np.array_equal(again.gate_inputs, first.gate_inputs)

    block = sorted(tmp_path.glob("cache/*/block_*.npy"))[1]
    np.save(block, np.zeros_like(np.load(block)))
    altered = cache.rows(rows, numbers).gate_inputs
    assert (altered[40:80] == 0).all()
    assert np.array_equal(altered[:40], first.gate_inputs[:40])

    block.unlink()
    assert np.array_equal(cache.rows(rows, numbers).gate_inputs, first.gate_inputs)
    assert sum(calls) == len(numbers) + 40


def test_a_pass_that_was_killed_goes_on_at_the_next_block(data, llm_folder, engine, tmp_path, monkeypatch):
    model, recipe = build("llama", llm_folder, data)
    rows, numbers = split(data), np.arange(len(split(data)))
    whole = cache_for(model, recipe.identity, engine, tmp_path / "whole").rows(rows, numbers)
    cache = cache_for(model, recipe.identity, engine, tmp_path / "cache")
    with monkeypatch.context() as patch:
        counted(patch, model, fails_after=8)
        with pytest.raises(KeyboardInterrupt):
            cache.rows(rows, numbers)
    done = len(list(tmp_path.glob("cache/*/block_*.npy")))
    assert done >= 1
    assert not [path for path in tmp_path.glob("cache/*/.*")]
    calls = counted(monkeypatch, model)
    assert np.array_equal(cache.rows(rows, numbers).gate_inputs, whole.gate_inputs)
    assert sum(calls) == len(numbers) - 40 * done


def test_other_titles_prompts_and_blocks_have_their_own_gate_inputs(data, llm_folder, engine, tmp_path):
    rows, numbers = split(data), np.arange(20)
    model, recipe = build("bert", llm_folder, data)
    cache_for(model, recipe.identity, engine, tmp_path / "cache").rows(rows, numbers)

    items = data.items.map(lambda row: {"title": f"{row['title']} again"}, load_from_cache_file=False)
    others = [
        build("bert", llm_folder, replace(data, items=items)),
        build("bert", llm_folder, data, prompt={"separator": ","}),
        build("bert", llm_folder, data, prompt={"max_items": 1}),
        build("bert", llm_folder, data, prompt={"prefix": "These:"}),
    ]
    for count, (other, its_recipe) in enumerate(others, start=2):
        found = cache_for(other, its_recipe.identity, engine, tmp_path / "cache").rows(rows, numbers)
        np.testing.assert_allclose(found.gate_inputs, teacher_rows(other, rows, numbers).gate_inputs, atol=1e-4)
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_another_dataset_has_its_own_gate_inputs(data, llm_folder, engine, tmp_path):
    other = prepare(Toy(n_users=30, n_items=48, n_worlds=4, min_length=5, max_length=9, seed=1), tmp_path / "other")
    for count, each in enumerate((data, other), start=1):
        model, recipe = build("llama", llm_folder, each)
        cache_for(model, recipe.identity, engine, tmp_path / "cache").rows(split(each), np.arange(10))
        assert len(list((tmp_path / "cache").iterdir())) == count


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "rating"}, "teacher.objective is 'rating', expected one of item, title"),
        ({"precision": "float16"}, "teacher.precision is 'float16', expected one of auto"),
        ({"train_rows": 0}, "teacher.train_rows is 0"),
        ({"validation_rows": -1}, "teacher.validation_rows is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TeacherSettings(**settings)


@pytest.mark.parametrize("settings", [{"confidence": "logit"}, {"top_k": 0}, {"block_rows": 0}, {"batch_tokens": 0}])
def test_export_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=r"teacher\.export"):
        ExportSettings(**settings)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_gpu_that_is_too_small_trains_the_same_teacher_as_smaller_micro_batches(
    in_backward, data, llm_folder, tmp_path
):
    """Held gates, their dropout and that of the experts, and the loss about a whole step included."""
    adapter = {"dropout": 0.1, "gate": "dropout"}
    expected, _ = build("llama", llm_folder, data, adapter=adapter)
    rows = [teacher_rows(expected, split(data, name), np.arange(24)) for name in ("train", "validation")]
    settings = {**TRAINING, "epochs": 1, "batch_size": 8}
    fit(expected, *rows, engine_in(tmp_path / "small", **{**settings, "micro_batch_size": 2}), balance_loss=0.5)
    model, _ = build("llama", llm_folder, data, adapter=adapter)
    seen = out_of_memory_above(model, 2, in_backward=in_backward)
    fit(model, *rows, engine_in(tmp_path / "lowered", **{**settings, "micro_batch_size": 8}), balance_loss=0.5)
    assert [n_rows for n_rows in seen if n_rows > 1][:3] == [8, 4, 2]  # the dry run has one row
    assert_same_weights(model.state_dict(), expected.state_dict())
    assert history(tmp_path / "lowered") == history(tmp_path / "small")
