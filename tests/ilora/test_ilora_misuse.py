"""What people do to a model without having read how it works."""

import copy
import pickle

import pytest
import torch
from ilora_helpers import EXPERTS, adapt, batch, gate_inputs, layers, outputs, tiny, train
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llm2rec.ilora import (
    AdapterKeysError,
    GateError,
    ILoraConfig,
    RowAdaptersError,
    fold,
    frozen_base,
    gate_health,
    segments_of,
)

WEIGHTS = "adapter_model.safetensors"


def result_of(model):
    with model.base_model.use_gates(gate_inputs()):
        return outputs(model, **batch())


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapted_head_travels(tmp_path, kind):
    targets = ["q_proj", "lm_head"] if kind == "llama" else ["c_attn", "lm_head"]
    model = adapt(tiny(kind), target_modules=targets)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind), tmp_path)
    assert torch.equal(result_of(loaded), result_of(model))


@pytest.mark.parametrize("bias", ["ilora_only", "all"])
def test_missing_biases_are_missing(tmp_path, bias):
    adapt(tiny("gpt2"), bias=bias).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(".bias")}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterKeysError, match=r"missing \(.*bias"):
        PeftModel.from_pretrained(tiny("gpt2"), tmp_path)


@pytest.mark.parametrize("key", ["transformer.wpe.weight", "transformer.ln_f.modules_to_save.weight"])
def test_a_file_cannot_overwrite_other_parts_of_the_base(tmp_path, key):
    adapt(tiny("gpt2")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, f"base_model.model.{key}": torch.zeros(32, 16)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterKeysError, match=r"1 foreign"):
        PeftModel.from_pretrained(tiny("gpt2"), tmp_path)


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [({"alpha_pattern": {"zz": 2.0}}, ValueError), ({"target_modules": ["q_proj", "norm"]}, TypeError)],
)
def test_a_failed_injection_leaves_nothing_behind(tmp_path, options, error):
    base = tiny("llama")
    expected = outputs(base, **batch())
    with pytest.raises(error):
        get_peft_model(base, ILoraConfig(r=8, **options))
    assert not layers(base)
    model = adapt(base, trained=False)  # the corrected call
    assert torch.equal(result_of(model), expected)

    with pytest.raises(error):
        model.add_adapter("b", ILoraConfig(r=8, **options))
    assert model.active_adapters == ["default"]
    assert torch.equal(result_of(model), expected)
    model.add_adapter("b", ILoraConfig(r=8, target_modules=["q_proj"]))
    model.set_adapter("b")
    train(model, "b")
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "b")
    assert torch.equal(result_of(loaded), result_of(model))


