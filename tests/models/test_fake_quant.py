"""Fake quantization: Brevitas' outputs bit for bit, and its gradients.

The reference is composed from `brevitas.core`. The uncompiled path is compared with it for every range, and the
compiled path, which takes seconds to compile for each range, with the uncompiled one for a few.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.zero_point import ZeroZeroPoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cnvzoo.models import compiled, fake_quant
from cnvzoo.models.fake_quant import IntRange, fake_quantize, least_squares_scale

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "sliced": lambda x: torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]],
}
SMALL = [(6, 5, 3, 3), (2, 16, 4, 7), (5, 37), (1, 3), (3, 1)]
LARGE = [(5, 7, 21, 23), (7, 2351), (64, 32, 3, 3)]  # large enough to be compiled, and odd
INTEGER_KINDS = [(bits, False) for bits in range(1, 9)] + [(bits, True) for bits in range(2, 9)]
BINARY = (1, True)

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchScript.*:DeprecationWarning")
examples = settings(max_examples=40, deadline=None)
needs_compiler = pytest.mark.skipif(
    not compiled.compiles(torch.device("cpu")), reason="no C++ compiler here, so there is no compiled path to test"
)
COMPILED = pytest.mark.parametrize(
    ("dtype", "per_channel", "kinds"),
    [
        (torch.float32, False, [(8, False)]),
        (torch.float32, True, [(4, True), BINARY]),
        (torch.bfloat16, False, [(4, False)]),
    ],
    ids=["float32", "float32-per_channel", "bfloat16"],
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiles", lambda device: False)


class ScaleIs(nn.Module):
    """Brevitas' scaling implementations take x or a bit width: these give a fixed tensor."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, _x: Any, *_: Any) -> Tensor:
        return self.scale


def brevitas(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    quant = RescalingIntQuant(
        IntQuant(narrow_range=signed, signed=signed, input_view_impl=Identity()),
        scaling_impl=ScaleIs(scale),
        int_scaling_impl=ScaleIs(torch.ones(())),
        zero_point_impl=ZeroZeroPoint(),
        bit_width_impl=BitWidthConst(bits),
    )
    return quant(x)[0]


def binary(x: Tensor, scale: Tensor) -> Tensor:
    """Sign of x times scale; the gradient passes where |x| <= scale, as through a hard tanh."""
    v = x / scale
    v = torch.where(v.abs() <= 1, v, v.detach())
    sign = torch.where(v >= 0, 1.0, -1.0)
    return (sign + (v - v.detach())) * scale


@dataclass
class Case:
    x: Tensor
    scale: Tensor
    bits: int
    signed: bool
    upstream: Tensor


@st.composite
def cases(
    draw: st.DrawFn,
    dtype: torch.dtype,
    per_channel: bool,
    kinds: list[tuple[int, bool]],
    shapes: list[tuple[int, ...]],
) -> Case:
    bits, signed = draw(st.sampled_from(kinds))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(shapes))
    scale_shape = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    # exponents at which nothing in float32 arithmetic over- or underflows, and any mantissa
    scale = torch.ldexp(1 + torch.rand(scale_shape, generator=generator), torch.tensor(draw(st.integers(-14, 3))))
    ints = IntRange.of(bits, signed=signed)
    spread = draw(st.sampled_from([0.4, 1.0, 3.0])) * max(ints.high, 2)
    v = torch.randn(shape, generator=generator) * spread
    if draw(st.booleans()):
        v = torch.round(v * 2) / 2  # levels and ties
    x = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]((v * scale).to(dtype))
    upstream = torch.randn(shape, generator=generator).to(dtype)
    if draw(st.booleans()):
        upstream = LAYOUTS["transposed"](upstream)
    return Case(x, scale, bits, signed, upstream)


