"""A look inside the encoder: what its three attentions did with one picture and one caption, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from taco_nb.codec import Codec, pad
from taco_nb.data.images import to_rgb, to_tensor
from taco_nb.experiment import Experiment
from taco_nb.model import TACO
from taco_nb.model.adapter import Extractor, Injector
from taco_nb.model.precision import full_float32


class Attention(NamedTuple):
    """One of the adapter's attentions as it ran."""

    name: str
    """"Injector 8", "Extractor 14" or "Injector 15": kind, and index in g_a."""
    weights: Tensor
    """(heads, queries, keys): of softmax attention its matrix, of Linformer's its counterpart; float32 on the CPU."""
    grid: tuple[int, int]
    """Height and width of the image positions, queries of an Injector and keys of an Extractor, padding included."""

    def over_image(self, token: int) -> Tensor:
        """How much each image position and the token with this number have to do with each other, (height, width).

        Mean over heads of what an Injector's positions take from the token, or an Extractor's token from the positions.
        """
        mean = self.weights.mean(0)
        return (mean[token] if self.name.startswith("Extractor") else mean[:, token]).reshape(self.grid)


@torch.inference_mode()
def attentions(codec: Codec, image: Any, caption: str) -> list[Attention]:
    """The three attentions of the encoder on an image (as `Codec.encode` takes it) and its caption, in order."""
    records: list[Attention] = []

    def note(name: str, layer: Injector | Extractor, inputs: tuple) -> None:
        x, text, *mask = inputs
        grid = tuple(x.shape[2:])
        keys = (1, text.shape[1]) if isinstance(layer, Injector) else grid
        mask = mask[0] if mask and isinstance(layer, Injector) else None
        weights = layer.cross_attn.weights(*layer.sequences(x, text), keys, mask)
        records.append(Attention(name, weights[0].float().cpu(), grid))

    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, i=i: note(f"{type(layer).__name__} {i}", layer, inputs)
        )
        for i, layer in enumerate(codec.net.g_a.analysis_transform)
        if isinstance(layer, (Injector, Extractor))
    ]
    try:
        codec.net.g_a(pad(to_tensor(to_rgb(image))[None].to(codec.device)), *codec.conditioning([caption]))
    finally:
        for hook in hooks:
            hook.remove()
    return records


@torch.inference_mode()
def text_contribution(codec: Codec, image: Any, caption: str) -> Tensor:
    """What the first Injector's attention adds to each image position, before gamma: (N, height, width), on the CPU."""
    added: list[Tensor] = []
    injector = codec.net.g_a.analysis_transform[8]
    hook = injector.cross_attn.register_forward_hook(lambda layer, inputs, output: added.append(output[0]))
    x = pad(to_tensor(to_rgb(image))[None].to(codec.device))
    try:
        codec.net.g_a(x, *codec.conditioning([caption]))
    finally:
        hook.remove()
    return added[0].T.unflatten(1, (x.shape[2] // 4, x.shape[3] // 4)).float().cpu()


@torch.inference_mode()
def bit_map(codec: Codec, image: Any, caption: str) -> Tensor:
    """Where the bits of a file go: those of each 16 x 16 pixels, (height / 16, width / 16), padding included.

    The sum over channels of -log2 of the likelihoods that the entropy coder works with, so that the map adds up to nearly
    the file's strings. A position of z, the side information, covers 64 x 64 pixels, and its bits are spread evenly.
    """
    x = pad(to_tensor(to_rgb(image))[None].to(codec.device))
    with full_float32(codec.device.type):
        likelihoods = codec.net(x, *codec.conditioning([caption]))["likelihoods"]
    y, z = (-likelihoods[name].log2().sum(dim=1)[0].float().cpu() for name in ("y", "z"))
    return y + z.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16


def energy(weights: Tensor) -> Tensor:
    """Which share of a matrix's energy its first r singular values hold, r = 1, 2, ...: (min(queries, keys),).

    The energy is the sum of the squared singular values; of several heads, (heads, queries, keys), the mean share.
    Linformer's claim is that few values hold nearly all.
    """
    squares = torch.linalg.svdvals(weights).square()
    return (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).reshape(-1, squares.shape[-1]).mean(0)


def attention_flops(queries: int, keys: int, dim: int, k: int | None = None) -> int:
    """Floating-point operations of the attention itself, without the linear layers around it, which both kinds share.

    Softmax attention multiplies queries by keys and weights by values, 2 * 2 * n * m * dim. Linformer (`k` given) first
    projects keys and values, 2 * 2 * k * m * dim, and then has k of them: 2 * 2 * n * k * dim.
    """
    return 4 * queries * keys * dim if k is None else 4 * k * keys * dim + 4 * queries * k * dim


def count_flops(run: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations of a computation as PyTorch counts them, per module and, as "Global", together."""
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the other kernels are not counted
        run()
    return {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}


@torch.inference_mode()
def encoder_flops(exp: Experiment, side: int = 256) -> dict[str, float]:
    """Operations of an experiment's encoder on one picture, as PyTorch counts them, and the share of its attentions.

    In 10^9; of "attention" those of the three attentions with their linear layers, of "encoder" all of g_a. The network
    has random weights, on which no count depends.
    """
    net = TACO(exp.model_config()).eval()
    pair = torch.zeros(1, 3, side, side), torch.zeros(1, exp.text_tokens, net.config.text_dim)
    counts = count_flops(lambda: net.g_a(*pair))
    attention = sum(flops for name, flops in counts.items() if name.endswith(".cross_attn"))
    encoder = counts["Global"]
    return {
        "attention, GFLOP": attention / 1e9,
        "encoder, GFLOP": encoder / 1e9,
        "share": attention / encoder,
    }


def cost_table(sides: Sequence[int], tokens: Sequence[int], dim: int, k: int) -> list[dict[str, Any]]:
    """FLOPs of the first Injector, softmax against Linformer, for image sides in pixels and numbers of tokens."""
    rows = []
    for side in sides:
        for count in tokens:
            queries = (side // 4) ** 2
            softmax, linformer = attention_flops(queries, count, dim), attention_flops(queries, count, dim, k)
            rows.append(
                {
                    "image": f"{side} x {side}",
                    "queries": queries,
                    "tokens": count,
                    "softmax, MFLOP": softmax / 1e6,
                    f"Linformer k={k}, MFLOP": linformer / 1e6,
                    "Linformer / softmax": linformer / softmax,
                }
            )
    return rows
