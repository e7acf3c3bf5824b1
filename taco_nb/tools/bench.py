"""`taco-nb bench` measures speed and memory beside CompressAI's ELIC, which is the same codec without the text.

All weights are random, of the paper's size, and scaled so that the files have about the same rate; what they would have
learned changes little. (Learned weights are larger in places, and there take two bytes: `taco_nb.model.kernels`.)
Encoding takes an 8-bit image to the bytes of a file, and decoding takes these to the image. The captions go through an
untrained text tower.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch.utils.benchmark import Timer
from tqdm import tqdm

from taco_nb.codec import Codec, has_fast_bfloat16, pad
from taco_nb.data.images import to_image, to_rgb, to_tensor
from taco_nb.files import atomic_write, bundled
from taco_nb.model import TACO, rans
from taco_nb.provenance import provenance
from taco_nb.timing import process_memory, time_in_turn, training_step

REFERENCE = "Elic2022Official"
CAPTION = "a cup of coffee on a wooden table"
SIZE = (768, 512)
"""Width and height of a Kodak image."""
CROPS = 8
"""A GPU codes so many crops of 256x256 at once."""


def photograph(width: int, height: int) -> Image.Image:
    """Return a bundled photograph, resized."""
    return to_rgb(bundled("sample/images/coffee.png")).resize((width, height), Image.Resampling.BICUBIC)


def paper_codecs(device: str) -> dict[str, Codec]:
    """Return both modes, "exact" and "fast", around one paper-size network with random weights, at about 0.3 bpp."""
    torch.manual_seed(0)
    net = TACO()
    with torch.no_grad():
        net.g_a.analysis_transform[16].weight *= 0.15  # the Injector before it gives values of unit variance
    net = net.to(device)
    return {mode: Codec(net, "untrained-512", mode=mode) for mode in ("exact", "fast")}


class Elic:
    """CompressAI's ELIC, with random weights, encodes and decodes here as our codec does."""

    def __init__(self, device: str):
        from compressai.models import Elic2022Official

        torch.manual_seed(0)
        self.net = Elic2022Official().eval().to(device)
        self.net.update()
        self.device = device

    @torch.inference_mode()
    def encode_batch(self, images: list[Image.Image], captions: list[str]) -> dict[str, Any]:
        """Return what CompressAI's `compress` gives, strings and a shape. ELIC reads no captions."""
        return self.net.compress(torch.stack([pad(to_tensor(image)) for image in images]).to(self.device))

    @torch.inference_mode()
    def decode_batch(self, coded: dict[str, Any]) -> torch.Tensor:
        return self.net.decompress(coded["strings"], coded["shape"])["x_hat"].cpu()

    def encode(self, image: Image.Image, caption: str) -> dict[str, Any]:
        return self.encode_batch([image], [caption])

    def decode(self, coded: dict[str, Any]) -> Image.Image:
        return to_image(self.decode_batch(coded)[0])


def speed(device: str, repeats: int, training_repeats: int, bar: tqdm | None = None) -> pd.DataFrame:
    """Time ELIC and both modes in turn at encoding, at decoding and at a training step: a row per task and codec.

    On a GPU, batches of crops are coded too. A training step is forward pass, rate and distortion, backward pass and
    Adam, on one 256x256 crop on a processor and on eight on a GPU; "exact" trains in float32, and "fast" autocasts to
    bfloat16 where the device is quicker at it. `bar` moves by one after each of the tasks.
    """
    codecs = {REFERENCE: Elic(device), **paper_codecs(device)}
    image = photograph(*SIZE)
    files = {name: codec.encode(image, CAPTION) for name, codec in codecs.items()}
    tasks: dict[str, dict[str, Callable]] = {
        "encode": {name: partial(codec.encode, image, CAPTION) for name, codec in codecs.items()},
        "decode": {name: partial(codec.decode, files[name]) for name, codec in codecs.items()},
    }
    if device == "cuda":  # ELIC codes the images of a batch one after the other
        crops = [photograph(256, 256)] * CROPS
        encode = {name: partial(c.encode_batch, crops, [CAPTION] * CROPS) for name, c in codecs.items()}
        batches = {name: run() for name, run in encode.items()}
        tasks[f"encode {CROPS} crops"] = encode
        tasks[f"decode {CROPS} crops"] = {
            name: lambda c=c, batch=batches[name]: [x_hat.cpu() for x_hat in c.decode_batch(batch)]
            for name, c in codecs.items()
        }
    net, count = codecs["exact"].net, 8 if device == "cuda" else 1
    x = torch.rand(count, 3, 256, 256, device=device).to(memory_format=torch.channels_last)
    text = torch.randn(count, 38, net.config.text_dim, device=device)
    tasks["training step"] = {
        REFERENCE: training_step(codecs[REFERENCE].net, x),
        "exact": training_step(net, x, text),
        "fast": training_step(net, x, text, bfloat16=has_fast_bfloat16(device)),
    }
    rows = []
    for task, runs in tasks.items():
        times = training_repeats if task == "training step" else repeats
        for name, row in time_in_turn(runs, device, times).items():
            size = _file_size(files[name]) if task == "encode" else None
            rows.append({"task": task, "codec": name, **row, "bytes": size})
        if bar is not None:
            bar.update()
    return pd.DataFrame(rows)


