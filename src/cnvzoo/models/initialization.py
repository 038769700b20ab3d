"""The initial values of models: whether they are drawn, and from which generator.

The random numbers of a new model come from torch's default CPU generator, as for any torch module. Inside
`initialized_from(seed)` they come from a generator with that seed, and inside `without_initialization()`, for models
whose values are loaded from a file, none are drawn. Both leave the default generator alone. Saving and restoring its
state instead would disturb other threads of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

_skipped: ContextVar[bool] = ContextVar("initialization_skipped", default=False)

# The functions that fill a tensor with random numbers, as torch passes them to a TorchFunctionMode: methods of Tensor,
# and those functions of torch.nn.init that are passed before they call such a method.
_RANDOM_FILLS = {
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.bernoulli_,
    torch.Tensor.random_,
    torch.Tensor.cauchy_,
    torch.Tensor.exponential_,
    torch.Tensor.geometric_,
    torch.Tensor.log_normal_,
    init.uniform_,
    init.normal_,
    init.kaiming_uniform_,
}

# Those that make a tensor of random numbers. No model of this library calls them; registered ones may.
_RANDOM_TENSORS = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.poisson,
    torch.binomial,
    torch.rand_like,
    torch.randn_like,
    torch.randint_like,
    torch.Tensor.bernoulli,
    torch.Tensor.multinomial,
}


class _RandomFillsFrom(TorchFunctionMode):
    """Random numbers in this thread come from `generator`, but for calls that are given one of their own.

    With None, tensors keep the values that they have. New tensors have random numbers then too, from a generator of
    their own.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            if self._generator is None:
                return args[0] if args else kwargs["tensor"]
        elif func not in _RANDOM_TENSORS:
            return func(*args, **kwargs)
        if kwargs.get("generator") is None and not any(isinstance(arg, torch.Generator) for arg in args):
            kwargs = {**kwargs, "generator": self._generator or torch.Generator()}
        return func(*args, **kwargs)


@contextmanager
def without_initialization() -> Iterator[None]:
    """Models built inside draw no random numbers and have arbitrary values, all of which have to be loaded."""
    token = _skipped.set(True)
    try:
        with _RandomFillsFrom(None):
            yield
    finally:
        _skipped.reset(token)


@contextmanager
def initialized_from(seed: int) -> Iterator[None]:
    """Models built inside, on the CPU, have the values that they would have after `torch.manual_seed(seed)`."""
    with _RandomFillsFrom(torch.Generator().manual_seed(seed)):
        yield


def skips_initialization() -> bool:
    """Whether this code runs inside `without_initialization()`, so that initial values need not be computed."""
    return _skipped.get()


def init_weight(weight: Tensor) -> None:
    """He initialization (He et al. 2015, arXiv:1502.01852), which keeps the variance of activations in a CNV."""
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
