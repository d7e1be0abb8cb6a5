"""Questions for titles equal natural text, answers are whole titles, and every title is an answer of its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from teacher_helpers import ODD_TITLES, bpe_tokenizer, item_table, padded, wordpiece_tokenizer
from title_helpers import answer_text
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.prompt_layout import hashed
from llm2rec.teacher.settings import PromptSettings
from llm2rec.teacher.title.prompts import TitlePrompts
from llm2rec.teacher.tokenising import fold_title
from llm2rec.teacher.wording import plain_wordings, wordings_for

TITLES = [title for title in ODD_TITLES if len(title) < 100] + [
    "[Brackets] and <tags>",
    "Heat",
    "Heat 2",
    "{history} {candidates}",
    "אבא גנוב",
    "👩‍👩‍👧 family",
    "The end</s>, really [SEP]",
    "before <|item|> after",
    "...",
]
N_ITEMS = len(TITLES)
SHOWN = [" ".join(title.split()) for title in TITLES]
TEXTS = {"prefix": "A user chose these {domain}s:", "suffix": "The {domain} chosen next:"}
DOMAINS = ["movie", "game", "song", "book", "teapot"]
ROOMY = 4096


def with_end(tokenizer):
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def learnt(make):
    wordings = [wordings_for(domain) for domain in DOMAINS]
    texts = ["".join(parts) for each in wordings for parts in each.questions]
    return make([*TITLES, *texts, "A user chose these games: The game chosen next: (1) (2) (3) (4)"])


def metaspace_tokenizer(texts):
    """BPE that writes spaces as letters and puts one before a text, like Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS = {
    "bpe": with_end(learnt(bpe_tokenizer)),
    "metaspace": learnt(metaspace_tokenizer),
    "wordpiece": learnt(wordpiece_tokenizer),
}


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]


def build(tokenizer, titles=TITLES, domain="game", seed=0, **prompt):
    return TitlePrompts(
        tokenizer, item_table(titles), PromptSettings(**{"max_tokens": ROOMY, **prompt}), domain, seed=seed
    )


def rows(n_rows=40, width=6, n_candidates=4, n_items=N_ITEMS, seed=0):
    generator = np.random.default_rng(seed)
    histories = [generator.integers(0, n_items, generator.integers(1, width + 1)).tolist() for _ in range(n_rows)]
    candidates = np.array([generator.permutation(n_items)[:n_candidates] for _ in range(n_rows)], np.int32)
    targets = candidates[np.arange(n_rows), generator.integers(0, n_candidates, n_rows)]
    return histories, candidates, targets


