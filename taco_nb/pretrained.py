"""Some pretrained networks are downloads. Here is what each is for, where this machine keeps it, and how to get it.

Nothing here fetches anything. A codec, a training run or an evaluation looks for what it needs, and raises
`MissingWeightsError` with the command where it is missing; `taco-nb fetch` then gets it, on a machine with a network.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache

from taco_nb.errors import MissingWeightsError, SettingError
from taco_nb.files import BUNDLED, human_size


@dataclass(frozen=True)
class Pretrained(ABC):
    """A pretrained network has a `name` that it is fetched by, and a `use` that a run has for it.

    Each kind also has a `size` in bytes, which is exact for a `Checkpoint` and about right for the others.
    """

    name: str
    use: str

    @property
    def command(self) -> str:
        """What to type, on a machine with a network, to have it."""
        return f"taco-nb fetch {self.name}"

    @property
    @abstractmethod
    def home(self) -> Path:
        """The folder in which this machine keeps it, or would."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """The file or folder if it is there, whole; else None."""

    @property
    def missing(self) -> str:
        """One line for when it is not there: what, where it was looked for, and how to get it."""
        return f"{self.name} ({human_size(self.size)}) is not in {self.home}. To have it, run: {self.command}"

    def require(self) -> Path:
        """Return the file or folder. Raises `MissingWeightsError`, with the command that fetches it, if it is missing."""
        if (path := self.path) is None:
            raise MissingWeightsError(self.missing)
        return path


@dataclass(frozen=True)
class Checkpoint(Pretrained):
    """A checkpoint is a file in torch.hub's cache, where torchvision and torch-fidelity look for it."""

    size: int
    url: str
    sha256: str

    @property
    def home(self) -> Path:
        return Path(torch.hub.get_dir(), "checkpoints")

    @property
    def file(self) -> Path:
        """Where the file is, or would be, whole or not."""
        return self.home / self.url.rsplit("/", 1)[-1]

    @property
    def path(self) -> Path | None:
        return self.file if self.file.is_file() and self.file.stat().st_size == self.size else None

    @property
    def missing(self) -> str:
        size = self.file.stat().st_size if self.file.is_file() else None
        state = "is not there" if size is None else f"has {size:,} bytes and cannot be whole"
        return f"{self.file} ({self.size:,} bytes) {state}. To have it, run: {self.command}"


@dataclass(frozen=True)
class OpenClip(Pretrained):
    """open_clip's models, "model/pretrained", are in Hugging Face's cache: CLIPs, and CoCas, which write captions."""

    use: str = "whatever it was asked for"

    @property
    def size(self) -> int:
        return _float32_bytes(self.name.split("/")[0])

    @property
    def tag(self) -> dict[str, Any]:
        """What open_clip knows of the weights: where they are, and how they were trained."""
        import open_clip

        return open_clip.get_pretrained_cfg(*self.name.split("/", 1))

    @property
    def repository(self) -> str:
        return os.path.split(self.tag["hf_hub"])[0]

    @property
    def files(self) -> list[str]:
        """The names that the file may have in its repository, in the order in which open_clip tries them."""
        from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

        file = os.path.split(self.tag["hf_hub"])[1]
        if not file:
            return [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
        return [str(Path(file).with_suffix(".safetensors")), file]

    @property
    def home(self) -> Path:
        return Path(constants.HF_HUB_CACHE)

    @property
    def path(self) -> Path | None:
        found = (try_to_load_from_cache(self.repository, file) for file in self.files)
        # Of a file that the hub is known not to have, the cache gives a mark that is no path.
        return next((Path(path) for path in found if isinstance(path, str)), None)

    @property
    def missing(self) -> str:
        return (
            f"{self.name} ({human_size(self.size)}) is not in {self.home}; it is {self.files[0]} of {self.repository} on "
            f"the Hugging Face Hub. To have it, run: {self.command}"
        )


@cache
def _float32_bytes(model: str) -> int:
    """Return the size of a whole open_clip model in float32, as its weights are published, without building it."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config["text_cfg"].get("hf_model_name"):
        return 0  # open_clip would ask the network for this half of it
    custom = config.pop("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device("meta"):  # shapes alone
        net = (open_clip.CoCa if "multimodal_cfg" in config else kind)(**config)
    return 4 * sum(weight.numel() for weight in net.parameters())


@dataclass(frozen=True)
class SpacyModel(Pretrained):
    """A model of spaCy is a Python package."""

    use: str = "named entities"
    size: int = 12_800_000  # of en_core_web_sm; larger models have other sizes

    @property
    def home(self) -> Path:
        return Path(sysconfig.get_path("purelib"))

    @property
    def path(self) -> Path | None:
        importlib.invalidate_caches()
        found = importlib.util.find_spec(self.name)
        return Path(found.origin).parent if found and found.origin else None


@dataclass(frozen=True)
class BundledClip(Pretrained):
    """A small CLIP comes with the code: its sizes, as open_clip takes them, and its weights."""

    size: int

    @property
    def home(self) -> Path:
        return BUNDLED / "joint_space"

    @property
    def sizes(self) -> Path:
        """The file of sizes, which is named after the model."""
        return self.home / f"{self.name.split('/')[0]}.json"

    @property
    def path(self) -> Path | None:
        file = self.home / f"{self.name.split('/')[1]}.safetensors"
        return file if file.is_file() else None

    @property
    def missing(self) -> str:
        return f"{self.name} comes with the code, but is not in {self.home}. Install or check out the code again."


MINI = BundledClip(
    "mini/flickr8k", "captions, the loss J and distances of pictures, with no download", 8_600_000
)
CLIP_B32 = OpenClip("ViT-B-32-quickgelu/openai", "captions, the loss J and CLIP score")
CLIP_L14 = OpenClip("ViT-L-14-336-quickgelu/openai", "CMMD")
ALEXNET = Checkpoint(
    "alexnet",
    "LPIPS, as a metric and in the loss",
    244_408_911,
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)
INCEPTION = Checkpoint(
    "inception",
    "FID",
    95_628_359,
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
EN_CORE_WEB_SM = SpacyModel("en_core_web_sm")

PRETRAINED: dict[str, Pretrained] = {
    network.name: network for network in (CLIP_B32, CLIP_L14, ALEXNET, INCEPTION, EN_CORE_WEB_SM)
}
"""What the profile "paper" uses, by name."""


def find_pretrained(name: str) -> Pretrained | None:
    """Return the network of this name: of `PRETRAINED`, of open_clip ("model/pretrained"), or of spaCy. Else None.

    Raises `SettingError` for a name of open_clip's form that open_clip does not know.
    """
    if name in PRETRAINED:
        return PRETRAINED[name]
    if "/" in name:
        import open_clip

        model, tag = name.split("/", 1)
        if not open_clip.get_pretrained_cfg(model, tag):
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
            known = f"{model} has {tags}" if tags else "open_clip.list_pretrained() lists what there is"
            raise SettingError(f"open_clip has no pretrained model {name!r}: {known}.")
        return OpenClip(name)
    return SpacyModel(name) if re.fullmatch(r"[a-z]{2,3}_\w+_(sm|md|lg|trf)", name) else None
