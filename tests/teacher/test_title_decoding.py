"""Titles under a language model: trie, likelihood of candidates and beam search, against plain forwards."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llm2rec.core.errors import ConfigError, DataError, NonFiniteError
from llm2rec.ilora import ILoraConfig
from llm2rec.teacher.title import beam
from llm2rec.teacher.title.beam import TitleTrie, constrained_beam_search
from llm2rec.teacher.title.likelihood import title_log_probs

END, VOCABULARY, WIDTH, EXPERTS = 0, 257, 32, 4
TITLES = [
    *[
        "Heat",
        "Heat 2",
        "Heat 2: Again",
        "He",
        "H",
        "heat",
        "Amélie",
        "Amélie 2",
        "攻殻機動隊",
        "攻殻機動隊 2.0",
        "🎲 Dice",
    ],
    *[f"Star {name}" for name in ("Wars", "Wars II", "Trek", "Trek II", "gate", "", "dust", "man")],
    *[f"The {first}{last}" for first in ("Thing", "Fog", "Birds") for last in ("", " 2", "s", " (1982)")],
    *["x", "xx", "xxx", "xxxx", "Zoo", "{0}", " ", "long " * 6],
]


def tokens_of(title):
    return np.frombuffer(title.encode(), np.uint8).astype(np.int32) + 1


TOKENS = [tokens_of(title) for title in TITLES]
N = len(TITLES)


def model_of(kind, gate_per_layer=False):
    """A random language model and adapter whose gates matter."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = {**shape, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 128}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=128)
        base, targets = GPT2LMHeadModel(config), ["c_attn", "c_fc"]
    elif kind == "mistral":  # a sliding window that prompts and titles just fit into
        base, targets = MistralForCausalLM(MistralConfig(**llama, sliding_window=48)), ["q_proj", "v_proj"]
    else:
        base, targets = LlamaForCausalLM(LlamaConfig(**llama)), ["q_proj", "v_proj", "down_proj"]
    config = ILoraConfig(
        r=8, num_experts=EXPERTS, target_modules=targets, task_type="CAUSAL_LM", gate_per_layer=gate_per_layer
    )
    llm = get_peft_model(base, config).eval()
    for name, parameter in llm.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "ilora" in name else 0.2)
    return llm


def prompts_of(llm, n_rows=3, width=9, seed=1):
    """Prompts of mixed lengths, padded on the left with vectors that would be noticed, and gates of their own."""
    torch.manual_seed(seed)
    embeds = torch.randn(n_rows, width, WIDTH)
    lengths = torch.tensor([width, 4, 7, 1, 6])[:n_rows]
    mask = (torch.arange(width) >= (width - lengths).unsqueeze(1)).long()
    n_layers = len(llm.base_model.adapted_layers("default"))
    per_layer = llm.peft_config["default"].gate_per_layer
    gates = torch.randn(n_rows, *([n_layers] if per_layer else []), EXPERTS).mul(3).softmax(-1)
    return gates, embeds, mask


@torch.no_grad()
def plain_log_prob(llm, hold, gates, embeds, mask, tokens):
    """One title after one prompt: no padding, no cache, no batch."""
    embeds = embeds[mask.bool()]
    read = torch.cat([embeds, llm.get_input_embeddings()(torch.as_tensor(tokens, dtype=torch.int64))[:-1]])
    with hold(gates):
        logits = llm(inputs_embeds=read.unsqueeze(0)).logits[0]
    log_probs = logits.double().log_softmax(dim=1)[len(embeds) - 1 :]
    return log_probs[torch.arange(len(tokens)), torch.as_tensor(tokens, dtype=torch.int64)].sum()


def plain_log_probs(llm, hold, gates, embeds, mask, titles=None):
    titles = [[*title, END] for title in TOKENS] if titles is None else titles
    return torch.stack(
        [
            torch.stack(
                [plain_log_prob(llm, hold, gates[row : row + 1], embeds[row], mask[row], title) for title in titles]
            )
            for row in range(len(embeds))
        ]
    ).float()


@pytest.fixture(scope="module")
def trie():
    return TitleTrie(TOKENS, END)


@pytest.fixture(scope="module", params=["llama", "gpt2", "llama, gates per layer"])
def case(request):
    """A model, prompts, and what all titles' log-probabilities are."""
    llm = model_of(request.param.split(",")[0], gate_per_layer="per layer" in request.param)
    given = (llm, llm.base_model.hold, *prompts_of(llm))
    return given, plain_log_probs(*given)


