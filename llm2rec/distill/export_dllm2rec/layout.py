"""Writers for the files of the released DLLM2Rec program (github.com/istarryn/DLLM2Rec: ``main.py``).

data/<name>/data_statis.df        columns seq_size, item_num; one row
data/<name>/train_data.df         columns seq, len_seq, next; row r is line r of the teacher's tables
data/<name>/val_data.csv          the same columns, seq as Python would print the list
data/<name>/test_data.csv
tocf/<name>/all_embeddings.pt     float32 (N, 4096)
tocf/<name>/myrank_train.txt      (M, K) item ids, best first
tocf/<name>/confidence_train.txt  (M, K) distances, lower is surer

A history is its last 10 items, padded on the right with N, the number of items. The program fixes both 10 and 4096;
narrower teacher vectors are padded with zeros, which do not change its linear map of them.
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
_PICKLE_PROTOCOL = 4  # readable since Python 3.4


def write_data(folder: Path, data: RecData) -> None:
    """Write the dataset.

    Args:
        folder: ``data/<name>``; replaced as a whole.
        data: The prepared dataset.

    Raises:
        ConfigError: If the catalogue has fewer than 20 items, the minimum of the program.
    """
    if data.n_items < 20:
        raise ConfigError(
            f"the dataset has {data.n_items} items, but the released program's metrics need 20; use a larger dataset."
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
        teacher: The teacher's outputs for all training rows.
        n_rows: Training rows.

    Raises:
        TeacherOutputsError: If the program does not support them: not all rows are labelled, rows have one candidate,
            or the vectors are too wide.
    """
    if teacher.labelled is not None:
        raise TeacherOutputsError(
            f"the teacher has labelled {len(teacher.labelled)} of {n_rows} training rows, but the released program "
            "distils every row that it trains on; label all of them: run `python -m llm2rec.teacher` with `active=all`."
        )
    if teacher.ranking.shape[1] < 2:
        raise TeacherOutputsError(
            "the teacher's rows have one candidate each, which the released program cannot read; export more with "
            "`teacher.export.top_k` or `ensemble.top_k`."
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
    """Command-line arguments of the program's ``main.py`` for a recipe, with a batch size of at most ``n_rows``.

    Args:
        name: Name of the dataset.
        n_rows: Training rows; the program uses full batches only.
        n_candidates: Candidates per row.
        settings: The recipe. Options that the program does not have, such as another ranking loss, are left out.
    """
    ranking = settings.ranking
    values = {
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
    options = [f"--{option} {value:g}" for option, value in values.items() if value != DEFAULTS[option]]
    return " ".join([f"--data {name}", *options])


def _names(*columns: str) -> "pd.Index[str]":
    """Column names as Python strings; older pandas cannot read the string type of pandas 3."""
    return pd.Index(columns, dtype=object)


def _table(rows: Rows) -> pd.DataFrame:
    """Histories, their lengths and targets, numbered from 0."""
    history, lengths = rows.histories()
    history = np.pad(history, ((0, 0), (0, HISTORY_LENGTH - rows.max_length)), constant_values=rows.n_items)
    columns = {"seq": history.tolist(), "len_seq": lengths.tolist(), "next": rows.targets.tolist()}
    table = pd.DataFrame(columns)
    table.columns = _names(*columns)
    return table
