"""Prompts put together with array operations equal the text tokenised whole."""

import numpy as np
import pytest
import torch
from teacher_helpers import ODD_TITLES, bpe_tokenizer, item_table, padded, wordpiece_tokenizer
from transformers import AutoTokenizer

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import PromptSettings

TOKENIZERS = {"bpe": bpe_tokenizer, "wordpiece": wordpiece_tokenizer}
TEXTS = {"prefix": "A user chose these {domain}s:", "suffix": "The {domain} chosen next:"}
SHORT_TITLES = [title for title in ODD_TITLES if len(title) < 100]
SEPARATOR = ";"


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]([*ODD_TITLES, "A user chose these games:", "The game chosen next:"])


def build(tokenizer, titles=ODD_TITLES, **settings):
    return PromptBuilder(tokenizer, item_table(titles), PromptSettings(**settings), "game")


def texts_of(settings):
    return [settings.get(name, "").replace("{domain}", "game") for name in ("prefix", "suffix")]


def slow_prompt(tokenizer, titles, **settings):
    """Token by token: as many of the newest titles as fit, oldest first. A first title comes in part if it must."""
    bare = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    prefix, suffix = texts_of(settings)
    before, after = bare(prefix), bare(f" {suffix}") if suffix else []
    special = list(tokenizer("")["input_ids"])
    budget = settings["max_tokens"] - len(special) - len(before) - len(after)
    kept = []
    for age, title in enumerate(reversed(titles)):
        segment = bare(f" {title}{SEPARATOR}")[:budget]
        if sum(map(len, kept)) + len(segment) > budget or age == settings.get("max_items"):
            break
        kept.insert(0, segment)
    inner = before + [token for segment in kept for token in segment] + after
    return [special[0], *inner, *special[1:]], len(kept)


def real_tokens(batch):
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def random_histories(n_items, n_rows=40, width=8, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, n_items, generator.integers(1, width + 1)).tolist() for _ in range(n_rows)]


@pytest.mark.parametrize("texts", [{}, TEXTS], ids=["titles only", "prefix and suffix"])
def test_prompts_equal_the_whole_text_tokenised_at_once(tokenizer, texts):
    prompts = build(tokenizer, SHORT_TITLES, max_tokens=4096, **texts)
    histories = random_histories(len(SHORT_TITLES))
    prefix, suffix = texts_of(texts)
    batch = prompts.histories(*padded(histories, len(SHORT_TITLES), 8))
    for ids, history in zip(real_tokens(batch), histories, strict=True):
        titles = "".join(f" {SHORT_TITLES[item]}{SEPARATOR}" for item in history)
        assert ids == tokenizer(f"{prefix}{titles} {suffix}".rstrip())["input_ids"]


@pytest.mark.parametrize("max_items", [None, 1, 3])
@pytest.mark.parametrize("max_tokens", [40, 64, 4096])
def test_prompts_equal_a_slow_concatenation(tokenizer, max_tokens, max_items):
    settings = {"max_tokens": max_tokens, "max_items": max_items, **TEXTS}
    prompts = build(tokenizer, **settings)
    histories = random_histories(len(ODD_TITLES))
    arrays = padded(histories, len(ODD_TITLES), 8)
    expected = [slow_prompt(tokenizer, [ODD_TITLES[i] for i in history], **settings) for history in histories]
    batch = prompts.histories(*arrays)
    assert real_tokens(batch) == [ids for ids, _ in expected]
    assert prompts.n_shown(*arrays).tolist() == [shown for _, shown in expected]
    assert prompts.token_counts(*arrays).tolist() == [len(ids) for ids, _ in expected]
    assert batch.input_ids.shape[1] == max(len(ids) for ids, _ in expected) <= max_tokens


def test_padding_is_on_the_right_and_masked(tokenizer):
    prompts = build(tokenizer, max_tokens=200)
    batch = prompts.histories(*padded([[0], [0, 1, 2]], len(ODD_TITLES), 4))
    mask = batch.attention_mask
    assert mask[1].all()
    assert (mask[0].diff() <= 0).all()
    assert (batch.input_ids[0][~mask[0].bool()] == tokenizer.pad_token_id).all()


def test_one_more_token_lets_one_more_title_in(tokenizer):
    titles = ["one two three", "four five six", "seven eight"]
    costs = [len(tokenizer(f" {title};", add_special_tokens=False)["input_ids"]) for title in titles]
    special = len(tokenizer("")["input_ids"])
    history = padded([[0, 1, 2]], 3, 3)
    for shown in (1, 2, 3):
        exact = special + sum(costs[3 - shown :])
        assert build(tokenizer, titles, max_tokens=exact).n_shown(*history) == [shown]
        assert build(tokenizer, titles, max_tokens=exact - 1).n_shown(*history) == [max(1, shown - 1)]


def test_a_title_longer_than_the_budget_is_cut_when_newest_and_hides_the_older_ones(tokenizer):
    longest = ODD_TITLES.index(max(ODD_TITLES, key=len))
    settings = {"max_tokens": 24}
    prompts = build(tokenizer, **settings)
    batch = prompts.histories(*padded([[0, longest], [longest, 0]], len(ODD_TITLES), 2))
    whole, without = real_tokens(batch)
    assert len(whole) == 24
    assert without == slow_prompt(tokenizer, [ODD_TITLES[0]], **settings)[0]


def test_titles_alone_carry_their_special_tokens(tokenizer):
    prompts = build(tokenizer, SHORT_TITLES, max_tokens=300, **TEXTS)
    order = np.array([3, 0, 3, 5])
    expected = [tokenizer(f" {SHORT_TITLES[item]}{SEPARATOR}")["input_ids"] for item in order]
    assert real_tokens(prompts.titles(order)) == expected


