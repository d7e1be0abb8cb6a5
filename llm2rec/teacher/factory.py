"""Build a teacher from its settings, with a fresh adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm2rec.core.errors import ConfigError
from llm2rec.data import RecData
from llm2rec.ilora import DEFAULT_TARGET_MODULES, ILoraConfig, check_parent
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.heads import JoinedHead, build_head
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher
from llm2rec.teacher.injection import ItemProjector
from llm2rec.teacher.llm import (
    load_model,
    load_tokenizer,
    model_identity,
    readable,
    resolve_precision,
    weights_hash,
    without_head,
)
from llm2rec.teacher.model_limits import check_hidden_states, check_positions, check_vocabulary
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import LLMSettings, PromptSettings, TeacherSettings, TitleSettings
from llm2rec.teacher.text_vectors import TitleVectors, read_titles, title_vectors
from llm2rec.teacher.title.likelihood import MAX_SCORED_ROWS
from llm2rec.teacher.title.model import TitleRecommender
from llm2rec.teacher.title.probe import check_side_by_side
from llm2rec.teacher.title.prompts import TitlePrompts

__all__ = [
    "TeacherRecipe",
    "adapter_config",
    "assemble",
    "build_prompts",
    "build_teacher",
    "popularity_bias",
    "with_adapter",
]


_OTHER_MODEL = "Use another one, a decoder or an encoder, such as `llm=llama2_7b`."


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings of a finished teacher, which together with its weights rebuild it; plain values.

    Attributes:
        source: Folder or Hub id of the language model.
        precision: Number format of its weights.
        pooling: Pooling of hidden states.
        prompt: Arguments of `PromptSettings`.
        trust_remote_code: Whether the model's own code may run.
        seed: Seed of the choice among wordings.
        objective: ``item`` or ``title``.
        tuning: ``ilora``, ``lora`` or ``none``.
        logit_scale: Factor on the cosine.
        exclude_history: Whether items of a history are excluded from its ranking.
        head: Kind of `ItemHead`.
        gate_input: Source of the gate's input: ``llm``, ``sequence`` or ``none``.
        hybrid: Whether prompts carry injected vectors.
        title: Arguments of `TitleSettings`.
        fingerprint: Fingerprint of the dataset whose items it ranks; empty if unknown.
        llm_weights: `weights_hash` of the language model; empty if unknown.
    """

    source: str
    precision: str
    pooling: str
    prompt: dict[str, Any]
    trust_remote_code: bool
    seed: int
    objective: str
    tuning: str
    logit_scale: float
    exclude_history: bool
    head: str
    gate_input: str
    hybrid: bool
    title: dict[str, Any]
    fingerprint: str = ""
    llm_weights: str = ""

    @property
    def identity(self) -> str:
        """Everything about the language model that determines gate inputs."""
        return json.dumps([model_identity(self.source), self.precision, self.pooling, self.prompt], sort_keys=True)

    @property
    def llm_settings(self) -> LLMSettings:
        """The language model's settings."""
        return LLMSettings("", self.source, self.pooling, PromptSettings(**self.prompt), self.trust_remote_code)

    @property
    def reads_recommender(self) -> bool:
        """Whether a trained recommender belongs to the teacher."""
        return self.hybrid or self.gate_input == "sequence" or self.head in ("joined", "residual")


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
    recommender: BorrowedStudent | None = None,
    seed: int = 0,
) -> tuple[LLMTeacher, TeacherRecipe]:
    """Build a teacher with a fresh adapter.

    Args:
        llm: The language model's settings.
        source: Return value of `llm2rec.teacher.llm.locate`.
        settings: The teacher's settings.
        data: The dataset; its titles become item vectors.
        targets: Training targets, shape ``(M,)``, for the popularity prior.
        device: Where to build it.
        recommender: The trained recommender of ``settings.recommender_run``, if any.
        seed: Seed of the choice among wordings.

    Returns:
        The teacher, and the recipe to save with its weights.

    Raises:
        ConfigError: If the adapter's settings or the length of the prompts do not fit the model, or a trained
            recommender is required and missing.
    """
    recipe = _recipe(llm, source, settings, data.fingerprint, device, seed)
    if recipe.reads_recommender != (recommender is not None):
        raise ConfigError(
            f"`teacher.recommender_run` is {settings.recommender_run!r} but the `recommender` given is "
            f"{recommender and recommender.name!r}; open it with `open_recommender`."
        )
    gate_width = recommender.width if recommender is not None and recipe.gate_input == "sequence" else None
    config = adapter_config(settings, gate_width)  # before the model is loaded
    _check_export(settings, data)
    base, prompts = _open_model(llm, source, recipe, data, device, seed)
    bias = popularity_bias(targets, data.n_items, settings.popularity_prior)
    with readable(ConfigError, f"a language model of type {base.config.model_type!r} cannot read texts", _OTHER_MODEL):
        items = _read_items(base, prompts, recipe, bias, device)
    model = base if config is None else with_adapter(base, config)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    teacher = assemble(model, prompts, recipe, items, recommender)
    if isinstance(teacher, ItemTeacher):
        if settings.item_refresh_steps:
            teacher.head.keep_titles()
        if isinstance(teacher.head, JoinedHead):
            teacher.head.residual_dropout = settings.residual_dropout
    return teacher.to(device), recipe


