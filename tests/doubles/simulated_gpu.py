"""A GPU simulated on the CPU: it finds code that would fail on a real one.

A tensor of the simulated device computes on the CPU and refuses what a real device refuses: tensors of two devices in
one operation, and its memory as an array of numpy. Kernels, precision and speed are not simulated.

``python simulated_gpu.py train quickstart device=cuda ...`` runs a command of lvrpo on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lvrpo.policies import loading

aten = torch.ops.aten
NAME = "simulated"
COPIES = (aten.copy_.default, aten._to_copy.default)
"""Operations whose tensors may be of two devices."""
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take indices of the CPU for values of the device."""


class _Streams:
    """The module ``torch.simulated``: its one stream is that of the CPU."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: object = None) -> Any:
        return mock.MagicMock()

    def stream(self, stream: object) -> Any:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, device: object = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    Stream = mock.MagicMock


_setup_privateuseone_for_python_backend(NAME, backend_module=_Streams())
HALF = """linear mm addmm bmm baddbmm addbmm matmul mv addmv conv1d conv2d conv3d conv_transpose2d.input
    scaled_dot_product_attention prelu"""
FULL = """softmax.int log_softmax.int layer_norm group_norm cumsum prod nll_loss cross_entropy_loss mse_loss
    binary_cross_entropy_with_logits exp log log2 log1p pow.Tensor_Scalar rsqrt norm.Scalar sum sum.dim_IntList"""
AUTOCAST = {torch.bfloat16: HALF, torch.float32: FULL}
"""What autocast computes in which dtype on CUDA (docs.pytorch.org/docs/stable/amp.html)."""
_AUTOCAST_KEY = torch._C._parse_dispatch_key("AutocastPrivateUse1") or torch._C.DispatchKey.Undefined
_LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_LIBRARIES[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _autocast(name: str, dtype: torch.dtype) -> None:
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEY)):
            return operation(*tree_map_only(torch.Tensor, cast, args), **tree_map_only(torch.Tensor, cast, kwargs))

    _LIBRARIES[1].impl(name, compute, "AutocastPrivateUse1")


for _dtype, _names in AUTOCAST.items():
    for _name in _names.split():
        _autocast(_name, _dtype)


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on the device and holds its values on the CPU."""

    held: torch.Tensor
    is_cuda = True  # for branches of ours

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=held.requires_grad,
        )
        made.held = held.detach()
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({self.held})"

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, DeviceTensor)
        if value.dtype == self.dtype and value.shape == self.shape:
            self.held = value.held
        else:  # what a tensor says of itself is fixed
            made = DeviceTensor(value.held).requires_grad_(self.requires_grad)
            torch.utils.swap_tensors(self, nn.Parameter(made) if isinstance(self, nn.Parameter) else made)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = DeviceTensor(self.held.clone()).requires_grad_(self.requires_grad)
        return memo.setdefault(
            id(self), nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        )

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy: use Tensor.cpu() first")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operation on the CPU, and wraps its result where a real operation would leave it on the device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_device = [t for t in tensors if isinstance(t, DeviceTensor)]
    target = kwargs.get("device")
    goes_there = target is not None and torch.device(target).type == NAME
    if on_device and function not in COPIES:
        _require_one_device(function, args, tensors)
    if function is aten._fused_sdp_choice.default and on_device:
        return 0  # the math kernel: others are named after their device
    options = dict(kwargs)
    if target is not None:
        options["device"] = torch.device("cpu")
    if goes_there:
        options.pop("pin_memory", None)
    plain_args, plain_kwargs = tree_map_only(DeviceTensor, lambda t: t.held, (args, options))
    result = function(*plain_args, **plain_kwargs)
    stays = bool(on_device) if target is None else goes_there
    if function is aten.copy_.default:
        return args[0]
    if function is aten._local_scalar_dense.default or not stays:
        return result
    wrapped = tree_map_only(torch.Tensor, DeviceTensor, result)
    return return_and_correct_aliasing(function, args, dict(kwargs), wrapped) if on_device else wrapped


def _require_one_device(function: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raises RuntimeError, as a GPU does, for a tensor of the CPU that is not a single number."""
    others = [t for t in tensors if not isinstance(t, DeviceTensor) and t.ndim > 0]
    if function in INDEXING:
        allowed = tree_leaves(args[1])
        others = [t for t in others if not any(t is a for a in allowed)]
        if not isinstance(args[0], DeviceTensor):
            others.append(args[0])
    if others:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {NAME}:0 and cpu")


class _Mode(TorchDispatchMode):
    """Makes tensors of the device where nothing but ``device=`` says so."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class _Lists(TorchFunctionMode):
    """``torch.tensor`` reads the tensors in a list without asking a mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tensor and isinstance(args[0], list | tuple):
            args = (tree_map_only(DeviceTensor, lambda t: t.tolist(), args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """While active, ``simulated`` is a device."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module moves by new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) asks the mode too
    try:
        with _Mode(), _Lists(), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def main(arguments: list[str]) -> None:
    """Runs a command of lvrpo; its ``cuda`` and ``auto`` are the simulated device."""
    torch.set_num_threads(1)
    loading.pick_device = lambda name: torch.device("cpu") if name == "cpu" else torch.device(NAME, 0)
    from lvrpo import cli  # its commands import what was replaced here

    with simulated_gpu():
        sys.exit(cli.main(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
