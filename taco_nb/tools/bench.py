"""`make bench`: the speed of the codec beside CompressAI's ELIC, which is the same codec without the text.

All weights are random, of the paper's size, and brought to about the same rate; no time depends on what they have learned.
Encoding is from an 8-bit image to the bytes of a file, decoding back to the image. The text tower is the untrained one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from taco_nb.codec import Codec, has_fast_bfloat16, pad
from taco_nb.data.images import to_image, to_rgb, to_tensor
from taco_nb.files import atomic_write, bundled
from taco_nb.model import TACO, rans
from taco_nb.provenance import provenance
from taco_nb.timing import compare, resident, training_step

if TYPE_CHECKING:
    import pandas as pd

REFERENCE = "Elic2022Official"
CAPTION = "a cup of coffee on a wooden table"
SIZE = (768, 512)
"""Of a Kodak image."""


def photograph(width: int, height: int) -> Image.Image:
    """A bundled photograph at any size."""
    return to_rgb(bundled("sample/images/coffee.png")).resize((width, height), Image.Resampling.BICUBIC)


def paper_codecs(device: str) -> dict[str, Codec]:
    """Both modes around one paper-size network with random weights, at about 0.3 bits per pixel."""
    torch.manual_seed(0)
    net = TACO()
    with torch.no_grad():
        net.g_a.analysis_transform[16].weight *= 0.15  # the Injector before it gives values of unit variance
    net = net.to(device)
    return {mode: Codec(net, "untrained-512", mode=mode) for mode in ("exact", "fast")}


def elic(device: str) -> torch.nn.Module:
    """CompressAI's ELIC with random weights."""
    from compressai.models import Elic2022Official

    torch.manual_seed(0)
    net = Elic2022Official().eval().to(device)
    net.update()
    return net


@torch.inference_mode()
def elic_encode(net: torch.nn.Module, image: Image.Image, device: str) -> dict[str, Any]:
    """As its authors' `compress` gives them: strings and shape."""
    return net.compress(pad(to_tensor(image)[None].to(device)))


@torch.inference_mode()
def elic_decode(net: torch.nn.Module, coded: dict[str, Any]) -> Image.Image:
    return to_image(net.decompress(coded["strings"], coded["shape"])["x_hat"][0].cpu())


def speed(device: str, repeats: int, training_repeats: int) -> pd.DataFrame:
    """Encode, decode and a training step of the reference and of both modes, in turn: a row per task and codec.

    A training step is forward, rate and distortion, backward and Adam on 256x256 crops, one on a processor and eight on a
    GPU; "exact" is float32 and "fast" bfloat16 autocast where the device has it.
    """
    import pandas as pd

    image, peer, codecs = photograph(*SIZE), elic(device), paper_codecs(device)
    coded, files = (
        elic_encode(peer, image, device),
        {mode: c.encode(image, CAPTION) for mode, c in codecs.items()},
    )
    sizes = {REFERENCE: sum(len(string) for strings in coded["strings"] for string in strings)}
    sizes |= {mode: len(data) for mode, data in files.items()}
    encode = {REFERENCE: lambda: elic_encode(peer, image, device)}
    encode |= {mode: lambda codec=codec: codec.encode(image, CAPTION) for mode, codec in codecs.items()}
    decode = {REFERENCE: lambda: elic_decode(peer, coded)}
    decode |= {
        mode: lambda codec=codec, mode=mode: codec.decode(files[mode]) for mode, codec in codecs.items()
    }
    tasks = {"encode": compare(encode, device, repeats), "decode": compare(decode, device, repeats)}
    if device == "cuda":
        tasks |= _batches(device, repeats, peer, codecs)
    net = codecs["exact"].net
    crops = torch.rand(8 if device == "cuda" else 1, 3, 256, 256, device=device).to(
        memory_format=torch.channels_last
    )
    text = torch.randn(len(crops), 38, net.config.text_dim, device=device)
    train = {REFERENCE: training_step(peer, crops), "exact": training_step(net, crops, text)}
    train["fast"] = training_step(net, crops, text, bfloat16=has_fast_bfloat16(device))
    tasks["training step"] = compare(train, device, training_repeats)
    rows = [
        {"task": task, "codec": name, **row, "bytes": sizes[name] if task == "encode" else None}
        for task, measured in tasks.items()
        for name, row in measured.items()
    ]
    return pd.DataFrame(rows)


def _batches(device: str, repeats: int, peer: torch.nn.Module, codecs: dict[str, Codec]) -> dict[str, dict]:
    """Thirty-two COCO crops at once; the reference codes a batch one image after the other inside."""
    crops = [photograph(256, 256)] * 32
    x = torch.stack([to_tensor(crop) for crop in crops])
    encode = {REFERENCE: torch.inference_mode()(lambda: peer.compress(x.to(device)))}
    encode |= {m: lambda c=c: c.encode_batch(crops, [CAPTION] * len(crops)) for m, c in codecs.items()}
    coded, files = encode[REFERENCE](), {mode: encode[mode]() for mode in codecs}
    decode = {
        REFERENCE: torch.inference_mode()(
            lambda: peer.decompress(coded["strings"], coded["shape"])["x_hat"].cpu()
        )
    }
    decode |= {
        m: lambda c=c, m=m: [x_hat.cpu() for x_hat in c.decode_batch(files[m])] for m, c in codecs.items()
    }
    return {
        "encode 32 crops": compare(encode, device, repeats),
        "decode 32 crops": compare(decode, device, repeats),
    }


