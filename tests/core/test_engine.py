import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from engine_helpers import RowsObjective, engine_in, take_steps
from safetensors.torch import load_file
from torch import nn

from llm2rec.core.errors import CheckpointError, ConfigError, StorageError
from llm2rec.core.seed import derived_seed, seed_everything
from llm2rec.core.train.batching import OptimizerStep, TrainingUnits
from llm2rec.core.train.optimizer import adamw
from llm2rec.core.train.state import TrainingState, Validation

N_ROWS = 11  # batches of 8 and 3 rows


def step_of(number, n_rows):
    return OptimizerStep(number, 0, np.arange(n_rows), n_rows)


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(N_ROWS, 5).double(), torch.randint(0, 3, (N_ROWS,))


def losses_of(model, inputs, targets):
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def steps_taken(engine, *, epochs=1):
    """Run the engine's loop; return rows, gradients and weights of each optimizer step."""
    model, inputs, targets = problem()
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.1, 0.0))
    taken = []

    def note(*_):
        taken.append({"gradients": [p.grad.clone() for p in model.parameters()]})

    optimizer.optimizer.register_step_pre_hook(note)
    objective = RowsObjective(
        N_ROWS, lambda wrapped, rows, _: {"loss": losses_of(wrapped, inputs[rows], targets[rows])}
    )
    before = [p.detach().clone() for p in model.parameters()]
    for step, sums in take_steps(engine, wrapped, objective, optimizer):
        assert sums["loss"] > 0
        seen = [micro.units[micro.weights == 1] for micro in engine.micro_batches(step)]
        taken[-1] |= {"rows": np.concatenate(seen), "before": before}
        before = [p.detach().clone() for p in model.parameters()]
    return taken


@pytest.mark.parametrize("micro_batch_size", [8, 5, 4, 1])
def test_step_uses_the_gradient_of_the_mean_over_its_rows(tmp_path, micro_batch_size):
    engine = engine_in(tmp_path, epochs=1, batch_size=8, micro_batch_size=micro_batch_size)
    taken = steps_taken(engine)
    assert [len(step["rows"]) for step in taken] == [8, 3]
    model, inputs, targets = problem()
    for step in taken:
        for parameter, value in zip(model.parameters(), step["before"], strict=True):
            parameter.data.copy_(value)
        losses = losses_of(model, inputs[step["rows"]], targets[step["rows"]])
        expected = torch.autograd.grad(losses.mean(), list(model.parameters()))
        torch.testing.assert_close(step["gradients"], list(expected), rtol=1e-12, atol=1e-14)


