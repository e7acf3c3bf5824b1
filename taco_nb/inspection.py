"""This module looks inside the encoder: at what its three attentions did with a picture and a caption, and what they cost."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from taco_nb.codec import Codec, pad
from taco_nb.data.images import to_image, to_rgb, to_tensor
from taco_nb.experiment import Experiment
from taco_nb.model import TACO
from taco_nb.model.adapter import Extractor, Injector
from taco_nb.model.entropy import Step
from taco_nb.model.precision import full_float32


class Attention(NamedTuple):
    """This is one of the adapter's attentions as it ran on one picture and one caption."""

    name: str
    """"Injector 8", "Extractor 14" or "Injector 15": the kind of layer, and its index in g_a."""
    weights: Tensor
    """The matrix of softmax attention, or Linformer's counterpart of it: (heads, queries, keys), float32, on the CPU."""
    grid: tuple[int, int]
    """Height and width of the image positions, padding included: an Injector's queries, or an Extractor's keys."""

    def over_image(self, token: int) -> Tensor:
        """Return how strongly each image position and the token of this number attend to each other, (height, width).

        In an Injector the positions look at the token, and in an Extractor the token looks at the positions; the result is
        the mean over the heads.
        """
        mean = self.weights.mean(0)
        return (mean[token] if self.name.startswith("Extractor") else mean[:, token]).reshape(self.grid)


def _encoder_inputs(codec: Codec, image: Any, caption: str) -> tuple[Tensor, ...]:
    """Return what g_a reads of an image, padded, and its caption."""
    return pad(to_tensor(to_rgb(image))[None].to(codec.device)), *codec.conditioning([caption])


def _latents(codec: Codec, image: Any, caption: str) -> Tensor:
    """Return the latents y that the encoder makes of an image and its caption."""
    with full_float32(codec.device.type):
        return codec.net.g_a(*_encoder_inputs(codec, image, caption))


@torch.inference_mode()
def look_at_attention(codec: Codec, image: Any, caption: str) -> list[Attention]:
    """Return the encoder's three attentions on an image (as `Codec.encode` takes it) and its caption, in order."""
    records: list[Attention] = []

    def note(name: str, layer: Injector | Extractor, inputs: tuple) -> None:
        x, text, *mask = inputs  # an Extractor has no mask
        grid = tuple(x.shape[2:])
        keys = (1, text.shape[1]) if isinstance(layer, Injector) else grid
        mask = mask[0] if mask else None
        # The attention itself never forms its matrix, which would take too much memory; we do, from the same inputs.
        weights = layer.cross_attn.weights(*layer.sequences(x, text), keys, mask)
        records.append(Attention(name, weights[0].float().cpu(), grid))

    with ExitStack() as hooks:
        for i, layer in enumerate(codec.net.g_a.analysis_transform):
            if isinstance(layer, (Injector, Extractor)):
                hook = partial(note, f"{type(layer).__name__} {i}")
                hooks.enter_context(layer.register_forward_pre_hook(hook))
        _latents(codec, image, caption)
    return records


@torch.inference_mode()
def text_contribution(codec: Codec, image: Any, caption: str) -> Tensor:
    """Return what the first Injector's attention adds to each image position, before gamma: (N, H/4, W/4), on the CPU.

    H and W are the image's height and width in pixels, padding included.
    """
    added: list[Tensor] = []
    injector = codec.net.g_a.analysis_transform[8]
    with injector.cross_attn.register_forward_hook(lambda layer, inputs, output: added.append(output[0])):
        height, width = _latents(codec, image, caption).shape[2:]  # a sixteenth of the image's
    return added[0].T.unflatten(1, (4 * height, 4 * width)).float().cpu()


