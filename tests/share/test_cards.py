"""What a card says, and that people may change it."""

import subprocess
from dataclasses import replace

from huggingface_hub import ModelCard
from share_helpers import TRAINING

from llm2rec.core.card import best_validation
from llm2rec.core.files import check_hashes, write_json
from llm2rec.student.card import student_card
from llm2rec.student.store import load_student
from llm2rec.teacher.card import teacher_card


def test_the_kept_weights_metrics_are_those_of_the_best_step(tmp_path):
    assert best_validation(tmp_path) == {}
    history = [
        {"step": step, "train/loss": 1.0, "val/ndcg@10": value} for step, value in [(5, 0.1), (9, 0.3), (12, 0.2)]
    ]
    write_json(tmp_path / "metrics" / "validation.json", {"best_step": 9, "history": history})
    assert best_validation(tmp_path) == {"ndcg@10": 0.3}


def test_a_card_may_be_edited_and_nothing_else(make_run):
    folder = make_run() / "student"
    (folder / "README.md").write_text("mine")
    check_hashes(folder)
    load_student(folder)
    (folder / "README.md").unlink()
    load_student(folder)


def test_a_students_card_says_what_it_is_and_where_it_comes_from():
    card = student_card("gru4rec", ["a", "b"], 10, TRAINING, {"student": {"width": 8}}, teacher="ilora-minilm")
    text, data = str(ModelCard(card)), ModelCard(card).data
    assert {"llm2rec", "recommendation", "gru4rec", "distillation"} <= set(data.tags)
    for told in (
        "# GRU4Rec for shop, distilled from a language model",
        "distilled from the teacher `ilora-minilm`",
        "5,000 training rows over 12 items, split `leave_one_out`",
        "| NDCG@10 | 0.2500 |",
        "Full ranking of all 12 items, no items left out, for 300 validation rows",
        '"width": 8',
        "; seed 7; python ",
    ):
        assert told in text, told


def test_the_example_of_a_card_runs(make_run, capsys):
    run = make_run()
    code = (run / "student" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace('"FOLDER"', repr(str(run))), {})
    assert "Recommendation(item_id='b" in capsys.readouterr().out
    assert len(code.strip().splitlines()) == 3


def test_a_card_names_the_commit_of_the_code():
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    card = student_card("sasrec", ["a"], 10, TRAINING, {})
    assert head.returncode != 0 or f"llm2rec, commit `{head.stdout.strip()}`" in card


def test_a_teachers_card_names_its_language_model_where_that_is_on_the_hub(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    card = teacher_card("minilm", "org/MiniLM", "ilora", "item", TRAINING, {"teacher": {"at": "/home/ann/x"}})
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation) == ("org/MiniLM", "adapter")
    assert {"peft", "ilora", "item-objective"} <= set(data.tags)
    assert "/home/ann" not in card
    local = teacher_card("minilm", "/models/minilm", "none", "title", TRAINING, {})
    assert "/models" not in local
    assert ModelCard(local).data.base_model is None


def test_a_card_says_what_a_title_teacher_was_validated_on():
    card = teacher_card("minilm", "x", "ilora", "title", replace(TRAINING, n_candidates=20), {})
    assert "Targets among 20 candidates drawn at random, for 300 validation rows" in card
    assert "ull ranking" not in card
    assert {each.task_name for each in ModelCard(card).data.eval_results} == {"next item, 20 candidates"}


def test_a_model_that_was_not_validated_says_so():
    card = student_card("sasrec", ["a"], 10, TRAINING.__class__(**{**vars(TRAINING), "metrics": {}}), {})
    assert "It was not validated in its training." in card
    assert ModelCard(card).data.eval_results is None
