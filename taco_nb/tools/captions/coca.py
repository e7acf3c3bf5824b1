"""Open_clip's CoCa (Yu et al. 2022, arXiv:2205.01917) writes captions on this machine: free, short, without reasoning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path

import open_clip
import pydantic.dataclasses
import torch
from PIL import Image
from tqdm.auto import tqdm

from taco_nb.data import CaptionedImages
from taco_nb.errors import CheckpointError, SettingError
from taco_nb.pretrained import OpenClip
from taco_nb.processes import check_device
from taco_nb.settings import STRICT, Count, Device, plain_errors
from taco_nb.text.answers import Answer, Question
from taco_nb.text.tokens import clip_tokenizer
from taco_nb.tools.captions.captioner import CaptionCache, Captioner, Picture, unanswered
from taco_nb.tools.captions.service import Temperature

TOP_K = 50
"""Words are drawn from so many of the likeliest (Fan et al. 2018, arXiv:1805.04833): the rest is mostly noise."""


@plain_errors
@pydantic.dataclasses.dataclass(kw_only=True, config=STRICT)
class CoCaCaptioner(Captioner):
    """A CoCa model of open_clip, fine-tuned on MS-COCO, writes captions; nothing is paid, or leaves the machine.

    It sees the image's centre square at 224x224 and takes no prompt. Chance is seeded by the image, the settings and the
    caption's index: up to rounding, a caption does not depend on the other images of its batch.
    Raises `SettingError` for an unknown model or a setting out of range, `MissingWeightsError` where the weights are
    not on this machine (`taco-nb fetch` gets them), `CheckpointError` where they are damaged or another model's.
    """

    model: str = "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k"
    """"model/pretrained" as open_clip lists them; the part after the slash may also be a file of weights."""
    temperature: Temperature = 1.0
    """0 takes the likeliest word each time."""
    batch_size: Count = 8
    """Images at a time."""
    device: Device = "auto"
    """"auto" (a GPU where there is one), "cpu" or "cuda"."""

    @property
    def question(self) -> Question:
        return Question(self.model, "", self.temperature)

    def _ask(self, dataset: CaptionedImages, pictures: list[Picture], cache: CaptionCache) -> dict[str, str]:
        if self.temperature == 0 and len(pictures[0].keys) > 1:
            raise SettingError("At temperature 0 all captions of an image would be the same: raise it.")
        check_device(self.device)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        model, preprocess = load_coca(self.model, device)
        left = unanswered(pictures, cache)
        with (
            torch.inference_mode(),
            tqdm(total=len(left), desc=f"Captions of {dataset.name}", unit="caption") as bar,
        ):
            of_pictures = [list(keys) for _, keys in groupby(left, left.get)]
            for start in range(0, len(of_pictures), self.batch_size):
                batch = of_pictures[start : start + self.batch_size]
                images = [preprocess(dataset[left[keys[0]].row].image) for keys in batch]
                embedded = model(torch.stack(images).to(device))["image_embs"]
                # Each image is looked at once, and its embedding is repeated for each of its captions.
                rows = [row for row, keys in enumerate(batch) for _ in keys]
                keys = list(chain.from_iterable(batch))
                cache.add(zip(keys, write_captions(model, embedded[rows], keys, self.temperature)))
                bar.update(len(keys))
        return {}


def write_captions(
    model: torch.nn.Module, image_embs: torch.Tensor, keys: list[str], temperature: float
) -> list[Answer]:
    """Write a caption for each row of `image_embs` (B, tokens, width), word by word, with chance seeded by its key.

    open_clip's own `generate` is no help: it needs a beam search that transformers 4.57 no longer has.
    """
    tokenizer, pad = clip_tokenizer(), model.pad_id
    # Seven bytes, since a seed must fit 64 bits with a sign.
    digests = [hashlib.sha256(key.encode()).digest()[:7] for key in keys]
    generators = [torch.Generator().manual_seed(int.from_bytes(digest, "big")) for digest in digests]
    ids = torch.full((len(keys), 1), tokenizer.sot_token_id, device=image_embs.device)
    done = torch.zeros(len(keys), dtype=torch.bool)
    while not done.all() and ids.shape[1] < model.context_length:
        output = model(None, ids, image_latent=image_embs, image_embs=image_embs, output_labels=False)
        chance = torch.stack([torch.rand((), generator=generator) for generator in generators])
        # A caption that is done goes on as padding, beside those that are not.
        following = draw(output["logits"][:, -1].float().cpu(), temperature, chance).masked_fill(done, pad)
        ids = torch.cat([ids, following[:, None].to(ids.device)], dim=1)
        done |= following == tokenizer.eot_token_id
    answers = []
    for row, whole in zip(ids[:, 1:].tolist(), done.tolist()):
        words = row[: row.index(tokenizer.eot_token_id)] if whole else row
        text = tokenizer.decode(words).strip()
        failure = None if whole and text else "empty" if whole else f"cut off after {len(words)} tokens"
        answers.append(Answer(text, failure, output_tokens=len(words)))
    return answers


def draw(logits: torch.Tensor, temperature: float, chance: torch.Tensor) -> torch.Tensor:
    """Return a token per row of logits (B, vocabulary): the likeliest at temperature 0, else drawn by chance in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    likeliest, tokens = logits.topk(min(TOP_K, logits.shape[-1]))
    # The drawn token is the first at which the summed probabilities exceed the chance.
    reached = (likeliest / temperature).softmax(-1).cumsum(-1)
    place = (reached <= chance[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, place)[:, 0]


@lru_cache(maxsize=1)
def load_coca(name: str, device: str) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor]]:
    """Return a frozen CoCa and what makes its input of an image; it is loaded once per process."""
    model, _, pretrained = name.partition("/")
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else {}
    if "multimodal_cfg" not in config:
        known = [f"{known}/{tag}" for known, tag in open_clip.list_pretrained() if known.startswith("coca")]
        raise SettingError(f"{name!r} is no CoCa model of open_clip. Known: {', '.join(known)}.")
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    path = OpenClip(name).require() if tag else Path(pretrained).expanduser()
    if not tag and not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise SettingError(
            f"{pretrained!r} is neither a pretrained tag of {model} ({tags}) nor a file of weights."
        )
    try:
        with torch.random.fork_rng(devices=[]):  # open_clip draws random weights before it loads others
            module, preprocess = open_clip.create_model_from_pretrained(model, pretrained=str(path))
    except Exception as error:  # torch, pickle and safetensors each have errors of their own for a bad file
        raise CheckpointError(
            f"The weights {path} cannot be loaded into {model}: the file is damaged or belongs to another model. "
            "Delete it and fetch it again, or name the model that it was made for."
        ) from error
    return module.requires_grad_(False).eval().to(device), preprocess
