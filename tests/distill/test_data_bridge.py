import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from distill_helpers import FINGERPRINT, teacher_for, write_manifest, write_teacher

from llm2rec.core.errors import TeacherOutputsError
from llm2rec.distill.data_bridge import EMBEDDINGS, TeacherOutputs, outputs_hash, read_outputs

ROWS, ITEMS, K = 6, 9, 4
REMEDY = r".*distill\.teacher_outputs=FOLDER"


def read(folder, **changes):
    return read_outputs(
        folder, **({"n_rows": ROWS, "n_items": ITEMS, "fingerprint": FINGERPRINT, "top_k": 3} | changes)
    )


@pytest.fixture
def teacher():
    return teacher_for(ROWS, ITEMS, K)


def line_of(file, number, text):
    """Put ``text`` in place of line ``number``, from 1."""
    lines = file.read_text().splitlines()
    lines[number - 1] = text
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("twin", [True, False])
@pytest.mark.parametrize("manifest", [True, False])
def test_outputs_round_trip(tmp_path, teacher, twin, manifest):
    outputs = read(write_teacher(tmp_path, teacher, twin=twin, manifest=manifest))
    assert outputs.ranking.tolist() == teacher.ranking.tolist()
    assert outputs.distance.tolist() == teacher.distance.tolist()  # nine digits give every float32 back
    assert torch.equal(outputs.embeddings, teacher.embeddings)
    assert (outputs.ranking.dtype, outputs.distance.dtype) == (np.int32, np.float32)
    assert isinstance(outputs.ranking, np.memmap) == (twin and manifest)  # a twin nobody vouches for is not trusted
    batch = outputs.batch(np.array([5, 0]), top_k=2)
    assert batch.ranking.tolist() == teacher.ranking[[5, 0], :2].tolist()
    assert batch.distance.tolist() == teacher.distance[[5, 0], :2].tolist()
    assert (batch.ranking.dtype, batch.distance.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("manifest", [True, False])
def test_hash_identifies_outputs(tmp_path, teacher, manifest):
    one, same, other, another = (tmp_path / name for name in ("one", "same", "other", "another"))
    for folder in (one, same):
        write_teacher(folder, teacher, manifest=manifest)
    write_teacher(other, teacher_for(ROWS, ITEMS, K - 1), manifest=manifest)
    write_teacher(another, replace(teacher, embeddings=teacher.embeddings + 1), manifest=manifest)
    assert outputs_hash(one) == outputs_hash(same)
    assert len({outputs_hash(folder) for folder in (one, other, another)}) == 3


def test_target_distance_falls_back_to_the_last_candidate(teacher):
    targets = teacher.ranking[:, 2].astype(np.int64)
    targets[1] = next(item for item in range(ITEMS) if item not in teacher.ranking[1])
    rows = np.array([4, 1, 0])
    told = teacher.batch(rows, 2, targets=targets[rows])  # found beyond the two candidates that are used
    expected = [teacher.distance[4, 2], teacher.distance[1, -1], teacher.distance[0, 2]]
    assert told.target_distance.tolist() == pytest.approx(expected)
    assert told.ranking.shape == (3, 2)
    assert teacher.batch(rows, 2).target_distance is None


def test_outputs_of_the_released_program_are_read_as_distances(tmp_path, teacher, caplog):
    write_teacher(tmp_path, teacher, manifest=False)
    assert read(tmp_path, fingerprint="another").distance.tolist() == teacher.distance.tolist()
    assert "no manifest.json: assuming distances" in caplog.text


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        ("neg_log_prob", lambda p: -np.log(p)),
        ("distance", lambda p: -np.log(p)),
        ("log_prob", np.log),
        ("prob", lambda p: p),
    ],
)
def test_scores_of_every_kind_become_the_same_distances(tmp_path, teacher, kind, scores):
    probs = np.sort(np.random.default_rng(0).random((ROWS, K)).astype(np.float32))[:, ::-1]
    write_teacher(tmp_path, type(teacher)(teacher.embeddings, teacher.ranking, scores(probs), {}), kind=kind)
    outputs = read(tmp_path)
    np.testing.assert_allclose(outputs.distance, -np.log(probs), rtol=1e-5)
    assert (np.diff(outputs.distance, axis=1) >= 0).all()  # best first


