"""The study of what a language model is worth: a whole study in small, and equal tries for all arms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import language_study
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_study_in_small_measures_what_the_language_model_adds_and_finds_its_runs_again(tmp_path):
    file = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "language_study.py"), "--quick", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def study(*more):
        done = subprocess.run(
            [*command, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(file.read_text())

    chosen = study()
    assert "test" not in chosen["samples"]["toy"], "the test split stays closed"
    again = chosen["samples"]["toy"]["students_on_validation"]["metrics"]
    assert again.keys() == {"sasrec", *language_study.QUICK_ARMS}
    for arm, found in again.items():
        best = chosen["samples"]["toy"]["validation"][arm]["by_seed"].values()
        assert found["ndcg@20"] == pytest.approx(list(best)), "the weights that were kept are those that validated best"
    runs = sorted((tmp_path / "language_study").rglob("run.json"))
    opened = study("--open-test")
    assert opened["samples"]["toy"]["validation"].keys() == chosen["samples"]["toy"]["validation"].keys()
    trained = [each for each in sorted((tmp_path / "language_study").rglob("run.json")) if each not in runs]
    assert {json.loads(each.read_text())["stage"] for each in trained} <= {"data", "evaluate"}, "nothing trains again"
    test = opened["samples"]["toy"]["test"]
    validation = opened["samples"]["toy"]["validation"]
    means = {arm: sum(found["by_seed"].values()) / 2 for arm, found in validation.items()}
    assert test["language_model"]["without"] == max(("sasrec", "distilled"), key=means.__getitem__)
    assert test["language_model"]["with"] == "reading, distilled + titles"
    assert (
        test["language_model"]["ratio_low"] < test["language_model"]["relative"] < test["language_model"]["ratio_high"]
    )
    assert test["metrics"].keys() >= {*language_study.SERVED, "sasrec", "distilled"}
    assert test["gains_over_sasrec"]["distilled"]["p_holm"] >= test["gains_over_sasrec"]["distilled"]["p"]
    kinds = {name.split()[0] for name in test["slices"]}
    assert kinds == {"popularity", "history", "untrained"}
    for kind in kinds - {"untrained"}:
        parts = [each for name, each in test["slices"].items() if name.startswith(kind)]
        whole = sum(each["rows"] * each["ndcg@20"]["sasrec"] for each in parts) / sum(each["rows"] for each in parts)
        assert whole == pytest.approx(sum(test["metrics"]["sasrec"]["ndcg@20"]) / 2)
    assert opened["headline"]["toy: share of the language model"] == pytest.approx(
        test["language_model"]["relative"], abs=1e-5
    )
    assert opened["plan"]["tries"] == 1
    assert str(tmp_path) not in file.read_text()


def test_every_trained_arm_searches_options_that_the_arms_it_is_compared_with_search_too():
    arms = {arm.name: arm for arm in (*language_study.DISTILLED, language_study.WITH_ILORA)}
    pairs = [("distilled", "distilled + titles"), ("reading, distilled", "reading, distilled + titles")]
    for without, with_it in [*pairs, ("reading, distilled + titles", "reading, distilled + ilora")]:
        assert arms[without].space == arms[with_it].space
        assert arms[without].fixed == arms[with_it].fixed
    assert {arm.name for arm in language_study.DISTILLED if not arm.language} == {"distilled"}
    assert set(language_study.QUICK_ARMS) <= arms.keys()
