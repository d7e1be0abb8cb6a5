"""The title teacher: what it scores, searches, writes and grounds is what plain loops over one row give."""

import json
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_helpers import CPU, build, llm_of
from title_helpers import (
    KINDS,
    PROMPT,
    answer_text,
    gates_of,
    next_log_probs,
    one_by_one,
    rows_of,
    title_log_prob,
    title_teacher,
)
from transformers import AutoModelForCausalLM, BloomConfig, GenerationConfig, MistralConfig

from llm2rec.core.errors import ConfigError
from llm2rec.recommend.names import ItemNames
from llm2rec.recommend.teacher import TeacherRecommender
from llm2rec.teacher.llm import load_model
from llm2rec.teacher.settings import ExportSettings, TeacherSettings, TitleSettings
from llm2rec.teacher.store import load_teacher, save_teacher
from llm2rec.teacher.title import beam
from llm2rec.teacher.title.probe import check_side_by_side


@pytest.fixture(params=KINDS)
def model(request, data, llm_folder, tmp_path):
    return title_teacher(request.param, data, llm_folder, tmp_path)[0]


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_the_loss_is_the_answers_mean_log_probability_on_either_padding(model, data, listed):
    history, lengths, candidates, targets = rows_of(data)
    shown = candidates if listed else None
    losses = []
    for padding in ("left", "right"):
        tokens = model.prompts.questions(history, lengths, shown, targets, hybrid=model.is_hybrid, padding=padding)
        with model.hold(gates_of(model, history, lengths)):
            losses.append(model(**vars(tokens)).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for row, (own, length, drawn) in enumerate(one_by_one(history, lengths, candidates)):
        n_tokens = len(model.prompts.answer_tokens()[targets[row]]) + 1
        expected = -title_log_prob(model, own, length, drawn if listed else None, targets[row]) / n_tokens
        assert float(losses[0][row]) == pytest.approx(expected, rel=1e-4)


def test_only_the_answers_logits_are_computed(data, llm_folder, tmp_path, monkeypatch):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path)
    history, lengths, candidates, targets = rows_of(data)
    kept = []
    head = model.llm.get_base_model().lm_head
    hook = head.register_forward_hook(lambda module, inputs, output: kept.append(output.shape[1]))
    tokens = model.prompts.questions(history, lengths, candidates, targets, padding="left")
    with model.hold(gates_of(model, history, lengths)):
        model(**vars(tokens))
    hook.remove()
    longest = max(len(model.prompts.answer_tokens()[item]) for item in targets) + 1
    assert kept == [longest + 1]
    assert longest + 1 < tokens.input_ids.shape[1] / 3


def test_a_text_only_step_leaves_the_projector_a_gradient_of_zero(data, llm_folder, tmp_path):
    model, _ = title_teacher("sequence gate, hybrid", data, llm_folder, tmp_path)
    history, lengths, candidates, targets = rows_of(data)
    for hybrid in (False, True):
        model.zero_grad()
        tokens = model.prompts.questions(history, lengths, candidates, targets, hybrid=hybrid, padding="left")
        with model.hold(gates_of(model, history, lengths)):
            model(**vars(tokens)).sum().backward()
        moved = [float(each.grad.abs().sum()) > 0 for each in model.projector.parameters()]
        assert all(moved) if hybrid else not any(moved)
        assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


