"""Bytes that chips send, of programs whose bytes are known."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from rlhf_jax.planning import collectives, hlo
from rlhf_jax.planning.collectives import Collective

SHAPE = {"data": 4, "tensor": 2}
FLOAT = 4
WHOLE = PartitionSpec()


def mesh(devices=None) -> Mesh:
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices).reshape(4, 2), tuple(SHAPE))


def placed(shape, *axes) -> jax.ShapeDtypeStruct:
  sharding = NamedSharding(mesh(), PartitionSpec(*axes))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def compiled_text(fn, *args, out=WHOLE) -> str:
  jitted = jax.jit(fn, out_shardings=NamedSharding(mesh(), out))
  return jitted.lower(*args).compile().as_text()


def test_an_all_reduce_over_one_axis():
  x = placed((8, 1000), "data")
  text = compiled_text(lambda x: x.sum(axis=0), x)
  assert collectives.collectives(text, SHAPE) == [
      Collective(("data",), "all-reduce", 2 * 1000 * FLOAT * 3 / 4, 1)
  ]


def test_an_all_reduce_over_both_axes():
  x = placed((8, 1000), ("data", "tensor"))
  text = compiled_text(lambda x: x.sum(axis=0), x)
  assert collectives.collectives(text, SHAPE) == [
      Collective(("data", "tensor"), "all-reduce", 2 * 1000 * FLOAT * 7 / 8, 1)
  ]


def gather_in_a_scan(x, weights):
  """Each layer's weights are split over 'tensor' and gathered to be used."""

  def layer(x, w):
    whole = NamedSharding(mesh(), WHOLE)
    w = jax.lax.with_sharding_constraint(w, whole)
    x = jnp.sin(x @ w)
    rows = NamedSharding(mesh(), PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(x, rows), None

  return jax.lax.scan(layer, x, weights)[0]


GATHERED = [
    Collective(("tensor",), "all-gather", 5 * 64 * 64 * FLOAT / 2, 5)
]


def scan_text() -> str:
  return compiled_text(
      gather_in_a_scan,
      placed((8, 64), "data"),
      placed((5, 64, 64), None, "tensor"),
      out=PartitionSpec("data"),
  )


def test_an_all_gather_in_a_scan_counts_as_often_as_it_runs():
  text = scan_text()
  assert "known_trip_count" in text
  assert collectives.collectives(text, SHAPE) == GATHERED


def test_the_trip_count_is_read_from_the_condition_where_it_is_not_told():
  # As text for TPUs is.
  text = scan_text().replace("known_trip_count", "something_else")
  assert collectives.collectives(text, SHAPE) == GATHERED


def test_loops_in_loops_multiply():
  def fn(x, weights):
    body = lambda _, x: gather_in_a_scan(x, weights)
    return jax.lax.fori_loop(2, 9, body, x)

  text = compiled_text(
      fn,
      placed((8, 64), "data"),
      placed((5, 64, 64), None, "tensor"),
      out=PartitionSpec("data"),
  )
  [found] = collectives.collectives(text, SHAPE)
  assert found.num_bytes == 7 * GATHERED[0].num_bytes
  assert found.count == 35


def summed_until(x, limit, enough):
  """A loop that may end early: of at most 9 - 2 steps."""

  def body(carry):
    i, x, total = carry
    total += jnp.sin(x * total[None]).sum(axis=0)
    return i + 1, x, total

  def unfinished(carry):
    return (carry[0] < limit) & (carry[2].max() < enough)

  start = (jnp.int32(2), x, jnp.ones((1000,), jnp.float32))
  return jax.lax.while_loop(unfinished, body, start)[2]


def test_a_loop_that_may_end_early_counts_its_bound():
  text = compiled_text(
      lambda x: summed_until(x, 9, 50.0), placed((8, 1000), "data")
  )
  one = 2 * 1000 * FLOAT * 3 / 4
  found = collectives.bytes_by_axes(collectives.collectives(text, SHAPE))
  assert found[("data",)] == 7 * one


def test_a_loop_without_a_bound_counts_what_the_caller_says():
  text = compiled_text(
      lambda x, n: summed_until(x, n, 50.0),
      placed((8, 1000), "data"),
      jax.ShapeDtypeStruct((), jnp.int32),
  )
  one = 2 * 1000 * FLOAT * 3 / 4
  sent = lambda **kw: collectives.bytes_by_axes(
      collectives.collectives(text, SHAPE, **kw)
  )
  assert sent()[("data",)] == one
  assert sent(unknown_trip_count=11)[("data",)] == 11 * one


def test_of_a_conditional_the_branch_that_sends_most_counts():
  def fn(x, which):
    mean = lambda x: jnp.broadcast_to(x.sum(axis=0)[None], x.shape)
    return jax.lax.cond(which, mean, lambda x: x, x)

  rows = PartitionSpec("data")
  text = compiled_text(
      fn, placed((8, 1000), "data"), jax.ShapeDtypeStruct((), jnp.bool_),
      out=rows,
  )
  assert " conditional(" in text
  assert collectives.bytes_by_axes(collectives.collectives(text, SHAPE)) == {
      ("data",): 2 * 1000 * FLOAT * 3 / 4
  }


def test_one_device_sends_nothing():
  text = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
  assert collectives.collectives(text, {"data": 1}) == []


# ---- Text that this machine's compiler does not write ------------------------


def program(line: str) -> str:
  return f"""HloModule m
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT {line}
}}
"""


REDUCE = "%r = f32[1000]{0:T(1024)} all-reduce(%p), channel_id=1, "


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("{{0,2,4,6},{1,3,5,7}}", ("data",)),
        ("{}", ("data", "tensor")),
        ("[4,2]<=[8]", ("tensor",)),
        ("[2,4]<=[4,2]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "tensor")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data",)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("tensor",)),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("data",)),
        (
            "mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}",
            ("tensor",),
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}",
            ("data",),
        ),
    ],
)
def test_replica_groups_in_all_their_forms(groups, axes):
  text = program(f"{REDUCE}replica_groups={groups}, to_apply=%add")
  [found] = collectives.collectives(text, SHAPE)
  assert found.axes == axes
  n = int(np.prod([SHAPE[name] for name in axes]))
  assert found.num_bytes == pytest.approx(2 * 4000 * (n - 1) / n)


