"""Every kind of gate trains through the configuration; balance and health are what they say, however a step is cut."""

import dataclasses
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from engine_helpers import Killed, assert_same_weights, engine_in, killed_at, written
from teacher_helpers import CPU, build, configured, fit, llm_of, randomise, split, teacher_rows

from llm2rec.core.errors import ConfigError
from llm2rec.core.seed import seed_everything
from llm2rec.core.train.batching import OptimizerStep
from llm2rec.core.train.checkpoint import trainable_weights
from llm2rec.core.train.engine import Engine
from llm2rec.ilora import Gate, GateCollapseWarning, ILoraConfig, balance_loss, gate_health
from llm2rec.ilora.gate import GATES
from llm2rec.teacher.factory import build_teacher
from llm2rec.teacher.gate_cache import GateCache
from llm2rec.teacher.gates import GateMonitor, balance_losses, mean_gates
from llm2rec.teacher.settings import AdapterSettings
from llm2rec.teacher.store import load_teacher, save_teacher

KINDS = tuple(GATES)
TRAINING = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 1.0}


@pytest.fixture(autouse=True)
def _fresh_processes(fresh_processes):
    return fresh_processes


def rows_of(model, data, name="train", n_rows=32):
    rows = split(data, name)
    return teacher_rows(model, rows, np.arange(min(n_rows, len(rows))))


def train(model, data, folder, *, kind=Engine, n_rows=32, ratio=1.0, balance=0.0, **changes):
    engine = engine_in(folder, kind=kind, **{**TRAINING, **changes})
    rows = rows_of(model, data, n_rows=n_rows), rows_of(model, data, "validation")
    return fit(model, *rows, engine, gate_learning_rate_ratio=ratio, balance_loss=balance)


def history(folder):
    return written(folder, "validation")["history"]


def trained_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- the configuration -----------------------------------------------------------------------------------------------


def built_from(settings, data, llm_folder):
    llm, source = llm_of("llama", llm_folder, data)
    seed_everything(3)
    return build_teacher(llm, source, settings, data, split(data).targets.numpy(), CPU)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gate_kind_trains_through_the_configuration(kind, per_layer, data, llm_folder, tmp_path):
    settings = configured(
        f"teacher.adapter.gate={kind}", f"teacher.adapter.gate_per_layer={per_layer}", "teacher.adapter.dropout=0"
    )
    model, recipe = built_from(settings, data, llm_folder)
    before, vectors = trained_of(model), model.item_vectors.clone()
    train(model, data, tmp_path / "run", ratio=2.0, balance=0.1)
    after = trained_of(model)
    unmoved = {name for name in before if torch.equal(before[name], after[name])}
    # The released program keeps one expert, whose gate is 1 whatever the logits: nothing to learn from.
    gates = {name for name in before if ".ilora_gate." in name}
    assert unmoved == (gates if kind == "topk_released" else set())
    assert len(gates) >= (14 if per_layer else 1)
    assert torch.equal(model.item_vectors, vectors)

    save_teacher(tmp_path / "teacher", model, recipe)
    again, _ = load_teacher(tmp_path / "teacher", data, CPU)
    rows = split(data, "validation")
    asked = rows.histories()
    assert torch.equal(again.log_probs(*asked), model.log_probs(*asked))


def test_settings_of_the_adapter_are_fields_of_its_configuration(data, llm_folder):
    """`AdapterSettings` repeats names and defaults, and only the default of dropout differs."""
    settings, config = AdapterSettings(dropout=0.0), ILoraConfig(target_modules=["q_proj"])
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, value in vars(settings).items():
        assert name in defaults
        if not isinstance(value, dict):
            assert value == defaults[name], name
    chosen = {
        "alpha": 7,
        "scaling": "per_expert",
        "target_modules": r"layers\.1\..*\.[qvo]_proj",
        "exclude_modules": ["o_proj"],
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"v_proj": 3.0},
        "gate": "mlp",
        "gate_per_layer": True,
        "gate_temperature": 2.0,
        "gate_hidden_size": 5,
    }
    model, _ = build("llama", llm_folder, data, adapter=chosen)
    tuner = model.tuner
    config = tuner.peft_config["default"]
    layers = tuner.adapted_layers("default")
    assert [layer.name.rsplit(".", 1)[-1] for layer in layers] == ["q_proj", "v_proj"]
    assert all(".1." in layer.name for layer in layers)
    assert [layer.ilora_A["default"].out_features for layer in layers] == [8, 4]
    assert [layer.layouts["default"].scale for layer in layers] == [7 / 2, 3 / 1]
    assert [layer.ilora_gate["default"].down.out_features for layer in layers] == [5, 5]
    assert config.gate_temperature == 2.0


