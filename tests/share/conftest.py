"""Finished students, and a Hub on localhost that this process believes in."""

import pyarrow as pa
import pytest
import torch
from hub_stand_in import TOKEN, hub_stand_in
from huggingface_hub import close_session, constants
from share_helpers import RAW_IDS, TRAINING

from llm2rec.cards import student_card
from llm2rec.core.files import write_json
from llm2rec.student.models import build_model
from llm2rec.student.store import save_student


@pytest.fixture
def believe_in(monkeypatch, tmp_path):
    """Point `huggingface_hub` to an address, as HF_ENDPOINT does to a new process: it reads its variables once."""

    def point(url, token=TOKEN):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, which is not spoken here
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        close_session()

    yield point
    close_session()


@pytest.fixture
def hub(believe_in):
    with hub_stand_in() as hub:
        believe_in(hub.url)
        yield hub


@pytest.fixture
def make_run(tmp_path):
    """Make the run folder of a student as its stage leaves it, with random weights."""

    def make(name="result_20260101_000000", kind="sasrec", seed=1, status="finished"):
        folder = tmp_path / "result" / name
        torch.manual_seed(seed)
        arguments = {"n_items": 12, "width": 8, "max_length": 5}
        items = pa.table({"raw_id": RAW_IDS, "title": [f"Thing {each}" for each in RAW_IDS]})
        card = student_card(kind, RAW_IDS[:3], 5, TRAINING, {"student": {"loss": {"name": "bce"}}})
        save_student(folder / "student", build_model(kind, **arguments), kind, arguments, items, card)
        write_json(folder / "run.json", {"stage": "student", "status": status, "seed": seed})
        return folder

    return make
