"""The ops in a process of their own: forks, threads that outlive the interpreter, and what memory they take."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_in_numpy_process(code: str) -> str:
    prelude = """
import numpy as np
from pagedcore import ops
ids = lambda *x: np.array(x, np.int32)
cache = np.random.default_rng(0).standard_normal((2, 8, 16, 128), np.float32)
query = np.ones((1, 32, 128), np.float32)
def attend(tokens, **options):
    table = np.ones((1, tokens // 16), np.int32)
    return ops.paged_attention(query, cache, cache, table, ids(tokens), ids(0, 1), **options)
def status(field):
    return open("/proc/self/status").read().partition(field + ":")[2].split()[0]
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + code], check=True, timeout=120, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize("before", ["attend()", ""], ids=["used before", "first used in the child"])
@pytest.mark.parametrize("runtime", ["", "import torch; torch.ones(1 << 20) + 1"], ids=["own threads", "torch"])
def test_works_in_a_forked_child(runtime: str, before: str) -> None:
    """Own threads start anew in a child; OpenMP's do not, so a child of a process that used them does without."""
    code = f"""
import os, signal, numpy as np
{runtime}
from pagedcore import ops
ids = lambda *x: np.array(x, np.int32)
cache = np.random.default_rng(0).standard_normal((400, 2, 16, 64), np.float32)
args = (np.ones((1, 2, 64), np.float32), cache, cache, np.arange(400, dtype=np.int32)[None], ids(6400), ids(0, 1))
attend = lambda: ops.paged_attention(*args, num_threads=2).tobytes()
{before}
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    os.write(write, attend())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert os.read(read, 1 << 16) == attend()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_a_fork_while_other_threads_are_in_a_kernel() -> None:
    """The GIL is released there, so a fork comes at any moment: no lock may stay held in the child."""
    code = """
import os, signal, threading
target = np.zeros((2, 1 << 19), np.uint8)
one = lambda: ops.copy_blocks(target, ids(0, 1)[None], num_threads=2)
stop = threading.Event()
def work():
    while not stop.is_set():
        one()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for _ in range(400):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        one()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
"""
    run_in_numpy_process(code)


def test_a_daemon_thread_inside_a_kernel_does_not_hinder_the_exit() -> None:
    """Python ends its threads when they ask for the GIL again: nothing may be unwound through the kernel's frames."""
    code = """
import threading, time, numpy as np
from pagedcore import ops
ids = lambda *x: np.array(x, np.int32)
cache = np.zeros((400, 2, 16, 64), np.float32)
args = (np.ones((1, 2, 64), np.float32), cache, cache, np.arange(400, dtype=np.int32)[None], ids(6400), ids(0, 1))
def work():
    while True:
        ops.paged_attention(*args, num_threads=2)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_tiny_split_of_a_long_sequence_takes_little_memory() -> None:
    """Pieces of one token each would need 655 MB for their states if all of them waited."""
    code = """
want = attend(40_000, split_size=1, num_threads=1)
assert (attend(40_000, split_size=1, num_threads=2) == want).all()
print(status("VmHWM"))
"""
    assert int(run_in_numpy_process(code)) < 300_000  # KiB


def test_a_huge_number_of_threads_is_not_taken_at_its_word() -> None:
    code = """
want = attend(16_000, split_size=16, num_threads=1)
assert (attend(16_000, split_size=16, num_threads=2**62) == want).all()
print(status("Threads"))
"""
    assert int(run_in_numpy_process(code)) < 100


def test_without_memory_nothing_is_written() -> None:
    """Rows past the last sequence are cleared, but not before all memory that a call needs is there."""
    code = """
import resource
attend(16)  # everything that is set up once
query = np.ones((4096, 32, 128), np.float32)
out, lse = np.full_like(query, 7), np.full((4096, 32), 7, np.float32)
table = np.ones((1, 4), np.int32)
call = lambda: ops.paged_attention(query, cache, cache, table, ids(64), ids(0, 4095), out=out, lse=lse, num_threads=64)
resource.setrlimit(resource.RLIMIT_AS, ((int(status("VmSize")) << 10) + (1 << 20), resource.RLIM_INFINITY))
try:
    call()
    raise SystemExit("there was memory enough")
except MemoryError:
    pass
finally:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print((out == 7).all() and (lse == 7).all())
call()
print((out[-1] == 0).all() and np.isneginf(lse[-1]).all())
"""
    assert run_in_numpy_process(code).split() == ["True", "True"]
