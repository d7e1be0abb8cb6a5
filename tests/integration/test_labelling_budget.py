"""A teacher with a budget labels only the rows that its policy distils."""

import json

import numpy as np
import pytest
from command_helpers import STUDENT, TEACHER, run, runs, student

pytestmark = pytest.mark.slow
N_ROWS, N_LABELLED = 424, 106
BUDGET = ["active=random", "active.budget=0.25"]
ONCE = [*STUDENT, "student.training.epochs=1"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A folder in which all rows are labelled, and one with a budget; by the same teacher."""
    folders = []
    for name, budget in (("all", []), ("some", BUDGET)):
        folder = tmp_path_factory.mktemp(name)
        run(folder, "teacher", *TEACHER, "teacher.training.epochs=0", *budget)
        folders.append(folder)
    return folders


def written(folder):
    return folder / "data" / "teacher_outputs" / "toy" / "ilora-tiny_random"


def test_only_the_rows_of_the_budget_are_labelled_and_as_without_one(outputs):
    everything, some = map(written, outputs)
    rows = np.load(some / "rows.npy")
    assert len(rows) == N_LABELLED
    assert not (everything / "rows.npy").exists()
    for name in ("myrank_train", "confidence_train"):
        whole, part = (np.load(folder / f"{name}.npy") for folder in (everything, some))
        assert (len(whole), len(part)) == (N_ROWS, N_LABELLED)
        np.testing.assert_allclose(part, whole[rows], rtol=1e-4)
        assert len((some / f"{name}.txt").read_text().splitlines()) == N_LABELLED
    manifest = json.loads((some / "manifest.json").read_text())
    assert (manifest["rows"], manifest["train_rows"]) == (N_LABELLED, N_ROWS)
    assert manifest["selection"]["budget"] == 0.25
    assert "rows.npy" in manifest["sha256"]


def test_savings_of_the_budget_are_recorded(outputs):
    (of_run,) = runs(outputs[1])
    labelling = json.loads((of_run / "metrics" / "labelling.json").read_text())
    assert (labelling["train_rows"], labelling["labelled"]) == (N_ROWS, N_LABELLED)
    assert labelling["seconds_saved"] == pytest.approx(labelling["seconds"] * (N_ROWS / N_LABELLED - 1), abs=1e-3)
    assert "labelled 106 of 424 rows in" in (of_run / "log.txt").read_text()
    (of_run,) = runs(outputs[0])
    assert json.loads((of_run / "metrics" / "labelling.json").read_text())["seconds_saved"] == 0


def test_the_same_budget_distils_from_either(outputs, tmp_path):
    found = []
    for folder in outputs:
        run(tmp_path / folder.name, "distill", *ONCE, *BUDGET, f"distill.teacher_outputs={written(folder)}")
        found.append(student(runs(tmp_path / folder.name)[-1]))
    everything, some = found
    for name in everything:
        if name.endswith("qkv.bias"):
            # A key's bias shifts all scores of a row alike: its true gradient is 0, and Adam steps by the sign of the
            # rounding errors, which differ with the batches that a confidence was computed in.
            everything[name], some[name] = (np.delete(each[name].reshape(3, -1), 1, axis=0) for each in found)
        np.testing.assert_allclose(everything[name], some[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_policy_that_chooses_takes_what_is_labelled_and_one_that_needs_all_is_refused(outputs, tmp_path):
    where = f"distill.teacher_outputs={written(outputs[1])}"
    done = run(tmp_path / "confidence", "distill", *ONCE, where, "active=confidence", "active.budget=0.1")
    assert "distilling 42 of 424 rows" in done.stderr
    done = run(tmp_path / "all", "distill", *ONCE, where, check=False)
    assert done.returncode == 1
    assert "SelectionPolicyAll distils 318 rows without teacher labels" in done.stderr
    assert "Traceback" not in done.stderr
