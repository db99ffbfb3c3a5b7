"""Figures read from compiled programs, against HLO texts with known answers and against programs for the CPU."""

import jax
import jax.numpy as jnp
import pytest

from rag_jax.aot import hlo, operation_count
from rag_jax.system import sharding

# HLO in the form of libtpu 0.0.42: a loop whose 21 trips follow from its condition, a collective split over two fusions
# (one chain), two with the same channel from jax, asynchronous ones, an array in fast memory (S(1)), and the three
# notations for groups of devices.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/somebody/rag_jax/training/train_step.py"
2 "/home/somebody/rag_jax/models/layers.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=2 function_name_id=1 line=34 end_line=34 column=4 end_column=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%fused_computation (param_0.1: bf16[10,32,64]) -> bf16[160,32,64] {
  %param_0.1 = bf16[10,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[160,32,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=5, replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/out" stack_frame_id=1}
}

%fused_computation.1 (param_0.2: bf16[10,32,64]) -> bf16[160,32,64] {
  %param_0.2 = bf16[10,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[160,32,64]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=5, replica_groups=mesh['axis_0'=16,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused_slice (param_0.3: f32[1000,8], param_1: s32[]) -> f32[10,8] {
  %param_0.3 = f32[1000,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[10,8]{1,0} dynamic-slice(%param_0.3, %param_1, %zero), dynamic_slice_sizes={10,8}
}

%body (p: (s32[], f32[1000,8])) -> (s32[], f32[1000,8]) {
  %p = (s32[]{:T(128)}, f32[1000,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %rows = f32[1000,8]{1,0} get-tuple-element(%p), index=1
  %slice = f32[10,8]{1,0} fusion(%rows, %i), kind=kLoop, calls=%fused_slice
  %all-reduce.7 = f32[10,8]{1,0} all-reduce(%slice), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[1000,8]{1,0}) tuple(%i, %rows)
}

%condition (p.1: (s32[], f32[1000,8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[1000,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(21)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[1000,8], b: bf16[10,32,64], c: f32[64]) -> f32[1000,8] {
  %a = f32[1000,8]{1,0} parameter(0)
  %b = bf16[10,32,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[64]{0} parameter(2)
  %f.1 = bf16[160,32,64]{2,1,0:T(8,128)(2,1)} fusion(%b), kind=kOutput, calls=%fused_computation
  %f.2 = bf16[160,32,64]{2,1,0:T(8,128)(2,1)S(1)} fusion(%b), kind=kOutput, calls=%fused_computation.1
  %start = (f32[64]{0}, f32[64]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%c), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %done = f32[64]{0:T(128)S(1)} collective-permute-done(%start)
  %rs = f32[8]{0} reduce-scatter(%c), channel_id=12, replica_groups=[4,8]<=[32], dimensions={0}, to_apply=%add
  %start.1 = (f32[8]{0}, f32[64]{0}) all-gather-start(%rs), channel_id=13, replica_groups=[4,8]<=[32], dimensions={0}
  %a2a.1 = f32[16]{0} all-to-all(%c), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %a2a.2 = f32[16]{0} all-to-all(%c), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %zero.1 = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[1000,8]{1,0}) tuple(%zero.1, %a)
  %while.1 = (s32[]{:T(128)}, f32[1000,8]{1,0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[1000,8]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_collectives_count_as_often_as_they_run() -> None:
    found = {c.kind: c for c in hlo.collectives(TEXT, 32) if c.kind != "all-gather"}
    gathers = {c.group: c for c in hlo.collectives(TEXT, 32) if c.kind == "all-gather"}
    big = 160 * 32 * 64 * 2
    assert gathers[16].bytes == big and gathers[16].sent == big * 15 / 16 and gathers[16].times == 1
    assert gathers[16].op == "jit(step)/out" and gathers[16].line == "models/layers.py:34"
    assert gathers[8].bytes == 256 and gathers[8].sent == 256 * 7 / 8
    assert (found["all-reduce"].times, found["all-reduce"].bytes) == (21, 320) and found["all-reduce"].loop
    assert found["all-reduce"].sent == 2 * 320 * 3 / 4  # among four
    assert found["collective-permute"].sent == 256
    assert found["reduce-scatter"].bytes == 32 and found["reduce-scatter"].sent == 7 * 32
    table = hlo.by_kind(hlo.collectives(TEXT, 32))
    assert table["all-reduce"] == {"count": 21, "bytes": 21 * 320, "sent": 21 * 480}
    assert table["all-gather"]["count"] == 2
    assert table["all-to-all"] == {"count": 2, "bytes": 128, "sent": 64}


def test_traffic_counts_slices_and_leaves_out_fast_memory() -> None:
    b, gathered = 10 * 32 * 64 * 2, 160 * 32 * 64 * 2
    fusions = b + gathered + b  # the second's result stays in fast memory
    others = (256 + 256) + (256 + 32) + (32 + 32 + 256) + 2 * (256 + 64)
    loop = 21 * ((320 + 4 + 320) + (320 + 320))  # a slice, the counter, its result; then the sum
    assert hlo.traffic(TEXT) == fusions + others + loop


def test_largest_arrays_name_their_line() -> None:
    first, *_ = hlo.largest(TEXT, 3)
    assert (first.bytes, first.shape) == (160 * 32 * 64 * 2, "bf16[160,32,64]")


def test_a_loop_that_does_not_say_how_often_it_runs_counts_once() -> None:
    text = TEXT.replace("direction=LT", "direction=NE")
    assert hlo.by_kind(hlo.collectives(text, 32))["all-reduce"]["count"] == 1
    computations, entry = hlo.parse(text)
    assert hlo.times(computations, entry).unknown == ["while.1"]
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    again = hlo.collectives(text.replace("body=%body", known, 1), 32)
    assert hlo.by_kind(again)["all-reduce"]["count"] == 5


def test_collectives_of_a_program_compiled_here() -> None:
    """The gradient of a batch over 8 devices, in a scan of 3 steps: sums of [64, 32] float32 arrays."""
    mesh = sharding.make_mesh({"data": 8})
    rows, whole = sharding.sharding(mesh, ("batch", None)), sharding.replicated(mesh)

    def program(w: jax.Array, x: jax.Array) -> jax.Array:
        def one(w: jax.Array, _: None) -> tuple[jax.Array, None]:
            gradient = jax.grad(lambda w: ((x @ w) ** 2).mean())(w)
            return w - jax.lax.with_sharding_constraint(gradient, whole), None

        return jax.lax.scan(one, w, None, length=3)[0]

    w = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=rows)
    text = jax.jit(program).lower(w, x).compile().as_text()
    table = hlo.by_kind(hlo.collectives(text, 8))
    assert table == {"all-reduce": {"count": 3, "bytes": 3 * 8192, "sent": 3 * 2 * 8192 * 7 / 8}}
    assert hlo.traffic(text) >= 3 * (128 * 64 + 64 * 32) * 4 / 8


def test_work_by_type() -> None:
    def program(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        def one(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.dot(x, b, precision="highest"), None

        y = jax.lax.scan(one, a, None, length=5)[0]
        return y.sum() + (c @ c.T).sum() + (c.astype(jnp.int8) @ c.astype(jnp.int8).T).sum() + (a @ b).sum()

    a, b, c = jnp.zeros((3, 4)), jnp.zeros((4, 4)), jnp.zeros((6, 7), jnp.bfloat16)
    work = operation_count.work(jax.make_jaxpr(program)(a, b, c).jaxpr)
    products = 2 * 6 * 7 * 6
    assert work == {"float32 highest": 5 * 2 * 3 * 4 * 4, "bfloat16": products, "int8": products, "float32": 96}
    assert operation_count.matmul_flops(jax.make_jaxpr(program)(a, b, c).jaxpr) == sum(work.values())


@pytest.mark.parametrize("width", [10, 1000])
def test_peak_bytes(width: int) -> None:
    """The outer product [10, width] is alive while its sine, of the same size, is computed; the sums are small."""

    def program(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sin(x[:, None] * y[None]).sum(0)

    one = 4 * 10 * width
    jaxpr = jax.make_jaxpr(program)(jnp.zeros(10), jnp.zeros(width)).jaxpr
    assert 2 * one <= operation_count.peak_bytes(jaxpr) <= 2 * one + 4 * (10 + width)