def padded(titles, fill=3):
    width = max(map(len, titles))
    rows = [[*title, END, *[fill] * (width - len(title))] for title in titles]
    return torch.tensor(np.array(rows), dtype=torch.int64), torch.tensor([len(title) + 1 for title in titles])


# ---- trie -----------------------------------------------------------------------------------------------------------


def test_every_path_of_the_trie_is_a_title(trie):
    found = {}

    def walk(node, prefix):
        children = trie.children(torch.tensor([node]))[0].tolist() if trie.n_children[node] else []
        if trie.item[node] >= 0:
            assert not children
            found[int(trie.item[node])] = prefix
        below = sum(walk(child, [*prefix, int(trie.token[child])]) for child in children) + (not children)
        assert trie.n_below[node] == below
        return below

    assert walk(0, []) == N
    assert found == {item: [*map(int, title), END] for item, title in enumerate(TOKENS)}


def test_the_items_below_a_node_are_neighbours_in_the_sorted_order(trie):
    order = sorted(range(N), key=lambda item: [*TOKENS[item], END])
    assert trie.place[:N].argsort().tolist() == order
    assert trie.place[N] == N
    for node in range(len(trie.token)):
        if trie.item[node] >= 0:
            assert trie.first_item[node] == trie.place[trie.item[node]]
        elif node:
            children = trie.children(torch.tensor([node]))[0]
            assert trie.first_item[node] == trie.first_item[children].min()


def test_children_of_several_nodes_are_padded_with_the_root():
    trie = TitleTrie([np.array([5, 6]), np.array([5, 7]), np.array([5]), np.array([9])], END)
    children = trie.children(torch.tensor([0, 1, 2]))
    assert [trie.token[row[row > 0]].tolist() for row in children] == [[5, 9], [END, 6, 7], [END]]
    assert children.shape == (3, 3)


def test_titles_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match="items 1 and 3 have the same title tokens"):
        TitleTrie([np.array(title) for title in ([5], [5, 6], [6], [5, 6])], END)
    with pytest.raises(DataError, match=r"item 1 has token 0.*end token is 0"):
        TitleTrie([np.array([5]), np.array([5, END, 7])], END)
    with pytest.raises(DataError, match="item 0 has token -100"):
        TitleTrie([np.array([5, -100])], END)
    with pytest.raises(DataError, match="no titles"):
        TitleTrie([], END)


