"""Run folders as the student's stage leaves them, with random weights."""

import torch

from llm2rec.core.files import write_json
from llm2rec.student.models import build_model
from llm2rec.student.store import save_student


def student_run(results, data, name, *, label="sasrec", seed=1, max_length=None, **changes):
    """A run folder as the student's stage leaves it, with random weights."""
    folder = results / name
    arguments = {"n_items": data.n_items, "width": 16, "max_length": max_length or data.history_length}
    torch.manual_seed(seed)
    model = build_model("sasrec", **arguments)
    save_student(folder / "student", model, "sasrec", arguments)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    record = {"stage": "student", "status": "finished", "seed": seed, "label": label, "parameters": 5}
    write_json(folder / "run.json", {**record, "dataset": dataset, **changes})
    return folder, model.eval()
