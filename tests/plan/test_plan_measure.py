"""Peak memory on the meta device equals that of a step with data on a CPU."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llm2rec.plan.measure import MemoryMeter, forward_peaks, step_peaks
from llm2rec.plan.models import PlannedTeacher, TeacherShape, measured_teacher
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.factory import adapter_config, with_adapter
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
    common = {"pooling": "last", "exclude_history": True}
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
    planned = PlannedTeacher(shape).training_peaks(ROWS, TOKENS, ANSWER, checkpointing=checkpointing)
    model, losses = real_step(shape)
    with model.use_gates(torch.randn(ROWS, shape.width)):
        real = step_peaks(model, losses)
    # Not planned: positions, indices, and boolean masks.
    assert max(planned) == pytest.approx(max(real), rel=5e-3)


@pytest.mark.parametrize("objective", ["item", "title"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_deep_model_is_extrapolated_to_the_byte(objective, checkpointing):
    shape = shape_of(objective=objective)
    whole, (sizes, peak) = PlannedTeacher(shape), measured_teacher(shape)
    assert sizes == whole.sizes
    step = (ROWS, TOKENS, ANSWER)
    assert peak("training_peaks", *step, checkpointing=checkpointing) == max(
        whole.training_peaks(*step, checkpointing=checkpointing)
    )
    assert peak("ranking_peaks", ROWS, TOKENS, 20) == max(whole.ranking_peaks(ROWS, TOKENS, 20))


def test_a_model_with_different_layers_is_not_extrapolated():
    shape = shape_of(adapter=AdapterSettings(target_modules=r".*layers\.4\..*q_proj"))
    assert not PlannedTeacher(shape).is_uniform
    sizes, peak = measured_teacher(shape)
    assert sizes.trained_parameters == 16 * (64 + 64) + 4 * 64  # one layer, and the gate
    assert peak("ranking_peaks", ROWS, TOKENS, 20) == max(PlannedTeacher(shape).ranking_peaks(ROWS, TOKENS, 20))
    assert PlannedTeacher(shape_of()).is_uniform


def test_peak_of_a_product_by_hand():
    weight, x = torch.randn(5, 3), torch.randn(2, 3)
    assert forward_peaks(lambda: (x @ weight.T).relu_()) == (4 * 2 * 5,)


def test_a_storage_counts_once_and_until_it_is_freed():
    with MemoryMeter() as meter:
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


def test_existing_gradients_are_not_counted():
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(1, 4)
    (peak,) = step_peaks(layer, lambda: layer(x).sum())
    # At the most: the loss's gradient, that of the weight, and what the first is spread to.
    assert 4 * 16 <= peak <= 4 * 16 + 100
    assert layer.weight.grad is None
