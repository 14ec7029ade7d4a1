"""Where figures come from: the machine, the packages, the settings and the sources."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import balcaprl
from balcaprl.kernels.support import native

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "trl", "liger-kernel")
SAME = ("sources", "device", "threads", "simd", *PACKAGES)
"""Fields that must agree with the current run for a row of an earlier run to count as measured."""


def provenance(device: torch.device, sources: Iterable[str] = ()) -> dict[str, object]:
    """The machine, packages and settings with which figures are measured, and the digest of their sources.

    Args:
        device: the device that is measured.
        sources: patterns of the files behind the figures, see ``sources_digest``.
    """
    return {
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "kernels", "bench/*.py")),
        "sources": sources_digest(sources),
        "balcaprl": balcaprl.__version__,
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "simd": _simd_level() if device.type == "cpu" else None,
    }


def sources_digest(patterns: Iterable[str]) -> str:
    """A short hash of the sources behind the figures, given by patterns of paths below the root of the repository.

    Unlike the commit, it changes neither when results are added nor when files are only moved or renamed.
    """
    files = {p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file() and p.suffix not in (".so", ".pyc")}
    contents = sorted(hashlib.sha256(path.read_bytes()).digest() for path in files)
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12]


def moment() -> dict[str, object]:
    """The time, and how busy the machine is."""
    return {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load": os.getloadavg()[0]}


def package_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _simd_level() -> str | None:
    """The instruction set of the native library: the best of this machine, or the one that ``BALCAPRL_SIMD`` names."""
    return native.set_simd_level(os.environ.get("BALCAPRL_SIMD")) if native.is_available() else None


def _git(*arguments: str) -> str | None:
    """The output of a git command; None outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
