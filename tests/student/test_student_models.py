import pytest
import torch

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.student.items import FusedItemTable, ItemTable
from llm2rec.student.losses import cross_entropy
from llm2rec.student.models import MODELS, build_model, load_student
from llm2rec.student.store import save_student

N, L, D = 11, 6, 8
BUILD = {"sasrec": {"n_blocks": 2, "n_heads": 2}, "gru4rec": {"hidden_width": 12, "n_layers": 2}}
BUILD |= {"caser": {"n_horizontal": 3, "n_vertical": 2}}
LENGTHS = torch.tensor([1, 3, 6, 4])

pytestmark = pytest.mark.filterwarnings("error")


def built(name, *, seed=0, **changes):
    torch.manual_seed(seed)
    model = build_model(name, **{"n_items": N, "width": D, "max_length": L, "dropout": 0.2, **BUILD[name], **changes})
    with torch.no_grad():  # away from the small initial values, so that differences show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for table in {model.input_items, model.output_items}:
            table.weight[N] = 0
    return model.eval()


def histories(seed=0, length=L):
    torch.manual_seed(seed)
    items = torch.randint(0, N, (len(LENGTHS), length))
    return items.masked_fill(torch.arange(length) >= LENGTHS.unsqueeze(1), N)


def test_every_model_is_tested():
    assert BUILD.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_shapes(self, name):
        model = built(name)
        users = model(histories(), LENGTHS)
        assert users.shape == (4, D)
        assert model.score(users).shape == (4, N)  # padding is never scored

    def test_padding_is_never_read(self, name):
        model, history = built(name), histories()
        junk = history.masked_fill(history == N, 5)
        torch.testing.assert_close(model(junk, LENGTHS), model(history, LENGTHS))

    def test_longer_padding_changes_nothing(self, name):
        model, lengths = built(name), torch.tensor([1, 3, 2, 3])
        short = histories()[:, :3]
        longer = torch.cat([short, torch.full((4, 3), N)], dim=1)
        torch.testing.assert_close(model(longer, lengths), model(short, lengths))

    def test_rows_are_independent_and_a_batch_of_one_works(self, name):
        model, history = built(name), histories()
        together = model(history, LENGTHS)
        alone = torch.cat([model(history[i : i + 1], LENGTHS[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(alone, together)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(model(history[order], LENGTHS[order]), together[order])

    def test_every_item_of_the_history_has_an_effect(self, name):
        model, history = built(name), histories()
        before = model(history, LENGTHS)
        for position in range(L):
            changed = history.clone()
            changed[2, position] = (changed[2, position] + 1) % N
            after = model(changed, LENGTHS)
            assert not torch.allclose(after[2], before[2], atol=1e-6)
            torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]])

    def test_order_has_an_effect(self, name):
        model, history = built(name), torch.tensor([[1, 2, 3, 4, 5, 6]])
        swapped = torch.tensor([[2, 1, 3, 4, 5, 6]])
        six = torch.tensor([6])
        assert not torch.allclose(model(history, six), model(swapped, six), atol=1e-6)

    def test_scores_are_inner_products_with_the_output_items(self, name):
        model = built(name, tie_items=False)
        users = torch.randn(3, D)
        expected = torch.stack([(model.output_items.weight[item] * users).sum(dim=1) for item in range(N)], dim=1)
        torch.testing.assert_close(model.score(users), expected)

    @pytest.mark.parametrize("tie_items", [True, False])
    def test_tied_tables_are_one(self, name, tie_items):
        model = built(name, tie_items=tie_items)
        assert (model.output_items is model.input_items) == tie_items
        names = [key for key, _ in model.named_parameters() if "items" in key]
        assert names == ["input_items.weight", "output_items.weight"][: 1 if tie_items else 2]

    def test_dropout_is_active_in_training_only(self, name):
        model, history = built(name), histories()
        assert torch.equal(model(history, LENGTHS), model(history, LENGTHS))
        model.train()
        assert not torch.equal(model(history, LENGTHS), model(history, LENGTHS))

    def test_padding_gets_no_gradient_and_every_parameter_one(self, name):
        model, history = built(name).train(), histories()
        cross_entropy(model.score(model(history, LENGTHS)), torch.tensor([0, 1, 2, 3])).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert model.input_items.weight.grad[N].abs().sum() == 0

    @pytest.mark.parametrize("tie_items", [True, False])
    @pytest.mark.parametrize("fused", [True, False])
    def test_saved_student_scores_like_the_trained_one(self, name, tie_items, fused, tmp_path):
        model = built(name, tie_items=tie_items)
        if fused:
            model.input_items = fused_table()
            model.output_items = model.input_items if tie_items else fused_table(seed=1)
        arguments = {"n_items": N, "width": D, "max_length": L, "dropout": 0.2, "tie_items": tie_items, **BUILD[name]}
        save_student(tmp_path / "student", model, name, arguments)
        served = load_student(tmp_path / "student")
        assert not served.training
        assert type(served.input_items) is ItemTable
        assert served.input_items.weight.shape == (N + 1, D)
        history = histories()
        ours, theirs = served.score(served(history, LENGTHS)), model.score(model(history, LENGTHS))
        if fused:
            torch.testing.assert_close(ours, theirs)  # the served table adds before it is looked up
        else:
            assert torch.equal(ours, theirs)
        assert sum(p.numel() for p in served.parameters()) == sum(v.numel() for v in model.weights_to_serve().values())

    @pytest.mark.parametrize("dropout", [-0.1, 1.0])
    def test_dropout_out_of_range_raises(self, name, dropout):
        with pytest.raises(ConfigError, match=rf"`dropout` is {dropout}, expected 0 to below 1"):
            built(name, dropout=dropout)


def fused_table(seed=0, width=5, scale=0.7):
    torch.manual_seed(seed)
    return FusedItemTable(torch.randn(N, width), D, scale)


def test_fused_vector_is_offset_plus_scaled_projection():
    table = fused_table()
    ids = torch.tensor([[0, 7, N], [7, 7, 1]])  # repeated, and in no order
    by_hand = table.weight[ids] + 0.7 * (table.teacher_vectors[ids] @ table.projection.weight.T)
    torch.testing.assert_close(table(ids), by_hand)
    torch.testing.assert_close(table.vectors(), table(torch.arange(N)[None])[0])
    assert table.projection.bias is None
    assert "teacher_vectors" not in table.state_dict()
    upstream = torch.randn(2, 3, D)
    expected = torch.autograd.grad(by_hand, [table.weight, table.projection.weight], upstream)
    expected[0][N] = 0  # padding learns nothing
    table(ids).backward(upstream)
    torch.testing.assert_close([table.weight.grad, table.projection.weight.grad], list(expected))


def test_padding_of_a_fused_table_stays_zero_through_training():
    table = fused_table()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    before = table.teacher_vectors.clone()
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([[1, 2, N]])).square().sum().backward()
        optimizer.step()
    assert table(torch.tensor([[N]])).abs().sum() == 0
    assert torch.equal(table.teacher_vectors, before)