@torch.inference_mode()
def bit_map(codec: Codec, image: Any, caption: str) -> Tensor:
    """Return how many bits of the file each block of 16 x 16 pixels takes: (H/16, W/16), padding included, on the CPU.

    A block's bits are -log2 of the likelihoods that the entropy coder works with, summed over the channels of y, so that
    the map adds up to nearly the size of the file's strings. A position of z, the side information, covers 64 x 64 pixels,
    and its bits are spread evenly over them.
    """
    with full_float32(codec.device.type):
        likelihoods = codec.net(*_encoder_inputs(codec, image, caption))["likelihoods"]
    y, z = (-likelihoods[name].log2().sum(dim=1)[0].float().cpu() for name in ("y", "z"))
    return y + z.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16


class DecodingStep(NamedTuple):
    """This is a part of a `.taco` file, as a decoder reads them: z first, then y, half group by half group."""

    name: str
    bits: Tensor
    """The bits of each latent of this part, -log2 of its probability: (c, h, w/2), or (N, h/4, w/4) of z."""
    picture: Image.Image
    """The picture that g_s makes of all that is known by now; what is to come stands at the means of its Gaussians."""
    symbols: Tensor
    """The integers of this part, of the same shape as `bits`."""
    means: Tensor | None = None
    scales: Tensor | None = None
    """The Gaussians that the decoder expects them under; None for z, whose distributions are no Gaussians."""
    anchors: bool = True
    """True for the half of the checkerboard that is coded first."""