def bare(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def natural(tokenizer, parts, *lists):
    """Tokens of a whole prompt, its text written out."""
    text = parts[0]
    for after, items in zip(parts[1:], lists, strict=True):
        text += "".join(f" {SHOWN[item]};" for item in items) + (f" {after}" if after else "")
    return [tokenizer("")["input_ids"][0], *bare(tokenizer, text)]


def real(tensor, mask):
    return [ids[kept.bool()].tolist() for ids, kept in zip(tensor, mask, strict=True)]


def prompts_of(batch):
    return real(batch.input_ids, batch.attention_mask)


@pytest.mark.parametrize("with_candidates", [True, False])
def test_plain_questions_equal_the_natural_text(tokenizer, with_candidates):
    prompts = build(tokenizer, **TEXTS)
    histories, candidates, _ = rows()
    batch = prompts.questions(*padded(histories, N_ITEMS, 6), candidates if with_candidates else None)
    parts = ["A user chose these games:", "The next game is one of these:", "The game chosen next:"]
    for ids, history, listed in zip(prompts_of(batch), histories, candidates, strict=True):
        if with_candidates:
            assert ids == natural(tokenizer, parts, history, listed)
        else:
            assert ids == natural(tokenizer, [parts[0], parts[2]], history)


@pytest.mark.parametrize("domain", DOMAINS)
def test_worded_prompts_equal_the_natural_text_of_one_wording_each(tokenizer, domain):
    prompts, wordings = build(tokenizer, domain=domain, wording="domain"), wordings_for(domain)
    histories, candidates, _ = rows()
    arrays = padded(histories, N_ITEMS, 6)
    closed, opened = prompts.questions(*arrays, candidates), prompts.questions(*arrays)
    used = set()
    for row, history in enumerate(histories):
        choices = [natural(tokenizer, parts, history, candidates[row]) for parts in wordings.questions]
        used.add(choices.index(prompts_of(closed)[row]))
        assert prompts_of(opened)[row] in [natural(tokenizer, parts, history) for parts in wordings.histories]
    assert used == set(range(len(wordings.questions)))


def test_the_item_objective_uses_the_wordings_too(tokenizer):
    prompts = build(tokenizer, SHOWN, domain="film", wording="domain")
    history = padded([[1, 0]], N_ITEMS, 6)
    special = tokenizer("")["input_ids"][1:]
    expected = [natural(tokenizer, parts, [1, 0]) + special for parts in wordings_for("film").histories]
    batch = prompts.histories(*history)
    assert prompts_of(batch)[0] in expected
    assert prompts.token_counts(*history).tolist() == batch.attention_mask.sum(dim=1).tolist()
    assert prompts.identity != build(tokenizer, SHOWN, domain="film", wording="domain", seed=1).identity
    assert build(tokenizer).identity == build(tokenizer, seed=1).identity


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("with_candidates", [True, False])
def test_answers_follow_the_same_question_and_carry_all_labels(tokenizer, with_candidates, hybrid):
    prompts = build(tokenizer, wording="domain")
    histories, candidates, targets = rows()
    arguments = (*padded(histories, N_ITEMS, 6), candidates if with_candidates else None)
    question = prompts.questions(*arguments, hybrid=hybrid)
    answered = prompts.questions(*arguments, targets, hybrid=hybrid)
    answers = [[*bare(tokenizer, f" {SHOWN[item]}"), prompts.end_id] for item in targets]
    assert [tokens.tolist() for tokens in prompts.answer_tokens()] == [bare(tokenizer, f" {title}") for title in SHOWN]
    together = zip(prompts_of(question), answers, strict=True)
    assert prompts_of(answered) == [ids + answer for ids, answer in together]
    labels = real(answered.labels, answered.attention_mask)
    assert labels == [[-100] * len(ids) + tail for ids, tail in zip(prompts_of(question), answers, strict=True)]
    assert (answered.labels[answered.attention_mask == 0] == -100).all()
    assert question.labels is None
    counts = prompts.question_token_counts(*arguments, hybrid=hybrid)
    assert counts.tolist() == question.attention_mask.sum(dim=1).tolist()
    counts = prompts.question_token_counts(*arguments, targets, hybrid=hybrid)
    assert counts.tolist() == answered.attention_mask.sum(dim=1).tolist()


@pytest.mark.parametrize("hybrid", [False, True])
def test_padding_on_either_side_holds_the_same_prompts(tokenizer, hybrid):
    prompts = build(tokenizer, wording="domain")
    histories, candidates, targets = rows()
    arguments = (*padded(histories, N_ITEMS, 6), candidates, targets)
    left, right = (prompts.questions(*arguments, hybrid=hybrid, padding=side) for side in ("left", "right"))
    assert prompts_of(left) == prompts_of(right)
    assert real(left.labels, left.attention_mask) == real(right.labels, right.attention_mask)
    assert left.attention_mask[:, -1].all()
    assert (left.attention_mask.diff(dim=1) >= 0).all()
    assert (right.attention_mask.diff(dim=1) <= 0).all()
    if hybrid:
        assert real(left.item_ids, left.attention_mask) == real(right.item_ids, right.attention_mask)
        assert (left.item_ids[left.attention_mask == 0] == N_ITEMS).all()


def test_a_slot_follows_each_title_of_history_and_candidates(tokenizer):
    prompts = build(tokenizer, **TEXTS)
    histories, candidates, targets = rows()
    arguments = (*padded(histories, N_ITEMS, 6), candidates, targets)
    hybrid, plain = prompts.questions(*arguments, hybrid=True), prompts.questions(*arguments)
    assert torch.equal(hybrid.item_ids < N_ITEMS, hybrid.input_ids == prompts.placeholder_id)
    for row, (ids, items) in enumerate(zip(hybrid.input_ids, hybrid.item_ids, strict=True)):
        slots = (items < N_ITEMS).nonzero()[:, 0].tolist()
        assert items[slots].tolist() == [*histories[row], *candidates[row]]
        for slot in slots:
            title = bare(tokenizer, f" {SHOWN[int(items[slot])]};")
            assert ids[slot - len(title) : slot].tolist() == title
    kept = hybrid.attention_mask.bool() & (hybrid.item_ids == N_ITEMS)
    assert real(hybrid.input_ids, kept) == prompts_of(plain)


def slow_shown(tokenizer, prompts, parts, history, listed, hybrid):
    """How many of the newest titles fit beside texts, candidates and the longest answer, one at a time."""
    cost = lambda item: len(bare(tokenizer, f" {SHOWN[item]};")) + hybrid  # noqa: E731
    longest = max(map(len, prompts.answer_tokens())) + 1
    used = len(natural(tokenizer, parts, *[[] for _ in parts[1:]])) + longest + sum(map(cost, listed))
    shown = 0
    for item in reversed(history):
        used += cost(item)
        if used > prompts.settings.max_tokens or shown == prompts.settings.max_items:
            break
        shown += 1
    return shown


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    max_tokens=st.integers(200, 700),
    max_items=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1000),
    hybrid=st.booleans(),
)
def test_the_oldest_items_give_way_and_the_budget_holds(name, max_tokens, max_items, seed, hybrid):
    tokenizer = TOKENIZERS[name]
    prompts = build(tokenizer, **TEXTS, max_tokens=max_tokens, max_items=max_items)
    histories, candidates, targets = rows(n_rows=6, width=12, seed=seed)
    arrays = padded(histories, N_ITEMS, 12)
    parts = ["A user chose these games:", "The next game is one of these:", "The game chosen next:"]
    expected = [
        slow_shown(tokenizer, prompts, parts, history, listed.tolist(), hybrid)
        for history, listed in zip(histories, candidates, strict=True)
    ]
    if min(expected) == 0:
        with pytest.raises(ConfigError, match=r"the prompt of row \d of the batch takes \d+ with one item"):
            prompts.questions(*arrays, candidates, hybrid=hybrid)
        return
    recent = [history[len(history) - n :] for history, n in zip(histories, expected, strict=True)]
    answered = prompts.questions(*arrays, candidates, targets, hybrid=hybrid)
    assert answered.input_ids.shape[1] <= max_tokens
    question = prompts.questions(*arrays, candidates, hybrid=hybrid)
    without = question.attention_mask.bool()
    if hybrid:
        without &= question.item_ids == N_ITEMS
    assert real(question.input_ids, without) == [
        natural(tokenizer, parts, history, listed) for history, listed in zip(recent, candidates, strict=True)
    ]