def test_patterns_may_be_given_on_the_command_line(data, llm_folder):
    """With a plus, which is how Hydra adds keys."""
    settings = configured(
        "+teacher.adapter.rank_pattern={1.self_attn.q_proj:8}", "+teacher.adapter.alpha_pattern={q_proj:4.5}"
    )
    assert settings.adapter.rank_pattern == {"1.self_attn.q_proj": 8}
    model, _ = built_from(settings, data, llm_folder)
    layers = {layer.name: layer for layer in model.tuner.adapted_layers("default")}
    ranks = {name: layer.ilora_A["default"].out_features for name, layer in layers.items() if "q_proj" in name}
    assert ranks == {"layers.0.self_attn.q_proj": 16, "layers.1.self_attn.q_proj": 8}
    assert layers["layers.0.self_attn.q_proj"].layouts["default"].scale == 4.5 / 16


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"gate": "topk", "gate_top_k": 9},
            r"`gate_top_k` must be .* from 1 to `num_experts` \(4\), got 9",
        ),
        ({"gate_noise": 0.1}, "`gate_noise` is only read by gate='noisy', not by 'linear'"),
        ({"gate": "dropout", "gate_dropout": 1.0}, r"`gate_dropout` must be in \[0, 1\)"),
        ({"gate_temperature": 0.0}, "`gate_temperature` must be a positive finite number"),
        ({"rank_pattern": {"q_proj": 6}}, r"rank_pattern\['q_proj'\]=6 with 4 experts"),
    ],
)
def test_gates_that_cannot_work_are_refused_before_the_model_is_loaded(adapter, message, data, llm_folder, monkeypatch):
    monkeypatch.setattr("llm2rec.teacher.factory.load_model", lambda *_: pytest.fail("loaded the model first"))
    with pytest.raises(ConfigError, match=rf"teacher\.adapter: .*{message}"):
        build("llama", llm_folder, data, adapter=adapter)


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank_pattern": {"no_such_layer": 8}},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": r"layers\.7\..*"},
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(adapter, data, llm_folder):
    with pytest.raises(ConfigError, match=r"teacher\.adapter: "):
        build("llama", llm_folder, data, adapter=adapter)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate_learning_rate_ratio=0", r"teacher.gate_learning_rate_ratio is 0.0, expected a positive finite number"),
        ("gate_learning_rate_ratio=-1", "teacher.gate_learning_rate_ratio is -1.0"),
        ("gate_learning_rate_ratio=nan", "`teacher.gate_learning_rate_ratio` is nan, expected a finite number"),
        ("balance_loss=-0.1", r"teacher.balance_loss is -0.1, expected 0 \(off\)"),
        ("balance_loss=inf", "`teacher.balance_loss` is inf, expected a finite number"),
    ],
)
def test_rates_and_weights_that_cannot_work_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        configured(f"teacher.{override}")


def test_gate_inputs_are_shared_by_all_gates(data, llm_folder, tmp_path, monkeypatch):
    engine, rows, numbers = engine_in(tmp_path), split(data), np.arange(20)
    found = []
    for adapter in ({}, {"gate": "conv"}, {"gate": "topk", "gate_per_layer": True, "gate_temperature": 3.0}):
        model, recipe = build("llama", llm_folder, data, adapter=adapter)
        if found:
            monkeypatch.setattr(model, "frozen_vectors", lambda *_: pytest.fail("computed again"))
        cache = GateCache(model, recipe.identity, engine, tmp_path / "cache", block_rows=8)
        found.append(cache.rows(rows, numbers).gate_inputs)
    assert all(np.array_equal(each, found[0]) for each in found)


# ---- the gate's own rate ---------------------------------------------------------------------------------------------


def test_the_gate_learns_at_its_own_rate(data, llm_folder, tmp_path):
    """One step of Adam moves each weight by its rate."""
    moved = {}
    for ratio in (1.0, 0.25):
        model = randomise(build("llama", llm_folder, data)[0])  # while B is 0, A and gate have no gradient
        before = trained_of(model)
        train(model, data, tmp_path / str(ratio), n_rows=16, ratio=ratio)
        moved[ratio] = {name: (p - before[name]).abs().median().item() for name, p in trained_of(model).items()}
    for name in moved[1.0]:
        assert moved[1.0][name] == pytest.approx(0.01, rel=0.05), name
        assert moved[0.25][name] == pytest.approx(0.0025 if ".ilora_gate." in name else 0.01, rel=0.05), name