@pytest.mark.parametrize(
    "line, want",
    [
        (
            "%g = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p), "
            "replica_groups=[4,2]<=[8], dimensions={0}",
            1024 / 2,
        ),
        (
            "%g = (bf16[32,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%p), "
            "replica_groups=[4,2]<=[8], dimensions={0}",
            1024 / 2,
        ),
        (
            "%g = f32[100]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], "
            "dimensions={0}, to_apply=%add",
            400,
        ),
        (
            "%g = (f32[50]{0}, f32[50]{0}) all-to-all(%p, %p), "
            "replica_groups={{0,1},{2,3},{4,5},{6,7}}",
            400 / 2,
        ),
        (
            "%g = (f32[100]{0}, f32[100]{0}, u32[], u32[]) "
            "collective-permute-start(%p), source_target_pairs="
            "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}",
            400,
        ),
    ],
)
def test_each_kind_sends_its_share(line, want):
  [found] = collectives.collectives(program(line), SHAPE)
  assert found.axes == ("tensor",)
  assert found.num_bytes == want


def test_an_operation_that_is_spread_over_fusions_and_loops_is_one():
  text = """HloModule m
%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[8] get-tuple-element(%c), index=1
  %f0 = f32[16]{0} fusion(%x), kind=kCustom, calls=%one
  %own = f32[16]{0} all-gather(%x), channel_id=8, replica_groups=[4,2]<=[8]
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%one (p0: f32[8]) -> f32[16] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %g1 = f32[16]{0} all-gather(%p0), GROUPS
}

%two (p1: f32[8]) -> f32[16] {
  %p1 = f32[8]{0} parameter(0), metadata={
"a kernel's":"own lines"
}}
  ROOT %g2 = f32[16]{0} all-gather(%p1), GROUPS
}

ENTRY %main (p: f32[8]) -> f32[16] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]) tuple(%zero, %p)
  %loop = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  %f1 = f32[16]{0} fusion(%p), kind=kCustom, calls=%one
  ROOT %f2 = f32[16]{0} fusion(%p), kind=kCustom, calls=%two
}
"""
  text = text.replace(
      "GROUPS", "channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}"
  )
  [found] = collectives.collectives(text, SHAPE)
  # Once, and five times the loop's own.
  assert (found.num_bytes, found.count) == (32 + 5 * 32, 6)


def test_groups_that_cannot_be_read_are_an_error():
  text = program(f"{REDUCE}replica_groups=<something new>, to_apply=%add")
  with pytest.raises(hlo.HloError, match="something new"):
    collectives.collectives(text, SHAPE)
