"""The dispatch mode: host tensors stay real, tensors on "cuda" are fake, and what crosses from one to the other counts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FakeCuda(TorchDispatchMode):
    """While active, "cuda" can be used. `syncs` lists the functions of cogvideo that waited for the GPU, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.syncs: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, FakeTensor) for x in tensors)
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if func in (aten._local_scalar_dense.default, aten.item.default):
            self._count_sync()
            return {torch.bool: False, torch.float32: 1.0}.get(args[0].dtype, 1)
        leaves_gpu = func is aten._to_copy.default and device is not None and not to_gpu
        if leaves_gpu or (func is aten.copy_.default and not isinstance(args[0], FakeTensor)):
            self._count_sync()
            if func is aten.copy_.default:
                return args[0].zero_()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._to_fake, (args, kwargs))
            return func(*args, **kwargs)

    def _to_fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _count_sync(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and "/cogvideo/" not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        self.syncs.append("outside" if frame is None else frame.f_code.co_qualname)


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """`device="cuda"` works inside, without values."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # real parameters become fake ones
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is dispatched as a copy
    try:
        with (
            mock.patch("torch.cuda.is_available", lambda: True),
            mock.patch("torch.cuda._lazy_init", lambda: None),
            mock.patch("torch.cuda.current_device", lambda: 0),
            mock.patch("torch.cuda.is_bf16_supported", lambda: True),
            FakeCuda() as mode,
        ):
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
