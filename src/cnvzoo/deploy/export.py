"""One entrance for all formats: choose, check, and write the file whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from cnvzoo.errors import nearest
from cnvzoo.files import replacing

from .errors import DeployError
from .metadata import FORMATS, KEY, Metadata


def write_model(model: nn.Module, path: str | Path, facts: Metadata) -> Metadata:
    """Write `model` in the format that `facts` names, with facts; the file is whole or not there.

    Returns:
        What the file says of itself: the facts with the scale of an integer graph.

    Raises:
        DeployError: the model cannot be expressed in the format, or a package that it takes is not installed.
    """
    if facts.format not in FORMATS:
        raise DeployError(f"unknown format {facts.format!r}: {nearest(facts.format, FORMATS)}")
    try:
        import onnx  # noqa: F401  (said in words, before a minute's work)
    except ImportError:
        raise DeployError("exporting needs onnx and its friends: pip install 'cnvzoo[export]'") from None
    was_training = model.training
    model.eval()
    try:
        proto, facts = _graph(model, facts)
    finally:
        model.train(was_training)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, facts.to_json()
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return facts


def _graph(model: nn.Module, facts: Metadata) -> tuple[Any, Metadata]:
    if facts.format == "integer":
        from .graph import integer_graph
        from .integer import integer_net

        net = integer_net(model)
        return integer_graph(net), replace(facts, scale=net.scale)
    if facts.format == "qonnx":
        from .qonnx import qonnx_graph

        return qonnx_graph(model, facts.in_chans, facts.size), facts
    from .plain import plain_graph

    return plain_graph(model, facts.in_chans, facts.size), facts