# ---- candidates, catalogue -------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_lengths_is_scored_as_row_by_row(model, data):
    history, lengths, candidates, _ = rows_of(data)
    scores = model.candidate_log_probs(history, lengths, candidates)
    expected = [
        [title_log_prob(model, own, length, drawn, item) for item in drawn[0]]
        for own, length, drawn in one_by_one(history, lengths, candidates)
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    known = None if model.tuner is None else model.gate_inputs(history, lengths)
    torch.testing.assert_close(model.candidate_log_probs(history, lengths, candidates, known), scores)


def test_other_answers_than_those_listed_can_be_scored_and_means_taken(data, llm_folder, tmp_path):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path)
    history, lengths, candidates, _ = rows_of(data)
    others = candidates[:, ::-1][:, :3].copy()
    listed = model.candidate_log_probs(history, lengths, candidates)
    scores = model.candidate_log_probs(history, lengths, candidates, None, others)
    torch.testing.assert_close(scores, listed.flip(1)[:, :3], rtol=1e-4, atol=1e-4)
    model.settings.mean_log_prob = True
    n_tokens = torch.tensor([[len(model.prompts.answer_tokens()[item]) + 1 for item in row] for row in candidates])
    means = model.candidate_log_probs(history, lengths, candidates)
    torch.testing.assert_close(means, listed / n_tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exclude_history", [True, False])
@pytest.mark.parametrize("kind", ["ilora", "per layer", "sequence gate, hybrid"])
def test_enough_beams_rank_the_catalogue_as_scoring_all_of_it(data, llm_folder, tmp_path, kind, exclude_history):
    model, _ = title_teacher(
        kind, data, llm_folder, tmp_path, search_beams=data.n_items, exclude_history=exclude_history
    )
    history, lengths, _, _ = rows_of(data)
    best = model.log_probs(history, lengths).topk(30, dim=1)
    items, scores = model.best_items(history, lengths, 30)
    torch.testing.assert_close(scores, best.values, rtol=1e-4, atol=1e-4)
    assert (items == best.indices).float().mean() > 0.99  # but for ties
    for row, shown in zip(items.tolist(), history.tolist(), strict=True):
        assert not exclude_history or not set(row) & set(shown)
    left_out = items[:, :2].numpy()
    others, _ = model.best_items(history, lengths, 20, excluded=left_out)
    assert torch.equal(others, items[:, 2:22])
    kept, _ = model.best_items(history, lengths, 20, excluded=left_out, keep=history[:, 0])
    assert torch.equal(kept, others) != exclude_history
    for row, shown, without in zip(kept.tolist(), history.tolist(), others.tolist(), strict=True):
        found = [item for item in row if item != shown[0] or not exclude_history]
        assert found == without[: len(found)], "the same but for the one that is kept"


def test_a_history_that_leaves_fewer_items_than_asked_for_gets_those(data, llm_folder, tmp_path):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, search_beams=data.n_items)
    recommender = TeacherRecommender(model.eval(), ItemNames(data.items.with_format("arrow")[:]), data.history_length)
    histories = [recommender.names.raw_ids[:2], recommender.names.raw_ids[3:7]]
    every = recommender.recommend(histories, k=data.n_items)
    assert [len(answer) for answer in every] == [data.n_items - 2, data.n_items - 4]
    nine = recommender.recommend(histories, k=9)
    assert [[each.item_id for each in answer[:9]] for answer in every] == [[each.item_id for each in a] for a in nine]


def test_ranking_is_said_to_cost_what_its_beams_hold(data, llm_folder, tmp_path):
    counts = {}
    for title in ({"search_beams": 1}, {"search_beams": 7}, {"ranking": "grounding", "generation_beams": 3}):
        model, _ = title_teacher("ilora", data, llm_folder, tmp_path, **title)
        history, lengths, _, _ = rows_of(data)
        counts[len(counts)] = model.ranking_token_counts(history, lengths, 1)
    assert np.array_equal(counts[1], 7 * counts[0])
    assert np.array_equal(counts[2], 3 * counts[0])
    assert np.array_equal(counts[0], model.prompts.questions(history, lengths).attention_mask.sum(dim=1))


