"""Sample recommendations in TensorBoard."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from engine_helpers import random_rows, texts_of

from llm2rec.core.run import Run
from llm2rec.core.train.engine import Engine
from llm2rec.student.models import build_model
from llm2rec.student.samples import log_recommendations, recommendation_table, student_answers

N, L = 9, 7
ITEMS = Dataset.from_dict({"title": [f"Item {number}" for number in range(N - 1)] + ["Either|Or"]})


def test_recommendation_table():
    table = recommendation_table([[1, 8], [2]], [3, 4], [[3, 8], [0, 1]], ITEMS)
    assert table.splitlines()[2:] == [
        r"| Item 1; Either\|Or | Item 3 | **Item 3**; Either\|Or |",
        "| Item 2 | Item 4 | Item 0; Item 1 |",
    ]


@pytest.mark.parametrize(("tensorboard", "mask_seen"), [(True, False), (True, True), (False, True)])
def test_recommendations_are_logged_to_tensorboard(tmp_path, tensorboard, mask_seen):
    torch.manual_seed(0)
    model, rows = build_model("sasrec", n_items=N, width=8, max_length=L).eval(), random_rows(12, N, L)
    engine = Engine(Run.start(tmp_path, "student", {}), seed=0, tensorboard=tensorboard)
    log_recommendations(engine, student_answers(model, mask_seen), rows, ITEMS)
    engine.close()
    if not tensorboard:
        assert not (tmp_path / "tensorboard").exists()
        return
    lines = texts_of(tmp_path)["recommendations"].splitlines()[2:]
    assert len(lines) == 5
    for row, line in enumerate(lines):
        history, target, answers = line.strip("| ").replace("**", "").replace(r"\|", "/").split(" | ")
        length = int(rows.lengths[row])
        read = rows.histories(np.array([row]))[0][0, :length].tolist()
        assert len(history.split("; ")) == min(length, 5)
        with torch.no_grad():
            scores = model.score(model(torch.tensor([read]), torch.tensor([length])))[0]
        scores[read if mask_seen else []] = -torch.inf
        best = np.argsort(-scores.numpy(), kind="stable")[:5]
        assert answers.split("; ") == [ITEMS[int(item)]["title"].replace("|", "/") for item in best]
        assert target == ITEMS[int(rows.targets[row])]["title"].replace("|", "/")
