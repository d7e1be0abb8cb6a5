"""What the released DLLM2Rec program reads, opened the way it does, and read back by ourselves without a manifest.

Its frames are pickles: only this test, which has just written them, may open them.
"""

import ast
import csv
import pickletools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from distill_helpers import teacher_for
from engine_helpers import engine_in

from llm2rec.core.errors import ConfigError, TeacherOutputsError
from llm2rec.data import Toy, prepare
from llm2rec.distill.data_bridge import read_outputs
from llm2rec.distill.export_dllm2rec.layout import arguments_for, write_data, write_teacher
from llm2rec.distill.selection_policy import SelectionPolicyAll
from llm2rec.distill.settings import DistillSettings, DLLM2RecCodeSettings, EmbeddingSettings, RankingSettings
from llm2rec.distill.student import DistilledStudent
from llm2rec.distill.trainer_distill import train_distilled
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model

K = 12


@pytest.fixture(scope="module", params=[6, 10, 14])  # shorter histories than the program's, the same, and longer
def data(request, tmp_path_factory):
    spec = Toy(n_users=60, n_items=60, n_worlds=5, history_length=request.param)
    return prepare(spec, tmp_path_factory.mktemp("processed"), None)


@pytest.fixture(scope="module")
def teacher(data):
    return teacher_for(len(data.splits["train"]), data.n_items, K, width=7)


