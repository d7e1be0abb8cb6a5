"""Answers of finished runs: the best items for a history, in ids and titles; exports for other programs."""

from llm2rec.recommend.names import Recommendation
from llm2rec.recommend.recommender import Recommender

__all__ = ["Recommendation", "Recommender"]
