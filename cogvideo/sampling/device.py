"""Where sampling computes."""

import os

import torch


def open_device(name: str) -> torch.device:
    """`auto`: of several processes each its own GPU, or the CPU where there is none; else the device of that name.

    Raises: ValueError for a name that means nothing, or a device that is not here.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} names no device; give auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not supported; give auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device={name}, but this machine has {gpus} GPUs that torch can use; give auto or cpu")
    return device