def change_text(name, number, text):
    return lambda folder: line_of(folder / f"{name}_train.txt", number, text)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "all_embeddings.pt").unlink(), r"all_embeddings\.pt is missing"),
        (lambda f: (f / "myrank_train.txt").unlink(), r"myrank_train\.txt is missing"),
        (lambda f: (f / "confidence_train.txt").unlink(), r"confidence_train\.txt is missing"),
        (lambda f: (f / "all_embeddings.pt").write_bytes(b""), r"all_embeddings\.pt is damaged"),
        (lambda f: (f / "all_embeddings.pt").write_bytes(b"no tensor"), r"all_embeddings\.pt is damaged"),
        (lambda f: torch.save([1], f / "all_embeddings.pt"), r"is list, expected \(9, width\)"),
        (lambda f: torch.save(torch.zeros(8, 2), f / "all_embeddings.pt"), r"is \(8, 2\), expected \(9, width\)"),
        (lambda f: torch.save(torch.zeros(9), f / "all_embeddings.pt"), r"is \(9,\), expected \(9, width\)"),
        (lambda f: torch.save(torch.ones(9, 2).to_sparse(), f / "all_embeddings.pt"), "sparse or quantized tensor"),
        (lambda f: torch.save(torch.full((9, 2), torch.nan), f / "all_embeddings.pt"), "values that are not finite"),
        (change_text("myrank", 3, "0 1 2 9"), r"line 3 of myrank_train has an item outside 0\.\.8 \(0\.\.9\)"),
        (change_text("myrank", 3, "0 1 2 -1"), r"line 3 of myrank_train has an item outside 0\.\.8 \(-1\.\.8\)"),
        (change_text("myrank", 2, "0 1 2.5 3"), r"line 2 of myrank_train\.txt has a number that is not an item id"),
        (
            change_text("myrank", 2, "0 1 4294967297 3"),
            r"line 2 of myrank_train\.txt has a number that is not an item id",
        ),
        (change_text("myrank", 4, "0 1 2"), r"line 4 of myrank_train\.txt has 3 values and line 1 has 4"),
        (change_text("myrank", 4, "0 1 2 3 4"), r"line 4 of myrank_train\.txt has 5 values and line 1 has 4"),
        (change_text("myrank", 1, "0 1 2"), r"line 2 of myrank_train\.txt has 4 values and line 1 has 3"),
        (change_text("myrank", 1, "0 1 2 3 4"), r"line 2 of myrank_train\.txt has 4 values and line 1 has 5"),
        (change_text("myrank", 4, ""), r"line 4 of myrank_train\.txt has 0 values and line 1 has 4"),
        (change_text("myrank", 4, "0 1 2 three"), r"value 4 in line 4 of myrank_train\.txt is 'three', expected a num"),
        (lambda f: (f / "myrank_train.txt").write_text(""), r"myrank_train\.txt is empty"),
        (change_text("confidence", 5, "0 1 nan 3"), r"value 3 in line 5 of confidence_train\.txt is NaN"),
        (change_text("confidence", 5, "0 1 2"), r"line 5 of confidence_train\.txt has 3 values and line 1 has 4"),
        (
            change_text("confidence", 5, "0 1 inf 3"),
            r"line 5 of confidence_train is not finite: \[0\.0, 1\.0, inf, 3\.0\]",
        ),
    ],
)
def test_damaged_file_raises_a_specific_error(tmp_path, teacher, manifest, damage, message):
    write_teacher(tmp_path, teacher, manifest=False)
    damage(tmp_path)
    if manifest:  # written after the damage, so its hashes match
        write_manifest(tmp_path, confidence="neg_log_prob", fingerprint=FINGERPRINT)
    with pytest.raises(TeacherOutputsError, match=rf"{re.escape(str(tmp_path))}: .*{message}{REMEDY}"):
        read(tmp_path)


