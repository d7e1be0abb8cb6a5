"""A dry run of one training row: refuses adapters that no forward pass uses before the first step."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, cast

import torch
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llm2rec.core.errors import ConfigError, Llm2RecError
from llm2rec.core.seed import random_state
from llm2rec.core.train.checkpoint import trained_buffers
from llm2rec.ilora import ILoraLinear

__all__ = ["check_trained_tensors"]

_MAX_NAMED = 4  # layers in an error message
_N_ROWS = 2  # in the pass that counts rows; what a batch shares, such as positions, has 1


class _Calls(NamedTuple):
    """What a forward pass does with the adapted layers.

    Attributes:
        rows: Numbers of rows that a layer reads, for each layer that is called.
        several: Layers that return several tensors.
    """

    rows: dict[str, set[int]]
    several: set[str]


def check_trained_tensors(
    model: nn.Module, loss: Callable[[int], AbstractContextManager[Tensor]], model_type: str, n_processes: int = 1
) -> None:
    """Run one row forward and backward and raise unless every trained tensor takes part; the model stays as it was.

    Layers whose weights a model reads without calling them (Mamba's ``dt_proj``), or that only other inputs reach (the
    pooler of BERT, a vision tower), would keep their initial adapters; on several processes DDP would wait for their
    gradients. Weights, running statistics, gradients and random generators are restored.

    An expert that the row is not routed to has no gradient either: that is refused on several processes only.

    Args:
        model: The teacher, not wrapped.
        loss: Computes the loss of so many copies of one row, a scalar; the context lasts until the backward pass is
            done, with the gates.
        model_type: The language model's type, for messages.
        n_processes: Processes of the launch.

    Raises:
        ConfigError: If a trained tensor gets no gradient, evaluation skips an adapted layer, a layer of iLoRA reads
            something else than the batch's rows, an adapted layer returns several tensors, or the model fails.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    try:
        with _restored(model), _readable(model_type):
            calls = _calls(model.eval(), loss)
            _check_calls(model, calls, model_type)
            model.train()
            with loss(1) as value:
                value.backward()
            unused = {name for name, each in trained.items() if each.grad is None}
    except (MemoryError, torch.OutOfMemoryError):  # the first step reports it, or retries with smaller micro-batches
        return
    finally:
        for each in trained.values():
            each.grad = None
    adapted = {layer for name in trained if (layer := _layer_of(name)) is not None}
    layers = {layer for layer in adapted if layer not in calls.rows} | {_layer_of(name) for name in unused} - {None}
    other = sorted(name for name in unused if _layer_of(name) is None)
    if n_processes == 1:
        routed = {_expert_pattern(layer) for layer in adapted - layers}
        layers = {layer for layer in layers if layer is not None and _expert_pattern(layer) not in routed}
    if layers:
        raise ConfigError(
            f"no forward pass of a language model of type {model_type!r} uses {_adapters_of(layers, adapted)}."
        )
    if other:
        raise ConfigError(
            f"no forward pass of a language model of type {model_type!r} uses these trained tensors: {_listed(other)}."
        )


