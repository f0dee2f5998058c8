"""A cache of batches for tests of resumable sampling."""

from dataclasses import dataclass, field

import torch


@dataclass
class DictCache:
    """Keeps batches in memory and records which were stored."""

    batches: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: list[str] = field(default_factory=list)

    def load(self, name: str) -> torch.Tensor | None:
        return self.batches.get(name)

    def store(self, name: str, tokens: torch.Tensor) -> None:
        self.batches[name] = tokens
        self.stored.append(name)