def run(function: Callable[[Tensor, Tensor], Tensor], case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of x and of the scale."""
    x, scale = case.x.detach().requires_grad_(), case.scale.clone().requires_grad_()
    out = function(x, scale)
    grad_x, grad_scale = torch.autograd.grad(out, (x, scale), case.upstream.to(out.dtype))
    return out.detach(), grad_x, grad_scale


def summed(case: Case) -> Tensor:
    """The sum of the absolute terms of the scale's gradient, to which rounding errors are relative."""
    ints = IntRange.of(case.bits, signed=case.signed)
    v = (case.x.float() / case.scale).clamp(ints.low - 1, ints.high + 1)
    return (case.upstream.float() * v).abs().sum_to_size(case.scale.shape)


def check(case: Case) -> None:
    """Output and gradients equal the reference's."""
    ints = IntRange.of(case.bits, signed=case.signed)

    def reference(x: Tensor, scale: Tensor) -> Tensor:
        # the arithmetic for a bfloat16 x is float32, and the result is rounded
        out = binary(x.float(), scale) if ints.binary else brevitas(x.float(), scale, case.bits, case.signed)
        return out.to(x.dtype)

    expected = run(reference, case)
    out, grad_x, grad_scale = run(lambda x, s: fake_quantize(x, s, ints), case)
    assert out.dtype == grad_x.dtype == case.x.dtype
    assert torch.equal(out, expected[0])
    torch.testing.assert_close(grad_x, expected[1], rtol=1e-4, atol=0)
    assert grad_scale.dtype == torch.float32
    # Brevitas sums q and v separately, so its rounding errors are relative to their sizes
    assert ((grad_scale - expected[2]).abs() <= 1e-4 * expected[2].abs() + 1e-6 * summed(case)).all()
    with torch.no_grad():
        assert torch.equal(fake_quantize(case.x, case.scale, ints), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_brevitas(plain: None, dtype: torch.dtype, per_channel: bool) -> None:
    examples(given(cases(dtype, per_channel, [*INTEGER_KINDS, BINARY], SMALL))(check))()


@needs_compiler
@COMPILED
def test_compiled_and_plain_paths_agree_bit_for_bit(
    dtype: torch.dtype, per_channel: bool, kinds: list[tuple[int, bool]]
) -> None:
    @examples
    @given(cases(dtype, per_channel, kinds, LARGE))
    def check_both(case: Case) -> None:
        ints = IntRange.of(case.bits, signed=case.signed)
        fast = run(lambda x, s: fake_quantize(x, s, ints), case)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "compiles", lambda device: False)
            plain = run(lambda x, s: fake_quantize(x, s, ints), case)
        assert torch.equal(fast[0], plain[0])
        assert torch.equal(fast[1], plain[1])
        assert ((fast[2] - plain[2]).abs() <= 1e-6 * summed(case)).all()  # same terms, in another order

    check_both()


@needs_compiler
def test_bits_do_not_depend_on_what_ran_before() -> None:
    def step(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, upstream = (torch.randn(shape, generator=generator) for _ in range(2))
        case = Case(x, torch.tensor(0.02), 8, False, upstream)
        return run(lambda x, s: fake_quantize(x, s, IntRange.of(8, signed=False)), case)

    ours, results = (8, 64, 10, 10), []
    for others in ([], [(2, 8192)], [(300, 700), (20, 3, 32, 32)]):
        fake_quant._forward_kernel.cache_clear()
        fake_quant._backward_kernel.cache_clear()
        for shape in others:
            step(*shape)
        results.append(step(*ours))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_compiler
def test_a_variant_is_compiled_once_for_all_shapes() -> None:
    """At its limit of variants torch.compile falls back to plain operations, which are slow and have other bits."""
    ints = IntRange.of(4, signed=True)
    seen: list[int] = []
    for shape in ((64, 300), (128, 200), (7, 2351), (64, 32, 3, 3), (256, 128, 3, 3)):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                scale = torch.ones(shape[0], *[1] * (len(shape) - 1), requires_grad=True)
                fake_quantize(torch.randn(shape, requires_grad=True), scale, ints).sum().backward()
            seen.append(torch._dynamo.utils.counters["frames"]["total"])
    assert len(set(seen)) == 1


@needs_compiler
@pytest.mark.parametrize("first", [IntRange.of(8, signed=True), IntRange.of(1, signed=False)])
def test_loops_serve_all_ranges_of_integers_whichever_came_first(first: IntRange) -> None:
    fake_quant._forward_kernel.cache_clear()
    fake_quant._backward_kernel.cache_clear()
    frames = torch._dynamo.utils.counters["frames"]
    generator = torch.Generator().manual_seed(0)
    x, upstream = (3 * torch.randn(64, 300, generator=generator) for _ in range(2))
    seen = []
    for ints in (first, *(IntRange.of(bits, signed=signed) for bits in (2, 3, 8) for signed in (True, False)), first):
        value, scale = x.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
        out = fake_quantize(value, scale, ints)
        out.backward(upstream)
        seen.append(frames["total"])
        levels = torch.round(x / 0.5)
        inside = (levels >= ints.low) & (levels <= ints.high)
        assert torch.equal(out, levels.clamp(ints.low, ints.high) * 0.5), ints
        assert value.grad is not None
        assert torch.equal(value.grad, torch.where(inside, upstream, 0.0)), ints
    assert len(set(seen)) == 1


def test_ranges() -> None:
    assert IntRange.of(1, signed=False) == IntRange(0, 1)
    assert IntRange.of(8, signed=False) == IntRange(0, 255)
    assert IntRange.of(2, signed=True) == IntRange(-1, 1)
    assert IntRange.of(8, signed=True) == IntRange(-127, 127)
    assert IntRange.of(1, signed=True) == IntRange(-1, 1, binary=True)


def test_numbers_worked_by_hand() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([-9.0, -0.8, -0.25, 0.25, 0.3, 0.75, 1.25, 9.0], requires_grad=True)
    out = fake_quantize(x, scale, IntRange(-2, 2))
    # v = -18, -1.6, -.5, .5, .6, 1.5, 2.5, 18: ties go to the even neighbour, and 2.5 rounds to 2, inside the range
    assert out.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1.0, 1.0, 1.0, 5.0])
    out.backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0, 1.0, 1.0, 1.0, 0.0]
    expected = -2 + 10 * (-2 + 1.6) + 100 * 0.5 - 1000 * 0.5 + 0.4 + 0.5 - 0.5 + 5 * 2
    assert math.isclose(float(scale.grad), expected, rel_tol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_layout(plain: None, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 16, 4, 7)).requires_grad_()
    out = fake_quantize(x, torch.tensor(0.25), IntRange(-3, 3))
    assert out.stride() == x.stride()
    assert torch.autograd.grad(out.sum(), x)[0].stride() == x.stride()


