"""How long attention takes, and how much of the codec that is: the report's timing study, and the sweep it stops short of.

Everything is measured the same way: a few runs unmeasured, then the kinds that are compared in turn, so that a machine
that is busy for a moment is busy for all of them. Clocks are CUDA events on a GPU and `perf_counter` on a processor.
Operations are counted by PyTorch, and do not depend on the machine.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write
from taco_nb.inspection import count_flops
from taco_nb.model import TACO, ModelConfig
from taco_nb.model.adapter import Injector, make_attentions
from taco_nb.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd

ATTENTIONS = ("softmax", "linformer")
MIB = 1 << 20
NOTABLE = 0.1
"""By which share of softmax's time Linformer's must differ to be more than the report's "no real difference"."""
ROOM = 1.25
"""How many times as fast an encoder must at least become without any attention for a difference to have been expected."""


# How things are measured ---------------------------------------------------------------------------------------------


def compare(runs: Mapping[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Time several computations in turn: {name: {"speedup", "median_ms", "mean_ms", "q25_ms", "q75_ms", "runs", "peak_mib"}}.

    Before, each runs twice unmeasured, once to start all that starts but once and once for its memory. "speedup" is over
    the first of them: the median of the ratios of runs that were neighbours in time. "peak_mib" is the memory taken at once
    beyond what was held before, of the GPU where that is the device; of a processor it is known with glibc only, else NaN.
    """
    for run in runs.values():
        run()
    peaks = {name: _peak(run, device) for name, run in runs.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            milliseconds[name].append(_clock(run, device))
    first = np.array(milliseconds[next(iter(runs))])
    return {
        name: {
            "speedup": float(np.median(first / times)),
            "median_ms": float(np.median(times)),
            "mean_ms": float(np.mean(times)),
            "q25_ms": float(np.quantile(times, 0.25)),
            "q75_ms": float(np.quantile(times, 0.75)),
            "runs": len(times),
            "peak_mib": peaks[name],
        }
        for name, times in milliseconds.items()
    }


def _clock(run: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run, the device's work included."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    clock = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - clock)


def _peak(run: Callable[[], Any], device: str) -> float:
    """MiB of memory that one run takes at most, beyond what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but kept, would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    except (AttributeError, OSError, TypeError):
        run()
        return math.nan
    before = resident("VmRSS")
    run()
    return max(0.0, (resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """kB of memory that this process has ("VmRSS") or had at most ("VmHWM"), on Linux. Raises `OSError` elsewhere.

    Not `getrusage`'s peak: that of a new process counts what its parent held when it was started.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


# The report's sweep: the width of the attention's inputs -------------------------------------------------------------


class Widened(nn.Module):
    """An Injector over `factor` times as many channels, as the report timed it.

    The image is widened by concatenating its features, the text by the Injector's own linear layer, and of the result the
    first N channels are kept. x (B, N, H, W) -> (B, N, H, W).
    """

    def __init__(self, injector: Injector, factor: int):
        super().__init__()
        self.injector, self.factor = injector, factor

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.injector(torch.cat([x] * self.factor, 1), text, mask)[:, : x.shape[1]]


def widened(config: ModelConfig, factor: int) -> TACO:
    """A TACO with random weights whose two Injectors attend over `factor` times N channels."""
    net = TACO(config)
    over_text, _, over_text_again = make_attentions(replace(config, N=factor * config.N))
    for at, attention in ((8, over_text), (15, over_text_again)):
        injector = Injector(factor * config.N, config.text_dim, attention)
        net.g_a.analysis_transform[at] = Widened(injector, factor)
    return net


def width_sweep(
    exp: Experiment, factors: Sequence[int], n_pairs: int, device: str = "cpu", side: int = 256
) -> pd.DataFrame:
    """Milliseconds per image-caption pair over the width of the inputs to the cross-attention, a row per combination.

    For softmax and Linformer, and for "inference" (the network's forward pass over one `side` x `side` crop) and
    "training" (forward, rate and distortion, backward, a step of Adam). Columns: width, attention, pass, what `compare`
    gives, and gflop. Weights are random, on which no time depends.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    rows = []
    configs = {
        name: replace(exp.replace(attention=name).model_config(), image_grid=side // 8) for name in ATTENTIONS
    }
    for factor in tqdm(factors, desc="widths", unit="width"):
        for kind, make in (("inference", _inference), ("training", _training)):
            runs = {name: make(widened(config, factor), device, side) for name, config in configs.items()}
            for name, row in compare(runs, device, n_pairs).items():
                flops = count_flops(runs[name])["Global"]
                rows.append(
                    {
                        "width": factor * configs[name].N,
                        "attention": name,
                        "pass": kind,
                        **row,
                        **_rate(row, flops),
                    }
                )
    return pd.DataFrame(rows)


def _pair(config: ModelConfig, device: str | None, side: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(1, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(1, config.text_tokens, config.text_dim, device=device)


def _placed(module: nn.Module, device: str | None) -> nn.Module:
    """On a device; None leaves a module where it is, as fake tensors, which cannot be moved, must be."""
    return module if device is None else module.to(device, memory_format=torch.channels_last)


def _inference(net: TACO, device: str | None, side: int) -> Callable[[], Any]:
    net = _placed(net.eval(), device)
    pair = _pair(net.config, device, side)
    return torch.inference_mode()(lambda: net(*pair))


def _training(net: TACO, device: str | None, side: int) -> Callable[[], None]:
    return training_step(_placed(net, device), *_pair(net.config, device, side))


def training_step(net: nn.Module, x: Tensor, *text: Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """A step of training to be timed: forward, rate and distortion, backward, and Adam at a learning rate of zero.

    x (B, 3, H, W), and text (B, T, text_dim) where `net` reads one. `bfloat16` is for the forward pass, by autocast.
    """
    optimizer = torch.optim.Adam(
        [p for name, p in net.named_parameters() if not name.endswith("quantiles")], 0.0
    )

    def step() -> None:
        net.train()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            out = net(x, *text)
        rate = sum(-likelihoods.log2().sum() for likelihoods in out["likelihoods"].values()) / x[:, 0].numel()
        ((out["x_hat"] - x).square().mean() + rate).backward()
        optimizer.step()

    return step


# The sweep that the complexity argument is about: lengths ------------------------------------------------------------


def length_sweep(
    exp: Experiment, sides: Sequence[int], tokens: Sequence[int], repeats: int, device: str = "cpu"
) -> pd.DataFrame:
    """The encoder's three attentions alone, and the whole encoder, over image sides in pixels and numbers of tokens.

    Columns: side, tokens, attention ("softmax" or "linformer"), part ("attention" or "encoder"), what `compare` gives,
    and gflop. Linformer's projections have the size of the image and text at hand, so that none is interpolated.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    rows = []
    for side, count in tqdm([(s, t) for s in sides for t in tokens], desc="lengths", unit="size"):
        for part, make in (("attention", _attention_alone), ("encoder", _encoder)):
            configs = {
                name: replace(
                    exp.replace(attention=name).model_config(), image_grid=side // 8, text_tokens=count
                )
                for name in ATTENTIONS
            }
            measured = compare({name: make(c, device, side) for name, c in configs.items()}, device, repeats)
            for name, row in measured.items():
                with FakeTensorMode():  # shapes without data: counting takes neither memory nor arithmetic
                    flops = count_flops(make(configs[name], None, side))["Global"]
                about = {"side": side, "tokens": count, "attention": name, "part": part}
                rows.append({**about, **row, **_rate(row, flops)})
    return pd.DataFrame(rows)


def _attention_alone(config: ModelConfig, device: str | None, side: int) -> Callable[[], Any]:
    """The adapter's three attentions, each on queries, keys and values of the shapes that it has in the encoder."""
    layers = [_placed(layer.eval(), device) for layer in make_attentions(config)]
    quarter, eighth = (side // 4, side // 4), (side // 8, side // 8)
    image = [torch.randn(1, h * w, config.N, device=device) for h, w in (quarter, eighth)]
    text = torch.randn(1, config.text_tokens, config.N, device=device)
    wide_text = torch.randn(1, config.text_tokens, config.text_dim, device=device)
    wide_image = torch.randn(1, eighth[0] * eighth[1], config.text_dim, device=device)
    calls = [
        (image[0], text, (1, config.text_tokens)), (wide_text, wide_image, eighth), (image[1], text, (1, config.text_tokens))
    ]  # fmt: skip
    return torch.inference_mode()(lambda: [layer(*call) for layer, call in zip(layers, calls)])


def _encoder(config: ModelConfig, device: str | None, side: int) -> Callable[[], Any]:
    g_a = _placed(TACO(config).g_a.eval(), device)
    pair = _pair(config, device, side)
    return torch.inference_mode()(lambda: g_a(*pair))


def _rate(row: Mapping[str, float], flops: int) -> dict[str, float]:
    return {"gflop": flops / 1e9, "gflop_per_s": flops / 1e6 / row["median_ms"]}


# What follows from the measurements ----------------------------------------------------------------------------------


def shares(lengths: pd.DataFrame) -> pd.DataFrame:
    """How much of the encoder its attentions are, in time and in operations, and how Linformer's compare to softmax's.

    A row per side and number of tokens: time_share and flop_share of softmax attention in its encoder, and
    attention_ratio and encoder_ratio, Linformer's median time over softmax's.
    """
    table = lengths.pivot(
        index=["side", "tokens"], columns=["part", "attention"], values=["median_ms", "gflop"]
    )
    time_, flop = table["median_ms"], table["gflop"]
    return (
        time_["attention"]["softmax"]
        .div(time_["encoder"]["softmax"])
        .to_frame("time_share")
        .assign(
            flop_share=flop["attention"]["softmax"] / flop["encoder"]["softmax"],
            attention_ratio=time_["attention"]["linformer"] / time_["attention"]["softmax"],
            encoder_ratio=time_["encoder"]["linformer"] / time_["encoder"]["softmax"],
        )
        .reset_index()
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of the size with which the values grow: the slope of a line through both logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def exponents(lengths: pd.DataFrame) -> pd.DataFrame:
    """The fitted powers of the attentions' time and operations over tokens (largest side) and image positions (fewest)."""
    import pandas as pd

    rows = []
    alone = lengths[lengths["part"] == "attention"]
    for name, table in alone.groupby("attention", sort=False):
        over = {
            "tokens": table[table["side"] == table["side"].max()],
            "image positions": table[table["tokens"] == table["tokens"].min()],
        }
        for size, part in over.items():
            sizes = part["tokens"] if size == "tokens" else part["side"] ** 2
            if len(part) > 1:
                fits = {f"{what} ~ size^": exponent(sizes, part[column])
                        for what, column in (("time", "median_ms"), ("operations", "gflop"))}  # fmt: skip
                rows.append({"attention": name, "over": size, **fits})
    return pd.DataFrame(rows)


def break_even(tokens: Sequence[float], ratio: Sequence[float]) -> float | None:
    """The number of tokens from which on Linformer is the quicker: where its time over softmax's falls below 1 for good.

    Interpolated between measured lengths; the shortest measured if it is quicker from there on, None if never.
    """
    tokens, ratio = np.log(np.asarray(tokens, float)), np.log(np.asarray(ratio, float))
    if ratio[-1] >= 0:
        return None
    slower = np.flatnonzero(ratio >= 0)
    if not len(slower):
        return float(np.exp(tokens[0]))
    at = slower[-1]
    part = ratio[at] / (ratio[at] - ratio[at + 1])
    return float(np.exp(tokens[at] + part * (tokens[at + 1] - tokens[at])))


def break_evens(lengths: pd.DataFrame) -> pd.DataFrame:
    """From how many tokens on Linformer pays, in time and in operations, for each image side; NaN where it never does."""
    import pandas as pd

    rows = []
    for side, table in lengths[lengths["part"] == "attention"].groupby("side"):
        row = {"side": side}
        for what, column in (("time", "median_ms"), ("operations", "gflop")):
            wide = table.pivot(index="tokens", columns="attention", values=column)
            row[f"tokens, by {what}"] = break_even(wide.index, wide["linformer"] / wide["softmax"])
        rows.append(row)
    return pd.DataFrame(rows).astype(float).astype({"side": int})


def conclusion(widths: pd.DataFrame, lengths: pd.DataFrame) -> str:
    """What the measurements say of the report's null result, in words that they choose.

    A difference shows in the width sweep where Linformer's median is off softmax's by `NOTABLE` and their quartiles do not
    overlap. A null result is predicted where none shows, and attention's share leaves no room for one.
    """
    table = shares(lengths)
    usual = table.loc[table["tokens"].idxmin()]
    most = 1 / (1 - min(usual["time_share"], 0.99))
    by = widths.pivot(index=["pass", "width"], columns="attention", values=["median_ms", "q25_ms", "q75_ms"])
    ratio = by["median_ms"]["linformer"] / by["median_ms"]["softmax"]
    apart = (by["q25_ms"].max(axis=1) > by["q75_ms"].min(axis=1)) & ((ratio - 1).abs() >= NOTABLE)
    spans = [
        f"{ratio[kind].min():.2f} to {ratio[kind].max():.2f} times softmax's in {kind}"
        for kind in ("inference", "training")
    ]
    fewest, even = lengths["tokens"].min(), break_evens(lengths).set_index("side")["tokens, by time"].dropna()
    where = [
        f"at {side} x {side} already with {fewest} tokens, the fewest measured"
        if math.isclose(tokens, fewest)
        else f"at {side} x {side} from about {tokens:.0f} tokens on"
        for side, tokens in even.items()
    ]
    if apart.any():
        cases = f"{apart.sum()} of {len(apart)} cases of the width sweep"
        verdict = f"in {cases} the two differ by {NOTABLE:.0%} or more, which is no null result"
    elif most < ROOM:
        verdict = "a null result is what these figures predict"
    else:
        verdict = "the width sweep shows no difference, though the share would have let one show"
    return (
        f"With {usual['tokens']:.0f} tokens, {usual['side']:.0f} x {usual['side']:.0f} pixels and width "
        f"{widths['width'].min()}, the three cross-attentions take {usual['time_share']:.0%} of the encoder's time and "
        f"{usual['flop_share']:.0%} of its operations, so that attention for nothing would make that encoder {most:.2f} "
        f"times as fast; over widths up to {widths['width'].max()} Linformer's network took {spans[0]} and {spans[1]}; "
        f"its attention is the quicker {' and '.join(where) or 'at no length measured'}: {verdict}."
    )


def save(folder: str | os.PathLike, **tables: pd.DataFrame) -> None:
    """Each table as a CSV of its name in `folder`, and `timing.json` with hardware, versions and commit beside them."""
    for name, table in tables.items():
        with atomic_write(Path(folder) / f"{name}.csv", "w") as file:
            table.to_csv(file, index=False)
    with atomic_write(Path(folder) / "timing.json", "w") as file:
        json.dump({"tables": list(tables), **provenance()}, file, indent=1)
