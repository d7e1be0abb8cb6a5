"""A small dataset, small language models of two kinds, and teachers built from them."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from llm2rec.config import register
from llm2rec.core.files import write_json
from llm2rec.core.run import Run
from llm2rec.core.seed import seed_everything
from llm2rec.core.train.engine import Engine
from llm2rec.core.train.settings import TrainingSettings
from llm2rec.data import RecData
from llm2rec.stage import build as settings_of
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model
from llm2rec.student.store import save_student
from llm2rec.teacher.borrowed_student import BorrowedStudent, open_recommender
from llm2rec.teacher.factory import TeacherRecipe, build_teacher
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.llm import make_tiny_random
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, PromptSettings, TeacherSettings, TinyRandomSettings
from llm2rec.teacher.trainer import ItemObjective, train_teacher

CPU = torch.device("cpu")
ODD_TITLES = [
    "Toy Story (1995)",
    "Commas, everywhere, always",
    "{domain} and {0}; braces {}",
    "Amélie – Le Fabuleux Destin",
    "攻殻機動隊 2.0",
    "🎲 Dice & Co.",
    "\"Quoted\" 'title'",
    "x",
    "  spaces   inside  ",
    "Half-Life: Episode 2",
    "very long " * 120,
    "Heat!",
]


def bpe_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts one token in front and none behind, like Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {text}" for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


def wordpiece_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """WordPiece with a special token on both sides, like BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def make_bert(folder: Path, titles: list[str]) -> Path:
    """A random BERT of two layers in Hugging Face's layout."""
    tokenizer = wordpiece_tokenizer([f"{title};" for title in titles])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def item_table(titles: list[str]) -> Dataset:
    return Dataset.from_dict({"item_id": list(range(len(titles))), "title": titles})


def padded(histories: list[list[int]], n_items: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    history = np.full((len(histories), width), n_items, np.int32)
    for row, items in enumerate(histories):
        history[row, : len(items)] = items
    return history, np.array([len(items) for items in histories], np.int32)


def llm_of(kind: str, folder: Path, data: RecData, **prompt) -> tuple[LLMSettings, str]:
    """Settings and folder of a ``llama`` or ``bert`` with random weights."""
    shape = PromptSettings(**{"max_tokens": 96, **prompt})
    if kind == "llama":
        settings = TinyRandomSettings(
            name="tiny_random", pooling="mean", prompt=shape, width=32, n_heads=2, vocabulary=400
        )
        return settings, str(make_tiny_random(settings, folder, data.titles))
    if not (folder / "bert").is_dir():
        make_bert(folder / "bert", data.titles)
    return LLMSettings(name="bert", path=str(folder / "bert"), pooling="mean", prompt=shape), str(folder / "bert")


def build(
    kind: str,
    folder: Path,
    data: RecData,
    recommender: BorrowedStudent | None = None,
    *,
    prompt: dict | None = None,
    adapter: dict | None = None,
    **settings,
) -> tuple[ItemTeacher, TeacherRecipe]:
    """A teacher with a fresh adapter, the same at every call."""
    llm, source = llm_of(kind, folder, data, **(prompt or {}))
    usual = {} if settings.get("tuning") == "none" else {"r": 8, "num_experts": 4, "dropout": 0.0}
    chosen = AdapterSettings(**{**usual, **(adapter or {})})
    if recommender is not None:
        settings["recommender_run"] = "result/result_x"
    seed_everything(3)
    return build_teacher(
        llm,
        source,
        TeacherSettings(adapter=chosen, **settings),
        data,
        split(data).targets.numpy(),
        CPU,
        recommender,
    )


def finished_run(folder, data, name="sasrec", width=64, max_length=10, seed=0, **record) -> Path:
    """A run folder as the student stage leaves it; the weights are random and large enough to matter."""
    arguments = {"n_items": data.n_items, "width": width, "max_length": max_length, "dropout": 0.5}
    torch.manual_seed(seed)
    student = build_model(name, **arguments)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save_student(folder / "student", student, name, arguments)
    dataset = {"name": data.name, "fingerprint": data.fingerprint}
    write_json(folder / "run.json", {"stage": "student", "status": "finished", "dataset": dataset, **record})
    return folder


def recommender_of(run: Path, data: RecData, kept: Path) -> BorrowedStudent:
    """The recommender that a student's run holds, as the stage opens it."""
    return open_recommender(run, kept, data.name, data.fingerprint, CPU)


def randomise(model: ItemTeacher, seed: int = 5, std: float = 0.3) -> ItemTeacher:
    """Give the adapter values that change something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def split(data: RecData, name: str = "train") -> Rows:
    return Rows.of(data, name)


def engine_in(folder: Path, **training) -> Engine:
    run = Run(folder, "teacher", {})
    return Engine(run, seed=1, training=TrainingSettings(**training), tensorboard=False)


def teacher_rows(model: ItemTeacher, data: Rows, rows: np.ndarray) -> TeacherRows:
    """Gate inputs without any cache, all rows in one batch."""
    history, lengths = data.histories(rows)
    return TeacherRows(data, rows, model.gate_inputs(history, lengths).numpy(), model.token_counts(history, lengths))


def fit(model: ItemTeacher, train: TeacherRows, validation: TeacherRows, engine: Engine, **settings) -> ItemTeacher:
    """Train for the `item` objective, with the engine's length and rate, which is also the gate's unless told."""
    usual = {"gate_learning_rate_ratio": 1.0} if settings.get("tuning", "ilora") == "ilora" else {}
    chosen = TeacherSettings(training=engine.training, **{**usual, **settings})
    train_teacher(model, ItemObjective(model, train, validation, engine), engine, chosen)
    return model


def configured(*overrides: str) -> TeacherSettings:
    """Teacher settings as a command's overrides make them."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(Path(__file__).resolve().parents[2] / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["paths.root=/somewhere", *overrides])
    return settings_of(cfg.teacher, TeacherSettings)
