"""What DeepSpeed must find set before it starts, so that plain `cogvideo train` works and nobody waits on a compiler.

Without a launcher DeepSpeed looks for MPI, and on a CPU it compiles a shared-memory reduction (`deepspeed_shm_comm`):
35 seconds in silence, a failure where g++ or ninja are missing, and an endless wait on the lock that a killed build
leaves behind. Only `inference_all_reduce` uses that op, with gloo as its fallback, and training never calls it; so it
is not built at all, in any number of processes. Not here: the engine itself (`engine.py`).
"""

import os

from cogvideo.logs import get_logger

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def prepare_environment() -> None:
    """Call once, before anything imports deepspeed; it then is imported here where there is no GPU.

    Under a launcher (RANK set) the process group is left as it says; without one this process is a group of its own.
    """
    if "RANK" not in os.environ:
        os.environ.update(ONE_PROCESS)
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.setdefault("DS_ACCELERATOR", "cpu") != "cpu":
        return  # the user named another accelerator
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ.get("WORLD_SIZE", "1") != "1":
        get_logger(__name__).info("%s processes on CPU, talking through gloo", os.environ["WORLD_SIZE"])