def test_micro_batches_do_not_change_the_model(tmp_path):
    ends = []
    for micro in (8, 1):
        engine = engine_in(tmp_path / str(micro), epochs=3, batch_size=8, micro_batch_size=micro)
        ends.append(steps_taken(engine)[-1]["before"])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_gradients_are_clipped_over_the_whole_step(tmp_path):
    engine = engine_in(tmp_path, epochs=1, batch_size=8, micro_batch_size=2, max_grad_norm=1e-3)
    for step in steps_taken(engine):
        norm = torch.cat([gradient.flatten() for gradient in step["gradients"]]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_accumulation_ignores_the_launcher_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    engine = engine_in(tmp_path, epochs=1, batch_size=8, micro_batch_size=4)
    assert len(steps_taken(engine)) == 2


def test_one_process_has_all_rows(tmp_path):
    engine = engine_in(tmp_path)
    assert engine.my_rows(5).tolist() == [0, 1, 2, 3, 4]
    rows = torch.randn(5, 2)
    assert engine.gather_rows(rows, 5) is rows
    assert engine.gather_rows(torch.zeros(0, 2), 0).shape == (0, 2)
    assert engine.is_main


@pytest.mark.parametrize(("n_rows", "n_processes"), [(5, 2), (7, 3), (2, 4), (0, 2), (8, 4)])
def test_blocks_of_all_processes_partition_the_rows(n_rows, n_processes):
    from llm2rec.core.train.engine import Engine

    def block(rank, lockstep):
        return Engine.my_rows(SimpleNamespace(rank=rank, n_processes=n_processes, lockstep=lockstep), n_rows).tolist()

    blocks = [block(rank, False) for rank in range(n_processes)]
    assert np.concatenate(blocks).tolist() == list(range(n_rows))
    assert block(n_processes - 1, True) == list(range(n_rows))


def test_sums_are_exact(tmp_path):
    values = {"loss": 1e9 + 0.25, "other": 0.1}
    assert engine_in(tmp_path).sum_over_processes(values) == values


def drawn():
    return random.random(), np.random.rand(), torch.rand(3).tolist()


def test_random_numbers_of_a_step_do_not_depend_on_earlier_steps(tmp_path):
    engine = engine_in(tmp_path, seed=4)
    optimizer = SimpleNamespace(param_groups=[])
    engine.begin_step(7, 10, optimizer)
    first = drawn()
    engine.begin_step(8, 10, optimizer)
    other = drawn()
    engine.begin_step(7, 10, optimizer)
    assert drawn() == first
    assert all(a != b for a, b in zip(first, other, strict=True))
    again = engine_in(tmp_path / "again", seed=5)
    again.begin_step(7, 10, optimizer)
    assert drawn() != first


def test_seeds_depend_on_all_parts():
    seeds = {derived_seed(*parts) for parts in [(1,), (2,), (1, 2), (12,), (1, "step", 2), (1, "step", 3)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_engine_seeds_the_initial_weights(tmp_path):
    engine_in(tmp_path / "a", seed=3)
    first = torch.rand(4)
    torch.rand(10)
    engine_in(tmp_path / "b", seed=3)
    assert torch.equal(torch.rand(4), first)
    seed_everything(3)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(derived_seed(3))
    assert torch.equal(torch.rand(4), first)


def test_learning_rates_follow_schedule_and_group_ratio(tmp_path):
    engine = engine_in(tmp_path, learning_rate=0.2, warmup_ratio=0.5, min_learning_rate_ratio=0.1)
    optimizer = SimpleNamespace(param_groups=[{}, {"lr_ratio": 0.5}])
    rates = []
    for step in (0, 2, 5, 10):
        engine.begin_step(step, 10, optimizer)
        assert engine.learning_rate == optimizer.param_groups[0]["lr"]
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert np.array(rates) == pytest.approx(np.array([[0, 0], [0.08, 0.04], [0.2, 0.1], [0.02, 0.01]]))


def test_steps_resume_in_the_middle_of_an_epoch(tmp_path):
    engine = engine_in(tmp_path, epochs=3, batch_size=4)
    units = TrainingUnits(np.arange(10))
    whole = [(step.number, step.epoch, step.units.tolist()) for step in engine.steps(units)]
    assert [number for number, _, _ in whole] == list(range(engine.max_steps(10))) == list(range(9))
    for start in (0, 2, 3, 8, 9):
        rest = [(step.number, step.epoch, step.units.tolist()) for step in engine.steps(units, start)]
        assert rest == whole[start:]


def statistics_of_two(folder):
    """In each of two processes: running statistics of its rows, their average, and the checkpoint."""
    torch.set_num_threads(1)
    engine = engine_in(folder)
    model = nn.BatchNorm1d(2)
    model.register_buffer("scratch", torch.full((2,), float(engine.rank)), persistent=False)
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.1, 0.0))
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0]]) * (1 + 2 * engine.rank)
    wrapped(rows).sum().backward()
    optimizer.step()
    engine.save_checkpoint(model, optimizer, {"step": 1})
    stored = load_file(folder / "checkpoints" / "step_000000001" / "model.safetensors")
    expected = 0.1 * torch.tensor([[2.0, 4.0], [6.0, 12.0]]).mean(dim=0)
    torch.testing.assert_close([model.running_mean, stored["running_mean"]], [expected, expected])
    assert model.num_batches_tracked == 1
    assert model.scratch.tolist() == [engine.rank] * 2
    assert engine.sum_tensor(torch.tensor([1.0, engine.rank])).tolist() == [2.0, 1.0]


@pytest.mark.slow
def test_running_statistics_are_averaged_over_processes(tmp_path):
    debug_launcher(statistics_of_two, args=(tmp_path,), num_processes=2)


