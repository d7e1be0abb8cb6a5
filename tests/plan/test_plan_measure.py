"""What a step asks for on the meta device is what a real one takes on a CPU, byte for byte."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llm2rec.core.train.settings import TrainingSettings
from llm2rec.plan.measure import Meter, forward_cost, step_cost
from llm2rec.plan.models import PlannedTeacher, TeacherShape, teacher_costs
from llm2rec.plan.students import plan_student
from llm2rec.student.losses import cross_entropy
from llm2rec.student.models import build_model
from llm2rec.student.settings import CaserStudent, GRU4RecStudent, LossSettings, SASRecStudent
from llm2rec.student.task_loss import TaskLoss
from llm2rec.teacher.factory import adapter_config, with_adapter
from llm2rec.teacher.gate_source import NoGate
from llm2rec.teacher.heads import build_head
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.settings import AdapterSettings, TeacherSettings, TitleSettings
from llm2rec.teacher.text_vectors import TitleVectors
from llm2rec.teacher.title.model import TitleRecommender

N_ITEMS, LENGTH, ROWS, TOKENS, ANSWER = 300, 10, 8, 64, 7
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 400,
}


def shape_of(kind=None, precision="float32", **settings):
    given = dict(kind or LLAMA)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    return TeacherShape(config, TeacherSettings(**settings), precision, "last", N_ITEMS, LENGTH, 16, on_cpu=True)


def real_step(shape):
    """The same teacher on the CPU, with weights, torch's own attention and padded prompts."""
    torch.manual_seed(0)
    is_title = shape.settings.objective == "title"
    base = (AutoModelForCausalLM if is_title else AutoModel).from_config(shape.config, dtype=torch.float32)
    llm = with_adapter(base.requires_grad_(False), adapter_config(shape.settings, None))
    if shape.settings.gradient_checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    ids, mask = torch.zeros(ROWS, TOKENS, dtype=torch.int64), torch.ones(ROWS, TOKENS, dtype=torch.int64)
    mask[:, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "item_ids": None}
    targets, history = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    common = {"pooling": "last", "exclude_history": True, "gate_source": NoGate()}
    vectors = torch.randn(N_ITEMS, shape.width)
    if is_title:
        model = TitleRecommender(llm, None, TitleVectors(vectors, vectors[0]), TitleSettings(), **common).train()
        labels = ids.masked_fill(torch.arange(TOKENS) < TOKENS - ANSWER, -100)
        return model, lambda: model(**inputs, labels=labels).sum()
    model = ItemTeacher(llm, None, head=build_head("titles", vectors, vectors[:, 0], 20.0, None), **common).train()

    def losses():
        scores = model(**inputs, history=history, recommender_users=None, keep=targets)
        return cross_entropy(scores, targets).sum()

    return model, losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(LLAMA, {}), (LLAMA, {"tuning": "lora"}), (LLAMA, {"objective": "title"}), (BERT, {})],
    ids=["llama", "lora", "title", "bert"],
)
def test_the_planned_peak_is_the_real_one(kind, settings, checkpointing):
    shape = shape_of(kind, gradient_checkpointing=checkpointing, adapter=AdapterSettings(r=8), **settings)
    planned = PlannedTeacher(shape).training(ROWS, TOKENS, ANSWER, checkpointing=checkpointing)
    model, losses = real_step(shape)
    with model.use_gates(torch.randn(ROWS, shape.width)):
        real = step_cost(model, losses)
    # What is not planned: positions, indices, and masks before they are numbers.
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=5e-3)


