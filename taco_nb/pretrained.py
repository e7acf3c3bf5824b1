"""The pretrained networks that are downloads: what each is for, where this machine keeps it, and how to get it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taco_nb.errors import DownloadError, MissingWeightsError
from taco_nb.tools.download import PROGRAM, Remote, download, shown


@dataclass(frozen=True)
class Pretrained(ABC):
    """A pretrained network: the `name` that it is fetched by, what `use` a run has for it, and its `size` in bytes.

    The size is exact for a single file (`Checkpoint`), and about what is fetched for the others.
    """

    name: str
    use: str
    size: int

    @property
    def command(self) -> str:
        """What to type, on a machine with a network, to have it."""
        return f"{PROGRAM} fetch {self.name}"

    @property
    @abstractmethod
    def home(self) -> Path:
        """The folder in which this machine keeps it, or would."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """The file or folder that is there, whole; else None."""

    @property
    def missing(self) -> str:
        """One line for where it is not there: what, where it was looked for, and how to get it."""
        return f"{self.name} ({shown(self.size)}) is not in {self.home}. To have it, run: {self.command}"

    @abstractmethod
    def fetch(self) -> Path:
        """The file or folder, fetched unless it is there. Raises `MissingWeightsError` where that fails."""


@dataclass(frozen=True)
class Checkpoint(Pretrained):
    """A file in torch.hub's cache, where torchvision and torch-fidelity look for it."""

    url: str
    sha256: str

    @property
    def home(self) -> Path:
        import torch

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
        return f"{self._state}. To have it, run: {self.command}"

    @property
    def _state(self) -> str:
        half = self.file.is_file() and f"has {self.file.stat().st_size:,} bytes and cannot be whole"
        return f"{self.file} ({self.size:,} bytes) {half or 'is not there'}"

    def fetch(self) -> Path:
        if self.path is None:
            try:
                download(Remote(self.url, self.size, f"sha256:{self.sha256}"), self.file)
            except DownloadError as error:
                raise MissingWeightsError(
                    f"{self._state}. {error} With a network, run: {self.command} (or copy the file there from a machine "
                    "that has it)."
                ) from error
        return self.file


@dataclass(frozen=True)
class Clip(Pretrained):
    """A CLIP model of open_clip, "model/pretrained", in Hugging Face's cache."""

    @property
    def home(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    @property
    def path(self) -> Path | None:
        import open_clip

        found = cached_weights(open_clip.get_pretrained_cfg(*self.name.split("/")))
        return Path(found) if found else None

    def fetch(self) -> Path:
        import open_clip

        tag = open_clip.get_pretrained_cfg(*self.name.split("/"))
        return Path(
            weights_file(tag, f"CLIP model {self.name}", lambda: round(self.size / 1e6), self.command)
        )


@dataclass(frozen=True)
class SpacyModel(Pretrained):
    """A model of spaCy, which is a Python package."""

    @property
    def home(self) -> Path:
        import sysconfig

        return Path(sysconfig.get_path("purelib"))

    @property
    def path(self) -> Path | None:
        importlib.invalidate_caches()
        found = importlib.util.find_spec(self.name)
        return Path(found.origin).parent if found and found.origin else None

    def fetch(self) -> Path:
        if self.path is None:
            command = [sys.executable, "-m", "spacy", "download", self.name]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode or self.path is None:
                reason = (
                    (done.stdout.strip() or f"spaCy ended with {done.returncode}")
                    .splitlines()[-1]
                    .rstrip(".")
                )
                raise MissingWeightsError(
                    f"The spaCy model {self.name} could not be installed ({reason}). With a network, run: {self.command}"
                )
        return self.path


def cached_weights(tag: dict[str, Any]) -> str | None:
    """The file of one of open_clip's pretrained tags in the Hugging Face cache, or None."""
    import huggingface_hub

    repository, files = _hub_files(tag)
    for file in files:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return cached
    return None


def weights_file(tag: dict[str, Any], what: str, megabytes: Callable[[], int], command: str) -> str:
    """The file of a pretrained tag, from the Hugging Face cache or through open_clip's own download.

    `what` the weights are of, their size and the `command` that fetches them are for the `MissingWeightsError` that is
    raised where they are neither here nor to be fetched.
    """
    import huggingface_hub
    import open_clip

    if cached := cached_weights(tag):
        return cached
    repository, files = _hub_files(tag)
    try:
        huggingface_hub.file_exists(
            repository, files[0]
        )  # fails at once, where the download retries for a minute
        return open_clip.download_pretrained(tag)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise MissingWeightsError(
            f"The weights of the {what} are not on this machine and could not be fetched ({reason}): "
            f"{files[0]} of {repository} on the Hugging Face Hub, {megabytes():,} MB in float32, which this "
            f"command fetches once there is a connection: {command}"
        ) from None


def _hub_files(tag: dict[str, Any]) -> tuple[str, list[str]]:
    """The repository of a pretrained tag, and the names that its file may have there, the best first."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, file = os.path.split(tag["hf_hub"])
    return repository, (
        [str(Path(file).with_suffix(".safetensors")), file]
        if file
        else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    )


CLIP_B32 = Clip("ViT-B-32-quickgelu/openai", "captions, the loss J and CLIP score", 605_100_000)
CLIP_L14 = Clip("ViT-L-14-336-quickgelu/openai", "CMMD", 1_711_800_000)
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
EN_CORE_WEB_SM = SpacyModel("en_core_web_sm", "named entities", 12_800_000)

PRETRAINED: dict[str, Pretrained] = {
    network.name: network for network in (CLIP_B32, CLIP_L14, ALEXNET, INCEPTION, EN_CORE_WEB_SM)
}
"""What the profile "paper" uses, by name."""
