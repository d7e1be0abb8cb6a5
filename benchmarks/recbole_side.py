"""RecBole's side of `student_vs_recbole.py`, run by the Python of an environment where RecBole 1.2.1 lies.

    PYTHON benchmarks/recbole_side.py JOB.json

Data, split, models, loss, training loop, early stopping and evaluation are RecBole's as released; `_Timed` only reads a
clock around two of its methods. Nothing of ours is called but `target_ranks`, so that both sides' ranks are counted by
the same lines; it asks for nothing but torch, so the environment need not hold llm2rec.
"""

import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# RecBole's checkpoints hold its configuration object, which torch.load refuses since 2.6 unless weights_only=False.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for llm2rec.core.metrics

import numpy as np
import torch

# Not from recbole.quick_start, which imports ray for its parameter search.
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

from llm2rec.core.metrics import target_ranks


class _Timed(Trainer):
    """RecBole's trainer with a clock, and a checkpoint of its own kind after every epoch, to go on after a kill.

    Attributes:
        history: One entry an epoch.
    """

    def __init__(self, config: Any, model: Any, out: Path) -> None:
        super().__init__(config, model)
        self.saved_model_file = str(out / "best.pth")
        self._last, self._history_file = out / "last.pth", out / "history.json"
        self.history: list[dict[str, float]] = []
        if self._last.is_file():
            best = self.saved_model_file
            self.resume_checkpoint(self._last)
            self.saved_model_file = best
            self.history = json.loads(self._history_file.read_text())[: self.start_epoch]

    def keep(self, epoch: int, _: float) -> None:
        """Write what has been reached; called when an epoch has been evaluated."""
        self._history_file.write_text(json.dumps(self.history))
        aside = self._last.with_suffix(".partial")
        self._save_checkpoint(epoch, verbose=False, saved_model_file=str(aside))
        aside.replace(self._last)

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        start, processor_start = time.perf_counter(), time.process_time()
        loss = super()._train_epoch(*args, **kwargs)
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
        self.history.append({"pass_seconds": seconds, "pass_processor_seconds": processor_seconds, "loss": loss})
        return loss

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        score, result = super()._valid_epoch(*args, **kwargs)
        self.history[-1] |= {"evaluation_seconds": time.perf_counter() - start, "ndcg@10": float(score)}
        print(len(self.history), {name: round(value, 4) for name, value in self.history[-1].items()}, flush=True)
        return score, result


def configuration(job: dict[str, Any]) -> Any:
    """RecBole's configuration: its defaults but for what the job and the comparison ask for."""
    settings = {
        "data_path": job["data_path"],
        "checkpoint_dir": job["out"],
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": job["max_length"],
        "loss_type": "CE",
        "train_neg_sample_args": None,  # the cross-entropy over the catalogue wants no negatives
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "repeatable": True,
        "metrics": ["Hit", "NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "metric_decimal_place": 12,  # its default, 4, would take small gains for standstill
        "epochs": job["epochs"],
        "stopping_step": job["patience"] - 1,  # it stops when the count is above this number
        "seed": job["seed"],
        "use_gpu": False,
        "show_progress": False,
        **job["settings"],
    }
    return Config(model=job["model"], dataset=job["dataset"], config_dict=settings)


def rows_of(data: Any, users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """User, target, length and history of every row, as the ids of the file (0 pads histories)."""
    table = data.dataset.inter_feat
    lengths = table["item_length"].numpy()
    history = items[table["item_id_list"].numpy()]
    history[np.arange(history.shape[1]) >= lengths[:, None]] = 0
    return {
        "users": users[table["user_id"].numpy()],
        "targets": items[table["item_id"].numpy()],
        "lengths": lengths.astype(np.int32),
        "history": history,
    }


@torch.no_grad()
def ranks_of(model: Any, data: Any) -> np.ndarray:
    """Rank every row's target among all items, by RecBole's scores and our count."""
    model.eval()
    ranks = []
    for interaction, *_ in data:
        scores = model.full_sort_predict(interaction)
        scores[:, 0] = -torch.inf  # padding, as in RecBole's evaluation
        ranks.append(target_ranks(scores, interaction["item_id"]))
    return torch.cat(ranks).numpy()


def main() -> None:
    """Train, rank the test rows with the best weights, and write everything into the job's folder."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    os.chdir(out)  # RecBole writes logs and TensorBoard events where it stands
    config = configuration(job)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    loaders = dict(zip(("train", "validation", "test"), data_preparation(config, dataset), strict=True))
    # Token 0 is padding; the others are the numbers that we wrote.
    users, items = (
        np.array([0, *dataset.field2id_token[field][1:].astype(np.int64)], np.int32) for field in ("user_id", "item_id")
    )
    rows = {name: rows_of(loader, users, items) for name, loader in loaders.items()}
    np.savez(out / "rows.npz", **{f"{name}_{key}": v for name, each in rows.items() for key, v in each.items()})
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, loaders["train"].dataset).to(config["device"])
    trainer = _Timed(config, model, out)
    trainer.fit(loaders["train"], loaders["validation"], verbose=False, callback_fn=trainer.keep)
    own = trainer.evaluate(loaders["test"])  # loads the best weights
    scores = [each["ndcg@10"] for each in trainer.history]
    result = {
        "history": trainer.history,
        # Of equal scores RecBole keeps the last.
        "best_epoch": len(scores) - scores[::-1].index(max(scores)),
        "own_test_metrics": {name: float(value) for name, value in own.items()},
        "test_ranks": ranks_of(trainer.model, loaders["test"]).tolist(),
        "n_items": dataset.item_num - 1,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("recbole", "torch", "numpy", "scipy", "pandas")},
    }
    aside = out / ".result.json"
    aside.write_text(json.dumps(result) + "\n")
    aside.replace(out / "result.json")


if __name__ == "__main__":
    main()