@pytest.mark.parametrize("objective", ["item", "title"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_model_is_extrapolated_to_the_byte(objective, checkpointing):
    shape = shape_of(objective=objective)
    whole, (sizes, cost) = PlannedTeacher(shape), teacher_costs(shape)
    assert sizes == whole.sizes
    assert cost("training", ROWS, TOKENS, ANSWER, checkpointing=checkpointing) == whole.training(
        ROWS, TOKENS, ANSWER, checkpointing=checkpointing
    )
    assert cost("ranking", ROWS, TOKENS, 20) == whole.ranking(ROWS, TOKENS, 20)
    assert cost("reading", ROWS, TOKENS) == whole.reading(ROWS, TOKENS)


def test_a_model_whose_layers_differ_is_run_as_it_is():
    shape = shape_of(adapter=AdapterSettings(target_modules=r".*layers\.4\..*q_proj"))
    assert not PlannedTeacher(shape).is_uniform
    sizes, cost = teacher_costs(shape)
    assert sizes.trained_parameters == 16 * (64 + 64) + 4 * 64  # one layer, and the gate
    assert cost("reading", ROWS, TOKENS) == PlannedTeacher(shape).reading(ROWS, TOKENS)
    assert PlannedTeacher(shape_of()).is_uniform


def test_operations_bytes_and_launches_are_counted():
    weight, x = torch.randn(5, 3), torch.randn(2, 3)
    cost = forward_cost(lambda: (x @ weight.T).relu_())
    assert cost.flops == cost.forward_flops == 2 * 2 * 3 * 5
    assert cost.traffic_bytes == 4 * (2 * 3 + 5 * 3 + 2 * 5) + 4 * (2 * 5)
    assert cost.n_operations == 2
    assert cost.peak_bytes == 4 * 2 * 5


def test_a_storage_counts_once_and_until_it_is_freed():
    with Meter() as meter:
        first = torch.empty(100, dtype=torch.uint8)
        views = [first.view(10, 10), first[:50]]
        del first
        assert meter.now == 100
        views.clear()
        assert meter.now == 0
        meter.next_phase()
        last = torch.empty(70, dtype=torch.uint8)
    assert meter.peaks == [100, 70]
    assert len(last) == 70


def test_gradients_are_there_before_the_step_and_do_not_count():
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(1, 4)
    cost = step_cost(layer, lambda: layer(x).sum())
    # At the most: the loss's gradient, that of the weight, and what the first is spread to.
    assert 4 * 16 <= cost.peak_bytes <= 4 * 16 + 100
    assert layer.weight.grad is None


@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax", "gbce"])
@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "caser"])
def test_students_are_planned_as_they_run(name, loss):
    settings = {"sasrec": SASRecStudent, "gru4rec": GRU4RecStudent, "caser": CaserStudent}[name](
        loss=LossSettings(loss, n_negatives=None if loss == "cross_entropy" else 50)
    )
    planned = plan_student(settings, N_ITEMS, ROWS)
    model = build_model(name, n_items=N_ITEMS, **asdict(settings.model)).train()
    own = TaskLoss(model, settings.loss, torch.zeros(1, dtype=torch.int64), 0)
    history, ones = torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.ones(ROWS, dtype=torch.int64)
    real = step_cost(model, lambda: own(model(history, ones), ones, np.arange(ROWS), epoch=0, step=0)["loss"].sum())
    assert planned.parameters == sum(each.numel() for each in model.parameters())
    assert planned.held_bytes == 16 * planned.parameters
    # Fused kernels (recurrence, attention) keep what their meta forms do not, and the other way round.
    assert planned.cost.peak_bytes == pytest.approx(real.peak_bytes, rel=0.15)


def test_a_table_with_rowwise_state_holds_less():
    def held(loss, **training):
        settings = SASRecStudent(
            loss=LossSettings(loss), item_optimizer="rowwise", training=TrainingSettings(**training)
        )
        return plan_student(settings, N_ITEMS, ROWS)

    table, rows = 64 * (N_ITEMS + 1), N_ITEMS + 1
    rest = held("cross_entropy").parameters - table
    assert held("cross_entropy").held_bytes == 16 * rest + (4 + 4) * table + 8 * rows
    assert held("sampled_softmax").held_bytes == 16 * rest + 4 * table + 8 * rows
    assert held("sampled_softmax", max_grad_norm=1.0).held_bytes == held("cross_entropy").held_bytes
    assert held("sampled_softmax").update_bytes == 28 * rest
