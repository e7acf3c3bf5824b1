"""Claims about operations and time are judged here at the paper's size, by counting and by the clock of this machine.

Counts are PyTorch's, of the encoder on one picture of 256x256 pixels. Times are those of notebook 05 where it has run in the
profile `paper`, and else the processor's time in a few runs here, softmax and Linformer in turn. Other programs on a busy
machine hardly add to the processor's time, as they would to the clock's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from time import process_time

import pandas as pd
import torch

from taco_nb.audit.material import Finding, Material, found
from taco_nb.experiment import Experiment
from taco_nb.inspection import count_flops, encoder_flops
from taco_nb.model import ModelConfig
from taco_nb.timing import ATTENTIONS, NOTABLE, ROOM, attention_run, encoder_run, exponent

SIDE = 256
TOKENS = (38, 154, 616)
"""The numbers of tokens over which growth is looked at. Each is four times the one before, or nearly."""
SQUARE = 1.5
"""A power of the length above this is nearer to a square than to a line."""
SLOPES = 2
"""On a line each token adds as much as the one before; on a square, tokens from 154 to 616 add four times what those from 38
to 154 do. A ratio above this is nearer to a square."""
REPEATS = 3
LONGEST = 4096
"""The most tokens that notebook 05 times."""
PEAK = {"V100": 15.7e12, "GTX 1080 Ti": 11.3e12}
"""Operations per second in float32 by NVIDIA's data sheets, more than which no program gets."""
BACKWARD = 3
"""A step of training takes about three times the operations of its forward pass (Kaplan et al. 2020, Section 2.1)."""


def operations_are_quadratic(material: Material) -> Finding:
    """Count the three attentions' operations at several numbers of tokens, and see whether later tokens add more."""
    ratio, said = _slopes(material.paper_config)
    return found(ratio >= SLOPES, f"{said} The other length is the picture's, and fixed.")


def linformer_is_linear(material: Material) -> Finding:
    """Count Linformer's operations as those of softmax attention are counted."""
    ratio, said = _slopes(replace(material.paper_config, attention="linformer"))
    return found(ratio < SLOPES, f"{said} With softmax: {_slopes(material.paper_config)[1]}")


def time_is_quadratic(material: Material) -> Finding:
    """Time the three attentions over the number of tokens, and fit the power with which the time grows."""
    times, where = _timed(material)
    softmax = {n: time for (part, kind, n), time in times.items() if (part, kind) == ("attention", "softmax")}
    power = exponent(list(softmax), list(softmax.values()))
    listed = ", ".join(f"{time:.0f} ms with {tokens}" for tokens, time in softmax.items())
    return found(
        power >= SQUARE,
        f"The three attentions take {listed} tokens ({where}). That is the power {power:.2f} of the length; 1 is a line "
        "and 2 a square.",
    )


def shortness_saves_operations(material: Material) -> Finding:
    """Count what 77 positions would cost in place of 38."""
    positions = material.stated["protocol"]["clip_max_tokens"]
    now, then = (_attention_operations(_at(material.paper_config, n)) for n in (38, positions))
    more = (then - now) / _encoder_operations()[1]
    return found(
        more >= NOTABLE,
        f"With {positions} positions in place of 38 the encoder would take {more:.1%} more operations. (We call a saving "
        f"notable from {NOTABLE:.0%} on.)",
    )


def long_captions_become_significant(material: Material) -> Finding:
    """Find the number of tokens from which on the attentions are a fifth of the encoder's operations."""
    first, last = (_attention_operations(_at(material.paper_config, n)) for n in (TOKENS[0], TOKENS[-1]))
    slope = (last - first) / (TOKENS[-1] - TOKENS[0])
    attention, encoder = _encoder_operations()
    share = 1 - 1 / ROOM
    # Solve a / (a + rest) = share for the attentions' operations a, and follow the line that a grows on to there.
    enough = TOKENS[0] + (share / (1 - share) * (encoder - attention) - attention) / slope
    return found(
        enough <= LONGEST,
        f"At 38 tokens the attentions have {attention / encoder:.1%} of the encoder's operations. They reach {share:.0%} at "
        f"about {enough:.0f} tokens, and grow with the text's length, not with its square.",
    )


def attention_is_a_small_share(material: Material) -> Finding:
    """Count the operations of the whole encoder, and of its three attentions with their linear layers."""
    attention, encoder = _encoder_operations()
    return found(
        attention < encoder / 2,
        f"The three attentions, their linear layers included, have {attention / 1e9:.2f} of the encoder's "
        f"{encoder / 1e9:.1f} GFLOP, which is {attention / encoder:.1%}.",
    )


def width_tells_the_two_apart(material: Material) -> Finding:
    """Count both kinds of attention over the width of their inputs, as the report varied it."""
    ratios = []
    for factor in (1, 2, 4):
        wide = replace(material.paper_config, N=factor * material.paper_config.N)
        counts = {name: _attention_operations(replace(wide, attention=name)) for name in ATTENTIONS}
        ratios.append(counts["linformer"] / counts["softmax"])
    return found(
        max(ratios) - min(ratios) >= NOTABLE and ratios[-1] < 1 - NOTABLE,
        f"At 1, 2 and 4 times the width Linformer has {', '.join(f'{ratio:.2f}' for ratio in ratios)} times softmax's "
        "operations. What separates the two is the length of the text, which this sweep leaves at 38 tokens.",
    )


