"""Training on titles: the loss of an answer alone, candidates by seed and epoch, ranks among them, resumed the same."""

import json

import numpy as np
import pytest
import torch
from engine_helpers import Killed, killed_at
from teacher_helpers import split, teacher_rows
from title_helpers import KINDS, answer_text, title_log_prob, title_teacher

from llm2rec.core.errors import ConfigError
from llm2rec.core.metrics import ranking_metrics
from llm2rec.core.run import Run
from llm2rec.core.train.checkpoint import trainable_weights
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.evaluator import rank_answers
from llm2rec.teacher.settings import TeacherSettings
from llm2rec.teacher.title.objective import UNLISTED_CANDIDATES, TitleObjective
from llm2rec.teacher.trainer import train_teacher

TRAINING = {"epochs": 2, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 1.0}


def objective_of(model, data, engine, n_rows=24):
    train, validation = split(data), split(data, "validation")
    return TitleObjective(
        model,
        teacher_rows(model, train, np.arange(n_rows)),
        teacher_rows(model, validation, np.arange(len(validation))),
        engine,
    )


def fit(
    kind,
    data,
    llm_folder,
    folder,
    *,
    engine_kind=Engine,
    resume=None,
    teacher=None,
    curriculum="off",
    n_rows=24,
    **training,
):
    """Train a fresh teacher, or go on in the run folder ``resume``."""
    model, _ = title_teacher(kind, data, llm_folder, folder, **(teacher or {}))
    torch.manual_seed(0)
    training = TrainingSettings(**{**TRAINING, **training})
    engine = engine_kind(Run(resume or folder / "run", "teacher", {}), seed=1, training=training, tensorboard=False)
    settings = TeacherSettings(
        training=training,
        gate_learning_rate_ratio=1.0,
        prompts="hybrid" if model.is_hybrid else "text",
        recommender_run="x" if model.is_hybrid else None,
        curriculum=curriculum,
    )
    train_teacher(model, objective_of(model, data, engine, n_rows), engine, settings)
    return model


def history_of(folder):
    return json.loads((folder / "run" / "metrics" / "validation.json").read_text())["history"]


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_prompts_to_look_at_end_with_the_answer(data, llm_folder, tmp_path, engine):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path)
    objective, train = objective_of(model, data, engine), split(data)
    prompts = model.prompts.readable(objective.prompts(2))
    assert len(prompts) == 2
    for row, prompt in enumerate(prompts):
        answer = data.items[int(train.targets[row])]["title"]
        assert prompt.count(answer) == 2, "listed among the candidates, and answered"
        assert model.prompts.tokenizer.pad_token not in prompt.removesuffix(model.prompts.tokenizer.eos_token)


@pytest.mark.parametrize("redraw", [False, True])
def test_losses_are_of_the_answer_after_the_candidates_of_seed_and_epoch(data, llm_folder, tmp_path, engine, redraw):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, redraw_candidates=redraw)
    objective, train = objective_of(model, data, engine), split(data)
    micro = np.array([3, 17, 8])
    sampler, found = CandidateSampler(train, engine.seed, 5, split="train"), {}
    for epoch in (0, 1):
        with model.use_gates(torch.from_numpy(objective.train.gate_inputs[micro])):
            found[epoch] = objective.losses(model, micro, hybrid=False, epoch=epoch).detach()
        drawn = sampler.draw(micro, epoch if redraw else None)
        for row, number in enumerate(micro):
            (history, length), target = train.histories(np.array([number])), int(train.targets[number])
            n_tokens = len(model.prompts.answer_tokens()[target]) + 1
            own = history[:, : length[0]]
            expected = -title_log_prob(model, own, length, drawn[[row]], target) / n_tokens
            assert float(found[epoch][row]) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(found[0], found[1]) is not redraw


def test_rows_are_sorted_by_what_they_will_take(data, llm_folder, tmp_path, engine):
    counts = {}
    for redraw in (False, True):
        model, _ = title_teacher("ilora", data, llm_folder, tmp_path, redraw_candidates=redraw)
        counts[redraw] = objective_of(model, data, engine).train.token_counts
    train, rows = split(data), np.arange(24)
    (history, lengths), targets = train.histories(rows), train.targets.numpy()[rows]
    drawn = CandidateSampler(train, engine.seed, 5, split="train").draw(rows)
    for redraw, shown in ((False, drawn), (True, None)):
        tokens = model.prompts.questions(history, lengths, shown, targets)
        assert np.array_equal(counts[redraw], tokens.attention_mask.sum(dim=1))


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["ilora", "sequence gate, hybrid"])
def test_validation_ranks_every_answer_among_the_same_candidates(data, llm_folder, tmp_path, engine, kind, listed):
    model, _ = title_teacher(kind, data, llm_folder, tmp_path, n_candidates=5 if listed else 0)
    objective, validation = objective_of(model, data, engine), split(data, "validation")
    model.train()
    metrics = objective.validate()
    assert model.training
    assert objective.validate() == metrics  # neither dropout nor new candidates
    model.eval()
    n_candidates = 5 if listed else UNLISTED_CANDIDATES
    drawn = CandidateSampler(validation, engine.seed, n_candidates, split="validation").draw(np.arange(len(validation)))
    ranks = []
    for row, candidates in enumerate(drawn):
        (history, length), target = validation.histories(np.array([row])), int(validation.targets[row])
        own, shown = history[:, : length[0]], candidates[None] if listed else None
        scores = model.candidate_log_probs(own, length, shown, None, candidates[None])[0]
        better = scores >= scores[int(np.argmax(candidates == target))]
        ranks.append(int(better.sum()) - 1)
    assert len(set(ranks)) > 3
    assert metrics == pytest.approx(ranking_metrics(torch.tensor(ranks)))


