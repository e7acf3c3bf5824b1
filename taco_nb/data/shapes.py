"""The shapes are a small world in which a caption must matter, made from a seed, with no files.

A scene is a picture of 64x64 pixels: four textured shapes, one in each quarter, on a textured ground. Its caption names one
of them, sometimes two, and the loss weighs the pixels of what is named `NAMED_WEIGHT` times the others. The picture does not
say which shape that will be. So an encoder that reads its caption can spend its bits there, and one that does not cannot.

There are two kinds of scenes. In a *free* one the four shapes have four colours and four forms, so that a colour alone, or a
form alone, tells them apart. In a *crossed* one they are two colours in two forms: there is a red circle, a red square, a
blue circle and a blue square, and only both words together say which is meant.

All is computed in integers from Python's own random numbers, which are the same in all versions. So the pictures are the
same on every machine, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from taco_nb.errors import SettingError

SIDE = 64
NAMED_WEIGHT = 20
"""A pixel of a named shape counts so many times as much in the loss as any other."""
COLOURS = {
    "red": (200, 56, 52), "green": (56, 160, 72), "blue": (52, 88, 200),
    "yellow": (208, 188, 60), "purple": (148, 68, 172), "orange": (224, 136, 44),
}  # fmt: skip
FORMS = ("circle", "square", "triangle", "cross")
PLACES = ("at the top left", "at the top right", "at the bottom left", "at the bottom right")
SHORT = ("{}", "look at {}", "a picture of {}", "there is {} here", "this time we want to see {}")
LONG = (
    "This picture shows four shapes on a grey ground. There is {} and finally {}. "
    "Of all of these only one part matters to us, which is the {}."
)
"""A paragraph that lists all four shapes and says in its last words, beyond the 38th token, which one matters."""
BOTH = 1 / 4
"""The share of scenes whose caption names two shapes."""
SCENES = 8000
"""The scenes of one epoch of training. Every epoch has others."""
HELD_OUT = 1_000_000
"""Scenes with seeds below this are never trained on."""


class Scene(NamedTuple):
    """A scene is a picture (3, 64, 64) of bytes, four shapes' names, such as "red circle", and their masks (4, 64, 64)."""

    image: Tensor
    names: tuple[str, str, str, str]
    masks: Tensor


def scene(seed: int, crossed: bool | None = None) -> Scene:
    """Return the scene of a seed, a whole number. `crossed` asks for one of the two kinds; None leaves it to the seed."""
    rng = Random(seed)
    if crossed is None:
        crossed = rng.random() < 0.5
    colours, forms = _shuffled(rng, COLOURS), _shuffled(rng, FORMS)
    free = list(zip(colours, forms))
    kinds = [(colour, form) for colour in colours[:2] for form in forms[:2]] if crossed else free
    kinds = _shuffled(rng, kinds)
    grey = 96 + _below(rng, 64)
    image = (_texture(rng, SIDE, 14) + grey).expand(3, SIDE, SIDE).clone()
    masks = torch.zeros(len(PLACES), SIDE, SIDE, dtype=torch.bool)
    for place, (colour, form) in enumerate(kinds):
        side = 22 + _below(rng, 8)
        top = place // 2 * SIDE // 2 + _below(rng, SIDE // 2 - side + 1)
        left = place % 2 * SIDE // 2 + _below(rng, SIDE // 2 - side + 1)
        mask = _form(form, side)
        body = torch.tensor(COLOURS[colour])[:, None, None] + _texture(rng, side, 44)
        region = image[:, top : top + side, left : left + side]
        region.copy_(torch.where(mask, body, region))
        masks[place, top : top + side, left : left + side] = mask
    names = tuple(f"{colour} {form}" for colour, form in kinds)
    return Scene(image.clamp(0, 255).to(torch.uint8), names, masks)


def short_caption(names: Sequence[str], template: int = 0) -> str:
    """Return a few words that name some shapes, such as "look at the red circle and the blue square"."""
    return SHORT[template % len(SHORT)].format(_with_article(" and the ".join(names)))


