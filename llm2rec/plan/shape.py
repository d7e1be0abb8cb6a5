"""What shape a language model has: from its own configuration, or, where that is not at hand, from ours."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from llm2rec.core.errors import ConfigError
from llm2rec.teacher.llm import locate
from llm2rec.teacher.settings import LLMSettings, ShapeSettings

__all__ = ["config_of_shape", "model_config"]


def model_config(
    llm: LLMSettings, root: Path, llm_dir: Path, titles: list[str]
) -> tuple[PretrainedConfig, str | None, str]:
    """Find a model's configuration without its weights.

    Args:
        llm: Which model; its ``shape`` is read only where the model cannot be.
        root: Folder that a relative path counts from.
        llm_dir: Where tiny models are made.
        titles: Item titles, for a tiny model's tokenizer.

    Returns:
        The configuration; where the model is, None if it cannot be read; and a sentence that says which was used.

    Raises:
        ConfigError: If the model cannot be read and no shape is given.
    """
    try:
        source = locate(llm, root, llm_dir, titles)
    except ConfigError as error:
        if llm.shape is None:
            remedy = "Or say what it looks like with `llm.shape`, as conf/llm/llama2_7b.yaml does."
            raise ConfigError(f"{error} {remedy}") from error
        said = f"the shape of {llm.name} is what `llm.shape` says, since {llm.path} cannot be read here"
        return config_of_shape(llm.shape), None, said
    config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=llm.trust_remote_code)
    return config, source, f"the shape of {llm.name} is what its own configuration says"


def config_of_shape(shape: ShapeSettings) -> PretrainedConfig:
    """A configuration of the model's type with these sizes; what is not given is the type's default.

    Raises:
        ConfigError: If a size is missing or the type is not known.
    """
    given: dict[str, Any] = {name: value for name, value in asdict(shape).items() if value is not None}
    empty = [name for name, value in given.items() if value == 0 and value is not False]
    if empty:
        raise ConfigError(f"llm.shape lacks {', '.join(empty)}, expected sizes as in conf/llm/llama2_7b.yaml.")
    kind = given.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **given)
    except ValueError as error:
        raise ConfigError(
            f"llm.shape.model_type is {kind!r}, expected an architecture that transformers knows, such as llama."
        ) from error