def test_a_worst_case_that_does_not_fit_is_refused_before_any_batch(tokenizer):
    prompts = build(tokenizer, **TEXTS)
    for hybrid in (False, True):
        costs = sorted((len(bare(tokenizer, f" {title};")) + hybrid for title in SHOWN), reverse=True)
        parts = ["A user chose these games:", "The next game is one of these:", "The game chosen next:"]
        texts = len(natural(tokenizer, parts, [], []))
        longest = max(len(bare(tokenizer, f" {title}")) for title in SHOWN) + 1
        needed = texts + sum(costs[:4]) + costs[0] + longest
        build(tokenizer, **TEXTS, max_tokens=needed).check_candidates(4, hybrid=hybrid)
        with pytest.raises(ConfigError, match=rf"max_tokens` to {needed}, or lower `llm.prompt.max_title_tokens`"):
            build(tokenizer, **TEXTS, max_tokens=needed - 1).check_candidates(4, hybrid=hybrid)
    prompts.check_candidates(None)
    with pytest.raises(ConfigError, match="0 for 0 candidates"):
        build(tokenizer, **TEXTS, max_tokens=needed - texts - sum(costs[:4])).check_candidates(None)


def test_a_blank_suffix_still_asks_for_a_title(tokenizer):
    batch = build(tokenizer).questions(*padded([[0]], N_ITEMS, 2))
    assert prompts_of(batch)[0] == natural(tokenizer, ["", "The game chosen next:"], [0])


