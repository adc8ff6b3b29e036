import pytest

from aquila_jax.planning import hlo
from aquila_jax.planning.traffic import traffic_of

# A loop of eight, in it an all-gather over pairs; written by hand in the printer's form.
LOOP = """HloModule jit_step, is_scheduled=true

%body (state: (s32[], bf16[4,8], bf16[8,8])) -> (s32[], bf16[4,8], bf16[8,8]) {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0:T(4,128)(2,1)}, /*index=2*/bf16[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %shard = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %whole = bf16[8,8]{1,0} all-gather(%shard), channel_id=1, replica_groups=[2,2]<=[4], \
dimensions={0}, use_global_device_ids=true, metadata={op_name="jit(step)/gather"}
  ROOT %out = (s32[], bf16[4,8], bf16[8,8]) tuple(%next, %shard, %whole)
}

%condition (state.1: (s32[], bf16[4,8], bf16[8,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %state.1 = (s32[], bf16[4,8], bf16[8,8]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %below = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[4,8], y: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,8]{1,0} parameter(1)
  %start = s32[]{:T(128)} constant(BEGIN)
  %first = s32[]{:T(128)} copy(%start)
  %given = (s32[], bf16[4,8], bf16[8,8]) tuple(%first, %x, %y)
  %loop = (s32[], bf16[4,8], bf16[8,8]) while(%given), condition=%condition, body=%body
  ROOT %result = bf16[8,8]{1,0} get-tuple-element(%loop), index=2
}
"""


def in_entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m\n\n{before}ENTRY %main (x: f32[16]) -> f32[16] {{\n"
        f"  %x = f32[16]{{0}} parameter(0)\n{body}\n}}\n"
    )


def collectives(text: str, num_devices: int = 4):
    return traffic_of(hlo.parse(text), num_devices).collectives


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[4,8]{1,0:T(4,128)(2,1)S(1)}", 64),
        ("(f32[3]{0}, /*index=1*/(s8[5], pred[2]))", 19),
        ("f32[]", 4),
        ("s4[10]", 5),
        ("f8e4m3fn[7]", 7),
        ("u64[2,0]", 0),
        ("token[]", 0),
        ("c64[2]", 8 * 2),
    ],
)
def test_sizes_of_types(shape, size):
    assert hlo.num_bytes(shape) == size


def test_elements_of_a_tuple_are_its_own_and_not_those_inside():
    assert hlo.elements("((f32[2,3]{1,0}, s32[]), bf16[4]{0:T(8,128)}, u32[])") == [
        "(f32[2,3]{1,0}, s32[])",
        "bf16[4]{0:T(8,128)}",
        "u32[]",
    ]
    assert hlo.elements("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]


@pytest.mark.parametrize(("begin", "trips"), [("0", 8), ("3", 5)])
def test_what_is_in_a_loop_counts_as_often_as_it_runs(begin, trips):
    (found,) = collectives(LOOP.replace("BEGIN", begin))
    assert (found.kind, found.trips, found.size) == ("all-gather", trips, 8 * 8 * 2)
    assert found.groups.tolist() == [[0, 1], [2, 3]]
    assert found.where == "jit(step)/gather"


def test_a_trip_count_that_the_compiler_states_is_believed():
    text = LOOP.replace("BEGIN", "0").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    )
    assert collectives(text)[0].trips == 11


def test_a_loop_of_unknown_length_is_told():
    text = LOOP.replace("BEGIN", "0").replace("direction=LT", "direction=NE")
    traffic = traffic_of(hlo.parse(text), 4)
    assert traffic.unknown_loops == 1
    assert traffic.collectives[0].trips == 1


def test_loops_in_loops_multiply():
    inner = LOOP.replace("BEGIN", "0").split("ENTRY")[0]
    outer = (
        inner.replace("%body", "%outer")
        .replace("%condition", "%outer_condition")
        .replace("constant(8)", "constant(3)")
        .replace("HloModule jit_step, is_scheduled=true", "")
        .replace(
            "  ROOT %out =",
            "  %zero = s32[] constant(0)\n"
            "  %in = (s32[], bf16[4,8], bf16[8,8]) tuple(%zero, %shard, %whole)\n"
            "  %nested = (s32[], bf16[4,8], bf16[8,8]) while(%in), condition=%condition, "
            "body=%body\n  ROOT %out =",
        )
    )
    entry = LOOP.replace("BEGIN", "0").split("ENTRY")[1]
    entry = entry.replace(
        "condition=%condition, body=%body", "condition=%outer_condition, body=%outer"
    )
    found = collectives(inner + outer + "ENTRY" + entry)
    assert sorted(c.trips for c in found) == [3, 24]


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_form(written, groups):
    line = f"ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, {written}, to_apply=%add"
    assert collectives(in_entry(line))[0].groups.tolist() == groups


