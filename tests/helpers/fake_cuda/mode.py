"""The dispatch mode: host tensors stay real, tensors on "cuda" are fake, and copies to the host are counted."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch._subclasses.fake_tensor import DynamicOutputShapeException
except ImportError:  # where it is has changed before
    DynamicOutputShapeException = DataDependentOutputException  # type: ignore[misc, assignment]

aten = torch.ops.aten
CARD = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132)
_to_numpy = torch.Tensor.numpy


class FakeCuda(TorchDispatchMode):
    """While active, "cuda" can be used. `syncs` lists the functions of cogvideo that waited for the GPU, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.syncs: list[str] = []
        self._reads = 0

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
            self._reads += 1  # integers grow, so that a loop until a count is reached ends
            return {torch.bool: False, torch.float32: 1.0}.get(args[0].dtype, self._reads)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self._count_sync()
            return args[0].zero_()
        try:
            with self.fake:
                args, kwargs = pytree.tree_map_only(torch.Tensor, self._to_fake, (args, kwargs))
                result = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException, GuardOnDataDependentSymNode):
            raise AssertionError(f"{_caller()} waits for the GPU: what {func} gives depends on values") from None
        return pytree.tree_map_only(FakeTensor, self._leave, result)

    def _leave(self, x: FakeTensor) -> torch.Tensor:
        """Whatever an operation on the GPU gives on the host was copied there."""
        if x.device.type == "cuda":
            return x
        self._count_sync()
        return torch.zeros(x.shape, dtype=x.dtype)

    def _to_fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _count_sync(self) -> None:
        self.syncs.append(_caller())


def _caller() -> str:
    """The innermost function of cogvideo that is being called."""
    frame = sys._getframe(1)
    while frame is not None and "/cogvideo/" not in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return "outside" if frame is None else frame.f_code.co_qualname


def _numpy(tensor: torch.Tensor, *, force: bool = False) -> Any:
    """Tensor.numpy, which reads a tensor's memory without dispatching anything."""
    return _to_numpy(tensor.detach().cpu() if force else tensor, force=force)


def _tolist(tensor: FakeTensor) -> Any:
    """FakeTensor.tolist as it is on a GPU: one copy to the host, not one for each element."""
    return tensor.detach().cpu().tolist()


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
            mock.patch("torch.cuda.get_device_properties", lambda device=None: CARD),
            mock.patch.object(torch.Tensor, "numpy", _numpy),
            mock.patch.object(FakeTensor, "tolist", _tolist),
            FakeCuda() as mode,
        ):
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
