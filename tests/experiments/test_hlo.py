"""Tests of the bytes in HBM, products and exchange of a compiled program, and the roofline that follows."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.benchmark import hlo, roofline
from experiments.benchmark.hlo import Collective

# The forms that XLA's TPU compiler writes. Tiles are 8 × 128; S(1) is vector memory.
PROGRAM = """HloModule jit_step, is_scheduled=true

%slicing (p0: bf16[16,8,128], p1: s32[]) -> bf16[2,8,128] {
  %p0 = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = bf16[2,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={2,8,128}
}

%putting (p0.1: bf16[16,8,128], p1.1: s32[], p2: bf16[2,8,128]) -> bf16[16,8,128] {
  %p0.1 = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p2 = bf16[2,8,128]{2,1,0:T(8,128)(2,1)} parameter(2)
  %p1.1 = s32[]{:T(128)} parameter(1)
  %none = s32[]{:T(128)} constant(0)
  ROOT %put = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p0.1, %p2, %p1.1, %none, %none)
}

%body (state: (s32[], bf16[16,8,128])) -> (s32[], bf16[16,8,128]) {
  %state = (s32[]{:T(128)S(6)}, bf16[16,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%state), index=0
  %volume = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %part = bf16[2,8,128]{2,1,0:T(8,128)(2,1)S(1)} fusion(%volume, %i), kind=kLoop, calls=%slicing
  %new = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} fusion(%volume, %i, %part), kind=kLoop, calls=%putting, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %both = (s32[]{:T(128)S(6)}, bf16[16,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%next, %new)
}

%condition (state.1: (s32[], bf16[16,8,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)S(6)}, bf16[16,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)S(6)} constant(8)
  %count = s32[]{:T(128)S(6)} get-tuple-element(%state.1), index=0
  ROOT %goes = pred[]{:T(512)S(6)} compare(%count, %limit), direction=LT
}

ENTRY %main (x: bf16[16,8,128], w: f32[3,100]) -> bf16[16,8,128] {
  %x = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[3,100]{1,0:T(8,128)} parameter(1)
  %copy-start = (f32[3,100]{1,0:T(8,128)S(1)}, f32[3,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = f32[3,100]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %sum = f32[3,100]{1,0:T(8,128)S(1)} all-reduce(%copy-done), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
  %first = s32[]{:T(128)S(6)} constant(0)
  %carry = (s32[]{:T(128)S(6)}, bf16[16,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%first, %x)
  %loop = (s32[]{:T(128)S(6)}, /*index=1*/bf16[16,8,128]{2,1,0:T(8,128)(2,1)}) while(%carry), \
condition=%condition, body=%body
  ROOT %out = bf16[16,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_bytes_in_hbm_of_a_program_of_a_tpu_by_hand() -> None:
    work = hlo.work(PROGRAM)
    plane = 8 * 128 * 2
    # Eight turns, each reads two planes into vector memory and writes two back in place. The copy reads one tile, which
    # f32[3,100] is padded to.
    assert work.hbm_bytes == 8 * (2 * plane + 2 * plane) + 8 * 128 * 4
    assert work.cycles == 8 * 100
    assert work.collectives == [Collective("all-reduce", 8 * 128 * 4, group=8, times=1)]


def test_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="the loop loop does not say how often it runs"):
        hlo.work(PROGRAM.replace("constant(8)", "copy(%none)"))


@pytest.mark.parametrize(
    ("text", "chips"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", 2),
        ("channel_id=1", 1),
    ],
)
def test_groups_in_every_form(text: str, chips: int) -> None:
    assert hlo._group(text) == chips


def compiled(function: Any, *shapes: tuple[int, ...]) -> Any:
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_products_are_those_that_xla_counts() -> None:
    """Padding, strides and the dilations of gradients, where products with zeros do not count."""

    def strided(x: jax.Array, kernel: jax.Array) -> jax.Array:
        names = ("NXYC", "XYIO", "NXYC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 2)], dimension_numbers=names)

    shapes = (2, 12, 16, 4), (4, 4, 4, 8)
    forward, both = compiled(strided, *shapes), compiled(jax.grad(lambda *a: strided(*a).sum(), (0, 1)), *shapes)
    assert hlo.work(forward.as_text()).flops == forward.cost_analysis()["flops"]
    rows = sum(0 <= 2 * u + k - 1 < 12 for u in range(6) for k in range(4))
    columns = sum(0 <= 2 * v + k - 1 < 16 for v in range(8) for k in range(4))
    assert hlo.work(forward.as_text()).flops == 2 * 2 * 4 * 8 * rows * columns
    assert hlo.work(both.as_text()).flops <= 2 * hlo.work(forward.as_text()).flops

    def repeated(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, z: z @ y, x)

    assert hlo.work(compiled(repeated, (24, 32), (32, 32)).as_text()).flops == 5 * 2 * 24 * 32 * 32


def test_exchange_of_a_sharded_program() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "space"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    program = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(placed)
    assert hlo.work(program.compile().as_text() or "").collectives == [Collective("all-reduce", 256, group=4, times=1)]


def test_the_roofline_by_hand() -> None:
    machine = roofline.Machine(100.0, 10.0, 2.0, 1.0, axes=2, host_chips=8, host_vcpus=100)
    exchange = [Collective("all-reduce", 8, group=4, times=3), Collective("collective-permute", 6, group=2, times=1)]
    prediction = roofline.predict(machine, flops=200.0, hbm_bytes=50.0, collectives=exchange)
    # 2 · 8 · 3/4 bytes over a link of 2 bytes/s, three times; 6 bytes once
    assert prediction == roofline.Prediction(compute_s=2.0, memory_s=5.0, exchange_s=3 * 6.0 + 3.0)
    assert prediction.step_s == 5.0 + 21.0
    small = Collective("all-reduce", 1, group=16, times=1)  # 4 × 4 chips: three hops there and back, along two axes
    fast = roofline.MACHINES["v5e"]
    assert math.isclose(roofline.exchange_s(fast, small), 2 * 2 * 3 * roofline.HOP_S)


def test_only_the_data_axis_grows_with_the_slice() -> None:
    exchange = [Collective("all-reduce", 8, 8, 1), Collective("all-gather", 8, 2, 1), Collective("all-reduce", 8, 4, 1)]
    assert [c.group for c in roofline.scaled(exchange, chips=8, target=256, space=2)] == [256, 2, 128]
    assert [c.group for c in roofline.scaled(exchange, chips=8, target=2, space=2)] == [2, 2, 1]
