"""What a language model or its tokenizer cannot do is refused before training, on small random models."""

import pytest
import transformers
from teacher_helpers import CPU, padded, split, wordpiece_tokenizer

from llm2rec.core.errors import ConfigError
from llm2rec.core.files import read_json, write_json
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.llm import load_tokenizer
from llm2rec.teacher.settings import LLMSettings, PromptSettings, TeacherSettings

POSITIONS = 40
BERT_LIKE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": POSITIONS,
}
DIMENSIONS = {
    "Bert": BERT_LIKE,
    "Roberta": BERT_LIKE,
    "XLMRoberta": BERT_LIKE,
    "Camembert": BERT_LIKE,
    "MPNet": BERT_LIKE,
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "Mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": POSITIONS},
    "T5": {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8},
}


def saved(folder, kind, titles, rows=None):
    """A random model with a tokenizer for the titles; ``rows`` of the embedding as many as tokens unless given."""
    tokenizer = wordpiece_tokenizer([f"{title};" for title in titles])
    sizes = {"vocab_size": rows or len(tokenizer), **DIMENSIONS[kind]}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teacher_of(folder, data, max_tokens=POSITIONS, objective="item"):
    llm = LLMSettings(name="small", path=folder, pooling="mean", prompt=PromptSettings(max_tokens=max_tokens))
    settings = TeacherSettings(tuning="none", objective=objective)
    return build_teacher(llm, folder, settings, data, split(data).targets.numpy(), CPU)[0]


@pytest.mark.parametrize(
    ("kind", "n_positions"),
    [("Bert", 40), ("Roberta", 38), ("XLMRoberta", 38), ("Camembert", 38), ("MPNet", 38), ("Mpt", 40)],
)
def test_prompts_may_take_all_positions_of_a_model_and_no_more(data, tmp_path, kind, n_positions):
    folder = saved(tmp_path, kind, data.titles)
    model = teacher_of(folder, data, n_positions)
    counts = model.prompts.title_token_counts()
    shortest = int(counts.argmin())
    history, lengths = padded([[shortest] * 40], data.n_items, 40)
    assert n_positions - counts.min() < model.token_counts(history, lengths).max() <= n_positions
    assert model.best_items(history, lengths, 3)[0].shape == (1, 3)
    with pytest.raises(ConfigError, match=f"the model has {n_positions} positions; use at most {n_positions}"):
        teacher_of(folder, data, n_positions + 1)


def test_a_model_without_a_limit_takes_any_prompt(data, tmp_path):
    teacher_of(saved(tmp_path, "XLNet", data.titles), data, 4096)


def test_a_model_of_encoder_and_decoder_is_refused(data, tmp_path):
    folder = saved(tmp_path, "T5", data.titles)
    with pytest.raises(ConfigError, match=r"objective=item needs a model that gives a hidden state for each token"):
        teacher_of(folder, data)
    with pytest.raises(ConfigError, match=r"objective=title. needs a model that writes text"):
        teacher_of(folder, data, 256, "title")


def test_a_token_without_a_row_in_the_embedding_is_refused(data, tmp_path):
    tokenizer = wordpiece_tokenizer([f"{title};" for title in data.titles])
    used = max(max(ids) for ids in tokenizer([f" {title};" for title in data.titles])["input_ids"])
    teacher_of(saved(tmp_path / "enough", "Bert", data.titles, used + 1), data)
    with pytest.raises(ConfigError, match=rf"gives token {used} \(.*\), but the model's embedding has {used} rows"):
        teacher_of(saved(tmp_path / "fewer", "Bert", data.titles, used), data)


def test_a_padding_token_added_without_a_row_is_refused(data, tmp_path):
    folder = saved(tmp_path, "Bert", data.titles)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"'<added>'.*resize_token_embeddings"):
        teacher_of(folder, data)


def test_a_tokenizer_without_padding_and_end_token_is_refused(data, tmp_path):
    folder = saved(tmp_path, "Bert", data.titles)
    file = tmp_path / "tokenizer_config.json"
    write_json(file, {name: value for name, value in read_json(file).items() if name not in ("pad_token", "eos_token")})
    settings = LLMSettings(name="small", path=folder)
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token; set `pad_token`"):
        load_tokenizer(folder, settings)
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-text token"):
        teacher_of(folder, data)
