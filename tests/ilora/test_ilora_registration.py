"""PEFT knows the method, and the internals of PEFT that make it so have not moved."""

import ast
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ilora_helpers import adapt, tiny
from peft import mapping
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

import llm2rec.ilora
from llm2rec.ilora import ILoraConfig, ILoraModel, register

PACKAGE = Path(llm2rec.ilora.__file__).parent


def test_the_method_stands_in_pefts_tables():
    register()  # a second time
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["ILORA"] is ILoraConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["ILORA"] is ILoraModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["ILORA"] == "ilora_"
    assert list(mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values()).count("ilora_") == 1


@pytest.mark.parametrize(
    ("kind", "prefix", "message"), [("OTHER", "ilora_", "already uses the prefix"), ("ILORA", "x_", "another method")]
)
def test_a_name_or_prefix_that_is_taken_is_refused(monkeypatch, kind, prefix, message):
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_PREFIX_MAPPING, kind, prefix)
    with pytest.raises(RuntimeError, match=message):
        register()


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (BaseTuner, "_pre_injection_hook", ["self", "model", "config", "adapter_name"]),
        (BaseTuner, "_prepare_adapter_config", ["self", "peft_config", "model_config"]),
        (
            BaseTuner,
            "inject_adapter",
            ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
        ),
        (BaseTuner, "_replace_module", ["self", "parent", "child_name", "new_module", "child"]),
        (BaseTuner, "set_adapter", ["self", "adapter_name", "inference_mode"]),
        (BaseTuner, "set_requires_grad", ["self", "adapter_names", "requires_grad"]),
        (BaseTuner, "delete_adapter", ["self", "adapter_name"]),
        (BaseTuner, "merge_adapter", ["self", "adapter_names", "safe_merge"]),
        (BaseTuner, "_check_merge_allowed", ["self"]),
        (BaseTuner, "_get_learnable_bias_state_dict", ["model", "state_dict", "config"]),
        (BaseTuner, "_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
        (BaseTunerLayer, "enable_adapters", ["self", "enabled"]),
        (BaseTunerLayer, "set_adapter", ["self", "adapter_names", "inference_mode"]),
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", ["self", "adapter_name", "device"]),
    ],
)
def test_what_we_override_or_call_has_the_same_signature(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_the_flags_that_peft_reads_exist():
    assert isinstance(BaseTuner.uses_shared_state, bool)
    assert {"prefix", "tuner_layer_cls", "target_module_mapping"} <= set(BaseTuner.__annotations__)
    assert {"adapter_layer_names", "other_param_names", "_disable_adapters", "_active_adapter"} <= set(
        BaseTunerLayer.__annotations__
    )
    assert "_check_merge_allowed()" in inspect.getsource(BaseTuner._unload_and_optionally_merge)
    assert "_remap_adapter_state_dict_for_load" in inspect.getsource(
        sys.modules["peft.utils.save_and_load"].set_peft_model_state_dict
    )
    # Gates live on the tuner: PEFT has to look there when it saves.
    assert "BaseTuner" in inspect.getsource(tuners_utils._get_tuner_state_dict_key_prefixes)


def test_injecting_without_the_tuner_is_refused():
    from peft import inject_adapter_in_model

    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(ILoraConfig(), tiny("llama"))


@pytest.mark.slow
def test_an_unregistered_process_fails_and_neither_bitsandbytes_nor_deepspeed_is_needed(tmp_path):
    """One process, because importing PEFT takes seconds."""
    adapt(tiny("llama")).save_pretrained(tmp_path)
    program = f"""
        import sys

        class Absent:  # what a machine without these libraries does
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("bitsandbytes", "deepspeed", "hydra", "omegaconf"):
                    raise ModuleNotFoundError(name)

        import importlib.util
        find_spec = importlib.util.find_spec
        hidden = ("bitsandbytes", "deepspeed")
        importlib.util.find_spec = lambda name, *rest: None if name in hidden else find_spec(name, *rest)
        sys.meta_path.insert(0, Absent())
        sys.path[:0] = {[str(Path(__file__).parent), str(PACKAGE.parents[1])]!r}

        from peft import PeftModel
        from transformers import LlamaConfig, LlamaForCausalLM
        config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1)
        try:
            PeftModel.from_pretrained(LlamaForCausalLM(config), {str(tmp_path)!r})
        except KeyError as error:
            assert "ILORA" in str(error), error
        else:
            raise SystemExit("an unregistered process loaded the adapter")

        import llm2rec.ilora
        model = PeftModel.from_pretrained(LlamaForCausalLM(config), {str(tmp_path)!r})
        assert type(model.base_model).__name__ == "ILoraModel"
        assert not {{"bitsandbytes", "deepspeed", "hydra", "omegaconf"}} & set(sys.modules)
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "done"


def test_the_package_imports_nothing_else_of_ours():
    allowed = {
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "math",
        "peft",
        "statistics",
        "torch",
        "transformers",
        "typing",
        "warnings",
    }
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.module or "").partition(".")[0] in allowed, (file, node.module)
