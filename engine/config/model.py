"""The sections ``model`` and ``data``: the policy, and what it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from balcaprl.config.base import Section


class ModelConfig(Section):
    """The policy."""

    path: str = "demo"
    """A transformers checkpoint folder or hub id; ``demo`` is the small captioner that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the trained weights."""
    device: str = "auto"
    """``auto`` takes the first CUDA device, or the CPU if there is none."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers, used wherever groups do not share their prompt."""
    freeze_vision: bool = False
    """Keep the image tower fixed. It then runs once per batch of rollouts, and its output serves the policy, the
    reference and later epochs."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers in the forward of an update, and compute the rest again in the backward. This
    saves memory and costs time."""
    autocast: bool = False
    """Compute the matrix products of an update in bfloat16, whatever the data type of the weights and the optimiser."""
    fused_layers: bool = True
    """Run RMSNorm, SwiGLU and rotary positions on fused kernels, if there are any: on the CPU those of the native
    library, in float32; on CUDA those of Liger, if liger-kernel is installed. Image patches go through one matrix
    product."""
    compile: bool = False
    """Compile the decoder layers with ``torch.compile``."""


class DataConfig(Section):
    """Where images and reference captions come from."""

    kind: Literal["scenes", "sharegpt4v", "jsonl", "hf"] = "scenes"
    """``scenes``: images drawn on the fly. ``sharegpt4v``: JSON with conversations. ``jsonl``: JSON with an image and a
    caption per record. The files of these two kinds hold a list, or one object per line. ``hf``: a Hugging Face dataset
    saved on disk. See ``docs/data.md``."""
    path: Path | None = None
    """The JSON file, JSONL file or dataset folder; ``scenes`` does not use it."""
    image_root: Path | None = None
    """Folder that all image paths are relative to and may not lead out of. Default: the folder of ``path``."""
    instruction: str = "Describe the image."
    """What the policy is asked. Records that have an instruction of their own keep it."""
    max_pixels: int = Field(1_003_520, ge=784)
    """Images with more pixels are shrunk to this number; the aspect ratio stays."""
    max_source_pixels: int = Field(64_000_000, ge=1, le=1 << 32)
    """Images whose header announces more pixels are refused without being decoded (decompression bombs)."""
    max_file_bytes: int = Field(64 << 20, ge=1, le=1 << 40)
    """Image files with more bytes are refused without being read."""
    check_headers: bool = True
    """Read the header of every image at start, so that refused and broken files are counted then. If false, only paths
    and file sizes are checked, which suits slow disks; a bad image is then skipped and counted when it is drawn."""
    num_eval: int = Field(128, ge=0)
    """Number of held-out images, each with all of its records. The images are shuffled by ``seed``, and the last ones
    are held out. Half of the images are held out instead if the number would leave none for training, or if it is the
    default and more than half. With ``scenes``, the held-out images are drawn from seeds of their own."""
    shuffle: bool = True
    """Draw the training images in a random order, with a new order in each epoch."""
