"""Nodes of integer nets, with results worked out by hand: ONNX Runtime and the reference give these."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Node, Rounding, Sum
from cnvzoo.deploy.integer_onnx import integer_graph
from cnvzoo.deploy.reference import run_reference
from cnvzoo.deploy.requantize import Requantization, StepFunctions, requantize

COUNTS = np.zeros(1, np.int64)


def layer(taken: int, weight: Any, *, bias: Any = 0, multiplier: float = 1, low: int = 0, **settings: Any) -> Layer:
    """A layer with int8 weights [out, in, rows, columns], and one bias and multiplier for all channels."""
    weight = np.array(weight, np.int8)
    biases, multipliers = np.full(len(weight), bias, np.int32), np.full(len(weight), multiplier, np.float32)
    chosen = Requantization(1, biases, multipliers, low, low + 255, COUNTS, COUNTS)
    return Layer(f"layer of {low} and {weight.tolist()}", (taken,), weight, 8, chosen, **settings)


def run(image: Any, *nodes: Node, classes: int = 1, **head: Any) -> list[list[int]]:
    """What a net gives for images [N, C, size, size]: its last levels, by a head with weights of 1 by default."""
    images = np.array(image, np.uint8)
    settings: dict[str, Any] = {"gain": 1, "bias": None, "pixels": None, "scale": 1.0, **head}
    settings.setdefault("weight", np.eye(classes, dtype=np.int8))
    last = Head("head", (len(nodes),), w_bits=8, **settings)
    net = IntegerNet((Image("image", (), images.shape[1], images.shape[2]), *nodes, last))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    content = integer_graph(net).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(["accumulators"], {"image": images})[0])
    np.testing.assert_array_equal(run_reference(net, images), found)
    return found.tolist()


def test_a_sum_is_clipped_to_0_and_255_for_every_pair_of_inputs():
    first, second = (values.reshape(-1) for values in np.mgrid[:256, :256])
    images = np.stack([first, second], 1)[:, :, None, None]
    levels = layer(0, [[[[1]], [[0]]]])
    summand = layer(0, [[[[0]], [[1]]]], bias=-128, low=-128)
    expected = np.clip(first + second - 128, 0, 255)
    assert run(images, levels, summand, Sum("sum", (2, 1))) == expected[:, None].tolist()


def test_the_sum_of_two_summands_is_clipped_too():
    """Clipped to -128..127 each, then added."""
    pairs = [(0, 0), (255, 0), (255, 255), (200, 90), (100, 128), (129, 127)]
    summands = [layer(0, np.eye(2, dtype=np.int8)[[i], :, None, None], bias=-128, low=-128) for i in (0, 1)]
    images = np.array(pairs)[:, :, None, None]
    assert run(images, *summands, Sum("sum", (1, 2))) == [[0], [0], [254], [34], [0], [0]]


def test_a_summand_is_rounded_half_to_even_and_clipped_below_zero():
    """-3 * x / 2 of x = 1, 2, 3, 5, 100 is -1.5, -3, -4.5, -7.5, -150."""
    zero = layer(0, [[[[0]]]], bias=200)
    summand = layer(0, [[[[-3]]]], multiplier=0.5, low=-128)
    images = np.array([1, 2, 3, 5, 100])[:, None, None, None]
    assert run(images, zero, summand, Sum("sum", (2, 1))) == [[198], [197], [196], [192], [72]]


@pytest.mark.parametrize(
    ("ratio", "high", "expected"),
    [
        (1 / 17, 15, [(level + 8) // 17 for level in range(256)]),
        (1 / 20, 7, [min((level + 10 - (level // 10 % 4 == 1 and level % 10 == 0)) // 20, 7) for level in range(256)]),
        (0.5, 3, [0, 0, 1, 2, 2, 2, *[3] * 250]),
        (1 / 600, 1, [0] * 256),
        (2.0, 255, [min(2 * level, 255) for level in range(256)]),
    ],
)
def test_levels_are_rounded_to_fewer_bits(ratio, high, expected):
    """Half to even, for each of the 256 levels; `ratio` is their scale, in units of the new one."""
    exact = StepFunctions(np.array([ratio]), np.zeros(1), np.zeros(1, np.int64), np.full(1, 255), high)
    chosen = requantize(exact, 1, biased=False)
    assert (chosen.differing.tolist(), chosen.reachable.tolist(), chosen.bias.tolist()) == ([0], [256], [0])
    images = np.arange(256)[:, None, None, None]
    assert run(images, Rounding("rounding", (0,), chosen)) == [[level] for level in expected]


def test_padding_is_black_and_a_stride_skips_pixels():
    image = np.array([[[[0, 1, 0], [0, 0, 0], [0, 0, 10]]]])
    weight = [[[[1, 2, 3], [4, 5, 6], [7, 8, 9]]]]
    padded = layer(0, weight, stride=(2, 2), padding=(1, 1))
    assert run(image, padded, classes=4) == [[6, 4, 0, 50]]
    assert run(image, layer(0, weight), classes=1) == [[92]]


def test_each_group_has_its_own_channels():
    image = np.array([5, 7, 1, 2]).reshape(1, 4, 1, 1)
    depthwise = layer(0, np.array([2, 3, 4, 0]).reshape(4, 1, 1, 1), groups=4)
    assert run(image, depthwise, classes=4) == [[10, 21, 4, 0]]
    pairs = layer(0, np.array([[1, 2], [3, 4], [5, 6], [7, 8]]).reshape(4, 2, 1, 1), groups=2)
    assert run(image, pairs, classes=4) == [[19, 43, 17, 23]]


def test_depthwise_layers_take_windows_of_one_channel():
    image = np.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    weight = np.zeros((2, 1, 3, 3))
    weight[0, 0, 0, 2], weight[1, 0, 2, 0] = 1, 2
    assert run(image, layer(0, weight, groups=2), classes=8) == [[2, 3, 6, 7, 48, 50, 56, 58]]


def test_the_head_sums_pixels_and_adds_a_bias():
    """Channel sums 10 and 100, weights [[1, -1], [2, 0]] times a gain of 3."""
    image = np.array([[[[1, 2], [3, 4]], [[40, 30], [20, 10]]]])
    identity = layer(0, np.eye(2).reshape(2, 2, 1, 1))
    weight = np.array([[1, -1], [2, 0]], np.int8)
    bias = np.array([7, -1_000_000], np.int32)
    assert run(image, identity, weight=weight, gain=3, bias=bias, pixels=4) == [[3 * (10 - 100) + 7, 60 - 1_000_000]]


@pytest.mark.parametrize(("low", "high"), [(-128, 127), (-2, 1), (-3, -1), (0, 255)])
def test_differing_accumulators_are_counted_for_levels_below_zero(low, high):
    """As by brute force over all accumulators; one that is off by two levels counts twice."""
    rng = np.random.default_rng(2)
    multiplier, offset = rng.uniform(0.01, 0.05, 20), rng.normal(0, 9, 20)
    exact = StepFunctions(multiplier, offset, np.full(20, -9000), np.full(20, 9000), high, low)
    acc = np.arange(-9000, 9001)[None, :]
    expected = np.clip(np.rint(multiplier[:, None] * acc + offset[:, None]), low, high)
    for gain in (1, 127):
        chosen = requantize(exact, gain)
        product = (gain * acc + chosen.bias[:, None]).astype(np.float32) * chosen.multiplier[:, None]
        found = np.clip(np.rint(product), low, high)
        np.testing.assert_array_equal(np.abs(found - expected).sum(1), chosen.differing)
        np.testing.assert_array_equal(chosen.levels((gain * acc).T), found.T)
    assert chosen.differing.sum() < 1e-3 * chosen.reachable.sum()


def test_levels_below_zero_have_the_wanted_steps():
    """round(0.3 * acc - 1.2): the levels -2, -1, 0 and 1 begin at -4 (-2.4), 0 (-1.2), 3 (-0.3) and 6 (0.6)."""
    exact = StepFunctions(np.array([0.3]), np.array([-1.2]), np.array([-20]), np.array([20]), 1, -3)
    chosen = requantize(exact, 127)
    assert chosen.differing.tolist() == [0]
    found = chosen.levels(127 * np.arange(-20, 21)[:, None])[:, 0]
    assert found.tolist() == [-3] * 16 + [-2] * 4 + [-1] * 3 + [0] * 3 + [1] * 15