def _calls(model: nn.Module, loss: Callable[[int], AbstractContextManager[Tensor]]) -> _Calls:
    """Calls of adapted layers by a forward pass in evaluation, where models may take other paths.

    Adapters are off meanwhile: one that reads another number of rows would raise.
    """
    calls, handles = _Calls({}, set()), []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    enabled = [layer for layer in layers.values() if not layer.disable_adapters]

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def noted(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            calls.rows.setdefault(name, set()).add(len(inputs[0]) if inputs else _N_ROWS)
            if not isinstance(output, Tensor) and not isinstance(layers[name], ParamWrapper):  # adds to a weight
                calls.several.add(name)

        return noted

    for name, layer in layers.items():
        handles.append(cast(nn.Module, layer).register_forward_hook(note(name)))
    try:
        for layer in enabled:
            layer._disable_adapters = True
        with torch.no_grad(), loss(_N_ROWS):
            pass
    finally:
        for layer in enabled:
            layer._disable_adapters = False
        for handle in handles:
            handle.remove()
    return calls


def _check_calls(model: nn.Module, calls: _Calls, model_type: str) -> None:
    """Raise for layers that return several tensors, and layers of iLoRA that read something else than rows."""
    gated = {name for name in calls.rows if isinstance(model.get_submodule(name), ILoraLinear)}
    wrong = {name for name in gated if calls.rows[name] != {_N_ROWS}}
    if calls.several:
        raise ConfigError(
            f"a language model of type {model_type!r} has layers that cannot be adapted, since they return several "
            f"tensors (a router){' or read tokens instead of rows' if wrong else ''}: "
            f"{_adapters_of(wrong | calls.several, calls.rows, what='')}."
        )
    if wrong:
        shared = any(n == 1 for name in wrong for n in calls.rows[name])
        why = "applies layers to " + ("positions that all rows share" if shared else "(B, T, d) flattened to (B*T, d)")
        raise ConfigError(
            f"a language model of type {model_type!r} {why}, which leaves the gates of a token unknown: "
            f"{_adapters_of(wrong, calls.rows, what='')}; `teacher.tuning=lora` adapts them."
        )


def _adapters_of(layers: Collection[str | None], adapted: Iterable[str], what: str = "the adapters of ") -> str:
    """Names layers among the adapted ones, and says how to leave them out."""
    names = sorted(_plain(layer) for layer in layers if layer is not None)
    return (
        f"{what}{_listed(names)} ({len(names)} in all); leave them out with `teacher.adapter.exclude_modules="
        f"{exclusion(names, [_plain(layer) for layer in adapted if layer not in layers])}`"
    )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore modes, running statistics and random generators on leaving."""
    restore = random_state()
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in trained_buffers(model).values()]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)
        restore()


@contextmanager
def _readable(model_type: str) -> Iterator[None]:
    """Convert errors of a model's own code into ours."""
    try:
        yield
    except (Llm2RecError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any class
        why = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"a language model of type {model_type!r} fails on the first training row with {type(error).__name__}: "
            f"{why}; adapt other layers (`teacher.adapter.target_modules`), or use another `llm`."
        ) from error


def _layer_of(tensor: str) -> str | None:
    """Name of the adapted layer that a tensor of an adapter belongs to; None for other tensors."""
    found = re.match(r"(.+)\.(?:ilora_[AB]|ilora_gate|lora_[A-Za-z_]+)\.", tensor)
    return None if found is None or (".ilora_gate." in tensor and _is_shared_gate(tensor)) else found[1]


def _is_shared_gate(tensor: str) -> bool:
    return tensor.split(".ilora_gate.")[0].endswith("llm.base_model")


def _expert_pattern(layer: str) -> str:
    """The layer's name, the same for all experts of one mixture."""
    return re.sub(r"(experts?)\.\d+(?=\.|$)", r"\1.*", layer)


def _plain(layer: str) -> str:
    """The layer's name in the language model."""
    return layer.removeprefix("llm.").removeprefix("base_model.model.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")


def exclusion(unused: Sequence[str], used: Sequence[str]) -> str:
    """A short value of ``exclude_modules`` that leaves out ``unused`` layers and keeps ``used`` ones.

    A list of last names where no used layer shares them, such as ``[dt_proj]``; else an expression of the outermost
    modules without used layers, such as ``'model.vision_tower.*'``; else a list of full names.
    """
    last = {name.rpartition(".")[2] for name in unused}
    if last.isdisjoint(name.rpartition(".")[2] for name in used):
        return f"[{','.join(sorted(last))}]"
    roots = set()
    for name in unused:
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        roots.add(next(each for each in prefixes if not any(f"{layer}.".startswith(f"{each}.") for layer in used)))
    expression = "|".join(f"{root}.*" for root in sorted(roots))
    if not any(re.fullmatch(expression, layer) for layer in used):
        return f"'{expression}'"
    return f"[{','.join(unused)}]"
