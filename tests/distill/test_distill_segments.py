"""Teacher outputs are matched to their rows when a segment predicts many rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_helpers import teacher_for
from engine_helpers import (
    Killed,
    assert_same_weights,
    engine_in,
    examples_of,
    killed_at,
    random_rows,
    sequences_of,
    written,
)

from llm2rec.core.train.engine import Engine
from llm2rec.distill.selection_evidence import StudentNow
from llm2rec.distill.selection_policy import SelectionPolicy
from llm2rec.distill.settings import DistillSettings, DLLM2RecCodeSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model

N, L, K = 12, 4, 5
VALIDATION = random_rows(20, N, L, seed=1)
PAPER = DistillSettings(
    teacher_outputs="unused",
    ranking=RankingSettings(top_k=4, confidence="per_row", consistency_dropout=False),
    embedding=EmbeddingSettings(alignment_weight=0.4),
)
PROGRAM = DLLM2RecCodeSettings(teacher_outputs="unused")
PROGRAM = replace(PROGRAM, ranking=replace(PROGRAM.ranking, top_k=4))


class Uneven(SelectionPolicy):
    """Different weights for all rows and epochs."""

    def weights(self, evidence):
        return np.linspace(0, 1 + evidence.epoch, evidence.n_rows, dtype=np.float32)


def users(longest):
    generator = np.random.default_rng(0)
    return [generator.integers(N, size=generator.integers(2, longest + 1)).tolist() for _ in range(14)]


def segments_of(sequences):
    return Rows.from_tables(examples_of(sequences, L), sequences_of(sequences), N, L).in_segments()


def train_in(folder, train, settings, *, name="sasrec", kind=Engine, model_seed=0, dropout=0.0, **training):
    torch.manual_seed(model_seed)
    changes = {"positions": "oldest"} if name == "sasrec" else {}
    student = build_model(
        name, n_items=N, width=16, max_length=L, dropout=dropout, tie_items=not settings.embedding.unties, **changes
    )
    teacher = teacher_for(len(train), N, K)
    model = DistilledStudent(
        student,
        teacher.embeddings,
        fusion_scale=settings.embedding.fusion_scale,
        align=settings.embedding.alignment_weight > 0,
        fusion_sides=settings.embedding.fusion_sides,
    )
    engine = engine_in(folder, kind=kind, learning_rate=0.01, **training)
    return train_distilled(model, train, teacher, VALIDATION, Uneven(), engine, settings)


@pytest.mark.parametrize("settings", [PAPER, PROGRAM], ids=["paper", "program"])
@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_losses_are_those_of_windows_where_batches_agree(tmp_path, name, settings):
    """One step per epoch, so both use the same rows; every sequence fits into one segment."""
    sequences = users(L + 1)
    windows = Rows.from_tables(examples_of(sequences, L), sequences_of(sequences), N, L)
    for folder, train in (("windows", windows), ("segments", segments_of(sequences))):
        train_in(tmp_path / folder, train, settings, name=name, epochs=4, batch_size=1000, micro_batch_size=1000)
    ours, theirs = (written(tmp_path / folder, "validation")["history"] for folder in ("segments", "windows"))
    for mine, other in zip(ours, theirs, strict=True):
        losses = {key: value for key, value in mine.items() if key.startswith("train/loss")}
        assert len(losses) == 4
        assert losses == pytest.approx({key: other[key] for key in losses}, rel=1e-4)


def test_killed_and_resumed_run_equals_uninterrupted_run(tmp_path):
    train = segments_of(users(11))
    changes = {"epochs": 2, "batch_size": 12, "micro_batch_size": 5, "dropout": 0.2, "checkpoint_every_steps": 3}
    whole = train_in(tmp_path / "whole", train, PAPER, **changes)
    with pytest.raises(Killed):
        train_in(tmp_path / "broken", train, PAPER, kind=killed_at(5), **changes)
    resumed = train_in(tmp_path / "broken", train, PAPER, model_seed=7, **changes)
    assert_same_weights(resumed.state_dict(), whole.state_dict())
    assert written(tmp_path / "broken", "validation") == written(tmp_path / "whole", "validation")


@pytest.mark.parametrize("labelled", [None, 3], ids=["all labelled", "every third"])
def test_policy_sees_the_same_rows_with_segments_and_windows(tmp_path, labelled):
    sequences = users(L + 1)
    windows = Rows.from_tables(examples_of(sequences, L), sequences_of(sequences), N, L)
    teacher = teacher_for(len(windows), N, K)
    if labelled is not None:
        kept = np.arange(0, len(windows), labelled)
        teacher = replace(teacher, ranking=teacher.ranking[kept], distance=teacher.distance[kept], labelled=kept)
    torch.manual_seed(0)
    model = build_model("sasrec", n_items=N, width=16, max_length=L, positions="oldest")
    engine = engine_in(tmp_path)

    def asked(train):
        now = StudentNow(model, train, VALIDATION, teacher, engine, lambda logits, **_: logits.sum(dim=1), batch_size=7)
        return now.each_row(
            lambda scored: scored.logits.gather(1, scored.targets[:, None])[:, 0] + scored.teacher_batch.ranking[:, 0]
        )

    np.testing.assert_allclose(asked(segments_of(sequences)), asked(windows), rtol=1e-5)