def _open_model(
    llm: LLMSettings, source: str, recipe: TeacherRecipe, data: RecData, device: torch.device, seed: int
) -> tuple[PreTrainedModel, PromptBuilder]:
    """The frozen language model and its prompts, checked against each other."""
    problem, remedy = f"llm: {source!r} cannot be loaded", "Fetch its files again, or name another model."
    with readable(ConfigError, problem, remedy):
        tokenizer = load_tokenizer(source, llm)
    prompts = build_prompts(recipe.objective, tokenizer, data, llm.prompt, seed)
    if isinstance(prompts, TitlePrompts):  # before the model is loaded
        prompts.check_candidates(recipe.title["n_candidates"] or None, hybrid=recipe.hybrid)
    with readable(ConfigError, problem, remedy):
        base = load_model(source, llm, recipe.precision, device, writes=recipe.objective == "title")
    check_positions(base, llm.prompt)
    check_vocabulary(base, prompts.largest_token(), tokenizer, source)
    if isinstance(prompts, TitlePrompts):
        _check_side_by_side(base, prompts, llm.prompt)
    else:
        check_hidden_states(base, source, "teacher.objective=item")
    return base, prompts


def build_prompts(
    objective: str, tokenizer: PreTrainedTokenizerBase, data: RecData, settings: PromptSettings, seed: int
) -> PromptBuilder:
    """The prompts of a teacher with this ``objective``; see `PromptBuilder`."""
    kind = TitlePrompts if objective == "title" else PromptBuilder
    return kind(tokenizer, data.items, settings, data.domain, seed)


def _recipe(
    llm: LLMSettings, source: str, settings: TeacherSettings, fingerprint: str, device: torch.device, seed: int
) -> TeacherRecipe:
    """The recipe of a teacher with these settings; arguments as in `build_teacher`."""
    return TeacherRecipe(
        source=source,
        precision=resolve_precision(settings.precision, device),
        pooling=llm.pooling,
        prompt=vars(llm.prompt).copy(),
        trust_remote_code=llm.trust_remote_code,
        seed=seed,
        objective=settings.objective,
        tuning=settings.tuning,
        logit_scale=settings.logit_scale,
        exclude_history=settings.exclude_history is not False,
        head=settings.head,
        gate_input=settings.gate_input if settings.tuning == "ilora" else "none",
        hybrid=settings.prompts == "hybrid",
        title=vars(settings.title).copy(),
        fingerprint=fingerprint,
        llm_weights=weights_hash(source),
    )


