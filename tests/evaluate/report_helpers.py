"""A dataset with markup in its titles, runs of every kind on it, and a strict HTML parser."""

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import torch
from evaluate_helpers import student_run, title_run
from safetensors.numpy import save_file

from llm2rec.core.files import read_json, write_json
from llm2rec.data import CsvTables, prepare
from llm2rec.evaluate.report.analyses import gather
from llm2rec.evaluate.report.comparison import read_run
from llm2rec.evaluate.scoring.scoring import Protocol, score_popularity, score_run
from llm2rec.teacher.outputs import write_outputs
from llm2rec.teacher.settings import ExportSettings

PROTOCOL = Protocol(ks=(1, 5, 10), mask_seen=False, candidates_seed=3)
ABOUT = {
    "dataset": "wild", "fingerprint": "f" * 64, "n_items": 40, "rows": 36, "split": "leave_one_out", "mask_seen": False,
    "date": "2026-01-02T03:04+00:00", "overrides": ["dataset=csv", "dataset.name='<i>wild</i> one'"],
    "git": {"commit": "c" * 40, "dirty": True}, "versions": {"python": "3.11.0"},
}  # fmt: skip


def wild_data(folder, n_users=36, n_items=40):
    """Users of 5 to 16 interactions; titles that would run or close a cell without escaping.

    The last two items are test targets of a few users, and nothing else.
    """
    generator, rows = np.random.default_rng(0), []
    for user in range(n_users):
        items = generator.permutation(n_items - 2)[: 5 + user % 12]
        if user % 9 == 0:
            items[-1] = n_items - 1 - user % 2
        rows += [(f"u{user}", f"i{item}", time) for time, item in enumerate(items)]
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(folder / "interactions.csv", index=False)
    titles = [f"<script>alert({item})</script></td> | *{item}* \"a\" & 'b'" for item in range(n_items)]
    items = pd.DataFrame({"item_id": [f"i{item}" for item in range(n_items)], "title": titles})
    items.to_csv(folder / "items.csv", index=False)
    spec = CsvTables(
        name="wild", interactions=str(folder / "interactions.csv"), items=str(folder / "items.csv"), history_length=10
    )
    return prepare(spec, folder / "processed")


def wild_runs(results, data):
    """Two seeds of a student, a distilled one and its teacher's outputs, another student, a title teacher."""
    outputs = teacher_outputs(results / "outputs" / "random", data)
    made = {}
    for number, (label, seed, changes, config) in enumerate(
        [
            ("sasrec", 1, {}, {"student": {"width": 16}, "seed": 1}),
            ("sasrec", 2, {}, {"student": {"width": 16}, "seed": 2}),
            ("sasrec <b>", 1, {"stage": "distill"}, {"distill": {"teacher_outputs": str(outputs)}}),
            ("sasrec", 3, {}, {"student": {"width": 17}, "seed": 3}),
        ]
    ):
        folder, model = student_run(results, data, f"result_2026010{number}_000000", label=label, seed=seed, **changes)
        write_json(folder / "config.json", config)
        history = [{"step": 10 * step, "val/ndcg@10": 0.01 * step * (4 - step)} for step in range(1, 4)]
        validation = {"select_on": "ndcg@10", "best_step": 20, "history": history}
        write_json(folder / "metrics" / "validation.json", validation)
        made[folder] = model
    folder, model = title_run(results, data, "result_20260109_000000")
    labelling = {"labelled": 1000, "train_rows": 4000, "seconds": 12.34, "seconds_saved": 37.02}
    write_json(folder / "metrics" / "labelling.json", labelling)
    return made | {folder: model}


def teacher_outputs(folder, data, top_k=12):
    """Teacher outputs with a random ranking, as the teacher stage writes them."""
    generator = np.random.default_rng(5)
    n_rows = len(data.splits["train"])
    items = generator.random((n_rows, data.n_items)).argsort(axis=1)[:, :top_k].astype(np.int32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scores = -np.sort(generator.exponential(size=items.shape), axis=1).astype(np.float32)
    save_file({"items": items, "log_probs": scores}, folder.parent / "block.safetensors")
    about = {"dataset": data.name, "fingerprint": data.fingerprint, "teacher": folder.name, "run": "result_of_teacher"}
    vectors = torch.from_numpy(generator.normal(size=(data.n_items, 4)).astype(np.float32))
    write_outputs(folder, [folder.parent / "block.safetensors"], vectors, ExportSettings(), about)
    return folder


def findings_of(folders, data, engine, gate_dir, *, baseline=None, protocol=PROTOCOL):
    """Score runs and gather the findings of the report."""
    rows = [score_run(folder, data, engine, protocol, gate_dir) for folder in folders]
    return gather(
        score_popularity(data, protocol),
        [read_run(row, folder, f"python -m x {folder.name}") for row, folder in zip(rows, folders, strict=True)],
        data,
        protocol,
        ABOUT,
        baseline=baseline,
        locate=lambda path: folders[0].parent / path,
        device=engine.device,
    )


def ranks_of(folder):
    return np.load(folder / "metrics" / "test_ranks.npy")


def metrics_of(folder):
    return read_json(folder / "metrics" / "test.json")["metrics"]


class Page(HTMLParser):
    """Strict HTML parser: every element must be closed, in order.

    Attributes:
        elements: Tags with their attributes.
        ids: All ids.
        text: All text outside of the style.
    """

    EMPTY = ("meta", "br", "hr", "link", "img", "input")

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.ids, self.text, self._open = [], [], "", []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data

    def tags(self):
        return {tag for tag, _ in self.elements}
