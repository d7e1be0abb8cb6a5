"""What other programs run says what the student says."""

import json

import numpy as np
import pytest
import torch
from pyarrow import feather

from llm2rec.core.errors import ConfigError
from llm2rec.recommend import export
from llm2rec.recommend.export import BestItems, export_student
from llm2rec.student.models import MODELS, build_model

N, L, K = 90, 6, 5


def module(name, **options):
    torch.manual_seed(0)
    return BestItems(build_model(name, n_items=N, width=16, max_length=L), K, **options)


def histories(n_rows):
    generator = torch.Generator().manual_seed(n_rows)
    lengths = torch.randint(1, L + 1, (n_rows,), generator=generator)
    items = torch.randint(N, (n_rows, L), generator=generator)
    return items.masked_fill(torch.arange(L) >= lengths.unsqueeze(1), N), lengths


def eager(module, asked):
    with torch.no_grad():
        return module(*asked)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_the_exported_graph_is_what_the_recommender_does(recommender, data, mask_seen):
    """On histories that are not cut, of which both leave out the same."""
    raw_ids, max_length = data.items["raw_id"][:], recommender.model.max_length
    items = [row["items"][:length] for row, length in zip(data.sequences, (1, 2, 3, 4, 5), strict=False)]
    padded = torch.tensor([each + [data.n_items] * (max_length - len(each)) for each in items])
    asked = padded, torch.tensor([len(each) for each in items])
    scores, found = eager(BestItems(recommender.model, 7, mask_seen), asked)
    answers = recommender.recommend([[raw_ids[i] for i in each] for each in items], 7, mask_seen=mask_seen)
    assert [[raw_ids[i] for i in row] for row in found.tolist()] == [[a.item_id for a in each] for each in answers]
    torch.testing.assert_close(scores, torch.tensor([[a.score for a in each] for each in answers]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_torch_program_answers_as_the_module(name, tmp_path):
    mine = module(name)
    export.export_program(mine, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for n_rows in (1, 2, 3, 17):
        asked = histories(n_rows)
        scores, items = program(*asked)
        expected_scores, expected_items = eager(mine, asked)
        assert torch.equal(items, expected_items)
        torch.testing.assert_close(scores, expected_scores)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_answers_as_the_module(name, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra `serve`)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `serve`)")
    mine = module(name)
    export.export_onnx(mine, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["history", "lengths"]
    for n_rows in (1, 2, 3, 17):
        history, lengths = histories(n_rows)
        scores, items = session.run(["scores", "items"], {"history": history.numpy(), "lengths": lengths.numpy()})
        expected_scores, expected_items = eager(mine, (history, lengths))
        assert np.array_equal(items, expected_items.numpy())
        np.testing.assert_allclose(scores, expected_scores.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_writes_a_folder_that_says_how_to_use_it(command, trained, recommender, data, tmp_path):
    done = command(tmp_path, "recommend", f"run={trained}", "export=served", "formats=[pt2]", "k=4")
    assert done.stderr.splitlines() == ["wrote served/model.pt2"]
    folder = tmp_path / "served"
    assert {file.name for file in folder.iterdir()} == {"model.pt2", "items.arrow", "export.json"}
    about = json.loads((folder / "export.json").read_text())
    assert (about["padding"], about["max_length"], about["k"]) == (data.n_items, 5, 4)
    names = feather.read_table(str(folder / "items.arrow")).to_pydict()
    items = data.sequences[0]["items"][:3]
    asked = torch.tensor([[*items, *[about["padding"]] * (about["max_length"] - 3)]]), torch.tensor([3])
    _, found = torch.export.load(folder / "model.pt2").module()(*asked)
    expected = recommender.recommend_one([names["raw_id"][item] for item in items], 4)
    assert [(names["raw_id"][i], names["title"][i]) for i in found[0]] == [(a.item_id, a.title) for a in expected]


def test_exports_that_cannot_be_are_refused(recommender, tmp_path):
    model, names = recommender.model, recommender.names
    with pytest.raises(ConfigError, match=r"`formats` is \['gguf'\], expected some of pt2, onnx"):
        export_student(model, names, tmp_path / "new", formats=("gguf",))
    with pytest.raises(ConfigError, match="`k` is 121, expected 1 to the 120 items"):
        export_student(model, names, tmp_path / "new", k=121)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="earlier export"):
        export_student(model, names, tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    assert not (tmp_path / "new").exists()
