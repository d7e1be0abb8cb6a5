"""Recommendations of finished runs in ids and titles, and exports for other programs."""

from llm2rec.recommend.names import Recommendation
from llm2rec.recommend.recommender import Recommender

__all__ = ["Recommendation", "Recommender"]