def test_every_title_of_a_large_catalogue_has_its_leaf():
    generator = np.random.default_rng(0)
    titles = [np.array([*generator.zipf(1.3, 4) % 3000 + 1, 3001 + i // 50, 5100 + i % 50]) for i in range(20_000)]
    trie = TitleTrie(titles, END)
    assert trie.item[trie.item >= 0].sort().values.tolist() == list(range(20_000))
    assert int(trie.n_children.sum()) == len(trie.token) - 1


# ---- likelihood -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [256, 8, 1])
@pytest.mark.parametrize("mean", [False, True])
def test_the_likelihood_is_that_of_plain_forwards(case, max_rows, mean):
    given, expected = case
    torch.manual_seed(2)
    chosen = torch.stack([torch.randperm(N)[:7] for _ in range(3)])  # other candidates for every row
    tokens, lengths = padded(TOKENS)
    ours = title_log_probs(*given, tokens[chosen], lengths[chosen], mean=mean, max_rows=max_rows)
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    expected = expected.gather(1, chosen) / (lengths[chosen] if mean else 1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_gates_and_padding_matter_so_that_the_tests_would_see_a_mistake(case):
    (llm, hold, gates, embeds, mask), expected = case
    tokens, lengths = (part.expand(3, *part.shape) for part in padded(TOKENS))
    for wrong in ((gates.roll(1, 0), embeds, mask), (gates, embeds, torch.ones_like(mask))):
        assert (title_log_probs(llm, hold, *wrong, tokens, lengths) - expected).abs().max() > 0.1


def test_titles_of_one_token(case):
    given, _ = case
    tokens = torch.tensor([[[5], [9]]]).expand(3, 2, 1)
    ours = title_log_probs(*given, tokens, torch.ones(3, 2, dtype=torch.int64))
    torch.testing.assert_close(ours, plain_log_probs(*given, titles=[[5], [9]]), rtol=1e-5, atol=1e-4)


def test_no_gates_and_eager_attention(trie):
    torch.manual_seed(0)
    llm = model_of("llama").unload()
    given = (llm, lambda gates: nullcontext(), None, *prompts_of(model_of("llama"))[1:])
    tokens, lengths = (part[:9].expand(3, 9, *part.shape[1:]) for part in padded(TOKENS))
    expected = plain_log_probs(*given[:2], torch.zeros(3, 0), *given[3:])
    for kind in ("sdpa", "eager"):
        llm.set_attn_implementation(kind)
        ours = title_log_probs(*given, tokens, lengths)
        torch.testing.assert_close(ours, expected[:, :9], rtol=1e-5, atol=1e-4)
    found = constrained_beam_search(*given, trie, beams=N, k=5)
    assert found.items.tolist() == expected.argsort(dim=1, descending=True)[:, :5].tolist()


def test_half_precision_stays_near():
    llm = model_of("llama").to(torch.bfloat16)
    gates, embeds, mask = prompts_of(llm)
    given = (llm, llm.base_model.hold, gates, embeds.to(torch.bfloat16), mask)
    tokens, lengths = (part[:5].expand(3, 5, *part.shape[1:]) for part in padded(TOKENS))
    ours = title_log_probs(*given, tokens, lengths)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain_log_probs(*given)[:, :5], rtol=0.02, atol=0.2)


def test_a_sliding_window_is_refused_where_it_would_cut_and_exact_where_not(trie):
    llm = model_of("mistral")
    given = (llm, llm.base_model.hold, *prompts_of(llm))
    tokens, lengths = (part[None, :20].expand(3, 20, *part.shape[1:]) for part in padded(TOKENS))
    expected = plain_log_probs(*given)
    # 9 tokens of prompt and 20 * 31 of titles side by side: far more than the window, which each title alone fits into.
    torch.testing.assert_close(title_log_probs(*given, tokens, lengths), expected[:, :20], rtol=1e-5, atol=1e-4)
    found = constrained_beam_search(*given, trie, beams=N, k=3)
    assert found.items.tolist() == expected.argsort(dim=1, descending=True)[:, :3].tolist()
    gates, embeds, mask = prompts_of(llm, width=40)
    with pytest.raises(ConfigError, match="layers of this model attend to 48"):
        title_log_probs(llm, llm.base_model.hold, gates, embeds, mask, tokens, lengths)


def test_the_likelihood_refuses_what_does_not_fit(case):
    (llm, hold, gates, embeds, mask), _ = case
    tokens, lengths = (part[:4].expand(3, 4, *part.shape[1:]) for part in padded(TOKENS))
    given = (llm, hold, gates, embeds, mask)
    with pytest.raises(ConfigError, match="for 3 prompts"):
        title_log_probs(*given, tokens[:2], lengths[:2])
    for wrong in (lengths * 0, lengths + 40):
        with pytest.raises(ConfigError, match="lengths must be from 1 to"):
            title_log_probs(*given, tokens, wrong)
    with pytest.raises(ConfigError, match="`max_rows` is 0"):
        title_log_probs(*given, tokens, lengths, max_rows=0)
    with pytest.raises(ConfigError, match="pad prompts on the left"):
        title_log_probs(llm, hold, gates, embeds, mask.flip(1), tokens, lengths)
    with pytest.raises(ConfigError, match="attention mask of shape"):
        title_log_probs(llm, hold, gates, embeds, mask[:, :-1], tokens, lengths)
    llm.config._attn_implementation, kind = "flash_attention_2", llm.config._attn_implementation
    try:
        with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
            title_log_probs(*given, tokens, lengths)
    finally:
        llm.config._attn_implementation = kind


# ---- beam search ----------------------------------------------------------------------------------------------------


def check_exact(found, expected):
    """The best of all titles in order; two that rounding cannot tell apart may change places."""
    k = found.items.shape[1]
    best, order = expected.sort(dim=1, descending=True)
    torch.testing.assert_close(found.log_probs, best[:, :k], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.log_probs, expected.gather(1, found.items), rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == k for row in found.items.tolist())
    assert (found.items == order[:, :k]).float().mean() > 0.9


@pytest.mark.parametrize("k", [1, 5, N])
def test_with_a_beam_for_every_title_the_ranking_is_exact(case, trie, k):
    given, expected = case
    check_exact(constrained_beam_search(*given, trie, beams=N, k=k), expected)


@pytest.mark.parametrize("width", [1, 2, 5, 12])
def test_few_beams_always_find_k_items_each_with_its_own_log_probability(case, trie, width):
    given, expected = case
    found = constrained_beam_search(*given, trie, beams=width, k=width)
    assert all(len(set(row)) == width for row in found.items.tolist())
    assert int(found.items.min()) >= 0
    torch.testing.assert_close(found.log_probs, expected.gather(1, found.items), rtol=1e-5, atol=1e-4)
    assert bool((found.log_probs.diff(dim=1) <= 0).all())


def test_more_beams_than_items_asked_for(case, trie):
    given, expected = case
    few = constrained_beam_search(*given, trie, beams=2, k=2).log_probs
    many = constrained_beam_search(*given, trie, beams=12, k=2).log_probs
    assert bool((many >= few - 1e-4).all())
    assert bool((many <= expected.topk(2).values + 1e-4).all())


def test_excluded_items_are_not_found_and_do_not_take_up_beams(case, trie):
    given, expected = case
    order = expected.argsort(dim=1, descending=True)
    excluded = torch.full((3, 12), N)
    excluded[0, :9] = order[0, :9]
    excluded[1, 3:8] = order[1, [0, 1, 1, 0, 2]]  # twice, and anywhere in the row
    left = expected.clone()
    for row in range(3):
        left[row, excluded[row][excluded[row] < N]] = -math.inf
    check_exact(constrained_beam_search(*given, trie, beams=N, k=8, excluded=excluded), left)
    # Single beams, all but two items excluded: a beam that went where only excluded items are would end with nothing.
    excluded = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(row))[2:] for row in range(3)])
    for width in (1, 2):
        found = constrained_beam_search(*given, trie, beams=width, k=width, excluded=excluded)
        assert all(len(set(row)) == width for row in found.items.tolist())
        assert not (found.items.unsqueeze(2) == excluded.unsqueeze(1)).any()


