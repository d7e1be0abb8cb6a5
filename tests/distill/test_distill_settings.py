"""Validation of the distillation settings."""

import math

import pytest

from llm2rec.core.errors import ConfigError
from llm2rec.distill.settings import DistillSettings, DrosSettings, EmbeddingSettings, RankingSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -0.1}, r"must not be negative, got weight=-0\.1"),
        ({"gamma_consistency": -1.0}, r"must not be negative.*-1\.0"),
        ({"gamma_position": 0.0, "gamma_confidence": 0.0}, r"both 0.*set one of them, or .*`weight: 0`"),
        ({"top_k": 0}, r"expected top_k >= 1 and beta > 0, got 0 and 1\.0"),
        ({"beta": 0.0}, r"expected top_k >= 1 and beta > 0, got 10 and 0\.0"),
        ({"weight_floor": -1e-8}, r"weight_floor is -1e-08, expected 0 \(none\) or more"),
        ({"weight_floor": math.nan}, "weight_floor is nan"),
        ({"confidence": "both"}, r"ranking\.confidence is 'both', expected 'per_candidate' or 'per_row'"),
        (
            {"negative": "two"},
            r"ranking\.negative is 'two', expected 'none', 'one_minus_score' or 'one_minus_probability'",
        ),
        ({"loss": "bpr"}, r"ranking\.loss is 'bpr', expected 'weighted_bce', 'listwise', 'ranknet' or 'margin'"),
        ({"over": "all"}, r"ranking\.over is 'all', expected 'catalogue', 'sampled' or 'candidates'"),
        ({"temperature": 0.0}, r"positive `temperature` and `margin`, got 0\.0 and 1\.0"),
        ({"margin": math.nan}, r"positive `temperature` and `margin`, got 1\.0 and nan"),
        (
            {"loss": "listwise", "negative": "one_minus_score"},
            r"negative \(with loss=listwise\) is 'one_minus_score', expected 'none'",
        ),
        (
            {"loss": "ranknet", "negative": "one_minus_score"},
            r"negative \(with loss=ranknet\) is 'one_minus_score', expected 'none' or 'ranked_last'",
        ),
        ({"negative": "ranked_last"}, r"ranking\.negative is 'ranked_last'"),
        ({"loss": "listwise", "over": "candidates", "top_k": 1}, r"`top_k` is 1, so the loss is always 0"),
        ({"loss": "margin", "top_k": 1}, r"'margin', which needs pairs, but `top_k` is 1.*negative=ranked_last"),
    ],
)
def test_invalid_ranking_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        RankingSettings(**settings)


def test_gammas_may_be_zero_without_ranking_loss_or_with_a_floor():
    RankingSettings(weight=0.0, gamma_position=0.0, gamma_confidence=0.0)
    RankingSettings(weight_floor=1e-8, gamma_position=0.0, gamma_confidence=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"dros: expected weight >= 0.*got -1\.0, 0\.05 and 1\.0"),
        ({"beta": 0.0}, r"beta > 0, got 0\.0, 0\.05 and 0\.0"),
        ({"propensity_power": -1.0}, "propensity_power >= 0"),
        ({"in_ranking": "yes"}, r"dros\.in_ranking is 'yes', expected 'none', 'per_row' or 'broadcast'"),
    ],
)
def test_invalid_dros_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        DrosSettings(**settings)


def test_unknown_task_loss_raises():
    with pytest.raises(ConfigError, match=r"task_loss is 'bpr', expected 'student', 'cross_entropy' or 'sampled_bce'"):
        DistillSettings(task_loss="bpr")


def test_dros_in_ranking_requires_weighted_bce():
    with pytest.raises(ConfigError, match=r"'per_row', which requires .*loss=weighted_bce, but that is 'listwise'"):
        DistillSettings(ranking=RankingSettings(loss="listwise"), dros=DrosSettings(in_ranking="per_row"))


@pytest.mark.parametrize(
    ("embedding", "teaches"),
    [({}, False), ({"fusion_scale": -0.1}, True), ({"alignment_weight": 0.1}, True), ({"initialise": "pca"}, True)],
)
def test_teaches_is_true_if_any_part_uses_the_teacher(embedding, teaches):
    given = EmbeddingSettings(**{"fusion_scale": 0.0, **embedding})
    assert DistillSettings(ranking=RankingSettings(weight=0.0), embedding=given).teaches == teaches
    assert DistillSettings(embedding=given).teaches


def test_gammas_are_checked_for_weighted_bce_only():
    RankingSettings(loss="listwise", gamma_position=0.0, gamma_confidence=0.0)
    with pytest.raises(ConfigError, match="`gamma_position` and `gamma_confidence` are both 0"):
        RankingSettings(gamma_position=0.0, gamma_confidence=0.0)


@pytest.mark.parametrize(("sides", "scale"), [("input", 0.0), ("output", 0.3), ("input", 0.3)])
def test_one_sided_fusion_unties_tables_at_any_scale(sides, scale):
    assert EmbeddingSettings(fusion_sides=sides, fusion_scale=scale).unties
    assert not EmbeddingSettings(fusion_scale=scale).unties


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "l1"}, "alignment is 'l1', expected 'mse', 'cosine' or 'contrastive'"),
        ({"fusion_sides": "neither"}, "fusion_sides is 'neither', expected 'both', 'input' or 'output'"),
        ({"alignment_sides": "neither"}, "alignment_sides is 'neither', expected 'input', 'output' or 'both'"),
        ({"alignment_temperature": 0.0}, r"alignment_temperature is 0\.0, expected a positive number"),
        ({"initialise": "random"}, "initialise is 'random', expected 'none', 'pca' or 'whitened'"),
        ({"alignment_weight": -1.0}, r"alignment_weight is -1\.0, expected 0 or more"),
    ],
)
def test_invalid_embedding_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        EmbeddingSettings(**settings)