def test_the_wording_of_a_row_depends_on_its_history_and_the_seed_alone(tokenizer):
    prompts = build(tokenizer, wording="domain")
    histories, candidates, _ = rows()
    together = prompts_of(prompts.questions(*padded(histories, N_ITEMS, 6), candidates))
    order = np.random.default_rng(1).permutation(len(histories))
    shuffled = prompts_of(
        prompts.questions(*padded([histories[row] for row in order], N_ITEMS, 9), candidates[order], padding="left")
    )
    assert shuffled == [together[row] for row in order]
    alone = [
        prompts_of(prompts.questions(*padded([history], N_ITEMS, 6), candidates[[row]]))[0]
        for row, history in enumerate(histories)
    ]
    assert alone == together
    again = build(tokenizer, wording="domain", seed=1)
    assert prompts_of(again.questions(*padded(histories, N_ITEMS, 6), candidates)) != together


def test_wordings_are_chosen_evenly_and_hashes_read_the_order():
    history = np.random.default_rng(0).integers(0, 50, (20_000, 3)).astype(np.int32)
    lengths = np.full(len(history), 3, np.int32)
    for modulus in (4, 5, 7):
        counts = np.bincount((hashed(history, lengths, 0) % np.uint64(modulus)).astype(np.int64))
        distinct = len(np.unique(history, axis=0)) / modulus
        assert counts.min() > 0.8 * len(history) / modulus
        assert counts.max() < 1.2 * len(history) / modulus
        assert distinct > 1000
    one, other = padded([[1, 2], [2, 1], [1], [1, 2]], 50, 3)
    values = hashed(one, other, 0)
    assert len(set(values.tolist())) == 3
    assert values[0] == values[3]


def test_hashes_are_the_same_everywhere():
    history, lengths = padded([[3, 1], [0]], 9, 4)
    worked_out = [3818105436643584428, 2619433299815893136]  # with Python's own integers
    assert hashed(history, lengths, 7).tolist() == worked_out


@pytest.mark.parametrize(
    ("titles", "expected"),
    [
        (["Heat", "HEAT", "heat ", "Ran"], ["Heat", "HEAT (2)", "heat (3)", "Ran"]),
        (["Heat", "Heat", "Heat (2)"], ["Heat", "Heat (3)", "Heat (2)"]),
        (["Heat", "Heat (2)", "Heat", "heat (2)"], ["Heat", "Heat (2)", "Heat (3)", "heat (2) (2)"]),
        (["Heat", "Heat 2", "Heat"], ["Heat", "Heat 2", "Heat (2)"]),
        (["A  B", "A B"], ["A B", "A B (2)"]),
        (["Ame\u0301lie", "Amélie"], ["Ame\u0301lie", "Amélie (2)"]),
    ],
)
def test_equal_titles_are_numbered_in_the_order_of_the_items(tokenizer, titles, expected):
    prompts = build(tokenizer, titles)
    assert [answer_text(prompts, item) for item in range(len(titles))] == expected
    tokens = [tuple(each) for each in prompts.answer_tokens()]
    assert len(set(tokens)) == len({fold_title(text) for text in expected}) == len(titles)
    assert tokens == [tuple(bare(tokenizer, f" {text}")) for text in expected]


def test_numbering_leaves_the_item_objective_alone(tokenizer):
    batch = build(tokenizer, ["Heat", "Heat"]).histories(*padded([[0, 1]], 2, 2))
    assert prompts_of(batch)[0] == tokenizer(" Heat; Heat;")["input_ids"]


def test_titles_that_only_the_tokenizer_takes_for_equal_are_numbered_too():
    prompts = build(TOKENIZERS["wordpiece"], ["Amélie", "Amelie", "Heat"])
    assert [answer_text(prompts, item) for item in range(3)] == ["Amélie", "Amelie (2)", "Heat"]


def test_titles_that_the_tokenizer_cannot_tell_apart_are_refused():
    tokenizer = wordpiece_tokenizer(["abc"])  # knows neither brackets nor numbers
    with pytest.raises(ConfigError, match="items 0 and 2 have the same title tokens"):
        build(tokenizer, ["קטן", "שלג", "אור"]).answer_tokens()


