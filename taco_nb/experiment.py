"""An `Experiment` is everything that decides a result, in one place; an ablation is one line that replaces a field.

exp = baseline("sample", lmbda=0.004, epochs=2)
exp = exp.replace(captions="context")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from taco_nb.errors import SettingError
from taco_nb.files import data_root, short_path
from taco_nb.settings import (
    STRICT,
    Attention,
    Count,
    LinformerSharing,
    NotNegative,
    Positive,
    Precision,
    Seed,
    Sizes,
    TextLength,
    TextPooling,
    plain_errors,
)

if TYPE_CHECKING:
    from taco_nb.model import ModelConfig

ABLATIONS = ("captions", "attention", "text_pooling")
"""The settings that name an ablation. In a baseline they have their defaults."""
DEMO_SIZES = Sizes(N=48, M=96, groups=(8, 8, 16, 16, 48), text_dim=128, context_widths=(64, 48))
"""The sizes of the bundled codecs."""


@plain_errors
@dataclass(frozen=True, config=STRICT)
class Experiment:
    """This holds model, text, data, training and seed of one run; the defaults are the published baseline's.

    Raises `SettingError`, naming the field, for a value of the wrong type or out of range.
    """

    profile: Literal["paper", "sample"] = "paper"
    """The profile that the settings come from."""
    sizes: Sizes = Sizes()
    """The widths of the network."""
    init: StrictStr = ""
    """Weights to start from: a bundled codec's name, a run's folder or a checkpoint file; "" for random ones."""

    attention: Attention = "softmax"
    """The kind of attention in the adapter."""
    linformer_k: Count = 32
    """Linformer projects keys and values to this many positions."""
    linformer_sharing: LinformerSharing = "none"
    """Which projections of Linformer are one: none, E = F in each layer ("key-value"), or one for both Injectors
    ("layerwise")."""

    captions: Literal["published", "context", "constant"] = "published"
    """"published" captions come with a data set; "context" captions are paragraphs that describe and reason. "constant" is
    the negative control: the encoder reads one and the same sentence for every picture, while the loss keeps the captions
    that were published."""
    text_encoder: StrictStr = "ViT-B-32-quickgelu/openai"
    """A CLIP as "model/pretrained": one of open_clip's, or the bundled "mini/flickr8k". Its text half conditions the encoder,
    and J is measured in its space. "untrained-64" has no image half and means nothing."""
    text_tokens: Annotated[StrictInt, Field(ge=2, le=77)] = 38
    """How many positions of the text tower the adapter sees, padding included; CLIP has 77."""
    text_length: TextLength = "truncate"
    """"truncate" cuts captions at `text_tokens`; "windows" reads all of them, 77 tokens at a time."""
    text_pooling: TextPooling = "none"
    """"keywords" is the report's weighted sum over tokens; "keywords-tokens" keeps a weighted vector per token."""
    keyword_weight: Positive = 1.5
    """The weight of a word that matters, where other words weigh 1."""
    keyword_sources: StrictStr = "tfidf+en_core_web_sm"
    """What finds the words that matter: "tfidf", a spaCy model or "rules" for named entities, "llm", joined by "+"."""

    train_data: StrictStr = "coco"
    """"coco", "sample", a folder of images with its `captions.json`, or "shapes", where the loss weighs what is named."""
    crop: Annotated[StrictInt, Field(gt=0, multiple_of=64)] = 256
    """Side of the random training crops in pixels."""

    lmbda: Positive = 0.0004
    """Weight of the distortion: loss = lmbda * 255^2 * MSE + bpp + k_P * perceptual distance + k_J * J."""
    perceptual: Literal["lpips", "mini_distance"] = "lpips"
    """The perceptual distance: "lpips" (AlexNet, fed [0, 1] as the reference does), or "mini_distance", by the image half of
    the bundled CLIP."""
    k_P: NotNegative = 3.5
    """Weight of the perceptual distance; 0 leaves it out, and needs no network for it."""
    k_J: NotNegative = 0.0025
    """Weight of the joint image-text loss J; 0 leaves it out and needs no CLIP."""

    epochs: Count = 50
    batch_size: Count = 8
    optimizer: Literal["adam", "muon"] = "adam"
    """"adam" is the reference's; "muon" takes fewer steps to the same loss, each a tenth to a quarter longer."""
    learning_rate: Positive = 1e-4
    """The optimizer's highest learning rate; `schedule` says how it falls."""
    schedule: Literal["steps", "cosine", "constant"] = "steps"
    """"steps" falls to a tenth at 90 % and again at 96 % of the run, as the reference does; "cosine" rises for a short
    while and then falls to zero; "constant" rises and stays, for a trunk from which other runs branch off."""
    aux_learning_rate: Positive = 1e-3
    """The learning rate of the second optimizer, which fits the quantiles of z alone."""
    gradient_clip: Positive = 1.0
    """Largest allowed norm of the gradient."""
    precision: Precision = "float32"
    """"bfloat16" runs the transforms under autocast; the entropy model is always float32."""
    seed: Seed = 100

    def __post_init__(self) -> None:
        if self.text_length == "windows" and self.text_pooling != "none":
            raise SettingError('Keyword weights weigh one window: text_pooling needs text_length="truncate".')
        if self.captions == "constant" and (self.text_pooling, self.text_length) != ("none", "truncate"):
            raise SettingError(
                'captions="constant" leaves no words to weigh or to window: it needs text_pooling="none" and '
                'text_length="truncate".'
            )

    def replace(self, **changes: Any) -> Experiment:
        """Return a copy with some settings changed. Raises `SettingError` for one that does not exist or is not allowed."""
        return dataclasses.replace(self, **changes)

    def model_config(self) -> ModelConfig:
        """Return the network's settings."""
        from taco_nb.model import ModelConfig

        return ModelConfig(
            **vars(self.sizes),
            attention=self.attention,
            linformer_k=self.linformer_k,
            linformer_sharing=self.linformer_sharing,
            text_tokens=self.text_tokens,
            image_grid=self.crop // 8,
        )

    @property
    def dataset_captions(self) -> str:
        """The captions that a data set is opened with: "published" or "context"."""
        return "published" if self.captions == "constant" else self.captions

    @property
    def text_settings(self) -> dict[str, str]:
        """How the encoder's captions become text features, as `Conditioning` and `Codec` take it."""
        length = "constant" if self.captions == "constant" else self.text_length
        return {"text_length": length, "text_pooling": self.text_pooling}

    def diff(self, other: Experiment) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which the two differ, as {name: (here, there)}."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @property
    def ablations(self) -> dict[str, str]:
        """The settings among `ABLATIONS` that differ from the baseline's: {} in a baseline."""
        changed = Experiment().diff(self)
        return {name: changed[name][1] for name in ABLATIONS if name in changed}

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that change with any setting. A run's folder is named with them.

        Settings that have their defaults do not count, so that a setting which is new in the code renames no folder.
        """
        changed = {name: now for name, (_, now) in Experiment().diff(self).items()}
        return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:8]

    def __str__(self) -> str:
        """Return a line per setting."""
        settings = dataclasses.asdict(self)
        width = max(map(len, settings))
        return "\n".join(f"{name:{width}} = {value!r}" for name, value in settings.items())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """Return the experiment that `to_json` wrote. Settings that the text lacks have their defaults.

        Raises `SettingError` for text that is no experiment.
        """
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise SettingError(f"This is not an experiment's JSON: {error}.") from None
        if not isinstance(settings, dict):
            raise SettingError("This is not an experiment's JSON: it holds no object.")
        return cls(**settings)


def baseline(profile: str = "auto", *, data_dir: str | None = None, **changes: Any) -> Experiment:
    """Return the baseline that all ablations are compared with, in the given profile, with some settings changed.

    "paper" is TACO as published: MS-COCO, CLIP ViT-B/32, the paper-size model. "sample" is the same code on the bundled
    pictures: a small model, a small CLIP and its distance in place of CLIP and LPIPS, and training that starts from the
    trunk of the bundled codecs, whose learning rate has not fallen yet. "auto" chooses; see `choose_profile`.
    """
    profile, _ = choose_profile(profile, data_dir)
    if profile == "paper":
        return Experiment().replace(**changes)
    sample = Experiment(
        profile="sample", sizes=DEMO_SIZES, init="demo-trunk", text_encoder="mini/flickr8k",
        keyword_sources="tfidf+rules", train_data="sample", crop=128, lmbda=0.0067, perceptual="mini_distance", k_P=0.3,
        epochs=5, batch_size=4,
        optimizer="muon", learning_rate=1e-4, schedule="cosine",  # a few steps that leave unseen pictures better off
    )  # fmt: skip
    return sample.replace(**changes)


def choose_profile(profile: str = "auto", data_dir: str | None = None) -> tuple[str, str]:
    """Return the profile to use, and a sentence that says why, and how to get the other.

    "auto" is "paper" where a CUDA device and a prepared `coco` in the data folder are both there, else "sample".
    """
    if profile in ("paper", "sample"):
        return profile, f'Profile "{profile}", as asked for.'
    if profile != "auto":
        raise SettingError(f'profile must be "auto", "paper" or "sample", but is {profile!r}.')
    import torch

    coco = data_root(data_dir) / "coco"
    missing = [] if torch.cuda.is_available() else ["no CUDA device"]
    missing += [] if (coco / "annotations").is_dir() else [f"no MS-COCO in {short_path(coco)}"]
    if missing:
        return "sample", (
            f'Profile "sample", because there is {" and ".join(missing)}: the bundled pictures and a small model. '
            'profile="paper" asks for the full experiment, and `taco-nb fetch --profile paper` gets its data.'
        )
    return "paper", (
        'Profile "paper", because a CUDA device and MS-COCO are both here. '
        'profile="sample" runs in minutes on the bundled pictures.'
    )