@torch.inference_mode()
def decoding_steps(codec: Codec, image: Any, caption: str) -> list[DecodingStep]:
    """Return the parts of an image's file, and what is seen of the image after each: z, then ten half groups of y."""
    net, coder = codec.net, codec.net.integer_model()
    width, height = to_rgb(image).size
    y = _latents(codec, image, caption)
    with full_float32(codec.device.type):
        z = net.h_a(y)
    coded = coder.quantize(y, z)
    z_symbols = coded.z.reshape(z.shape)
    z_hat = z_symbols + coder.medians()
    hyper = coder.h_s(z_hat)

    def seen(known: int) -> tuple[list[tuple[Step, Tensor, Tensor]], Image.Image]:
        """Decode the first `known` half groups, and guess the others."""
        visited: list[tuple[Step, Tensor, Tensor]] = []

        def visit(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            visited.append((step, scales, means))
            i = len(visited) - 1
            return coded.y[i].reshape(means.shape) + means if i < known else means

        y_hat = coder.walk(hyper, visit)
        with full_float32(codec.device.type):
            x_hat = net.g_s(y_hat)[0, :, :height, :width]
        return visited, to_image(x_hat)

    z_bits = -net.likelihoods_of_z(z_hat).log2()
    steps = [DecodingStep("z", z_bits[0].cpu(), seen(0)[1], z_symbols[0].cpu())]
    for known in range(1, len(coded.y) + 1):
        visited, picture = seen(known)
        step, scales, means = visited[known - 1]
        symbols = coded.y[known - 1].reshape(means.shape)
        bits = -net.likelihoods_of_y(symbols + means, scales, means).log2()
        name = f"channels {step.channels.start + 1} to {step.channels.stop}, {'anchors' if step.anchor else 'others'}"
        parts = (part[0].float().cpu() for part in (symbols, means, scales))
        steps.append(DecodingStep(name, bits[0].cpu(), picture, *parts, step.anchor))
    return steps


@torch.inference_mode()
def integer_cost(codec: Codec, image: Any, caption: str) -> dict[str, float]:
    """Return the bytes of an image's latents as the network in floating point codes them and as a `.taco` file has them.

    Keys: "bytes, floating point", "bytes, integers" and "difference, %". Neither counts a header.
    """
    coders = codec.net, codec.net.integer_model()
    with full_float32(codec.device.type):
        y = _latents(codec, image, caption)
        z = codec.net.h_a(y)
    plain, exact = (sum(map(len, coder.encode_latents(y, z)[:2])) for coder in coders)
    return {
        "bytes, floating point": plain,
        "bytes, integers": exact,
        "difference, %": 100 * (exact / plain - 1),
    }


def without_text(codec: Codec) -> Codec:
    """Return a copy of a codec whose two Injectors have a gamma of zero: its encoder reads no text."""
    silent = copy.copy(codec)
    silent.net = copy.deepcopy(codec.net)
    for layer in silent.net.g_a.analysis_transform:
        if isinstance(layer, Injector):
            torch.nn.init.zeros_(layer.gamma)
    silent.name = f"{codec.name} without text"
    return silent


def energy(weights: Tensor) -> Tensor:
    """Return the share of a matrix's energy that its first r singular values hold, r = 1, 2, …: (min(queries, keys),).

    The energy is the sum of the squared singular values. For several heads, (heads, queries, keys), it is the mean share.
    Linformer rests on the claim that a few singular values hold nearly all (Wang et al. 2020, Section 3).
    """
    squares = torch.linalg.svdvals(weights).square()
    return (squares.cumsum(-1) / squares.sum(-1, keepdim=True)).reshape(-1, squares.shape[-1]).mean(0)


def attention_flops(queries: int, keys: int, dim: int, k: int | None = None) -> int:
    """Return the floating-point operations of attention proper, without the linear layers that both kinds have around it.

    Softmax attention multiplies queries by keys and weights by values: 2 * 2 * n * m * dim operations for n queries and m
    keys. Linformer, if `k` is given, first projects keys and values to k of them, 2 * 2 * k * m * dim, and attends to
    these, 2 * 2 * n * k * dim.
    """
    return 4 * queries * keys * dim if k is None else 4 * k * keys * dim + 4 * queries * k * dim


def count_flops(run: Callable[[], Any]) -> dict[str, int]:
    """Return the floating-point operations of a computation, counted by PyTorch: of each module, and of all as "Global"."""
    # PyTorch does not count every kernel that computes attention; plain matrix products it always does.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}


def training_flops(exp: Experiment) -> int:
    """Return the operations of a training step on one crop, as nanoGPT counts them: the network forward, and twice back.

    The frozen networks of text and loss do not count. They are counted on shapes alone, which takes no memory.
    """
    with FakeTensorMode():
        net = TACO(exp.model_config())
        x = torch.empty(1, 3, exp.crop, exp.crop), torch.empty(1, exp.text_tokens, net.config.text_dim)
        return 3 * count_flops(lambda: net(*x))["Global"]


@torch.inference_mode()
def encoder_flops(exp: Experiment, side: int = 256) -> dict[str, float]:
    """Return the 10^9 operations of an experiment's encoder on one picture, and what share its three attentions have.

    The attentions are counted with their linear layers, the encoder is all of g_a. The network has random weights, since
    no count depends on them.
    """
    net = TACO(exp.model_config()).eval()
    pair = torch.zeros(1, 3, side, side), torch.zeros(1, exp.text_tokens, net.config.text_dim)
    counts = count_flops(lambda: net.g_a(*pair))
    attention = sum(flops for name, flops in counts.items() if name.endswith(".cross_attn"))
    total = counts["Global"]
    return {"attention, GFLOP": attention / 1e9, "encoder, GFLOP": total / 1e9, "share": attention / total}


def cost_table(sides: Sequence[int], tokens: Sequence[int], dim: int, k: int) -> list[dict[str, Any]]:
    """Return the first Injector's operations, softmax beside Linformer, for image sides in pixels and numbers of tokens."""
    rows = []
    for side, count in itertools.product(sides, tokens):
        queries = (side // 4) ** 2
        softmax, linformer = attention_flops(queries, count, dim), attention_flops(queries, count, dim, k)
        row = {"image": f"{side} x {side}", "queries": queries, "tokens": count}
        row |= {"softmax, MFLOP": softmax / 1e6, f"Linformer k={k}, MFLOP": linformer / 1e6}
        rows.append({**row, "Linformer / softmax": linformer / softmax})
    return rows
