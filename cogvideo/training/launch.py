"""Brings up the process group and the device, and runs a trainer."""

import atexit
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_cpu import prepare_environment

if TYPE_CHECKING:
    from cogvideo.training.trainer import Preview


def train(config: TrainConfig, *, resume: bool = False, preview: "Preview | None" = None) -> dict[str, float]:
    """Train as `config` says, in this process of however many a launcher started; returns the last metrics."""
    prepare_environment()
    import deepspeed
    import torch
    import torch.distributed as dist

    from cogvideo.distributed import lost_peer_as_error
    from cogvideo.training.trainer import Trainer

    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    device = torch.device("cpu")
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=config.deepspeed.timeout_minutes))
        # at exit, not after this run: DeepSpeed keeps groups that a second run in this process would meet again
        atexit.register(dist.destroy_process_group)
    with _denormals_flushed(), lost_peer_as_error(lambda: "see what it said"):
        return Trainer(config, device, resume=resume, preview=preview).train()


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Denormal numbers count as zero inside: without it a small model's backward can be ten times slower on a CPU.

    It is the thread's state, not torch's, so a caller that goes on to other arithmetic gets it back as it was.
    """
    import torch

    was_flushed = torch.tensor(2.0**-149).mul(1.0).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushed)
