# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Flags by which the programs of one launch wait for each other. There are no floating-point atomics, and every flag is 0 again when the launch ends.

In the grid, programs that raise a flag come before those that wait for it. They wait for no later program, or only for a few neighbours that all run at the
same time, so no program waits forever.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def raise_flag(flag):
    """Count this program as done; everything that it stored is visible to programs that see the new count."""
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release", scope="gpu")


@triton.jit
def wait_flag(flag, target):
    """Wait until ``target`` programs have raised the flag."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def share_out(flag, target, mine, shares, CONCURRENT: tl.constexpr):
    """Count this program as one of ``target`` programs that have stored a part, and distribute the work on the whole.

    Returns:
        first, step: This program does the shares first, first + step, ... below ``shares``. If CONCURRENT, every program does one part after waiting for
        the others. Otherwise (the interpreter runs programs one after the other) the last program to arrive does everything, and none waits.
    """
    if CONCURRENT:
        raise_flag(flag)
        first = mine
        step = target
    else:
        tl.debug_barrier()
        come = tl.atomic_add(flag, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        first = tl.where(come == target - 1, 0, shares)
        step = 1
    return first, step


@triton.jit
def leave(flags, target):
    """Count this program in ``flags[1]`` as one of ``target`` that no longer read ``flags[0]``; the last one resets both to 0."""
    tl.debug_barrier()
    if tl.atomic_add(flags + 1, 1, sem="acq_rel", scope="gpu") == target - 1:
        tl.store(flags, 0)
        tl.store(flags + 1, 0)


@triton.jit
def count_out(counter, THREADS: tl.constexpr):
    """Count this program as one that no longer reads flags. The atomic is relaxed, because the program has already waited for the flags that it read.

    Returns:
        int32 (THREADS,), one number per thread; the first is the number of programs counted before. The program does not wait for it until it is used.
    """
    lanes = tl.arange(0, THREADS)
    return tl.atomic_add(counter + lanes * 0, 1, mask=lanes == 0, sem="relaxed", scope="gpu")


@triton.jit
def clear_when_last(flags, come, THREADS: tl.constexpr):
    """Reset all 1,024 flags to 0 if this is the last program to call :func:`count_out`, which returned ``come``."""
    if tl.max(tl.where(tl.arange(0, THREADS) == 0, come, 0), axis=0) == tl.num_programs(0) - 1:
        tl.store(flags + tl.arange(0, 1024), tl.zeros([1024], dtype=tl.int32))


@triton.jit
def finish(flags, used):
    """Count this program as finished in ``flags[used]``; the last one resets all ``used + 1`` flags to 0."""
    tl.debug_barrier()
    if tl.atomic_add(flags + used, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        for index in range(used + 1):
            tl.store(flags + index, 0)
