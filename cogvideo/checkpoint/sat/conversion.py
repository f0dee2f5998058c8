"""A planned conversion: which tensor becomes which, how large the result is, and the function that writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cogvideo.checkpoint.parameters import ModelKind
from cogvideo.tensor_file import TensorInfo


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of the source and what becomes of it."""

    source: str
    target: str | None
    """None: dropped."""
    info: TensorInfo | None
    """As written; None if dropped."""
    reason: str = ""

    def __str__(self) -> str:
        if self.target is None:
            return f"{self.source} dropped: {self.reason}"
        return f"{self.source} -> {self.target}  {self.info}"


@dataclass(frozen=True)
class Conversion:
    """A checked conversion. Nothing is on disk until `run` writes it."""

    kind: ModelKind
    config: dict[str, Any]
    mappings: list[TensorMapping]
    run: Callable[[Callable[[], Any]], None]
    """Takes a callback that is called for each of the `num_writes` tensors written."""
    num_writes: int

    @property
    def written(self) -> list[TensorMapping]:
        return [mapping for mapping in self.mappings if mapping.target is not None]

    @property
    def dropped(self) -> list[TensorMapping]:
        return [mapping for mapping in self.mappings if mapping.target is None]

    @property
    def num_parameters(self) -> int:
        return sum(mapping.info.numel for mapping in self.mappings if mapping.info)

    @property
    def nbytes(self) -> int:
        return sum(mapping.info.nbytes for mapping in self.mappings if mapping.info)