def trained(engine, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    wrapped, optimizer = engine.prepare(model, adamw(model, 0.1, 0.0))
    wrapped(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_only_the_newest_checkpoint_is_kept_and_loaded(tmp_path):
    engine = engine_in(tmp_path)
    model, optimizer = trained(engine)
    for step in (9, 10, 200):
        model.bias.data.fill_(step)
        engine.save_checkpoint(model, optimizer, {"step": step})
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000000200"]
    other, fresh = trained(engine, seed=1)
    assert engine.load_checkpoint(other, fresh) == {"step": 200}
    assert other.bias.tolist() == [200, 200]
    engine.save_checkpoint(model, optimizer, {"step": 200, "again": True})
    assert engine.load_checkpoint(other, fresh) == {"step": 200, "again": True}
    engine.drop_checkpoints()
    assert engine.load_checkpoint(other, fresh) is None
    assert not (tmp_path / "checkpoints").exists()


def test_keep_checkpoints(tmp_path):
    engine = engine_in(tmp_path, keep_checkpoints=2)
    model, optimizer = trained(engine)
    for step in (9, 10, 200, 201):
        engine.save_checkpoint(model, optimizer, {"step": step})
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == [
        "step_000000200",
        "step_000000201",
    ]


def test_best_weights_are_kept_after_their_checkpoint_is_deleted(tmp_path):
    engine = engine_in(tmp_path)
    model, optimizer = trained(engine)
    state = TrainingState(engine, "ndcg@10")
    for step, value in enumerate((0.1, 0.5, 0.3, 0.2)):
        model.bias.data.fill_(step)
        state.finish_step(step_of(step, 4), {"loss": torch.tensor(1.0)})
        state.evaluated(model, Validation({"ndcg@10": value}))
        engine.save_checkpoint(model, optimizer, state.to_dict())
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000000004"]
    assert load_file(tmp_path / "best.safetensors")["bias"].tolist() == [1, 1]
    state.finish(model)
    assert model.bias.tolist() == [1, 1]


def test_incomplete_checkpoint_is_ignored(tmp_path):
    engine = engine_in(tmp_path)
    model, optimizer = trained(engine)
    engine.save_checkpoint(model, optimizer, {"step": 1})
    for name in (".step_000000002.abc.partial", ".step_000000001.77.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    assert engine.load_checkpoint(model, optimizer) == {"step": 1}


def test_failed_save_keeps_the_older_checkpoint(tmp_path):
    engine = engine_in(tmp_path)
    model, optimizer = trained(engine)
    engine.save_checkpoint(model, optimizer, {"step": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        engine.save_checkpoint(model, optimizer, {"step": 2, "value": float("nan")})
    assert engine.load_checkpoint(model, optimizer) == {"step": 1}
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]


def test_full_disk_raises_and_keeps_the_older_checkpoint(tmp_path):
    engine = engine_in(tmp_path)
    model, optimizer = trained(engine)
    engine.save_checkpoint(model, optimizer, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # bytes a file
    try:
        with pytest.raises(StorageError, match=r"cannot write .*step_000000002 \(File too large\); existing"):
            engine.save_checkpoint(model, optimizer, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_000000001"]
    assert engine.load_checkpoint(model, optimizer) == {"step": 1}


def test_checkpoint_of_another_model_raises(tmp_path):
    engine = engine_in(tmp_path)
    engine.save_checkpoint(*trained(engine), {"step": 1})
    other = nn.Linear(4, 2)
    _, optimizer = engine.prepare(other, adamw(other, 0.1, 0.0))
    with pytest.raises(CheckpointError, match=r"weight has shape \(2, 3\), expected \(2, 4\)"):
        engine.load_checkpoint(other, optimizer)


def test_resumed_state_has_the_means_of_an_uninterrupted_run(tmp_path):
    engine = engine_in(tmp_path, patience=2)
    engine.learning_rate = 0.1
    model = nn.Linear(1, 1)
    state = TrainingState(engine, "ndcg@10")
    state.finish_step(step_of(0, 8), {"loss": torch.tensor(4.0)})
    resumed = TrainingState(engine, "ndcg@10")
    resumed.restore(state.to_dict())
    resumed.finish_step(step_of(1, 4), {"loss": torch.tensor(2.0)})
    resumed.evaluated(model, Validation({"ndcg@10": 0.5}, {"hybrid": 1.0}))
    assert resumed.to_dict()["history"] == [
        {"step": 2, "train/loss": 0.5, "train/learning_rate": 0.1, "train/hybrid": 1.0, "val/ndcg@10": 0.5}
    ]
    best = model.weight.item()
    model.weight.data.add_(1)
    resumed.finish_step(step_of(2, 4), {"loss": torch.tensor(2.0)})
    resumed.evaluated(model, Validation({"ndcg@10": 0.4}))
    resumed.finish(model)
    assert model.weight.item() == best  # the best weights come back
    assert not resumed.should_stop
    assert resumed.to_dict()["history"][1]["train/loss"] == 0.5  # counted from the last evaluation


def test_training_without_evaluation_keeps_the_weights(tmp_path):
    engine = engine_in(tmp_path)
    model = nn.Linear(1, 1)
    before = model.weight.item()
    TrainingState(engine, "ndcg@10").finish(model)
    assert model.weight.item() == before


def test_deepspeed_with_the_plain_cpu_mode_is_refused_before_accelerate_breaks(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="unset that variable"):
        engine_in(tmp_path)
