"""The joined plan, for GPUs: one attention call per channel over [text; frames] as a single sequence.

`JoinedPlan` is the geometry: an order of the frame rows in which those that see each other are adjacent, and for each
row the interval of keys that it sees. `JoinedMask` adds text of a given length; it lists the blocks of 128 x 128 scores
that FlexAttention computes, skipping all others. `attend_flex` and `attend_dense` compute with it. `KeyBlocks` does the
same for the few rows of a decoding step: only blocks of the cache that are filled, and in the window, are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._triton import has_triton

from cogvideo.model.compiled import compile_static
from cogvideo.model.masks import Mask

BLOCK_SIZE = 128
"""Queries and keys per block; FlexAttention computes or skips a block as a whole."""
MIN_HEAD_DIM = 16
"""FlexAttention's kernels refuse smaller heads."""
TEXT = -1
"""The place of text keys, and the last place that text queries see."""
_CPU = torch.device("cpu")
_Array = TypeVar("_Array", np.ndarray, Tensor)


def sees(first: _Array, last: _Array, place: _Array) -> _Array:
    """Whether a query that sees the places `first` to `last` sees a key at `place`; every query sees text."""
    return (place <= last) & ((place == TEXT) | (place >= first))


@dataclass(frozen=True, eq=False)
class JoinedPlan:
    """One channel of a forward pass whose keys are all among its rows: a whole clip, or its given frames."""

    first: np.ndarray
    last: np.ndarray
    """(queries,) the places that each query row sees, from `first` to `last`; see `sees`."""
    place: np.ndarray
    """(rows,) the place of each row as a key. All three are in the order of the sequence."""
    order: Tensor | None
    """(rows,) for each row of the sequence, its row in the forward pass; None: the same."""
    inverse: Tensor | None
    """(rows,) for each row of the forward pass, its row in the sequence; None: the same."""
    queries: Tensor | None
    """(queries,) which rows of the sequence, text not counted, are queries; None: all rows, and text as well."""
    restore: Tensor | None
    """(queries,) for each output row, its index in `queries`; None: in order, or all rows are queries."""
    cache_positions: Tensor | None
    """(rows,) where the cache stores the rows of the sequence; None: not stored."""
    device: torch.device = _CPU
    _masks: "dict[int, JoinedMask]" = field(default_factory=dict, repr=False)

    def with_text(self, text_len: int) -> "JoinedMask":
        """The mask for texts of this many rows, padding included; made once."""
        if text_len not in self._masks:
            with torch.inference_mode(False):  # also used in training, which saves it for the backward pass
                self._masks[text_len] = self._join(text_len)
        return self._masks[text_len]

    def to(self, device: torch.device | str) -> "JoinedPlan":
        def move(index: Tensor | None) -> Tensor | None:
            return None if index is None else index.to(device)

        return JoinedPlan(
            self.first,
            self.last,
            self.place,
            move(self.order),
            move(self.inverse),
            move(self.queries),
            move(self.restore),
            move(self.cache_positions),
            torch.device(device),
        )

    def _join(self, text_len: int) -> "JoinedMask":
        text = np.full(text_len, TEXT)
        first, last, place = self.first, self.last, np.concatenate([text, self.place])
        if self.queries is None:
            first, last = np.concatenate([text, first]), np.concatenate([text, last])
        visible = sees(first[:, None], last[:, None], place[None])
        first_seen, last_seen, places = (
            torch.from_numpy(numbers.astype(np.int32)).to(self.device) for numbers in (first, last, place)
        )
        blocks = _block_mask(visible, first_seen, last_seen, places)
        return JoinedMask(self, text_len, first_seen, last_seen, places, blocks)


