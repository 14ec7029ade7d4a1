"""The native library's threads: torch's own team, the same work at any count, beside vLLM, and none where none are found."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import threading

import pytest
import torch

from balcaprl.kernels.support import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason=f"no native library: {native.unavailable_reason()}")


def team(num_blocks: int = 16) -> int:
    """How many threads shared the blocks, each of which ran once."""
    blocks = native.probe_threads(num_blocks)
    assert [visits for visits, _ in blocks] == [1] * num_blocks
    return len({runner for _, runner in blocks})


def run(script: str) -> None:
    """Runs it in a process of its own."""
    preamble = "import os, torch\nfrom balcaprl.kernels.support import native\n" + inspect.getsource(team)
    done = subprocess.run(
        [sys.executable, "-c", preamble + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_block_runs_once_on_as_many_threads_as_torch_has(threads: int) -> None:
    torch.set_num_threads(threads)
    for num_blocks in (0, 1, 2, 5, 64):
        assert team(num_blocks) == min(threads, num_blocks)


@pytest.mark.usefixtures("restored_threads")
def test_the_count_holds_in_a_thread_that_torch_has_not_seen() -> None:
    torch.set_num_threads(1)
    teams: list[int] = []
    thread = threading.Thread(target=lambda: teams.append(team()))
    thread.start()
    thread.join()
    assert teams == [1]


def test_runtime_is_the_one_that_torch_loaded() -> None:
    # One runtime, one team: the addresses lie in a library that this process holds once.
    run("""
torch.set_num_threads(2)
torch.ones(200, 200) @ torch.ones(200, 200)
maps = [line.split() for line in open("/proc/self/maps")]
def library_of(address):
    for fields in maps:
        low, high = (int(x, 16) for x in fields[0].split("-"))
        if low <= address < high:
            return fields[-1]
before = {f[-1] for f in maps if "omp" in f[-1].rsplit("/", 1)[-1]}
assert native.thread_runtime() is not None
assert {library_of(a) for a in native.thread_runtime()} <= before
team()
assert {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.split()[-1].rsplit("/", 1)[-1]} == before
""")


def test_without_a_runtime_the_blocks_run_on_the_calling_thread() -> None:
    run("""
native._TEAM_ENTRIES = ("no_such_entry", "omp_get_max_threads")
torch.set_num_threads(2)
assert native.thread_runtime() is None
assert team() == 1
""")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_beside_vllm_in_one_process() -> None:
    run("""
import vllm
torch.set_num_threads(2)
assert team() == 2
torch.ones(300, 300) @ torch.ones(300, 300)
assert team() == 2
""")


def test_after_a_fork_with_one_thread_as_data_loaders_use_it() -> None:
    run("""
torch.set_num_threads(2)
team()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if team() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
""")
