"""Holds the gates of the current batch, where adapted layers read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import GateError

__all__ = ["GateSlot", "RankLayout", "check_segments", "segments_of"]


class RankLayout(NamedTuple):
    """How one layer spreads the E gates over its R ranks.

    Attributes:
        rank_per_expert: Ranks r' of one expert.
        scale: Factor s on the mixture.
        gate: Index of the layer's gate network among the adapter's; None if all layers share one.
    """

    rank_per_expert: int
    scale: float
    gate: int | None = None

    def spread(self, gates: Tensor) -> Tensor:
        """Repeat each gate for every rank of its expert and fold the scale in.

        Args:
            gates: Shape ``(B, E)``, or ``(B, G, E)`` with gates of G networks.

        Returns:
            Factors of the middle activation, shape ``(B, R)``; expert e owns ranks ``[e*r', (e+1)*r')``.
        """
        if gates.ndim == 3:
            assert self.gate is not None, "the tuner rejects gates per layer if the layers share one network"
            gates = gates[:, self.gate]
        batch, experts = gates.shape
        spread = (gates * self.scale).unsqueeze(-1).expand(batch, experts, self.rank_per_expert)
        return spread.reshape(batch, experts * self.rank_per_expert)


class GateSlot:
    """Gates of the current batch, shared by all adapted layers of one model.

    The layers of an adapter have few different layouts, so gates are spread once per layout, not once per layer.
    The slot is not a module: nothing of it is saved.
    """

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}
        self._layouts: dict[str, set[RankLayout]] = {}
        self._factors: dict[str, dict[RankLayout, Tensor]] | None = None
        self._packed = False
        self._repeated: dict[tuple[str, RankLayout, int], Tensor] = {}
        self._n_prompts: int | None = None
        self._ran_forward = False

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without the current batch."""
        return {**self.__dict__, "last": {}, "_factors": None, "_repeated": {}}

    @property
    def held(self) -> bool:
        """Whether gates are held now."""
        return self._factors is not None

    def register(self, adapter: str, layout: RankLayout) -> None:
        """Register a layout that a layer of this adapter reads."""
        self._layouts.setdefault(adapter, set()).add(layout)

    def forget(self, adapter: str) -> None:
        """Drop all layouts of an adapter."""
        self._layouts.pop(adapter, None)
        self.last.pop(adapter, None)

    @contextmanager
    def hold(self, gates: Mapping[str, Tensor], segments: Tensor | None = None) -> Iterator[None]:
        """Hold gates for the forward AND the backward pass of one batch.

        Non-reentrant checkpointing recomputes blocks during backward, so the gates must still be held then. For the
        same reason they are spread over the ranks here and not lazily by the first layer: if that layer lay inside a
        checkpointed block, its recomputation would record other operations than its first run.

        Args:
            gates: For each active adapter, gates of shape ``(B, E)`` or ``(B, G, E)``; with ``segments`` one row per
                segment.
            segments: Row of ``gates`` of each token, -1 for none, shape ``(B, T)``.

        Yields:
            Nothing.

        Raises:
            GateError: If gates are already held.
        """
        if self._factors is not None:
            raise GateError("gates are already held; close the outer `hold` before opening another.")
        self.last = {adapter: held.detach() for adapter, held in gates.items()}
        self._packed, self._ran_forward = segments is not None, False
        self._factors = {
            adapter: {layout: _per_token(layout.spread(held), segments) for layout in self._layouts.get(adapter, ())}
            for adapter, held in gates.items()
        }
        try:
            yield
        finally:
            self._factors = None

    @contextmanager
    def repeating(self, n_prompts: int) -> Iterator[None]:
        """Allow layers to receive each row several times, as generation repeats prompts for beams and samples.

        Args:
            n_prompts: Rows before repetition. As many rows of gates must be held: with fewer, an instance's gates would
                silently be used for its neighbours.

        Yields:
            Nothing.
        """
        self._n_prompts = n_prompts
        try:
            yield
        finally:
            self._n_prompts = None
            self._repeated = {}

    def factors(self, adapter: str, layout: RankLayout, shape: tuple[int, ...]) -> Tensor:
        """Factors of a layer's middle activation.

        Args:
            adapter: Name of the adapter.
            layout: The layer's layout, registered before the gates were held.
            shape: Shape of the layer's input without its last dimension, ``(B, ...)``.

        Returns:
            Shape ``(B, 1, ..., R)``, or ``(B, T, R)`` if segments are held, scale included.

        Raises:
            GateError: If no gates are held, none for this adapter, or for another number of rows or tokens.
        """
        if self._factors is None:
            raise GateError(
                "an adapted layer ran without gates; run forward and backward inside "
                "`with peft_model.base_model.use_gates(gate_input):` (or `.hold(gates)`), and the base model alone "
                "inside `with frozen_base(peft_model):`. With gradient checkpointing the backward pass needs gates too."
            )
        if adapter not in self._factors:
            raise GateError(
                f"adapter {adapter!r} is active but the gates held are for {sorted(self._factors)}; hold gates for "
                "every active adapter, or open `hold` after `set_adapter`."
            )
        if not torch.compiler.is_compiling():
            self._check_pass(self._factors[adapter][layout])
        factors = self._factors[adapter][layout]
        if self._packed:
            if factors.shape[:2] != shape:
                raise GateError(
                    f"`segments` covers {tuple(factors.shape[:2])} rows and tokens but the layer received "
                    f"{tuple(shape)}; give one segment number per token of the batch."
                )
        elif factors.shape[0] != shape[0]:
            n_gates, n_rows = factors.shape[0], shape[0]
            if n_gates == 0 or n_rows % n_gates or self._n_prompts != n_gates:
                raise GateError(_rows_message(n_gates, n_rows, self._n_prompts))
            factors = self._repeat(adapter, layout, factors, n_rows // n_gates)
        return factors if len(shape) == 2 else factors.view(shape[0], *[1] * (len(shape) - 1), factors.shape[-1])

    def _check_pass(self, factors: Tensor) -> None:
        """Raise if a block is recomputed under other gates than in its forward pass, or by reentrant checkpointing."""
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            self._ran_forward = True
        elif not self._ran_forward:
            raise GateError(
                "the backward pass recomputes a checkpointed block whose forward pass ran under other gates; open "
                "`hold` (or `use_gates`) once around the forward AND the backward pass of a batch."
            )
        elif factors.requires_grad and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            # Non-reentrant checkpointing recomputes under hooks. The reentrant one runs a backward pass per block, of
            # which the first frees the graph of the gates.
            raise GateError(
                "gradient checkpointing with `use_reentrant=True` cannot train gates, which all blocks share; use "
                "`model.activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False})`."
            )

    def _repeat(self, adapter: str, layout: RankLayout, factors: Tensor, times: int) -> Tensor:
        key = (adapter, layout, times)
        if key not in self._repeated:  # once per generation, not once per token
            self._repeated[key] = factors.repeat_interleave(times, dim=0)
        return self._repeated[key]


def segments_of(position_ids: Tensor) -> Tensor:
    """Number the sequences of packed rows by their position ids: each position 0 starts one.

    transformers keeps attention within sequences only without a cache: pass the position ids, no attention mask, and
    ``use_cache=False``. Set the segment of padding to -1 (position ids of 0 would count it as sequences).

    Args:
        position_ids: Shape ``(B, T)``; every row starts with position 0.

    Returns:
        Number of each token's sequence, counted over the whole batch, shape ``(B, T)``, int64.

    Raises:
        GateError: If a row does not start with position 0.
    """
    if position_ids.ndim != 2 or position_ids.numel() == 0 or bool(position_ids[:, 0].any()):
        first = position_ids[:, :1].flatten()[:8].tolist() if position_ids.ndim == 2 else "none"
        raise GateError(
            f"position ids of packed rows must have shape (B, T) and start with 0 in every row, got shape "
            f"{tuple(position_ids.shape)} and first positions {first}; start every row with a new sequence."
        )
    return (position_ids.flatten() == 0).cumsum(0).view(position_ids.shape) - 1


def check_segments(segments: Tensor | None, n_instances: int) -> None:
    """Raise if segments do not fit the gates.

    Raises:
        GateError: If they are not int64 of shape ``(B, T)``, or do not number the instances of the gates.
    """
    if segments is None:
        return
    if not isinstance(segments, Tensor) or segments.ndim != 2 or segments.dtype != torch.int64:
        got = f"{segments.dtype} of shape {tuple(segments.shape)}" if isinstance(segments, Tensor) else type(segments)
        raise GateError(
            f"`segments` must be int64 of shape (B, T), a number per token, got {got}; `segments_of(position_ids)` "
            "computes it."
        )
    numbers = segments.unique().tolist()
    # Gates without tokens mean that gates and segments were counted differently: some token may use its neighbour's.
    if [number for number in numbers if number != -1] != list(range(n_instances)):
        raise GateError(
            f"`segments` must number the instances of the gates from 0 (-1 for tokens without instance), got "
            f"{_some(numbers)} for gates of {n_instances} instances; give one row of gates per packed sequence."
        )


def _some(numbers: list[int], n_shown: int = 8) -> str:
    return ", ".join(map(str, numbers[:n_shown])) + (", ..." if len(numbers) > n_shown else "")


def _per_token(factors: Tensor, segments: Tensor | None) -> Tensor:
    """Factors ``(B, 1, R)`` from those of rows, ``(B, R)``, or ``(B, T, R)`` from those of segments, ``(S, R)``."""
    if segments is None:
        return factors.unsqueeze(1)  # the shape that most layers need, made once
    # Row -1 is appended: zeros for tokens without segment.
    return torch.cat([factors, factors.new_zeros(1, factors.shape[1])])[segments.to(factors.device)]


def _rows_message(n_gates: int, n_rows: int, n_prompts: int | None) -> str:
    message = f"gates cover {n_gates} rows but the layer received {n_rows}; "
    if n_prompts is not None:
        return message + f"hold one row of gates per prompt ({n_prompts}); they are repeated once per beam."
    if n_gates and n_rows % n_gates == 0:
        times = n_rows // n_gates
        return message + (
            f"repeat them once per beam (`gates.repeat_interleave({times}, dim=0)`), which a PeftModel with "
            "task_type='CAUSAL_LM' does automatically; or, if the model flattens (B, T, d) to (B*T, d) before this "
            "layer, leave the layer out with `exclude_modules`."
        )
    return message + "compute the gates from the same batch."
