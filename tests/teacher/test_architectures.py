"""Each architecture trains, scores and reloads for either objective, or is refused early with a readable error."""

import re

import numpy as np
import pytest
import torch
from architecture_helpers import ARCHITECTURES, make_architecture
from teacher_helpers import CPU, engine_in, fit, split, teacher_rows
from title_helpers import one_by_one, rows_of, title_log_prob

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import seed_everything
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, PromptSettings, TeacherSettings, TitleSettings
from llm2rec.teacher.store import load_teacher, save_teacher
from llm2rec.teacher.title.objective import TitleObjective
from llm2rec.teacher.trainer import train_teacher

ENCODERS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "modernbert", "mpnet", "deberta-v2", "distilbert",
    "albert", "t5", "xlnet", "deberta, relative", "deberta-v2, relative", "deberta-v2, shared keys",
)  # fmt: skip
NO_POSITIONS = "cannot do here .its forward pass takes no `position_ids`"
NO_KEYS = "cannot do here .this model's cache has layers of type"
# Per case: what its error for either objective says; a case that is not here works.
NO_ITEM = {
    "t5": "needs a model that gives a hidden state for each token",
    "xlnet": "leaves the gates of a token unknown",  # its only linear layers
}
NO_TITLE = {
    **dict.fromkeys(ENCODERS, "needs a model that writes text"),
    **dict.fromkeys(("bloom", "mamba", "mamba2"), NO_POSITIONS),
    **dict.fromkeys(("lfm2", "qwen3_next", "falcon_h1"), "cannot do here"),
    **dict.fromkeys(("openai-gpt", "recurrent_gemma", "rwkv", "mpt", "falcon, alibi"), "cannot do here"),
    "gpt_neo, short window": "'gpt_neo' cannot do here .log-probabilities side by side differ",
    "modernbert-decoder": "layers of this model attend to 64",
    "gemma3": "'gemma3' cannot do here .its `generate` accepts no `inputs_embeds`",
}
# What "all-linear" has to leave out, which PEFT's lists and torch's modules say while the adapter is built.
EXCLUDED = {
    "mamba": "out_proj",
    "mamba2": "out_proj",
    "falcon_h1": "out_proj",
    "gemma3": "vision_tower.head.attention.out_proj",
}
# Cases whose adapters a dry run refuses at first, with the value of `exclude_modules` that it proposes.
PROPOSED = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "mpnet"), "'pooler.*'"),
    "albert": "[pooler]",
    "mamba": "[dt_proj]",
    "gemma3": "vision_tower",
    "opt": "[fc1,fc2]",
    "llama4_text": "feed_forward",
    "qwen3_next": "shared_expert",
    "deberta, relative": "[pos_proj,pos_q_proj]",
    "deberta-v2, relative": "[pos_key_proj,pos_query_proj]",
    "deberta-v2, shared keys": "[key_proj,query_proj]",
}


@pytest.fixture(scope="module")
def folder_of(data, tmp_path_factory):
    """The folder of a case's model, made once."""
    root, made = tmp_path_factory.mktemp("architectures"), {}

    def folder(case):
        if case not in made:
            made[case] = make_architecture(case, root / str(len(made)), data.titles)
        return made[case]

    return folder


def trained(case, objective, exclude, data, folder, run):
    """A teacher of the case after two steps, its recipe and its settings."""
    exclusions = [name for name in (EXCLUDED.get(case), *exclude) if name]
    adapter = AdapterSettings(
        r=4,
        num_experts=2,
        target_modules="all-linear",
        exclude_modules="|".join(rf"(.*\.)?({name})" for name in exclusions) if exclusions else None,
    )
    options = {"title": TitleSettings(n_candidates=5)} if objective == "title" else {}
    settings = TeacherSettings(objective=objective, adapter=adapter, **options)
    llm = LLMSettings(name=case, path=str(folder), pooling="mean", prompt=PromptSettings(max_tokens=320))
    seed_everything(3)
    model, recipe = build_teacher(llm, str(folder), settings, data, split(data).targets.numpy(), CPU)
    engine = engine_in(run, epochs=1, batch_size=4, micro_batch_size=4)
    train = teacher_rows(model, split(data), np.arange(8))
    validation = teacher_rows(model, split(data, "validation"), np.arange(4))
    if objective == "item":
        fit(model, train, validation, engine)
    else:
        train_teacher(model, TitleObjective(model, train, validation, engine), engine, settings)
    return model.eval(), recipe


def proposed_exclusions(value):
    """Names or expressions of a proposed value of ``exclude_modules``."""
    return value.strip("'[]").split("|" if value.startswith("'") else ",")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["item", "title"])
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_works_or_is_refused_early(case, objective, data, folder_of, tmp_path):
    folder, refused = folder_of(case), NO_ITEM if objective == "item" else NO_TITLE
    if case in refused:
        with pytest.raises(ConfigError, match=refused[case]):
            trained(case, objective, [], data, folder, tmp_path / "run")
        assert not (tmp_path / "run" / "metrics").exists()
        return
    exclude = []
    if case in PROPOSED:
        with pytest.raises(ConfigError, match=r"teacher\.adapter\.exclude_modules=") as refusal:
            trained(case, objective, [], data, folder, tmp_path / "first")
        value = re.search(r"exclude_modules=('.*?'|\[.*?\])", str(refusal.value))[1]
        assert PROPOSED[case] in value
        exclude = proposed_exclusions(value)
    model, recipe = trained(case, objective, exclude, data, folder, tmp_path / "run")
    save_teacher(tmp_path / "teacher", model, recipe)
    loaded, _ = load_teacher(tmp_path / "teacher", data, CPU)
    history, lengths, drawn, _ = rows_of(data, n_rows=3)
    scores = model.log_probs(history, lengths)
    torch.testing.assert_close(loaded.log_probs(history, lengths), scores, rtol=1e-5, atol=1e-5)
    items, best = loaded.best_items(history, lengths, 3)
    torch.testing.assert_close(scores.gather(1, items), best, rtol=1e-4, atol=1e-4)
    if objective == "title":
        expected = [
            [title_log_prob(model, *row, item) for item in row[2][0]] for row in one_by_one(history, lengths, drawn)
        ]
        found = model.candidate_log_probs(history, lengths, drawn, mean=False)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-3)
        assert len(model.generate(history, lengths, drawn)) == 3
