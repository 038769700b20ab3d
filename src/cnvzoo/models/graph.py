"""The layers of a model in the order in which they run, and which layer takes whose output.

Modules say what a model is made of, but not how its layers are connected: torch.fx finds that out by running the model
on symbols.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from cnvzoo.errors import ModelError
from cnvzoo.models.norm_act import QuantizedActivation

FLATTEN, GLOBAL_POOL = "flatten", "global pool"
_tracing = threading.Lock()  # torch.fx changes nn.Module for the whole process while it traces
_FUNCTIONS: dict[Any, str] = {torch.flatten: FLATTEN, F.adaptive_avg_pool2d: GLOBAL_POOL}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer when the model runs.

    Attributes:
        name: name of the layer in the model, such as `stages.0.1.conv2`; of a function, what it does.
        layer: the layer; None for the input of the model and for a function.
        inputs: positions, in the list of calls, of those whose outputs it takes: two for a sum, of which the second is
            the residual.
        rounded: for a sum of a quantized activation, whether the residual has been rounded already.
    """

    name: str
    layer: nn.Module | None
    inputs: tuple[int, ...]
    rounded: bool = True


class _Tracer(fx.Tracer):
    """Takes the layers of torch and of Brevitas as they are, and looks into all others.

    While it traces, torch.fx has `nn.Module` of the whole process call it: what other threads run is left as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        return isinstance(m, (nn.Conv2d, nn.Linear, QuantizedActivation)) or (
            m.__module__.startswith(("torch.nn", "brevitas")) or hasattr(m, "act_quant")
        )


def trace(model: nn.Module) -> list[LayerCall]:
    """The layer calls of a model, in the order of execution. The first is its input, and the last gives its output.

    `nn.Identity` is left out, and so is what the output does not depend on.

    Raises:
        ModelError: the model does something else than to call layers, to flatten, and to average over all pixels; or
            it takes more than images, or returns more than logits.
    """
    try:
        with _tracing:
            graph = _Tracer().trace(model)
    except (TypeError, RuntimeError, TraceError) as error:
        raise ModelError(f"the layers of {type(model).__name__} cannot be followed: {error}") from None
    _keep_needed(graph, type(model).__name__)
    calls: list[LayerCall] = []
    position: dict[fx.Node, int] = {}
    for node in graph.nodes:
        inputs = tuple(position[n] for n in node.all_input_nodes)
        layer = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "output" or isinstance(layer, nn.Identity):
            position[node] = inputs[0]
            continue
        if layer is None and node.op != "placeholder" and not _is_known(node):
            raise ModelError(f"{type(model).__name__} calls {node.target}, which has no place in a graph of layers")
        name = _FUNCTIONS[node.target] if node.op == "call_function" else str(node.target)
        position[node] = len(calls)
        calls.append(LayerCall(name, layer, inputs, node.kwargs.get("rounded", True)))
    return calls


def _keep_needed(graph: fx.Graph, model: str) -> None:
    """Remove what the output does not depend on, but for the first argument."""
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise ModelError(f"{model} returns something else than one tensor: have it return the logits only")
    images, *others = (node for node in graph.nodes if node.op == "placeholder")
    for node in [*graph.nodes][::-1]:
        if not node.users and node.op != "output" and node is not images:
            graph.erase_node(node)
    if others := [node for node in others if node in {*graph.nodes}]:
        raise ModelError(f"{model} takes more than images: its output depends on {others[0].target}")


def _is_known(node: fx.Node) -> bool:
    """Whether a function flattens all but the first dimension, or averages over all pixels."""
    function: Callable[..., Any] = node.target  # type: ignore[assignment]
    rest = {torch.flatten: (1,), F.adaptive_avg_pool2d: (1,)}
    return node.op == "call_function" and rest.get(function) == tuple(node.args[1:]) and not node.kwargs
