"""The recommender: pooling, scores, what is trained, and saving."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from architecture_helpers import make_architecture
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from teacher_helpers import CPU, build, padded, randomise, split, teacher_rows
from transformers import AutoModel

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, write_json
from llm2rec.core.vectors import standardised
from llm2rec.data import prepare
from llm2rec.data.toy import Toy
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.factory import popularity_bias
from llm2rec.teacher.llm import locate, resolve_precision, weights_hash
from llm2rec.teacher.settings import LLMSettings
from llm2rec.teacher.store import load_teacher, save_teacher
from llm2rec.teacher.text_vectors import pool

KINDS = ["llama", "bert"]
HISTORIES = [[3, 5, 7, 11], [2], [40, 1, 30], [9, 8], [0, 47, 13, 21, 34, 6]]


def histories_of(data, rows=HISTORIES, width=6):
    return padded(rows, data.n_items, width)


def gradients(model, rows, positions):
    """Gradients of the mean loss over some rows, by parameter name."""
    model.zero_grad()
    data, numbers = rows.data, rows.rows[positions]
    inputs = model.read(*data.histories(numbers))
    targets = data.batch(numbers).targets
    with model.use_gates(torch.from_numpy(rows.gate_inputs[positions])):
        loss = cross_entropy(model(**vars(inputs), keep=targets), targets).mean()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, loss.item()


# ---- pooling and vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pooling", "expected"), [("last", [[5.0, 6.0], [1.0, 2.0]]), ("mean", [[3.0, 4.0], [1.0, 2.0]]), ("cls", None)]
)
def test_pooling_by_hand_whatever_lies_in_the_padding(pooling, expected):
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[1.0, 2.0], [9.0, 9.0], [-9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    expected = torch.tensor(expected if expected else [[1.0, 2.0], [1.0, 2.0]])
    assert torch.equal(pool(hidden, mask, pooling), expected)
    wider = torch.cat([hidden, torch.full((2, 4, 2), 77.0)], dim=1)
    assert torch.equal(pool(wider, torch.nn.functional.pad(mask, (0, 4)), pooling), expected)


def test_standardised_vectors_are_centred_before_they_get_unit_length():
    vectors = standardised(torch.tensor([[10.0, 1.0], [10.0, -1.0], [13.0, 0.0]]))
    assert torch.allclose(vectors[2], torch.tensor([1.0, 0.0]))
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))


def test_popularity_bias_is_the_log_of_the_smoothed_share():
    bias = popularity_bias(np.array([1, 1, 2], np.int32), 3, 0.5)
    assert torch.allclose(bias, 0.5 * torch.log(torch.tensor([1.0, 3.0, 2.0]) / 6))


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_sum_to_one_and_history_comes_last(kind, data, llm_folder):
    model = randomise(build(kind, llm_folder, data)[0]).eval()
    log_probs = model.log_probs(*histories_of(data))
    assert log_probs.dtype == torch.float32
    assert log_probs.shape == (len(HISTORIES), data.n_items)
    assert torch.allclose(log_probs.exp().sum(dim=1), torch.ones(len(HISTORIES)), atol=1e-5)
    for row, history in enumerate(HISTORIES):
        order = log_probs[row].argsort(descending=True).tolist()
        assert set(order[-len(history) :]) == set(history)


def test_items_of_the_history_may_come_again_where_asked_for(data, llm_folder):
    excluding = randomise(build("llama", llm_folder, data)[0]).eval()
    repeating = randomise(build("llama", llm_folder, data, exclude_history=False)[0]).eval()
    theirs, ours = (model.log_probs(*histories_of(data)) for model in (repeating, excluding))
    assert (theirs > -100).all()
    for row, history in enumerate(HISTORIES):
        others = [item for item in range(data.n_items) if item not in history]
        assert torch.allclose(theirs[row, others].log_softmax(0), ours[row, others].log_softmax(0), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_a_row_ignores_the_other_rows_and_the_padding(kind, pooling, data, llm_folder):
    model = randomise(build(kind, llm_folder, data)[0]).eval()
    model.pooling = pooling
    together = model.log_probs(*histories_of(data))
    for row, history in enumerate(HISTORIES):
        alone = model.log_probs(*padded([history], data.n_items, len(history)))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    order = [4, 2, 0, 1, 3]
    shuffled = model.log_probs(*histories_of(data, [HISTORIES[i] for i in order], width=9))
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-4)


def test_reading_titles_shows_its_progress(data, llm_folder, progress_lines):
    build("bert", llm_folder, data)[0].refresh_titles()
    assert progress_lines()["read texts"].startswith(f"{data.n_items} of {data.n_items} texts, ")


def test_a_history_decides_its_own_gates(data, llm_folder):
    model = randomise(build("llama", llm_folder, data)[0]).eval()
    gates = model.tuner.gate(model.frozen_vectors(model.prompts.histories(*histories_of(data))))
    assert torch.allclose(gates.sum(dim=1), torch.ones(len(HISTORIES)))
    assert torch.pdist(gates).min() > 1e-4


def test_gate_inputs_have_unit_length_and_ignore_the_adapter(data, llm_folder):
    model = build("bert", llm_folder, data)[0]
    tokens = model.prompts.histories(*histories_of(data))
    before = model.frozen_vectors(tokens)
    assert torch.allclose(before.norm(dim=1), torch.ones(len(HISTORIES)), atol=1e-4)
    assert torch.equal(randomise(model).train().frozen_vectors(tokens), before)
    assert model.training


def test_an_untrained_teacher_is_the_frozen_model(data, llm_folder):
    fresh = build("llama", llm_folder, data, exclude_history=False)[0].eval()
    users = fresh.frozen_vectors(fresh.prompts.histories(*histories_of(data)))
    expected = (fresh.head.scale * users @ fresh.item_vectors.T).log_softmax(dim=1)
    torch.testing.assert_close(fresh.log_probs(*histories_of(data)), expected, rtol=1e-4, atol=1e-4)


def test_popularity_prior_moves_scores_by_the_bias(data, llm_folder):
    plain = build("llama", llm_folder, data, exclude_history=False)[0].eval()
    prior = build("llama", llm_folder, data, exclude_history=False, popularity_prior=1.0)[0].eval()
    bias = popularity_bias(split(data).targets.numpy(), data.n_items, 1.0)
    expected = (plain.log_probs(*histories_of(data)) + bias).log_softmax(dim=1)
    torch.testing.assert_close(prior.log_probs(*histories_of(data)), expected, rtol=1e-4, atol=1e-4)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind, data, llm_folder):
    found = []
    for checkpointing in (False, True):
        model = randomise(build(kind, llm_folder, data, gradient_checkpointing=checkpointing)[0], std=0.1)
        rows = teacher_rows(model.eval(), split(data), np.arange(12))
        for module in model.train().modules():  # the encoder's own dropout is not what is compared
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        found.append(gradients(model, rows, np.arange(12)))
    (plain, loss), (again, loss_again) = found
    assert loss == pytest.approx(loss_again, rel=1e-6)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)


def test_every_trained_parameter_gets_a_gradient_and_no_other(data, llm_folder):
    model = randomise(build("llama", llm_folder, data)[0])
    found, _ = gradients(model.train(), teacher_rows(model.eval(), split(data), np.arange(8)), np.arange(8))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".ilora_" in name for name in found)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_teacher_scores_the_same(kind, data, llm_folder, tmp_path):
    model, recipe = build(kind, llm_folder, data, popularity_prior=0.3, logit_scale=7.0)
    randomise(model).eval()
    save_teacher(tmp_path / "teacher", model, recipe)
    again, recipe_again = load_teacher(tmp_path / "teacher", data, CPU)
    assert recipe_again == recipe
    assert torch.equal(again.log_probs(*histories_of(data)), model.log_probs(*histories_of(data)))
    assert torch.equal(again.item_vectors, model.item_vectors)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_the_adapter_is_a_standard_peft_folder(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data)
    save_teacher(tmp_path / "teacher", randomise(model), recipe)
    adapter = tmp_path / "teacher" / "adapter"
    config = PeftConfig.from_pretrained(str(adapter))
    assert (config.peft_type, config.r, config.num_experts) == ("ILORA", 8, 4)
    assert config.base_model_name_or_path == recipe.source
    stored = load_file(adapter / "adapter_model.safetensors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(stored) == len(trained)
    assert all("ilora_" in name for name in stored)
    PeftModel.from_pretrained(AutoModel.from_pretrained(recipe.source), str(adapter))


@pytest.mark.parametrize("tuning", ["ilora", "lora"])
def test_a_teacher_does_not_tell_whose_home_its_language_model_is_in(tuning, data, llm_folder, tmp_path, monkeypatch):
    model, recipe = build("llama", llm_folder, data, tuning=tuning)
    monkeypatch.setenv("HOME", str(Path(recipe.source).parents[1]))
    save_teacher(tmp_path / "teacher", model, recipe)
    texts = {file: file.read_bytes() for file in (tmp_path / "teacher").rglob("*") if file.is_file()}
    assert not [file for file, text in texts.items() if str(Path.home()).encode() in text]
    assert json.loads(texts[tmp_path / "teacher" / "config.json"])["source"].startswith("~/")
    assert load_teacher(tmp_path / "teacher", data, CPU)[1] == recipe


def test_a_folder_without_a_teacher_is_refused(data, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no teacher \(no config.json\)"):
        load_teacher(tmp_path, data, CPU)


def test_a_language_model_that_has_moved_is_told_with_its_old_place(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data)
    save_teacher(tmp_path / "teacher", model, replace(recipe, source=str(tmp_path / "moved")))
    with pytest.raises(CheckpointError, match=r"cannot be loaded from '.*moved'.*Put it back"):
        load_teacher(tmp_path / "teacher", data, CPU)


def test_a_language_model_with_other_weights_is_not_taken_for_the_teachers_own(data, llm_folder, tmp_path):
    place = Path(shutil.copytree(llm_folder, tmp_path / "llm"))
    model, recipe = build("llama", place, data)
    save_teacher(tmp_path / "teacher", model, recipe)
    moved = Path(shutil.move(recipe.source, tmp_path / "moved"))
    stored = read_json(tmp_path / "teacher" / "config.json")
    assert stored["llm_weights"] == weights_hash(str(moved)) != ""
    write_json(tmp_path / "teacher" / "config.json", {**stored, "source": str(moved)})
    load_teacher(tmp_path / "teacher", data, CPU)
    weights = load_file(moved / "model.safetensors")
    save_file({name: each + 1 for name, each in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"language model in .*moved has other weights than the one that"):
        load_teacher(tmp_path / "teacher", data, CPU)


def test_a_teacher_of_another_dataset_is_refused(data, llm_folder, tmp_path):
    model, recipe = build("llama", llm_folder, data)
    save_teacher(tmp_path / "teacher", model, recipe)
    other = prepare(Toy(n_users=30, n_items=data.n_items, n_worlds=5, seed=11), tmp_path / "processed")
    with pytest.raises(CheckpointError, match=rf"fingerprint {data.fingerprint[:12]}, and toy here has"):
        load_teacher(tmp_path / "teacher", other, CPU)
    stored = read_json(tmp_path / "teacher" / "config.json")  # as in earlier versions
    of_then = {name: each for name, each in stored.items() if name not in ("fingerprint", "llm_weights")}
    write_json(tmp_path / "teacher" / "config.json", of_then)
    load_teacher(tmp_path / "teacher", data, CPU)


# ---- what cannot work ------------------------------------------------------------------------------------------------


def test_a_path_without_a_model_is_refused_by_name(data, tmp_path):
    for path in ("no/such-model", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"llm.path is .* neither a folder .* Set `llm.path=FOLDER`"):
            locate(LLMSettings(name="x", path=path), tmp_path, tmp_path / "llm", data.titles)


def test_a_model_in_gguf_is_refused_without_the_package_that_converts_it(data, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "m.Q8_0.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    message = "a model in GGUF that cannot be converted" if find_spec("gguf") else "in GGUF.*pip install gguf"
    for path in ("models", "models/m.Q8_0.gguf"):
        with pytest.raises(ConfigError, match=message):
            locate(LLMSettings(name="x", path=path), tmp_path, tmp_path / "llm", data.titles)
    assert not list((tmp_path / "llm").glob("*")), "nothing half-made is left"
    (folder / "m.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"several GGUF files \(m\.Q4_1\.gguf, m\.Q8_0\.gguf\)"):
        locate(LLMSettings(name="x", path="models"), tmp_path, tmp_path / "llm", data.titles)


def test_a_gguf_file_beside_other_weights_is_left_alone(data, tmp_path):
    folder = make_architecture("llama", tmp_path / "llama", data.titles)
    (folder / "m.gguf").write_bytes(b"GGUF")
    assert locate(LLMSettings(name="x", path=str(folder)), tmp_path, tmp_path / "llm", data.titles) == str(folder)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"r": 6, "num_experts": 4}, r"r=6 with 4 experts; use r=8"),
        ({"num_experts": 0}, "`num_experts` must be a whole number"),
        ({"gate": "magic"}, "`gate` must be one of"),
        ({"scaling": "none"}, "`scaling` must be one of"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\)"),
    ],
)
def test_an_adapter_that_cannot_work_is_refused(adapter, message, data, llm_folder):
    with pytest.raises(ConfigError, match=message):
        build("llama", llm_folder, data, adapter=adapter)


def test_adapter_numbers_are_checked_before_the_model_is_loaded(data, llm_folder, monkeypatch):
    monkeypatch.setattr("llm2rec.teacher.factory.load_model", lambda *_: pytest.fail("loaded the model first"))
    with pytest.raises(ConfigError, match="r=6"):
        build("llama", llm_folder, data, adapter={"r": 6})


def test_more_tokens_than_the_model_has_positions_are_refused(data, llm_folder):
    with pytest.raises(ConfigError, match=r"`llm.prompt.max_tokens` is 129 .* 128 positions"):
        build("bert", llm_folder, data, prompt={"max_tokens": 129})


def test_precision_is_settled_by_the_device():
    assert resolve_precision("auto", CPU) == "float32"
    assert resolve_precision("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_precision("int8", CPU) == "int8"