def test_prefix_and_suffix_without_room_for_titles_are_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"12, which leaves .* tokens for titles"):
        build(tokenizer, max_tokens=12, prefix="many words " * 5)


def test_ids_of_a_row_do_not_depend_on_the_other_rows(tokenizer):
    prompts = build(tokenizer, max_tokens=64)
    histories = random_histories(len(ODD_TITLES), n_rows=9)
    together = real_tokens(prompts.histories(*padded(histories, len(ODD_TITLES), 8)))
    alone = [real_tokens(prompts.histories(*padded([history], len(ODD_TITLES), 8)))[0] for history in histories]
    assert together == alone


def test_token_batches_are_integers_that_embeddings_take(tokenizer):
    batch = build(tokenizer, max_tokens=64).histories(*padded([[0]], len(ODD_TITLES), 2))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64


@pytest.mark.parametrize("settings", [{"max_tokens": 40}, {"max_tokens": 4096, **TEXTS}, {"max_items": 3}])
def test_hybrid_prompts_without_their_slots_are_those_of_the_items_shown(tokenizer, settings):
    prompts = build(tokenizer, SHORT_TITLES, **settings)
    histories = random_histories(len(SHORT_TITLES))
    arrays = padded(histories, len(SHORT_TITLES), 8)
    batch = prompts.histories(*arrays, hybrid=True)
    shown = prompts.n_shown(*arrays, hybrid=True)
    recent = [history[len(history) - n :] for history, n in zip(histories, shown, strict=True)]
    slots = batch.item_ids < len(SHORT_TITLES)
    assert [ids[at].tolist() for ids, at in zip(batch.item_ids, slots, strict=True)] == recent
    assert torch.equal(slots, batch.input_ids == prompts.placeholder_id)
    kept = [
        ids[mask.bool() & ~at].tolist()
        for ids, mask, at in zip(batch.input_ids, batch.attention_mask, slots, strict=True)
    ]
    assert kept == real_tokens(prompts.histories(*padded(recent, len(SHORT_TITLES), 8)))
    assert prompts.token_counts(*arrays, hybrid=True).tolist() == batch.attention_mask.sum(dim=1).tolist()
    assert batch.input_ids.shape[1] <= prompts.settings.max_tokens


def test_a_slot_comes_right_after_the_separator_of_its_title(tokenizer):
    prompts = build(tokenizer, SHORT_TITLES, max_tokens=4096, **TEXTS)
    batch = prompts.histories(*padded([[3, 0, 5]], len(SHORT_TITLES), 4), hybrid=True)
    start = 1 + len(tokenizer(texts_of(TEXTS)[0], add_special_tokens=False)["input_ids"])
    for item in (3, 0, 5):
        title = tokenizer(f" {SHORT_TITLES[item]}{SEPARATOR}", add_special_tokens=False)["input_ids"]
        assert batch.input_ids[0, start : start + len(title)].tolist() == title
        start += len(title) + 1
        assert batch.item_ids[0, start - 1] == item


def test_one_more_token_lets_one_more_title_and_its_slot_in(tokenizer):
    titles = ["one two three", "four five six", "seven eight"]
    costs = [len(tokenizer(f" {title};", add_special_tokens=False)["input_ids"]) + 1 for title in titles]
    special = len(tokenizer("")["input_ids"])
    history = padded([[0, 1, 2]], 3, 3)
    for shown in (1, 2, 3):
        exact = special + sum(costs[3 - shown :])
        assert build(tokenizer, titles, max_tokens=exact).n_shown(*history, hybrid=True) == [shown]
        assert build(tokenizer, titles, max_tokens=exact - 1).n_shown(*history, hybrid=True) == [max(1, shown - 1)]


def test_a_title_cut_for_want_of_room_still_has_its_slot(tokenizer):
    longest = ODD_TITLES.index(max(ODD_TITLES, key=len))
    batch = build(tokenizer, max_tokens=24).histories(*padded([[longest]], len(ODD_TITLES), 2), hybrid=True)
    assert batch.attention_mask.shape == (1, 24)
    assert (batch.item_ids == longest).sum() == 1


def test_the_placeholder_is_added_once_and_kept_with_a_saved_tokenizer(tokenizer, tmp_path):
    prompts = build(tokenizer)
    size = len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = build(AutoTokenizer.from_pretrained(tmp_path))
    assert (again.placeholder_id, len(again.tokenizer)) == (prompts.placeholder_id, size)
    assert build(tokenizer).tokenizer is tokenizer
    assert len(tokenizer) == size
    assert again.identity == prompts.identity


def test_a_title_that_spells_the_placeholder_makes_no_slot(tokenizer):
    prompts = build(tokenizer, ["before <|item|> after", "Heat"])
    batch = prompts.histories(*padded([[0, 1]], 2, 2), hybrid=True)
    assert ((batch.input_ids == prompts.placeholder_id) == (batch.item_ids < 2)).all()
    assert (batch.item_ids < 2).sum() == 2
    assert (prompts.titles(np.array([0])).input_ids != prompts.placeholder_id).all()


def test_moving_a_batch_moves_all_of_it(tokenizer):
    prompts = build(tokenizer)
    arrays = padded([[0, 1]], len(ODD_TITLES), 2)
    meta = torch.device("meta")
    assert prompts.histories(*arrays, hybrid=True).to(meta).item_ids.device == meta
    assert prompts.histories(*arrays).to(meta).item_ids is None