@pytest.mark.parametrize("kind", [None, "distance", "neg_log_prob", "log_prob", "prob"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": [[0, 1, 2, 3]] * (ROWS - 1) + [[0, 1, 2, 2]]}, r"line 6 of myrank_train has an item twice"),
        ({"distance": 1}, r"mean distance falls from .* for the best candidate to .* for the last; negate"),
    ],
)
def test_repeated_items_and_reversed_distances_raise(tmp_path, teacher, kind, changes, message):
    worst_first = {
        None: [-1, -2, -3, -9], "distance": [4, 3, 2, 1], "neg_log_prob": [9, 5, 3, 1], "log_prob": [-9, -5, -3, -1],
        "prob": [0.1, 0.2, 0.3, 0.4],
    }  # fmt: skip
    best_first = {key: values[::-1] for key, values in worst_first.items()}
    distance = (worst_first if "distance" in changes else best_first)[kind]
    ranking = np.asarray(changes.get("ranking", teacher.ranking), np.int32)
    changed = replace(teacher, ranking=ranking, distance=np.asarray([distance] * ROWS, np.float32))
    write_teacher(tmp_path, changed, manifest=False)
    if kind is not None:
        write_manifest(tmp_path, confidence=kind, fingerprint=FINGERPRINT)
    with pytest.raises(TeacherOutputsError, match=message + r".*\. Export them again"):
        read(tmp_path)


def test_embeddings_are_read_as_float32_without_gradient(tmp_path, teacher):
    write_teacher(tmp_path, teacher, manifest=False)
    torch.save(torch.nn.Embedding.from_pretrained(teacher.embeddings, freeze=False).weight, tmp_path / EMBEDDINGS)
    assert not read(tmp_path).embeddings.requires_grad
    torch.save(teacher.embeddings.double() * 1e300, tmp_path / EMBEDDINGS)
    with pytest.raises(TeacherOutputsError, match="not finite, or too large for float32"):
        read(tmp_path)


def test_missing_folder_error_names_the_command(tmp_path):
    with pytest.raises(
        TeacherOutputsError, match=rf"no teacher outputs in .*nowhere; run `python -m llm2rec\.teacher`{REMEDY}"
    ):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_rows": 7}, "they have 6 rows, but the training split has 7"),
        ({"n_rows": 5}, "they have 6 rows, but the training split has 5"),
        ({"n_items": 10}, r"all_embeddings\.pt is \(9, 5\), expected \(10, width\)"),
        (
            {"top_k": 5},
            r"they have 4 candidates per row, but `distill\.ranking\.top_k` is 5; lower it or export more",
        ),
        (
            {"fingerprint": "0123456789abcdef"},
            "belong to dataset 'toy' with fingerprint f{12}, expected 0123456789ab",
        ),
    ],
)
@pytest.mark.parametrize("twin", [True, False])
def test_outputs_of_another_dataset_raise(tmp_path, teacher, changes, message, twin):
    write_teacher(tmp_path, teacher, twin=twin)
    with pytest.raises(TeacherOutputsError, match=message + REMEDY):
        read(tmp_path, **changes)


@pytest.mark.parametrize("name", ["all_embeddings.pt", "myrank_train.txt", "confidence_train.txt", "myrank_train.npy"])
def test_changed_file_raises(tmp_path, teacher, name):
    write_teacher(tmp_path, teacher, twin=True)
    content = bytearray((tmp_path / name).read_bytes())
    content[-2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TeacherOutputsError, match=rf"{re.escape(name)} has changed since it was written{REMEDY}"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["myrank_train.npy", "all_embeddings.pt"])
def test_missing_file_of_the_manifest_raises(tmp_path, teacher, name):
    write_teacher(tmp_path, teacher, twin=True)
    (tmp_path / name).unlink()
    with pytest.raises(TeacherOutputsError, match=rf"{re.escape(name)} is missing, but the manifest lists it"):
        read(tmp_path)


