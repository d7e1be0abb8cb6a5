"""Build a teacher for training, and load a finished one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llm2rec.core.checkpoint import save_tensors
from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.files import read_json, replaced_folder, write_json
from llm2rec.data import RecData
from llm2rec.ilora import ILoraConfig, frozen_base
from llm2rec.teacher.gate_cache import model_identity
from llm2rec.teacher.gate_source import FrozenBase, GateSource, load_gate_source
from llm2rec.teacher.ilora_model import ILoraRecommender, frozen_title_vectors
from llm2rec.teacher.llm import load_model, load_tokenizer, resolve_precision
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import AdapterSettings, LLMSettings, PromptSettings, TeacherSettings

__all__ = ["TeacherRecipe", "build_teacher", "load_teacher", "popularity_bias", "save_teacher"]


@dataclass(frozen=True)
class TeacherRecipe:
    """What a finished teacher needs to be put together again, besides its weights; plain values.

    Attributes:
        source: Folder or Hub id of the language model.
        precision: Number format of its weights.
        pooling: How texts are represented.
        prompt: Arguments of `PromptSettings`.
        trust_remote_code: Whether the model's own code may run.
        logit_scale: Factor on the cosine.
        exclude_history: Whether items of a history are out of the running.
        gate_input: Name of the `GateSource`.
    """

    source: str
    precision: str
    pooling: str
    prompt: dict[str, Any]
    trust_remote_code: bool
    logit_scale: float
    exclude_history: bool
    gate_input: str = FrozenBase.name

    @property
    def identity(self) -> str:
        """All about the language model that decides gate inputs."""
        return json.dumps([model_identity(self.source), self.precision, self.pooling, self.prompt], sort_keys=True)

    @property
    def llm_settings(self) -> LLMSettings:
        """The language model's settings."""
        return LLMSettings("", self.source, self.pooling, PromptSettings(**self.prompt), self.trust_remote_code)


def popularity_bias(targets: NDArray[np.int32], n_items: int, weight: float) -> Tensor:
    """``weight`` times the log of each item's smoothed share of the training targets, shape ``(N,)``, in nats."""
    counts = np.bincount(targets, minlength=n_items) + 1.0
    return torch.from_numpy(weight * np.log(counts / counts.sum())).float()


def build_teacher(
    llm: LLMSettings,
    source: str,
    settings: TeacherSettings,
    data: RecData,
    targets: NDArray[np.int32],
    device: torch.device,
    gate_source: GateSource | None = None,
) -> tuple[ILoraRecommender, TeacherRecipe]:
    """Build a teacher with a fresh adapter.

    Args:
        llm: The language model's settings.
        source: What `llm2rec.teacher.llm.locate` returned.
        settings: The teacher's settings.
        data: The dataset; its titles become item vectors.
        targets: Training targets, shape ``(M,)``, for the popularity prior.
        device: Where to build it.
        gate_source: What ``settings.gate_input`` names; None for the language model.

    Returns:
        The teacher, and the recipe to store beside its weights.

    Raises:
        ConfigError: If the adapter's settings, or the length of the prompts, do not fit the model, or the source of the
            gate's input is another than the settings say.
    """
    gate_source = gate_source or FrozenBase()
    if gate_source.name != settings.gate_input:
        raise ConfigError(
            f"`teacher.gate_input` is {settings.gate_input!r} but the `gate_source` given is {gate_source.name!r}; "
            "open it with `open_gate_source`."
        )
    precision = resolve_precision(settings.precision, device)
    recipe = TeacherRecipe(
        source=source,
        precision=precision,
        pooling=llm.pooling,
        prompt=vars(llm.prompt).copy(),
        trust_remote_code=llm.trust_remote_code,
        logit_scale=settings.logit_scale,
        exclude_history=settings.exclude_history,
        gate_input=gate_source.name,
    )
    config = _adapter_config(settings.adapter, gate_source.width)  # checked before the model is loaded
    prompts = PromptBuilder(load_tokenizer(source, llm), data.items, llm.prompt, data.domain)
    base = load_model(source, llm, precision, device)
    _check_positions(base, llm.prompt)
    try:
        peft_model = get_peft_model(base, config)
    except (ValueError, TypeError) as error:  # no such layer, or one that is not linear
        raise ConfigError(f"teacher.adapter: {error}") from error
    with frozen_base(peft_model):
        vectors = frozen_title_vectors(peft_model, prompts, llm.pooling, device)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    bias = popularity_bias(targets, data.n_items, settings.popularity_prior)
    return _recommender(peft_model, prompts, recipe, vectors, bias, gate_source).to(device), recipe