def with_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The language model with a fresh adapter; ``config`` comes from `adapter_config`.

    Raises:
        ConfigError: If the model has no such layers, or they are not linear.
    """
    if isinstance(config, LoraConfig) and config.target_modules is None:  # the same layers as iLoRA
        config.target_modules = DEFAULT_TARGET_MODULES.get(base.config.model_type)
    try:
        model = get_peft_model(base, config)
        for name, parent in model.named_modules():
            if any(isinstance(layer, BaseTunerLayer) for layer in parent.children()):
                check_parent(parent, name)  # iLoRA has done so
    except (ValueError, TypeError) as error:  # no such layer, or one that is not linear
        fused = "; use `teacher.adapter.dropout=0`, as the experts are one tensor" if "ParamWrap" in str(error) else ""
        raise ConfigError(f"teacher.adapter: {str(error).removesuffix('.')}{fused}.") from error
    return cast(PeftModel, model)


def _read_items(
    base: PreTrainedModel, prompts: PromptBuilder, recipe: TeacherRecipe, bias: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """Tensors of ``items.safetensors``, from a language model without adapter."""
    if isinstance(prompts, TitlePrompts):
        return read_titles(without_head(base), prompts, recipe.pooling, device)._asdict()
    return {"vectors": title_vectors(without_head(base), prompts, recipe.pooling, device), "bias": bias}


def adapter_config(settings: TeacherSettings, gate_width: int | None) -> PeftConfig | None:
    """The adapter's configuration; None for ``tuning=none``.

    Args:
        settings: The teacher's settings.
        gate_width: Width of the gate's input; None for the width of the language model.

    Raises:
        ConfigError: If the adapter's settings are invalid.
    """
    adapter = settings.adapter
    task = TaskType.FEATURE_EXTRACTION if settings.objective == "item" else TaskType.CAUSAL_LM
    try:
        if settings.tuning == "ilora":
            return ILoraConfig(**vars(adapter), gate_input_size=gate_width, task_type=task)
        if settings.tuning == "lora":
            return LoraConfig(
                r=adapter.r,
                lora_alpha=cast(int, adapter.alpha),  # PEFT only divides it, so fractions work too
                lora_dropout=adapter.dropout,
                target_modules=adapter.target_modules,
                exclude_modules=adapter.exclude_modules,
                rank_pattern=adapter.rank_pattern,
                alpha_pattern=adapter.alpha_pattern,
                task_type=task,
            )
    except ValueError as error:
        raise ConfigError(f"teacher.adapter: {error}") from error
    return None


def _check_export(settings: TeacherSettings, data: RecData) -> None:
    """Raise if fewer items than ``export.top_k`` may remain for a row; without this it shows only after training."""
    left = data.n_items - (0 if settings.exclude_history is False else data.history_length)
    wanted = min(settings.export.top_k, data.n_items)
    if settings.objective == "title" and settings.export.enabled and wanted > left:
        raise ConfigError(
            f"`teacher.export.top_k` is {settings.export.top_k}, but only {left} of {data.n_items} items may remain "
            f"for one row, since its history of up to {data.history_length} items is excluded; use at most {left}, or "
            "set `teacher.exclude_history=false`."
        )


def _check_side_by_side(base: PreTrainedModel, prompts: TitlePrompts, prompt: PromptSettings) -> None:
    """Raise if titles cannot be scored side by side, before the model is trained for an epoch."""
    titles = prompts.answer_tokens()
    n_read = max(map(len, titles))  # the last token of an answer is only predicted
    check_side_by_side(
        base,
        list(dict.fromkeys(int(token) for title in titles[:64] for token in title)),
        max_tokens=prompt.max_tokens,
        longest_row=prompt.max_tokens + min(len(titles), MAX_SCORED_ROWS) * n_read,
    )


def assemble(
    llm: PreTrainedModel | PeftModel,
    prompts: PromptBuilder,
    recipe: TeacherRecipe,
    items: Mapping[str, Tensor],
    recommender: BorrowedStudent | None,
) -> LLMTeacher:
    """Put a teacher together.

    Args:
        llm: Language model with its adapter, if any.
        prompts: Turns histories into tokens.
        recipe: The teacher's settings.
        items: Tensors of ``items.safetensors``.
        recommender: The trained recommender, if the recipe reads one.
    """
    projector = None
    if recipe.hybrid and recommender is not None:
        table = cast(nn.Embedding, llm.get_input_embeddings())
        with torch.no_grad():  # the table's output, which some models scale, not its weights
            words = table(torch.arange(min(4096, table.num_embeddings), device=table.weight.device)).detach().float()
        projector = ItemProjector(recommender.read_items(), words.shape[1], float(words.square().mean().sqrt()))
    common: dict[str, Any] = {
        "pooling": recipe.pooling,
        "exclude_history": recipe.exclude_history,
        "gate_input": recipe.gate_input,
        "recommender": recommender,
        "projector": projector,
    }
    if isinstance(prompts, TitlePrompts):
        titles = TitleVectors(items["vectors"], items["mean"])
        return TitleRecommender(llm, prompts, titles, TitleSettings(**recipe.title), **common)
    scored = None if recommender is None else recommender.scored_items()
    head = build_head(recipe.head, items["vectors"], items["bias"], recipe.logit_scale, scored)
    return ItemTeacher(llm, prompts, head, **common)
