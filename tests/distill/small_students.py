"""Small students to distil, and how to train them."""

from dataclasses import replace

import torch
from distill_helpers import teacher_for
from engine_helpers import (
    engine_in,
    random_rows,
)

from llm2rec.core.train.engine import Engine
from llm2rec.distill.selection_policy import SelectionPolicyAll
from llm2rec.distill.settings import (
    DistillSettings,
    DLLM2RecCodeSettings,
    EmbeddingSettings,
    RankingSettings,
)
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.models import build_model

N, L, K = 12, 4, 5
TRAIN, VALIDATION = random_rows(37, N, L), random_rows(20, N, L, seed=1)
TEACHER = teacher_for(len(TRAIN), N, K)
TRAINING = {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "learning_rate": 0.01}


def settings_of(*, ranking=0.5, fusion=0.3, alignment=0.0, kind="cosine", top_k=4):
    return DistillSettings(
        teacher_outputs="unused",
        ranking=RankingSettings(weight=ranking, top_k=top_k),
        embedding=EmbeddingSettings(fusion_scale=fusion, alignment_weight=alignment, alignment=kind),
    )


def code(**changes):
    """Settings of `distill=dllm2rec_code` at test sizes; overrides by dotted name."""
    settings = DLLM2RecCodeSettings(teacher_outputs="unused")
    for name, value in {"ranking.top_k": 4, **changes}.items():
        group, _, key = name.rpartition(".")
        part = getattr(settings, group) if group else settings
        changed = replace(part, **{key: value})
        settings = replace(settings, **{group: changed}) if group else changed
    return settings


WHOLE_STEPS = {"batch_size": 8, "micro_batch_size": 8}  # what the program's broadcast needs


def plain(seed=0, tie_items=True, name="sasrec"):
    torch.manual_seed(seed)
    return build_model(name, n_items=N, width=16, max_length=L, dropout=0.2, tie_items=tie_items)


def distilled(settings, seed=0, teacher=TEACHER, name="sasrec"):
    return DistilledStudent(
        plain(seed, not settings.embedding.unties, name),
        teacher.embeddings,
        fusion_scale=settings.embedding.fusion_scale,
        align=settings.embedding.alignment_weight > 0,
        fusion_sides=settings.embedding.fusion_sides,
        alignment_sides=settings.embedding.alignment_sides,
        initialise=settings.embedding.initialise,
    )


def train_in(folder, settings, *, kind=Engine, seed=0, policy=None, teacher=TEACHER, name="sasrec", **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    model = distilled(settings, seed, teacher, name)
    return train_distilled(model, TRAIN, teacher, VALIDATION, policy or SelectionPolicyAll(), engine, settings)
