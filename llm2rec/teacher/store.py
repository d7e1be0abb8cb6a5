"""Save a trained teacher, and load a finished one."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from llm2rec.core.errors import CheckpointError, DataError
from llm2rec.core.files import (
    check_hashes,
    read_object,
    replaced_folder,
    with_home,
    without_secrets,
    write_hashes,
    write_json,
)
from llm2rec.core.hub import CARD
from llm2rec.core.train.checkpoint import read_tensors, save_tensors
from llm2rec.data import RecData
from llm2rec.teacher.borrowed_student import BorrowedStudent
from llm2rec.teacher.factory import TeacherRecipe, assemble, build_prompts
from llm2rec.teacher.ilora_model import GATE_INPUTS, LLMTeacher
from llm2rec.teacher.llm import load_model, load_tokenizer, readable, weights_changed

__all__ = ["load_teacher", "save_teacher"]


def save_teacher(folder: Path, model: LLMTeacher, recipe: TeacherRecipe, card: str | None = None) -> None:
    """Save a teacher without its frozen language model.

    The folder holds ``adapter/``, a PEFT adapter (if any) with the tokenizer, which has the token of injected vectors;
    ``items.safetensors``; ``head.safetensors``, the other trained weights; ``config.json``, with home folders as ``~``;
    the trained recommender, if the teacher reads one; and ``README.md``, the ``card``, if given.
    """
    with replaced_folder(folder) as aside:
        if isinstance(model.llm, PeftModel):
            model.llm.save_pretrained(str(aside / "adapter"))
            (aside / "adapter" / CARD).unlink()  # PEFT's empty template
            file = aside / "adapter" / "adapter_config.json"
            file.write_text(without_secrets(file.read_text(encoding="utf-8")), encoding="utf-8")
        model.prompts.tokenizer.save_pretrained(str(aside / "adapter"))
        save_tensors(model.item_tensors, aside / "items.safetensors")
        save_tensors(_beside_adapter(model), aside / "head.safetensors")
        if model.recommender is not None:
            model.recommender.save(aside)
        if card is not None:
            (aside / CARD).write_text(card, encoding="utf-8")
        write_hashes(aside, editable=("config.json", CARD))  # config.json has the path of the language model
        write_json(aside / "config.json", vars(recipe) | {"source": without_secrets(recipe.source)})


def _beside_adapter(model: LLMTeacher) -> dict[str, Tensor]:
    """Trained weights outside the language model (projector and head), also of a loaded, frozen teacher."""
    return {name: each for name, each in model.named_parameters() if not name.startswith("llm.")}


def load_teacher(
    folder: Path, data: RecData, device: torch.device, *, is_foreign: bool = False
) -> tuple[LLMTeacher, TeacherRecipe]:
    """Load a finished teacher, in evaluation mode.

    Args:
        folder: Folder written by `save_teacher`.
        data: The dataset it was trained on.
        device: Device of the model.
        is_foreign: Whether the folder was downloaded: the language model's own code is then not run.

    Returns:
        The teacher and its recipe.

    Raises:
        CheckpointError: If the folder holds no complete teacher or one of another dataset, its language model is
            missing or has other weights, or a foreign teacher needs code of its own.
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
        message = f"{folder} was written by another version ({error}); load it with that version, or train again."
        raise CheckpointError(message) from error
    if is_foreign and recipe.trust_remote_code:
        raise CheckpointError(
            f"the teacher in {folder} was downloaded, and its language model {recipe.source!r} runs code of its own "
            "(`trust_remote_code` in config.json); review that code, then load the teacher from a copy of this folder."
        )
    _check_parts(folder, recipe)
    _check_origin(folder, recipe, data)
    recommender = BorrowedStudent.load(folder, device) if recipe.reads_recommender else None
    llm = recipe.llm_settings
    remedy = "Copy the folder of the teacher again, as a whole."
    with readable(CheckpointError, f"the tokenizer in {folder / 'adapter'} cannot be loaded", remedy):
        tokenizer = load_tokenizer(str(folder / "adapter"), llm)
    with readable(
        CheckpointError,
        f"the language model of {folder} cannot be loaded from {recipe.source!r}, where it was in training",
        "Put it back, or set `source` in config.json there to its new path.",
    ):
        base = load_model(recipe.source, llm, recipe.precision, device, writes=recipe.objective == "title")
    prompts = build_prompts(recipe.objective, tokenizer, data, llm.prompt, recipe.seed)
    items = read_tensors(folder / "items.safetensors")
    adapted = recipe.tuning != "none"
    with readable(CheckpointError, f"the adapter in {folder / 'adapter'} does not fit its language model", remedy):
        peft_model = PeftModel.from_pretrained(base, str(folder / "adapter")) if adapted else base
    model = assemble(peft_model, prompts, recipe, items, recommender)
    _load_beside_adapter(model, folder / "head.safetensors")
    return model.to(device).eval().requires_grad_(False), recipe


def _check_parts(folder: Path, recipe: TeacherRecipe) -> None:
    """Raise if the folder is incomplete or its gate input unknown, before the language model is loaded."""
    if recipe.gate_input not in GATE_INPUTS:
        raise CheckpointError(
            f"the gate of the teacher in {folder} reads {recipe.gate_input!r}, expected {', '.join(GATE_INPUTS)}; load "
            "it with the version that wrote it."
        )
    weights = ["adapter_model.safetensors"] if recipe.tuning != "none" else []
    parts = ["items.safetensors", "head.safetensors"]
    parts += [f"adapter/{name}" for name in ["tokenizer_config.json", *weights]]
    if missing := [part for part in parts if not (folder / part).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; copy the folder of a teacher as a whole.")


def _check_origin(folder: Path, recipe: TeacherRecipe, data: RecData) -> None:
    """Raise for another dataset, or another language model at the path of the original."""
    if recipe.fingerprint not in ("", data.fingerprint):
        raise CheckpointError(
            f"the teacher in {folder} ranks the items of a dataset with fingerprint {recipe.fingerprint[:12]}, and "
            f"{data.name} here has {data.fingerprint[:12]}; prepare that one again, with the same files and options."
        )
    if weights_changed(recipe.source, recipe.llm_weights):
        raise CheckpointError(
            f"the language model in {recipe.source} has other weights than the one that the teacher in {folder} was "
            "trained on; restore the original, or set `source` in config.json there to its path."
        )


def _load_beside_adapter(model: LLMTeacher, file: Path) -> None:
    stored = read_tensors(file)
    own = _beside_adapter(model)
    if missing := own.keys() - stored.keys():
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}; copy the folder of a teacher as a whole.")
    with torch.no_grad():
        for name, each in own.items():
            each.copy_(stored[name])