@pytest.mark.parametrize("training", [True, False])
def test_last_position_of_a_block_equals_the_full_pass(training):
    model = built("sasrec", dropout=0.0).train(training)
    block, x = model.last_block, torch.randn(4, L, D)
    torch.testing.assert_close(block.last(x, LENGTHS), block(x)[torch.arange(4), LENGTHS - 1])


def test_block_is_causal():
    block, x = built("sasrec").blocks[0], torch.randn(2, L, D)
    before = block(x)
    x = x.clone()
    x[:, 4] = torch.randn(2, D)
    after = block(x)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().amax(dim=2).min() > 1e-4


def test_recency_based_positions():
    """Histories with the same end agree if attention has no other reason to differ."""
    model = built("sasrec")
    ages = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: ages.append(inputs[0]))
    model(torch.tensor([[3, 4, N]]), torch.tensor([2]))
    model(torch.tensor([[9, 3, 4]]), torch.tensor([3]))
    torch.testing.assert_close(ages[0][0, :2], ages[1][0, 1:])


def test_positions_from_the_oldest_item():
    """Histories with the same beginning agree up to the first difference."""
    model = built("sasrec", positions="oldest")
    read = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(torch.tensor([[3, 4, N]]), torch.tensor([2]))
    model(torch.tensor([[3, 4, 9]]), torch.tensor([3]))
    torch.testing.assert_close(read[0][0, :2], read[1][0, :2])
    torch.testing.assert_close(read[0][0, :2], model.input_items(torch.tensor([3, 4])) + model.positions[:2])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_at_the_last_item_equals_the_default(name, training):
    changes = {"positions": "oldest"} if name == "sasrec" else {}
    model, history = built(name, dropout=0.0, **changes).train(training), histories()
    places = torch.arange(4) * L + LENGTHS - 1
    torch.testing.assert_close(model(history, LENGTHS, places[[2, 0]]), model(history, LENGTHS)[[2, 0]])


