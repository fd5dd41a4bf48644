"""What a compiled program does, against programs counted by hand."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from topd_jax.planning import hlo
from topd_jax.planning.hlo_cost import count


def counted(fn, *args):
    text = jax.jit(fn).lower(*args).compile().as_text()
    return count(hlo.parse(text))


def test_a_product_in_a_scan_of_seven_in_a_scan_of_three():
    def fn(x, w):
        def outer(x, _):
            x, _ = jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), None), x, w)
            return x, None

        return jax.lax.scan(outer, x, None, length=3)[0]

    x, w = jnp.ones((64, 128)), jnp.ones((7, 128, 128))
    cost = counted(fn, x, w)
    assert cost.flops == 3 * 7 * 2 * 64 * 128 * 128
    # Each product reads its matrix and its states, and writes states.
    least = 3 * 7 * 4 * (128 * 128 + 2 * 64 * 128)
    assert least <= cost.bytes < 4 * least


def test_a_loop_that_may_end_earlier_counts_to_its_bound():
    def fn(x, w):
        def more(state):
            step, x = state
            return (step < 50) & jnp.any(x > 0)

        def body(state):
            step, x = state
            return step + 1, x @ w

        return jax.lax.while_loop(more, body, (jnp.int32(8), x @ w))

    cost = counted(fn, jnp.ones((32, 64)), jnp.ones((64, 64)))
    # One before the loop.
    assert cost.flops == (50 - 8 + 1) * 2 * 32 * 64 * 64


def test_a_step_above_one_and_a_bound_that_is_passed_in():
    def fn(x, w):
        def body(state):
            step, x = state
            return step + 3, x @ w

        return jax.lax.while_loop(
            lambda state: state[0] + 2 < 20, body, (jnp.int32(0), x)
        )

    cost = counted(fn, jnp.ones((32, 64)), jnp.ones((64, 64)))
    assert cost.flops == 6 * 2 * 32 * 64 * 64  # 0, 3, ..., 15


def test_only_the_slice_of_a_sliced_array_is_read():
    def fn(table, rows):
        def body(total, row):
            taken = jax.lax.dynamic_slice(table, (row, 0), (1, 128))
            return total + jnp.sum(jnp.sin(taken)), None

        return jax.lax.scan(body, 0.0, rows)[0]

    table, rows = jnp.ones((4096, 128)), jnp.arange(10)
    cost = counted(fn, table, rows)
    assert 10 * 128 * 4 <= cost.bytes < table.nbytes / 2


def test_a_row_written_in_place_is_all_that_is_written():
    def fn(table, rows):
        def body(table, row):
            new = jnp.full((1, 128), row, jnp.float32)
            return jax.lax.dynamic_update_slice(table, new, (row, 0)), None

        return jax.lax.scan(body, table, rows)[0]

    table, rows = jnp.ones((4096, 128)), jnp.arange(10)
    cost = counted(fn, table, rows)
    # One copy, so that the argument is kept; not one a row.
    assert cost.bytes < 3 * table.nbytes


TPU = textwrap.dedent(
    """\
    HloModule jit_f, is_scheduled=true, num_partitions=8

    %started (p.0: bf16[256,128]) -> (bf16[256,128], bf16[256,512]) {
      %p.0 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
      %all-gather.1 = bf16[256,512]{1,0} all-gather(%p.0), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
      ROOT %c.1 = (bf16[256,128]{1,0}, bf16[256,512]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
    }

    %waited (p.1: bf16[256,128], p.2: bf16[256,512]) -> bf16[256,512] {
      %p.1 = bf16[256,128]{1,0} parameter(0)
      %p.2 = bf16[256,512]{1,0} parameter(1)
      %all-gather.2 = bf16[256,512]{1,0} all-gather(%p.1), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
      ROOT %c.2 = bf16[256,512]{1,0} custom-call(%p.1, %p.2, %all-gather.2), custom_call_target="AsyncCollectiveDone"
    }

    %products (q.0: bf16[16,64,32], q.1: bf16[16,32,48]) -> bf16[16,64,48] {
      %q.0 = bf16[16,64,32]{2,1,0} parameter(0)
      %q.1 = bf16[16,32,48]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
      ROOT %convolution.1 = bf16[16,64,48]{2,1,0} convolution(%q.0, %q.1), window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf
    }

    ENTRY %main (a: bf16[256,128], b: bf16[16,64,32], c: bf16[16,32,48]) -> bf16[16,64,48] {
      %a = bf16[256,128]{1,0} parameter(0)
      %b = bf16[16,64,32]{2,1,0} parameter(1)
      %c = bf16[16,32,48]{2,1,0:S(1)} parameter(2)
      %start = (bf16[256,128]{1,0:S(1)}, bf16[256,512]{1,0:S(1)}) fusion(%a), kind=kCustom, calls=%started
      %g.0 = bf16[256,128]{1,0:S(1)} get-tuple-element(%start), index=0
      %g.1 = bf16[256,512]{1,0:S(1)} get-tuple-element(%start), index=1
      %done = bf16[256,512]{1,0:S(1)} fusion(%g.0, /*index=1*/%g.1), kind=kCustom, calls=%waited
      %permute = (bf16[256,512]{1,0:S(1)}, bf16[256,512]{1,0:S(1)}) collective-permute-start(%done), channel_id=2, source_target_pairs={{0,1},{1,0}}
      ROOT %fusion = bf16[16,64,48]{2,1,0} fusion(%b, %c), kind=kOutput, calls=%products
    }
    """  # noqa: E501
)


def test_the_spelling_of_a_tpu():
    program = hlo.parse(TPU)
    cost = count(program)
    # The gather: named twice, started once, over the four devices of one
    # axis. And the permutation.
    assert cost.sent == 3 * 256 * 128 * 2 + 256 * 512 * 2
    # A batch of products, spelt as a convolution.
    assert cost.flops == 16 * 2 * 64 * 48 * 32
    # What lies in vector memory, S(1), moves nothing: only a, b and the root.
    assert cost.bytes == 2 * (256 * 128 + 16 * 64 * 32 + 16 * 64 * 48)


COLLECTIVE = """\
HloModule one, num_partitions=6

ENTRY %main (a: f32[30]) -> f32[30] {{
  %a = f32[30]{{0}} parameter(0)
  ROOT %c = f32[30]{{0}} {kind}(%a), channel_id=1, {groups}, x=1
}}
"""


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("replica_groups=mesh['x'=2,'y'=8] {'y':(2)4}", 4),
        ("replica_groups={{0}}", 1),
        ("replica_groups={}", 6),
    ],
)
@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("all-gather", lambda n: n - 1),
        ("all-reduce", lambda n: 2 * (n - 1) / n),
        ("reduce-scatter", lambda n: (n - 1) / n),
        ("all-to-all-start", lambda n: (n - 1) / n),
        ("collective-permute", lambda n: n > 1),
    ],
)
def test_bytes_on_a_ring_of_groups_in_every_spelling(
    groups, devices, kind, factor
):
    text = COLLECTIVE.format(kind=kind, groups=groups)
    sent = count(hlo.parse(text)).sent
    assert sent == pytest.approx(30 * 4 * factor(devices))


SLICED = """\
HloModule sliced, num_partitions=1

%retiled (r: bf16[36,64,32]) -> bf16[36,64,32] {
  %r = bf16[36,64,32]{1,2,0:T(16,128)(2,1)} parameter(0)
  ROOT %copy = bf16[36,64,32]{1,2,0:T(8,128)(2,1)} copy(%r)
}

%taken (t: bf16[36,64,32], i: s32[]) -> bf16[64,32] {
  %t = bf16[36,64,32]{1,2,0:T(16,128)(2,1)} parameter(0)
  %view = bf16[36,64,32]{1,2,0:T(8,128)(2,1)} fusion(%t), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %slice = bf16[1,64,32]{1,2,0} dynamic-slice(%view, %i, %z, %z), dynamic_slice_sizes={1,64,32}
  ROOT %b = bf16[64,32]{0,1} bitcast(%slice)
}

%product (p: bf16[36,64,32], j: s32[], x: bf16[8,64]) -> bf16[8,32] {
  %p = bf16[36,64,32]{1,2,0:T(16,128)(2,1)} parameter(0)
  %j = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %w = bf16[64,32]{0,1} fusion(%p, %j), kind=kLoop, calls=%taken
  ROOT %y = bf16[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

ENTRY %main (w: bf16[36,64,32], i: s32[], x: bf16[8,64]) -> bf16[8,32] {
  %w = bf16[36,64,32]{1,2,0:T(16,128)(2,1)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  ROOT %y = bf16[8,32]{1,0} fusion(%w, %i, %x), kind=kOutput, calls=%product
}
"""  # noqa: E501


def test_a_slice_of_what_is_tiled_otherwise_is_all_that_is_read():
    # As TPU7x spells it: one layer of 36, the states, and the result.
    moved = 2 * (64 * 32 + 8 * 64 + 8 * 32)
    assert count(hlo.parse(SLICED)).bytes == moved


TWO_LOOPS = """\
HloModule two, entry_computation_layout={()->f32[8,8]{1,0}}

%more (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%a, %b)
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%to5 (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%to20 (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(20)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main () -> f32[8,8] {
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %x = f32[8,8]{1,0} constant({...})
  %s = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %first = (s32[], f32[8,8]{1,0}) while(%s), condition=%to5, body=%body
  %i = s32[] get-tuple-element(%first), index=0
  %start = s32[] fusion(%i, %one), kind=kLoop, calls=%more
  %y = f32[8,8]{1,0} get-tuple-element(%first), index=1
  %t = (s32[], f32[8,8]{1,0}) tuple(%start, %y)
  %last = (s32[], f32[8,8]{1,0}) while(%t), condition=%to20, body=%body
  ROOT %z = f32[8,8]{1,0} get-tuple-element(%last), index=1
}
"""  # noqa: E501


def test_a_loop_that_starts_where_fused_arithmetic_says():
    # From 0 to 5, and from 5 + 1 to 20.
    assert count(hlo.parse(TWO_LOOPS)).flops == (5 + 14) * 2 * 8**3


def test_a_product_with_one_row_counts_as_a_product():
    text = """\
HloModule row

ENTRY %main (x: f32[64], w: f32[64,32]) -> f32[32] {
  %x = f32[64,32]{1,0} parameter(0)
  %w = f32[64,32]{1,0} parameter(1)
  %m = f32[64,32]{1,0} multiply(%x, %w)
  %b = f32[64,32]{1,0} bitcast(%m)
  %z = f32[] constant(0)
  ROOT %y = f32[32]{0} reduce(%b, %z), dimensions={0}, to_apply=%sum
}
"""
    assert count(hlo.parse(text)).flops == 2 * 64 * 32


# A kernel says what it does, also where that is but a part of its operands; one
# that says nothing reads them once.
KERNELS = """
HloModule kernels, is_scheduled=true

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %k.1 = f32[8,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"700","transcendentals":"3","bytes_accessed":"90000"}}}
  %k.2 = f32[8,128]{1,0} custom-call(%k.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x"}}
  ROOT %k.3 = f32[8,128]{1,0} custom-call(%k.2), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"30","transcendentals":"3","bytes_accessed":"500"}}}
}
"""  # noqa: E501


def test_a_kernel_is_counted_as_it_says():
    cost = count(hlo.parse(KERNELS))
    assert cost.flops == 730
    assert cost.bytes == 90000 + 2 * 8 * 128 * 4 + 500