def test_beams_for_items_beyond_those_asked_for_are_counted_too(data, llm_folder, tmp_path, monkeypatch):
    """The search widens to k beams, and each holds its row's prompt."""
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, search_beams=2)
    history, lengths, _, _ = rows_of(data)
    n_tokens = model.prompts.question_token_counts(history, lengths)
    read, most = beam._read, []

    def reading(llm, hold, gates, trie, running, *others):
        most.append(len(running.rows))
        return read(llm, hold, gates, trie, running, *others)

    monkeypatch.setattr(beam, "_read", reading)
    for k in (1, 2, 9):
        most.clear()
        model.best_items(history, lengths, k)
        n_beams = model.ranking_token_counts(history, lengths, k) / n_tokens
        assert n_beams.tolist() == [max(2, k)] * len(history)
        assert 0 < max(most) <= n_beams.sum()
    assert max(most) > 2 * len(history)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_the_greedy_choice_of_every_token(model, data):
    history, lengths, candidates, _ = rows_of(data, n_rows=5)
    longest = max(map(len, model.prompts.answer_tokens())) + 1
    for listed in (True, False):
        written = model.generate(history, lengths, candidates if listed else None)
        for row, (own, length, drawn) in enumerate(one_by_one(history, lengths, candidates)):
            tokens = []
            while len(tokens) < longest and tokens[-1:] != [model.prompts.end_id]:
                tokens.append(int(next_log_probs(model, own, length, drawn if listed else None, tokens).argmax()))
            assert written[row] == model.prompts.decoded([np.array(tokens)])[0]


def test_beams_write_something_likelier_and_keep_each_rows_gates(data, llm_folder, tmp_path):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, generation_beams=4)
    history, lengths, candidates, _ = rows_of(data)
    together = model.generate(history, lengths, candidates)
    apart = [model.generate(*each)[0] for each in one_by_one(history, lengths, candidates)]
    assert together == apart


def test_settings_that_come_with_a_model_do_not_change_what_it_writes(data, llm_folder, tmp_path):
    settings, source = llm_of("llama", llm_folder, data, **PROMPT)
    penalising = copytree(source, tmp_path / "penalising")
    GenerationConfig(repetition_penalty=50.0, do_sample=True, temperature=9.0, min_new_tokens=9).save_pretrained(
        penalising
    )
    model = load_model(str(penalising), settings, "float32", CPU, writes=True)
    assert model.generation_config.repetition_penalty in (None, 1.0)
    plain = load_model(source, settings, "float32", CPU, writes=True)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model.generate(ids, max_new_tokens=8), plain.generate(ids, max_new_tokens=8))


# ---- grounding -------------------------------------------------------------------------------------------------------


def test_a_title_lies_at_its_own_item(model, data):
    titles = model.prompts.decoded(model.prompts.answer_tokens())
    vectors = model.text_vectors(titles)
    torch.testing.assert_close(vectors, model.item_vectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.text_vectors(titles[5:6])[0], model.item_vectors[5], rtol=0, atol=1e-5)


def test_grounding_ranks_by_distance_to_what_is_written(data, llm_folder, tmp_path, monkeypatch):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, ranking="grounding")
    history, lengths, _, targets = rows_of(data)
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *given: calls.append(given[2]) or generate(*given))
    items, scores = model.best_items(history, lengths, 10)
    assert calls == [None]  # without candidates
    vectors = model.text_vectors(generate(history, lengths, None))
    distances = torch.linalg.vector_norm(vectors[:, None] - model.item_vectors, dim=2)
    for row in range(len(history)):
        order = [item for item in distances[row].argsort(stable=True).tolist() if item not in history[row]]
        assert items[row].tolist() == order[:10]
        np.testing.assert_allclose(-scores[row], distances[row, order[:10]], rtol=1e-3, atol=1e-4)

    written = [answer_text(model.prompts, item) for item in targets]
    monkeypatch.setattr(model, "generate", lambda *given: written)
    items, scores = model.best_items(history[:, :1], np.ones_like(lengths), 3)
    seen = (history[:, :1] == targets[:, None]).any(axis=1)
    assert items[~seen, 0].tolist() == targets[~seen].tolist()
    np.testing.assert_allclose(scores[~seen, 0], 0, atol=1e-4)
    with pytest.raises(ConfigError, match=f"`k` is {data.n_items} but only .* items remain"):
        model.best_items(history, lengths, data.n_items)


def test_nothing_written_is_grounded_too(data, llm_folder, tmp_path, monkeypatch):
    model, _ = title_teacher("ilora", data, llm_folder, tmp_path, ranking="grounding")
    history, lengths, _, _ = rows_of(data)
    monkeypatch.setattr(model, "generate", lambda *given: [""] * len(history))
    items, scores = model.best_items(history, lengths, 5)
    assert bool(scores.isfinite().all())
    assert items.shape == (len(history), 5)