def test_ranks_are_the_same_in_batches_of_any_size_and_of_some_rows(data, llm_folder, tmp_path, engine):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path)
    validation = split(data, "validation")
    sampler = CandidateSampler(validation, 7, 5, split="validation")
    every = teacher_rows(model, validation, np.arange(len(validation)))
    ranks = rank_answers(model, every, sampler, engine)
    assert torch.equal(rank_answers(model, every, sampler, engine, batch_tokens=1), ranks)
    some = np.array([20, 3, 11])
    assert torch.equal(rank_answers(model, teacher_rows(model, validation, some), sampler, engine), ranks[some])


def test_ranks_do_not_depend_on_the_processes(data, llm_folder, tmp_path, engine):
    """Blocks as two and as 40 processes have them: the last ones have no row at all."""
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path)
    validation = split(data, "validation")
    sampler = CandidateSampler(validation, 7, 5, split="validation")
    rows = teacher_rows(model, validation, np.arange(len(validation)))

    class Share:
        device = engine.device

        def __init__(self, mine):
            self.mine = mine

        def my_rows(self, n_rows):
            return self.mine

        def gather_rows(self, ranks, n_rows):
            return ranks

    whole = rank_answers(model, rows, sampler, engine)
    for n_processes in (2, 40):
        share = -(-len(validation) // n_processes)
        numbers = np.arange(len(validation))
        parts = [
            rank_answers(model, rows, sampler, Share(numbers[rank * share : (rank + 1) * share]))
            for rank in range(n_processes)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_catalogue_too_small_for_the_candidates_is_refused(data, llm_folder, tmp_path, engine):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, prompt={"max_tokens": 600}, n_candidates=45)
    with pytest.raises(ConfigError, match="`n_candidates` is 45, but a row may have only"):
        objective_of(model, data, engine)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_training_moves_what_is_to_be_trained_and_learns_the_answers(data, llm_folder, tmp_path, kind):
    before, _ = title_teacher(kind, data, llm_folder, tmp_path)
    before = {name: each.clone() for name, each in before.state_dict().items()}
    model = fit(kind, data, llm_folder, tmp_path, epochs=4)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    moved = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == trained
    losses = [entry["train/loss"] for entry in history_of(tmp_path)]
    assert losses[-1] < losses[0]
    assert {"hr@1", "ndcg@10", "mrr"} <= {name.removeprefix("val/") for name in history_of(tmp_path)[0]}


def test_micro_batches_change_nothing_but_memory(data, llm_folder, tmp_path):
    found = {}
    for micro in (16, 5, 1):
        folder = tmp_path / str(micro)
        options = {"teacher": {"dropout": 0}, "curriculum": "two_stage", "micro_batch_size": micro}
        fit("sequence gate, hybrid", data, llm_folder, folder, **options)
        found[micro] = [entry["train/loss"] for entry in history_of(folder)]
    for micro in (5, 1):
        assert found[micro] == pytest.approx(found[16], rel=1e-4)


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_training_ends_the_same(data, llm_folder, tmp_path, step):
    options = {
        "teacher": {"redraw_candidates": True},
        "curriculum": "two_stage",
        "checkpoint_every_steps": 1,
    }
    kind = "sequence gate, hybrid"
    whole = fit(kind, data, llm_folder, tmp_path / "whole", **options)
    with pytest.raises(Killed):
        fit(kind, data, llm_folder, tmp_path / "killed", engine_kind=killed_at(step), **options)
    resumed = fit(kind, data, llm_folder, tmp_path / "again", resume=tmp_path / "killed" / "run", **options)
    expected, found = trainable_weights(whole), trainable_weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", ["sequence gate, hybrid", "ilora"])
def test_what_was_learnt_by_heart_is_likeliest_and_is_written(data, llm_folder, tmp_path, kind):
    """Training, scoring and writing put the same prompts together, or what one learns the others would not find."""
    options = {"epochs": 120, "batch_size": 8, "learning_rate": 1e-2, "evaluate_every_steps": 120}
    model = fit(kind, data, llm_folder, tmp_path, n_rows=8, teacher={"dropout": 0}, **options)
    train, rows = split(data), np.arange(8)
    drawn = CandidateSampler(train, 1, 5, split="train").draw(rows)  # the seed of the run
    (history, lengths), targets = train.histories(rows), train.targets.numpy()[rows]
    likeliest = model.candidate_log_probs(history, lengths, drawn).argmax(dim=1).numpy()
    assert drawn[rows, likeliest].tolist() == targets.tolist()
    assert model.generate(history, lengths, drawn) == [answer_text(model.prompts, item) for item in targets]
