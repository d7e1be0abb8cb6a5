"""Mixtures, one plain LoRA, or nothing: what is trained, and that every kind of teacher is saved whole."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from engine_helpers import engine_in
from peft import LoraConfig, PeftModel
from teacher_helpers import CPU, build, configured, fit, padded, randomise, split, teacher_rows
from transformers import AutoModel, AutoTokenizer

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.teacher.heads import HEADS
from llm2rec.teacher.settings import TeacherSettings
from llm2rec.teacher.store import load_teacher, save_teacher
from llm2rec.teacher.text_vectors import pool

HISTORIES = [[3, 5, 7, 11], [2], [40, 1, 30], [9, 8]]
TRAINING = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2}
OF_HEAD = {
    "titles": set(),
    "projected": {"title_weight", "projection.weight"},
    "joined": {"title_weight", "to_items.weight", "item_bias"},
    "residual": {"title_weight", "to_items.weight", "item_bias", "recommender_weight"},
}
OF_PROJECTOR = {f"projector.{layer}.{name}" for layer in ("inner", "outer") for name in ("weight", "bias")}
TEACHERS = [
    (tuning, prompts, head, gate_input)
    for tuning, prompts, head, gate_input in product(
        ("ilora", "lora", "none"), ("text", "hybrid"), HEADS, ("llm", "sequence")
    )
    if tuning == "ilora" or gate_input == "llm"
]


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


@pytest.fixture
def histories(data):
    return padded(HISTORIES, data.n_items, 4)


@pytest.fixture
def teacher(data, llm_folder, recommender):
    """Builds any kind of teacher on a Llama, and gives it the recommender if it reads one."""

    def build_it(tuning="ilora", prompts="text", head="titles", gate_input="llm", kind="llama", **settings):
        reads = prompts == "hybrid" or gate_input == "sequence" or head in ("joined", "residual")
        chosen = {"tuning": tuning, "prompts": prompts, "head": head, "gate_input": gate_input, **settings}
        return build(kind, llm_folder, data, recommender if reads else None, **chosen)

    return build_it


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def train(model, data, folder, **settings):
    rows = [teacher_rows(model, split(data, name), np.arange(20)) for name in ("train", "validation")]
    return fit(model, *rows, engine_in(folder, **TRAINING), **settings)


# ---- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tuning", "prompts", "head", "gate_input"), TEACHERS)
def test_a_teacher_trains_its_parts_and_is_saved_whole(
    tuning, prompts, head, gate_input, teacher, data, histories, tmp_path
):
    model, recipe = teacher(tuning, prompts, head, gate_input)
    beside = {name for name in trained(model) if not name.startswith("llm.")}
    assert beside == {f"head.{name}" for name in OF_HEAD[head]} | (OF_PROJECTOR if prompts == "hybrid" else set())
    of_llm = trained(model) - beside
    marks = {"ilora": (".ilora_A.", ".ilora_B.", ".ilora_gate."), "lora": (".lora_A.", ".lora_B."), "none": ()}[tuning]
    assert all(any(mark in name for name in of_llm) for mark in marks)
    assert all(any(mark in name for mark in marks) for name in of_llm)

    randomise(model).eval()
    for part in ("first", "second"):
        save_teacher(tmp_path / part, model, recipe)
        again, recipe_again = load_teacher(tmp_path / part, data, CPU)
        assert recipe_again == recipe
        assert not trained(again)
        assert torch.equal(again.log_probs(*histories), model.log_probs(*histories))
        model, recipe = again, recipe_again


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_plain_lora_lies_on_the_layers_that_ilora_takes(kind, teacher):
    (plain, _), (mixed, _) = teacher("lora", kind=kind), teacher(kind=kind)
    layers = {name.split(".lora_A")[0] for name in trained(plain) if ".lora_A" in name}
    assert layers == {name.split(".ilora_A")[0] for name in trained(mixed) if ".ilora_A" in name}
    assert plain.tuner is None


def test_a_plain_lora_takes_rank_alpha_dropout_and_layers_of_the_adapter(teacher):
    adapter = {
        "r": 10,  # which 4 experts would not divide: there are none
        "alpha": 7.5,
        "dropout": 0.3,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "exclude_modules": ["o_proj"],
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 3.0},
    }
    model, _ = teacher("lora", adapter=adapter)
    layers = {name: each for name, each in model.llm.named_modules() if hasattr(each, "lora_A")}
    assert {name.rsplit(".", 1)[-1] for name in layers} == {"q_proj", "v_proj"}
    for name, layer in layers.items():
        rank, scaling = (4, 3 / 4) if "v_proj" in name else (10, 7.5 / 10)
        assert (layer.r["default"], layer.scaling["default"]) == (rank, scaling)
        assert layer.lora_dropout["default"].p == 0.3


@pytest.mark.parametrize("tuning", ["lora", "none"])
@pytest.mark.parametrize("prompts", ["text", "hybrid"])
def test_plain_tunings_learn(tuning, prompts, teacher, data, tmp_path):
    model, _ = teacher(tuning, prompts, "joined")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reads = {"prompts": prompts, "head": "joined", "recommender_run": "result/x"}
    curriculum = {"curriculum": "two_stage"} if prompts == "hybrid" else {}  # so that both sorts of batches come
    train(model, data, tmp_path, tuning=tuning, **reads, **curriculum)
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == trained(
        model
    )


def test_a_model_with_nothing_to_train_stays_unchanged(teacher, data, histories, tmp_path, caplog):
    model, _ = teacher("none")
    before = model.eval().log_probs(*histories)
    caplog.set_level("INFO")
    train(model.train(), data, tmp_path, tuning="none")
    assert "no trainable parameters: `teacher.tuning` is 'none'" in caplog.text
    assert not model.training
    assert torch.equal(model.log_probs(*histories), before)
    assert not (tmp_path / "checkpoints").exists()


def test_without_tuning_the_language_model_is_unchanged(teacher, data, histories):
    model = teacher("none", exclude_history=False)[0].eval()
    tokens = model.prompts.histories(*histories)
    with torch.no_grad():
        hidden = model.llm(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    users = torch.nn.functional.normalize(pool(hidden, tokens.attention_mask, "mean"), dim=1)
    expected = (20.0 * users @ model.item_vectors.T).log_softmax(dim=1)
    torch.testing.assert_close(model.log_probs(*histories), expected, rtol=1e-4, atol=1e-5)


# ---- saving ----------------------------------------------------------------------------------------------------------


def test_a_plain_lora_is_loaded_by_plain_peft(teacher, data, histories, tmp_path):
    model, recipe = teacher("lora", exclude_history=False)
    save_teacher(tmp_path / "teacher", randomise(model).eval(), recipe)
    adapter = str(tmp_path / "teacher" / "adapter")
    assert isinstance(LoraConfig.from_pretrained(adapter), LoraConfig)
    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(recipe.source), adapter)
    tokens = model.prompts.histories(*histories)
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    with torch.no_grad():
        assert torch.equal(plain(**inputs).last_hidden_state, model.llm(**inputs).last_hidden_state)


def test_the_saved_tokenizer_knows_its_slots_once(teacher, data, tmp_path):
    model, recipe = teacher(prompts="hybrid")
    slot = model.prompts.tokenizer.convert_ids_to_tokens(model.prompts.placeholder_id)
    for part in ("first", "second"):
        save_teacher(tmp_path / part, model, recipe)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / part / "adapter")
        assert list(tokenizer.get_vocab()).count(slot) == 1
        stored = json.loads((tmp_path / part / "adapter" / "tokenizer.json").read_text())
        assert [token["content"] for token in stored["added_tokens"]].count(slot) == 1
        model, recipe = load_teacher(tmp_path / part, data, CPU)
        assert model.prompts.placeholder_id == tokenizer.convert_tokens_to_ids(slot)
        assert len(model.prompts.tokenizer) == len(tokenizer)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("recommender/config.json", "lacks recommender/config.json"),
        ("recommender/model.safetensors", "lacks recommender/model.safetensors"),
        ("head.safetensors", "lacks head.safetensors"),
        ("items.safetensors", "lacks items.safetensors"),
        ("adapter/adapter_model.safetensors", "lacks adapter/adapter_model.safetensors"),
        ("adapter/tokenizer_config.json", "lacks adapter/tokenizer_config.json"),
    ],
)
def test_a_teacher_that_lacks_a_part_is_refused_before_its_model_is_loaded(
    part, message, teacher, data, tmp_path, monkeypatch
):
    save_teacher(tmp_path / "teacher", *teacher(prompts="hybrid", head="residual"))
    (tmp_path / "teacher" / part).unlink()
    monkeypatch.setattr("llm2rec.teacher.factory.load_model", lambda *_, **__: pytest.fail("loaded the model first"))
    with pytest.raises(CheckpointError, match=message):
        load_teacher(tmp_path / "teacher", data, CPU)


def test_a_head_that_lacks_weights_is_refused(teacher, data, tmp_path):
    model, recipe = teacher(head="projected")
    save_teacher(tmp_path / "teacher", model, recipe)
    save_teacher(tmp_path / "plain", *teacher())
    (tmp_path / "plain" / "head.safetensors").replace(tmp_path / "teacher" / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.safetensors has changed since it was written"):
        load_teacher(tmp_path / "teacher", data, CPU)
    (tmp_path / "teacher" / "manifest.json").unlink()  # as in earlier versions
    with pytest.raises(CheckpointError, match=r"lacks head.projection.weight, head.title_weight; copy the folder"):
        load_teacher(tmp_path / "teacher", data, CPU)


# ---- settings --------------------------------------------------------------------------------------------------------

RUN = "recommender_run=result/x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tuning=full", r"tuning is 'full', expected one of ilora, lora, none"),
        ("prompts=soft", r"prompts is 'soft', expected one of text, hybrid"),
        ("head=tower", r"head is 'tower', expected one of titles, projected, joined, residual"),
        ("curriculum=cosine", r"curriculum is 'cosine', expected one of off, linear, linear_per_epoch, two_stage"),
        ("gate_input=user", r"gate_input is 'user', expected one of llm, sequence"),
        ("projector_learning_rate_ratio=0", r"projector_learning_rate_ratio is 0.0, expected a positive"),
        ("head_learning_rate_ratio=-2", r"head_learning_rate_ratio is -2.0, expected a positive"),
        ("gate_weight_decay=-0.5", r"gate_weight_decay is -0.5, expected 0"),
        ("projector_weight_decay=inf", r"projector_weight_decay` is inf, expected a finite"),
        ("item_refresh_steps=-3", r"item_refresh_steps is -3, expected 0"),
        ("prompts=hybrid", r"teacher.prompts=hybrid need a trained student, and teacher.recommender_run is None; add"),
        ("head=joined", r"teacher.head=joined need a trained student"),
        ("head=residual", r"teacher.head=residual need a trained student"),
        ("gate_input=sequence prompts=hybrid", r"gate_input=sequence and teacher.prompts=hybrid need"),
        (f"{RUN}", r"teacher.recommender_run is 'result/x' and nothing reads it; add"),
        ("residual_dropout=1", r"residual_dropout is 1.0, expected 0 to below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name_and_value(overrides, message):
    with pytest.raises(ConfigError, match=message):
        configured(*(f"teacher.{each}" for each in overrides.split()))


@pytest.mark.parametrize(
    ("overrides", "given", "cause"),
    [
        ("tuning=lora balance_loss=0.5", "balance_loss is 0.5", "tuning is 'lora'"),
        (f"tuning=none gate_input=sequence {RUN}", "gate_input is 'sequence'", "tuning is 'none'"),
        ("tuning=lora gate_learning_rate_ratio=1", "gate_learning_rate_ratio is 1.0", "tuning is 'lora'"),
        ("tuning=none gate_weight_decay=0", "gate_weight_decay is 0.0", "tuning is 'none'"),
        ("tuning=lora adapter.scaling=per_expert", "adapter.scaling is 'per_expert'", "tuning is 'lora'"),
        ("tuning=lora adapter.num_experts=8", "adapter.num_experts is 8", "tuning is 'lora'"),
        (
            "tuning=lora adapter.gate=topk adapter.gate_top_k=3",
            "adapter.gate is 'topk' and teacher.adapter.gate_top_k is 3",
            "tuning is 'lora'",
        ),
        ("tuning=none adapter.gate_temperature=2", "adapter.gate_temperature is 2.0", "tuning is 'none'"),
        ("tuning=none adapter.r=8", "adapter.r is 8", "tuning is 'none'"),
        ("tuning=none adapter.target_modules=[q_proj]", r"adapter.target_modules is \['q_proj'\]", "tuning is 'none'"),
        ("tuning=none item_refresh_steps=5", "item_refresh_steps is 5", "tuning is 'none'"),
        (f"objective=title head=joined {RUN}", "head is 'joined'", "objective is 'title'"),
        ("objective=title item_refresh_steps=9", "item_refresh_steps is 9", "objective is 'title'"),
        ("objective=title popularity_prior=0.5", "popularity_prior is 0.5", "objective is 'title'"),
        ("objective=title logit_scale=7", "logit_scale is 7.0", "objective is 'title'"),
        ("title.ranking=grounding", "title.ranking is 'grounding'", "objective is 'item'"),
        ("curriculum=linear", "curriculum is 'linear'", "prompts is 'text'"),
        ("projector_learning_rate_ratio=2", "projector_learning_rate_ratio is 2.0", "prompts is 'text'"),
        ("projector_weight_decay=0.1", "projector_weight_decay is 0.1", "prompts is 'text'"),
        ("head_learning_rate_ratio=2", "head_learning_rate_ratio is 2.0", "head is 'titles'"),
        (f"residual_dropout=0.5 head=joined {RUN}", "residual_dropout is 0.5", "head is 'joined'"),
        (
            "objective=title title.n_candidates=0 title.redraw_candidates=true title.hit_rule=released",
            "title.redraw_candidates is True and teacher.title.hit_rule is 'released'",
            "title.n_candidates is 0",
        ),
        (
            "objective=title title.ranking=grounding title.search_beams=5",
            "title.search_beams is 5",
            "title.ranking is 'grounding'",
        ),
    ],
)
def test_options_that_the_chosen_teacher_ignores_are_refused(overrides, given, cause):
    with pytest.raises(ConfigError, match=f"^teacher.{given}, which nothing reads while teacher.{cause}; leave"):
        configured(*(f"teacher.{each}" for each in overrides.split()))


def test_a_teacher_excludes_its_history_as_rankings_do_unless_it_is_set():
    for option, expected in ((None, [True, False]), (True, [True, True]), (False, [False, False])):
        settings = TeacherSettings(exclude_history=option)
        assert [settings.excluding(mask_seen).exclude_history for mask_seen in (True, False)] == expected
