"""Where a run's numbers go: metrics.jsonl always, wandb and TensorBoard if asked for; one record for all of them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cogvideo.config import to_dict
from cogvideo.logs import get_logger
from cogvideo.training.config import TrainConfig
from cogvideo.training.metrics import MetricsFile

log = get_logger(__name__)


class Sinks:
    """Of the first process; others write nothing."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises: ValueError if TensorBoard is asked for and not there."""
        self._config = config
        self.file = MetricsFile(config.run_dir / "metrics.jsonl")
        self._wandb: Any = None
        self._tensorboard: Any = None
        self._told = False
        if config.log.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("log.tensorboard=true needs tensorboard; pip install 'cogvideo[tensorboard]'")

    def open(self, first_step: int) -> None:
        """Begin to write, after `first_step` steps: what a lost continuation wrote beyond them goes."""
        self.file.rewind(first_step)
        if self._config.log.wandb != "off":
            import wandb

            config = json.loads(json.dumps(to_dict(self._config)))
            folder = self._config.run_dir
            self._wandb = wandb.init(project="cogvideo", mode=self._config.log.wandb, dir=folder, config=config)
        if self._config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._config.run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """A record with its `step`. A disk that is full is told once; lines wait in memory until there is room."""
        try:
            self.file.write(record)
            self._told = False
        except OSError as error:
            if not self._told:
                log.error("%s cannot be written (%s); its lines wait for room", self.file.path, error.strerror or error)
            self._told = True
        numbers = {name: value for name, value in record.items() if name != "step"}
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, record["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """A sample sheet that was written to `path`."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                self._tensorboard.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()