@pytest.fixture(scope="module")
def written(data, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dllm2rec")
    write_data(folder / "data" / "toy", data)
    write_teacher(folder / "tocf" / "toy", teacher, len(data.splits["train"]))
    return folder


def expected_rows(data, split):
    """The last ten items and padding behind them, by a plain loop."""
    for example in data.splits[split]:
        kept = example["history"][-10:]
        yield kept + [data.n_items] * (10 - len(kept)), len(kept), example["target"]


def test_sizes_and_training_rows(data, written):
    sizes = pd.read_pickle(written / "data" / "toy" / "data_statis.df")
    assert (sizes["seq_size"][0], sizes["item_num"][0]) == (10, data.n_items)
    train = pd.read_pickle(written / "data" / "toy" / "train_data.df")
    assert list(zip(train["seq"], train["len_seq"], train["next"], strict=True)) == list(expected_rows(data, "train"))
    batch = train.sample(n=5, random_state=0)  # the program picks rows so, and finds the teacher's by their index
    columns = batch.to_dict()
    for row in batch.index:
        assert columns["next"][row] == data.splits["train"][int(row)]["target"]
    assert torch.LongTensor(list(columns["seq"].values())).shape == (5, 10)


@pytest.mark.parametrize(("split", "file"), [("validation", "val_data.csv"), ("test", "test_data.csv")])
def test_evaluation_rows(data, written, split, file):
    with open(written / "data" / "toy" / file) as opened:
        rows = list(csv.DictReader(opened))
    found = [(ast.literal_eval(row["seq"]), int(row["len_seq"]), int(float(row["next"]))) for row in rows]
    assert found == list(expected_rows(data, split))


def test_pickles_are_readable_by_older_pandas(written):
    """No Arrow strings, which pandas before 3 cannot read."""
    for name in ("data_statis.df", "train_data.df"):
        pickled = (written / "data" / "toy" / name).read_bytes()
        words = {word for _, word, _ in pickletools.genops(pickled) if isinstance(word, str)}
        assert not {word for word in words if "arrow" in word.lower() or "StringDtype" in word}


def test_teacher_tables(data, written, teacher):
    folder = written / "tocf" / "toy"
    assert sorted(file.name for file in folder.iterdir()) == [
        "all_embeddings.pt",
        "confidence_train.txt",
        "myrank_train.txt",
    ]
    assert np.array_equal(torch.LongTensor(np.loadtxt(folder / "myrank_train.txt")).numpy(), teacher.ranking)
    np.testing.assert_array_equal(np.loadtxt(folder / "confidence_train.txt").astype(np.float32), teacher.distance)
    vectors = torch.load(folder / "all_embeddings.pt", weights_only=True)
    assert vectors.shape == (data.n_items, 4096)
    assert torch.equal(vectors[:, :7], teacher.embeddings)
    assert vectors[:, 7:].abs().sum() == 0


def test_distillation_trains_on_exported_files(data, written, tmp_path, caplog):
    """Files in its format have no manifest."""
    teacher = read_outputs(
        written / "tocf" / "toy", n_rows=len(data.splits["train"]), n_items=data.n_items, fingerprint="none", top_k=10
    )
    assert "no manifest.json: assuming distances" in caplog.text
    train, validation = (Rows.of(data, split) for split in ("train", "validation"))
    engine = engine_in(tmp_path, epochs=1, batch_size=64, micro_batch_size=64)
    torch.manual_seed(0)
    plain = build_model(
        "gru4rec", n_items=data.n_items, width=8, max_length=data.history_length, hidden_width=8, tie_items=False
    )
    model = DistilledStudent(plain, teacher.embeddings, fusion_scale=0.3, align=False, fusion_sides="input")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = DLLM2RecCodeSettings(teacher_outputs="unused")
    train_distilled(model, train, teacher, validation, SelectionPolicyAll(), engine, settings)
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_unsupported_teacher_outputs_raise(data, teacher, tmp_path):
    n_rows = len(teacher.ranking)
    some = replace(teacher, labelled=np.arange(0, 2 * n_rows, 2))
    with pytest.raises(TeacherOutputsError, match=rf"labelled {n_rows} of {2 * n_rows} training rows.*active=all"):
        write_teacher(tmp_path / "some", some, 2 * n_rows)
    single = replace(teacher, ranking=teacher.ranking[:, :1], distance=teacher.distance[:, :1])
    with pytest.raises(TeacherOutputsError, match=r"one candidate each.*export more"):
        write_teacher(tmp_path / "single", single, n_rows)
    wide = replace(teacher, embeddings=torch.zeros(data.n_items, 5000))
    with pytest.raises(TeacherOutputsError, match=r"vectors have 5000 numbers, but the released program reads 4096"):
        write_teacher(tmp_path / "wide", wide, n_rows)
    assert list(tmp_path.iterdir()) == []


def test_catalogue_smaller_than_the_metric_cutoff_raises(data, tmp_path):
    small = replace(data, items=data.items.select(range(19)))
    with pytest.raises(ConfigError, match=r"the dataset has 19 items, but the released program's metrics need 20"):
        write_data(tmp_path / "small", small)


README_WEIGHTS = "--alpha 0.5 --ed_weight 0.3 --lam 0.7"


@pytest.mark.parametrize(
    ("n_rows", "n_candidates", "expected"),
    [
        (97_171, 10, f"--data toy {README_WEIGHTS}"),
        (256, 100, f"--data toy {README_WEIGHTS}"),
        (255, 10, f"--data toy --batch_size 255 {README_WEIGHTS}"),
        (424, 5, f"--data toy {README_WEIGHTS} --candidate_topk 5"),
        (20, 4, f"--data toy --batch_size 20 {README_WEIGHTS} --candidate_topk 4"),
    ],
)
def test_arguments_replace_unsuitable_defaults(n_rows, n_candidates, expected):
    assert arguments_for("toy", n_rows, n_candidates, DLLM2RecCodeSettings()) == expected


def test_arguments_include_the_weights_of_the_recipe():
    ranking = RankingSettings(weight=0.8, top_k=20, gamma_position=0.2, gamma_confidence=0.25, gamma_consistency=0)
    settings = DistillSettings(ranking=ranking, embedding=EmbeddingSettings(fusion_scale=0.2))
    gammas = "--gamma_position 0.2 --gamma_confidence 0.25 --gamma_consistency 0"
    assert arguments_for("toy", 300, 50, settings) == f"--data toy --alpha 0 --candidate_topk 20 {gammas}"