def test_tables_of_different_shapes_raise(tmp_path, teacher):
    write_teacher(tmp_path, teacher, manifest=False)
    np.savetxt(tmp_path / "confidence_train.txt", teacher.distance[:, :3])
    with pytest.raises(TeacherOutputsError, match=r"myrank_train has shape \(6, 4\) but confidence_train has \(6, 3\)"):
        read(tmp_path)


@pytest.mark.parametrize("twin", [True, False])
def test_values_are_checked_in_text_and_npy_files(tmp_path, teacher, twin):
    teacher.ranking[4, 1] = ITEMS
    write_teacher(tmp_path, teacher, twin=twin)
    with pytest.raises(TeacherOutputsError, match=r"line 5 of myrank_train has an item outside 0\.\.8 \(0\.\.9\)"):
        read(tmp_path)


def test_invalid_json_manifest_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(TeacherOutputsError, match=r"manifest\.json is not JSON"):
        read(tmp_path)


def test_manifest_that_is_not_an_object_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(TeacherOutputsError, match=rf"manifest\.json contains a list, expected an object{REMEDY}"):
        read(tmp_path)


def test_manifest_without_confidence_kind_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher, manifest=False)
    write_manifest(tmp_path, fingerprint=FINGERPRINT)
    with pytest.raises(TeacherOutputsError, match="lacks `confidence`, the kind of the confidences"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "found"), [("rows", ROWS), ("top_k", K), ("n_items", ITEMS), ("width", 5)])
def test_manifest_with_wrong_sizes_raises(tmp_path, teacher, name, found):
    write_teacher(tmp_path, teacher, manifest=False)
    about = {"fingerprint": FINGERPRINT, "confidence": "distance"}
    write_manifest(tmp_path, **about, **{name: found})
    read(tmp_path)
    write_manifest(tmp_path, **about, **{name: found + 1})
    message = rf"`{name}` in manifest\.json is {found + 1}, but the files have {found}{REMEDY}"
    with pytest.raises(TeacherOutputsError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (np.zeros((ROWS, K)), r"myrank_train\.npy is \(6, 4\) of float64, expected \(rows, K\) of int32"),
        (np.zeros(ROWS, np.int32), r"myrank_train\.npy is \(6,\) of int32, expected \(rows, K\) of int32"),
        (np.array([None]), r"myrank_train\.npy is damaged"),
    ],
)
def test_invalid_npy_file_raises(tmp_path, teacher, twin, message):
    write_teacher(tmp_path, teacher, twin=True, manifest=False)
    np.save(tmp_path / "myrank_train.npy", twin)
    write_manifest(tmp_path, confidence="neg_log_prob", fingerprint=FINGERPRINT)
    with pytest.raises(TeacherOutputsError, match=message + REMEDY):
        read(tmp_path)


def test_manifest_without_fingerprint_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher)
    write_manifest(tmp_path, confidence="neg_log_prob")
    with pytest.raises(TeacherOutputsError, match="with fingerprint None, expected"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "numbers", "message"),
    [
        ("prob", [0.5, 0.3, 0.2, 0], r"'prob' .* expected above 0 and up to 1, but its numbers lie within 0 and 0\.5"),
        ("prob", [3, 0.3, 0.2, 0.1], r"'prob' .* expected above 0 and up to 1, but its numbers lie within 0\.1 and 3"),
        ("log_prob", [1, -1, -2, -3], r"'log_prob' .* expected 0 or less, but its numbers lie within -3 and 1"),
        ("neg_log_prob", [-1, 1, 2, 3], r"'neg_log_prob' .* expected 0 or more, but its numbers lie within -1 and 3"),
    ],
)
def test_confidences_out_of_range_raise(tmp_path, teacher, kind, numbers, message):
    write_teacher(tmp_path, replace(teacher, distance=np.asarray([numbers] * ROWS, np.float32)), kind=kind)
    with pytest.raises(TeacherOutputsError, match=message + REMEDY):
        read(tmp_path)


def test_confidences_out_of_range_by_rounding_are_accepted(tmp_path, teacher):
    beyond = np.asarray([[-1e-4, 1, 2, 3]] * ROWS, np.float32)
    write_teacher(tmp_path, replace(teacher, distance=beyond), kind="neg_log_prob")
    assert read(tmp_path).distance.tolist() == beyond.tolist()


