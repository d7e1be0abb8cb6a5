"""The benchmark of served blends counts what it says, and does not read the test split by accident."""

import sys

import numpy as np
import pytest
import serving_blend
import torch

from llm2rec.core.metrics import target_ranks
from llm2rec.data import CsvTables, prepare
from llm2rec.ensemble.neighbours import Neighbours, sharpened, training_sequences
from llm2rec.student.datamodule import Rows
from llm2rec.student.models import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Split by time, so that a user has several rows."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    visits = [
        (user, item, time)
        for user in range(60)
        for item, time in zip(rng.permutation(50)[:12], rng.choice(10**6, 12), strict=True)
    ]
    (folder / "visits.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"u{u},i{i},{t}\n" for u, i, t in visits)
    )
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{i},Item {i}\n" for i in range(50)))
    files = {"interactions": str(folder / "visits.csv"), "items": str(folder / "items.csv")}
    return prepare(CsvTables(**files, split="global_time", history_length=6), folder / "processed")


@pytest.fixture(scope="module")
def neighbours(data):
    return Neighbours(training_sequences(data), data.n_items)


def model_of(data, seed):
    torch.manual_seed(seed)
    return build_model("sasrec", n_items=data.n_items, width=8, max_length=6).eval()


def test_single_requests_have_the_scores_of_the_neighbours(data, neighbours):
    rows = Rows.of(data, "validation")
    batch, lookup = rows.batch(np.arange(len(rows))), serving_blend.Lookup(neighbours)
    expected = neighbours.scores(batch.history, batch.lengths)
    for row, (history, length) in enumerate(zip(batch.history.tolist(), batch.lengths.tolist(), strict=True)):
        np.testing.assert_allclose(lookup.scores(history[:length]), expected[row].numpy(), rtol=1e-5, atol=1e-7)
    assert lookup.bytes >= 8 * neighbours.n_pairs


def test_the_share_of_a_row_is_chosen_on_the_users_of_the_other_half(data, neighbours):
    models = [model_of(data, seed) for seed in (1, 2)]
    found = serving_blend.accuracy(data, models, neighbours, "validation")
    rows, values = Rows.of(data, "validation", 6), {}
    batch = rows.batch(np.arange(len(rows)))
    past = [
        set(data.sequences[int(user)]["items"][: int(place)])
        for user, place in zip(rows.users[np.arange(len(rows))], rows.positions[np.arange(len(rows))], strict=True)
    ]
    known = sharpened(neighbours.scores(batch.history, batch.lengths).double())
    for share in serving_blend.SHARES:
        of_seeds = []
        for model in models:
            with torch.no_grad():
                probs = model.score(model(*batch.inputs)).double().softmax(dim=1)
            mixture = torch.where((known > 0).any(1, keepdim=True), (1 - share) * probs + share * known, probs)
            for row, items in enumerate(past):
                mixture[row, sorted(items)] = -1.0
            ranks = target_ranks(mixture, batch.targets).numpy()
            of_seeds.append(np.where(ranks < 20, 1 / np.log2(ranks + 2), 0))
        values[share] = np.mean(of_seeds, axis=0)
    odd = rows.users[np.arange(len(rows))] % 2 == 1
    best = {
        half: max(values, key=lambda share: (values[share][mask].mean(), -share))
        for half, mask in ((1, ~odd), (0, odd))
    }
    expected = np.where(odd, values[best[1]], values[best[0]]).mean()
    assert found["rows"]["blend"]["ndcg@20"]["mean"] == pytest.approx(expected, abs=1e-12)
    for share, mean in found["validation_by_share"].items():
        assert mean == pytest.approx(values[float(share)].mean(), abs=1e-12)
    assert found["share"] == max(values, key=lambda share: (values[share].mean(), -share))
    assert len(found["rows"]["blend"]["ndcg@20"]["runs"]) == 2


def test_on_test_rows_the_share_is_that_of_validation(data, neighbours):
    models = [model_of(data, 1)]
    chosen = serving_blend.accuracy(data, models, neighbours, "validation")["share"]
    found = serving_blend.accuracy(data, models, neighbours, "test")
    assert found["share"] == chosen
    assert found["shares_of_halves"] == [chosen]
    ranks = serving_blend.ranks_of(data, models, neighbours, "test")
    expected = serving_blend.values(ranks[f"blend {chosen}"], "ndcg@20").mean()
    assert found["rows"]["blend"]["ndcg@20"]["mean"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--split", "test"], "--open-test"),
        (["--quick", "--open-test"], "--split test"),
        ([], "--raw-dir"),
        (["--interactions", __file__], "belong together"),
    ],
)
def test_commands_that_would_surprise_are_refused(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["serving_blend.py", "--json", str(tmp_path / "x.json"), *arguments])
    with pytest.raises(SystemExit):
        serving_blend.parse()
    assert message in capsys.readouterr().err
