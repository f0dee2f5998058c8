"""What models that are built on a text-to-image trunk share: telling its parameters from those that they add to it."""

from collections.abc import Iterator
from typing import ClassVar

from torch import nn

from cogvideo.model.quantize import Embedding, Linear


class OnTrunk(nn.Module):
    """Holds a trunk's parameters under the trunk's own names, and others beside them."""

    added: ClassVar[tuple[str, ...]]
    """Parts of names that only what is added to the trunk has."""
    layers: nn.ModuleList

    @classmethod
    def is_added(cls, parameter_name: str) -> bool:
        """Whether a parameter is not one of the trunk's."""
        return any(part in parameter_name for part in cls.added)

    def added_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the model adds to the trunk."""
        return ((name, p) for name, p in self.named_parameters() if self.is_added(name))

    def trunk_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What a text-to-image trunk has under the same names."""
        return ((name, p) for name, p in self.named_parameters() if not self.is_added(name))

    def freeze_trunk(self, frozen: bool = True) -> None:
        """Let the trunk learn or not. Frozen, as published, what reads text alone costs no gradient."""
        for _, parameter in self.trunk_parameters():
            parameter.requires_grad_(not frozen)

    def narrow_trunk(self) -> None:
        """Hold the trunk's matrices in int8, each output row with a float32 scale; they can learn no more."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding) and not self.is_added(f"{name}.weight"):
                module.narrow()
