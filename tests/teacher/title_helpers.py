"""Title teachers of every kind, and what they say by plain loops: one row, one token, no cache, no padding."""

import numpy as np
import torch
from teacher_helpers import build, finished_run, randomise, recommender_of, split

from llm2rec.student.negatives import CandidateSampler
from llm2rec.teacher.settings import TitleSettings

PROMPT = {"max_tokens": 320}
KINDS = ["ilora", "per layer", "sequence gate, hybrid", "lora", "none", "none, hybrid"]


def title_teacher(
    kind, data, llm_folder, folder, prompt=None, exclude_history=True, dropout=0.2, settings=None, **title
):
    """A teacher whose adapter and gates change something; with dropout and noise, which evaluation leaves out."""
    settings, adapter = dict(settings or {}), {} if kind.startswith("none") else {"dropout": dropout}
    if kind.startswith(("lora", "none")):
        settings["tuning"] = kind.split(",")[0]
    if kind == "per layer":
        adapter |= {"gate_per_layer": True, "gate": "noisy"}
    if kind.startswith("sequence"):
        settings["gate_input"] = "sequence"
    recommender = None
    if "hybrid" in kind:
        recommender = recommender_of(finished_run(folder / "student", data), data, folder / "kept")
        settings["prompts"] = "hybrid"
    model, recipe = build(
        "llama",
        llm_folder,
        data,
        recommender,
        prompt=PROMPT | (prompt or {}),
        adapter=adapter,
        objective="title",
        exclude_history=exclude_history,
        title=TitleSettings(**{"n_candidates": 5, **title}),
        **settings,
    )
    return randomise(model).eval(), recipe


def rows_of(data, n_rows=7, n_candidates=5):
    """Histories of different lengths, with candidates and targets."""
    train = split(data)
    rows = np.argsort(-train.lengths, kind="stable")[:: max(1, len(train) // n_rows)][:n_rows].copy()
    drawn = CandidateSampler(train, 0, n_candidates, split="train").draw(rows)
    return *train.histories(rows), drawn, train.targets.numpy()[rows]


def answer_text(prompts, item):
    """An item's title as the title task shows it: perhaps shortened, and numbered if others have the same."""
    return prompts.titles_shown[item]


def gates_of(model, history, lengths):
    if model.tuner is None:
        return None
    return model.tuner.gate(model.gate_inputs(history, lengths))


def next_log_probs(model, history, lengths, candidates, written):
    """Log-probabilities of the token after a prompt and what is written, of one row: no cache, no padding."""
    tokens = model.prompts.questions(history, lengths, candidates, hybrid=model.is_hybrid)
    table = model.llm.get_input_embeddings()
    hybrid = tokens.item_ids is not None
    embeds = model.embeddings(tokens.input_ids, tokens.item_ids) if hybrid else table(tokens.input_ids)
    if written:
        embeds = torch.cat([embeds, table(torch.tensor([written]))], dim=1)
    with torch.no_grad(), model.hold(gates_of(model, history, lengths)):
        return model.llm(inputs_embeds=embeds).logits[0, -1].log_softmax(dim=0)


def title_log_prob(model, history, lengths, candidates, item):
    """Token by token, the end token included."""
    title, total = [*model.prompts.answer_tokens()[item].tolist(), model.prompts.end_id], 0.0
    for place, token in enumerate(title):
        total += float(next_log_probs(model, history, lengths, candidates, title[:place])[token])
    return total


def one_by_one(history, lengths, candidates):
    for row in range(len(history)):
        yield history[row : row + 1, : lengths[row]], lengths[row : row + 1], candidates[row : row + 1]