def test_a_row_does_not_depend_on_its_neighbours(case, trie):
    (llm, hold, gates, embeds, mask), _ = case
    together = constrained_beam_search(llm, hold, gates, embeds, mask, trie, beams=4, k=3)
    for row in range(3):
        one = slice(row, row + 1)
        alone = constrained_beam_search(llm, hold, gates[one], embeds[one], mask[one], trie, beams=4, k=3)
        assert alone.items.tolist() == together.items[one].tolist()


def test_the_search_stops_when_nothing_can_be_beaten(case, trie, monkeypatch):
    given, _ = case
    rows = []

    def read(llm, hold, gates, trie, running, *rest, read=beam._read):
        rows.append(len(running.rows))
        return read(llm, hold, gates, trie, running, *rest)

    monkeypatch.setattr(beam, "_read", read)
    constrained_beam_search(*given, trie, beams=N, k=1)
    n_nodes = int((trie.item < 0).sum()) - 1  # the root is read with the prompt
    assert sum(rows) < 3 * n_nodes / 2
    rows.clear()
    constrained_beam_search(*given, trie, beams=N, k=N)
    assert sum(rows) == 3 * n_nodes


def test_the_search_refuses_what_cannot_be_found(case, trie):
    given, _ = case
    for beams, k in ((2, 3), (N + 5, N + 1), (3, 0)):
        with pytest.raises(ConfigError, match=r"k <= min\(beams, items\)"):
            constrained_beam_search(*given, trie, beams=beams, k=k)
    excluded = torch.full((3, N), N)
    excluded[1, : N - 2] = torch.arange(N - 2)
    with pytest.raises(ConfigError, match="only 2 items remain for row 1"):
        constrained_beam_search(*given, trie, beams=3, k=3, excluded=excluded)
    for wrong in (torch.full((2, 4), N), torch.full((3, 4), N + 1), torch.full((3, 4), -1)):
        with pytest.raises(ConfigError, match="`excluded` must have shape"):
            constrained_beam_search(*given, trie, beams=3, k=3, excluded=wrong)
    with pytest.raises(ConfigError, match="have token 300, but the model's vocabulary has 257"):
        constrained_beam_search(*given, TitleTrie([np.array([300])], END), beams=1, k=1)


def test_a_model_that_gives_no_numbers_is_refused(trie):
    llm = model_of("llama")
    llm.get_output_embeddings().weight.data[5] = math.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        constrained_beam_search(llm, llm.base_model.hold, *prompts_of(llm), trie, beams=4, k=2)
