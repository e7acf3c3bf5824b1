"""The reader's own picture goes through the codec, and the file can be kept."""

from __future__ import annotations

import base64
import html
import tempfile
from pathlib import Path
from typing import Any

import ipywidgets
from PIL import Image

from taco_nb.codec import Codec
from taco_nb.data.images import to_rgb
from taco_nb.errors import DataError, TacoError
from taco_nb.widgets.compare import CompareView, compare

_STATIC = "<p>Run this notebook in JupyterLab to put a picture and a caption of your own through the codec here.</p>"
_LIMIT = (
    "<small>A file of more than 10 MB, Jupyter's limit for a message unless it is set otherwise, does not arrive: put it "
    "beside the notebook and give its path to <code>codec.encode</code>.</small>"
)


class UploadBox(ipywidgets.VBox):
    """The widget of `upload_box`. Without a kernel it is a sentence that says what it needs."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="Picture")
        hint = "what is in the picture, or nothing"
        self.caption = ipywidgets.Text(description="caption", placeholder=hint)
        self.caption.layout = {"width": "100%", "max_width": "600px"}
        self.button = ipywidgets.Button(description="Encode", button_style="primary")
        self.said, self.link, self.view = ipywidgets.HTML(), ipywidgets.HTML(), CompareView()
        self.button.on_click(self._encode)
        row = ipywidgets.HBox([self.upload, self.caption, self.button], layout={"flex_flow": "row wrap"})
        super().__init__([row, ipywidgets.HTML(_LIMIT), self.said, self.link, self.view])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        return {**super()._repr_mimebundle_(**kwargs), "text/html": _STATIC}

    def _encode(self, _: ipywidgets.Button) -> None:
        self.link.value = self.view.figures = ""
        if not self.upload.value:
            self.said.value = "Choose a picture first."
            return
        (chosen,) = self.upload.value
        name = Path(chosen["name"]).name or "picture"
        self.said.value = f"Encoding {html.escape(name)} …"
        said = "This failed, for a reason that is in Jupyter's log."  # unless a line below replaces it
        try:
            image = _picture(chosen["content"], name)
            file = self._codec.encode(image, self.caption.value)
            picture = self._codec.decode(file)
            shown = compare(image, {self._codec.name: (picture, file)}, caption=self.caption.value)
            self.view.figures = shown.figures()
            self.link.value = _link(file, f"{Path(name).stem}.taco")
            size = f"{picture.width} x {picture.height} pixels"
            said = f"{html.escape(name)}: {chosen['size']:,} bytes became {len(file):,}, which hold {size}."
        except TacoError as error:
            said = html.escape(str(error))
        finally:
            self.said.value = said


def _link(file: bytes, name: str) -> str:
    """Return an <a> that holds a file, to be saved under a name."""
    kept = html.escape(name)
    data = base64.b64encode(file).decode()
    return f'<a download="{kept}" href="data:application/octet-stream;base64,{data}">Download {kept}</a>'


def _picture(content: memoryview, name: str) -> Image.Image:
    """Return the picture in an uploaded file. Raises `DataError`, which calls the file by the reader's name for it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture")  # the reader's name may be longer than a file's can be here
        path.write_bytes(content)
        try:
            return to_rgb(path)
        except DataError as error:
            raise DataError(str(error).replace(str(path), name)) from None


def upload_box(codec: Codec) -> UploadBox:
    """Show a box for a picture and a caption, which are encoded, decoded and measured.

    The result stands beside the original, with the `.taco` file to download. What is wrong with a picture is said in
    words. The picture goes to the notebook's kernel and nowhere else.
    """
    return UploadBox(codec)
