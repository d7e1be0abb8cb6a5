"""The teacher on the meta device: all its shapes and none of its weights."""

import copy
import re
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from llm2rec.ilora import ILoraModel, frozen_base
from llm2rec.plan.measure import ATTENTION, CPU_ATTENTION, Cost, Meter, forward_cost, step_cost
from llm2rec.student.losses import cross_entropy
from llm2rec.teacher.factory import adapter_config, with_adapter
from llm2rec.teacher.gate_source import NoGate
from llm2rec.teacher.heads import build_head
from llm2rec.teacher.ilora_model import ItemTeacher
from llm2rec.teacher.injection import ItemProjector
from llm2rec.teacher.prompts import PromptBuilder
from llm2rec.teacher.settings import TeacherSettings

__all__ = ["PlannedTeacher", "Sizes", "TeacherShape", "teacher_costs"]

_SHALLOW = (2, 3)  # layers of the models from which a uniform deep one is extrapolated
_BLOCK = 64  # weights that share a constant in bitsandbytes' 4-bit format


@dataclass(frozen=True)
class TeacherShape:
    """What decides a planned teacher's sizes.

    Attributes:
        config: The language model's configuration.
        settings: The teacher's settings.
        precision: ``float32``, ``bfloat16``, ``int8`` or ``int4``.
        pooling: How texts are represented.
        n_items: Items of the catalogue, N.
        history_length: Items of a history, L.
        student_width: Width of the trained recommender, where one is read.
        on_cpu: Whether it is for a CPU, where quantised weights are computed with in float32.
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
        """Number format that is computed in."""
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
        """The same with fewer layers."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = n_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:n_layers]
        return TeacherShape(**{each.name: getattr(self, each.name) for each in fields(self)} | {"config": config})


@dataclass(frozen=True)
class Sizes:
    """What a teacher holds at all times.

    Attributes:
        frozen_parameters: Weights of the frozen language model.
        frozen_bytes: Their bytes by kind: ``quantised``, its ``constants``, and ``whole`` numbers.
        trained_parameters: Trained ones, of adapter, gate, projector and head.
        item_bytes: Title vectors, biases and the recommender's item vectors, as far as a GPU holds them: buffers, which
            nothing divides.
        largest_product: Rows and columns of the largest quantised matrix; zeros without any.
        block_bytes: Those of the frozen weights that lie in blocks, which FSDP2 divides.
        largest_block_bytes: Those of one block.
    """

    frozen_parameters: int
    frozen_bytes: dict[str, int]
    trained_parameters: int
    item_bytes: int
    largest_product: tuple[int, int]
    block_bytes: int
    largest_block_bytes: int


