"""Sequential recommenders: map a history of item ids to one vector per user.

Histories are padded on the right. SASRec and GRU4Rec are causal, so the vector at the last real item depends on all
real items and on no padding, without an attention mask. The vector at an earlier item represents the history up to that
item, so one pass predicts many rows. Caser right-aligns the items and ignores padding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from llm2rec.core.errors import CheckpointError, ConfigError
from llm2rec.student.items import ItemTable
from llm2rec.student.store import read_student

__all__ = ["MODELS", "Caser", "GRU4Rec", "SASRec", "SequentialRecommender", "build_model", "load_student"]


class SequentialRecommender(nn.Module):
    """Base class of students: input and output item tables, and scoring.

    Args:
        n_items: Number of items, N.
        width: Width of item and user vectors, D.
        max_length: Maximum history length, L.
        dropout: Dropout probability.
        tie_items: Whether input and output share one item table.
    """

    def __init__(self, n_items: int, width: int, max_length: int, dropout: float, tie_items: bool) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"`dropout` is {dropout}, expected 0 to below 1.")
        _at_least_1(n_items=n_items, width=width, max_length=max_length)
        self.n_items, self.width, self.max_length, self.tie_items = n_items, width, max_length, tie_items
        self.input_items = ItemTable(n_items, width)
        self.output_items = self.input_items if tie_items else ItemTable(n_items, width)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def from_pretrained(cls, place: Path | str, revision: str | None = None) -> Self:
        """Load a finished student of this class; see `load_student`.

        Args:
            place: A student's folder, that of its run, or its id on the Hugging Face Hub, ``user/name``.
            revision: Branch, tag or commit on the Hub.

        Returns:
            The student in evaluation mode, on the CPU.

        Raises:
            CheckpointError: If there is no student, it is damaged, or it is not an instance of this class.
            HubError: If it cannot be downloaded.
        """
        model = load_student(place, revision)
        if not isinstance(model, cls):
            raise CheckpointError(
                f"{place} is a {type(model).__name__}, expected a {cls.__name__}; use "
                f"`{type(model).__name__}.from_pretrained`, or `SequentialRecommender.from_pretrained` for any student."
            )
        return model

    def score(self, users: Tensor) -> Tensor:
        """Score all items.

        Args:
            users: User vectors, shape ``(B, D)``.

        Returns:
            Logits, shape ``(B, N)``.
        """
        return users @ self.output_items.vectors().T

    def weights_to_serve(self) -> dict[str, Tensor]:
        """Weights with plain item tables, for a student of the same shape without fusion.

        Serving a fused student requires neither the teacher nor its vectors.

        Returns:
            Weights by name, with ``input_items.weight`` of shape ``(N + 1, D)``; the last row is padding.
        """
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith(("input_items.", "output_items."))}
        was_training = self.training
        self.eval()  # in training, tables may leave out offsets
        for name, table in self.item_tables.items():
            vectors = table.vectors().detach()
            weights[f"{name}.weight"] = torch.cat([vectors, vectors.new_zeros(1, self.width)])
        self.train(was_training)
        return weights

    def add_items(self, vectors: Mapping[str, Tensor]) -> None:
        """Append items to plain item tables; their ids begin at N, and padding becomes one past the last.

        Args:
            vectors: Vectors of the new items for each of `item_tables`, shape ``(M, D)``.
        """
        for name, table in self.item_tables.items():
            table.append(vectors[name])
        self.n_items = self.input_items.n_items

    @property
    def item_tables(self) -> dict[str, ItemTable]:
        """The item tables by name: ``input_items`` and, unless tied, ``output_items``."""
        return {"input_items": self.input_items} | ({} if self.tie_items else {"output_items": self.output_items})

    def load_served(self, weights: Mapping[str, Tensor]) -> None:
        """Load the result of `weights_to_serve`.

        Args:
            weights: All weights by name.
        """
        tied = {"output_items.weight": weights["input_items.weight"]} if self.tie_items else {}
        self.load_state_dict({**weights, **tied})


class SASRec(SequentialRecommender):
    """Self-attentive sequential recommendation (Kang and McAuley, arXiv 1808.09781) with pre-norm blocks.

    Positions are recency-based (counted from the most recent item, so the last item has the same position in all
    histories), or counted from the oldest item, as in the paper (so an item has the same position in all passes with
    the same start). Of a history longer than L only the last L items are read and counted.

    Args:
        n_items: Number of items, N.
        width: Width of item and user vectors, D.
        max_length: Longest history, L.
        n_blocks: Transformer blocks.
        n_heads: Attention heads; must divide ``width``.
        dropout: Dropout probability on embeddings, attention and feed-forward outputs.
        tie_items: Whether one item table serves input and output.
        positions: ``recent`` counts positions from the most recent item, ``oldest`` from the oldest.
    """

    def __init__(
        self,
        n_items: int,
        width: int = 64,
        max_length: int = 10,
        n_blocks: int = 1,
        n_heads: int = 2,
        dropout: float = 0.2,
        tie_items: bool = True,
        positions: str = "recent",
    ) -> None:
        super().__init__(n_items, width, max_length, dropout, tie_items)
        if positions not in ("recent", "oldest"):
            raise ConfigError(f"`positions` is {positions!r}, expected 'recent' or 'oldest'.")
        self.counts_from = positions
        if n_heads < 1 or width % n_heads or n_blocks < 1:
            raise ConfigError(
                f"expected `n_blocks` >= 1 and `n_heads` that divide `width`, got {n_blocks}, {n_heads}, {width}."
            )
        self.positions = nn.Parameter(torch.empty(max_length, width))
        nn.init.normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, n_heads, dropout) for _ in range(n_blocks - 1))
        self.last_block = _Block(width, n_heads, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, history: Tensor, lengths: Tensor, at: Tensor | None = None) -> Tensor:
        """Represent users.

        Args:
            history: Item ids of shape ``(B, L)``, oldest first, padded on the right.
            lengths: Real items per row, shape ``(B,)``, at least 1.
            at: Indices into the flattened ``history``, shape ``(B',)``; each returns the user vector of the history up
                to and including that item. None returns one vector per row, at its last real item.

        Returns:
            User vectors of shape ``(B, D)``, or ``(B', D)``.

        Raises:
            ConfigError: If ``at`` is given with recency-based positions, which differ for each index.
        """
        steps = torch.arange(history.shape[1], device=history.device)
        if self.counts_from == "oldest":
            positions = self.positions[steps]  # (L, D)
        elif at is None:
            positions = self.positions[(lengths.unsqueeze(1) - 1 - steps).clamp(min=0)]  # (B, L, D); 0 is the last
        else:
            raise ConfigError("`at` requires `positions='oldest'`, but this SASRec uses positions='recent'.")
        x = self.dropout(self.input_items(history) + positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(self.last_block.last(x, lengths) if at is None else self.last_block.at(x, at))


class _Block(nn.Module):
    """Pre-norm Transformer block: causal self-attention and a feed-forward layer with residual connections."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.width, self.n_heads, self.dropout = width, n_heads, dropout
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, L, D)`` to ``(B, L, D)``; no position sees a later one."""
        return self._add(x, self._attended(x))

    def at(self, x: Tensor, places: Tensor) -> Tensor:
        """`forward` at ``places`` of the flattened rows only, ``(B', D)``."""
        return self._add(x.flatten(0, 1)[places], self._attended(x).flatten(0, 1)[places])

    def last(self, x: Tensor, lengths: Tensor) -> Tensor:
        """`forward` at each row's last real position only, ``(B, D)``, at a fraction of the cost."""
        normalised = self.attention_norm(x)
        rows = torch.arange(x.shape[0], device=x.device)  # `len` would become a constant in an export
        query, key_value = self.qkv.weight.split([self.width, 2 * self.width])
        query_bias, key_value_bias = self.qkv.bias.split([self.width, 2 * self.width])
        q = nn.functional.linear(normalised[rows, lengths - 1].unsqueeze(1), query, query_bias)
        k, v = nn.functional.linear(normalised, key_value, key_value_bias).chunk(2, dim=-1)
        real = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)  # (B, L)
        drop = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(
            self._heads(q), self._heads(k), self._heads(v), attn_mask=real[:, None, None], dropout_p=drop
        )
        return self._add(x[rows, lengths - 1], mixed.flatten(1))

    def _attended(self, x: Tensor) -> Tensor:
        """Attention output of each position over itself and earlier ones, ``(B, L, D)``."""
        q, k, v = (self._heads(part) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        drop = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(B, L, D)`` into heads, ``(B, heads, L, D / heads)``."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention output to ``(..., D)``, then the output of the feed-forward layer."""
        x = x + nn.functional.dropout(self.out(mixed), self.dropout, self.training)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GRU4Rec(SequentialRecommender):
    """GRU over the history (Hidasi et al., arXiv 1511.06939) with a linear map from its last state to item space.

    Args:
        n_items: Number of items, N.
        width: Width of item and user vectors, D.
        max_length: Longest history, L.
        hidden_width: Width of the recurrent state.
        n_layers: Recurrent layers.
        dropout: Dropout probability on embeddings and between layers.
        tie_items: Whether one item table serves input and output.
    """

    def __init__(
        self,
        n_items: int,
        width: int = 64,
        max_length: int = 10,
        hidden_width: int = 128,
        n_layers: int = 1,
        dropout: float = 0.3,
        tie_items: bool = True,
    ) -> None:
        super().__init__(n_items, width, max_length, dropout, tie_items)
        _at_least_1(hidden_width=hidden_width, n_layers=n_layers)
        between = dropout if n_layers > 1 else 0.0  # torch warns of dropout after a single layer
        self.gru = nn.GRU(width, hidden_width, n_layers, batch_first=True, dropout=between)
        self.out = nn.Linear(hidden_width, width)

    def forward(self, history: Tensor, lengths: Tensor, at: Tensor | None = None) -> Tensor:
        """Represent users; arguments as in `SASRec.forward`."""
        states, _ = self.gru(self.dropout(self.input_items(history)))
        return self.out(_last(states, lengths) if at is None else states.flatten(0, 1)[at])


class Caser(SequentialRecommender):
    """Convolutions over the matrix of recent item vectors (Tang and Wang, WSDM 2018, arXiv 1809.07426).

    Horizontal filters span h consecutive items and are max-pooled; vertical filters are weighted sums over the history,
    one weight per position. One linear layer maps both to item space. Differences from the paper:

    - No user embedding: user vectors depend on the history alone, so the model serves users unseen in training.
    - Windows contain real items only. A filter higher than a short history reads the whole history once, after zeros;
      full histories have the paper's windows.
    - The last layer is linear, since inner products with shared item vectors need both signs; the paper scores with
      separate output weights.

    Only the most recent ``max_length`` items of a longer history are read.

    Args:
        n_items: Number of items, N.
        width: Width of item and user vectors, D.
        max_length: Longest history, L.
        n_horizontal: Horizontal filters of each height.
        n_vertical: Vertical filters.
        heights: Heights of the horizontal filters, within 1 to L; None uses all of them.
        dropout: Dropout probability on the filter outputs.
        tie_items: Whether one item table serves input and output.
    """

    def __init__(
        self,
        n_items: int,
        width: int = 64,
        max_length: int = 10,
        n_horizontal: int = 16,
        n_vertical: int = 4,
        heights: Sequence[int] | None = None,
        dropout: float = 0.2,
        tie_items: bool = True,
    ) -> None:
        super().__init__(n_items, width, max_length, dropout, tie_items)
        heights = list(range(1, max_length + 1) if heights is None else heights)
        _at_least_1(n_horizontal=n_horizontal, n_vertical=n_vertical)
        if not heights or len(set(heights)) < len(heights) or min(heights) < 1 or max(heights) > max_length:
            raise ConfigError(
                f"`heights` is {heights}, expected different heights from 1 to `max_length`, which is {max_length}."
            )
        self.horizontal = nn.ModuleList(nn.Conv1d(width, n_horizontal, height) for height in heights)
        self.vertical = nn.Linear(max_length, n_vertical, bias=False)  # `out` has a bias for it
        self.out = nn.Linear(n_horizontal * len(heights) + n_vertical * width, width)
        for layer in (*self.horizontal, self.out):
            # Torch's default biases dominate small item vectors and make all histories look alike.
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Represent users at their last real items; shapes as in `SASRec.forward`."""
        items, n_padding = self._right_aligned(history, lengths)
        x = self.input_items(items).transpose(1, 2)  # (B, D, L); zeros, then the items, the most recent last
        pooled = [self._max_pooled(layer(x), n_padding) for layer in self.horizontal]
        sums = self.vertical(x).flatten(1)  # (B, D * n_vertical)
        return self.out(self.dropout(torch.cat([*pooled, sums], dim=1)))

    def _right_aligned(self, history: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last L items, padded on the left, ``(B, L)``, and the number of padding items, ``(B,)``."""
        age = torch.arange(self.max_length - 1, -1, -1, device=history.device)
        index = lengths.unsqueeze(1) - 1 - age  # (B, L)
        items = history.gather(1, index.clamp(min=0)).masked_fill(index < 0, self.n_items)
        return items, (self.max_length - lengths).clamp(min=0)

    @staticmethod
    def _max_pooled(responses: Tensor, n_padding: Tensor) -> Tensor:
        """Max-pool responses ``(B, n_horizontal, W)`` over the windows without padding, at least the last window."""
        n_windows = responses.shape[2]
        first = n_padding.clamp(max=n_windows - 1)  # first window without padding
        ignored = torch.arange(n_windows, device=responses.device) < first.unsqueeze(1)  # (B, W)
        # ReLU is monotonic, so it commutes with the maximum.
        return responses.masked_fill(ignored.unsqueeze(1), -torch.inf).amax(dim=2).relu()


def _at_least_1(**sizes: int) -> None:
    """Raise a `ConfigError` for the first size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"`{name}` is {value}, expected at least 1.")


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    """States ``(B, L, D)`` at each row's last real item, ``(B, D)``."""
    return states[torch.arange(states.shape[0], device=states.device), lengths - 1]


MODELS: dict[str, type[SequentialRecommender]] = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
}
"""Students by ``student.name``."""


def build_model(name: str, **arguments: Any) -> SequentialRecommender:
    """Build a student by name.

    Raises:
        ConfigError: If there is no such student.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown student {name!r}; expected one of {', '.join(MODELS)}.")
    return MODELS[name](**arguments)


def load_student(place: Path | str, revision: str | None = None) -> SequentialRecommender:
    """Load a student.

    Args:
        place: A student's folder, that of its run, or its id on the Hugging Face Hub, ``user/name``.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The student in evaluation mode, on the CPU.

    Raises:
        CheckpointError: If the folder has no student, or its weights do not match the model in its ``config.json``.
        HubError: If it cannot be downloaded.
    """
    folder, config, weights = read_student(place, revision)
    try:
        model = build_model(config["model"], **config["arguments"])
    except (ConfigError, TypeError) as error:  # TypeError: unknown constructor arguments
        raise CheckpointError(f"the student in {folder} cannot be built: {error}") from error
    try:
        model.load_served(weights)
    except (KeyError, RuntimeError) as error:  # torch lists all missing and unknown names, over many lines
        raise CheckpointError(
            f"the weights in {folder / 'model.safetensors'} do not match a {config['model']} of this version; train it "
            f"again, or load it with the version that saved it ({str(error).splitlines()[0]})."
        ) from error
    return model.eval()
