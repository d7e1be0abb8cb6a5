"""Texts become vectors: as titles do in a teacher, one by one, again after a restart, and from disk."""

import shutil

import numpy as np
import pytest
import torch
from teacher_helpers import CPU, ODD_TITLES, build, llm_of

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.core.logging import Progress
from llm2rec.core.vectors import standardised
from llm2rec.teacher import text_encoder
from llm2rec.teacher.settings import LLMSettings, PromptSettings
from llm2rec.teacher.text_encoder import TextEncoder, cached_vectors

KINDS = ("llama", "bert")


def encoder_of(kind, llm_folder, data, **prompt):
    settings, source = llm_of(kind, llm_folder, data, **prompt)
    return TextEncoder.load(settings, CPU, source=source)


@pytest.mark.parametrize("kind", KINDS)
def test_titles_are_read_as_by_a_teacher(data, llm_folder, kind):
    teacher, _ = build(kind, llm_folder, data, tuning="none")
    raw = encoder_of(kind, llm_folder, data).encode(data.titles)
    torch.testing.assert_close(standardised(raw), teacher.item_vectors, rtol=1e-4, atol=1e-5)
    assert raw.dtype == torch.float32
    assert raw.mean(dim=0).abs().max() > 1e-3, "not centred"
    assert (raw.norm(dim=1) - 1).abs().max() > 1e-3, "not scaled"


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_depends_on_its_text_alone(data, llm_folder, kind):
    encoder = encoder_of(kind, llm_folder, data)
    texts = [*ODD_TITLES, "", "</s>", "[MASK]", "<|item|>"]
    together = encoder.encode(texts, batch_tokens=300)
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(together).all()
    assert encoder.encode([]).shape == (0, together.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut(data, llm_folder, kind):
    encoder = encoder_of(kind, llm_folder, data, max_tokens=24)
    first, second = encoder.encode(["word " * 100 + "one end", "word " * 100 + "another end"])
    assert torch.equal(first, second)
    short = encoder_of(kind, llm_folder, data, max_title_tokens=8)
    first, second = short.encode(["word " * 9 + "one end", "word " * 9 + "another end"])
    assert torch.equal(first, second)


def test_progress_is_counted(data, llm_folder):
    with Progress("texts", 3, "text", shown=False) as progress:
        encoder_of("llama", llm_folder, data).encode(["a", "b", "c"], progress)
        assert progress._done == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_loaded_from_its_record(data, llm_folder, tmp_path, kind):
    settings, source = llm_of(kind, llm_folder, data)
    source = str(shutil.copytree(source, tmp_path / "llm"))
    encoder = TextEncoder.load(settings, CPU, source=source)
    about = encoder.about()
    again = TextEncoder.from_about(about, CPU)
    assert torch.equal(again.encode(ODD_TITLES), encoder.encode(ODD_TITLES))
    assert again.about() == about
    with pytest.raises(CheckpointError, match="runs code of its own"):
        TextEncoder.from_about(about | {"trust_remote_code": True}, CPU)
    with pytest.raises(CheckpointError, match="damaged"):
        TextEncoder.from_about({key: about[key] for key in ("name", "source")}, CPU)
    weights = tmp_path / "llm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(CheckpointError, match="is not the one that encoded"):
        TextEncoder.from_about(about, CPU)


def test_a_model_that_cannot_read_such_texts_is_refused(data, llm_folder, tmp_path):
    settings, source = llm_of("bert", llm_folder, data, max_tokens=129)
    with pytest.raises(ConfigError, match="max_tokens` is 129 but the model has 128 positions"):
        TextEncoder.load(settings, CPU, source=source)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        TextEncoder.load(LLMSettings("x", str(tmp_path), prompt=PromptSettings()), CPU)


def test_vectors_are_kept_on_disk(data, llm_folder, engine, tmp_path, monkeypatch):
    settings, source = llm_of("llama", llm_folder, data)
    whole = TextEncoder.load(settings, CPU, source=source).encode(data.titles)
    vectors, about = cached_vectors(data.titles, settings, source, tmp_path, engine, block_rows=20)
    torch.testing.assert_close(vectors, whole, rtol=1e-4, atol=1e-5)
    assert about == TextEncoder.load(settings, CPU, source=source).about()
    (folder,) = tmp_path.glob("*/block_000000.npy")
    assert len(list(folder.parent.iterdir())) == -(-data.n_items // 20)

    (folder.parent / "block_000001.npy").unlink()  # a killed run
    assert torch.equal(cached_vectors(data.titles, settings, source, tmp_path, engine, block_rows=20)[0], vectors)

    monkeypatch.setattr(text_encoder, "load_model", None)  # nothing is loaded
    assert torch.equal(cached_vectors(data.titles, settings, source, tmp_path, engine, block_rows=20)[0], vectors)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        cached_vectors([*data.titles[:-1], "another"], settings, source, tmp_path, engine, block_rows=20)
    np.save(folder, np.zeros_like(np.load(folder)))
    assert not cached_vectors(data.titles, settings, source, tmp_path, engine, block_rows=20)[0][:20].any()
