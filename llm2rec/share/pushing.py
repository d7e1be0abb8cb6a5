"""Upload a finished student or teacher to the Hugging Face Hub."""

import logging
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2rec.core.errors import CheckpointError, DataError, HubError
from llm2rec.core.files import check_hashes, read_object, with_home, without_secrets, write_hashes, write_json
from llm2rec.core.hub import CARD, PLACE, SHARED, is_hub_name, upload
from llm2rec.recommend.recommender import finished_student, finished_teacher
from llm2rec.student.models import load_student

__all__ = ["ShareSettings", "push"]

logger = logging.getLogger("llm2rec.share")

_MANIFEST, _CONFIG, _ADAPTER = "manifest.json", "config.json", "adapter/adapter_config.json"
_PICKLED = {".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pt2", ".pth", ".whl"}


@dataclass
class ShareSettings:
    """What to upload. There is no option for a token, which would end up in logs.

    Attributes:
        run: Folder of a finished run, or of the student or teacher in it.
        repo: Hub id, ``user/name``.
        private: Whether a new repository is private.
        base_model: Hub id of a teacher's language model, if the teacher read it from a folder.
        message: Commit message.
    """

    run: str = "???"
    repo: str = "???"
    private: bool = True
    base_model: str | None = None
    message: str = "Add a model trained with llm2rec"


def push(
    folder: Path | str,
    repo: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    message: str = "Add a model trained with llm2rec",
) -> str:
    """Upload a finished student or teacher to the Hugging Face Hub, where it can be loaded by its id.

    Needs a login (``hf auth login``, or ``HF_TOKEN``). Uploads safetensors weights, JSON, text, the items' names and
    tokenizer files; a folder that holds a pickle is rejected. The model card gets the id.

    Args:
        folder: Folder of a finished run of `llm2rec.student`, `llm2rec.distill` or `llm2rec.teacher`, or the student's
            or teacher's folder in it.
        repo: Hub id, ``user/name``; created if it does not exist.
        private: Whether a new repository is private.
        base_model: Hub id of a teacher's language model, if the teacher read it from a folder.
        message: Commit message.

    Returns:
        URL of the commit.

    Raises:
        CheckpointError: If there is no finished student or teacher, files of it have changed, or one is a pickle.
        HubError: If the Hub is unreachable or rejects the upload, there is no login, or the language model has no
            Hub id.
    """
    kind, model = _model_folder(Path(folder))
    files = _shared_files(model)
    if kind == "student":
        if base_model is not None:
            raise HubError(
                f"`base_model` is {base_model!r}, but {model} holds a student, which has none; leave it out."
            )
        load_student(model)  # checks hashes, and that the weights are those of its configuration
    else:
        _check(model)
    with tempfile.TemporaryDirectory(prefix="llm2rec-share-") as name:
        staged = Path(name)
        for path, file in files.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            (staged / path).symlink_to(file.resolve())
        _rewrite(staged, kind, repo, base_model)
        shared = [each for each in staged.rglob("*") if each.is_file()]
        named = {each.relative_to(staged).as_posix(): each for each in sorted(shared)}
        return upload(named, repo, private=private, message=message)


def _model_folder(folder: Path) -> tuple[Literal["student", "teacher"], Path]:
    """The kind of model in a folder, and the model's own folder.

    Raises:
        CheckpointError: If it holds neither student nor teacher, or their run is not finished.
    """
    is_teacher_run = (folder / "teacher").is_dir()
    model = finished_teacher(folder) if is_teacher_run else finished_student(folder)
    try:
        keys = read_object(model / _CONFIG).keys()
    except DataError as error:
        raise CheckpointError(f"{model} holds no student and no teacher: {error}") from error
    if keys >= {"model", "arguments"}:
        return "student", model
    if keys >= {"source", "objective", "tuning"}:
        return "teacher", model
    raise CheckpointError(
        f"{model / _CONFIG} is that of no student and no teacher; name the folder of a finished run, or student/ or "
        "teacher/ in it."
    )


