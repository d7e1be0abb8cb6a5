"""Build a teacher for training, and load a finished one."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2rec.core.card import CARD
from llm2rec.core.errors import CheckpointError, ConfigError, DataError
from llm2rec.core.files import (
    check_hashes,
    read_object,
    replaced_folder,
    with_home,
    without_secrets,
    write_hashes,
    write_json,
)
from llm2rec.core.train.checkpoint import read_tensors, save_tensors
from llm2rec.data import RecData
from llm2rec.ilora import DEFAULT_TARGET_MODULES, ILoraConfig
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.gate_source import NoGate, gate_source_of
from llm2rec.teacher.heads import JoinedHead, build_head
from llm2rec.teacher.ilora_model import ItemTeacher, LLMTeacher, title_vectors
from llm2rec.teacher.injection import ItemProjector
from llm2rec.teacher.llm import (
    load_model,
    load_tokenizer,
    readable,
    resolve_precision,
    weights_changed,
    weights_hash,
)
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.recipe import TeacherRecipe
from llm2rec.teacher.settings import LLMSettings, PromptSettings, TeacherSettings, TitleSettings
from llm2rec.teacher.text_vectors import TitleVectors, read_titles
from llm2rec.teacher.title.likelihood import check_attention
from llm2rec.teacher.title.model import TitleRecommender

__all__ = [
    "TeacherRecipe",
    "adapter_config",
    "build_teacher",
    "load_teacher",
    "popularity_bias",
    "save_teacher",
    "with_adapter",
]


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
        source: What `llm2rec.teacher.llm.locate` returned.
        settings: The teacher's settings.
        data: The dataset; its titles become item vectors.
        targets: Training targets, shape ``(M,)``, for the popularity prior.
        device: Where to build it.
        recommender: What ``settings.recommender_run`` names, if any.
        seed: Seed of the choice among wordings.

    Returns:
        The teacher, and the recipe to store beside its weights.

    Raises:
        ConfigError: If the adapter's settings, or the length of the prompts, do not fit the model, or a trained
            recommender is needed and not given.
    """
    recipe = _recipe(llm, source, settings, data.fingerprint, device, seed)
    if recipe.reads_recommender != (recommender is not None):
        raise ConfigError(
            f"`teacher.recommender_run` is {settings.recommender_run!r} but the `recommender` given is "
            f"{recommender and recommender.name!r}; open it with `open_recommender`."
        )
    gate_source = gate_source_of(recipe.gate_input, recommender)
    config = adapter_config(settings, gate_source.width)  # checked before the model is loaded
    _check_export(settings, data)
    problem, remedy = f"llm: {source!r} cannot be loaded", "Fetch its files again, or name another model."
    with readable(ConfigError, problem, remedy):
        tokenizer = load_tokenizer(source, llm)
    prompts = PromptBuilder(tokenizer, data.items, llm.prompt, data.domain, seed)
    if recipe.objective == "title":
        prompts.check_candidates(recipe.title["n_candidates"] or None, hybrid=recipe.hybrid)
    with readable(ConfigError, problem, remedy):
        base = load_model(source, llm, recipe.precision, device, writes=recipe.objective == "title")
    _check_positions(base, llm.prompt)
    if recipe.objective == "title":
        _check_side_by_side(base, llm.prompt)
    bias = popularity_bias(targets, data.n_items, settings.popularity_prior)
    items = _read_items(base, prompts, recipe, bias, device)
    model = base if config is None else with_adapter(base, config)
    if settings.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    teacher = _assemble(model, prompts, recipe, items, recommender)
    if isinstance(teacher, ItemTeacher):
        if settings.item_refresh_steps:
            teacher.head.keep_titles()
        if isinstance(teacher.head, JoinedHead):
            teacher.head.residual_dropout = settings.residual_dropout
    return teacher.to(device), recipe


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
        exclude_history=settings.exclude_history,
        head=settings.head,
        gate_input=settings.gate_input if settings.tuning == "ilora" else NoGate.name,
        hybrid=settings.prompts == "hybrid",
        title=vars(settings.title).copy(),
        fingerprint=fingerprint,
        llm_weights=weights_hash(source),
    )


