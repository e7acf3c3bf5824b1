"""Writes the golden files: `.taco` files with the SHA-256 of the latents in them, which every later change must keep.

    python tests/make_golden.py tiny      # a small network with fixed weights: once, when the format changes
    python tests/make_golden.py bundled   # the bundled codecs: whenever their weights are renewed

The small network's are the promise that a file decodes for good: to write them anew is to break it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from taco_nb import Codec, checkpoint, load
from taco_nb.files import REPOSITORY, bundled
from taco_nb.model.integer import MEAN_BITS

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = GOLDEN / "latents.json"
TINY = GOLDEN / "tiny.safetensors"
CAPTION = "a cup of coffee on a wooden table"


def latents_digest(codec: Codec, file: bytes | Path) -> str:
    """Return the SHA-256 of the latents in a file, as little-endian integers of 32 bits."""
    latents = (codec.decode_latents(file) * 2**MEAN_BITS).int().cpu().contiguous().numpy()
    return hashlib.sha256(latents.astype("<i4").tobytes()).hexdigest()


def all_digests() -> dict[str, str]:
    """Decode every golden file, and return the digests of their latents by the files' names."""
    codecs = {name: load(source) for name, source in sources().items()}
    return {file: latents_digest(codecs[file.split("@")[0]], GOLDEN / file) for file in expected()}


def expected() -> dict[str, str]:
    """Return the committed digests."""
    return json.loads(DIGESTS.read_text(encoding="utf-8"))


def sources() -> dict[str, str | Path]:
    """Return what to load for each codec that wrote golden files."""
    shelf = REPOSITORY / "data" / "checkpoints"
    return {"tiny": TINY} | {path.stem: path.stem for path in sorted(shelf.glob("*.safetensors"))}


def write(name: str, sizes: list[tuple[int, int]]) -> dict[str, str]:
    """Encode a bundled photograph at several sizes with a codec, and return the new digests."""
    codec, photograph = load(sources()[name]), Image.open(bundled("sample/images/coffee.png")).convert("RGB")
    digests = {}
    for width, height in sizes:
        file = f"{name}@{width}x{height}.taco"
        data = codec.encode(photograph.resize((width, height), Image.Resampling.BICUBIC), CAPTION)
        (GOLDEN / file).write_bytes(data)
        digests[file] = latents_digest(codec, data)
    return digests


def main(which: str) -> None:
    from conftest import make_net

    torch.set_num_threads(1)
    digests = expected() if DIGESTS.is_file() else {}
    if which == "tiny":
        about = {"name": "tiny", "experiment": {"text_encoder": "untrained-16", "text_tokens": 8}}
        net = make_net(N=16, M=32, groups=(4, 12, 16), context_widths=(24, 16))
        with torch.no_grad():  # the kernels span magnitudes, as trained ones do
            generator = torch.Generator().manual_seed(1)
            for weight in net.parameters():
                if weight.ndim == 4:
                    weight *= torch.exp2(torch.randn(weight.shape[:2], generator=generator))[:, :, None, None]
        checkpoint.save_weights(TINY, net, about, torch.float16)
        digests |= write("tiny", [(64, 64), (200, 130), (33, 1)])
    else:
        digests = {file: digest for file, digest in digests.items() if file.startswith("tiny@")}
        for name in sources().keys() - {"tiny"}:
            digests |= write(name, [(192, 128)])
    DIGESTS.write_text(json.dumps(dict(sorted(digests.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
