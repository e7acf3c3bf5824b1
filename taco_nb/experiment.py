"""An `Experiment` is everything that decides a result, in one place; an ablation is one line that replaces a field.

exp = baseline("sample", lmbda=0.004, epochs=2)
exp = exp.replace(captions="context")
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taco_nb.errors import SettingError
from taco_nb.files import data_root, short_path

if TYPE_CHECKING:
    from taco_nb.model import ModelConfig

PAPER_SIZES = {
    "N": 192, "M": 320, "groups": (16, 16, 32, 64, 192), "text_dim": 512, "heads": 8, "context_widths": (224, 128),
}  # fmt: skip
DEMO_SIZES = {
    "N": 48, "M": 96, "groups": (8, 8, 16, 16, 48), "text_dim": 64, "heads": 8, "context_widths": (64, 48),
}  # fmt: skip

SWITCHES = {
    "captions": "context",
    "attention": "linformer",
    "text_pooling": None,
}
"""The settings that name an ablation, each with its value there. None: any but "none", by its own name."""
CHOICES = {
    "profile": ("paper", "sample"),
    "attention": ("softmax", "linformer"),
    "linformer_sharing": ("none", "key-value", "layerwise"),
    "captions": ("published", "context"),
    "text_length": ("truncate", "windows"),
    "text_pooling": ("none", "keywords", "keywords-tokens"),
    "precision": ("float32", "bfloat16"),
    "optimizer": ("adam", "muon"),
    "schedule": ("steps", "cosine"),
}


@dataclass(frozen=True)
class Experiment:
    """Model, text, data, training and seed of one run; the defaults are the published baseline's.

    Raises `SettingError`, naming the field, for a value of the wrong type or out of range.
    """

    profile: str = "paper"
    """Where the settings come from: "paper" or "sample"."""
    sizes: dict[str, Any] = dataclasses.field(default_factory=PAPER_SIZES.copy)
    """The widths in `taco_nb.model.ModelConfig`."""
    init: str = ""
    """Weights to start from: a bundled codec's name, a run's folder or a checkpoint file; "" for random ones. "demo" means,
    of the bundled codecs as wide as this one, that which was trained with the same ablation, if any was, at the nearest
    lambda."""

    attention: str = "softmax"
    """Of the adapter: "softmax" or "linformer"."""
    linformer_k: int = 32
    """To how many positions Linformer projects keys and values."""
    linformer_sharing: str = "none"
    """What shares a projection of Linformer: "none", "key-value" or "layerwise"."""

    captions: str = "published"
    """"published", those that come with a data set, or "context", paragraphs that describe and reason."""
    text_encoder: str = "ViT-B-32-quickgelu/openai"
    """An open_clip text tower as "model/pretrained", or "untrained-64"."""
    text_tokens: int = 38
    """Positions of the text tower that the adapter sees, 2 to 77, padding included."""
    text_length: str = "truncate"
    """"truncate" cuts captions at `text_tokens`; "windows" reads all of them, 77 tokens at a time."""
    text_pooling: str = "none"
    """"none"; "keywords", the report's weighted sum over tokens; or "keywords-tokens", a weighted vector per token."""
    keyword_weight: float = 1.5
    """Of a word that matters, where other words weigh 1."""
    keyword_sources: str = "tfidf+en_core_web_sm"
    """What finds the words that matter: "tfidf", a spaCy model or "rules" for named entities, "llm", joined by "+"."""

    train_data: str = "coco"
    """"coco", "sample", or a folder of images with its `captions.json`."""
    crop: int = 256
    """Side of the random training crops in pixels, a multiple of 64."""

    lmbda: float = 0.0004
    """Weight of the distortion: loss = lmbda * 255^2 * MSE + bpp + k_P * LPIPS + k_J * J."""
    k_P: float = 3.5
    """Weight of LPIPS (AlexNet, fed [0, 1] as the reference does); 0 leaves it out, and needs no weights of it."""
    k_J: float = 0.0025
    """Weight of the joint image-text loss J; 0 leaves it out, and needs no CLIP."""

    epochs: int = 50
    batch_size: int = 8
    optimizer: str = "adam"
    """"adam" as the reference; or "muon", which takes fewer steps to the same loss, each a tenth to a quarter longer."""
    learning_rate: float = 1e-4
    """Of the optimizer at its highest; `schedule` says how it falls."""
    schedule: str = "steps"
    """"steps", to a tenth at 90 % and 96 % of the run as the reference; or "cosine", a short rise, then down to zero."""
    aux_learning_rate: float = 1e-3
    """Of the optimizer of z's quantiles alone."""
    gradient_clip: float = 1.0
    """Largest allowed norm of the gradient."""
    precision: str = "float32"
    """"float32", or "bfloat16" for the transforms under autocast; the entropy model is always float32."""
    seed: int = 100

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), field.type
            if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif not _is(value, wanted):
                raise SettingError(f"{field.name} must be {_WORDS[wanted]}, but is {value!r}.")
        self._check_sizes()
        for name in ("lmbda", "learning_rate", "aux_learning_rate", "gradient_clip", "keyword_weight"):
            self._check(name, 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("k_P", "k_J"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "0 or above")
        for name in ("epochs", "batch_size", "linformer_k"):
            self._check(name, getattr(self, name) >= 1, "1 or above")
        self._check("seed", 0 <= self.seed < 1 << 32, "from 0 to 2^32 - 1")
        self._check("text_tokens", 2 <= self.text_tokens <= 77, "from 2 to 77, CLIP's limit")
        self._check("crop", self.crop >= 64 and self.crop % 64 == 0, "a multiple of 64")
        if self.text_length == "windows" and self.text_pooling != "none":
            raise SettingError('Keyword weights weigh one window: text_pooling needs text_length="truncate".')
        for name, choices in CHOICES.items():
            self._check(
                name, getattr(self, name) in choices, " or ".join(f'"{choice}"' for choice in choices)
            )

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise SettingError(f"{name} must be {wanted}, but is {getattr(self, name)!r}.")

    def _check_sizes(self) -> None:
        """Make lists tuples, and check names and types; what fits together is `ModelConfig`'s to say."""
        check_names(self.sizes, list(PAPER_SIZES), "sizes have no")
        object.__setattr__(
            self, "sizes", {k: tuple(v) if isinstance(v, list) else v for k, v in self.sizes.items()}
        )
        for name, value in self.sizes.items():
            if type(value) is not type(PAPER_SIZES[name]):
                raise SettingError(f"sizes: {name} must be like {PAPER_SIZES[name]!r}, but is {value!r}.")

    def replace(self, **changes: Any) -> Experiment:
        """A copy with some fields changed; raises `SettingError` for a field that does not exist."""
        check_names(
            changes, [field.name for field in dataclasses.fields(self)], "an Experiment has no setting"
        )
        return dataclasses.replace(self, **changes)

    def model_config(self) -> ModelConfig:
        """The network's settings. Raises `SettingError` where sizes do not fit together."""
        from taco_nb.model import ModelConfig

        return ModelConfig(
            **self.sizes,
            attention=self.attention,
            linformer_k=self.linformer_k,
            linformer_sharing=self.linformer_sharing,
            text_tokens=self.text_tokens,
            image_grid=self.crop // 8,
        )

    def diff(self, other: Experiment) -> dict[str, tuple[Any, Any]]:
        """The fields in which the two differ: {name: (here, there)}."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @property
    def ablations(self) -> dict[str, str]:
        """The settings of `SWITCHES` that differ from the baseline's: {} in a baseline."""
        return {name: now for name, (_, now) in Experiment().diff(self).items() if name in SWITCHES}

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that change with any setting: the name of a run's folder."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:8]

    def __str__(self) -> str:
        """A line per setting."""
        settings = dataclasses.asdict(self)
        width = max(map(len, settings))
        return "\n".join(f"{name:{width}} = {value!r}" for name, value in settings.items())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Experiment:
        """The inverse of `to_json`; raises `SettingError` for text that is no experiment."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise SettingError(f"This is not an experiment's JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise SettingError("This is not an experiment's JSON: it holds no object.")
        return cls().replace(**fields)


def baseline(profile: str = "auto", *, data_dir: str | None = None, **changes: Any) -> Experiment:
    """The baseline that all ablations are compared with, in the given profile, with some settings changed.

    "paper" is TACO as published: MS-COCO, CLIP ViT-B/32, the paper-size model. "sample" is the same code on the bundled
    pictures: a small model that starts from the bundled codec, an untrained text tower, and a loss without LPIPS and J,
    whose networks are downloads. "auto" chooses; see `choose_profile`.
    """
    profile, _ = choose_profile(profile, data_dir)
    if profile == "paper":
        return Experiment().replace(**changes)
    sample = Experiment(
        profile="sample", sizes=DEMO_SIZES, init="demo", text_encoder="untrained-64",
        keyword_sources="tfidf+rules", train_data="sample", crop=128, lmbda=0.0067, k_P=0.0, k_J=0.0, epochs=5, batch_size=4,
        learning_rate=2e-5,  # the paper's undoes in a few steps some of what the bundled codec has learned
    )  # fmt: skip
    return sample.replace(**changes)


def choose_profile(profile: str = "auto", data_dir: str | None = None) -> tuple[str, str]:
    """The profile to use, and a sentence that says why and how to get the other.

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


def check_names(given: Any, known: list[str], complaint: str) -> None:
    """Raise `SettingError` for the first of the given names that is not known, and name the closest that is."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
            raise SettingError(f"{complaint} {name!r}.{hint}")


_WORDS = {"str": "text", "int": "a whole number", "float": "a number", "dict[str, Any]": "a dictionary"}


def _is(value: Any, wanted: str) -> bool:
    types = {"str": str, "int": int, "float": float, "dict[str, Any]": dict}
    return isinstance(value, types[wanted]) and not isinstance(value, bool)