def long_caption(shown: Scene, names: Sequence[str]) -> str:
    """Return a paragraph that lists all shapes of a scene with their places, and names the given ones in its last words."""
    *first, last = [f"{_with_article(name)} {place}" for name, place in zip(shown.names, PLACES)]
    return LONG.format(", ".join(first), last, " and the ".join(names))


class ShapesPairs(Dataset):
    """Training pairs of this world are (picture of bytes, caption, weight (1, 64, 64) of each pixel's squared error).

    Pair i of an epoch depends on (seed, epoch, i) alone, and no scene of a seed below `HELD_OUT` is among them. `captions`
    are the "published" ones, which are short, or paragraphs, "context". `dataset` tells what captions can say. Raises
    `SettingError` for another crop than 64.
    """

    def __init__(self, crop: int = SIDE, seed: int = 0, captions: str = "published"):
        if crop != SIDE:
            raise SettingError(f"The shapes are pictures of {SIDE}x{SIDE}: set crop={SIDE}, not {crop}.")
        self.seed, self.long, self.dataset = seed, captions == "context", Vocabulary()
        # In shared memory, so that data loaders' workers that outlive an epoch see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Go over to the scenes of this epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, i: int) -> tuple[Tensor, str, Tensor]:
        number = HELD_OUT + (1000 * self.seed + int(self._epoch)) * SCENES + range(SCENES)[i]
        shown, rng = scene(number), Random(-number)
        chosen = _shuffled(rng, range(4))[: 1 + (rng.random() < BOTH)]
        names = [shown.names[k] for k in chosen]
        caption = long_caption(shown, names) if self.long else short_caption(names, number)
        named = shown.masks[chosen].any(0, keepdim=True)
        return shown.image, caption, torch.where(named, 1.0, 1 / NAMED_WEIGHT)


class Vocabulary:
    """This tells all that short captions with one name can say, as a data set does: by `names` and `captions(i)`."""

    names = tuple(f"{colour} {form}" for colour in COLOURS for form in FORMS)

    def __len__(self) -> int:
        return len(self.names)

    def captions(self, i: int) -> tuple[str, ...]:
        """Return the captions that name the shape with number i, and no other."""
        return tuple(short_caption([self.names[i]], template) for template in range(len(SHORT)))


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _below(rng: Random, count: int) -> int:
    """Return a number from 0 to count - 1. Of Python's generators only `random()` is the same in all versions."""
    return int(rng.random() * count)


def _shuffled(rng: Random, items: Iterable) -> list:
    items = list(items)
    return [items.pop(_below(rng, len(items))) for _ in range(len(items))]


def _texture(rng: Random, side: int, height: int) -> Tensor:
    """Return the sum of two triangle waves in directions of their own, (side, side) integers between -height and height."""
    down, right = torch.arange(side)[:, None], torch.arange(side)
    total = torch.zeros(side, side, dtype=torch.int64)
    for _ in range(2):
        period, a, b = 20 + _below(rng, 12), 2 + _below(rng, 4), 2 + _below(rng, 4)
        a = -a if rng.random() < 0.5 else a
        phase = (a * down + b * right + _below(rng, period)) % period
        total += (2 * (2 * phase - period).abs() - period) * height // (2 * period)
    return total


def _form(form: str, side: int) -> Tensor:
    """Return a form's mask (side, side), from coordinates of pixel centres in half pixels."""
    y = 2 * torch.arange(side)[:, None] - side + 1
    x = 2 * torch.arange(side)[None, :] - side + 1
    if form == "circle":
        return x * x + y * y <= side * side
    if form == "square":
        return 8 * torch.maximum(x.abs(), y.abs()) <= 7 * side
    if form == "triangle":
        return 2 * x.abs() <= y + side
    return torch.minimum(x.abs(), y.abs()) * 3 <= side  # a cross, whose bars are a third of the side wide