def test_scale_that_needs_no_gradient() -> None:
    x = torch.randn(5, 37, requires_grad=True)
    out = fake_quantize(x, torch.tensor(0.25), IntRange(0, 3))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, ((x.detach() >= -0.125) & (x.detach() <= 0.875)).float())


def squared_error(x: Tensor, scale: Tensor, ints: IntRange) -> Tensor:
    """In float64, from the definition: distance of each value to the nearest level."""
    levels = torch.tensor([ints.low, ints.high] if ints.binary else range(ints.low, ints.high + 1))
    grid = scale.double()[:, None] * levels
    return (x.double()[:, :, None] - grid[:, None, :]).abs().amin(2).square().sum(1)


@examples
@given(kind=st.sampled_from([*INTEGER_KINDS, BINARY]), seed=st.integers(0, 2**32), spread=st.floats(1e-6, 1e4))
def test_least_squares_scale_is_no_worse_than_the_maximum(kind: tuple[int, bool], seed: int, spread: float) -> None:
    ints = IntRange.of(kind[0], signed=kind[1])
    x = spread * torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x if kind[1] else x.abs()
    scale = least_squares_scale(x, ints)
    assert scale.shape == (3,)
    assert (scale > 0).all()
    maximum = x.abs().amax(1) / ints.high
    assert (squared_error(x, scale, ints) <= squared_error(x, maximum, ints) * (1 + 1e-5)).all()


@examples
@given(
    seed=st.integers(0, 2**32), exponent=st.integers(-20, 20), kind=st.sampled_from([(1, True), (4, True), (2, False)])
)
def test_least_squares_scale_scales_with_its_input(seed: int, exponent: int, kind: tuple[int, bool]) -> None:
    ints = IntRange.of(kind[0], signed=kind[1])
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(least_squares_scale(x * 2.0**exponent, ints), least_squares_scale(x, ints) * 2.0**exponent)


def test_least_squares_scale_finds_a_quantized_signals_own_scale() -> None:
    ints = IntRange.of(4, signed=True)
    scales = torch.tensor([0.01, 0.3, 7.0])
    x = torch.arange(-7, 8.0).repeat(3, 4) * scales[:, None]
    torch.testing.assert_close(least_squares_scale(x, ints), scales)
    # Binary: the best scale is the mean of the absolute values (Rastegari et al. 2016, equation 6).
    y = torch.randn(2, 100)
    torch.testing.assert_close(least_squares_scale(y, IntRange.of(1, signed=True)), y.abs().mean(1))


@pytest.mark.parametrize("kind", [(1, True), (8, True), (1, False), (8, False)])
def test_a_row_of_zeros_has_a_scale_and_stays_zero(kind: tuple[int, bool]) -> None:
    ints = IntRange.of(kind[0], signed=kind[1])
    x = torch.cat([torch.zeros(1, 20), torch.ones(1, 20)])
    scale = least_squares_scale(x, ints)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    out = fake_quantize(x, scale[:, None], ints)
    assert out[0].abs().max() < 1e-15
    torch.testing.assert_close(out[1], x[1])