def test_manifest_with_wrong_number_of_training_rows_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher, manifest=False)
    about = {"confidence": "distance", "fingerprint": FINGERPRINT}
    write_manifest(tmp_path, **about, train_rows=ROWS)
    read(tmp_path)
    write_manifest(tmp_path, **about, train_rows=999)
    with pytest.raises(TeacherOutputsError, match=rf"`train_rows` .* is 999, but the training split has 6{REMEDY}"):
        read(tmp_path)


def test_unknown_confidence_kind_raises(tmp_path, teacher):
    write_teacher(tmp_path, teacher, kind="logits")
    with pytest.raises(TeacherOutputsError, match="unknown kind of confidence 'logits'"):
        read(tmp_path)


# ---- some rows labelled ----------------------------------------------------------------------------------------------

LABELLED = np.array([1, 2, 5])


def write_some(folder, teacher, rows=LABELLED, lines=3, **values):
    """Write the files of a teacher with a budget."""
    some = TeacherOutputs(teacher.embeddings, teacher.ranking[:lines], teacher.distance[:lines], {})
    write_teacher(folder, some, manifest=False)
    np.save(folder / "rows.npy", rows)
    write_manifest(folder, confidence="neg_log_prob", fingerprint=FINGERPRINT, **values)
    return folder


def test_partially_labelled_outputs_are_indexed_by_row(tmp_path, teacher):
    outputs = read(write_some(tmp_path, teacher))
    assert outputs.labelled.tolist() == outputs.rows_labelled(ROWS).tolist() == LABELLED.tolist()
    batch = outputs.batch(np.array([5, 1, 2]), top_k=2, targets=teacher.ranking[[2, 0, 1], 1].astype(np.int64))
    assert batch.ranking.tolist() == teacher.ranking[[2, 0, 1], :2].tolist()
    assert batch.distance.tolist() == teacher.distance[[2, 0, 1], :2].tolist()
    assert batch.target_distance.tolist() == pytest.approx(teacher.distance[[2, 0, 1], 1].tolist())
    assert outputs.batch(np.array([0, 3, 4]), top_k=2).ranking.shape == (3, 2)  # something, for rows without weight
    assert teacher.rows_labelled(ROWS).tolist() == list(range(ROWS))


@pytest.mark.parametrize(
    ("rows", "lines", "message"),
    [
        (np.array([1, 2]), 3, r"they have 3 rows, but rows\.npy lists 2"),
        (np.array([1, 2, 6]), 3, r"rows\.npy lists rows 1 to 6, but the training split has 6"),
        (np.array([-1, 2, 5]), 3, r"rows\.npy lists rows -1 to 5, but the training split has 6"),
        (np.array([2, 1, 5]), 3, r"rows\.npy is not an ascending list of row numbers"),
        (np.array([1, 1, 5]), 3, r"rows\.npy is not an ascending list of row numbers"),
        (np.array([1.0, 2.0, 5.0]), 3, r"rows\.npy is not an ascending list of row numbers"),
        (np.array([[1, 2, 5]]), 3, r"rows\.npy is not an ascending list of row numbers"),
        (np.array([1, 2, None]), 3, r"rows\.npy is damaged"),
    ],
)
def test_invalid_labelled_rows_raise(tmp_path, teacher, rows, lines, message):
    with pytest.raises(TeacherOutputsError, match=message + REMEDY):
        read(write_some(tmp_path, teacher, rows, lines))


def test_changed_labelled_rows_raise(tmp_path, teacher):
    write_some(tmp_path, teacher)
    np.save(tmp_path / "rows.npy", np.array([1, 2, 4]))
    with pytest.raises(TeacherOutputsError, match=rf"rows\.npy has changed since it was written{REMEDY}"):
        read(tmp_path)


def test_labelled_rows_missing_from_the_manifest_are_ignored(tmp_path, teacher):
    write_some(tmp_path, teacher)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(TeacherOutputsError, match="they have 3 rows, but the training split has 6"):
        read(tmp_path)
