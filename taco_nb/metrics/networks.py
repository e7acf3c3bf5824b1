"""Metrics look through networks: here are those whose weights are on this machine, and what is missing for the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from taco_nb.errors import SettingError
from taco_nb.metrics import fid, perception
from taco_nb.metrics.joint_space import (
    CLIP_SCORE_PROTOCOL,
    CMMD_PROTOCOL,
    MINI_MMD_PROTOCOL,
    MINI_SCORE_PROTOCOL,
    ClipScore,
    CmmdEmbedding,
)
from taco_nb.metrics.perception import MINI_PROTOCOL, MiniDistance
from taco_nb.pretrained import ALEXNET, CLIP_B32, CLIP_L14, INCEPTION, MINI, Pretrained


class Metric(NamedTuple):
    """This says what a metric is called, how it is measured, and how the network that it looks through is loaded."""

    title: str
    protocol: str
    pretrained: Pretrained
    load: Callable[[torch.device], Any]


def _scoring(clip: Pretrained, device: torch.device) -> ClipScore:
    from taco_nb.text.clip import clip_model

    return ClipScore(*clip_model(clip.name, device), device)


def _seen_by(clip: Pretrained, kind: Callable, device: torch.device) -> CmmdEmbedding | MiniDistance:
    from taco_nb.text.clip import clip_model

    return kind(clip_model(clip.name, device)[0], device)


METRICS = {
    "lpips": Metric("LPIPS", perception.PROTOCOL, ALEXNET, perception.Lpips),
    "fid": Metric("FID", fid.PROTOCOL, INCEPTION, lambda device: fid.Inception(INCEPTION.path, device)),
    "cmmd": Metric("CMMD", CMMD_PROTOCOL, CLIP_L14, partial(_seen_by, CLIP_L14, CmmdEmbedding)),
    "clip_score": Metric("CLIP score", CLIP_SCORE_PROTOCOL, CLIP_B32, partial(_scoring, CLIP_B32)),
    "mini_distance": Metric("mini_distance", MINI_PROTOCOL, MINI, partial(_seen_by, MINI, MiniDistance)),
    "mini_mmd": Metric("mini_mmd", MINI_MMD_PROTOCOL, MINI, partial(_seen_by, MINI, CmmdEmbedding)),
    "mini_score": Metric("mini_score", MINI_SCORE_PROTOCOL, MINI, partial(_scoring, MINI)),
}
OF_SETS = ("fid", "cmmd", "mini_mmd")
"""The metrics that compare a set of pictures with another. Each picture gives features, and only a whole set a figure."""


class Network(NamedTuple):
    """A network that can be had has a name, which stays the same as long as its weights do, and a way to be loaded."""

    weights: str
    load: Callable[[torch.device], Any]


def find_networks() -> tuple[dict[str, Network], dict[str, str]]:
    """Return by metric the networks whose weights are on this machine, and for the others the reason why they are absent.

    Nothing is downloaded: an evaluation may run where there is no network, and should not fetch gigabytes unasked.
    """
    found, absent = {}, {}
    for name, metric in METRICS.items():
        needed = metric.pretrained
        if needed.path is None:
            absent[name] = f"{needed.name} is not on this machine; to have its weights, run: {needed.command}"
        else:
            found[name] = Network(f"{needed.name}, {needed.path.stat().st_size:,} bytes", metric.load)
    return found, absent


def given_networks(networks: Mapping[str, Any]) -> tuple[dict[str, Network], dict[str, str]]:
    """Return what `find_networks` does, for networks that the caller has: {"lpips": Lpips, "fid": Inception, ...}.

    Raises `SettingError` for a metric that does not exist.
    """
    if unknown := networks.keys() - METRICS.keys():
        known = ", ".join(METRICS)
        raise SettingError(f"No metric is called {unknown.pop()!r}; those with a network are {known}.")
    found = {
        name: Network(f"given, SHA-256 {state_digest(network.model)}", partial(placed, network))
        for name, network in networks.items()
    }
    return found, {name: "no network was given for it" for name in METRICS if name not in found}


def placed(network: Any, device: torch.device) -> Any:
    """Return a network of a metric on `device`: itself where it is there already, else a copy."""
    if network.device == device:
        return network
    moved = copy(network)
    moved.model, moved.device = deepcopy(network.model).to(device), device
    return moved


@cache  # so that a notebook says it once, and not in every cell
def say_missing(metrics: tuple[str, ...]) -> None:
    """Print in one line which metrics are left out for want of a network, and how to get those, once per process."""
    *others, last = [METRICS[metric].title for metric in metrics]
    titles = f"{', '.join(others)} and {last}" if others else last
    names = " ".join(dict.fromkeys(METRICS[metric].pretrained.name for metric in metrics))
    print(
        f"Without {titles}, whose networks are not on this machine. To have them, run: taco-nb fetch {names}"
    )


@cache
def perceptual_distance() -> perception.Lpips | perception.MiniDistance:
    """Return LPIPS on the CPU if its weights are on this machine, else the distance that the bundled CLIP gives."""
    name = "mini_distance" if METRICS["lpips"].pretrained.path is None else "lpips"
    return METRICS[name].load(torch.device("cpu"))


def state_digest(model: nn.Module) -> str:
    """Return a SHA-256 over the names and values of a module's weights.

    Whole numbers are left out: they are no weights, but tables and counts.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
