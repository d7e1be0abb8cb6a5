"""Teacher outputs: what DLLM2Rec's own program reads, and what a plain loop over rows gives."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_block
from teacher_helpers import build, randomise, split, teacher_rows

from llm2rec.distill.data_bridge import read_outputs
from llm2rec.teacher.outputs import rank_blocks, write_outputs
from llm2rec.teacher.settings import ExportSettings

TOP_K = 7
ABOUT = {"dataset": "toy", "fingerprint": "f" * 64, "teacher": "ilora-test"}
NAMES = ["all_embeddings.pt", "confidence_train.npy", "confidence_train.txt", "myrank_train.npy", "myrank_train.txt"]


@pytest.fixture
def teacher(data, llm_folder):
    model = randomise(build("llama", llm_folder, data)[0]).eval()
    return model, teacher_rows(model, split(data), np.arange(len(split(data))))


def settings(**changes):
    return ExportSettings(**{"top_k": TOP_K, "block_rows": 32, "batch_tokens": 200, **changes})


def export(teacher, engine, folder, **changes):
    model, rows = teacher
    blocks = rank_blocks(model, rows, engine, folder / "blocks", settings(**changes))
    write_outputs(folder / "outputs", blocks, model.item_vectors, settings(**changes), ABOUT)
    return folder / "outputs"


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_outputs_equal_a_plain_ranking_of_each_row(teacher, data, engine, tmp_path, progress_lines):
    model = teacher[0]
    folder = export(teacher, engine, tmp_path)
    assert progress_lines().keys() >= {"export", "write candidates", "write confidences", "hash myrank_train.txt"}
    ranking = np.loadtxt(folder / "myrank_train.txt", dtype=int)
    confidence = np.loadtxt(folder / "confidence_train.txt")
    assert ranking.shape == confidence.shape == (len(data.splits["train"]), TOP_K)
    for row, example in enumerate(data.splits["train"]):
        assert example["example_id"] == row
        items = np.array([example["history"]], np.int32)
        log_probs = model.log_probs(items, np.array([items.shape[1]], np.int32))[0]
        best = log_probs.topk(TOP_K)
        np.testing.assert_allclose(-confidence[row], best.values, rtol=1e-4, atol=1e-4)
        # The same items, unless two are so close that rounding decides.
        np.testing.assert_allclose(log_probs[ranking[row]], best.values, rtol=1e-4, atol=1e-4)
        assert len(set(ranking[row])) == TOP_K
        assert not set(ranking[row]) & set(example["history"])
    assert (np.diff(confidence, axis=1) >= 0).all()
    vectors = torch.load(folder / "all_embeddings.pt", weights_only=True)
    assert torch.equal(vectors, model.item_vectors)


def test_outputs_are_what_the_released_program_reads(teacher, engine, tmp_path):
    folder = export(teacher, engine, tmp_path)
    lines = [(folder / name).read_text().splitlines() for name in ("myrank_train.txt", "confidence_train.txt")]
    assert all(len(line.split(" ")) == TOP_K for part in lines for line in part)
    assert all(token.isdigit() for line in lines[0] for token in line.split(" "))
    vectors = torch.load(folder / "all_embeddings.pt", weights_only=True)
    assert (vectors.dtype, vectors.ndim) == (torch.float32, 2)


def test_text_equals_its_memory_mapped_twin_exactly(teacher, engine, tmp_path):
    folder = export(teacher, engine, tmp_path)
    for name, dtype in (("myrank_train", np.int32), ("confidence_train", np.float32)):
        twin = np.load(folder / f"{name}.npy", mmap_mode="r")
        assert twin.dtype == dtype
        assert np.array_equal(np.loadtxt(folder / f"{name}.txt").astype(dtype), twin)


def test_the_manifest_says_what_is_there(teacher, data, engine, tmp_path):
    folder = export(teacher, engine, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(file.name for file in folder.iterdir()) == sorted([*NAMES, "manifest.json"])
    assert manifest["sha256"] == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    expected = {
        **ABOUT,
        "confidence": "neg_log_prob",
        "top_k": TOP_K,
        "rows": len(data.splits["train"]),
        "n_items": data.n_items,
        "width": 32,
    }
    assert {name: manifest[name] for name in expected} == expected


@pytest.mark.parametrize("kind", ["neg_log_prob", "log_prob", "prob"])
def test_the_student_reads_the_same_distances_whatever_the_confidences_are(kind, teacher, data, engine, tmp_path):
    folder = export(teacher, engine, tmp_path, confidence=kind)
    n_rows = len(data.splits["train"])
    read = read_outputs(folder, n_rows=n_rows, n_items=data.n_items, fingerprint=ABOUT["fingerprint"], top_k=TOP_K)
    plain = export(teacher, engine, tmp_path / "plain")
    assert np.array_equal(read.ranking, np.load(plain / "myrank_train.npy"))
    np.testing.assert_allclose(read.distance, np.load(plain / "confidence_train.npy"), rtol=1e-4, atol=1e-5)
    assert torch.equal(read.embeddings, teacher[0].item_vectors)
    batch = read.batch(np.array([5, 0]), 3)
    assert batch.ranking.tolist() == read.ranking[[5, 0], :3].tolist()


@pytest.mark.parametrize("block_rows", [1000, 200, 7])
def test_blocks_and_batches_do_not_change_the_rankings(block_rows, teacher, engine, tmp_path):
    whole = export(teacher, engine, tmp_path / "whole", block_rows=5000, batch_tokens=100000)
    parts = export(teacher, engine, tmp_path / "parts", block_rows=block_rows, batch_tokens=64)
    assert np.array_equal(np.load(whole / "myrank_train.npy"), np.load(parts / "myrank_train.npy"))
    values = [np.load(folder / "confidence_train.npy") for folder in (whole, parts)]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("finished", [0, 2])
def test_a_killed_export_goes_on_and_writes_the_same_files(finished, teacher, engine, tmp_path, monkeypatch):
    whole = contents(export(teacher, engine, tmp_path / "whole"))
    written = []

    def dies(tensors, file):
        if len(written) == finished:
            file.write_bytes(b"half a block")
            raise KeyboardInterrupt
        written.append(file)
        save_block(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr("llm2rec.teacher.outputs.save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            export(teacher, engine, tmp_path / "killed")
    assert len(list((tmp_path / "killed" / "blocks").iterdir())) == finished

    again = []
    monkeypatch.setattr("llm2rec.teacher.outputs.save_file", lambda t, file: (again.append(file), save_block(t, file)))
    assert contents(export(teacher, engine, tmp_path / "killed")) == whole
    assert len(again) == -(-len(teacher[1].rows) // 32) - finished


def test_writing_killed_half_way_leaves_the_former_outputs(teacher, engine, tmp_path, monkeypatch):
    former = contents(export(teacher, engine, tmp_path))
    monkeypatch.setattr("llm2rec.teacher.outputs.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(teacher, engine, tmp_path, confidence="prob")
    assert contents(tmp_path / "outputs") == former


def test_more_candidates_than_items_give_all_items(teacher, data, engine, tmp_path):
    folder = export(teacher, engine, tmp_path, top_k=10_000)
    ranking = np.load(folder / "myrank_train.npy")
    assert ranking.shape[1] == data.n_items
    assert (np.sort(ranking, axis=1) == np.arange(data.n_items)).all()
    assert json.loads((folder / "manifest.json").read_text())["top_k"] == data.n_items
