"""A small dataset, students and title vectors with random values, and members that score as they are asked to."""

from types import SimpleNamespace

import torch

from llm2rec.data import Toy, prepare
from llm2rec.ensemble.batch import SplitRows
from llm2rec.ensemble.members import ItemNeighbours, Member, Student, TitleNeighbours
from llm2rec.ensemble.model import GroupWeights
from llm2rec.ensemble.store import counted
from llm2rec.student.models import build_model, load_student
from llm2rec.student.store import save_student

TEXT = {"name": "some", "source": "somewhere", "weights": "abc", "revision": None}


def toy_in(folder):
    """A dataset, its title vectors, and two students with histories of different lengths in ``places``."""
    data = prepare(Toy(n_users=40, n_items=30, n_volumes=3, n_worlds=2), folder / "processed")
    places = {}
    for seed, name in ((1, "sasrec"), (2, "gru4rec")):
        torch.manual_seed(seed)
        arguments = {"n_items": data.n_items, "width": 8, "max_length": 4 + seed}
        places[f"run_{seed}"] = folder / f"student_{seed}"
        save_student(places[f"run_{seed}"], build_model(name, **arguments), name, arguments)
    vectors = torch.randn(data.n_items, 12) * torch.linspace(3, 0.1, 12) + 1
    return SimpleNamespace(data=data, places=places, vectors=vectors)


def members_of(toy):
    students = [Student(load_student(place), {"run": run, "label": run}) for run, place in toy.places.items()]
    about = {"llm": "some", "text": TEXT}
    return [*students, counted(toy.data), TitleNeighbours(toy.vectors, about, history=7)]


def weights_of(students=0.3, neighbours=0.2, titles=0.5):
    return {
        "students": GroupWeights(students, 1.5),
        "neighbours": GroupWeights(neighbours, 0.8),
        "titles": GroupWeights(titles, 0.2, {"whitening": 0.5, "decay": 0.8}),
    }


def rows_of(toy, split, length=10):
    return SplitRows(toy.data, split, length)


class Planted(Member):
    """Scores targets above all other items in some of the rows."""

    kind = "teacher"

    def __init__(self, name, share_known, n_items, seed=0):
        super().__init__(name, {"run": name}, 3, n_items)
        self._share_known, self._seed = share_known, seed

    def scores(self, batch):
        drawn = torch.rand(1000, generator=torch.Generator().manual_seed(self._seed))
        known = drawn[torch.from_numpy(batch.rows)] < self._share_known
        torch.manual_seed(int(batch.rows[0]) + self._seed)
        scores = torch.rand(len(batch.rows), batch.n_items)
        return scores.scatter_(1, batch.targets[:, None], torch.where(known, 5.0, -1.0)[:, None])


__all__ = ["ItemNeighbours", "Planted", "members_of", "rows_of", "toy_in", "weights_of"]
