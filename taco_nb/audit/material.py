"""This module holds what claims are judged by: the report's figures, bundled captions, pictures and codecs, and runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from taco_nb.checkpoint import bundled_codecs
from taco_nb.codec import Codec, load
from taco_nb.data import datasets
from taco_nb.data.captioned import CaptionedImages
from taco_nb.data.images import pixels
from taco_nb.errors import DataError
from taco_nb.experiment import Experiment
from taco_nb.files import bundled
from taco_nb.metrics.joint_space import CmmdEmbedding
from taco_nb.model import TACO, ModelConfig
from taco_nb.pretrained import MINI
from taco_nb.text.clip import clip_model
from taco_nb.text.long import surviving
from taco_nb.verdicts import NOT_REPRODUCED, REPRODUCED, verdicts

MOST = 1000
"""At most so many pictures of a data set have their captions counted. MS-COCO's restval has 30,504."""
JOINT_SPACE = MINI.name
"""The bundled CLIP, in whose space captions and pictures are compared."""


class Finding(NamedTuple):
    """This is what became of a claim, and the evidence for it."""

    verdict: str
    evidence: str


def found(holds: bool, evidence: str) -> Finding:
    """Return the finding that a claim holds, or that it does not."""
    return Finding(REPRODUCED if holds else NOT_REPRODUCED, evidence)


class Material:
    """Everything that is read or computed for more than one claim. Each part is made when it is first asked for.

    `runs` is the table that `taco_nb.report.collect` returns, and `folder` is where these runs and those of notebook 05 lie.
    """

    def __init__(
        self,
        runs: pd.DataFrame,
        folder: str | os.PathLike,
        data_dir: str | os.PathLike | None = None,
        seed: int = 0,
    ):
        self.runs, self.folder, self.data_dir, self.seed = runs, Path(folder), data_dir, seed

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The figures of report.json."""
        return json.loads(bundled("reference/report.json", self.data_dir).read_text(encoding="utf-8"))

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """The verdicts of the runs on the published figures."""
        return verdicts(self.runs, data_dir=self.data_dir, seed=self.seed)

    # The network ------------------------------------------------------------------------------------------------------

    @cached_property
    def paper_config(self) -> ModelConfig:
        """The paper-size network's settings, for pictures of 256x256 pixels."""
        return Experiment().model_config()

    @cached_property
    def paper_net(self) -> TACO:
        """The paper-size network with random weights, the same in each run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TACO(self.paper_config).eval()

    @cached_property
    def codec(self) -> Codec:
        """A bundled codec, a baseline where there is one: the first by name that cuts its captions."""
        known = bundled_codecs(self.data_dir)
        cutting = [name for name, exp in known.items() if exp.text_length == "truncate"]
        return load(min(cutting, key=lambda name: len(known[name].ablations)), data_dir=self.data_dir)

    # Pictures and captions --------------------------------------------------------------------------------------------

    def here(self, *names: str, captions: str = "published") -> list[CaptionedImages]:
        """Return those of the data sets that are on this machine."""
        there = []
        for name in names:
            with suppress(DataError):
                there += datasets(name, data_dir=self.data_dir, captions=captions)
        return there

    @cached_property
    def captions(self) -> list[str]:
        """The captions of the evaluation sets here, of at most `MOST` pictures each, and of the sample, which are our own."""
        sets = self.here("kodak", "clic", "coco", "sample", "sample-train")
        return [caption for of in sets for i in range(min(MOST, len(of))) for caption in of.captions(i)]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The bundled paragraphs with context, which were written for this project and not by GPT-4o."""
        sets = self.here("kodak", "sample", "sample-train", captions="context")
        return [of.captions(i)[0] for of in sets for i in range(len(of))]

    def words_within(self, positions: int) -> float:
        """Return how many words of a paragraph so many positions of CLIP hold, as a mean over those that are longer."""
        table = surviving(self.paragraphs, positions)
        longer = table[table["tokens"] > positions]
        return float((longer["words"] * longer["words_kept"]).mean())

    @cached_property
    def kodak(self) -> CaptionedImages:
        return datasets("kodak", data_dir=self.data_dir)[0]

    @cached_property
    def kodak_vectors(self) -> Tensor:
        """Kodak's pictures in the joint space, a unit vector each."""
        return self.picture_vectors(self.kodak)

    def picture_vectors(self, dataset: CaptionedImages) -> Tensor:
        """Return a unit vector (n, d) in the joint space for each picture of a data set."""
        embed = CmmdEmbedding(clip_model(JOINT_SPACE)[0])
        return torch.cat([embed(pixels(dataset[i].image)[None]) for i in range(len(dataset))])

    @torch.inference_mode()
    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Return a unit vector (n, d) in the joint space for each text, of which 77 tokens are read."""
        clip, tokenize = clip_model(JOINT_SPACE)
        return normalize(clip.encode_text(tokenize(list(texts))).float(), dim=-1)
