"""Answers of finished students: the best items for a history, in ids and titles; exports for other programs."""

from llm2rec.recommend.recommender import Recommendation, Recommender

__all__ = ["Recommendation", "Recommender"]
