"""What the students of these tests were trained on, and their items."""

from llm2rec.cards import Training

RAW_IDS = [f"b{number}" for number in range(12)]
TRAINING = Training(
    dataset="shop",
    fingerprint="0123456789abcdef" * 4,
    split="leave_one_out",
    n_items=12,
    n_rows=5000,
    n_validation=300,
    seed=7,
    excluded="no items",
    metrics={"hr@10": 0.51234567, "ndcg@10": 0.25},
)
