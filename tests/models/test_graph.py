"""`trace`: the layers of a model in the order in which they run, and whose outputs they take."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cnvzoo
from cnvzoo.errors import ModelError
from cnvzoo.models import Classifier, build_model
from cnvzoo.models.graph import FLATTEN, GLOBAL_POOL, LayerCall, trace

BITS = {"w_bits": 4, "a_bits": 4}


def described(calls: list[LayerCall]) -> list[tuple[str, tuple[str, ...]]]:
    """The name of each call, and the names of those whose outputs it takes."""
    return [(call.name, tuple(calls[i].name for i in call.inputs)) for call in calls]


def block(name: str, before: str, shortcut: bool, rounds: bool = True) -> list[tuple[str, tuple[str, ...]]]:
    """The calls of a residual block, which takes the output of `before`."""
    calls, taken, residual = [], before, before
    if rounds:
        calls.append((f"{name}.input", (before,)))
        taken = f"{name}.input"
    calls += [
        (f"{name}.conv1", (taken,)),
        (f"{name}.norm1", (f"{name}.conv1",)),
        (f"{name}.relu", (f"{name}.norm1",)),
        (f"{name}.conv2", (f"{name}.relu",)),
    ]
    if shortcut:
        residual = f"{name}.shortcut.1"
        calls += [(f"{name}.shortcut.0", (taken,)), (residual, (f"{name}.shortcut.0",))]
    calls += [(f"{name}.norm2", (f"{name}.conv2",)), (f"{name[:8]}.relu", (f"{name}.norm2", residual))]
    return calls


def in_any_order(calls: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    return sorted(calls)


@pytest.mark.parametrize("rounds", [True, False])
def test_the_calls_of_a_residual_network(rounds: bool) -> None:
    bits = BITS if rounds else {"w_bits": 8, "a_bits": 8}  # at 8 bits there is nothing to round
    calls = trace(build_model("quant_resnet20", **bits))
    expected = [("x", ()), ("input", ("x",)), ("conv", ("input",)), ("norm", ("conv",)), ("stages.0.relu", ("norm",))]
    before = "stages.0.relu"
    for stage in range(3):
        for number in range(3):
            expected += block(f"stages.{stage}.{number}", before, shortcut=stage > 0 and number == 0, rounds=rounds)
            before = f"stages.{stage}.relu"
    expected += [(GLOBAL_POOL, (before,)), (FLATTEN, (GLOBAL_POOL,)), ("fc", (FLATTEN,))]
    assert in_any_order(described(calls)) == in_any_order(expected)
    for position, call in enumerate(calls):
        assert all(i < position for i in call.inputs), call.name
    sums = [call for call in calls if len(call.inputs) == 2]
    # the output of a shortcut is not rounded yet, and the outputs of blocks are
    assert [(call.name, call.rounded) for call in sums] == [
        ("stages.0.relu", True), ("stages.0.relu", True), ("stages.0.relu", True),
        ("stages.1.relu", False), ("stages.1.relu", True), ("stages.1.relu", True),
        ("stages.2.relu", False), ("stages.2.relu", True), ("stages.2.relu", True),
    ]  # fmt: skip
    for call in sums:  # the first is what the block computed
        assert calls[call.inputs[0]].name.endswith(".norm2")
    # a residual that is rounded is an earlier output of the same layer
    assert all(calls[s.inputs[1]].layer is s.layer for s in sums if s.rounded)
    assert calls[-1].name == "fc"


@pytest.mark.parametrize("name", ["quant_cnv", "quant_mobilenet_v1"])
def test_the_calls_of_a_chain(name: str) -> None:
    model: Any = build_model(name, **BITS)
    calls = trace(model)
    assert [call.inputs for call in calls] == [(), *((i,) for i in range(len(calls) - 1))]
    chained: list[nn.Module | None] = [None, model.get_submodule("input"), *model.features]
    if name == "quant_mobilenet_v1":
        chained = [*chained[:2], *(layer for part in model.features for layer in part)]
        assert [call.layer for call in calls] == [*chained, None, None, model.get_submodule("fc")]
        assert [call.name for call in calls[-3:]] == [GLOBAL_POOL, FLATTEN, "fc"]
    else:
        assert [call.layer for call in calls] == [*chained, None, *model.classifier]


class Own(Classifier):
    """A user's model; `middle` is what it does between its layers."""

    def __init__(self, num_classes: int, in_chans: int, w_bits: int = 4, a_bits: int = 4) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(in_chans, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, num_classes)

    def middle(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.middle(x, self.second(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc


@pytest.fixture
def registered() -> Iterator[Any]:
    def register(model: type[Own]) -> Classifier:
        cnvzoo.register_model("own", summary="of tests")(model)
        return build_model("own", num_classes=3)

    yield register
    cnvzoo.unregister_model("own")


def test_a_model_of_a_user(registered: Any) -> None:
    assert described(trace(registered(Own))) == [
        ("x", ()), ("first.0", ("x",)), ("first.1", ("first.0",)), ("first.2", ("first.1",)),
        ("second", ("first.2",)), (GLOBAL_POOL, ("second",)), (FLATTEN, (GLOBAL_POOL,)), ("fc", (FLATTEN,)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (lambda self, x, y: torch.sigmoid(y), "^Own calls .*sigmoid.*, which has no place in a graph of layers$"),
        (lambda self, x, y: x + y, "^Own calls .*add.*, which has no place"),
        (lambda self, x, y: y.mean((2, 3), keepdim=True), "^Own calls mean, which has no place"),
        (lambda self, x, y: nn.functional.adaptive_avg_pool2d(y, 2), "^Own calls .*pool2d.*, which has no place"),
        (lambda self, x, y: y if y.sum() > 0 else x, "^the layers of Own cannot be followed: "),
    ],
    ids=["sigmoid", "sum", "method", "pool", "branch"],
)
def test_a_model_that_does_something_else_is_refused(registered: Any, middle: Any, message: str) -> None:
    model = registered(type("Own", (Own,), {"middle": middle}))
    with pytest.raises(ModelError, match=message) as caught:
        trace(model)
    assert "\n" not in str(caught.value)


def test_what_the_output_does_not_need_is_left_out(registered: Any) -> None:
    class Auxiliary(Own):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            features = self.forward_features(x)
            logits = self.forward_head(features)
            self.second(features)  # for a loss, for example
            return logits

    assert described(trace(registered(Auxiliary))) == described(trace(build_model("own", num_classes=3)))
    assert described(trace(build_model("own", num_classes=3)))[-1] == ("fc", (FLATTEN,))


def test_more_than_images_or_logits_are_refused(registered: Any) -> None:
    class Two(Own):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    with pytest.raises(
        ModelError, match=r"^Two returns something else than one tensor: have it return the logits only"
    ):
        trace(registered(Two))

    class Masked(Own):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return self.fc(torch.flatten(mask, 1))

    cnvzoo.unregister_model("own")
    with pytest.raises(ModelError, match=r"^Masked takes more than images: its output depends on mask$"):
        trace(registered(Masked))


def test_a_model_is_traced_while_others_run_and_are_traced() -> None:
    """torch.fx has all modules of the process call it meanwhile; two traces at once would leave them like that."""
    call = nn.Module.__call__
    model, other = build_model("quant_cnv", w_bits=4, a_bits=4), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    expected, found, failed, done = described(trace(model)), [], [], threading.Event()

    def follow() -> None:
        try:
            found.extend(described(trace(model)) for _ in range(5))
        except Exception as error:
            failed.append(error)

    def run() -> None:
        try:
            while not done.is_set():
                other(torch.ones(1, 2))
        except Exception as error:
            failed.append(error)

    running, threads = threading.Thread(target=run), [threading.Thread(target=follow) for _ in range(2)]
    for thread in (running, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    running.join()
    assert failed == []
    assert found == [expected] * 10
    assert nn.Module.__call__ is call