def _check(model: Path) -> None:
    try:
        check_hashes(model)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _shared_files(model: Path) -> dict[str, Path]:
    """The files of a model's folder that may be shared, by their names in it.

    Raises:
        CheckpointError: If one of any kind is a pickle, which runs code when it is read.
    """
    found, left = {}, []
    for file in sorted(model.rglob("*")):
        name = file.relative_to(model)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if _may_run_code(file):
            raise CheckpointError(
                f"{file} is a pickle, or can hold one, and would run code where it is loaded; remove it from the "
                "folder (weights belong in safetensors)."
            )
        if file.suffix in SHARED:
            found[name.as_posix()] = file
        else:
            left.append(name.as_posix())
    if left:
        logger.warning("not uploaded (only %s are): %s", " ".join(SHARED), ", ".join(left))
    return found


def _may_run_code(file: Path) -> bool:
    """Whether a file is a pickle by its name or its content, whatever it is called; torch's are archives of one."""
    if file.suffix in _PICKLED:
        return True
    with open(file, "rb") as opened:
        head = opened.read(9)
    if file.suffix == ".safetensors":
        return head[8:] != b"{"  # after the length of its header, which may be any eight bytes
    # The mark of protocols 2 and later; earlier ones are ASCII, which no reader of ours would take for JSON.
    return (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or zipfile.is_zipfile(file)


def _rewrite(staged: Path, kind: str, repo: str, base_model: str | None) -> None:
    """Remove local paths from the copies of a model's texts, and rewrite their hashes."""
    editable: tuple[str, ...] = (CARD,)
    if kind == "teacher":
        _name_language_model(staged, base_model)
        editable = (_CONFIG, CARD)
    else:
        _hide_encoders(staged)
    if (staged / CARD).is_file():
        text = without_secrets((staged / CARD).read_text(encoding="utf-8")).replace(f'"{PLACE}"', f'"{repo}"')
        _replace(staged / CARD, text if base_model is None else _adapting(text, base_model))
    (staged / _MANIFEST).unlink(missing_ok=True)
    write_hashes(staged, editable)


def _name_language_model(staged: Path, base_model: str | None) -> None:
    """Replace the source of a teacher's language model by its Hub id.

    Raises:
        HubError: If it was read from a folder and no id is given, or what is given is no id.
    """
    config: dict[str, Any] = read_object(staged / _CONFIG)
    source = base_model or config["source"]
    if not is_hub_name(source) or (base_model is None and Path(with_home(source)).is_dir()):
        raise HubError(
            f"the teacher's language model is {source!r}, which others cannot load; give its Hub id with "
            "`base_model=organisation/name`."
        )
    (staged / _CONFIG).unlink()
    write_json(staged / _CONFIG, config | {"source": source})
    if (staged / _ADAPTER).is_file():
        adapter = read_object(staged / _ADAPTER)
        (staged / _ADAPTER).unlink()
        write_json(staged / _ADAPTER, adapter | {"base_model_name_or_path": source})


def _hide_encoders(staged: Path) -> None:
    """Leave the names of the folders of a reading student's language models, without the folders' paths."""
    config: dict[str, Any] = read_object(staged / _CONFIG)
    for about in config.get("reading", {}).get("encoders", []):
        about["source"] = Path(about["source"]).name if Path(with_home(about["source"])).is_dir() else about["source"]
    if "reading" in config:
        (staged / _CONFIG).unlink()
        write_json(staged / _CONFIG, config)


def _adapting(text: str, base_model: str) -> str:
    """A card whose front matter names the base model."""
    from huggingface_hub import ModelCard  # imported here: it takes half a second

    card = ModelCard(text)
    card.data["base_model"], card.data["base_model_relation"] = base_model, "adapter"
    return str(card)


def _replace(file: Path, text: str) -> None:
    """Replace a link by a file with this text; the link's target is not changed."""
    file.unlink()
    file.write_text(text, encoding="utf-8")