def test_a_pair_of_start_and_done_counts_once():
    (found,) = collectives(
        in_entry(
            "%s = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}",
            "ROOT %d = f32[64]{0} all-gather-done(%s)",
        )
    )
    assert (found.kind, found.size, found.trips) == ("all-gather", 256, 1)


def test_an_attribute_may_hold_line_breaks():
    kernel = (
        '%k = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'metadata={kernel={\n"blocks":"{}"\n}}, metadata={op_name="kernel"}'
    )
    found = collectives(
        in_entry(kernel, "ROOT %r = f32[16]{0} all-reduce(%k), replica_groups={}, to_apply=%add")
    )
    assert [c.kind for c in found] == ["all-reduce"]


def test_a_ragged_exchange_counts_its_smaller_buffer():
    operands = "%x, %big, %i, %i, %i, %i"
    lines = (
        "%big = f32[64]{0} broadcast(%x)",
        "%i = s32[4]{0} iota()",
        "%s = ((f32[16]{0}, f32[64]{0}, s32[4]{0}), f32[64]{0}, u32[]) "
        f"ragged-all-to-all-start({operands}), replica_groups={{{{0,1,2,3}}}}",
        "ROOT %d = f32[64]{0} ragged-all-to-all-done(%s)",
    )
    (found,) = collectives(in_entry(*lines))
    assert (found.kind, found.size) == ("ragged-all-to-all", 64)


def fusion(name: str, *, channel: int, target: str) -> str:
    gather = (
        f"  %g.{name} = f32[64]{{0}} all-gather(%p.{name}), channel_id={channel}, "
        "replica_groups={{0,1,2,3}}, dimensions={0}, "
        'frontend_attributes={chain_id="1"}\n'
    )
    end = f'  ROOT %c.{name} = f32[64]{{0}} custom-call(%g.{name}), custom_call_target="{target}"'
    return (
        f"%{name} (p.{name}: f32[16]) -> f32[64] {{\n"
        f"  %p.{name} = f32[16]{{0}} parameter(0)\n{gather}{end}\n}}\n\n"
    )


def test_a_collective_spread_over_fusions_counts_once_for_each_start():
    before = (
        fusion("begin", channel=7, target="AsyncCollectiveStart")
        + fusion("go_on", channel=7, target="Else")
        + fusion("end", channel=7, target="AsyncCollectiveDone")
    )
    lines = [
        f"%f.{name} = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("begin", "go_on", "end")
    ]
    root = "ROOT %r = f32[16]{0} copy(%x)"
    (found,) = collectives(in_entry(*lines, root, before=before))
    assert (found.size, found.trips) == (256, 1)
    again = "%f.again = f32[64]{0} fusion(%x), kind=kCustom, calls=%begin"
    (found,) = collectives(in_entry(*lines, again, root, before=before))
    assert found.trips == 2


def test_an_all_reduce_that_is_sliced_at_once_is_a_reduce_scatter():
    before = (
        "%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n"
        "  %r = f32[16]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n"
        "  %z = s32[] constant(0)\n"
        "  ROOT %s = f32[4]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={4}\n}\n\n"
    )
    line = "ROOT %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = collectives(in_entry(line, before=before))
    assert (found.kind, found.size) == ("reduce-scatter", 64)


def test_fusions_that_share_a_channel_by_chance_count_each():
    before = "".join(
        fusion(name, channel=1, target="Else").replace(', frontend_attributes={chain_id="1"}', "")
        for name in ("first", "second")
    )
    lines = [
        f"%f.{name} = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%{name}"
        for name in ("first", "second")
    ]
    assert len(collectives(in_entry(*lines, "ROOT %r = f32[16]{0} copy(%x)", before=before))) == 2


def test_of_branches_the_one_that_sends_most_counts():
    before = "".join(
        f"%branch{n} (b{n}: f32[16]) -> f32[16] {{\n  %b{n} = f32[16]{{0}} parameter(0)\n"
        f"  %w{n} = f32[{n}]{{0}} all-gather(%b{n}), replica_groups={{}}, dimensions={{0}}\n"
        f"  ROOT %o{n} = f32[16]{{0}} copy(%b{n})\n}}\n\n"
        for n in (64, 128)
    )
    line = (
        "ROOT %c = f32[16]{0} conditional(%x, %x, %x), branch_computations={%branch64, %branch128}"
    )
    (found,) = collectives(in_entry(line, before=before))
    assert found.size == 512


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule m\n")
