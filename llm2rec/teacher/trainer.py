"""Train the iLoRA teacher on the `item` objective."""

import numpy as np
import torch
from torch import Tensor

from llm2rec.core.engine import Engine
from llm2rec.core.metrics import ranking_metrics, target_ranks
from llm2rec.core.optimizer import adamw
from llm2rec.core.record import TrainingRecord
from llm2rec.student.datamodule import SeenItems
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.gate_cache import TeacherRows
from llm2rec.teacher.gates import GateWatch, balance_losses, mean_gates
from llm2rec.teacher.ilora_model import ILoraRecommender
from llm2rec.teacher.prompts import batches_by_tokens

__all__ = ["rank_targets", "train_teacher"]


def train_teacher(
    model: ILoraRecommender,
    train: TeacherRows,
    validation: TeacherRows,
    engine: Engine,
    *,
    select_on: str = "ndcg@10",
    gate_lr_ratio: float = 1.0,
    balance_weight: float = 0.0,
) -> ILoraRecommender:
    """Train LoRA experts and gate with full-softmax cross-entropy; keep the weights that validate best.

    Args:
        model: Teacher with a fresh adapter; its base is frozen.
        train: Rows to train on.
        validation: Rows for early stopping.
        engine: Runs the loop; its run folder gets checkpoints, best weights and ``metrics/validation.json``.
        select_on: Validation metric that decides.
        gate_lr_ratio: Learning rate of the gate networks as a part of that of the experts.
        balance_weight: Weight of the load-balance loss; 0 leaves it out.

    Returns:
        The unwrapped model with the best weights, in evaluation mode.
    """
    settings, record, n_rows = engine.training, TrainingRecord(engine, select_on), len(train.rows)
    ratios = {"ilora_gate": gate_lr_ratio}
    wrapped, optimizer = engine.prepare(model, adamw(model, settings.learning_rate, settings.weight_decay, ratios))
    if state := engine.load_checkpoint(model, optimizer):
        record.restore(state)

    watch = GateWatch(model, validation.gate_inputs, engine)
    positions, max_steps = np.arange(n_rows), engine.max_steps(n_rows)
    steps = engine.steps(positions, record.step, train.token_counts)
    wrapped.train()
    for step, share in engine.progress(steps, "teacher", max_steps, initial=record.step):
        if record.stopping.should_stop:
            break
        lr = engine.begin_step(step, max_steps, optimizer)
        use = mean_gates(model, train.gate_inputs, share, engine) if balance_weight > 0 else None  # (E,) or (G, E)
        for micro, weights in zip(share.micro_batches, share.weights, strict=True):
            batch = train.data.batch(train.rows[micro], engine.device)
            tokens = model.prompts.histories(
                train.data.history.numpy()[train.rows[micro]], train.data.lengths.numpy()[train.rows[micro]]
            ).to(engine.device)
            gate_input = torch.from_numpy(train.gate_inputs[micro]).to(engine.device)
            with engine.accumulate(wrapped), model.mixing(gate_input) as gates:  # they must outlive backward
                users = wrapped(tokens.input_ids, tokens.attention_mask)  # (B, d)
                logits = model.score(users, batch.history, keep=batch.targets)  # (B, N)
                losses = {"loss": cross_entropy(logits, batch.targets)}  # each (B,)
                if use is not None:
                    losses |= {"loss_item": losses["loss"], "loss_balance": balance_losses(gates, use)}
                    losses["loss"] = losses["loss_item"] + balance_weight * losses["loss_balance"]
                counted = torch.from_numpy(weights).to(engine.device)
                sums = {name: (values * counted).sum() for name, values in losses.items()}
                engine.backward(sums["loss"], share.n_rows, step, train.rows[micro])
                engine.step(wrapped, optimizer)
            record.add_losses(sums)
        record.finish_step(step, share.n_rows)

        if settings.evaluation_is_due(record.step, n_rows):
            engine.average_buffers(model)
            metrics = ranking_metrics(rank_targets(model, validation, engine))
            record.evaluated(model, metrics, learning_rate=lr, **watch.look(record.step))
        if settings.checkpoint_is_due(record.step, n_rows):
            engine.save_checkpoint(model, optimizer, record.state())
    record.finish(model)
    return model.eval()


def rank_targets(
    model: ILoraRecommender,
    rows: TeacherRows,
    engine: Engine,
    *,
    seen: SeenItems | None = None,
    batch_tokens: int = 8192,
) -> Tensor:
    """Rank the targets of all rows among the whole catalogue, divided among processes; no row is dropped.

    Args:
        model: Unwrapped model; put into evaluation mode and back.
        rows: Rows to rank, M of them.
        engine: Divides the rows and gathers the ranks.
        seen: Items to leave out of each row's ranking, besides those the model leaves out itself; None for none.
        batch_tokens: Tokens per forward pass, padding included.

    Returns:
        0-based ranks of shape ``(M,)``, int64, on the CPU.
    """
    was_training = model.training
    model.eval()
    mine = engine.my_rows(len(rows.rows))
    ranks = torch.empty(len(mine), dtype=torch.int64)
    with torch.no_grad():
        for part in batches_by_tokens(rows.token_counts[mine], batch_tokens):
            numbers = rows.rows[mine[part]]
            batch = rows.data.batch(numbers, engine.device)
            history, lengths = rows.data.history.numpy()[numbers], rows.data.lengths.numpy()[numbers]
            tokens = model.prompts.histories(history, lengths).to(engine.device)
            with model.mixing(torch.from_numpy(rows.gate_inputs[mine[part]]).to(engine.device)):
                users = model(tokens.input_ids, tokens.attention_mask)
            scores = model.score(users, batch.history)
            if seen is not None:
                scores = seen.mask(scores, numbers, batch.targets)
            ranks[torch.from_numpy(part)] = target_ranks(scores, batch.targets).cpu()
    model.train(was_training)
    return engine.gather_rows(ranks, len(rows.rows))
