"""No worker outlives its parent: after Ctrl-C, SIGTERM and SIGKILL, and none keeps a pipe of the parent's open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from meteora_core.data.build import _worker_pool
from meteora_core.workers import end_processes, interrupts_held, tied

POOL = """
import os, time
from meteora_core.data.build import _worker_pool
if __name__ == "__main__":
    with _worker_pool(2) as pool:
        pids = {future.result() for future in [pool.submit(os.getpid) for _ in range(2)]}
        for _ in range(4):
            pool.submit(time.sleep, 3600)
        print("ready", flush=True)
        time.sleep(3600)
"""


def test_a_pool_ends_when_its_block_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), _worker_pool(2) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        for _ in range(4):
            pool.submit(time.sleep, 3600)
        workers = list(pool._processes.values())
        raise KeyboardInterrupt
    assert [worker.is_alive() for worker in workers] == [False] * len(workers)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_killed_parent(tmp_path, number) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    child.communicate(timeout=900)  # until nobody holds the pipe


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_tied_program_ends_with_its_parent() -> None:
    script = "import subprocess, sys\nfrom meteora_core.workers import tied\n"
    script += "child = subprocess.Popen(tied([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(3600)']))\nchild.wait()"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    parent.communicate(timeout=900)


def test_a_tied_program_is_the_program() -> None:
    done = subprocess.run(tied([sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b"]), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "['a b']\n")


def test_a_process_that_does_not_listen_is_killed() -> None:
    calls: list[str] = []

    class Deaf:
        def __getattr__(self, name):
            return lambda *_: calls.append(name) or name == "is_alive"

    end_processes([Deaf()], grace=0)
    assert calls == ["terminate", "join", "is_alive", "kill", "join"]


def test_interrupts_are_held_and_let_through() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    with interrupts_held():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
