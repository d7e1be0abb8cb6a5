import json

import pytest
from peft import PeftConfig

from llm2rec.ilora import ILoraConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 10, "num_experts": 4}, r"multiple of `num_experts`, got r=10 with 4 experts; use r=12"),
        ({"r": 0}, r"`r` must be a whole number of at least 1, got 0"),
        ({"r": 8.0}, r"`r` must be a whole number of at least 1, got 8.0"),
        ({"num_experts": True}, "`num_experts` must be a whole number"),
        ({"gate_input_size": 0}, "`gate_input_size` must be a whole number"),
        ({"alpha": 0}, "`alpha` must be a positive finite number, got 0"),
        ({"alpha": float("inf")}, "`alpha` must be a positive finite number"),
        ({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"scaling": "paper"}, "`scaling` must be one of 'total', 'per_expert', got 'paper'"),
        ({"gate": "mlp2"}, "`gate` must be one of .*, got 'mlp2'"),
        ({"bias": "all"}, "`bias` must be one of 'none', got 'all'"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "works with a list of `target_modules`"),
        ({"layers_pattern": "layers"}, "only read with `layers_to_transform`"),
    ],
)
def test_impossible_values_are_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        ILoraConfig(**options)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"`r` is the total rank.*`alpha`.*`scaling`"):
        ILoraConfig(r=9, alpha=-1, scaling="x")


def test_scale_follows_the_paper_or_the_released_code():
    assert ILoraConfig(r=8, num_experts=4, alpha=32).scale == 4
    assert ILoraConfig(r=8, num_experts=4, alpha=32, scaling="per_expert").scale == 16


def test_save_and_load_give_the_same_configuration(tmp_path):
    config = ILoraConfig(
        r=12,
        num_experts=3,
        alpha=7,
        dropout=0.1,
        scaling="per_expert",
        target_modules=["q_proj", "a", "k_proj"],
        exclude_modules=["z", "b"],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
        modules_to_save=["head"],
        gate_input_size=5,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "ILORA"
    assert written["target_modules"] == ["a", "k_proj", "q_proj"]  # sorted: the same adapter writes the same file
    for cls in (ILoraConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded == config
        assert type(loaded) is ILoraConfig