@torch.inference_mode()
def parts(codec: Codec, device: str, repeats: int) -> pd.DataFrame:
    """Where a codec's time goes, each part timed by itself: transfers, transforms, entropy networks, coder."""
    import pandas as pd

    net, x = codec.net, pad(to_tensor(photograph(*SIZE))[None])
    text, on_device = (
        codec.conditioning([CAPTION]),
        x.to(device).contiguous(memory_format=torch.channels_last),
    )
    in_precision = codec.transform_precision
    with in_precision():
        y = net.g_a(on_device, *text).float()
    model, z = net.integer_model(), net.h_a(y)
    coded = model.quantize(y, z)

    def g_a() -> None:
        with in_precision():
            net.g_a(on_device, *text)

    def g_s() -> None:
        with in_precision():
            net.g_s(coded.y_hat)

    symbols, indexes = (torch.cat(steps).cpu() for steps in (coded.y, coded.indexes))
    tables, lengths = model.tables().y, [len(part) for part in coded.y]
    stream = rans.encode(symbols, indexes, tables)

    def read() -> None:
        decoder = rans.Decoder(stream, tables, len(indexes))
        for part in indexes.split(lengths):
            decoder.read(part)

    runs: dict[str, Callable[[], Any]] = {
        "g_a": g_a,
        "entropy networks": lambda: model.quantize(y, z),
        "coder, encoding": lambda: rans.encode(symbols, indexes, tables),
        "coder, decoding": read,
        "g_s": g_s,
    }
    if device == "cuda":
        runs["transfers"] = lambda: (x.to(device), on_device.cpu(), y.cpu(), symbols.to(device))
    measured = compare({name: torch.inference_mode()(run) for name, run in runs.items()}, device, repeats)
    return pd.DataFrame([{"part": name, "codec": codec.mode, **row} for name, row in measured.items()])


def peak_memory(codec: str, width: int, height: int) -> float:
    """MiB that a process of its own takes at most, PyTorch and weights included, to encode and decode one image.

    NaN where the system does not tell it.
    """
    command = [sys.executable, "-W", "ignore", "-m", "taco_nb.tools.bench", codec, str(width), str(height)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _print_peak(name: str, width: int, height: int) -> None:
    image = photograph(width, height)
    if name == REFERENCE:
        peer = elic("cpu")
        elic_decode(peer, elic_encode(peer, image, "cpu"))
    else:
        codec = paper_codecs("cpu")[name]
        codec.decode(codec.encode(image, CAPTION))
    try:
        print(resident("VmHWM") / 1024)
    except OSError:
        print(math.nan)


def memory(sizes: list[tuple[int, int]]) -> pd.DataFrame:
    """Peak memory on the processor per codec and image size, which should not grow faster than the image."""
    import pandas as pd
    from tqdm.auto import tqdm

    jobs = [
        (name, *size)
        for size in sizes
        for name in (REFERENCE, "exact", "fast")
        if name != REFERENCE or size == SIZE
    ]
    rows = [
        {"codec": name, "size": f"{width} x {height}", "peak_mib": peak_memory(name, width, height)}
        for name, width, height in tqdm(jobs, desc="memory", unit="process")
    ]
    return pd.DataFrame(rows)


def bench(device: str, repeats: int, out: Path, large: bool) -> None:
    """Print the tables of speed and memory, and write them as CSV files into the folder `out`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    table = speed(device, repeats, max(3, repeats // 3))
    where = parts(paper_codecs(device)["fast"], device, repeats)
    peaks = memory([SIZE, (2048, 1536), *([(6000, 4000)] if large else [])])
    about = provenance()
    hardware = about["hardware"]
    wide = table.pivot(index="codec", columns="task", values=["speedup", "median_ms"]).loc[
        [REFERENCE, "exact", "fast"]
    ]
    print(f"{hardware['cpu']}, {hardware['threads']} threads, {device} {hardware['gpus']}")
    print(
        f"{SIZE[0]} x {SIZE[1]} pixels, medians of {repeats} runs; speedup over {REFERENCE} in the same run\n"
    )
    print(
        wide.round(2).to_string(), "\n\n", where[["part", "median_ms"]].round(1).to_string(index=False), "\n"
    )
    print(peaks.round(0).to_string(index=False))
    for name, frame in (("speed", table), ("parts", where), ("memory", peaks)):
        with atomic_write(out / f"{name}.csv", "w") as file:
            frame.to_csv(file, index=False)
    with atomic_write(out / "bench.json", "w") as file:
        json.dump({"device": device, "size": SIZE, "load": os.getloadavg(), **about}, file, indent=1)


if __name__ == "__main__":
    _print_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
