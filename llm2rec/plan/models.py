"""The teacher on the meta device: sizes of its parts, and peak memory of a step."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from llm2rec.core.errors import ConfigError
from llm2rec.ilora import ILoraModel
from llm2rec.plan.measure import ATTENTION, CPU_ATTENTION, MemoryMeter, forward_peaks, step_peaks
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.factory import adapter_config, with_adapter
from llm2rec.teacher.heads import build_head
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.injection import ItemProjector
from llm2rec.teacher.llm import locate
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import LLMSettings, ShapeSettings, TeacherSettings

__all__ = ["PlannedTeacher", "Sizes", "TeacherShape", "config_of_shape", "measured_teacher", "model_config"]

_SHALLOW = (2, 3)  # layers of the models from which a uniform deep one is extrapolated
_BLOCK = 64  # weights that share a constant in bitsandbytes' 4-bit format


@dataclass(frozen=True)
class TeacherShape:
    """Everything that a teacher's sizes depend on.

    Attributes:
        config: The language model's configuration.
        settings: The teacher's settings.
        precision: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        pooling: How token states become one vector.
        n_items: Items of the catalogue, N.
        history_length: Items of a history, L.
        student_width: Width of the borrowed student, where one is used.
        on_cpu: Whether it runs on a CPU, which multiplies quantised weights in float32.
    """

    config: PretrainedConfig
    settings: TeacherSettings
    precision: str
    pooling: str
    n_items: int
    history_length: int
    student_width: int
    on_cpu: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Number format of activations."""
        quantised_on_cpu = self.on_cpu and self.precision in ("int8", "int4")
        return torch.float32 if self.precision == "float32" or quantised_on_cpu else torch.bfloat16

    @property
    def width(self) -> int:
        """Width of the language model, d."""
        return int(self.config.get_text_config().hidden_size)

    @property
    def n_layers(self) -> int:
        """Layers of the language model."""
        return int(self.config.get_text_config().num_hidden_layers)

    def with_layers(self, n_layers: int) -> "TeacherShape":
        """The same shape with fewer layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:n_layers]
        return replace(self, config=config)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a teacher's parts.

    Attributes:
        frozen_parameters: Weights of the frozen language model.
        multiplied_parameters: Those without the embedding table, which is looked up.
        frozen_bytes: Bytes of frozen weights: ``quantised``, their ``constants``, and ``whole`` numbers.
        trained_parameters: Weights of adapter, gate, projector and head.
        item_bytes: Title vectors, biases and student item vectors on each GPU: buffers, which no launch shards.
        largest_product: Rows and columns of the largest quantised matrix; zeros without any.
        block_bytes: Frozen bytes inside transformer blocks, which FSDP2 shards.
        largest_block_bytes: Those of one block.
    """

    frozen_parameters: int
    multiplied_parameters: int
    frozen_bytes: dict[str, int]
    trained_parameters: int
    item_bytes: int
    largest_product: tuple[int, int]
    block_bytes: int
    largest_block_bytes: int