def _adapter_config(adapter: AdapterSettings, gate_width: int | None) -> ILoraConfig:
    try:
        return ILoraConfig(**vars(adapter), gate_input_size=gate_width, task_type=TaskType.FEATURE_EXTRACTION)
    except ValueError as error:
        raise ConfigError(f"teacher.adapter: {error}") from error


def _check_positions(base: PreTrainedModel, prompt: PromptSettings) -> None:
    """Refuse prompts longer than the model's table of positions, whose look-up would fail in the middle of a run."""
    config = base.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is not None and prompt.max_tokens > n_positions:
        raise ConfigError(
            f"`llm.prompt.max_tokens` is {prompt.max_tokens} but the model has {n_positions} positions; lower it to "
            f"{n_positions} or less."
        )


def _recommender(
    llm: PeftModel,
    prompts: PromptBuilder,
    recipe: TeacherRecipe,
    vectors: Tensor,
    bias: Tensor,
    gate_source: GateSource,
) -> ILoraRecommender:
    return ILoraRecommender(
        llm,
        prompts,
        pooling=recipe.pooling,
        item_vectors=vectors,
        logit_scale=recipe.logit_scale,
        item_bias=bias,
        exclude_history=recipe.exclude_history,
        gate_source=gate_source,
    )


def save_teacher(folder: Path, model: ILoraRecommender, recipe: TeacherRecipe) -> None:
    """Write ``adapter/`` (a standard PEFT folder), ``items.safetensors``, ``config.json`` and what the gate reads."""
    with replaced_folder(folder) as aside:
        model.llm.save_pretrained(str(aside / "adapter"))
        save_tensors({"vectors": model.item_vectors, "bias": model.item_bias}, aside / "items.safetensors")
        model.gate_source.save(aside)
        write_json(aside / "config.json", vars(recipe))


def load_teacher(folder: Path, data: RecData, device: torch.device) -> tuple[ILoraRecommender, TeacherRecipe]:
    """Load a finished teacher, in evaluation mode.

    Args:
        folder: What `save_teacher` wrote.
        data: The dataset it was trained on.
        device: Where to load it.

    Returns:
        The teacher, and the recipe it was put together by.

    Raises:
        CheckpointError: If the folder holds no teacher, or a part of one, or its language model is no longer where it
            was.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no teacher (no config.json); name the folder of a finished teacher run.")
    recipe = TeacherRecipe(**read_json(folder / "config.json"))
    gate_source = load_gate_source(recipe.gate_input, folder, device)
    llm = recipe.llm_settings
    try:
        tokenizer = load_tokenizer(recipe.source, llm)
        base = load_model(recipe.source, llm, recipe.precision, device)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the language model of {folder} cannot be loaded from {recipe.source!r}, where it was in training "
            f"({str(error).splitlines()[0]}); put it back, or write its new place into `source` of config.json there."
        ) from error
    prompts = PromptBuilder(tokenizer, data.items, llm.prompt, data.domain)
    items = load_file(folder / "items.safetensors")
    peft_model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    model = _recommender(peft_model, prompts, recipe, items["vectors"], items["bias"], gate_source)
    return model.to(device).eval(), recipe
