# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Flags between the programs of one launch: no floating-point atomics, and every flag is 0 again when the launch ends.

Programs that raise a flag come first in the grid and wait for nothing that comes later, or only for a few neighbours that all run at once, so every
program that waits gets its flag.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def raise_flag(flag):
    """One more program is done; everything it stored is visible to who sees the count."""
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
    """Count this program as one of ``target`` that have stored their part of something, and share out the work on the whole.

    Returns:
        first, step: The shares first, first + step, ... below ``shares`` are this program's. CONCURRENT: each does its own, after waiting for
        the others. Otherwise (the interpreter runs one program after the other) the last to come does all, and nobody waits.
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
    """Count this program in ``flags[1]`` as one of ``target`` that look at ``flags[0]`` no more; the last one puts both back to 0."""
    tl.debug_barrier()
    if tl.atomic_add(flags + 1, 1, sem="acq_rel", scope="gpu") == target - 1:
        tl.store(flags, 0)
        tl.store(flags + 1, 0)


@triton.jit
def count_out(counter, THREADS: tl.constexpr):
    """Count this program, which looks at flags no more. Relaxed, since what it saw of the flags it has waited for.

    Returns:
        int32 (THREADS,), one number a thread: how many were counted before, in the first place. Nobody waits for it until it is used.
    """
    lanes = tl.arange(0, THREADS)
    return tl.atomic_add(counter + lanes * 0, 1, mask=lanes == 0, sem="relaxed", scope="gpu")


@triton.jit
def clear_when_last(flags, come, THREADS: tl.constexpr):
    """The last program to :func:`count_out`, by what that gave as ``come``, puts all 1,024 flags back to 0."""
    if tl.max(tl.where(tl.arange(0, THREADS) == 0, come, 0), axis=0) == tl.num_programs(0) - 1:
        tl.store(flags + tl.arange(0, 1024), tl.zeros([1024], dtype=tl.int32))


@triton.jit
def finish(flags, used):
    """Count this program as ended in ``flags[used]``; the last one puts all ``used + 1`` flags back to 0."""
    tl.debug_barrier()
    if tl.atomic_add(flags + used, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        for index in range(used + 1):
            tl.store(flags + index, 0)