@pytest.mark.parametrize("blank", ["", "  ", "\t"])
def test_blank_titles_are_refused(tokenizer, blank):
    with pytest.raises(ConfigError, match=r"item 1 has the title [^`]*`dataset.missing_title=id`"):
        build(tokenizer, ["Heat", blank]).answer_tokens()


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(ConfigError, match="neither an end-of-text nor a separator token"):
        _ = build(bpe_tokenizer(TITLES)).end_id


@pytest.mark.parametrize("max_title_tokens", [8, 13, 30])
def test_long_titles_are_cut_once_and_the_same_everywhere(tokenizer, max_title_tokens):
    titles = [*TITLES, "very long " * 120, "very long " * 120 + "indeed", "x" * 90, "語" * 60, "🎲" * 20]
    prompts = build(tokenizer, titles, max_title_tokens=max_title_tokens, **TEXTS)
    texts = [answer_text(prompts, item) for item in range(len(titles))]
    assert max(len(tokens) for tokens in prompts.answer_tokens()) <= max_title_tokens
    assert len({tuple(tokens) for tokens in prompts.answer_tokens()}) == len(titles)
    counts = [len(bare(tokenizer, f" {' '.join(title.split())}")) for title in titles]
    for title, text, count in zip(titles, texts, counts, strict=True):
        assert (text == " ".join(title.split())) == (count <= max_title_tokens)
    cut = texts[len(TITLES)]
    assert set(cut.split()) == {"very", "long"}
    assert texts[len(TITLES) + 1].endswith(" (2)")
    batch = prompts.questions(
        *padded([[len(TITLES)]], len(titles), 1), np.array([[len(TITLES)]]), np.array([len(TITLES)])
    )
    parts = ["A user chose these games:", "The next game is one of these:", "The game chosen next:"]
    whole = f"{parts[0]} {cut}; {parts[1]} {cut}; {parts[2]} {cut}"
    begin = tokenizer("")["input_ids"][0]
    assert prompts_of(batch)[0] == [begin, *bare(tokenizer, whole), prompts.end_id]
    item = prompts.histories(*padded([[len(TITLES)]], len(titles), 1))
    assert prompts_of(item)[0] == tokenizer(f"{parts[0]} {cut}; {parts[2]}")["input_ids"]


def test_no_title_is_cut_by_default(tokenizer):
    title = "very long " * 120
    prompts = build(tokenizer, [*TITLES, title])
    assert answer_text(prompts, N_ITEMS) == title.strip()


@pytest.mark.parametrize("change", [{"wording": "fancy"}, {"max_title_tokens": 7}])
def test_impossible_prompt_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        PromptSettings(**change)


def test_each_kind_of_item_has_wordings_of_its_own():
    words = [
        ["movie", "Film"],
        ["game", "video game"],
        ["artist", "music", "song", "track", "albums"],
        ["book", "novel"],
    ]
    kinds = [{wordings_for(word) for word in synonyms} for synonyms in words]
    assert [len(kind) for kind in kinds] == [1, 1, 1, 1]
    everything = {wordings_for(word) for word in [*DOMAINS, "teapot"]}
    assert len(everything) == 5
    for wordings in everything:
        assert len(set(wordings.histories)) == len(wordings.histories) >= 4
        assert len(set(wordings.questions)) == len(wordings.questions) >= 4
        assert all(len(parts) == 2 and all(parts) for parts in wordings.histories)
        assert all(len(parts) == 3 and all(parts) for parts in wordings.questions)
        texts = [text for parts in (*wordings.histories, *wordings.questions) for text in parts]
        assert not any("{" in text or text != text.strip() for text in texts)


def test_an_unknown_word_is_filled_in_whatever_it_contains():
    word = "{history} of {candidates}"
    wordings = wordings_for(word)
    assert any(word in text for parts in wordings.histories for text in parts)
    assert all(len(parts) == 3 for parts in wordings.questions)
    assert plain_wordings("", "", "teapot", title_next=False).histories == (("", ""),)