def caser_by_loops(model, items):
    """Caser for one history, a list of ids, as loops over the formulas of the paper."""
    table = model.input_items.weight.tolist()
    vectors = [table[item] for item in items[-model.max_length :]]
    found = []
    for layer in model.horizontal:
        (height,), weights = layer.kernel_size, layer.weight.tolist()  # (filters, D, height)
        read = [[0.0] * D] * (height - len(vectors)) + vectors  # a filter higher than the history
        for filter_, bias in zip(weights, layer.bias.tolist(), strict=True):
            answers = [
                sum(filter_[d][row] * read[start + row][d] for row in range(height) for d in range(D)) + bias
                for start in range(len(read) - height + 1)
            ]
            found.append(max(0.0, *answers))
    latest = vectors[::-1]
    for d in range(D):  # per width, as `out` has its columns
        for filter_ in model.vertical.weight.tolist():
            found.append(sum(filter_[-1 - age] * vector[d] for age, vector in enumerate(latest)))
    rows = zip(model.out.weight.tolist(), model.out.bias.tolist(), strict=True)
    return torch.tensor([sum(w * f for w, f in zip(row, found, strict=True)) + bias for row, bias in rows])


@pytest.mark.parametrize("heights", [None, [2, 3, 4], [6]])
def test_caser_equals_loops(heights):
    model, history = built("caser", heights=heights), histories()
    expected = [caser_by_loops(model, row[:n].tolist()) for row, n in zip(history, LENGTHS, strict=True)]
    torch.testing.assert_close(model(history, LENGTHS), torch.stack(expected))


def caser_by_hand(**weights):
    """Caser with vectors of width 2 for items 0, 1, 2 and all weights 0 but those given."""
    model = build_model("caser", n_items=3, width=2, max_length=3, n_horizontal=1, n_vertical=1, heights=[2]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.input_items.weight[:3] = torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 4.0]])
        for name, values in weights.items():
            model.get_parameter(name.replace("_", ".")).copy_(torch.tensor(values))
    return model


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([0, 1, 2], 6.5),  # windows (0, 1): 1 - (-1) + 0.5 = 2.5 and (1, 2): 3 - 4 + 0.5 < 0; then 2.5 + 4
        ([1, 0], 5.5),  # one window: 3 - 2 + 0.5 = 1.5
        ([0], 4.0),  # behind a vector of zeros: 0 - 2 + 0.5 < 0
        ([1], 5.5),  # behind a vector of zeros: 0 + 1 + 0.5 = 1.5
        ([2, 2, 0, 1], 6.5),  # the last three: (2, 0): -2 - 2 + 0.5 < 0 and (0, 1): 2.5
    ],
)
def test_horizontal_filters_by_hand(history, expected):
    """The filter takes the first number of the older item and subtracts the second number of the newer."""
    weights = {"horizontal_0_weight": [[[1.0, 0.0], [0.0, -1.0]]], "horizontal_0_bias": [0.5]}
    model = caser_by_hand(**weights, out_weight=[[1.0, 0, 0], [0, 0, 0]], out_bias=[4.0, 7.0])
    answer = model(torch.tensor([history]), torch.tensor([len(history)]))
    torch.testing.assert_close(answer, torch.tensor([[expected, 7.0]]))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([0, 1, 2], [1 + 30 - 200, 2 - 10 + 400]),
        ([0, 1], [10 + 300, 20 - 100]),
        ([2], [-200, 400]),
        ([2, 0, 1, 2], [1 + 30 - 200, 2 - 10 + 400]),  # the last three
    ],
)
def test_vertical_filters_by_hand(history, expected):
    """The filter weighs the most recent item 100, the one before it 10, and the third 1."""
    model = caser_by_hand(vertical_weight=[[1.0, 10.0, 100.0]], out_weight=[[0, 1.0, 0], [0, 0, 1.0]])
    answer = model(torch.tensor([history]), torch.tensor([len(history)]))
    torch.testing.assert_close(answer, torch.tensor([expected]).float())