class PlannedTeacher:
    """A teacher on the meta device that takes steps there.

    Text alone is planned: what a hybrid prompt injects is left out of a step, but not the projector's weights.

    Args:
        shape: Its sizes.
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
        """The layers that bitsandbytes packs, by the identity of their weights."""
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
            return nn.ModuleDict(parts | ({} if projector is None else {"projector": projector}))  # titles: on the host
        return ItemTeacher(
            self.llm,
            cast(PromptBuilder, None),  # no prompt is made of text here
            pooling=shape.pooling,
            head=build_head(settings.head, vectors, bias, settings.logit_scale, items),
            exclude_history=settings.exclude_history,
            gate_source=NoGate(),
            projector=projector,
        )

    @property
    def sizes(self) -> Sizes:
        """What it holds, by arithmetic."""
        trained = [each for each in self.model.parameters() if each.requires_grad]
        frozen = [each for each in self.model.parameters() if not each.requires_grad]
        packed = [each for each in frozen if id(each) in self.quantised]
        n_packed, n_rows = sum(each.numel() for each in packed), sum(len(each) for each in packed)
        eight = self.shape.precision == "int8"
        classes = self.base._no_split_modules or ()
        blocks = [
            sum(each.nbytes for each in block.parameters() if not each.requires_grad)
            for block in self.base.modules()
            if type(block).__name__ in classes
        ]
        return Sizes(
            frozen_parameters=sum(each.numel() for each in frozen),
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
        """Whether all layers are alike, trained parameters and kinds of attention included."""
        layers = defaultdict(list)
        for name, each in self.base.named_parameters():
            if match := re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name):
                layers[match[1], match[2]].append((match[3], tuple(each.shape), each.requires_grad))
        alike = len({tuple(sorted(each)) for each in layers.values()}) == 1 and len(layers) == self.shape.n_layers
        return alike and len(set(getattr(self.base.config.get_text_config(), "layer_types", None) or [0])) == 1

    def training(self, rows: int, tokens: int, answer_tokens: int, *, checkpointing: bool) -> Cost:
        """A micro-batch of training: forward and backward.

        Args:
            rows: Rows, B.
            tokens: Tokens of each prompt, its answer included.
            answer_tokens: Tokens of the longest answer; the title objective reads it.
            checkpointing: Whether activations are recomputed.
        """
        self.base.config.use_cache = not checkpointing  # as transformers has it, but without its warning
        if checkpointing:
            self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.base.activation_checkpointing_disable()
        self.model.train()
        with torch.device("meta"), self._mixing(rows):
            return step_cost(self.model, lambda: self._losses(rows, tokens, answer_tokens).sum())

    def reading(self, rows: int, tokens: int) -> Cost:
        """Reading texts without adapter, as titles and gate inputs are read."""
        self.model.eval()
        frozen = frozen_base(cast(PeftModel, self.llm)) if self._tuner is not None else nullcontext()
        with torch.device("meta"), frozen:
            return forward_cost(lambda: self.base.base_model(**self._prompt(rows, tokens)))

    def ranking(self, rows: int, tokens: int, top_k: int) -> Cost:
        """Reading prompts and, for the `item` objective, ranking the catalogue; without gradients.

        A title teacher keeps the keys and values of what it has read, for each beam that searches titles from there;
        ``rows`` are then beams.
        """
        self.model.eval()
        inputs = self._prompt(rows, tokens)

        def rank() -> object:
            if self.is_title:
                return self.llm(**inputs, logits_to_keep=1, use_cache=True)
            return self._scores(inputs, rows).log_softmax(dim=1).topk(min(top_k, self.shape.n_items), dim=1)

        with torch.device("meta"), torch.no_grad(), self._mixing(rows):
            return forward_cost(rank)

    @property
    def _tuner(self) -> ILoraModel | None:
        tuner = self.llm.base_model if isinstance(self.llm, PeftModel) else None
        return tuner if isinstance(tuner, ILoraModel) else None

    def _mixing(self, rows: int) -> AbstractContextManager[object]:
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
        """See `ItemObjective.losses` and `TitleRecommender.forward`, whose answers are all of one length here."""
        inputs = self._prompt(rows, tokens)
        if not self.is_title:
            targets = torch.zeros(rows, dtype=torch.int64)
            return cross_entropy(self._scores(inputs, rows, targets), targets)
        positions = inputs["attention_mask"].cumsum(dim=1)
        logits = self.llm(**inputs, position_ids=positions, logits_to_keep=answer_tokens + 1, use_cache=False).logits
        answers = logits[:, :-1].flatten(0, 1)  # (B * answer_tokens, V), a copy
        tokens_to_write = torch.zeros(len(answers), dtype=torch.int64)
        return nn.functional.cross_entropy(answers.float(), tokens_to_write, reduction="none")


def teacher_costs(shape: TeacherShape) -> tuple[Sizes, Any]:
    """Give a teacher's sizes, and a function that finds what it asks for.

    Layers that are all alike cost alike, so a deep model is extrapolated from two shallow ones; one whose layers
    differ is run as it is.

    Returns:
        Sizes; and a function of ``(method, *arguments)``, methods of `PlannedTeacher`, that gives a `Cost`.
    """
    whole = PlannedTeacher(shape)
    if shape.n_layers <= max(_SHALLOW) or not whole.is_uniform:
        return whole.sizes, lambda method, *args, **kwargs: getattr(whole, method)(*args, **kwargs)
    low, high = (PlannedTeacher(shape.with_layers(n_layers)) for n_layers in _SHALLOW)

    def extrapolated(method: str, *args: Any, **kwargs: Any) -> Cost:
        first, second = (getattr(each, method)(*args, **kwargs) for each in (low, high))
        return _further(first, second, (shape.n_layers - _SHALLOW[0]) // (_SHALLOW[1] - _SHALLOW[0]))

    return whole.sizes, extrapolated


def _mark(*_: Any) -> None:
    """The end of the language model's forward pass, after which its cache of keys and values is let go."""
    if Meter.active is not None:
        Meter.active.next_phase()


def _further(first: Cost, second: Cost, n_steps: int) -> Cost:
    """The point ``n_steps`` of the way from ``first`` to ``second`` and on."""

    def at(one: Any, other: Any) -> Any:
        if isinstance(one, tuple):
            return tuple(at(*pair) for pair in zip(one, other, strict=True))
        return one + n_steps * (other - one)

    return Cost(*(at(getattr(first, each.name), getattr(second, each.name)) for each in fields(Cost)))