# ---- balance ---------------------------------------------------------------------------------------------------------


def random_gates(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("shape", [(8, 4), (8, 3, 4)])
@pytest.mark.parametrize("cuts", [(8,), (3, 5), (1,) * 8])
def test_balance_of_the_rows_has_value_and_gradient_of_the_plain_formula(shape, cuts):
    gates = random_gates(*shape).requires_grad_()
    (expected,) = torch.autograd.grad(balance_loss(gates), gates)
    use = gates.detach().mean(dim=0)
    value = 0.0
    for part in gates.split(cuts):
        losses = balance_losses(part, use)
        assert losses.shape == (len(part),)
        (losses.sum() / 8).backward()
        value += losses.sum().item() / 8
    torch.testing.assert_close(gates.grad, expected, rtol=1e-12, atol=1e-14)
    assert value == pytest.approx(balance_loss(gates).item(), rel=1e-12)


def test_balance_by_hand():
    use = torch.tensor([0.75, 0.25], dtype=torch.float64)
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    losses = balance_losses(gates, use)
    assert losses.tolist() == [0.25, 0.25]  # 2 * (9/16 + 1/16) - 1
    (gradient,) = torch.autograd.grad(losses.sum(), gates)
    assert gradient.tolist() == [[3.0, 1.0], [3.0, 1.0]]  # 2 E m_e
    alone = torch.tensor([[0.0, 1.0]])
    assert balance_losses(alone, torch.tensor([0.0, 1.0])).tolist() == [1.0]  # E - 1
    assert balance_losses(alone, torch.tensor([0.5, 0.5])).tolist() == [0.0]


@pytest.mark.parametrize("micro", [8, 3, 1])
def test_mean_gates_are_those_of_all_rows_of_the_step(micro, data, llm_folder, tmp_path):
    model = randomise(build("llama", llm_folder, data, adapter={"gate_per_layer": True})[0], std=3.0).train()
    rows, engine = rows_of(model, data), engine_in(tmp_path)
    engine.stepper.n_micro_batches = -(-8 // micro)
    units = np.array([3, 0, 17, 20, 11, 5, 8])  # 7 rows, so that the last micro-batch of one row only fills up
    use = mean_gates(model, rows.gate_inputs, OptimizerStep(0, 0, units, 7), engine)
    expected = model.tuner.gate(torch.from_numpy(rows.gate_inputs[units])).double().mean(dim=0)
    assert use.shape == (14, 4)
    torch.testing.assert_close(use, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["noisy", "dropout", "conv"])
def test_looking_at_gates_draws_nothing_and_leaves_the_model_alone(kind, data, llm_folder):
    model = build("llama", llm_folder, data, adapter={"gate": kind, "gate_per_layer": True})[0].train()
    inputs = torch.from_numpy(rows_of(model, data).gate_inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = [model.evaluation_gates(inputs) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not found[0].requires_grad
    assert all(module.training for module in model.modules())
    assert_same_weights(model.state_dict(), before)
    assert torch.equal(model.eval().evaluation_gates(inputs), found[0])
    assert not any(module.training for module in model.modules() if isinstance(module, Gate))


class GradientsNoted(Engine):
    """Keeps the gate's gradients of the first step."""

    def prepare(self, model, optimizer):
        self.model = model
        return super().prepare(model, optimizer)

    @contextmanager
    def timed(self, step):
        optimizer = self._optimizer.optimizer
        hook = optimizer.register_step_pre_hook(self.note) if step.number == 0 else None
        with super().timed(step):
            yield
        if hook:
            hook.remove()

    def note(self, *_):
        named = self.model.named_parameters()
        type(self).noted = {name: p.grad.clone() for name, p in named if ".ilora_gate." in name}


@pytest.mark.parametrize("adapter", [{}, {"gate_per_layer": True}, {"gate": "mlp"}])
@pytest.mark.parametrize("micro", [16, 5])
def test_balance_adds_its_gradient_to_that_of_the_gate(adapter, micro, data, llm_folder, tmp_path):
    noted = {}
    for weight in (0.0, 3.0):
        model = randomise(build("llama", llm_folder, data, adapter=adapter)[0], std=0.5)
        kind = type("Noted", (GradientsNoted,), {})
        train(
            model,
            data,
            tmp_path / str(weight),
            kind=kind,
            n_rows=16,
            micro_batch_size=micro,
            max_grad_norm=0.0,
            balance=weight,
        )
        noted[weight] = kind.noted
    model = randomise(build("llama", llm_folder, data, adapter=adapter)[0], std=0.5)
    whole = torch.from_numpy(rows_of(model, data, n_rows=16).gate_inputs)
    (3.0 * balance_loss(model.tuner.gate(whole))).backward()
    for name, parameter in model.named_parameters():
        if ".ilora_gate." in name:
            added = noted[3.0][name] - noted[0.0][name]
            assert parameter.grad.abs().max() > 1e-4
            torch.testing.assert_close(added, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adapter", [{}, {"gate_per_layer": True, "gate": "topk"}])
def test_balance_does_not_depend_on_how_a_step_is_cut(adapter, data, llm_folder, tmp_path):
    found = {}
    for micro in (8, 3, 1):
        model = randomise(build("llama", llm_folder, data, adapter=adapter)[0], std=0.1)
        # 29 rows: a last step of 5, which leaves micro-batches of one row without any.
        train(model, data, tmp_path / str(micro), n_rows=29, batch_size=8, micro_batch_size=micro, balance=0.5)
        found[micro] = trained_of(model), history(tmp_path / str(micro))[0]
    for micro in (3, 1):
        assert found[micro][1].keys() == found[8][1].keys()
        for name, value in found[8][1].items():
            assert found[micro][1][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, value in found[8][0].items():
            torch.testing.assert_close(found[micro][0][name], value, rtol=2e-3, atol=2e-4)


def test_balance_is_logged_by_name_and_zero_weight_is_the_plain_loss(data, llm_folder, tmp_path):
    for folder, options in (("plain", {}), ("zero", {"balance": 0.0}), ("on", {"balance": 0.5})):
        # No gradient steps worth the name, so that all rows meet the same gates.
        model = randomise(build("llama", llm_folder, data)[0], std=3.0)
        train(model, data, tmp_path / folder, learning_rate=1e-12, batch_size=32, **options)
    (plain,), (zero,), (on,) = (history(tmp_path / folder) for folder in ("plain", "zero", "on"))
    assert plain == zero
    assert "train/loss_balance" not in plain
    assert on["train/loss_task"] == pytest.approx(plain["train/loss"], rel=1e-6)
    gates = model.evaluation_gates(torch.from_numpy(rows_of(model, data).gate_inputs))
    assert on["train/loss_balance"] == pytest.approx(balance_loss(gates).item(), rel=1e-4)
    assert on["train/loss"] == pytest.approx(on["train/loss_task"] + 0.5 * on["train/loss_balance"], rel=1e-6)


def test_balance_evens_the_use_of_experts_out(data, llm_folder, tmp_path):
    uses = {}
    for weight in (0.0, 10.0):
        model, _ = build("llama", llm_folder, data)
        tilt(model, data, 2.0)
        train(model, data, tmp_path / str(weight), epochs=5, learning_rate=0.03, balance=weight)
        uses[weight] = history(tmp_path / str(weight))[-1]["train/gate_use_0"]
    assert uses[0.0] > 0.5
    assert uses[10.0] < 0.4


# ---- health ----------------------------------------------------------------------------------------------------------


def tilt(model, data, logit):
    """Give expert 0 about this much more logit than the others on every row."""
    inputs = torch.from_numpy(rows_of(model, data).gate_inputs)
    towards = torch.nn.functional.normalize(inputs.mean(dim=0), dim=0)
    with torch.no_grad():
        model.tuner.ilora_gate["default"].weight[0] += logit * towards / (inputs @ towards).mean()


@pytest.mark.parametrize("adapter", [{}, {"gate_per_layer": True}, {"gate": "noisy"}])
def test_health_is_logged_at_every_evaluation(adapter, data, llm_folder, tmp_path):
    model = build("llama", llm_folder, data, adapter=adapter)[0]
    train(model, data, tmp_path, epochs=2)
    entries = history(tmp_path)
    names = {"gate_entropy", "gate_information", *(f"gate_use_{expert}" for expert in range(4))}
    assert len(entries) == 2
    for entry in entries:
        assert {f"train/{name}" for name in names} <= entry.keys()
        assert sum(entry[f"train/gate_use_{expert}"] for expert in range(4)) == pytest.approx(1.0)
    # The weights of the second evaluation may not be the best ones, which the model has now.
    best = entries[written(tmp_path, "validation")["best_step"] // 2 - 1]
    gates = model.evaluation_gates(torch.from_numpy(rows_of(model, data, "validation").gate_inputs))
    for name, value in gate_health(gates).scalars().items():
        assert best[f"train/{name}"] == pytest.approx(value, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("n_rows", [1, 5, 7, 10, 11])
def test_health_does_not_depend_on_the_blocks_it_is_measured_in(n_rows, data, llm_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llm2rec.teacher.gates._BLOCK_ROWS", 5)
    model = randomise(build("llama", llm_folder, data)[0])
    inputs = rows_of(model, data).gate_inputs[:n_rows]
    whole = gate_health(model.tuner.gate(torch.from_numpy(inputs)))
    found = GateMonitor(model, inputs, engine_in(tmp_path)).measure(0)
    assert found == pytest.approx(whole.scalars(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("logit", "told"), [(0.0, 0), (30.0, 1)])
def test_collapsed_gates_are_told_once_and_the_run_goes_on(logit, told, data, llm_folder, tmp_path, caplog):
    model, _ = build("llama", llm_folder, data)
    tilt(model, data, logit)
    rows = rows_of(model, data, n_rows=40)  # a few rows alone are no sign
    engine = engine_in(tmp_path, **{**TRAINING, "epochs": 3, "learning_rate": 1e-4})
    with warnings.catch_warnings():
        warnings.simplefilter("error", GateCollapseWarning)  # nothing on the side of the log
        fit(model, rows, rows, engine)
    found = [record for record in caplog.records if "gate mass of 40 instances" in record.message]
    assert len(found) == told
    assert len(history(tmp_path)) == 3
    for record in found:
        assert record.levelname == "WARNING"
        assert record.message.startswith("step 3: one expert has ")
        assert "teacher.gate_learning_rate_ratio" in record.message


# ---- kill and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ({"gate": "conv"}, {}),
        ({"gate": "conv", "gate_per_layer": True, "target_modules": ["q_proj"]}, {"ratio": 0.3}),
        ({"gate": "noisy", "dropout": 0.1}, {"ratio": 5.0, "balance": 0.5}),
    ],
)
@pytest.mark.parametrize("killed_before", [3, 5])
def test_a_killed_run_ends_like_the_unbroken_one(adapter, options, killed_before, data, llm_folder, tmp_path):
    def run(folder, seed=None, **changes):
        model, _ = build("llama", llm_folder, data, adapter=adapter)
        if seed is not None:  # what is not in the checkpoint is not this process's either
            randomise(model, seed)
        return train(model, data, folder, epochs=4, checkpoint_every_steps=1, **options, **changes)

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "broken", kind=killed_at(killed_before))
    resumed = run(tmp_path / "broken", seed=9)
    assert_same_weights(trainable_weights(resumed), trainable_weights(whole))
    assert history(tmp_path / "broken") == history(tmp_path / "whole")
    statistics = [name for name in trainable_weights(whole) if name.endswith("running_var")]
    assert bool(statistics) == (adapter["gate"] == "conv")
    assert all((trainable_weights(whole)[name] != 1).any() for name in statistics)


def test_the_best_weights_bring_their_running_statistics_back(data, llm_folder, tmp_path):
    """The model that is kept ranks as it did when it was measured, not with the statistics of later steps."""
    model, _ = build("llama", llm_folder, data, adapter={"gate": "conv"})
    # Weights that hardly move rank alike at every step, so that the first evaluation stays the best on any machine;
    # the statistics move with every row read.
    train(model, data, tmp_path, epochs=6, learning_rate=1e-30)
    told = written(tmp_path, "validation")
    first, last = told["history"][0], told["history"][-1]
    assert told["best_step"] == first["step"] < last["step"]
    gates = model.evaluation_gates(torch.from_numpy(rows_of(model, data, "validation").gate_inputs))
    found = gate_health(gates).scalars()
    assert found == {name: pytest.approx(first[f"train/{name}"], rel=1e-5, abs=1e-7) for name in found}
    assert found != {name: pytest.approx(last[f"train/{name}"], rel=1e-3) for name in found}
