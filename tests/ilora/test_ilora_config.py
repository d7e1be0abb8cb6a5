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
        ({"rank_pattern": {"up": 6}}, r"`rank_pattern\['up'\]` is the total rank .* use rank_pattern\['up'\]=8"),
        ({"alpha_pattern": {"up": -1}}, r"`alpha_pattern\['up'\]` must be a positive finite number, got -1"),
        ({"gate_temperature": 0}, "`gate_temperature` must be a positive finite number, got 0"),
        ({"gate": "linear", "gate_top_k": 2}, "`gate_top_k` is only read by gate='topk' or 'topk_released', not by 'l"),
        ({"gate": "noisy", "gate_dropout": 0.5}, "`gate_dropout` is only read by gate='dropout', not by 'noisy'"),
        (
            {"gate": "topk", "gate_top_k": 5},
            r"`gate_top_k` must be a whole number from 1 to `num_experts` \(4\), got 5",
        ),
        ({"gate": "topk", "gate_top_k": 1}, "`gate_top_k` is 1: .* no gradient .*; use 2 or more"),
        ({"gate": "mlp", "gate_hidden_size": 0}, "`gate_hidden_size` must be a whole number of at least 1, got 0"),
        ({"gate": "noisy", "gate_noise": -1}, "`gate_noise` must be a finite number of at least 0, got -1"),
        ({"gate": "dropout", "gate_dropout": 1}, r"`gate_dropout` must be in \[0, 1\), got 1"),
        ({"bias": "lora_only"}, "`bias` must be one of 'none', 'all', 'ilora_only', got 'lora_only'"),
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
    assert ILoraConfig(r=8, num_experts=4, alpha=32).scale_of("any") == 4
    assert ILoraConfig(r=8, num_experts=4, alpha=32, scaling="per_expert").scale_of("any") == 16


def test_patterns_set_rank_and_alpha_of_layers():
    config = ILoraConfig(r=8, num_experts=4, rank_pattern={"q_proj": 4, r"layers\.1\..*": 12}, alpha_pattern={"up": 5})
    assert config.rank_of("model.layers.0.q_proj") == 4
    assert config.rank_of("model.layers.1.up") == 12
    assert config.rank_of("model.layers.0.up") == 8
    assert config.scale_of("model.layers.0.up") == 5 / 8
    assert config.unmatched_patterns(["model.layers.0.q_proj"]) == [
        r"rank_pattern['layers\\.1\\..*']",
        "alpha_pattern['up']",
    ]


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
        bias="ilora_only",
        rank_pattern={"q_proj": 6},
        alpha_pattern={"q_proj": 3.5},
        gate="topk",
        gate_input_size=5,
        gate_per_layer=True,
        gate_temperature=0.5,
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "ILORA"
    assert written["gate_top_k"] == 2  # the default of the kind, written out
    assert written["target_modules"] == ["a", "k_proj", "q_proj"]  # sorted: the same adapter writes the same file
    for cls in (ILoraConfig, PeftConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert loaded == config
        assert type(loaded) is ILoraConfig
