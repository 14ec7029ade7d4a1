"""The only loader of the compiled library (``kernels/csrc``), through ctypes: no compiler, no libtorch at run time.

Loading is tried once, at the first call. Where it fails everything else still works: ops with ``impl="auto"`` run their
reference after one warning, ``impl="native"`` raises with the reason.

The library brings no threads of its own. It runs its blocks on the team of the OpenMP runtime that torch's kernels use,
with ``torch.get_num_threads()`` threads; where that runtime has no entry that it knows it runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "libbalcaprl_native.so"
ABI_VERSION = 3  # as kAbiVersion in kernels/csrc/native.h

# Status codes of kernels/csrc/native.h.
OK = 0
OUT_OF_MEMORY = 1
BAD_REWARDS = 2
BAD_WEIGHTS = 3
BAD_LENGTHS = 4
BAD_REFERENCE_LENGTHS = 5
BAD_LOGITS = 6
BAD_TARGETS = 7
BAD_OFFSETS = 8
BAD_VALUES = 9

_INT = ctypes.c_int64
_PTR = ctypes.c_void_p
_REAL = ctypes.c_double
_CODE = ctypes.c_int32
_GROUPED_ADVANTAGES = [_PTR, _INT, _INT, _INT, _PTR, _PTR, _PTR, _INT, _REAL, _REAL, _CODE, _REAL, _PTR]
_SOFTMAX_ROWS = [_CODE, _PTR, _INT]  # type of the logits, logits, row stride
_SIGNATURES = {
    "balcaprl_rotate": [_INT, _INT, _INT, *[_PTR] * 3, _CODE, _PTR],
    "balcaprl_rms_norm": [_INT, _INT, _PTR, _PTR, _REAL, _PTR, _PTR],
    "balcaprl_rms_norm_backward": [_INT, _INT, *[_PTR] * 6],
    "balcaprl_silu_mul": [_INT, *[_PTR] * 3],
    "balcaprl_silu_mul_backward": [_INT, *[_PTR] * 5],
    "balcaprl_token_batch": [_INT, _INT, *[_PTR] * 6, _CODE, _REAL, _PTR, _PTR],
    "balcaprl_token_loss": [_INT, *[_PTR] * 6, *[_REAL] * 4, _PTR, _PTR],
    "balcaprl_probe_threads": [_INT, _PTR, _PTR],
    "balcaprl_set_simd_level": [_CODE],
    "balcaprl_softmax_stats": [*_SOFTMAX_ROWS, _INT, _INT, _REAL, *[_PTR] * 5],
    "balcaprl_softmax_gradient": [*_SOFTMAX_ROWS, _INT, _INT, _PTR, _INT, _REAL, *[_PTR] * 5],
    "balcaprl_softmax_mark": [*_SOFTMAX_ROWS, _INT, _PTR, _INT, _REAL, *[_PTR] * 3, _REAL, _PTR],
    "balcaprl_softmax_gather_gradient": [*_SOFTMAX_ROWS, _PTR, _INT, _PTR, _INT, _REAL, *[_PTR] * 6],
    "balcaprl_logits_gradient": [*_SOFTMAX_ROWS, _INT, _INT, _REAL, *[_PTR] * 6, _INT],
    "balcaprl_grouped_advantages_f32": _GROUPED_ADVANTAGES,
    "balcaprl_grouped_advantages_f64": _GROUPED_ADVANTAGES,
}
_LIBRARY_PATH = Path(__file__).resolve().parent / LIBRARY_NAME  # once: resolving it costs more than a small op
_TEAM_ENTRIES = ("GOMP_parallel", "omp_get_max_threads")
_REINSTALL = "Install balcaprl again on a machine with cmake and a C++17 compiler (pip install -v shows the build)."


SIMD_LEVELS = ("plain", "avx2", "avx512")
SIMD_VARIABLE = "BALCAPRL_SIMD"
"""Environment variable with the highest of ``SIMD_LEVELS`` to use; read when the library is loaded."""


def library_path() -> Path:
    """Where the library is expected: beside this module."""
    return _LIBRARY_PATH


def is_available() -> bool:
    """Whether the compiled library is there, loads, and has this module's interface version."""
    return _load(library_path())[0] is not None


