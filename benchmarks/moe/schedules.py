"""Static cycles of a TPU program, read from the schedules that libtpu dumps.

libtpu writes, for every kernel of a compiled program (XLA's fusions, sorts and copies as well as
Pallas kernels), its final VLIW bundles with loops marked. A bundle takes one cycle when nothing
stalls, so bundles times the trips of the loops around them is the number of cycles that the
instructions take at least, DMA and memory aside.

- A loop's trips are the bound of its exit test. Where the loop is software-pipelined (its bundles
  speak of iteration stages) the bound counts filling and draining, in which most of the body is
  skipped: these trips are not counted.
- A loop without a constant bound is counted once. XLA's kernels have some, which copy what does
  not fill a window; ours have none.
- Of two sides of a branch both are counted.
"""

import re
from pathlib import Path
from typing import NamedTuple

# Written to LIBTPU_INIT_ARGS before JAX is imported.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false "
    "--xla_jf_dump_llo_static_gaps=false --xla_jf_emit_annotations=true --xla_jf_debug_level=2 "
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)

_FILE = re.compile(r"^\d+-(?P<kernel>.+?)-\d+-final_bundles\.txt$")
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:\s*(?P<loops>[> ]*)\{")
_EXIT = re.compile(
    r"%(?P<test>\w+) = scmp\.ge\S* (?:\(\S+\), )?%(?P<index>\w+), (?P<bound>[%\w]+) "
    r"/\* loop exit test"
)
_BRANCH = re.compile(r"sbr\.rel \(!%(\w+)\)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_SPILL = re.compile(r"= vst [^;]*_spill")
# Parts of the program around kernels rather than kernels.
_FRAME = ("<late-", "TLP")


class Kernel(NamedTuple):
    """One kernel's schedule.

    Attributes:
        name: as in the scheduled HLO.
        cycles: bundles times trips.
        unbounded: loops that were counted once.
        vector_spills: stores of vector registers that ran out, inside loops.
    """

    name: str
    cycles: int
    unbounded: int
    vector_spills: int


class _Bundle(NamedTuple):
    depth: int
    begins_loop: bool
    text: str


def read(folder: Path) -> list[Kernel]:
    """The kernels of the program dumped into `folder`, in the order they were compiled."""
    kernels = []
    for file in sorted(folder.iterdir()):
        match = _FILE.match(file.name)
        if match and not match["kernel"].startswith(_FRAME):
            kernels.append(_kernel(match["kernel"], file.read_text(encoding="utf-8")))
    return kernels


def _kernel(name: str, text: str) -> Kernel:
    bundles = _bundles(text)
    bounds = _bounds(bundles)
    trips = [1] * len(bundles)
    for first, bound in bounds.items():
        last = _last(bundles, first)
        count = _trips(bundles[first : last + 1], bound) if bound else 1
        for at in range(first, last + 1):
            trips[at] *= count
    spills = sum(
        len(_SPILL.findall(bundle.text)) for bundle, n in zip(bundles, trips, strict=True) if n > 1
    )
    unbounded = sum(bound is None for bound in bounds.values())
    return Kernel(name, sum(trips), unbounded, spills)


def _bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            depth = match["loops"].count(">")
            if line.rstrip().endswith("{}") and bundles:
                depth = bundles[-1].depth  # Empty ones do not say where they are.
            bundles.append(_Bundle(depth, match["label"] == "LB", line))
    return bundles


def _bounds(bundles: list[_Bundle]) -> dict[int, re.Match[str] | None]:
    """The exit test of each loop, by the loop's first bundle; None where its bound varies.

    A branch back ends the innermost loop that is open. The test itself may stand in a loop inside.
    """
    tests = {match["test"]: match for bundle in bundles for match in _EXIT.finditer(bundle.text)}
    bounds: dict[int, re.Match[str] | None] = {}
    still_open = []
    for at, bundle in enumerate(bundles):
        if bundle.begins_loop:
            still_open.append(at)
            bounds[at] = None
        for branch in _BRANCH.finditer(bundle.text):
            if branch[1] in tests and still_open:
                test = tests[branch[1]]
                bounds[still_open.pop()] = test if test["bound"].isdigit() else None
    return bounds


def _last(bundles: list[_Bundle], first: int) -> int:
    """The last bundle of the loop that begins at `first`."""
    depth = bundles[first].depth
    last = first
    for at in range(first, len(bundles)):
        bundle = bundles[at]
        if at > first and bundle.begins_loop and bundle.depth <= depth:
            break
        if bundle.depth >= depth:
            last = at
    return last


def _trips(loop: list[_Bundle], bound: re.Match[str]) -> int:
    own = [bundle for bundle in loop if bundle.depth == loop[0].depth]
    stages = max((int(stage) for bundle in own for stage in _STAGE.findall(bundle.text)), default=0)
    # An unrolled loop counts in steps. Registers are named %s<value>_s<register>.
    index = bound["index"].split("_")[0]
    body = "\n".join(bundle.text for bundle in loop)
    step = re.search(rf"%{index}(?:_\w+)? = sadd\.s32 (?:\(\S+\), )?(\d+), ", body)
    return max(1, int(bound["bound"]) // (int(step[1]) if step else 1) - stages)