@dataclass(frozen=True, eq=False)
class JoinedMask:
    """A joined plan with text of some length: the mask over [text; frames]."""

    plan: JoinedPlan
    text_len: int
    first: Tensor
    last: Tensor
    place: Tensor
    """As in the plan, int32, with text before the frame rows; (queries,), (queries,) and (text_len + rows,)."""
    blocks: BlockMask

    @property
    def num_blocks(self) -> tuple[int, int]:
        """The number of blocks computed, and of all blocks."""
        kinds = self._kinds()
        return int((kinds > 0).sum()), kinds.size

    def picture(self) -> str:
        """One line per 128 queries, one character per 128 keys: `#` all visible, `+` some, `.` none and skipped."""
        return "\n".join("".join(".+#"[kind] for kind in row) for row in self._kinds())

    def _kinds(self) -> np.ndarray:
        blocks = self.blocks
        kinds = np.zeros(blocks.kv_indices.shape[-2:], np.int64)
        lists = (blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices)
        for kind, (counts, indices) in enumerate(lists, 1):
            assert counts is not None and indices is not None
            for row, count in enumerate(counts[0, 0].tolist()):
                kinds[row, indices[0, 0, row, :count].cpu().numpy()] = kind
        return kinds


def plan_joined(
    mask: Mask, slots: np.ndarray, query_rows: np.ndarray | None = None, positions: np.ndarray | None = None
) -> JoinedPlan:
    """Order the rows so that those of a window are adjacent. Arguments as in `plan.plan_blocks`.

    The rows must include all slots that they see: a whole clip, or its given frames.
    """
    order = np.arange(len(slots))
    if mask.scope == "clip":
        order = np.lexsort((slots, mask.layout.locate(slots).order, mask.window_index(slots)))
    sequence = slots[order]
    first, last, place = mask.intervals(sequence)
    inverse, queries, restore = np.argsort(order), None, None
    if query_rows is not None and len(query_rows) < len(slots):
        queries = np.flatnonzero(np.isin(order, query_rows))
        restore = np.searchsorted(queries, inverse[query_rows])
        first, last = first[queries], last[queries]
    stored_at = None if positions is None or (positions[slots] < 0).all() else positions[sequence].astype(np.int64)

    def index(rows: np.ndarray | None, *, or_none: bool = True) -> Tensor | None:
        in_order = rows is None or (or_none and bool((rows == np.arange(len(rows))).all()))
        return None if rows is None or in_order else torch.from_numpy(rows)

    return JoinedPlan(
        first,
        last,
        place,
        index(order),
        index(inverse),
        index(queries, or_none=False),
        index(restore),
        index(stored_at, or_none=False),
    )