class PlannedTeacher:
    """A teacher on the meta device.

    Steps are planned for text prompts: vectors injected into hybrid prompts are left out, the projector's weights are
    counted.

    Args:
        shape: The teacher's shape.
    """

    def __init__(self, shape: TeacherShape) -> None:
        self.shape = shape
        settings = shape.settings
        self.is_title = settings.objective == "title"
        kind: Any = AutoModelForCausalLM if self.is_title else AutoModel
        with torch.device("meta"):
            attention = CPU_ATTENTION if shape.on_cpu else ATTENTION
            base = kind.from_config(copy.deepcopy(shape.config), dtype=shape.dtype, attn_implementation=attention)
            self.base = cast(PreTrainedModel, base.requires_grad_(False))
            self.quantised = self._quantised() if shape.precision in ("int8", "int4") else {}
            gate_width = shape.student_width if settings.gate_input == "sequence" else None
            adapter = adapter_config(settings, gate_width)
            self.llm = self.base if adapter is None else with_adapter(self.base, adapter)
            self.llm.register_forward_hook(_mark)
            self.gate_width = gate_width or shape.width
            self.model = self._with_items()

    def _quantised(self) -> dict[int, nn.Linear]:
        """Layers that bitsandbytes quantises, by the identity of their weights."""
        whole = tuple(get_keys_to_not_convert(self.base))
        return {
            id(layer.weight): layer
            for name, layer in self.base.named_modules()
            if isinstance(layer, nn.Linear) and not any(name == key or name.startswith(f"{key}.") for key in whole)
        }

    def _with_items(self) -> nn.Module:
        shape, settings = self.shape, self.shape.settings
        vectors, bias = torch.empty(shape.n_items, shape.width), torch.empty(shape.n_items)
        items = torch.empty(shape.n_items, shape.student_width)
        projector = ItemProjector(items, shape.width, 1.0) if settings.prompts == "hybrid" else None
        if self.is_title:
            parts: dict[str, nn.Module] = {"llm": self.llm}
            return nn.ModuleDict(
                parts | ({} if projector is None else {"projector": projector})
            )  # titles stay on the host
        return ItemTeacher(
            self.llm,
            cast(PromptBuilder, None),  # prompts are not built here
            pooling=shape.pooling,
            head=build_head(settings.head, vectors, bias, settings.logit_scale, items),
            exclude_history=settings.exclude_history is not False,
            projector=projector,
        )

    @property
    def sizes(self) -> Sizes:
        """Sizes by arithmetic."""
        trained = [each for each in self.model.parameters() if each.requires_grad]
        frozen = [each for each in self.model.parameters() if not each.requires_grad]
        packed = [each for each in frozen if id(each) in self.quantised]
        n_packed, n_rows = sum(each.numel() for each in packed), sum(len(each) for each in packed)
        eight = self.shape.precision == "int8"
        classes = self.base._no_split_modules or ()
        looked_up = cast(Tensor, self.base.get_input_embeddings().weight)
        blocks = [
            sum(each.nbytes for each in block.parameters() if not each.requires_grad)
            for block in self.base.modules()
            if type(block).__name__ in classes
        ]
        return Sizes(
            frozen_parameters=sum(each.numel() for each in frozen),
            multiplied_parameters=sum(each.numel() for each in frozen) - looked_up.numel(),
            frozen_bytes={
                "quantised": n_packed if eight else -(-n_packed // 2),
                "constants": 4 * n_rows if eight else 4 * sum(-(-each.numel() // _BLOCK) for each in packed),
                "whole": sum(each.nbytes for each in frozen if id(each) not in self.quantised),
            },
            trained_parameters=sum(each.numel() for each in trained),
            item_bytes=sum(each.nbytes for name, each in self.model.named_buffers() if not name.startswith("llm.")),
            largest_product=max(((each.shape[0], each.shape[1]) for each in packed), key=lambda s: s[0] * s[1])
            if packed
            else (0, 0),
            block_bytes=sum(blocks),
            largest_block_bytes=max(blocks, default=0),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have the same shapes, trained parameters and kind of attention."""
        layers = defaultdict(list)
        for name, each in self.base.named_parameters():
            if match := re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name):
                layers[match[1], match[2]].append((match[3], tuple(each.shape), each.requires_grad))
        alike = len({tuple(sorted(each)) for each in layers.values()}) == 1 and len(layers) == self.shape.n_layers
        return alike and len(set(getattr(self.base.config.get_text_config(), "layer_types", None) or [0])) == 1

    def training_peaks(self, rows: int, tokens: int, answer_tokens: int, *, checkpointing: bool) -> tuple[int, ...]:
        """Peak bytes of a micro-batch, forward and backward, by phase; see `step_peaks`.

        Args:
            rows: Rows, B.
            tokens: Tokens of each prompt, its answer included.
            answer_tokens: Tokens of the longest answer (`title` objective).
            checkpointing: Whether activations are recomputed.
        """
        self.base.config.use_cache = not checkpointing  # as transformers sets it, but without its warning
        if checkpointing:
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.base.activation_checkpointing_disable()
        self.model.train()
        with torch.device("meta"), self._use_gates(rows):
            return step_peaks(self.model, lambda: self._losses(rows, tokens, answer_tokens).sum())

    def ranking_peaks(self, rows: int, tokens: int, top_k: int) -> tuple[int, ...]:
        """Peak bytes of reading prompts and, for the `item` objective, ranking the catalogue; see `forward_peaks`.

        A title teacher keeps the keys and values of the prompt for each beam; ``rows`` are then beams.
        """
        self.model.eval()
        inputs = self._prompt(rows, tokens)

        def rank() -> object:
            if self.is_title:
                return self.llm(**inputs, logits_to_keep=1, use_cache=True)
            return self._scores(inputs, rows).log_softmax(dim=1).topk(min(top_k, self.shape.n_items), dim=1)

        with torch.device("meta"), torch.no_grad(), self._use_gates(rows):
            return forward_peaks(rank)

    @property
    def _tuner(self) -> ILoraModel | None:
        tuner = self.llm.base_model if isinstance(self.llm, PeftModel) else None
        return tuner if isinstance(tuner, ILoraModel) else None

    def _use_gates(self, rows: int) -> AbstractContextManager[object]:
        if self._tuner is None:
            return nullcontext()
        return self._tuner.use_gates(torch.empty(rows, self.gate_width, device="meta"))

    def _prompt(self, rows: int, tokens: int) -> dict[str, Tensor]:
        ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _scores(self, inputs: dict[str, Tensor], rows: int, keep: Tensor | None = None) -> Tensor:
        history = torch.zeros(rows, self.shape.history_length, dtype=torch.int64, device="meta")
        users = torch.empty(rows, self.shape.student_width, device="meta")
        return cast(Tensor, self.model(**inputs, item_ids=None, history=history, recommender_users=users, keep=keep))

    def _losses(self, rows: int, tokens: int, answer_tokens: int) -> Tensor:
        """See `ItemObjective.losses` and `TitleRecommender.forward`; here all answers have the same length."""
        inputs = self._prompt(rows, tokens)
        if not self.is_title:
            targets = torch.zeros(rows, dtype=torch.int64)
            return cross_entropy(self._scores(inputs, rows, targets), targets)
        positions = inputs["attention_mask"].cumsum(dim=1)
        logits = self.llm(**inputs, position_ids=positions, logits_to_keep=answer_tokens + 1, use_cache=False).logits
        answers = logits[:, :-1].flatten(0, 1)  # (B * answer_tokens, V), a copy
        tokens_to_write = torch.zeros(len(answers), dtype=torch.int64)
        return nn.functional.cross_entropy(answers.float(), tokens_to_write, reduction="none")


def measured_teacher(shape: TeacherShape) -> tuple[Sizes, Callable[..., int]]:
    """Measure a teacher on the meta device.

    Memory grows linearly with the number of equal layers, so a deep model is extrapolated from two shallow ones; a
    model whose layers differ runs as it is.

    Returns:
        Sizes; and ``peak(method, *arguments)``, the peak bytes of ``training_peaks`` or ``ranking_peaks`` of
        `PlannedTeacher`.
    """
    whole = PlannedTeacher(shape)
    if shape.n_layers <= max(_SHALLOW) or not whole.is_uniform:
        return whole.sizes, lambda method, *args, **kwargs: max(getattr(whole, method)(*args, **kwargs))
    low, high = (PlannedTeacher(shape.with_layers(n_layers)) for n_layers in _SHALLOW)
    n_steps = (shape.n_layers - _SHALLOW[0]) // (_SHALLOW[1] - _SHALLOW[0])

    def extrapolated(method: str, *args: Any, **kwargs: Any) -> int:
        phases = zip(*(getattr(each, method)(*args, **kwargs) for each in (low, high)), strict=True)
        return max(first + n_steps * (second - first) for first, second in phases)

    return whole.sizes, extrapolated


def _mark(*_: Any) -> None:
    """The end of the language model's forward pass, after which its key-value cache is freed."""
    if MemoryMeter.active is not None:
        MemoryMeter.active.next_phase()


def model_config(
    llm: LLMSettings, root: Path, llm_dir: Path, titles: list[str]
) -> tuple[PretrainedConfig, str | None, str]:
    """Load a model's configuration without its weights.

    Args:
        llm: The model; its ``shape`` is used only if the model cannot be read.
        root: Base folder of relative paths.
        llm_dir: Folder of generated tiny models.
        titles: Item titles, for a tiny model's tokenizer.

    Returns:
        The configuration; the model's location, None if it cannot be read; and a sentence that says which was used.

    Raises:
        ConfigError: If the model cannot be read and no shape is given.
    """
    try:
        source = locate(llm, root, llm_dir, titles)
    except ConfigError as error:
        if llm.shape is None:
            raise ConfigError(f"{error} Or give its sizes in `llm.shape`, as conf/llm/llama2_7b.yaml does.") from error
        return config_of_shape(llm.shape), None, f"{llm.path} cannot be read, so sizes are those of `llm.shape`"
    config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=llm.trust_remote_code)
    return config, source, f"sizes of {llm.name} are those of its own configuration"


def config_of_shape(shape: ShapeSettings) -> PretrainedConfig:
    """A configuration with these sizes; the rest are the architecture's defaults.

    Raises:
        ConfigError: If a size is missing or the architecture is unknown.
    """
    given: dict[str, Any] = {name: value for name, value in asdict(shape).items() if value is not None}
    empty = [name for name, value in given.items() if value == 0 and value is not False]
    if empty:
        raise ConfigError(f"llm.shape lacks {', '.join(empty)}, expected sizes as in conf/llm/llama2_7b.yaml.")
    kind = given.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **given)
    except ValueError as error:
        raise ConfigError(
            f"llm.shape.model_type is {kind!r}, expected an architecture that transformers knows, such as llama."
        ) from error