def test_caser_of_a_short_history_equals_a_shorter_caser():
    long, short = built("caser", heights=[1, 2, 3]), built("caser", heights=[1, 2, 3], max_length=3)
    short.load_state_dict({**long.state_dict(), "vertical.weight": long.vertical.weight[:, -3:]})
    lengths = torch.tensor([1, 3, 2, 3])
    torch.testing.assert_close(long(histories(), lengths), short(histories()[:, :3], lengths))


def test_caser_truncates_long_histories_to_the_most_recent_items():
    model, history = built("caser"), torch.randint(0, N, (2, L + 3))
    lengths = torch.tensor([L + 3, L + 1])
    recent = torch.stack([row[n - L : n] for row, n in zip(history, lengths, strict=True)])
    assert torch.equal(model(history, lengths), model(recent, torch.tensor([L, L])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_horizontal": 0}, "`n_horizontal` is 0, expected at least 1"),
        ({"n_vertical": 0}, "`n_vertical` is 0, expected at least 1"),
        ({"heights": []}, r"`heights` is \[\]"),
        ({"heights": [0, 1]}, r"`heights` is \[0, 1\], expected different heights from 1 to `max_length`, which is 5"),
        ({"heights": [2, 6]}, r"`heights` is \[2, 6\]"),
        ({"heights": [2, 2]}, r"`heights` is \[2, 2\]"),
    ],
)
def test_invalid_caser_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_model("caser", n_items=N, max_length=5, **settings)


@pytest.mark.parametrize("settings", [{"n_heads": 3}, {"n_blocks": 0}])
def test_invalid_sasrec_settings_raise(settings):
    with pytest.raises(ConfigError, match="`n_blocks` >= 1 and `n_heads` that divide `width`"):
        build_model("sasrec", n_items=N, **settings)


def test_unknown_student_raises():
    with pytest.raises(ConfigError, match="unknown student 'bert'; expected one of sasrec, gru4rec, caser"):
        build_model("bert", n_items=N)


def test_folder_without_a_student_raises(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no student.*pass the folder of a finished student run"):
        load_student(tmp_path)


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 3.0, -torch.inf, -torch.inf]]).requires_grad_()
    losses = cross_entropy(logits, torch.tensor([2, 1]))
    torch.testing.assert_close(losses, torch.tensor([4.0, 1 + torch.tensor(-3.0).exp().item()]).log())
    losses[0].backward()
    torch.testing.assert_close(logits.grad[0], torch.tensor([0.25, 0.25, -0.75, 0.25]))


def test_cross_entropy_stays_finite_and_in_float32():
    losses = cross_entropy(torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=torch.bfloat16), torch.tensor([0, 0]))
    assert losses.dtype == torch.float32
    assert losses[0] == 0
    assert losses[1] == pytest.approx(2e4, rel=1e-2)