def unavailable_reason() -> str | None:
    """Why the library cannot be used and what to do about it; None where it can."""
    return _load(library_path())[1]


def library() -> ctypes.CDLL:
    """The loaded library, its functions typed.

    Raises:
        RuntimeError: it is not available; the message says why.
    """
    handle, reason = _load(library_path())
    if handle is None:
        raise RuntimeError(f"impl='native' cannot run: {reason}")
    # The thread count is kept per calling thread, and torch sets it in a new thread only when it is asked.
    torch.get_num_threads()
    return handle


def set_simd_level(level: str | None) -> str:
    """Asks the vector code for an instruction set, one of ``SIMD_LEVELS``; None: the best that there is.

    Not while an op runs in another thread.

    Returns:
        The level in use from now on: not above ``level``, and not above what this machine has.

    Raises:
        ValueError: no such level.
        RuntimeError: the library is not available.
    """
    return _set_simd_level(library(), level)


def _set_simd_level(handle: ctypes.CDLL, level: str | None) -> str:
    if level is not None and level not in SIMD_LEVELS:
        raise ValueError(f"level: expected one of {', '.join(SIMD_LEVELS)}; got {level!r}")
    wanted = -1 if level is None else SIMD_LEVELS.index(level)
    return SIMD_LEVELS[handle.balcaprl_set_simd_level(wanted)]


@functools.cache
def warn_unavailable() -> None:
    """Says once per process that ``impl="auto"`` runs without the library."""
    warnings.warn(
        f"balcaprl.kernels runs plain PyTorch on the CPU: {unavailable_reason()}", RuntimeWarning, stacklevel=2
    )


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library at ``path``, or None and the reason."""
    if not path.is_file():
        return None, f"the native library is not installed (no {path}). {_REINSTALL}"
    try:
        handle = ctypes.CDLL(str(path))
        version = handle.balcaprl_abi_version()
        if version != ABI_VERSION:
            return None, f"{path} has interface version {version}, this code needs {ABI_VERSION}. {_REINSTALL}"
        for name, argtypes in _SIGNATURES.items():
            function = getattr(handle, name)
            function.argtypes = argtypes
            function.restype = _CODE
        _hand_over_threads(handle)
        _set_simd_level(handle, os.environ.get(SIMD_VARIABLE))
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}. {_REINSTALL}"
    except ValueError as error:
        return None, f"environment variable {SIMD_VARIABLE}: {error}"
    return handle, None


def probe_threads(num_blocks: int) -> list[tuple[int, int]]:
    """Runs empty blocks over the library's threads: for each block how often it ran (1), and a number naming its thread."""
    visits, runners = torch.zeros(2, num_blocks, dtype=torch.int64)
    library().balcaprl_probe_threads(num_blocks, visits.data_ptr(), runners.data_ptr())
    return list(zip(visits.tolist(), runners.tolist(), strict=True))


def _hand_over_threads(handle: ctypes.CDLL) -> None:
    """Tells the library where torch's OpenMP runtime starts a team of threads, if that can be found."""
    handle.balcaprl_set_thread_runtime.argtypes = [_PTR, _PTR]
    handle.balcaprl_set_thread_runtime.restype = None
    entries = thread_runtime()
    if entries is not None:
        handle.balcaprl_set_thread_runtime(*entries)


@functools.cache
def thread_runtime() -> tuple[int, int] | None:
    """Addresses of ``GOMP_parallel`` and ``omp_get_max_threads`` in the runtime that torch uses; None: not found.

    The process's global scope comes first, as it did when torch itself was linked: a runtime that was loaded ahead of torch
    (vLLM preloads Intel's) is the one that torch runs on. Then torch's library and what that depends on.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            scope = ctypes.CDLL(name)
            entries = [ctypes.cast(getattr(scope, entry), _PTR).value for entry in _TEAM_ENTRIES]
        except (OSError, AttributeError, TypeError):  # no such file, no such entry, no global scope (Windows)
            continue
        if entries[0] and entries[1]:
            return entries[0], entries[1]
    return None
