"""Starts training in this process: environment, DeepSpeed, process group, device, then the trainer.

DeepSpeed needs some preparation before it is imported. Without a launcher it would look for MPI. On a CPU it would
compile a shared-memory reduction (`deepspeed_shm_comm`): 35 seconds without output, a failure where g++ or ninja is
missing, and an endless wait on the lock that a killed build leaves behind. Only `inference_all_reduce` uses that op,
with gloo as its fallback, and training never calls it, so the op is disabled.
"""

import atexit
import contextlib
import ctypes
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from cogvideo.logs import get_logger
from cogvideo.training.config import TrainConfig, fetch_weights

if TYPE_CHECKING:
    import torch

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

LARGE_BLOCK_BYTES = 1 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from malloc.h."""


def train(config: TrainConfig, *, resume: bool = False) -> dict[str, float]:
    """Train as `config` says, as one of however many processes a launcher started; returns the last logged metrics."""
    prepare_environment()
    import deepspeed
    import torch
    import torch.distributed as dist

    from cogvideo.distributed import ProcessGroup, connecting, lost_peer_as_error
    from cogvideo.locks import lock_folder
    from cogvideo.training.checkpointing import resume_advice
    from cogvideo.training.heartbeat import Heartbeat
    from cogvideo.training.resources import resolve_auto, smallest_machine
    from cogvideo.training.trainer import Trainer

    config = fetch_weights(config)
    if config.train.num_threads is not None:
        torch.set_num_threads(config.train.num_threads)
    if not dist.is_initialized():
        ProcessGroup.from_environment()  # refuses variables that contradict each other
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # a collective that times out ends the process
        with connecting():
            deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=config.deepspeed.timeout_minutes))
        # at exit, not after this run: DeepSpeed keeps groups that a second run in this process would use again
        atexit.register(dist.destroy_process_group)
    config = resolve_auto(config, smallest_machine(device), dist.get_world_size())
    processes = ProcessGroup(dist.get_rank(), dist.get_world_size())
    with (
        _flush_denormals(),
        _restored_linear(),
        lost_peer_as_error(lambda: "see its error message"),
        lock_folder(config.run_dir, processes),
        Heartbeat(60 * config.deepspeed.timeout_minutes, lambda: resume_advice(config.run_dir / "checkpoints")),
    ):
        return Trainer(config, device, resume=resume).train()


def own_device() -> "torch.device":
    """This process's device. Its index goes into LOCAL_RANK, which DeepSpeed requires and takes for the GPU's index.

    A scheduler may show each process a single GPU, which then has index 0 whatever its local rank is.
    Raises: ValueError if processes of this machine would share a GPU, or cannot tell which one is their own.
    """
    import torch

    from cogvideo.distributed import open_device

    rank, processes = os.environ.get("LOCAL_RANK") or "0", os.environ.get("LOCAL_WORLD_SIZE") or "1"
    if not (rank.isdecimal() and processes.isdecimal()):
        raise ValueError(
            f"LOCAL_RANK={rank} LOCAL_WORLD_SIZE={processes}; expected numbers; start with torchrun or deepspeed"
        )
    os.environ["LOCAL_RANK"], is_given = rank, bool(os.environ.get("LOCAL_RANK"))
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not (gpus := torch.cuda.device_count()):
        return torch.device("cpu")
    if gpus > 1 and not is_given and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"LOCAL_RANK is not set, and each process sees {gpus} GPUs; start with torchrun or deepspeed, or show each "
            "process one GPU"
        )
    needed = max(int(processes), int(rank) + 1)
    if gpus > 1 and needed > gpus:
        raise ValueError(
            f"{needed} processes on this machine, but {gpus} GPUs; start one process per GPU (--nproc-per-node {gpus})"
        )
    device = open_device("auto")
    os.environ["LOCAL_RANK"] = str(device.index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed refuses one that differs
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device.index)
    return device


@contextlib.contextmanager
def _restored_linear() -> Iterator[None]:
    """ZeRO 3 replaces `torch.nn.functional.linear` for the whole process; undo that at the end."""
    import torch.nn.functional as F

    linear = F.linear
    try:
        yield
    finally:
        F.linear = linear


def prepare_environment() -> None:
    """Prepare DeepSpeed's import; call once, before anything imports deepspeed.

    If RANK is set, a launcher started this process and its variables describe the process group; otherwise this process
    becomes a group of its own.
    """
    if not os.environ.get("RANK"):
        os.environ.update(ONE_PROCESS)
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.setdefault("DS_ACCELERATOR", "cpu") != "cpu":
        return  # the user chose another accelerator
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("WORLD_SIZE", "1") != "1":
        get_logger(__name__).info("%s processes on CPU, communicating through gloo", os.environ["WORLD_SIZE"])


def expand_segments() -> None:
    """Let PyTorch's CUDA allocator grow its blocks, so that memory fragments less; call before CUDA is initialised."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def tune_allocator() -> None:
    """Make glibc return large blocks to the system when they are freed; does nothing with other allocators.

    By default glibc soon keeps freed blocks of up to 32 MB, and memory fragments between the activations of a step. The
    cost is a new mapping for each large tensor. Huge pages halve it; torch uses them if asked before its first tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
    mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK_BYTES)


@contextlib.contextmanager
def _flush_denormals() -> Iterator[None]:
    """Treat denormal numbers as zero inside the block: otherwise a small model's backward can take ten times as long.

    The setting belongs to the thread, not to torch, so it is restored for whatever the caller computes next.
    """
    import torch

    was_flushed = torch.tensor(2.0**-149).mul(1.0).item() == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushed)
