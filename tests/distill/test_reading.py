"""Students that read: trained, resumed and served."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_helpers import teacher_for
from engine_helpers import (
    Killed,
    assert_same_weights,
    engine_in,
    killed_at,
    random_rows,
    sequence_data,
    written,
)
from small_students import TEACHER, TRAIN, TRAINING, VALIDATION, L, N, plain

from llm2rec.core.errors import ConfigError
from llm2rec.core.train.engine import Engine
from llm2rec.distill.__main__ import distilled_student, preparation_of, reads_texts
from llm2rec.distill.selection_policy import SelectionPolicyAll
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.models import MODELS

UNTRAINED = torch.arange(N) >= N - 3
FORMS = {
    "projection": EmbeddingSettings(fusion_scale=3.0, fusion_unit="ids", whitening=0.5, id_dropout=0.4),
    "frozen": EmbeddingSettings(fusion_scale=2.0, fusion="frozen", components=3, id_dropout=0.4),
}


def settings_of(form, **changes):
    embedding = replace(FORMS[form], **changes)
    return DistillSettings(teacher_outputs="unused", ranking=RankingSettings(weight=0.0), embedding=embedding)


def reader(settings, seed=0, name="sasrec", tie_items=True):
    preparation = preparation_of(settings.embedding, TEACHER)
    return distilled_student(plain(seed, tie_items, name), TEACHER, settings.embedding, preparation, UNTRAINED)


def train_in(folder, settings, *, kind=Engine, model=None, seed=0, **changes):
    engine, model = engine_in(folder, kind=kind, **{**TRAINING, **changes}), model or reader(settings, seed)
    return train_distilled(model, TRAIN, TEACHER, VALIDATION, SelectionPolicyAll(), engine, settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("killed_before", "every"), [(2, 0), (8, 3)])
def test_a_resumed_run_drops_the_same_ids(tmp_path, form, killed_before, every):
    settings = settings_of(form)
    whole = train_in(tmp_path / "whole", settings, checkpoint_every_steps=every)
    broken = tmp_path / "broken"
    with pytest.raises(Killed):
        train_in(broken, settings, kind=killed_at(killed_before), checkpoint_every_steps=every)
    resumed = train_in(broken, settings, seed=7 if every else 0, checkpoint_every_steps=every)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert written(broken, "validation") == written(tmp_path / "whole", "validation")
    without = train_in(tmp_path / "without", settings_of(form, id_dropout=0.0), checkpoint_every_steps=every)
    assert not torch.equal(without.student.input_items.weight, whole.student.input_items.weight)


@pytest.mark.parametrize("form", FORMS)
def test_all_micro_batches_of_a_step_drop_the_same_ids(tmp_path, form):
    settings, trained = settings_of(form), []
    for size in (8, 3):
        model = reader(settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.student.last_block.dropout = 0.0
        train_in(tmp_path / str(size), settings, model=model, micro_batch_size=size)
        trained.append([entry["train/loss"] for entry in written(tmp_path / str(size), "validation")["history"]])
    assert trained[1] == pytest.approx(trained[0], rel=1e-5)


def test_dropped_ids_depend_on_the_seed_alone_and_are_a_share_of_all():
    model, other = (reader(settings_of("projection"), seed) for seed in (0, 1))

    def dropped(reading, seed):
        reading.drop_ids(seed)
        (table,) = reading.reading_tables
        return table._dropped

    shares = torch.stack([dropped(model, seed) for seed in range(200)]).float()
    assert shares.mean().item() == pytest.approx(0.4, abs=0.05)
    assert (shares.mean(dim=0) - 0.4).abs().max() < 0.15  # of every item
    assert torch.equal(dropped(model, 5), dropped(other, 5))
    assert not torch.equal(dropped(model, 5), dropped(model, 6))


@pytest.mark.parametrize("form", FORMS)
def test_untied_tables_drop_the_same_ids(form):
    model = reader(settings_of(form), tie_items=False)
    model.drop_ids(3)
    first, second = model.reading_tables
    assert torch.equal(first._dropped, second._dropped)


@pytest.mark.parametrize("tie_items", [True, False])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", FORMS)
def test_served_weights_score_as_the_trained_model(tmp_path, form, name, tie_items):
    settings = settings_of(form)
    model = reader(settings, name=name, tie_items=tie_items)
    before = {key: table.vectors().detach().clone() for key, table in model.student.item_tables.items()}
    model = train_in(tmp_path, settings, model=model, epochs=1)
    served = plain(0, tie_items, name)
    served.load_served(model.train().student.weights_to_serve())  # the mode does not matter
    assert model.training
    model.eval(), served.eval()
    inputs = VALIDATION.batch(np.arange(10)).inputs
    torch.testing.assert_close(served.score(served(*inputs)), model.score(model(*inputs)))
    vectors = preparation_of(settings.embedding, TEACHER)(TEACHER.embeddings)
    for key, table in served.item_tables.items():
        alone = vectors @ getattr(model.student, key).vector_map().T
        torch.testing.assert_close(table.vectors()[UNTRAINED], alone[UNTRAINED])
        if form == "frozen":
            assert torch.equal(table.vectors()[:, :3], before[key][:, :3])  # over all of the training
        assert not torch.equal(table.vectors()[~UNTRAINED], before[key][~UNTRAINED])


def test_a_student_that_reads_finds_items_that_training_never_showed(tmp_path):
    """Items of a pair have one text. Training shows one of each pair; validation wants the other."""
    generator, n_pairs = np.random.default_rng(0), 10
    texts = torch.from_numpy(generator.normal(size=(n_pairs, 16))).float().repeat(2, 1)
    teacher = replace(teacher_for(200, 2 * n_pairs, 5), embeddings=texts)

    def following(n_rows, shift):
        starts, lengths = generator.integers(n_pairs, size=n_rows), generator.integers(1, L + 1, size=n_rows)
        walks = [(start + np.arange(length + 1)) % n_pairs for start, length in zip(starts, lengths, strict=True)]
        return sequence_data([(walk[:-1].tolist(), int(walk[-1]) + shift) for walk in walks], 2 * n_pairs, L)

    train, wanted = following(200, 0), following(60, n_pairs)
    assert torch.equal(train.occurring(), torch.arange(2 * n_pairs) < n_pairs)
    found = {}
    for name, embedding in (("reads", FORMS["projection"]), ("ids", EmbeddingSettings(fusion_scale=0.0))):
        settings = DistillSettings(ranking=RankingSettings(weight=0.0), embedding=embedding)
        torch.manual_seed(0)
        model = distilled_student(
            MODELS["sasrec"](2 * n_pairs, 16, L, positions="recent"),
            teacher,
            embedding,
            preparation_of(embedding, teacher),
            ~train.occurring() if name == "reads" else None,
        )
        engine = engine_in(tmp_path / name, epochs=25, batch_size=40, micro_batch_size=40, learning_rate=0.02)
        train_distilled(model, train, teacher, wanted, SelectionPolicyAll(), engine, settings)
        found[name] = max(entry["val/hr@5"] for entry in written(tmp_path / name, "validation")["history"])
    assert found["reads"] > 0.8
    assert found["ids"] < 0.5


@pytest.mark.parametrize("in_segments", [False, True])
def test_items_that_occur_in_training(in_segments):
    rows = random_rows(9, 50, 4)
    rows = rows.in_segments() if in_segments else rows
    expected = {int(item) for history, length in zip(*rows.histories(), strict=True) for item in history[:length]}
    expected |= set(rows.targets.tolist())
    assert torch.nonzero(rows.occurring()).flatten().tolist() == sorted(expected)


def test_items_before_the_histories_do_not_occur():
    rows = sequence_data([([7, 8, 1, 2, 3], 4), ([5], 1)], 12, 3)
    assert torch.nonzero(rows.occurring()).flatten().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("manifest", "n_encoders"),
    [
        ({}, 0),
        ({"vectors": [{"kind": "titles", "width": 5, "text": {"name": "minilm"}}]}, 1),
        ({"vectors": [{"kind": "titles", "width": 2, "text": {}}, {"kind": "titles", "width": 3, "text": {}}]}, 2),
        ({"vectors": [{"kind": "titles", "width": 2, "text": {}}, {"kind": "items", "width": 3}]}, 0),
        ({"vectors": "titles"}, 0),
        ({"vectors": ["titles"]}, 0),
    ],
)
def test_only_vectors_of_titles_alone_are_texts(manifest, n_encoders):
    teacher = replace(TEACHER, manifest=manifest)
    assert len(teacher.encoders) == n_encoders
    both = EmbeddingSettings(fusion_scale=0.3)
    assert reads_texts(both, teacher) == (n_encoders > 0)
    assert reads_texts(replace(both, id_dropout=0.1), teacher)
    assert not reads_texts(replace(both, fusion_scale=0.0), teacher)
    assert not reads_texts(replace(both, fusion_sides="input"), teacher)


def test_options_of_before_prepare_and_train_as_before(tmp_path):
    """Without whitening, components and dropout the student is the one of earlier versions, bit for bit."""
    settings = DistillSettings(embedding=EmbeddingSettings(fusion_scale=0.3))
    preparation = preparation_of(settings.embedding, TEACHER)
    assert preparation.components is None
    assert preparation_of(replace(settings.embedding, standardise=False), TEACHER) is None
    model = distilled_student(plain(), TEACHER, settings.embedding, preparation)
    (table,) = model.reading_tables
    model.drop_ids(0)
    assert (table._dropped, table._has_own) == (None, None)
    torch.manual_seed(0)
    expected = plain().input_items.weight
    assert not torch.equal(table.weight, expected)  # a fused table draws its own
    centred = TEACHER.embeddings - TEACHER.embeddings.mean(dim=0)
    assert torch.equal(model.teacher_vectors, torch.nn.functional.normalize(centred, dim=1))
    assert torch.equal(table.vectors(), table.weight[:N] + 0.3 * table.projection(table.teacher_vectors)[:N])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "concat"}, "fusion is 'concat', expected 'projection' or 'frozen'"),
        ({"fusion_unit": "text"}, "fusion_unit is 'text', expected 'map' or 'ids'"),
        ({"whitening": 1.5}, r"whitening is 1\.5, expected 0 \(none\) to 1 \(full\)"),
        ({"whitening": math.nan}, "whitening is nan"),
        ({"components": 0}, "components is 0, expected at least 1, or null"),
        ({"id_dropout": 1.0}, r"id_dropout is 1\.0, expected 0 to below 1"),
        ({"id_dropout": 0.5, "fusion_sides": "input"}, r"id_dropout is 0\.5, but `fusion_sides` is 'input'"),
        ({"fusion": "frozen"}, r"'frozen', which needs the number of frozen columns \(`components`\)"),
        ({"fusion": "frozen", "components": 4, "standardise": False}, "got 4, False and 'none'"),
        ({"fusion": "frozen", "components": 4, "initialise": "pca"}, "got 4, True and 'pca'"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EmbeddingSettings(**changes)


def test_frozen_columns_must_leave_room_for_ids():
    wide = replace(TEACHER, embeddings=torch.randn(N, 30))
    settings = EmbeddingSettings(fusion="frozen", components=11)  # N items have 11 components
    student = MODELS["sasrec"](N, 10)
    with pytest.raises(ConfigError, match=r"'frozen' with 11 columns, but item vectors have 10; lower"):
        distilled_student(student, wide, settings, preparation_of(settings, wide))
