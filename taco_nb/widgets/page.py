"""Pieces of HTML that bring their style, script and pictures with them: no kernel, no network, no second file."""

from __future__ import annotations

import base64
import html
import io
import uuid
from pathlib import Path

from PIL import Image

_FOLDER = Path(__file__).parent
_WEBP_SIDE = (1 << 14) - 1


def source(name: str) -> Path:
    """A script or style sheet that lies beside the widgets."""
    return _FOLDER / name


def self_contained(name: str, body: str) -> str:
    """`body` in an element of the class `taco-<name>`, with <name>.css, and <name>.js to bring it to life.

    The script is the very module that the live widget runs; it exports `enhance`, which takes the element. Where no
    script runs, `body` is what is seen.
    """
    key = f"{name}-{uuid.uuid4().hex[:8]}"
    style, script = (source(f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<div class="taco-{name}" id="{key}">{body}</div><style>{style}</style>'
        f'<script type="module">{script}\nenhance(document.getElementById("{key}"));</script>'
    )


def data_url(picture: Image.Image) -> str:
    """The picture as lossless WebP in a data URL: every pixel as it is, a fifth smaller than PNG and sooner made.

    PNG where a side is longer than the 16383 pixels that WebP can have.
    """
    file = io.BytesIO()
    kind, settings = (
        ("webp", {"lossless": True, "method": 0}) if max(picture.size) <= _WEBP_SIDE else ("png", {})
    )
    picture.save(file, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def img(picture: Image.Image, alt: str) -> str:
    """An <img> that holds its picture."""
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img {size} alt="{html.escape(alt, quote=True)}" src="{data_url(picture)}">'