def _file_size(file: bytes | dict[str, Any]) -> int:
    """Return the bytes of a `.taco` file, or of ELIC's strings."""
    if isinstance(file, bytes):
        return len(file)
    return sum(len(string) for strings in file["strings"] for string in strings)


@torch.inference_mode()
def parts(codec: Codec, device: str) -> pd.DataFrame:
    """Time each part of a codec by itself, in milliseconds: a row for each part, with its task.

    "entropy part, encoding" and "entropy part, decoding" are the networks and the coder in turn, as a file takes them. A
    GPU's transfers come last.
    """
    net, in_precision = codec.net, codec.transform_precision
    x = pad(to_tensor(photograph(*SIZE))[None])
    on_device = x.to(device).contiguous(memory_format=torch.channels_last)
    text = codec.conditioning([CAPTION])
    with in_precision():
        y = net.g_a(on_device, *text).float()
        model, z = net.integer_model(), net.h_a(y)
    coded = model.quantize(y, z)
    symbols, indexes = (torch.cat(steps).cpu() for steps in (coded.y, coded.indexes))
    tables, lengths = model.tables().y, [len(part) for part in coded.y]
    stream, strings = rans.encode(symbols, indexes, tables), model.encode_latents(y, z)
    shape = (z.shape[2], z.shape[3])

    def transform(network: torch.nn.Module, *inputs: torch.Tensor) -> None:
        with in_precision():
            network(*inputs)

    def read() -> None:
        decoder = rans.Decoder(stream, tables, len(indexes))
        for part in indexes.split(lengths):
            decoder.read(part)

    runs: dict[tuple[str, str], Callable[[], Any]] = {
        ("text", "encode"): lambda: codec.conditioning([CAPTION]),
        ("g_a", "encode"): lambda: transform(net.g_a, on_device, *text),
        ("h_a", "encode"): lambda: net.h_a(y),
        ("entropy networks", "both"): lambda: model.quantize(y, z),
        ("coder, encoding", "encode"): lambda: rans.encode(symbols, indexes, tables),
        ("entropy part, encoding", "encode"): lambda: model.encode_latents(y, z),
        ("coder, decoding", "decode"): read,
        ("entropy part, decoding", "decode"): lambda: model.decode_latents(
            strings.y_string, strings.z_string, shape
        ),
        ("g_s", "decode"): lambda: transform(net.g_s, coded.y_hat),
        ("fingerprint", "both"): lambda: codec.fingerprint,
    }
    if device == "cuda":
        runs["transfers", "both"] = lambda: (x.to(device), on_device.cpu(), y.cpu(), symbols.to(device))
    rows = []
    for (part, task), run in runs.items():
        # A Timer's own default is one thread.
        timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        median = 1e3 * timer.blocked_autorange().median
        rows.append({"part": part, "task": task, "codec": codec.mode, "median_ms": median})
    return pd.DataFrame(rows)


def peak_memory(name: str, width: int, height: int) -> float:
    """Return the MiB that a process takes at most to encode and decode one image, PyTorch and weights included.

    The process is a new one, so that nothing else counts. The result is NaN where the system does not tell it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_code_one_image, name, width, height).result()


def _code_one_image(name: str, width: int, height: int) -> float:
    image = photograph(width, height)
    codec = Elic("cpu") if name == REFERENCE else paper_codecs("cpu")[name]
    codec.decode(codec.encode(image, CAPTION))
    try:
        return process_memory("VmHWM")
    except OSError:
        return math.nan


def bench(device: str, repeats: int, out: Path, large: bool) -> None:
    """Print the tables of speed and memory, and write them as CSV files into the folder `out`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Memory should not grow faster than the image, which is shown for our codec; one size does for ELIC.
    sizes = [SIZE, (2048, 1536), *([(6000, 4000)] if large else [])]
    memory_of = [(REFERENCE, *SIZE), *((mode, *size) for size in sizes for mode in ("exact", "fast"))]
    tasks, rows = 5 if device == "cuda" else 3, []
    with tqdm(desc="bench", unit="measurement", total=tasks + 1 + len(memory_of)) as bar:
        table = speed(device, repeats, max(3, repeats // 3), bar)
        where = parts(paper_codecs(device)["fast"], device)
        bar.update()
        for name, width, height in memory_of:
            peak = peak_memory(name, width, height)
            rows.append({"codec": name, "size": f"{width} x {height}", "peak_mib": peak})
            bar.update()
    peaks, about = pd.DataFrame(rows), provenance()
    hardware = about["hardware"]
    wide = table.pivot(index="codec", columns="task", values=["speedup", "median_ms"])
    print(f"{hardware['cpu']}, {hardware['threads']} threads, {device} {hardware['gpus']}")
    print(
        f"{SIZE[0]} x {SIZE[1]} pixels, medians of {repeats} runs; speedup is over {REFERENCE}'s runs beside them\n"
    )
    print(wide.loc[[REFERENCE, "exact", "fast"]].round(2).to_string(), "\n")
    print(where[["part", "task", "median_ms"]].round(1).to_string(index=False), "\n")
    print(peaks.round(0).to_string(index=False))
    for name, frame in (("speed", table), ("parts", where), ("memory", peaks)):
        with atomic_write(out / f"{name}.csv", "w") as file:
            frame.to_csv(file, index=False)
    with atomic_write(out / "bench.json", "w") as file:
        json.dump({"device": device, "size": SIZE, "load": os.getloadavg(), **about}, file, indent=1)
