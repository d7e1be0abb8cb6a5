"""Which layers of a model are adapted."""

import pytest
import torch
from ilora_helpers import WIDTH, adapt, batch, gate_inputs, layers, tiny
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from llm2rec.ilora import DEFAULT_TARGET_MODULES, GateError, ILoraConfig


def sizes_of(model_type):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 32}
    sizes |= {"head_dim": 8, "ffn_dim": 24, "word_embed_proj_dim": 16, "n_positions": 32}
    # In their own words, where `hidden_size` is only another name for reading.
    sizes |= {"distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}}.get(model_type, {})
    return sizes


@pytest.mark.parametrize("model_type", sorted(DEFAULT_TARGET_MODULES))
def test_default_targets_are_all_linear_layers_of_the_blocks(model_type):
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes_of(model_type)))
        linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        in_blocks = {name for name in linear if any(part.isdigit() for part in name.split("."))}
        if model_type == "opt":  # see DEFAULT_TARGET_MODULES
            in_blocks = {name for name in in_blocks if not name.endswith(("fc1", "fc2"))}
        model = get_peft_model(base, ILoraConfig())
    assert in_blocks
    assert set(model.base_model.targeted_module_names) == in_blocks
    assert model.peft_config["default"].gate_input_size == 16


def test_opt_feed_forward_layers_flatten_the_batch_and_are_refused_loudly():
    """Why the default leaves fc1 and fc2 out; when transformers stops flattening, they should come in."""
    base = AutoModel.from_config(AutoConfig.for_model("opt", **sizes_of("opt"))).eval()
    model = adapt(base, target_modules=["fc1"])
    with (
        model.base_model.use_gates(gate_inputs()),
        pytest.raises(GateError, match=r"flattens \(B, T, d\).*exclude"),
    ):
        model(**batch())


def test_all_linear_leaves_only_the_head():
    base = tiny("llama")
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    model = adapt(base, target_modules="all-linear")
    assert set(model.base_model.targeted_module_names) == linear - {"lm_head"}


def test_blocks_exclusions_and_expressions_choose_layers():
    def names(**options):
        return set(adapt(tiny("llama"), **options).base_model.targeted_module_names)

    queries = {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
    assert names(target_modules=["q_proj"]) == queries
    assert names(target_modules=["q_proj"], layers_to_transform=[1]) == {"model.layers.1.self_attn.q_proj"}
    assert names(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers") == {
        "model.layers.1.self_attn.q_proj"
    }
    assert names(target_modules=r".*layers\.0.*q_proj") == {"model.layers.0.self_attn.q_proj"}
    assert names(exclude_modules=["mlp.down_proj"]) == names() - {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["q_prj"]}, ValueError, "q_prj.* not found in the base model"),
        ({"target_modules": ["embed_tokens"]}, TypeError, "'model.embed_tokens': iLoRA adapts linear.* got Embedding"),
    ],
)
def test_wrong_target_modules_are_named(options, error, message):
    with pytest.raises(error, match=message):
        adapt(tiny("llama"), **options)


def test_a_model_without_default_must_be_told():
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x)

    with pytest.raises(ValueError, match=r"no default `target_modules` for model type .*'all-linear'"):
        adapt(Unknown(), gate_input_size=3)
    with pytest.raises(ValueError, match=r"`gate_input_size` is None and Unknown has no `config.hidden_size`"):
        adapt(Unknown(), target_modules=["lin"])
    model = adapt(Unknown(), target_modules=["lin"], gate_input_size=3)
    with model.base_model.use_gates(gate_inputs(2, 3)):
        assert model(torch.zeros(2, 4)).shape == (2, 4)


class Encoder(nn.Module):
    """One encoder layer of torch, which in evaluation reads the weights of its linear layers and does not call them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.layer(x))


@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_layers_under_a_fast_path_are_refused(target):
    with pytest.raises(ValueError, match=rf"layer 'layer.{target}' cannot be adapted: the fast path of .*exclude_mod"):
        adapt(Encoder(), target_modules=[target, "head"], gate_input_size=WIDTH)
    assert layers(adapt(Encoder(), target_modules=["head"], gate_input_size=WIDTH))


def test_layers_that_peft_excludes_for_lora_are_refused():
    base = AutoModel.from_config(AutoConfig.for_model("mamba", hidden_size=16, state_size=4, num_hidden_layers=1))
    with pytest.raises(ValueError, match="layer 'out_proj' cannot be adapted: MambaModel may read its weight"):
        adapt(base, target_modules="all-linear")
    adapted = adapt(base, target_modules="all-linear", exclude_modules=["out_proj"])
    assert not any(name.endswith("out_proj") for name in adapted.base_model.targeted_module_names)