def attention_takes_most_of_the_time(material: Material) -> Finding:
    """Time the three attentions and the whole encoder."""
    share, _, where = _shares(material)
    return found(
        share >= 0.5,
        f"The three attentions take {share:.0%} of the encoder's time at 38 tokens and {SIDE}x{SIDE} pixels ({where}).",
    )


def linformer_makes_the_encoder_faster(material: Material) -> Finding:
    """Time the encoder with either kind of attention, and ask for a notable saving."""
    share, ratio, where = _shares(material)
    return found(ratio <= 1 - NOTABLE, _compared(share, ratio, where))


def both_attentions_take_the_same_time(material: Material) -> Finding:
    """Time the encoder with either kind of attention, and ask for no notable difference."""
    share, ratio, where = _shares(material)
    return found(abs(ratio - 1) < NOTABLE, _compared(share, ratio, where))


def an_epoch_fits_the_gpus(material: Material) -> Finding:
    """Compare an epoch's operations in 100 minutes with what two of the report's GPUs compute at most."""
    net, small = material.paper_net, 64
    pair = torch.zeros(1, 3, small, small), torch.zeros(1, 38, net.config.text_dim)
    with torch.inference_mode():
        forward = count_flops(partial(net, *pair))["Global"] * (SIDE / small) ** 2
    minutes = material.stated["keywords"]["minutes_per_epoch"]
    pairs = 5 * int(material.stated["protocol"]["train"].split("split, ")[1].split(" ")[0].replace(",", ""))
    needed = BACKWARD * forward * pairs / (60 * minutes)
    shares = {name: needed / (2 * peak) for name, peak in PEAK.items()}
    said = " and ".join(f"{share:.0%} of what two {name} reach at most" for name, share in shares.items())
    return found(
        min(shares.values()) < 1,
        f"{pairs:,} pairs in {minutes} minutes are {pairs / 60 / minutes:.0f} a second, or {needed / 1e12:.0f} TFLOP/s for "
        f"the codec alone: {said}, in float32. CLIP and AlexNet in the loss come on top.",
    )


# Counting and timing --------------------------------------------------------------------------------------------------


def _at(config: ModelConfig, tokens: int) -> ModelConfig:
    return replace(config, text_tokens=tokens)


@lru_cache(maxsize=32)
def _attention_operations(config: ModelConfig) -> int:
    return count_flops(attention_run(config, "cpu", SIDE))["Global"]


@lru_cache(maxsize=1)
def _encoder_operations() -> tuple[float, float]:
    """Return the operations of the paper-size encoder's attentions, and of all of it."""
    counted = encoder_flops(Experiment(), SIDE)
    return 1e9 * counted["attention, GFLOP"], 1e9 * counted["encoder, GFLOP"]


def _slopes(config: ModelConfig) -> tuple[float, str]:
    """Return how many times as much a later token adds as an earlier one, and what each adds."""
    operations = [_attention_operations(_at(config, tokens)) for tokens in TOKENS]
    steps = zip(pairwise(TOKENS), pairwise(operations))
    added = [(after - before) / (last - first) for (first, last), (before, after) in steps]
    return added[1] / added[0], (
        f"Each token from {TOKENS[0]} to {TOKENS[1]} adds {added[0] / 1e6:.2f} million operations, and each from {TOKENS[1]} "
        f"to {TOKENS[2]} {added[1] / 1e6:.2f} million."
    )


@lru_cache(maxsize=1)
def _timed(material: Material) -> tuple[dict[tuple[str, str, int], float], str]:
    """Return milliseconds by (part, attention, tokens), where a part is "attention" or "encoder", and who timed them."""
    for folder in sorted(material.folder.glob(f"timing-{Experiment().key}-*")):
        lengths = pd.read_csv(folder / "lengths.csv")
        rows = lengths[lengths["side"] == SIDE].itertuples()
        times = {(row.part, row.attention, row.tokens): row.median_ms for row in rows}
        if times:
            return times, f"by notebook 05, on {folder.name.rpartition('-')[2]}"
    times = {}
    for part, make, tokens in (
        ("encoder", encoder_run, TOKENS[0]),
        *(("attention", attention_run, n) for n in TOKENS),
    ):
        # only where Linformer is compared with softmax is it timed
        names = ATTENTIONS if part == "encoder" else ATTENTIONS[:1]
        configs = {name: replace(_at(material.paper_config, tokens), attention=name) for name in names}
        spent = _least_times({name: make(config, "cpu", SIDE) for name, config in configs.items()})
        times |= {(part, name, tokens): time for name, time in spent.items()}
    return times, "processor's time, this machine"


def _least_times(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least milliseconds of processor's time that each of the runs takes, of `REPEATS` in turn after a first."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + REPEATS):
        for name, run in runs.items():
            start = process_time()
            run()
            spent[name].append(1e3 * (process_time() - start))
    return {name: min(times[1:]) for name, times in spent.items()}


def _shares(material: Material) -> tuple[float, float, str]:
    """Return attention's share of the encoder's time, and the encoder's time with Linformer over that with softmax."""
    times, where = _timed(material)
    usual = {(part, name): time for (part, name, tokens), time in times.items() if tokens == TOKENS[0]}
    encoder = usual["encoder", "softmax"]
    return usual["attention", "softmax"] / encoder, usual["encoder", "linformer"] / encoder, where


def _compared(share: float, ratio: float, where: str) -> str:
    return (
        f"With Linformer the encoder takes {ratio:.2f} times as long ({where}), where we call a tenth notable. The "
        f"attentions have {share:.0%} of its time, so no kind of attention could save more."
    )
