"""Where the random numbers of a model that is built come from: the program's generator, one of its own, or nowhere.

`create_model` initialises as any torch module does, from torch's generator for the CPU. A run has a seed of its own,
and a model whose values come from a file needs no numbers at all. Both leave the generator of the program as it is at
every moment, for all of its threads, which saving and restoring its state would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)

# what fills a tensor with random numbers, as torch hands it to a mode: the methods, and the functions of torch.nn.init
# that are handed over before they come to one
_DRAWING = {
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
    init.uniform_,
    init.normal_,
    init.kaiming_uniform_,
}


class _Draws(TorchFunctionMode):
    """Has this thread's tensors filled from `generator`; without one, they keep the values that they have."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _DRAWING:
            return func(*args, **kwargs)
        if self._generator is None:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **{**kwargs, "generator": self._generator})


@contextmanager
def without_initialization() -> Iterator[None]:
    """Models built inside may have any values, and draw no random numbers: every value has to be loaded."""
    token = _skipped.set(True)
    try:
        with _Draws(None):
            yield
    finally:
        _skipped.reset(token)


@contextmanager
def initialized_from(seed: int) -> Iterator[None]:
    """Models built inside on the CPU have the values that they would have after `torch.manual_seed(seed)`."""
    with _Draws(torch.Generator().manual_seed(seed)):
        yield


def skips_initialization() -> bool:
    """Whether what is only a start for training can be left out, here and now."""
    return _skipped.get()
