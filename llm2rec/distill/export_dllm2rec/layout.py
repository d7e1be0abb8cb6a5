"""The files of the released DLLM2Rec program (github.com/istarryn/DLLM2Rec: ``main.py``), written and never read.

data/<name>/data_statis.df        columns seq_size, item_num; one row
data/<name>/train_data.df         columns seq, len_seq, next; row r is line r of the teacher's tables
data/<name>/val_data.csv          the same columns, seq as Python would print the list
data/<name>/test_data.csv
tocf/<name>/all_embeddings.pt     float32 (N, 4096)
tocf/<name>/myrank_train.txt      (M, K) item ids, best first
tocf/<name>/confidence_train.txt  (M, K) distances, lower is surer

A history is its last 10 items, padded on the right with N, the number of items. The program fixes both the 10 and the
4096; narrower teacher vectors get zeros behind them, which its linear map reads as the vectors alone.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from llm2rec.core.errors import ConfigError, TeacherOutputsError
from llm2rec.core.files import replaced_folder
from llm2rec.data import RecData
from llm2rec.distill.data_bridge import TeacherOutputs
from llm2rec.distill.settings import DistillSettings
from llm2rec.student.datamodule import Rows

__all__ = ["DEFAULTS", "HISTORY_LENGTH", "VECTOR_WIDTH", "arguments_for", "write_data", "write_teacher"]

HISTORY_LENGTH, VECTOR_WIDTH = 10, 4096
# Defaults of the program's options.
DEFAULTS = {
    "batch_size": 256,
    "alpha": 1.0,
    "beta": 1.0,
    "ed_weight": 0.2,
    "lam": 0.8,
    "candidate_topk": 10,
    "gamma_position": 0.3,
    "gamma_confidence": 0.5,
    "gamma_consistency": 0.1,
}
_PICKLE_PROTOCOL = 4  # what every Python since 3.4 reads


def write_data(folder: Path, data: RecData) -> None:
    """Write the dataset.

    Args:
        folder: ``data/<name>``; replaced as a whole.
        data: The prepared dataset.

    Raises:
        ConfigError: If the catalogue is too small for the program, which takes 20 items for granted.
    """
    if data.n_items < 20:
        raise ConfigError(
            f"the dataset has {data.n_items} items, but the released program's metrics need 20; take a larger one."
        )
    tables = {split: _table(Rows.of(data, split, min(HISTORY_LENGTH, data.history_length))) for split in data.splits}
    sizes = pd.DataFrame([[HISTORY_LENGTH, data.n_items]], columns=_names("seq_size", "item_num"))
    with replaced_folder(folder) as aside:
        sizes.to_pickle(aside / "data_statis.df", protocol=_PICKLE_PROTOCOL)
        tables["train"].to_pickle(aside / "train_data.df", protocol=_PICKLE_PROTOCOL)
        tables["validation"].to_csv(aside / "val_data.csv", index=False)
        tables["test"].to_csv(aside / "test_data.csv", index=False)


def write_teacher(folder: Path, teacher: TeacherOutputs, n_rows: int) -> None:
    """Write the teacher's outputs.

    Args:
        folder: ``tocf/<name>``; replaced as a whole.
        teacher: What the teacher says of all training rows.
        n_rows: Training rows.

    Raises:
        TeacherOutputsError: If the program could not use them: not all rows are labelled, a row has one candidate, or
            the vectors are too wide.
    """
    if teacher.labelled is not None:
        raise TeacherOutputsError(
            f"the teacher has labelled {len(teacher.labelled)} of {n_rows} training rows, but the released program "
            "distils every row that it trains on; label all of them: run `python -m llm2rec.teacher` with `active=all`."
        )
    if teacher.ranking.shape[1] < 2:
        raise TeacherOutputsError(
            "the teacher's rows have one candidate each, which the released program reads as no table; export more "
            "with `teacher.export.top_k` or `ensemble.top_k`."
        )
    width = teacher.embeddings.shape[1]
    if width > VECTOR_WIDTH:
        raise TeacherOutputsError(
            f"the teacher's vectors have {width} numbers, but the released program reads {VECTOR_WIDTH}; use a teacher "
            "with a narrower language model."
        )
    with replaced_folder(folder) as aside:
        vectors: Tensor = functional.pad(teacher.embeddings, (0, VECTOR_WIDTH - width))
        torch.save(vectors.contiguous(), aside / "all_embeddings.pt")
        np.savetxt(aside / "myrank_train.txt", teacher.ranking, fmt="%d")
        np.savetxt(aside / "confidence_train.txt", teacher.distance, fmt="%.9g")


def arguments_for(name: str, n_rows: int, n_candidates: int, settings: DistillSettings) -> str:
    """Command-line arguments of its ``main.py``: the weights of a recipe, and no more rows than there are.

    Args:
        name: Of the dataset.
        n_rows: Training rows; the program draws whole batches.
        n_candidates: Candidates per row.
        settings: The recipe. What the program has no option for, such as another ranking loss, is left out.
    """
    ranking = settings.ranking
    wanted = {
        "batch_size": min(n_rows, int(DEFAULTS["batch_size"])),
        "alpha": settings.dros.weight,
        "beta": settings.dros.beta,
        "ed_weight": settings.embedding.fusion_scale,
        "lam": ranking.weight,
        "candidate_topk": min(n_candidates, ranking.top_k),
        "gamma_position": ranking.gamma_position,
        "gamma_confidence": ranking.gamma_confidence,
        "gamma_consistency": ranking.gamma_consistency,
    }
    options = [f"--{option} {value:g}" for option, value in wanted.items() if value != DEFAULTS[option]]
    return " ".join([f"--data {name}", *options])


def _names(*columns: str) -> "pd.Index[str]":
    """Column names as Python strings: pandas 3 has a type of its own for them, which older ones cannot read."""
    return pd.Index(columns, dtype=object)


def _table(rows: Rows) -> pd.DataFrame:
    """Histories, their lengths and targets, numbered from 0."""
    history, lengths = rows.histories()
    history = np.pad(history, ((0, 0), (0, HISTORY_LENGTH - rows.max_length)), constant_values=rows.n_items)
    columns = {"seq": history.tolist(), "len_seq": lengths.tolist(), "next": rows.targets.tolist()}
    table = pd.DataFrame(columns)
    table.columns = _names(*columns)
    return table
