"""The encoder is drawn from the network itself: every box is a layer that ran, with the shape that came out of it."""

from __future__ import annotations

import html
from typing import Any

import torch
from IPython.display import SVG

from taco_nb.errors import SettingError
from taco_nb.model import TACO
from taco_nb.model.adapter import Extractor, Injector
from taco_nb.model.attention import LinformerAttention
from taco_nb.model.layers import ResidualBottleneck

_WIDTH, _HEIGHT, _STEP, _ROW, _COLUMNS = 118, 60, 146, 130, 7
"""Width and height of a box, the distances from one to the next across and down, and the boxes in a row."""
_COLOURS = {
    "conv": "#cfe3f5",
    "residual": "#e9eef3",
    "attention": "#e2d9f3",
    "Injector": "#fbd9b5",
    "Extractor": "#c9ead8",
}
_TEXT_COLOUR = "#b04a00"


def encoder_diagram(net: TACO, side: int = 256, tokens: int = 38) -> SVG:
    """Draw g_a as an SVG, left to right and row by row, with arrows of text into the adapter's layers.

    The network is run once on an empty image of `side` x `side` pixels and a caption of `tokens` tokens. The boxes say what
    came out (channels, height and width), the number of parameters, and how many positions attended to how many. Raises
    `SettingError` for a side or a number of tokens under 1.
    """
    if min(side, tokens) < 1:
        raise SettingError(f"side and tokens must be at least 1, but are {side} and {tokens}.")
    return SVG(_svg(_layers(net, side, tokens)))


@torch.inference_mode()
def _layers(net: TACO, side: int, tokens: int) -> list[dict[str, Any]]:
    """Run g_a, and return the kind, output and parameters of each of its layers. Residual blocks in a row count as one."""
    layers: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        if isinstance(module, ResidualBottleneck) and layers and layers[-1]["kind"] == "residual":
            layers[-1]["parameters"] += parameters
            layers[-1]["count"] += 1
            return
        layer = {
            "kind": _kind(module),
            "parameters": parameters,
            "count": 1,
            "shape": tuple(output.shape[1:]),
        }
        if isinstance(module, (Injector, Extractor)):
            pixels = inputs[0].shape[2] * inputs[0].shape[3]
            queries, keys = (pixels, tokens) if isinstance(module, Injector) else (tokens, pixels)
            linear = isinstance(module.cross_attn, LinformerAttention)
            seen = f"{keys}, by way of {net.config.linformer_k}" if linear else f"{keys} attention"
            layer["attention"] = f"{queries} x {seen}"
        layers.append(layer)

    hooks = [layer.register_forward_hook(note) for layer in net.g_a.analysis_transform]
    device = net.medians().device
    image = torch.zeros(1, 3, side, side, device=device)
    text = torch.zeros(1, tokens, net.config.text_dim, device=device)
    try:
        net.g_a(image, text)
    finally:
        for hook in hooks:
            hook.remove()
    return [{"kind": "image", "parameters": 0, "count": 1, "shape": (3, side, side)}, *layers]


def _kind(module: torch.nn.Module) -> str:
    if isinstance(module, (Injector, Extractor)):
        return type(module).__name__
    if isinstance(module, torch.nn.Conv2d):
        return "conv"
    return "residual" if isinstance(module, ResidualBottleneck) else "attention"


def _svg(layers: list[dict[str, Any]]) -> str:
    parts, renewed = [], False
    for i, layer in enumerate(layers):
        x, y, kind = 20 + i % _COLUMNS * _STEP, 60 + i // _COLUMNS * _ROW, layer["kind"]
        middle = x + _WIDTH / 2
        count = f"{layer['count']} x " if layer["count"] > 1 else ""
        lines = [count + kind, " x ".join(map(str, layer["shape"]))]
        if layer["parameters"]:
            lines.append(f"{layer['parameters']:,} parameters")
        colour = _COLOURS.get(kind, "#ffffff")
        parts.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{colour}" stroke="#456"/>'
        )
        for j, line in enumerate(lines):
            weight = ' font-weight="bold"' if j == 0 else ""
            parts.append(f'<text x="{middle}" y="{y + 18 + 16 * j}"{weight}>{html.escape(line)}</text>')
        if i % _COLUMNS < _COLUMNS - 1 and i + 1 < len(layers):
            parts.append(_arrow(x + _WIDTH, y + 30, x + _STEP - 3, y + 30))
        if "attention" in layer:
            # Injectors read the text, and the Extractor gives a new one, which those behind it read.
            outwards = kind == "Extractor"
            start, end = (y - 4, y - 30) if outwards else (y - 30, y - 4)
            renewed = renewed or outwards
            parts += [
                _arrow(middle, start, middle, end, _TEXT_COLOUR),
                f'<text x="{middle}" y="{y - 35}" fill="{_TEXT_COLOUR}">{"new text" if renewed else "text"}</text>',
                f'<text x="{middle}" y="{y + 76}" fill="#555">{layer["attention"]}</text>',
            ]
    size = f"0 0 {_COLUMNS * _STEP + 10} {-(-len(layers) // _COLUMNS) * _ROW + 30}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" width="100%" font-family="sans-serif" font-size="11" '
        'text-anchor="middle" role="img" aria-label="The layers of the encoder g_a, with the text adapter">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#456"/></marker></defs><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts)
        + "</svg>"
    )


def _arrow(x1: float, y1: float, x2: float, y2: float, colour: str = "#456") -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>'