def test_a_base_that_has_ilora_already_is_refused(tmp_path):
    base = tiny("llama")
    first = adapt(base)
    first.save_pretrained(tmp_path)
    expected = result_of(first)
    with pytest.raises(ValueError, match=r"q_proj' already belongs to another PeftModel with iLoRA.*unload"):
        get_peft_model(base, ILoraConfig(r=8))
    with pytest.raises(ValueError, match="already belongs"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(result_of(first), expected)


def test_pefts_refusals_of_other_methods_read_as_meant():
    with pytest.raises(ValueError, match="ILORA"):
        get_peft_model(tiny("llama"), ILoraConfig(r=8), mixed=True)
    assert adapt(tiny("llama")).get_model_status().peft_types == {"default": "ILORA"}


def test_adding_an_adapter_keeps_each_parameter_as_frozen_as_it_was():
    model = adapt(tiny("llama"), gate="mlp")
    model.base_model.ilora_gate["default"].down.bias.requires_grad_(False)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("b", ILoraConfig(r=8))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_frozen_base_does_not_thaw_modules_to_save(tmp_path):
    adapt(tiny("llama"), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with frozen_base(model):
        outputs(model, **batch())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": [("q_proj", 4)]}, "`rank_pattern` must be a dictionary"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` must be a list of names, got 'lm_head'"),
        ({"layers_to_transform": "0"}, "`layers_to_transform` must be a number or a list"),
        ({"gate_per_layer": "no"}, "`gate_per_layer` must be True or False, got 'no'"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ILoraConfig(**options)
    assert ILoraConfig(rank_pattern=None).rank_pattern == {}


# ---- holding ---------------------------------------------------------------------------------------------------------


def test_a_checkpointed_backward_under_gates_that_saw_no_forward_is_refused():
    """It would run the blocks again with the other gates: gradients of nothing that was computed."""
    model = adapt(tiny("llama")).train()
    model.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    with model.base_model.use_gates(gate_inputs()):
        loss = outputs(model, **batch()).sum()
    with (
        model.base_model.use_gates(gate_inputs(seed=9)),
        pytest.raises(GateError, match="forward pass ran under other gates"),
    ):
        loss.backward()
    with model.base_model.use_gates(gate_inputs()):
        outputs(model, **batch()).sum().backward()  # as it should be


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reentrant_checkpointing_of_trained_gates_is_refused_and_of_constant_gates_is_exact(kind):
    model = adapt(tiny(kind), target_modules=["q_proj", "lm_head"] if kind == "llama" else ["c_attn", "lm_head"])
    base, tuner = model.train().get_base_model(), model.base_model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    base.enable_input_require_grads()

    def gradients(gates, reentrant):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        with tuner.hold(gates):
            outputs(model, **batch()).sum().backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    gates = tuner.gate(gate_inputs())
    with pytest.raises(GateError, match=r"`use_reentrant=True` cannot train gates.*'use_reentrant': False"):
        gradients(gates, True)
    constant = gates.detach()
    found = gradients(constant, True)
    assert any("ilora_A" in name for name in found)
    torch.testing.assert_close(found, gradients(constant, False))
    assert any("ilora_gate" in name for name in gradients(tuner.gate(gate_inputs()), False))


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("names", [["default"] * 3, ["default", "__base__", "nobody"]])
def test_adapters_chosen_by_row_are_refused(names, task):
    """PEFT takes the argument out before the model is called: without a check it would be ignored."""
    model = adapt(tiny("llama"), task_type=task)
    calls = [lambda **given: model(**batch(), **given), lambda **given: model.base_model(**batch(), **given)]
    calls.append(lambda **given: model.generate(**batch(), max_new_tokens=1, **given))
    for call in calls:
        with (
            model.base_model.use_gates(gate_inputs()),
            pytest.raises(RowAdaptersError, match=r"`adapter_names` is .*set_adapter` with one of \['default'\]"),
        ):
            call(adapter_names=names)
    with model.base_model.use_gates(gate_inputs()), pytest.raises(RowAdaptersError, match="`alora_offsets` is given"):
        model(**batch(), alora_offsets=[1, 1, 1])
    assert torch.equal(result_of(model), result_of(model))


def test_without_an_active_adapter_there_are_no_gates_to_hold():
    model = adapt(tiny("llama"))
    model.delete_adapter("default")
    model.add_adapter("default", ILoraConfig(r=8))
    with pytest.raises(GateError, match=r"no adapter is active; call `set_adapter` with one of \['default'\]"):
        result_of(model)
    model.set_adapter("default")
    result_of(model)


def test_no_instances_at_all():
    tuner = adapt(tiny("llama")).base_model
    with tuner.hold(torch.ones(0, EXPERTS)), pytest.raises(GateError, match="gates cover 0 rows but the layer rec"):
        outputs(tuner.model, **batch())
    for segments in (torch.zeros(0, 6, dtype=torch.int64), torch.full((1, 6), -1)):
        with pytest.raises(GateError, match="`segments` must number"), tuner.hold(torch.ones(2, EXPERTS), segments):
            pass
    with pytest.raises(GateError, match=r"got shape \(2, 0\)"):
        segments_of(torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("given", [None, [[1.0, 0, 0, 0]], torch.ones(3, EXPERTS, dtype=torch.int64)])
def test_what_is_no_tensor_of_floats_is_refused(given):
    tuner = adapt(tiny("llama")).base_model
    for attempt in (tuner.use_gates, tuner.hold):
        with pytest.raises(GateError, match=r"float|tensor"), attempt(given):
            pass
    with pytest.raises(GateError, match=r"no adapter 'zz' to compute gates with; the adapters are \['default'\]"):
        tuner.gate(gate_inputs(), "zz")
    with pytest.raises(GateError, match="`segments` must be int64"), tuner.hold(torch.ones(1, EXPERTS), [[0, 0]]):
        pass


def test_gates_that_are_not_finite_are_not_measured_or_folded():
    gates = torch.full((3, EXPERTS), float("nan"))
    with pytest.raises(GateError, match="gates are not finite"):
        gate_health(gates)
    model = adapt(tiny("llama"))
    for bad in (gates[0], None, torch.tensor(1.0)):
        with pytest.raises(GateError, match=r"not finite|must be a tensor"):
            fold(model, bad)


def test_a_model_is_copied_and_pickled_without_the_batch_in_flight():
    model = adapt(tiny("llama"))
    with model.base_model.use_gates(gate_inputs()):
        expected = outputs(model, **batch())
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        assert not twin.base_model.slot.held
        assert torch.equal(result_of(twin), expected)


def test_folding_follows_the_layers_and_not_an_edited_configuration():
    model = adapt(tiny("llama"), alpha=5)
    config, _ = fold(model, torch.full((EXPERTS,), 0.25))
    model.peft_config["default"].alpha = 64
    assert fold(model, torch.full((EXPERTS,), 0.25))[0].lora_alpha == config.lora_alpha == 5


@pytest.mark.parametrize("shape", [(EXPERTS,), (1, EXPERTS), (14, EXPERTS), (1, 14, EXPERTS)])
def test_gates_per_layer_fold_in_every_shape_that_can_be_held(shape):
    model = adapt(tiny("llama"), gate_per_layer=True)
    _, tensors = fold(model, torch.full(shape, 0.25))
    assert len(tensors) == 28
