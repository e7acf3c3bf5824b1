"""The same scene of shapes under several captions, side by side: the shape that is named keeps its texture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
from PIL import Image

from taco_nb.codec import Codec
from taco_nb.control import shape_psnr
from taco_nb.data.images import to_image
from taco_nb.data.shapes import PLACES, SIDE, Scene, scene, short_caption
from taco_nb.inspection import bit_map
from taco_nb.widgets.html_parts import picture_tag
from taco_nb.widgets.pictures import heat, side_by_side

ZOOM = 4
"""A scene is shown so many times larger, without smoothing."""
LARGEST_ERROR = 48
"""The error in steps of 8 bits that is shown in the brightest colour."""


def under_captions(codec: Codec, shown: Scene, captions: Sequence[str]) -> Image.Image:
    """Return a picture with a row for each caption: what the decoder shows, where it is wrong, and where the bits went.

    The first column is the original. Every picture comes from a real file, whose size stands below it together with the
    PSNR of each shape. Maps of all rows share one scale, so that rows can be compared.
    """
    image = to_image(shown.image / 255)
    files = [codec.encode(image, caption) for caption in captions]
    decoded = codec.decode_batch(files)
    bits = [bit_map(codec, image, caption) for caption in captions]
    most = max(float(of_caption.max()) for of_caption in bits)
    pictures: list[tuple[str, Image.Image]] = []
    for caption, data, x_hat, of_caption in zip(captions, files, decoded, bits):
        quality = [f"{name} {shape_psnr(shown, k, x_hat):.1f}" for k, name in enumerate(shown.names)]
        said = f'"{caption}"' if caption else "no caption"
        error = (x_hat.clamp(0, 1) - shown.image / 255).abs().mean(0) * 255 / LARGEST_ERROR
        blocks = (of_caption / most).repeat_interleave(16, 0).repeat_interleave(16, 1)
        pictures += [
            (f"the original, to be encoded under {said}", image),
            (f"decoded: {len(data)} bytes. PSNR in dB: {', '.join(quality)}", to_image(x_hat)),
            (f"error: dark is none, bright {LARGEST_ERROR} of 255 or more", heat(error.clamp(max=1))),
            (f"bits of each 16x16 block, {most:.0f} in the brightest", heat(blocks[:SIDE, :SIDE])),
        ]
    return side_by_side(pictures, zoom=ZOOM, columns=4)


class WordPicker(ipywidgets.VBox):
    """The widget of `pick_the_word`. Without a kernel it is the picture of two captions."""

    def __init__(self, codec: Codec, seed: int, crossed: bool):
        self._codec = codec
        self.seed = ipywidgets.IntSlider(seed, 0, 200, description="scene", continuous_update=False)
        self.crossed = ipywidgets.Checkbox(crossed, description="two colours in two forms")
        self.shape = ipywidgets.ToggleButtons(options=PLACES, description="name the one")
        self.text = ipywidgets.Text(description="caption", continuous_update=False)
        self.text.layout = {"width": "auto", "max_width": "600px"}
        self.picture = ipywidgets.HTML()
        first = scene(seed, crossed)
        pair = under_captions(codec, first, [short_caption([first.names[k]]) for k in (0, 3)])
        self._static = picture_tag(pair, "a scene under two captions, and the bits that follow the words")
        for control in (self.seed, self.crossed, self.shape):
            control.observe(self._choose, "value")
        self.text.observe(self._show, "value")
        self._choose()
        super().__init__([ipywidgets.HBox([self.seed, self.crossed]), self.shape, self.text, self.picture])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {**super()._repr_mimebundle_(**kwargs), "text/html": self._static}

    @property
    def scene(self) -> Scene:
        return scene(self.seed.value, self.crossed.value)

    def _choose(self, _: Any = None) -> None:
        """Name the shape that was chosen; the caption's box then shows it."""
        caption = short_caption([self.scene.names[PLACES.index(self.shape.value)]])
        if self.text.value == caption:
            self._show()
        self.text.value = caption

    def _show(self, _: Any = None) -> None:
        picture = under_captions(self._codec, self.scene, [self.text.value])
        self.picture.value = picture_tag(picture, f"a scene under the caption {self.text.value}")


def pick_the_word(codec: Codec, seed: int = 0, crossed: bool = False) -> WordPicker:
    """Show a scene of shapes of which the reader names one, or writes a caption: the codec encodes it again.

    Without a kernel the scene is shown under two captions, one below the other.
    """
    return WordPicker(codec, seed, crossed)
