"""Loads the compiled library (``kernels/csrc``) through ctypes; at run time it needs no compiler and no libtorch.

No other module loads the library. Loading is tried once, at the first call. If it fails, everything else still works:
ops with ``impl="auto"`` run their reference after one warning, and ``impl="native"`` raises an error with the reason.

The library starts no threads of its own. It runs its blocks of work on the thread team of the OpenMP runtime that
torch's kernels use, with ``torch.get_num_threads()`` threads. If the entry points of that runtime cannot be found, the
library runs on the calling thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import torch

LIBRARY_NAME = "libbalcaprl_native.so"
ABI_VERSION = 3  # must equal kAbiVersion in kernels/csrc/native.h

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
_SOFTMAX_ROWS = [_CODE, _PTR, _INT]  # dtype code of the logits, pointer to the logits, row stride
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
_LIBRARY_PATH = Path(__file__).resolve().parents[1] / LIBRARY_NAME  # resolved once: this takes longer than a small op
_TEAM_ENTRIES = ("GOMP_parallel", "omp_get_max_threads")
_REINSTALL = "Install balcaprl again on a machine with cmake and a C++17 compiler (pip install -v shows the build)."


SIMD_LEVELS = ("plain", "avx2", "avx512")
SIMD_VARIABLE = "BALCAPRL_SIMD"
"""Environment variable that names the highest of ``SIMD_LEVELS`` to use; it is read when the library is loaded."""


def library_path() -> Path:
    """The path at which the library is expected, in the directory of ``balcaprl.kernels``."""
    return _LIBRARY_PATH


def is_available() -> bool:
    """Whether the compiled library exists, loads, and has the interface version that this module needs."""
    return _load(library_path())[0] is not None


def unavailable_reason() -> str | None:
    """Why the library cannot be used and what to do about it; None if it can be used."""
    return _load(library_path())[1]


def library() -> ctypes.CDLL:
    """Returns the loaded library, whose functions have ctypes signatures.

    Raises:
        RuntimeError: the library is not available; the message says why.
    """
    handle, reason = _load(library_path())
    if handle is None:
        raise RuntimeError(f"impl='native' cannot run: {reason}")
    # OpenMP keeps the thread count per calling thread, and torch sets it in a new thread only when asked for it.
    torch.get_num_threads()
    return handle


def set_simd_level(level: str | None) -> str:
    """Selects the instruction set of the vector code. Must not be called while an op runs in another thread.

    Args:
        level: the highest of ``SIMD_LEVELS`` to use; None selects the best level of this machine.

    Returns:
        The selected level, which is neither above ``level`` nor above what this machine supports.

    Raises:
        ValueError: ``level`` is not one of ``SIMD_LEVELS``.
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
    """Warns once per process that ``impl="auto"`` runs without the library."""
    warnings.warn(
        f"balcaprl.kernels runs plain PyTorch on the CPU: {unavailable_reason()}", RuntimeWarning, stacklevel=2
    )


@functools.cache
def _load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the library at ``path``; returns the library and None, or None and the reason for the failure."""
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
    """Runs empty blocks on the library's threads, for tests.

    Returns:
        For each block, how often it ran (1 is correct) and a number that identifies its thread.
    """
    visits, runners = torch.zeros(2, num_blocks, dtype=torch.int64)
    library().balcaprl_probe_threads(num_blocks, visits.data_ptr(), runners.data_ptr())
    return list(zip(visits.tolist(), runners.tolist(), strict=True))


def _hand_over_threads(handle: ctypes.CDLL) -> None:
    """Gives the library the entry points of torch's OpenMP runtime, if they can be found."""
    handle.balcaprl_set_thread_runtime.argtypes = [_PTR, _PTR]
    handle.balcaprl_set_thread_runtime.restype = None
    entries = thread_runtime()
    if entries is not None:
        handle.balcaprl_set_thread_runtime(*entries)


@functools.cache
def thread_runtime() -> tuple[int, int] | None:
    """Addresses of ``GOMP_parallel`` and ``omp_get_max_threads`` in torch's OpenMP runtime; None if not found.

    The process's global scope is searched first, as the dynamic linker did for torch itself: if a runtime was loaded
    before torch (vLLM preloads Intel's), torch runs on that one. Torch's library and its dependencies come second.
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
