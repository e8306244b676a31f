"""Live bytes of tensors while operations run on fake tensors, whose values are never computed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created by operations; ``peak`` is the maximum so far.

    Operations of real tensors (prompts, tokens, times) are computed. Those of fake tensors are not: their floats are
    fake; integers and booleans, which decide what comes next, are real zeros; a float that is asked for is 1.
    Convolutions include the workspace copies of their kernels on the device (cpu, cuda).
    """

    def __init__(self, not_counted: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = self._phase = 0
        self.device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: the arguments of torch's interface."""
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + self._rearranged(args[0], args[1], out))
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Any: as above."""
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func in _INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return tree_map(_with_values, func(*args, **kwargs))

    def _rearranged(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
        """Size of the channels-last copies of input and output in a convolution.

        oneDNN allocates one at a time, and none for 1 x 1 kernels (both measured); cuDNN both.
        """
        if max(weight.shape[2:]) == 1:
            return 0
        sizes = (x.nbytes, out.nbytes)
        return max(sizes) if self.device == "cpu" else sum(sizes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size, self._phase)

    def restart(self) -> None:
        """Counts from 0: neither what is alive now, which may be garbage, nor that it is freed later."""
        self.now = self.peak = 0
        self._phase += 1

    def _freed(self, key: int, size: int, phase: int) -> None:
        self._known.discard(key)
        if phase == self._phase:
            self.now -= size


_INDEXED = (
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index.Tensor),
)
"""Operations whose second argument may hold masks, which have a shape of the result that depends on values."""


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as indices."""
    return list(index.nonzero().unbind(1)) if index is not None and index.dtype == torch.bool else [index]


def _with_values(x: Any) -> Any:
    """Any: an output of an operation."""
    if isinstance(x, FakeTensor) and not (x.is_floating_point() or x.is_complex()):
        return torch.zeros(x.shape, dtype=x.dtype)
    return x


def fake_weights(modules: Iterable[nn.Module]) -> None:
    """Replaces the parameters of modules, and their buffers on the meta device, by fake tensors on the CPU.

    Shared parameters stay shared; buffers of integers become zeros.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the fake tensors keep it
    for module in {child: None for outer in modules for child in outer.modules()}:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in own:
            if old not in made and isinstance(old, nn.Parameter):
                with mode:
                    made[old] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
            elif old not in made:
                with mode:
                    made[old] = torch.empty(old.shape, dtype=old.dtype) if old.is_meta else old
                made[old] = _with_values(made[old])
            setattr(module, name, made[old])