# ---- stored and refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_teacher_says_the_same(data, llm_folder, tmp_path, kind):
    model, recipe = title_teacher(kind, data, llm_folder, tmp_path)
    save_teacher(tmp_path / "teacher", model, recipe)
    items = load_file(tmp_path / "teacher" / "items.safetensors")
    assert items.keys() == {"vectors", "mean"}
    save_file(items | {"bias": torch.zeros(data.n_items)}, tmp_path / "teacher" / "items.safetensors")  # as once was
    (tmp_path / "teacher" / "manifest.json").unlink()  # hashes, which teachers with a bias did not have
    again, _ = load_teacher(tmp_path / "teacher", data, CPU)
    history, lengths, candidates, _ = rows_of(data)
    torch.testing.assert_close(
        again.candidate_log_probs(history, lengths, candidates), model.candidate_log_probs(history, lengths, candidates)
    )
    texts = [answer_text(model.prompts, 3), "something else"]
    torch.testing.assert_close(again.text_vectors(texts), model.text_vectors(texts))
    assert again.settings == model.settings
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["objective"] == "title"


def test_a_model_that_reads_backwards_is_refused(data, llm_folder):
    """transformers would give BERT a language-model head, over states that see the answer."""
    with pytest.raises(ConfigError, match=r"`teacher.objective=title` needs a model that writes text, and `llm` is 'b"):
        build("bert", llm_folder, data, prompt={"max_tokens": 128}, objective="title", title=TitleSettings(5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50),
            "type 'bloom' cannot do here .its forward pass takes no `position_ids`.; use another decoder",
        ),
        (
            MistralConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=50,
                sliding_window=64,
            ),
            r"take 96 tokens, but layers of this model attend to 64; shorten the prompt .`llm.prompt.max_tokens`",
        ),
    ],
)
def test_models_whose_titles_cannot_be_scored_side_by_side_are_refused_before_training(config, message):
    with pytest.raises(ConfigError, match=message):
        check_side_by_side(
            AutoModelForCausalLM.from_config(config).eval(), range(3, 40), max_tokens=96, longest_row=400
        )


def test_a_confidence_that_there_is_not_is_refused():
    message = "teacher.export.confidence is 'prob', but teacher.title.ranking=grounding gives distances"
    with pytest.raises(ConfigError, match=message):
        TeacherSettings(
            objective="title", title=TitleSettings(ranking="grounding"), export=ExportSettings(confidence="prob")
        )


def test_an_export_that_could_not_find_its_items_is_refused_before_training(data, llm_folder):
    left = data.n_items - data.history_length
    message = f"`teacher.export.top_k` is {left + 1}, but only {left} of {data.n_items} items may remain"
    with pytest.raises(ConfigError, match=message):
        build("llama", llm_folder, data, prompt=PROMPT, objective="title", export=ExportSettings(top_k=left + 1))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_other_number_formats_do_all_of_it(data, llm_folder, tmp_path, precision):
    model, _ = title_teacher(
        "sequence gate, hybrid", data, llm_folder, tmp_path, settings={"precision": precision}, ranking="grounding"
    )
    history, lengths, candidates, targets = rows_of(data, n_rows=3)
    assert bool(model.candidate_log_probs(history, lengths, candidates).isfinite().all())
    model.settings.ranking = "search"
    assert bool(model.best_items(history, lengths, 3)[1].isfinite().all())
    model.settings.ranking = "grounding"
    assert bool(model.best_items(history, lengths, 3)[1].isfinite().all())
    titles = model.prompts.decoded(model.prompts.answer_tokens())
    torch.testing.assert_close(model.text_vectors(titles), model.item_vectors, rtol=0, atol=1e-5)
    tokens = model.prompts.questions(history, lengths, candidates, targets, hybrid=True, padding="left")
    with model.hold(gates_of(model, history, lengths)):
        model.train()(**vars(tokens)).sum().backward()
    assert all(bool(each.grad.isfinite().all()) for each in model.parameters() if each.requires_grad)
