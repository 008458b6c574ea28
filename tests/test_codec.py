"""What crosses the link: how near it is to what was sent, and that nothing is lost for good."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import PayloadDtype
from lsp_ray.device.noise import MAX_ELEMENTS
from lsp_ray.device.rounding import Rounding
from lsp_ray.optim.codec import Codec
from lsp_ray.optim.shard import OptimizerShard
from lsp_ray.sim.store import payload_bytes

INT8 = Codec("int8")
ROUNDING = Rounding(3, torch.device("cpu"))
VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=300).map(torch.tensor)
CODECS = [Codec(payload_dtype) for payload_dtype in get_args(PayloadDtype)]


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def wire_of(values: torch.Tensor, codec: Codec = INT8, step: int | None = None) -> torch.Tensor:
    """Encoded to nearest, or with the noise of a step."""
    wire = torch.full((codec.wire_numel(values.numel()),), 77).to(codec.dtype)
    codec.encode_(wire, values, None if step is None else ROUNDING.noise(step=step, key=-1))
    return wire


def through(values: torch.Tensor, codec: Codec = INT8, step: int | None = None) -> torch.Tensor:
    return codec.decode(wire_of(values, codec, step), values.numel()).float()


def block_scales(values: torch.Tensor) -> torch.Tensor:
    """For each value, what its block's largest is over 127."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.numel() % 64)).view(-1, 64)
    return (padded.amax(dim=1, keepdim=True) / 127).expand_as(padded).reshape(-1)[: values.numel()]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000])
def test_a_wire_has_the_bytes_that_are_counted(codec: Codec, numel: int) -> None:
    assert wire_of(torch.zeros(numel), codec).nbytes == payload_bytes(numel, codec.payload_dtype)


@given(values=VALUES, step=st.none() | st.integers(0, 9))
def test_no_value_is_off_by_more_than_a_multiple_of_its_blocks_scale(values: torch.Tensor, step: int | None) -> None:
    bound = block_scales(values) * (1 + 2**-7) * (0.5 if step is None else 1.0)  # scales are rounded up to bfloat16
    assert ((through(values, step=step) - values).abs() <= bound * 1.0001 + 1e-38).all()
    assert torch.equal(through(values, Codec("bfloat16")), values.bfloat16().float())
    assert torch.equal(through(values, Codec("float32")), values)


def test_float32_and_bfloat16_are_decoded_without_a_copy() -> None:
    for codec in CODECS[:2]:
        wire = wire_of(normal(9), codec)
        assert codec.decode(wire, 9).data_ptr() == wire.data_ptr()


@given(values=VALUES)
def test_zeros_stay_zeros_and_what_was_decoded_is_encoded_without_loss(values: torch.Tensor) -> None:
    assert not through(torch.zeros_like(values), step=0).any()
    values[values.abs() < 1e-30] = 0.0  # such scales have fewer digits
    sent = through(values)
    torch.testing.assert_close(through(sent), sent, rtol=2**-7, atol=0.0)


def test_noise_leaves_sums_as_they_are_on_average() -> None:
    values = torch.cat([normal(64) * 10.0**power for power in (-6, 0, 3)])
    num_steps = 4000
    mean = sum(through(values, step=step).double() for step in range(num_steps)) / num_steps
    # of a value between two multiples the deviation is at most half a scale
    assert ((mean - values).abs() <= 5 * 0.51 * block_scales(values) / num_steps**0.5).all()


def test_noise_depends_on_step_and_position_alone() -> None:
    values = normal(MAX_ELEMENTS + 640)
    wire = wire_of(values, step=1)
    assert torch.equal(wire, wire_of(values, step=1))
    assert not torch.equal(wire, wire_of(values, step=2))
    part = through(values[:1280], step=1)  # whatever comes behind it
    assert torch.equal(through(values, step=1)[:1280], part)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("step", [None, 0])
def test_what_is_not_finite_reaches_the_shard_as_that(codec: Codec, bad: float, step: int | None) -> None:
    gradient = normal(200)
    gradient[130] = bad
    assert not through(gradient, codec, step).isfinite().all()
    assert through(gradient, codec, step)[:128].isfinite().all()
    shard, delta = OptimizerShard({0: 200}, codec=codec), wire_of(normal(200), codec)
    shard.update(0, [wire_of(gradient, codec, step)], delta, learning_rate=1.0)
    assert not codec.decode(delta, 200).any()
    assert not any(tensor.any() for tensor in shard.states[0].tensors().values())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), skipped=st.sets(st.integers(0, 7)), numel=st.integers(1, 200))
def test_what_was_sent_and_what_is_kept_add_up_to_adams_steps(seed: int, skipped: set[int], numel: int) -> None:
    exact, coarse = OptimizerShard({0: numel}), OptimizerShard({0: numel}, codec=INT8)
    total, sent = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    error = coarse.states[0].error
    assert error is not None
    for step in range(8):
        wire = wire_of(normal(numel, seed + step), step=step)
        delta, kept = torch.empty_like(wire), error.clone()
        step_exactly, scale = torch.empty(numel), 0.0 if step in skipped else 1.0
        exact.update(0, [INT8.decode(wire, numel)], step_exactly, learning_rate=1e-3, grad_scale=scale)
        coarse.update(0, [wire], delta, learning_rate=1e-3, grad_scale=scale)
        total += step_exactly
        sent += INT8.decode(delta, numel)
        if step in skipped:
            assert not INT8.decode(delta, numel).any()
            assert torch.equal(error, kept)
    torch.testing.assert_close(sent + error, total, rtol=0.0, atol=1e-9)
    assert torch.equal(coarse.states[0].exp_avg, exact.states[0].exp_avg)


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_in_parts_is_adams_step_of_what_was_decoded(codec: Codec) -> None:
    numel = 2**19 + 2**17 + 3
    exact, encoded = OptimizerShard({0: numel}), OptimizerShard({0: numel}, codec=codec)
    wire, step = wire_of(normal(numel), codec), torch.empty(numel)
    for _ in range(2):
        delta = torch.empty_like(wire)
        exact.update(0, [codec.decode(wire, numel).float()], step, learning_rate=1e-3, grad_scale=0.5)
        encoded.update(0, [wire], delta, learning_rate=1e-3, grad_scale=0.5)
    for name, tensor in exact.states[0].tensors().items():
        assert torch.equal(encoded.states[0].tensors()[name], tensor)
    if not codec.is_coarse:
        assert torch.equal(delta, wire_of(step, codec))
