"""The networks that metrics look through: those whose weights are on this machine, and what the others would take."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from taco_nb import pretrained
from taco_nb.errors import SettingError
from taco_nb.metrics import clip_score, cmmd, fid, perception

TITLES = {"lpips": "LPIPS", "fid": "FID", "cmmd": "CMMD", "clip_score": "CLIP score"}
PROTOCOLS = {
    "lpips": perception.PROTOCOL,
    "fid": fid.PROTOCOL,
    "cmmd": cmmd.PROTOCOL,
    "clip_score": clip_score.PROTOCOL,
}
_NEEDS = {
    "lpips": pretrained.ALEXNET,
    "fid": pretrained.INCEPTION,
    "cmmd": pretrained.CLIP_L14,
    "clip_score": pretrained.CLIP_B32,
}


class Network(NamedTuple):
    """A feature network that is to be had: a name for its weights, the same as long as they are, and how it is loaded."""

    weights: str
    load: Callable[[torch.device], Any]


def find_networks() -> tuple[dict[str, Network], dict[str, str]]:
    """The networks whose weights are on this machine, by metric, and for each other metric the reason why it is not there.

    Nothing is downloaded: an evaluation may run where there is no network, and gigabytes are nobody's to spend unasked.
    """
    found, absent = {}, {}
    for metric, needed in _NEEDS.items():
        if needed.path is None:
            absent[metric] = (
                f"the weights of {needed.name} are not on this machine; to have them, run: {needed.command}"
            )
        else:
            found[metric] = Network(
                f"{needed.name}, {needed.path.stat().st_size:,} bytes", _loaders()[metric]
            )
    return found, absent


@cache
def say_missing(metric: str) -> None:
    """Print what is missing for a metric and how to get it, in one line, once in a process."""
    print(f"Without {TITLES[metric]}: {_NEEDS[metric].missing}")


@cache
def find_lpips() -> perception.Lpips | None:
    """LPIPS on the CPU where its weights are on this machine; else None, after one line that says what to do, once."""
    if _NEEDS["lpips"].path is None:
        return say_missing("lpips")
    return perception.Lpips()


def given_networks(networks: Mapping[str, Any]) -> tuple[dict[str, Network], dict[str, str]]:
    """As `find_networks`, of networks that the caller has: {"lpips": Lpips, "fid": Inception, ...}.

    Raises `SettingError` for a metric that does not exist.
    """
    if unknown := networks.keys() - TITLES.keys():
        raise SettingError(
            f"No metric is called {unknown.pop()!r}; those with a network are {', '.join(TITLES)}."
        )
    found = {
        metric: Network(
            f"given, SHA-256 {state_digest(network.model)}", lambda device, network=network: network
        )
        for metric, network in networks.items()
    }
    return found, {metric: "no network was given for it" for metric in TITLES if metric not in found}


def state_digest(model: nn.Module) -> str:
    """SHA-256 over the names and values of a module's weights; whole numbers are no weights, but tables and counts."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _loaders() -> dict[str, Callable[[torch.device], Any]]:
    from taco_nb.text.clip import clip_model

    return {
        "lpips": lambda device: perception.Lpips(device),
        "fid": lambda device: fid.Inception(_NEEDS["fid"].path, device),
        "cmmd": lambda device: cmmd.CmmdEmbedding(clip_model(_NEEDS["cmmd"].name, device)[0], device),
        "clip_score": lambda device: clip_score.ClipScore(
            *clip_model(_NEEDS["clip_score"].name, device), device
        ),
    }
