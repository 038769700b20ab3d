"""PyTorch Hub: `torch.hub.load(<this checkout>, "quant_cnv_w4a4", dataset="cifar10", pretrained=True, source="local")`.

Every model of `cnvzoo.list_models()` is an entry point; quantized models also at the bit widths of the tables.
"""

import sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = [
    "brevitas", "filelock", "huggingface_hub", "numpy", "pydantic", "rich", "safetensors", "torch", "torchvision",
    "yaml",
]  # fmt: skip

for _folder in ("src", "runtime/src"):
    sys.path.append(str(_Path(__file__).resolve().parent / _folder))  # an installed cnvzoo comes first

import cnvzoo as _cnvzoo  # noqa: E402
from cnvzoo.models import model_spec as _model_spec  # noqa: E402

_TABLE_BITS = (8, 4, 2)


def _entry_point(name: str, model: str) -> _Callable[..., _Any]:
    def create(pretrained: bool = False, *, dataset: str | None = None, **kwargs: _Any) -> _Any:
        return _cnvzoo.create_model(f"{name}.{dataset}" if dataset else name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{_model_spec(model).summary}.

    Args:
        pretrained: load published weights; the model is then in eval mode.
        dataset: cifar10, cifar100, mnist or fashion_mnist: sets classes and channels, and which weights are loaded.
        **kwargs: passed to `cnvzoo.create_model`: num_classes, in_chans, w_bits, a_bits, hub.

    Returns:
        A torch.nn.Module from images [N, in_chans, H, W] to logits [N, num_classes].
    """
    return create


for _name in _cnvzoo.list_models():
    globals()[_name] = _entry_point(_name, _name)
    if _model_spec(_name).quantized:
        for _bits in _TABLE_BITS:
            globals()[f"{_name}_w{_bits}a{_bits}"] = _entry_point(f"{_name}_w{_bits}a{_bits}", _name)
