"""Claims about operations and time are judged here at the paper's size, by counting and by the clock of this machine.

Counts are PyTorch's, of the encoder on one picture of 256x256 pixels. Times are those of notebook 05 where it has run in the
profile `paper`, and else a few runs on this processor, softmax and Linformer in turn.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import pandas as pd
import torch

from taco_nb.audit.material import Finding, Material, found
from taco_nb.experiment import Experiment
from taco_nb.inspection import count_flops, encoder_flops
from taco_nb.model import ModelConfig
from taco_nb.timing import (
    ATTENTIONS,
    NOTABLE,
    ROOM,
    attention_run,
    attention_shares,
    encoder_run,
    exponent,
    time_in_turn,
)

SIDE = 256
TOKENS = (38, 154, 616)
"""The numbers of tokens over which growth is fitted. Each is four times the one before, or nearly."""
SQUARE = 1.5
"""An exponent above this is nearer to a square than to a line."""
LONGEST = 4096
"""The most tokens that notebook 05 times."""
PEAK = {"V100": 15.7e12, "GTX 1080 Ti": 11.3e12}
"""Operations per second in float32 by NVIDIA's data sheets, more than which no program gets."""
BACKWARD = 3
"""A step of training takes about three times the operations of its forward pass (Kaplan et al. 2020, Section 2.1)."""


def operations_are_quadratic(material: Material) -> Finding:
    """Count the three attentions' operations over the number of tokens, and fit the power with which they grow."""
    power = _power(material.paper_config)
    return found(power >= SQUARE, _grows("operations", power, TOKENS))


def linformer_is_linear(material: Material) -> Finding:
    """Count Linformer's operations as those of softmax attention are counted."""
    linear, softmax = (_power(replace(material.paper_config, attention=name)) for name in ATTENTIONS[::-1])
    return found(linear < SQUARE, f"{_grows('operations', linear, TOKENS)} Softmax's power is {softmax:.2f}.")


def time_is_quadratic(material: Material) -> Finding:
    """Time the three attentions over the number of tokens, and fit the power with which the time grows."""
    longest = _attention_times(material)
    power = exponent(list(longest), list(longest.values()))
    return found(power >= SQUARE, _grows("time", power, list(longest)))


def shortness_saves_operations(material: Material) -> Finding:
    """Count what 77 positions would cost in place of 38."""
    positions = material.stated["protocol"]["clip_max_tokens"]
    now, then = (_attention_operations(_at(material.paper_config, n)) for n in (38, positions))
    more = (then - now) / (_encoder_operations()[1])
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
    row = _shares(material)
    return found(
        row["time_share"] >= 0.5,
        f"The three attentions take {row['time_share']:.0%} of the encoder's time at 38 tokens and {SIDE}x{SIDE} pixels "
        f"({row['where']}).",
    )


def linformer_makes_the_encoder_faster(material: Material) -> Finding:
    """Time the encoder with either kind of attention, and ask for a notable saving."""
    row = _shares(material)
    return found(row["encoder_ratio"] <= 1 - NOTABLE, _compared(row))


def both_attentions_take_the_same_time(material: Material) -> Finding:
    """Time the encoder with either kind of attention, and ask for no notable difference."""
    row = _shares(material)
    return found(abs(row["encoder_ratio"] - 1) < NOTABLE, _compared(row))


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


def _power(config: ModelConfig) -> float:
    return exponent(TOKENS, [_attention_operations(_at(config, tokens)) for tokens in TOKENS])


def _grows(what: str, power: float, tokens: tuple[int, ...] | list[int]) -> str:
    return (
        f"From {tokens[0]} to {tokens[-1]} tokens the attentions' {what} grow{'s' * (what == 'time')} with the power "
        f"{power:.2f} of the length, where 1 is a line and 2 is a square. The other length is the picture's, and fixed."
    )


@lru_cache(maxsize=1)
def _timed(material: Material) -> tuple[pd.DataFrame, str]:
    """Return a length sweep at the paper's size and 256x256 pixels, and where it was timed."""
    for folder in sorted(material.folder.glob(f"timing-{Experiment().key}-*")):
        lengths = pd.read_csv(folder / "lengths.csv")
        if SIDE in lengths["side"].unique():
            return lengths[lengths["side"] == SIDE], f"by notebook 05, on {folder.name.rpartition('-')[2]}"
    rows = []
    for tokens in TOKENS:
        configs = {
            name: replace(_at(material.paper_config, tokens), attention=name) for name in ATTENTIONS
        }
        for part, make in (("attention", attention_run), ("encoder", encoder_run)):
            if part == "encoder" and tokens != TOKENS[0]:
                continue
            timed = time_in_turn({name: make(c, "cpu", SIDE) for name, c in configs.items()}, "cpu", 3)
            about = {"side": SIDE, "tokens": tokens, "part": part, "gflop": 0.0}
            rows += [{**about, "attention": name, **row} for name, row in timed.items()]
    return pd.DataFrame(rows), "on this processor"


def _shares(material: Material) -> dict[str, float | str]:
    lengths, where = _timed(material)
    usual = lengths[lengths["tokens"] == TOKENS[0]]
    return attention_shares(usual).iloc[0].to_dict() | {"where": where}


def _attention_times(material: Material) -> dict[int, float]:
    lengths = _timed(material)[0]
    softmax = lengths[(lengths["part"] == "attention") & (lengths["attention"] == "softmax")]
    return dict(zip(softmax["tokens"], softmax["median_ms"]))


def _compared(row: dict[str, float | str]) -> str:
    return (
        f"With Linformer the encoder takes {row['encoder_ratio']:.2f} times as long ({row['where']}), where we call a tenth "
        f"notable. The attentions have {row['time_share']:.0%} of its time, so the most that any could save."
    )
