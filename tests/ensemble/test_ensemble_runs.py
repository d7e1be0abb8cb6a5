"""Which runs an ensemble takes by itself."""

import pytest

from llm2rec.core.files import write_json
from llm2rec.ensemble.runs import latest_members


@pytest.fixture
def finished(tmp_path):
    """Writes the record of a finished run; gives its folder."""

    def write(number, stage, label, seed=1, fingerprint="f", **changes):
        folder = tmp_path / "result" / f"result_20260101_00000{number}"
        dataset = {"name": "toy", "fingerprint": fingerprint}
        record = {"stage": stage, "status": "finished", "label": label, "seed": seed, "parameters": 1}
        write_json(folder / "run.json", {**record, "dataset": dataset, **changes})
        return folder

    return write


def test_latest_members_are_the_newest_students_and_the_llm_teachers_whose_outputs_are_there(tmp_path, finished):
    finished(0, "student", "sasrec")
    newer, other = finished(1, "student", "sasrec"), finished(2, "student", "sasrec", seed=2)
    teacher = finished(3, "teacher", "ilora")
    finished(4, "teacher", "untrained")  # it has written no outputs
    finished(5, "distill", "sasrec + dllm2rec")
    finished(6, "student", "gru4rec", fingerprint="other")
    finished(7, "student", "gru4rec", status="failed")
    outputs = tmp_path / "outputs"
    write_json(outputs / "ilora" / "manifest.json", {"run": teacher.name})
    write_json(outputs / "ensemble" / "manifest.json", {"run": "result_20260101_000009"})
    assert latest_members(tmp_path / "result", outputs, "f") == [newer, other, teacher]
    assert latest_members(tmp_path / "result", tmp_path / "none", "f") == [newer, other]
