"""Teacher outputs made by hand, in memory and on disk."""

import json

import numpy as np
import torch

from llm2rec.core.files import sha256_of_file
from llm2rec.distill.data_bridge import TeacherBatch, TeacherOutputs
from llm2rec.distill.objective import CatalogueScores, order_loss
from llm2rec.distill.settings import RankingSettings

FINGERPRINT = "f" * 64


def teacher_for(n_rows, n_items, top_k, width=5, seed=0):
    """A teacher with random rankings: unique items per row, ascending distances."""
    generator = np.random.default_rng(seed)
    ranking = np.argsort(generator.random((n_rows, n_items)), axis=1)[:, :top_k].astype(np.int32)
    distance = np.sort(generator.exponential(size=(n_rows, top_k)), axis=1).astype(np.float32)
    embeddings = torch.from_numpy(generator.normal(size=(n_items, width)).astype(np.float32))
    return TeacherOutputs(embeddings, ranking, distance, {})


def write_teacher(folder, teacher, *, kind="neg_log_prob", twin=False, manifest=True, fingerprint=FINGERPRINT):
    """Write outputs in the layout of DESIGN 4.3, optionally with ``.npy`` files and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(teacher.embeddings, folder / "all_embeddings.pt")
    np.savetxt(folder / "myrank_train.txt", teacher.ranking, fmt="%d")
    np.savetxt(folder / "confidence_train.txt", teacher.distance, fmt="%.9g")
    if twin:
        np.save(folder / "myrank_train.npy", teacher.ranking)
        np.save(folder / "confidence_train.npy", teacher.distance)
    if manifest:
        write_manifest(folder, confidence=kind, fingerprint=fingerprint)
    return folder


def write_manifest(folder, **values):
    """Write a manifest with the hashes of the folder's files."""
    files = sorted(file for file in folder.iterdir() if file.name != "manifest.json")
    about = {"dataset": "toy", "sha256": {file.name: sha256_of_file(file) for file in files}, **values}
    (folder / "manifest.json").write_text(json.dumps(about))


def listwise(logits, ranking, distance, *, temperature=1.0, over="catalogue"):
    """The listwise loss of candidates ``(B, K)`` from the scores of all items."""
    settings = RankingSettings(loss="listwise", temperature=temperature, over=over)
    return order_loss(CatalogueScores(logits), TeacherBatch(ranking, distance), settings)


def pairwise(logits, ranking, kind, *, margin=1.0, negatives=None):
    """The pairwise losses of candidates ``(B, K)``, and of a negative that comes last, from the scores of all items."""
    settings = RankingSettings(loss=kind, margin=margin, negative="none" if negatives is None else "ranked_last")
    return order_loss(CatalogueScores(logits), TeacherBatch(ranking, torch.empty(0)), settings, negatives)
