"""What a card says, and that people may change it."""

import subprocess
from dataclasses import asdict, replace

from huggingface_hub import ModelCard
from share_helpers import TRAINING

from llm2rec.cards import best_validation, student_card, teacher_card
from llm2rec.core.files import check_hashes, write_json
from llm2rec.distill.settings import DistillSettings, EmbeddingSettings, RankingSettings
from llm2rec.student.models import load_student


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


LLM = {"teacher": "ilora-minilm", "objective": "item", "tuning": "ilora"}
ENSEMBLE = {
    "teacher": "ensemble",
    "members": [
        *[{"kind": "student", "label": "sasrec", "share": 0.1}] * 2,
        {"kind": "student", "label": "gru4rec", "share": 0.1},
        {"kind": "neighbours", "share": 0.5},
        {"kind": "titles", "llm": "minilm", "share": 0.2},
    ],
}
EARLIER = {"teacher": "ensemble", "members": [{"label": "sasrec"}] * 2 + [{"label": "gru4rec"}], "neighbours": 0.5}


def distilled_card(manifest, **settings):
    recipe = {"distill": asdict(DistillSettings(**settings))}
    return student_card("gru4rec", ["a", "b"], 10, TRAINING, {"student": {"width": 8}} | recipe, teacher=manifest)


def test_a_students_card_names_model_teacher_data_and_metrics():
    card = distilled_card(LLM)
    text, data = str(ModelCard(card)), ModelCard(card).data
    assert {"llm2rec", "recommendation", "gru4rec", "distillation", "dllm2rec"} <= set(data.tags)
    for part in (
        "# GRU4Rec for shop, distilled from a language model",
        "the teacher `ilora-minilm` (a language model with instance-wise LoRA",
        "the ranking distillation of DLLM2Rec (arXiv 2405.00338) and the fusion of item vectors",
        "5,000 training rows over 12 items, split `leave_one_out`",
        "| NDCG@10 | 0.2500 |",
        "Full ranking of all 12 items, no items excluded, for 300 validation rows",
        '"width": 8',
        "; seed 7; python ",
    ):
        assert part in text, part


def test_a_card_names_the_teacher_of_the_manifest_and_the_losses_of_the_recipe():
    listwise = RankingSettings(loss="listwise", top_k=50)
    card = distilled_card(ENSEMBLE, name="listwise", ranking=listwise, embedding=EmbeddingSettings(fusion_scale=0.0))
    lead, tags = card.split("```")[0], ModelCard(card).data.tags
    assert "# GRU4Rec for shop, distilled from an ensemble" in lead
    assert (
        "2 sasrec, 1 gru4rec, item neighbours with weight 0.5 and title neighbours by `minilm` with weight 0.2" in lead
    )
    assert "by listwise ranking distillation" in lead
    assert "language model" not in lead
    assert "dllm2rec" not in lead.lower()
    assert "distillation" in tags
    earlier = distilled_card(EARLIER, name="listwise", ranking=listwise).split("```")[0]
    assert "an ensemble of 2 sasrec, 1 gru4rec and item neighbours with weight 0.5" in earlier
    aligned = EmbeddingSettings(fusion_scale=0.0, alignment_weight=0.1, initialise="pca")
    card = distilled_card({}, ranking=RankingSettings(weight=0.0), embedding=aligned)
    assert "distilled from a teacher of unknown kind by the alignment of item vectors" in card
    assert "dllm2rec" not in card.split("```")[0].lower()
    frozen = EmbeddingSettings(fusion="frozen", components=4)
    card = distilled_card({}, ranking=RankingSettings(weight=0.0), embedding=frozen)
    assert "by the teacher's item vectors in columns that are not trained (after AlphaFuse" in card
    assert "dllm2rec" not in card.split("```")[0].lower()
    assert "distilled" not in student_card("gru4rec", ["a"], 10, TRAINING, {})


def test_the_card_says_whether_new_items_need_training():
    plain, reads = (student_card("gru4rec", ["a"], 10, TRAINING, {}, reads=reads) for reads in (False, True))
    assert "new items need another training" in plain
    assert "new items by their titles" in reads
    assert "another training" not in reads


def test_a_teacher_that_was_not_trained_says_so():
    card = teacher_card("minilm", "x", "none", "item", TRAINING, {}, is_trained=False)
    assert "used by llm2rec without training on `shop`" in card
    assert "trained with llm2rec" not in card


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
    assert "The model was not validated." in card
    assert ModelCard(card).data.eval_results is None
