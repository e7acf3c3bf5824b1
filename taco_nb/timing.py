"""This module times attention and its share of the encoder's time: the report's timing study, and one it left out.

Softmax and Linformer attention are measured alike: each runs twice unmeasured, then they take turns, so that a machine
that is busy for a moment is busy for both. PyTorch counts their operations, which are the same on every machine.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

from taco_nb.experiment import Experiment
from taco_nb.files import atomic_write
from taco_nb.inspection import count_flops
from taco_nb.model import TACO, ModelConfig
from taco_nb.model.adapter import Injector, make_attentions
from taco_nb.provenance import provenance
from taco_nb.settings import Attention
from taco_nb.training.loss import bits_per_pixel

ATTENTIONS = get_args(Attention)
MIB = 1 << 20
NOTABLE = 0.1
"""The report saw "no real difference" between softmax and Linformer. We speak of a difference where their times are at
least a tenth of softmax's apart; a smaller one can come from a processor that changes its clock rate."""
ROOM = 1.25
"""If attention that costs nothing would not even make the encoder 1.25 times as fast, then no kind of attention can save
much, and the report's null result is what one should expect."""


# How things are measured ---------------------------------------------------------------------------------------------


def time_in_turn(
    runs: Mapping[str, Callable[[], Any]], device: str, repeats: int
) -> dict[str, dict[str, float]]:
    """Time several computations in turn, `repeats` times each, and return a row of figures for each of them:

        median_ms, mean_ms, q25_ms, q75_ms   milliseconds of a run; q25 and q75 are the quartiles
        speedup                              how many times as fast as the first computation: the median of the ratios
                                             of runs that followed each other
        runs                                 how many runs were measured
        peak_mib                             the memory that a run takes at most, beyond what was held before it; NaN on a
                                             processor without glibc's and Linux's means to measure it

    Each runs twice before, once for all that happens only the first time and once for its memory.
    """
    for run in runs.values():
        run()
    peaks = {name: _peak_memory(run, device) for name, run in runs.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    # Why not torch.utils.benchmark.Timer? It times one computation after the other, each in a block of its own. A machine
    # that is busy during one of these blocks would then decide which computation seems the quicker.
    for _ in range(repeats):
        for name, run in runs.items():
            _wait_for_gpu(device)
            start = time.perf_counter()
            run()
            _wait_for_gpu(device)
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
    first, rows = np.array(milliseconds[next(iter(runs))]), {}
    for name, times in milliseconds.items():
        q25, median, q75 = map(float, np.quantile(times, (0.25, 0.5, 0.75)))
        rows[name] = {
            "speedup": float(np.median(first / times)), "median_ms": median, "mean_ms": float(np.mean(times)),
            "q25_ms": q25, "q75_ms": q75, "runs": len(times), "peak_mib": peaks[name],
        }  # fmt: skip
    return rows


def _wait_for_gpu(device: str) -> None:
    """Wait until a GPU has done what it was asked to do; its work goes on after the call that ordered it."""
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(run: Callable[[], Any], device: str) -> float:
    """Return the MiB of memory that one run takes at most, beyond what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # torch.profiler would count only PyTorch's own tensors, and miss the scratch memory of oneDNN and of the entropy coder.
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free but kept would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to what is held now
    except (AttributeError, OSError, TypeError):
        run()
        return math.nan
    before = process_memory("VmRSS")
    run()
    return max(0.0, process_memory("VmHWM") - before)


def process_memory(field: str) -> float:
    """Return the MiB that this process holds ("VmRSS") or has held at most ("VmHWM"). Raises `OSError` except on Linux.

    The peak that `getrusage` gives will not do: in a new process it counts what its parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


# What is timed -------------------------------------------------------------------------------------------------------


def _image_and_text(config: ModelConfig, device: str | None, side: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(1, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(1, config.text_tokens, config.text_dim, device=device)


def _on(device: str | None, module: nn.Module) -> nn.Module:
    """Move a module to a device, in the memory format of training. With None it stays: fake tensors cannot be moved."""
    return module if device is None else module.to(device, memory_format=torch.channels_last)


def _inference(module: nn.Module, x: Tensor, text: Tensor) -> Callable[[], Any]:
    """Return a forward pass to be timed, of the whole network or of its encoder."""
    module.eval()
    return torch.inference_mode()(lambda: module(x, text))


def encoder_run(config: ModelConfig, device: str | None, side: int) -> Callable[[], Any]:
    """Return a run of the encoder on a picture of `side` x `side` pixels and a text. Fake tensors need None as device."""
    return _inference(_on(device, TACO(config).g_a), *_image_and_text(config, device, side))


def attention_run(config: ModelConfig, device: str | None, side: int) -> Callable[[], Any]:
    """Return a run of the adapter's three attentions, on queries, keys and values shaped as in the encoder."""
    layers = [_on(device, layer.eval()) for layer in make_attentions(config)]
    quarter, eighth, tokens = (side // 4) ** 2, (side // 8) ** 2, config.text_tokens
    over_text, over_image = (1, tokens), (side // 8, side // 8)  # how the keys lie
    calls = [
        (torch.randn(1, n, dim, device=device), torch.randn(1, m, dim, device=device), keys)
        for n, m, dim, keys in (
            (quarter, tokens, config.N, over_text),  # the first Injector: the image looks at the text
            (tokens, eighth, config.text_dim, over_image),  # the Extractor: the text looks at the image
            (eighth, tokens, config.N, over_text),  # the second Injector
        )
    ]
    return torch.inference_mode()(lambda: [layer(*call) for layer, call in zip(layers, calls)])


def training_step(net: nn.Module, x: Tensor, *text: Tensor, bfloat16: bool = False) -> Callable[[], None]:
    """Return a step of training to be timed: forward pass, rate and distortion, backward pass, Adam.

    x is (B, 3, H, W), and text (B, T, text_dim) if `net` reads one. `bfloat16` autocasts the forward pass. The learning
    rate is zero, so that every repetition starts from the same weights.
    """
    weights = [p for name, p in net.named_parameters() if not name.endswith("quantiles")]
    optimizer = torch.optim.Adam(weights, lr=0.0)

    def step() -> None:
        net.train()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            out = net(x, *text)
        ((out["x_hat"] - x).square().mean() + bits_per_pixel(out)).backward()
        optimizer.step()

    return step


# The two sweeps ------------------------------------------------------------------------------------------------------


class Widened(nn.Module):
    """This is an Injector over `factor` times as many channels, as the report timed it.

    The image is widened by concatenating copies of its features, the text by the Injector's own linear layer. The first N
    channels of the result are kept. x (B, N, H, W) -> (B, N, H, W).
    """

    def __init__(self, injector: Injector, factor: int):
        super().__init__()
        self.injector, self.factor = injector, factor

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.injector(torch.cat([x] * self.factor, 1), text, mask)[:, : x.shape[1]]


def widened(config: ModelConfig, factor: int) -> TACO:
    """Return a TACO with random weights whose two Injectors attend over `factor` times N channels."""
    net = TACO(config)
    over_text, _, over_text_again = make_attentions(replace(config, N=factor * config.N))
    for at, attention in ((8, over_text), (15, over_text_again)):
        injector = Injector(factor * config.N, config.text_dim, attention)
        net.g_a.analysis_transform[at] = Widened(injector, factor)
    return net


def width_sweep(
    exp: Experiment, factors: Sequence[int], n_pairs: int, device: str = "cpu", side: int = 256
) -> pd.DataFrame:
    """Repeat the report's sweep: milliseconds per image-caption pair over the width of the cross-attention's inputs.

    There is a row for each width, attention ("softmax", "linformer") and pass: "inference" is the whole network's forward
    pass over one `side` x `side` crop, and "training" is a `training_step` on it. Columns: width, pass, attention, those
    of `time_in_turn`, gflop, gflop_per_s. The weights are random; no time depends on them.
    """
    configs, rows = _configs(exp, side), []
    for factor in tqdm(factors, desc="widths", unit="width"):
        for kind, make in (("inference", _inference), ("training", training_step)):
            runs = {
                name: make(_on(device, widened(config, factor)), *_image_and_text(config, device, side))
                for name, config in configs.items()
            }
            flops = {name: count_flops(run)["Global"] for name, run in runs.items()}
            rows += _rows({"width": factor * exp.sizes.N, "pass": kind}, runs, flops, device, n_pairs)
    return pd.DataFrame(rows)


def length_sweep(
    exp: Experiment, sides: Sequence[int], tokens: Sequence[int], repeats: int, device: str = "cpu"
) -> pd.DataFrame:
    """Time the encoder's three attentions alone, and the whole encoder, over the lengths of image and text.

    There is a row for each image side in pixels, number of tokens, attention ("softmax", "linformer") and part
    ("attention", "encoder"). Columns: side, tokens, part, attention, those of `time_in_turn`, gflop, gflop_per_s.
    Linformer's projections are made for each length, so that none is interpolated.
    """
    rows = []
    for side, count in tqdm([(s, t) for s in sides for t in tokens], desc="lengths", unit="size"):
        configs = _configs(exp, side, text_tokens=count)
        for part, make in (("attention", attention_run), ("encoder", encoder_run)):
            runs = {name: make(config, device, side) for name, config in configs.items()}
            # Fake tensors have shapes and no data, so counting on them takes no memory. On real ones it would: the only
            # kernel that can be counted writes down the whole matrix, 34 GB at the longest lengths of notebook 05.
            with FakeTensorMode():
                flops = {n: count_flops(make(config, None, side))["Global"] for n, config in configs.items()}
            rows += _rows({"side": side, "tokens": count, "part": part}, runs, flops, device, repeats)
    return pd.DataFrame(rows)


def _configs(exp: Experiment, side: int, **changes: int) -> dict[str, ModelConfig]:
    """Return the experiment's model with either kind of attention, for images with this side in pixels."""
    models = {name: exp.replace(attention=name).model_config() for name in ATTENTIONS}
    return {name: replace(model, image_grid=side // 8, **changes) for name, model in models.items()}


def _rows(
    about: dict[str, Any], runs: dict[str, Callable], flops: dict[str, int], device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """Time the two kinds of attention, and yield a row of a sweep's table for each."""
    for name, row in time_in_turn(runs, device, repeats).items():
        rate = {"gflop": flops[name] / 1e9, "gflop_per_s": flops[name] / 1e6 / row["median_ms"]}
        yield {**about, "attention": name, **row, **rate}


# What follows from the measurements ----------------------------------------------------------------------------------


def attention_shares(lengths: pd.DataFrame) -> pd.DataFrame:
    """Return how much of the encoder its attentions are, and how Linformer's time compares with softmax's.

    There is a row for each side and number of tokens of a `length_sweep`. `time_share` and `flop_share` are the shares of
    the three softmax attentions in the encoder's time and operations; `attention_ratio` and `encoder_ratio` are
    Linformer's median time over softmax's.
    """
    by_part = lengths.set_index(["side", "tokens", "part", "attention"]).unstack(["part", "attention"])
    ms, gflop = by_part["median_ms"], by_part["gflop"]
    shares = {
        "time_share": ms["attention"]["softmax"] / ms["encoder"]["softmax"],
        "flop_share": gflop["attention"]["softmax"] / gflop["encoder"]["softmax"],
        "attention_ratio": ms["attention"]["linformer"] / ms["attention"]["softmax"],
        "encoder_ratio": ms["encoder"]["linformer"] / ms["encoder"]["softmax"],
    }
    return pd.DataFrame(shares).reset_index()


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the power of the size with which the values grow: the slope of a line through both logarithms."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(values, float)), 1)[0])


def exponents(lengths: pd.DataFrame) -> pd.DataFrame:
    """Return the powers with which time and operations of the attentions grow with each of the two lengths.

    The tokens vary at the largest image side, and the image positions vary at the fewest tokens. A length of which only
    one value was measured is left out.
    """
    rows = []
    alone = lengths[lengths["part"] == "attention"]
    for name, table in alone.groupby("attention", sort=False):
        largest, fewest = (table["side"] == table["side"].max()), (table["tokens"] == table["tokens"].min())
        for over, part in (("tokens", table[largest]), ("image positions", table[fewest])):
            if len(part) > 1:
                size = part["tokens"] if over == "tokens" else part["side"] ** 2
                row = {"attention": name, "over": over}
                row["time ~ size^"] = exponent(size, part["median_ms"])
                row["operations ~ size^"] = exponent(size, part["gflop"])
                rows.append(row)
    return pd.DataFrame(rows)


def break_even(tokens: Sequence[float], ratio: Sequence[float]) -> float | None:
    """Return the number of tokens from which on Linformer is quicker: where its time over softmax's stays below 1.

    `tokens` ascend; between two of them the ratio is interpolated, both on logarithmic axes. The result is the least of
    `tokens` if Linformer is quicker from there on, and None if it is not quicker at the greatest.
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
    """Return for each image side the tokens from which on Linformer pays, in time and in operations; NaN if never."""
    rows = []
    for side, table in lengths[lengths["part"] == "attention"].groupby("side"):
        row = {"side": side}
        for what, column in (("time", "median_ms"), ("operations", "gflop")):
            wide = table.pivot(index="tokens", columns="attention", values=column)
            row[f"tokens, by {what}"] = break_even(wide.index, wide["linformer"] / wide["softmax"])
        rows.append(row)
    return pd.DataFrame(rows).astype(float).astype({"side": int})


def conclusion(widths: pd.DataFrame, lengths: pd.DataFrame) -> str:
    """Return what the measurements say about the report's null result, in a sentence.

    The width sweep shows a difference where the medians of Linformer and softmax are apart by `NOTABLE` and their quartiles
    do not overlap. If it shows none, the null result was to be expected where attention's share leaves no `ROOM` for one.
    The sweep times the whole network, so it is the share of the whole network that counts.
    """
    table = attention_shares(lengths)
    usual = table.loc[table["tokens"].idxmin()]
    of_parts = lengths.set_index(["part", "attention", "side", "tokens"])["median_ms"]
    of_networks = widths.set_index(["pass", "attention", "width"])["median_ms"]
    attention = of_parts["attention", "softmax", usual["side"], usual["tokens"]]
    share = attention / of_networks["inference", "softmax", widths["width"].min()]
    most = 1 / (1 - min(share, 0.99))  # Amdahl's law, for attention that takes no time
    by = widths.pivot(index=["pass", "width"], columns="attention", values=["median_ms", "q25_ms", "q75_ms"])
    ratio = by["median_ms"]["linformer"] / by["median_ms"]["softmax"]
    apart = (by["q25_ms"].max(axis=1) > by["q75_ms"].min(axis=1)) & ((ratio - 1).abs() >= NOTABLE)
    spans = [
        f"{ratio[kind].min():.2f} to {ratio[kind].max():.2f} times softmax's in {kind}"
        for kind in ("inference", "training")
    ]
    fewest, even = lengths["tokens"].min(), break_evens(lengths).set_index("side")["tokens, by time"].dropna()
    where = [
        f"at {side} x {side} from {fewest} tokens on, the fewest measured,"
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
        f"{widths['width'].min()}, the three cross-attentions take {usual['time_share']:.0%} of the encoder's time, "
        f"{usual['flop_share']:.0%} of its operations and {share:.0%} of the whole network's time, so that attention that "
        f"costs nothing would make the network {most:.2f} times as fast. Over widths up to {widths['width'].max()} "
        f"Linformer's network took {spans[0]} and {spans[1]}. Its attention is quicker "
        f"{' and '.join(where).rstrip(',') or 'at no length measured'}. So {verdict}."
    )


def save_timing(folder: str | os.PathLike, **tables: pd.DataFrame) -> None:
    """Write each table to `folder` as a CSV file of its name, and hardware, versions and commit to `timing.json`."""
    for name, table in tables.items():
        with atomic_write(Path(folder) / f"{name}.csv", "w") as file:
            table.to_csv(file, index=False)
    with atomic_write(Path(folder) / "timing.json", "w") as file:
        json.dump({"tables": list(tables), **provenance()}, file, indent=1)