def _block_mask(visible: np.ndarray, first: Tensor, last: Tensor, place: Tensor) -> BlockMask:
    """FlexAttention's lists of blocks, from the mask (queries, keys); in partial blocks `mask_mod` computes it."""
    num_blocks = [-(-size // BLOCK_SIZE) for size in visible.shape]
    padded = np.zeros([count * BLOCK_SIZE for count in num_blocks], bool)
    padded[: visible.shape[0], : visible.shape[1]] = visible
    filled = padded.reshape(num_blocks[0], BLOCK_SIZE, num_blocks[1], BLOCK_SIZE).sum((1, 3))
    whole = filled == BLOCK_SIZE**2

    def listed(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """For each row, the number of chosen blocks, and the indices of all blocks, chosen ones first."""
        numbers = np.argsort(~chosen, axis=1, kind="stable")
        counts = torch.from_numpy(chosen.sum(1).astype(np.int32)), torch.from_numpy(numbers.astype(np.int32))
        return counts[0][None, None].to(place.device), counts[1][None, None].to(place.device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(first[query], last[query], place[key])

    partly = listed((filled > 0) & ~whole)
    return BlockMask.from_kv_blocks(
        *partly, *listed(whole), BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=(len(first), len(place))
    )


@dataclass(frozen=True, eq=False)
class KeyBlocks:
    """The cached keys that the rows of a decoding step see, and the blocks of keys that any of them sees."""

    visible: Tensor
    """(rows, keys) bool, text included."""
    text_len: int
    blocks: BlockMask

    @property
    def num_blocks(self) -> tuple[int, int]:
        """The number of blocks read, and of all blocks."""
        return int(self.blocks.kv_num_blocks.sum()), self.blocks.kv_indices.shape[-1]


def list_key_blocks(visible: Tensor, text_len: int, num_keys: int) -> KeyBlocks:
    """List the blocks for rows that see the frame positions `visible`, (rows, positions) bool.

    The tensor operations are the same for any rows.
    """
    rows, num_blocks = len(visible), -(-num_keys // BLOCK_SIZE)
    frames = visible[:, : num_keys - text_len]
    text = frames.new_ones(rows, text_len)
    visible = torch.cat([text, F.pad(frames, (0, num_keys - text_len - frames.shape[1]))], 1)
    seen = F.pad(visible.any(0), (0, num_blocks * BLOCK_SIZE - num_keys)).view(num_blocks, BLOCK_SIZE).any(1)
    counts = seen.sum(dtype=torch.int32).view(1, 1, 1)
    numbers = torch.argsort(~seen, stable=True).to(torch.int32).view(1, 1, 1, num_blocks)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query, key]

    blocks = BlockMask.from_kv_blocks(
        counts, numbers, BLOCK_SIZE=BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=(rows, num_keys)
    )
    return KeyBlocks(visible, text_len, blocks)


def attend_key_blocks(query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, keys: KeyBlocks) -> Tensor:
    """Attention of a few rows over a cache by FlexAttention, without gradients.

    Shapes: query (batch, heads, rows, head_dim), and the result; key, value (batch, heads, keys, head_dim); text_bias
    (batch, text_len).
    """
    bias = F.pad(text_bias, (0, key.shape[2] - keys.text_len))

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        return score + bias[batch, key_row]

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = attend(query, key, value, score_mod=add_bias, block_mask=keys.blocks)
    return out


def flex_is_available(device: torch.device, head_dim: int) -> bool:
    """Whether FlexAttention's kernel can be compiled for this device and head size."""
    return head_dim >= MIN_HEAD_DIM and (device.type == "cpu" or has_triton())


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, mask: JoinedMask, dropout: float
) -> Tensor:
    """`attention.JoinedAttention` by FlexAttention; dense where it has no kernel: dropout, or gradients on a CPU."""
    if dropout or not _has_kernel(query, key, value):
        return attend_dense(query, key, value, text_bias, mask, dropout)
    bias, last = _key_bias(text_bias, mask), mask.last

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query_row: Tensor, key_row: Tensor) -> Tensor:
        return score + bias[(last[query_row] > TEXT).to(torch.int32), batch, key_row]

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out: Tensor = attend(query, key, value, score_mod=add_bias, block_mask=mask.blocks)
    return out


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, text_bias: Tensor, mask: JoinedMask, dropout: float
) -> Tensor:
    """`attention.JoinedAttention` by the fused dense kernel, which computes all pairs of rows."""
    hidden = ~sees(mask.first[:, None], mask.last[:, None], mask.place)
    of_text, of_frames = _key_bias(text_bias, mask)[:, :, None, None]
    bias = torch.where((mask.last > TEXT)[:, None], of_frames, of_text)
    bias = bias.masked_fill(hidden, float("-inf")).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, bias, dropout)


def _key_bias(text_bias: Tensor, mask: JoinedMask) -> Tensor:
    """Biases (2, batch, keys) for the scores of text queries, which have no bonus, and for those of frame queries."""
    padding = text_bias.masked_fill(text_bias > float("-inf"), 0.0)
    return F.pad(torch.stack([padding, text_bias]), (0, len(mask.place) - mask.text_len))


def _has_kernel(*inputs: Tensor) -> bool:
    """FlexAttention's kernel for CPUs has no backward pass."""
    return inputs[0].device.type != "cpu" or not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


@cache
def _compiled_flex() -> Callable[..., Any]:
    return compile_static(flex_attention)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(1, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`x.index_select(1, order)` for a permutation, whose gradient is a gather too, not a sum by atomics."""
    out: Tensor = _Permute.apply(x, order, inverse)  # type: ignore[no-untyped-call]
    return out