def with_adapter(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The language model with a fresh adapter; ``config`` is what `adapter_config` made.

    Raises:
        ConfigError: If the model has no such layers, or they are not linear.
    """
    if isinstance(config, LoraConfig) and config.target_modules is None:  # the layers that iLoRA takes
        config.target_modules = DEFAULT_TARGET_MODULES.get(base.config.model_type)
    try:
        return cast(PeftModel, get_peft_model(base, config))
    except (ValueError, TypeError) as error:  # no such layer, or one that is not linear
        raise ConfigError(f"teacher.adapter: {error}") from error


def _read_items(
    base: PreTrainedModel, prompts: PromptBuilder, recipe: TeacherRecipe, bias: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """What ``items.safetensors`` will hold, from a language model that has no adapter yet."""
    if recipe.objective == "title":
        return read_titles(base.base_model, prompts, recipe.pooling, device)._asdict()
    return {"vectors": title_vectors(base.base_model, prompts, recipe.pooling, device), "bias": bias}


def adapter_config(settings: TeacherSettings, gate_width: int | None) -> PeftConfig | None:
    """The adapter's configuration; None for a language model that stays as it is.

    Args:
        settings: The teacher's settings.
        gate_width: Width of the gate's input; None for that of the language model.

    Raises:
        ConfigError: If the adapter's settings cannot work.
    """
    adapter = settings.adapter
    task = TaskType.FEATURE_EXTRACTION if settings.objective == "item" else TaskType.CAUSAL_LM
    try:
        if settings.tuning == "ilora":
            return ILoraConfig(**vars(adapter), gate_input_size=gate_width, task_type=task)
        if settings.tuning == "lora":
            return LoraConfig(
                r=adapter.r,
                lora_alpha=cast(int, adapter.alpha),  # PEFT only divides it, so fractions do as well
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
    """Refuse to find more titles than a row may leave, which would show after training only."""
    left = data.n_items - (data.history_length if settings.exclude_history else 0)
    wanted = min(settings.export.top_k, data.n_items)
    if settings.objective == "title" and settings.export.enabled and wanted > left:
        raise ConfigError(
            f"`teacher.export.top_k` is {settings.export.top_k}, but a row may leave {left} of the catalogue's "
            f"{data.n_items} items, {data.history_length} being in its history; lower it to {left} or less, or set "
            "`teacher.exclude_history=false`."
        )


def _check_positions(base: PreTrainedModel, prompt: PromptSettings) -> None:
    """Refuse prompts longer than the model's table of positions, whose look-up would fail in the middle of a run."""
    config = base.config.get_text_config()
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is not None and prompt.max_tokens > n_positions:
        raise ConfigError(
            f"`llm.prompt.max_tokens` is {prompt.max_tokens} but the model has {n_positions} positions; lower it to "
            f"{n_positions} or less."
        )


def _check_side_by_side(base: PreTrainedModel, prompt: PromptSettings) -> None:
    """Refuse models in which titles cannot be scored side by side, before one is trained for an epoch."""
    check_attention(base)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ConfigError(
            f"`teacher.objective=title` needs a model whose positions can be given, and {type(base).__name__} takes no "
            "`position_ids`; take another decoder, such as `llm=llama2_7b`."
        )
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and prompt.max_tokens > window:
        raise ConfigError(
            f"`llm.prompt.max_tokens` is {prompt.max_tokens} but layers of the model see {window} tokens, and titles "
            f"are scored after whole prompts; lower it to {window} or less."
        )


def _assemble(
    llm: PreTrainedModel | PeftModel,
    prompts: PromptBuilder,
    recipe: TeacherRecipe,
    items: Mapping[str, Tensor],
    recommender: BorrowedStudent | None,
) -> LLMTeacher:
    projector = None
    if recipe.hybrid and recommender is not None:
        table = cast(nn.Embedding, llm.get_input_embeddings())
        with torch.no_grad():  # what the table gives, which some models scale, not what it holds
            words = table(torch.arange(min(4096, table.num_embeddings), device=table.weight.device)).detach().float()
        projector = ItemProjector(recommender.read_items(), words.shape[1], float(words.square().mean().sqrt()))
    shared: dict[str, Any] = {
        "pooling": recipe.pooling,
        "exclude_history": recipe.exclude_history,
        "gate_source": gate_source_of(recipe.gate_input, recommender),
        "recommender": recommender,
        "projector": projector,
    }
    if recipe.objective == "title":
        titles = TitleVectors(items["vectors"], items["mean"])
        return TitleRecommender(llm, prompts, titles, TitleSettings(**recipe.title), **shared)
    scored = None if recommender is None else recommender.scored_items()
    head = build_head(recipe.head, items["vectors"], items["bias"], recipe.logit_scale, scored)
    return ItemTeacher(llm, prompts, head=head, **shared)


def save_teacher(folder: Path, model: LLMTeacher, recipe: TeacherRecipe, card: str | None = None) -> None:
    """Write all that belongs to a teacher besides the frozen language model.

    ``adapter/``, a PEFT folder (where there is an adapter), with the tokenizer, which knows the slots of injected
    vectors; ``items.safetensors``; ``head.safetensors``, what else was trained; ``config.json``, homes as ``~``;
    the trained recommender, where one is read; and ``README.md``, the ``card``, if it is given.
    """
    with replaced_folder(folder) as aside:
        if isinstance(model.llm, PeftModel):
            model.llm.save_pretrained(str(aside / "adapter"))
            (aside / "adapter" / CARD).unlink()  # PEFT's form, with nothing filled in
            file = aside / "adapter" / "adapter_config.json"
            file.write_text(without_secrets(file.read_text(encoding="utf-8")), encoding="utf-8")
        model.prompts.tokenizer.save_pretrained(str(aside / "adapter"))
        save_tensors(model.item_tensors, aside / "items.safetensors")
        save_tensors(_beside_adapter(model), aside / "head.safetensors")
        if model.recommender is not None:
            model.recommender.save(aside)
        if card is not None:
            (aside / CARD).write_text(card, encoding="utf-8")
        write_hashes(aside, editable=("config.json", CARD))  # the first names the place of the language model
        write_json(aside / "config.json", vars(recipe) | {"source": without_secrets(recipe.source)})


def _beside_adapter(model: LLMTeacher) -> dict[str, Tensor]:
    """What is trained besides the language model, projector and head; also of a loaded teacher, which is frozen."""
    return {name: each for name, each in model.named_parameters() if not name.startswith("llm.")}


def load_teacher(
    folder: Path, data: RecData, device: torch.device, *, is_foreign: bool = False
) -> tuple[LLMTeacher, TeacherRecipe]:
    """Load a finished teacher, in evaluation mode.

    Args:
        folder: What `save_teacher` wrote.
        data: The dataset it was trained on.
        device: Where to load it.
        is_foreign: Whether somebody else may have written it: it then runs no code that its language model brings.

    Returns:
        The teacher, and the recipe it was put together by.

    Raises:
        CheckpointError: If the folder holds no teacher, or a part of one, or one of another dataset, or its language
            model is no longer where it was, or has other weights, or a foreign one would run code of its own.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no teacher (no config.json); name the folder of a finished teacher run.")
    try:
        check_hashes(folder)
        stored = read_object(folder / "config.json", "source")
        recipe = TeacherRecipe(**stored | {"source": with_home(stored["source"])})
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except TypeError as error:
        told = f"{folder} was written by another version ({error}); load it with that one, or train the teacher again."
        raise CheckpointError(told) from error
    if is_foreign and recipe.trust_remote_code:
        raise CheckpointError(
            f"the teacher in {folder} was fetched, and its language model {recipe.source!r} runs code of its own "
            "(`trust_remote_code` in config.json); look at that code, then load the teacher from a copy of this folder."
        )
    _check_parts(folder, recipe)
    _check_what_it_was_trained_on(folder, recipe, data)
    recommender = BorrowedStudent.load(folder, device) if recipe.reads_recommender else None
    llm = recipe.llm_settings
    remedy = "Copy the folder of the teacher again, as a whole."
    with readable(CheckpointError, f"the tokenizer in {folder / 'adapter'} cannot be loaded", remedy):
        tokenizer = load_tokenizer(str(folder / "adapter"), llm)
    with readable(
        CheckpointError,
        f"the language model of {folder} cannot be loaded from {recipe.source!r}, where it was in training",
        "Put it back, or write its new place into `source` of config.json there.",
    ):
        base = load_model(recipe.source, llm, recipe.precision, device, writes=recipe.objective == "title")
    prompts = PromptBuilder(tokenizer, data.items, llm.prompt, data.domain, recipe.seed)
    items = read_tensors(folder / "items.safetensors")
    adapted = recipe.tuning != "none"
    with readable(CheckpointError, f"the adapter in {folder / 'adapter'} does not fit its language model", remedy):
        peft_model = PeftModel.from_pretrained(base, str(folder / "adapter")) if adapted else base
    model = _assemble(peft_model, prompts, recipe, items, recommender)
    _load_beside_adapter(model, folder / "head.safetensors")
    return model.to(device).eval().requires_grad_(False), recipe


def _check_parts(folder: Path, recipe: TeacherRecipe) -> None:
    """Refuse a folder that was not copied as a whole, before the language model is loaded."""
    weights = ["adapter_model.safetensors"] if recipe.tuning != "none" else []
    parts = ["items.safetensors", "head.safetensors"]
    parts += [f"adapter/{name}" for name in ["tokenizer_config.json", *weights]]
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; copy the folder of a teacher as a whole.")


def _check_what_it_was_trained_on(folder: Path, recipe: TeacherRecipe, data: RecData) -> None:
    """Refuse another dataset, or another language model in the place of its own."""
    if recipe.fingerprint not in ("", data.fingerprint):
        raise CheckpointError(
            f"the teacher in {folder} ranks the items of a dataset with fingerprint {recipe.fingerprint[:12]}, and "
            f"{data.name} here has {data.fingerprint[:12]}; prepare that one again, with the same files and options."
        )
    if weights_changed(recipe.source, recipe.llm_weights):
        raise CheckpointError(
            f"the language model in {recipe.source} has other weights than the one that the teacher in {folder} was "
            "trained on; put that one back, or write its place into `source` of config.json there."
        )


def _load_beside_adapter(model: LLMTeacher, file: Path) -> None:
    stored = read_tensors(file)
    own = _beside_adapter(model)
    if missing := own.keys() - stored.keys():
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}; copy the folder of a teacher as a whole.")
    with torch.no_grad():
        for name, each in own.items():
            each.copy_(stored[name])
