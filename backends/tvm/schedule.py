"""A schedule for what has no kernel of ours: pointwise operators, gathers, gates, small products. TVM would make plain loops of them.

Functions that are computed element by element become one loop nest (what leads up to the result is inlined), whose innermost loop is in
vectors of the machine's width where it divides; in sums, the innermost dimension of the result goes into the vectors and the sum runs
around them, in its order. Rows are divided among threads where that pays.
"""

from __future__ import annotations

import contextlib
from typing import Any

import tvm
from tvm import s_tir, tirx

SCHEDULED = "tirx.is_scheduled"
"""The mark of a function that has a schedule: our kernels carry it from the beginning."""
WORTH = 1 << 14
"""Numbers to compute from which the other threads are woken; of a size that varies, what is computed for one of it must be so many: a step
of one token has a few pointwise functions a layer, and waking a thread takes longer than any of them."""
_PARALLEL, _SUM = tirx.IterVar.DataPar, tirx.IterVar.CommReduce


def schedule_rest(lanes: int, threads: int) -> Any:
    """The pass that schedules and marks every function of a module that is not marked; those it cannot schedule stay unmarked.

    Args:
        lanes: floats in a vector. threads: of the machine.
    """

    @tvm.transform.module_pass(opt_level=0, name="ScheduleRest")
    def run(module: Any, _context: Any) -> Any:
        for name, function in module.functions_items():
            if isinstance(function, tirx.PrimFunc) and not is_scheduled(function):
                made = scheduled(function, lanes, threads)
                if made is not None:
                    module[name] = made
        return module

    return run


def is_scheduled(function: Any) -> bool:
    return bool(function.attrs and function.attrs.get(SCHEDULED, False))


def scheduled(function: Any, lanes: int, threads: int) -> Any | None:
    """The function with a schedule and the mark; None where a part of it is neither computed element by element nor a sum, or it is a
    program of its own (TVM's scans, which divide their rows among threads)."""
    schedule = s_tir.Schedule(function)
    try:
        root = schedule.get_sblock("root")
    except s_tir.schedule.ScheduleError:
        return None
    kept = {schedule.get(b).name_hint for b in schedule.get_output_blocks(root)}
    for block in schedule.get_child_blocks(root):
        if schedule.get(block).name_hint not in kept and _is_a_step(schedule, block):
            with contextlib.suppress(s_tir.schedule.ScheduleError):  # where it cannot be, it is computed by itself
                schedule.compute_inline(block)
    for block in schedule.get_child_blocks(root):
        if not _schedule(schedule, block, lanes, threads):
            return None
    return schedule.mod["main"].with_attr(SCHEDULED, True)


def _is_a_step(schedule: Any, block: Any) -> bool:
    """Whether a block is computed element by element and read so by one other: then it need not be held in memory, and nothing is computed
    twice."""
    readers = schedule.get_consumers(block)
    return len(readers) == 1 and all(_kinds(schedule, b) == {_PARALLEL} for b in (block, readers[0]))


def _kinds(schedule: Any, block: Any) -> set[int]:
    """Of the dimensions of a block: computed in any order, or summed over."""
    return {int(i.iter_type) for i in schedule.get(block).iter_vars}


def _schedule(schedule: Any, block: Any, lanes: int, threads: int) -> bool:
    variables, loops = schedule.get(block).iter_vars, schedule.get_loops(block)
    if not _kinds(schedule, block) <= {_PARALLEL, _SUM} or len(loops) != len(variables):
        return False
    rows = [loop for loop, v in zip(loops, variables, strict=True) if v.iter_type == _PARALLEL]
    sums = [loop for loop, v in zip(loops, variables, strict=True) if v.iter_type == _SUM]
    if not rows:
        return True
    each = 1  # numbers computed for one of what varies, or in all
    for loop in loops:
        each *= _extent(schedule, loop) or 1
    varies = _extent(schedule, rows[-1]) is None
    *outer, last = rows
    width = _extent(schedule, last)
    wide = next((n for n in (lanes, 8, 4) if n <= lanes and width and width % n == 0), 0)
    if wide and _of_numbers(schedule, block):
        blocks, inner = schedule.split(last, [None, wide])
        schedule.reorder(*outer, blocks, *sums, inner)
        schedule.vectorize(inner)
        outer.append(blocks)
    elif sums:
        schedule.reorder(*outer, last, *sums)
        outer.append(last)
    if threads > 1 and outer and (varies or each >= WORTH):
        row = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
        schedule.parallel(row)
    if sums:
        begun = schedule.decompose_reduction(block, sums[0])
        if wide and _of_numbers(schedule, block):
            schedule.vectorize(schedule.get_loops(begun)[-1])
    return True


def _extent(schedule: Any, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _of_numbers(schedule: Any, block: Any) -> bool:
    """Whether everything that a block reads and writes is numbers: booleans have no vectors in memory."""
    held = schedule.get(block)
    return all(str(region.source.dtype) != "bool" for region in [*held.reads, *held.writes])
