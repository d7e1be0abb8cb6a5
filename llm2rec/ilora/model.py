"""The tuner: injects adapted layers, owns the gate networks and the slot, and checks adapter files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .config import DEFAULT_TARGET_MODULES, ILoraConfig, hidden_size
from .errors import GateError, not_called, refuse_merge, refuse_row_adapters
from .gate import build_gate
from .keys import PREFIX, check_keys
from .layer import ILoraLinear, check_parent
from .slot import GateSlot, check_segments

__all__ = ["ILoraModel"]


class ILoraModel(BaseTuner):
    """A model with iLoRA adapters, as ``get_peft_model(model, ILoraConfig(...)).base_model``.

    One gate network per adapter is shared by all its layers, or every layer has its own (`gate_per_layer`). Gates are
    computed once per batch and held while the forward and backward passes run, or while text is generated::

        with peft_model.base_model.use_gates(gate_input):  # gate_input: (B, d)
            loss = peft_model(**batch).loss
            loss.backward()

    One batch at a time: threads that share a model must take turns.

    Gates of an adapter with ``gate_per_layer`` have shape ``(B, G, E)``, its G layers in the order of the model; all
    others ``(B, E)``.
    """

    prefix = PREFIX
    tuner_layer_cls = ILoraLinear
    target_module_mapping = DEFAULT_TARGET_MODULES
    # Gate networks live in the tuner, not in the layers, so PEFT must not inject layers without wrapping the model.
    uses_shared_state = True

    ilora_gate: nn.ModuleDict
    slot: GateSlot
    _adapted: dict[str, list[ILoraLinear]]  # per adapter its layers, in the order of the model

    # ---- gates ---------------------------------------------------------------------------------------------------

    def gate(self, gate_input: Tensor, adapter: str | None = None) -> Tensor:
        """Compute the gates of a batch with an adapter's gate network.

        Args:
            gate_input: One vector per instance, shape ``(B, d)``.
            adapter: Name of the adapter; None for the active one.

        Returns:
            Gates of shape ``(B, E)`` (``(B, G, E)`` with a gate per layer), rows summing to 1, float32, differentiable
            with respect to the network's weights.

        Raises:
            GateError: If the shape does not fit, or ``adapter`` is None while several adapters are active.
        """
        if adapter is None:
            adapter = self._only_active_adapter()
        if adapter not in self._adapted:
            raise GateError(f"no adapter {adapter!r} to compute gates with; the adapters are {sorted(self._adapted)}.")
        if not self._has_gate_per_layer(adapter):
            return cast(Tensor, self.ilora_gate[adapter](gate_input))
        return torch.stack([layer.ilora_gate[adapter](gate_input) for layer in self._adapted[adapter]], dim=1)

    @contextmanager
    def hold(self, gates: Tensor | Mapping[str, Tensor], segments: Tensor | None = None) -> Iterator[None]:
        """Hold gates while forward AND backward of one batch run.

        Args:
            gates: Shape ``(B, E)`` for the active adapter, or a mapping from adapter names to such tensors if several
                adapters are active. With a gate per layer ``(B, G, E)``, or ``(B, E)`` for all layers.
            segments: For rows that pack several instances: row of ``gates`` of each token, -1 for none, shape
                ``(B, T)``, int64; see `segments_of`. ``gates`` then has a row per instance, not per row of the batch.

        With (non-reentrant) gradient checkpointing, blocks are recomputed in the backward pass with the gates held
        then. Two batches whose losses are added must therefore be one batch, held once: a backward pass under the
        second batch's gates would recompute the first one's blocks with them.

        Yields:
            Nothing.

        Raises:
            GateError: If gates are already held, or their shape or the segments do not fit.
        """
        if not isinstance(gates, Tensor | Mapping):
            raise GateError(f"gates must be a tensor or a mapping from adapter names to tensors, got {type(gates)}.")
        named = {self._only_active_adapter(): gates} if isinstance(gates, Tensor) else dict(gates)
        for adapter, held in named.items():
            self.check_gates(adapter, held)
            check_segments(segments, len(held))
        with self.slot.hold(named, segments):
            yield

    @contextmanager
    def use_gates(self, gate_input: Tensor, segments: Tensor | None = None) -> Iterator[Tensor | dict[str, Tensor]]:
        """Compute the gates of a batch and hold them while forward AND backward run.

        Args:
            gate_input: One vector per instance, shape ``(B, d)``.
            segments: Instance of each token, for rows that pack several; see `hold`.

        Yields:
            The gates, shape ``(B, E)`` or ``(B, G, E)``; a dictionary by adapter name if several adapters are active.

        Raises:
            GateError: If gates are already held, or the shape does not fit.
        """
        if not self.active_adapters:
            raise GateError(f"no adapter is active; call `set_adapter` with one of {sorted(self._adapted)}.")
        gates = {adapter: self.gate(gate_input, adapter) for adapter in self.active_adapters}
        with self.hold(gates, segments):
            yield next(iter(gates.values())) if len(gates) == 1 else gates

    @property
    def last_gates(self) -> Tensor:
        """Gates of the current or last batch, without gradient, for inspection.

        Raises:
            GateError: If several adapters are active (see ``slot.last``), or none were held yet.
        """
        adapter = self._only_active_adapter()
        if adapter not in self.slot.last:
            raise GateError(f"no gates were held for adapter {adapter!r} yet; run a batch inside `use_gates` first.")
        return self.slot.last[adapter]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate text with the held gates, one row of gates per prompt.

        Beam search and several returned sequences repeat every prompt; only here do the layers repeat the gates too.

        Args:
            *args: Passed to the model's ``generate``.
            **kwargs: Passed to the model's ``generate``.

        Returns:
            What the model's ``generate`` returns.

        Raises:
            GateError: If the number of held gates differs from the number of prompts.
        """
        model = cast(Any, self.model)
        names = ("inputs", model.main_input_name, "input_ids", "inputs_embeds")
        given = [*args[:1], *map(kwargs.get, names), *(kwargs.get("encoder_outputs") or ())[:1]]
        n_prompts = next((len(prompts) for prompts in given if prompts is not None), 1)  # 1: only a BOS token
        with self.slot.repeating(n_prompts):
            return model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around forward and generate, before it drops the arguments of other methods.

        Raises:
            RowAdaptersError: If adapters are chosen by row, or offsets of aLoRA are given.
        """
        refuse_row_adapters(kwargs, sorted(self._adapted))
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; raises `RowAdaptersError` if adapters are chosen by row."""
        with self._enable_peft_forward_hooks(**kwargs):
            return super().forward(*args, **kwargs)

    def _only_active_adapter(self) -> str:
        active = self.active_adapters
        if len(active) != 1:
            raise GateError(f"{len(active)} adapters are active ({active}); name one, or hold gates by adapter name.")
        return active[0]

    def adapted_layers(self, adapter: str) -> list[ILoraLinear]:
        """Layers of an adapter, in the order of the model (and of gates per layer)."""
        return self._adapted[adapter]

    def check_gates(self, adapter: str, gates: Tensor) -> None:
        """Raise if gates do not fit an adapter.

        Raises:
            GateError: If there is no such adapter, or the gates have another shape or no float dtype.
        """
        if adapter not in self._adapted:
            raise GateError(f"gates given for adapter {adapter!r}; the adapters are {sorted(self._adapted)}.")
        experts = cast(ILoraConfig, self.peft_config[adapter]).num_experts
        shapes = [f"(B, {experts})"]
        fits = gates.ndim == 2 and gates.shape[1] == experts
        if self._has_gate_per_layer(adapter):
            n_layers = len(self._adapted[adapter])
            shapes.append(f"(B, {n_layers}, {experts})")
            fits = fits or gates.shape[1:] == (n_layers, experts)
        if not fits or not gates.is_floating_point():
            raise GateError(
                f"gates of adapter {adapter!r} must be floats of shape {' or '.join(shapes)}, one row per instance, "
                f"got {gates.dtype} of shape {tuple(gates.shape)}."
            )

    def _has_gate_per_layer(self, adapter: str) -> bool:
        return cast(ILoraConfig, self.peft_config[adapter]).gate_per_layer

    # ---- building ------------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.slot = GateSlot()
        self.ilora_gate = nn.ModuleDict()
        self._adapted = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(ILoraConfig, peft_config)
        model_type = model_config.get("model_type")
        if config.target_modules is None and model_type not in DEFAULT_TARGET_MODULES:
            raise ValueError(
                f"no default `target_modules` for model type {model_type!r} (known: {sorted(DEFAULT_TARGET_MODULES)}); "
                "name the layers to adapt, or use target_modules='all-linear'."
            )
        if config.gate_input_size is None:
            # Set in the configuration, so that it is saved with the adapter.
            config.gate_input_size = hidden_size(self.model)
        return super()._prepare_adapter_config(config, model_config)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter: its layers (by PEFT) and its gate network.

        Args:
            model: The base model.
            adapter_name: Name of the new adapter; its configuration is in ``self.peft_config``.
            autocast_adapter_dtype: As in PEFT.
            low_cpu_mem_usage: Build on the meta device, for loading from a file.
            state_dict: As in PEFT.

        Raises:
            ValueError: If no layer matches, or the width of the gate's input is unknown.
            TypeError: If a matching layer is not linear.
        """
        # Adding an adapter must not freeze or unfreeze another one; PEFT ensures that for the layers.
        trained = {parameter: parameter.requires_grad for parameter in self.ilora_gate.parameters()}
        config = cast(ILoraConfig, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if unmatched := config.unmatched_patterns(self.targeted_module_names):
                raise ValueError(
                    f"no adapted layer matches {', '.join(unmatched)}; the adapted layers are "
                    f"{', '.join(self.targeted_module_names[:5])}, ... Correct the pattern, or `target_modules`."
                )
        except (TypeError, ValueError):
            self._remove_partial(adapter_name)  # so that a corrected call works
            raise
        layers = [
            layer for layer in model.modules() if isinstance(layer, ILoraLinear) and adapter_name in layer.ilora_A
        ]
        self._adapted[adapter_name] = layers
        for number, layer in enumerate(layers):
            if config.gate_per_layer:
                layer.layouts[adapter_name] = layer.layouts[adapter_name]._replace(gate=number)
            self.slot.register(adapter_name, layer.layouts[adapter_name])
        if not config.gate_per_layer:
            device = next(layers[0].ilora_A[adapter_name].parameters()).device
            # Initialised on the CPU, then moved: the same seed gives the same gate on every device.
            gate = build_gate(config).to("meta" if low_cpu_mem_usage else device)
            self.ilora_gate[adapter_name] = gate
            gate.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)

    def _remove_partial(self, adapter: str) -> None:
        """Undo a partial injection."""
        for name, layer in [each for each in self.model.named_modules() if isinstance(each[1], ILoraLinear)]:
            if not layer.finds_gates_in(self.slot):
                continue  # another PeftModel's
            if adapter in layer.ilora_A:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about deleting the active adapter
                    layer.delete_adapter(adapter)
            if not layer.ilora_A:
                self.model.set_submodule(name, layer.base_layer)

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Refuse what PEFT refuses for LoRA, such as the ``out_proj`` of Mamba; the name is PEFT's.

        Raises:
            ValueError: If the architecture reads the layer's weight without calling the layer.
        """
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError as error:
            raise not_called(target_name, type(model).__name__) from error

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(ILoraConfig, peft_config)
        if isinstance(target, ILoraLinear):
            if not target.finds_gates_in(self.slot):
                raise ValueError(
                    f"layer {current_key!r} already belongs to another PeftModel with iLoRA; use its `add_adapter` or "
                    "`load_adapter`, or remove its adapters first with `unload()`."
                )
            target.update_layer(adapter_name, config)
            return
        check_parent(parent, current_key)
        try:
            layer = ILoraLinear(target, current_key, adapter_name, config, self.slot)
        except TypeError as error:
            raise TypeError(f"layer {current_key!r}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    # ---- life cycle ----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter(s) and train only those (none of them with ``inference_mode``).

        Args:
            adapter_name: Name or names.
            inference_mode: Freeze them.
        """
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, gate in self.ilora_gate.items():
            gate.requires_grad_(name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze adapters, including their gate networks.

        Args:
            adapter_names: Name or names.
            requires_grad: Whether they are trained.
        """
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.ilora_gate:
                self.ilora_gate[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, including its gate network.

        Args:
            adapter_name: Its name.

        Raises:
            ValueError: If there is none of that name.
        """
        super().delete_adapter(adapter_name)
        del self._adapted[adapter_name]
        if adapter_name in self.ilora_gate:
            del self.ilora_gate[adapter_name]
        self.slot.forget(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Not supported.

        Raises:
            MergeError: Always: a mixture that differs between instances has no single weight.
        """
        refuse_merge()

    def _check_merge_allowed(self) -> None:
        refuse_merge()

    # ---- saving and loading --------------------------------------------------------------------------------------

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a file's keys to the model's, and raise unless the file holds exactly this adapter.

        PEFT ignores unknown keys, and leaves random values for missing keys with at most a warning.

        Raises:
            AdapterKeysError: If tensors are missing or foreign.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
        check_keys(remapped.keys(), model, adapter_name, biases.keys())
        return remapped
