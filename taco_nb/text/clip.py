"""The frozen CLIP text tower whose hidden states condition TACO (Lee et al., ICML 2024), on open_clip's modules.

The sequence of a caption is start-of-text, its words, end-of-text, then padding up to `length` positions:

    position   0      1    2    3     4      5      6    ...
    id         49406  a    red  barn  49407  49407  49407
    mask       True   True True True  True   False  False      True = a real token

Attention is causal, and padding is hidden from every position. The states of the padded positions are returned all the
same, since TACO's adapter attends to them too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.pretrained import OpenClip

if TYPE_CHECKING:
    from open_clip import SimpleTokenizer

CLIP_LENGTH = 77  # positions that CLIP was trained with
UNTRAINED_SEED = 100


class TextTower:
    """A frozen CLIP text transformer: captions in, one hidden state per position out, as TACO conditions on them.

    The states are those after the final LayerNorm, before any projection: `last_hidden_state` of transformers'
    `CLIPTextModel` given the attention mask. Deliberately no `nn.Module`, so that a tower never slips into the
    checkpoint or the optimizer of the codec beside it.

    Args:
        module: an open_clip `CLIP` or `TextTransformer`; only its text half is used. Frozen in place.
        name: what to call it where it is shown.
        length: positions per caption, 2 up to the tower's own limit (77 for CLIP). Longer captions are cut, keeping
            the end-of-text token last.
        trained: False for random weights; `repr` then says so.

    Attributes:
        dim: width of a hidden state.

    Raises:
        SettingError: `length` is no such number.
    """

    def __init__(self, module: nn.Module, name: str, length: int, trained: bool) -> None:
        _check_length(length, name, longest=len(module.positional_embedding))
        self.module = module.requires_grad_(False).eval()
        self.name = name
        self.length = length
        self.trained = trained
        self.dim: int = module.token_embedding.embedding_dim

    def __repr__(self) -> str:
        weights = "trained" if self.trained else "untrained, fixed random weights"
        return f"TextTower({self.name}: {weights}, {self.length} positions of {self.dim})"

    @property
    def device(self) -> torch.device:
        """Where the weights lie, and so where hidden states are computed and returned."""
        return self.module.token_embedding.weight.device

    def tokenize(self, captions: str | Iterable[str]) -> tuple[Tensor, Tensor]:
        """Cut captions into CLIP's byte pairs, padded with the end-of-text id as the reference's tokenizer pads.

        The text is cleaned as OpenAI cleaned CLIP's training captions: ftfy (so curly quotes become straight, ligatures
        and full-width letters plain, control characters vanish), HTML entities resolved, lower case. transformers'
        `CLIPTokenizer` leaves the first two out; on captions without such characters both give the same ids.

        Args:
            captions: several captions, or a single string, which counts as one caption.

        Returns:
            ids (B, length) int64 and mask (B, length) bool, True at start-of-text, words and end-of-text; on the CPU.

        Raises:
            SettingError: there is no caption, or one is not a string.
        """
        captions = _check_captions(captions)
        tokenizer = _tokenizer()
        ids = torch.full((len(captions), self.length), tokenizer.eot_token_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, caption in enumerate(captions):
            sequence = [tokenizer.sot_token_id, *tokenizer.encode(caption)[: self.length - 2]]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence) + 1] = True
        return ids, mask

    def spans(self, caption: str) -> list[tuple[int, int] | None]:
        """Which characters of a caption each position spells, so that what is known of words can be said of tokens.

        Returns:
            (start, end) per position, `caption[start:end]` in the caption as it was given. A word in several byte
            pairs has a range for each; pairs that share a character (an emoji, a CJK character) all name it whole.
            Start-of-text and end-of-text spell nothing: (0, 0) and (n, n). Padding: None.

        Raises:
            SettingError: the caption is not a string.
        """
        (caption,) = _check_captions([caption])
        tokenizer = _tokenizer()
        cleaned = "".join(tokenizer.clean_fn(caption).split())
        of_bytes = [span for char, span in zip(cleaned, _origins(caption, cleaned)) for _ in char.encode()]
        spans: list[tuple[int, int] | None] = [(0, 0)]
        start = 0
        for token in tokenizer.encode(caption)[: self.length - 2]:
            end = start + len(
                tokenizer.decoder[token].removesuffix("</w>")
            )  # a character there is a byte here
            spans.append((of_bytes[start][0], of_bytes[end - 1][1]))
            start = end
        spans.append((len(caption), len(caption)))
        return spans + [None] * (self.length - len(spans))

    def __call__(self, captions: str | Iterable[str]) -> Tensor:
        """Encode captions, each independently of the others in the batch.

        Returns:
            Hidden states (B, length, dim), float32, on the tower's device.

        Raises:
            SettingError: there is no caption, or one is not a string.
        """
        return self.hidden_states(*self.tokenize(captions))

    @torch.no_grad()
    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token sequences of any one length up to the tower's own limit, for those who cut text themselves.

        ids (B, T) int64 and mask (B, T) bool, as `tokenize` gives them, -> (B, T, dim), float32, on the tower's device.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        # Training runs under bfloat16 autocast; the conditioning must not depend on who asks for it.
        with torch.autocast(self.device.type, enabled=False):
            x = self.module.token_embedding(ids) + self.module.positional_embedding[: ids.shape[1]]
            return self.module.ln_final(self.module.transformer(x, attn_mask=self._attention_mask(mask)))

    def _attention_mask(self, mask: Tensor) -> Tensor:
        """0 where a position (row) may attend to another (column), -inf elsewhere: (B * heads, T, T)."""
        length = mask.shape[1]
        visible = mask[:, None, :] & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        additive = torch.zeros(visible.shape, device=mask.device).masked_fill(~visible, float("-inf"))
        return additive.repeat_interleave(self.module.transformer.resblocks[0].attn.num_heads, dim=0)


def text_tower(name: str, length: int = 38, device: str | torch.device = "cpu") -> TextTower:
    """A frozen text tower by name. Weights are loaded once per process, and shared by towers of different `length`.

    Args:
        name: "model/pretrained" as open_clip lists them, "ViT-B-32-quickgelu/openai" being the reference's; the part
            after the slash may also be a file of weights. Or "untrained-64": a small tower of that width (a multiple
            of 16 up to 1024) with CLIP's tokenizer and random weights that are the same on every machine.
        length: positions per caption; TACO uses 38, CLIP knows 77.
        device: where to encode.

    Raises:
        SettingError: an unknown name, a model that reads text otherwise than CLIP, a bad `length` or `device`.
        MissingWeightsError: the weights are not on this machine; the message has the command that fetches them.
        CheckpointError: the file of weights is damaged or belongs to another model.
    """
    width = _untrained_width(name)
    if width is not None:
        _check_length(length, name, longest=CLIP_LENGTH)
        module = _untrained_module(width, _check_device(device))
    else:
        _check_length(length, name, longest=_check_name(name).get("context_length", CLIP_LENGTH))
        module = _text_half(name, _check_device(device))
    return TextTower(module, name, length, trained=width is None)


def clip_model(
    name: str, device: str | torch.device = "cpu"
) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """A frozen open_clip CLIP with both its halves, and its tokenizer, for losses in the joint space of text and images.

    Args:
        name: "model/pretrained" as for `text_tower`; loaded once per process.
        device: where to put the model. The tokenizer gives what its `encode_text` takes: ids (B, 77) on the CPU.

    Raises:
        SettingError, MissingWeightsError, CheckpointError: as `text_tower`; and SettingError for "untrained-64".
    """
    if _untrained_width(name) is not None:
        raise SettingError(
            f"{name!r} has no image half, and a loss in an untrained space would mean nothing. Choose a CLIP model, such "
            "as 'ViT-B-32-quickgelu/openai', or leave that loss out (k_J=0)."
        )
    length = _check_name(name).get("context_length", CLIP_LENGTH)
    return _both_halves(name, _check_device(device)), partial(_tokenizer(), context_length=length)


@lru_cache(maxsize=4)
def _text_half(name: str, device: str) -> nn.Module:
    clip = _load_clip(name)
    text = getattr(clip, "text", clip)
    if text is clip:
        del clip.visual
    return text.to(device)


@lru_cache(maxsize=1)
def _both_halves(name: str, device: str) -> nn.Module:
    return _load_clip(name).requires_grad_(False).eval().to(device)


def _load_clip(name: str) -> nn.Module:
    import open_clip

    model, pretrained = name.split("/", 1)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    path = OpenClip(name).require() if tag else Path(pretrained).expanduser()
    # Some configurations have the other GELU than the weights were trained with: ViT-B-32/openai is one.
    overrides = {"quick_gelu": tag.get("quick_gelu", False)} if tag else {}
    try:
        with torch.random.fork_rng(devices=[]):
            return open_clip.create_model(model, pretrained=str(path), **overrides)
    except Exception as error:  # torch, pickle and safetensors each have errors of their own for a bad file
        raise CheckpointError(
            f"The weights {path} cannot be loaded into {model}: the file is damaged or belongs to another model. "
            "Delete it and fetch it again, or name the model that it was made for."
        ) from error


@lru_cache(maxsize=4)
def _untrained_module(width: int, device: str) -> nn.Module:
    from open_clip.transformer import QuickGELU, TextTransformer

    if width % 16 or not 16 <= width <= 1024:
        raise SettingError(f"untrained-{width}: the width must be a multiple of 16, from 16 to 1024.")
    with torch.random.fork_rng(devices=[]):  # open_clip initialises from the global generator
        module = TextTransformer(
            width=width, heads=width // 16, layers=2, output_dim=None, act_layer=QuickGELU
        )
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    # Words weigh more than positions, and every layer adds about as much as it is given: states tell captions apart.
    std = {"token_embedding.weight": 1.0, "positional_embedding": 0.25}
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            if weight.ndim > 1:
                # Uniform: a normal draw goes through log and cos, which round differently from machine to machine.
                noise = torch.rand(weight.shape, generator=generator) - 0.5
                weight.copy_(noise * (12**0.5 * std.get(name, weight.shape[1] ** -0.5)))
            elif name.endswith("bias"):
                weight.zero_()
    return module.to(device)


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def _origins(caption: str, cleaned: str) -> list[tuple[int, int]]:
    """The range of the caption that each character of its cleaned form, without white space, stands for."""
    guess, origins = "", []
    for unit in re.finditer(r"&#?\w+;|\S", caption):
        form = _clean(unit[0])
        guess += form
        origins += [unit.span()] * len(form)
    if guess == cleaned:
        return origins
    # Cleaning looked at neighbours too: combining accents, a final sigma, mojibake.
    ranges = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, guess, cleaned, autojunk=False).get_opcodes():
        if tag == "equal":
            ranges += origins[i1:i2]
        else:
            block = origins[i1:i2] or origins[max(i1 - 1, 0) :][:1] or [(0, len(caption))]
            ranges += [(block[0][0], block[-1][1])] * (j2 - j1)
    return ranges


@lru_cache(maxsize=4096)
def _clean(unit: str) -> str:
    return "".join(_tokenizer().clean_fn(unit).split())


def _untrained_width(name: str) -> int | None:
    """The width in "untrained-64", None for every other name."""
    if not isinstance(name, str):
        raise SettingError(
            f"The name of a text tower is a string such as 'ViT-B-32-quickgelu/openai', not {name!r}."
        )
    untrained = re.fullmatch(r"untrained-([0-9]+)", name)
    return int(untrained[1]) if untrained else None


def text_width(name: str) -> int:
    """Numbers per token of the text tower of this name, without loading it. Raises `SettingError` as `text_tower`."""
    width = _untrained_width(name)
    return _check_name(name)["width"] if width is None else width


def _check_name(name: str) -> dict[str, Any]:
    """The text configuration of "model/pretrained"."""
    import open_clip

    model, slash, pretrained = name.partition("/")
    if not slash:
        raise SettingError(
            f"{name!r} is no text tower: write model/pretrained, such as 'ViT-B-32-quickgelu/openai', "
            "or 'untrained-64' for random weights."
        )
    if model not in open_clip.list_models():
        raise SettingError(
            f"open_clip has no model {model!r} ({name!r}).{_close(model, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not open_clip.get_pretrained_cfg(model, pretrained) and not Path(pretrained).expanduser().is_file():
        raise SettingError(
            f"{pretrained!r} is neither a pretrained tag of {model} nor a file of weights.{_close(pretrained, tags)}"
        )
    text = open_clip.get_model_config(model)["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("no_causal_mask") or text.get("embed_cls"):
        raise SettingError(
            f"{model} reads text otherwise than CLIP (another tokenizer, attention that is not causal, or an added "
            "class token), which this tower does not. Choose a CLIP model, such as 'ViT-B-32-quickgelu/openai'."
        )
    return text


def _close(word: str, known: list[str]) -> str:
    """A hint at the known names that resemble `word`, all of them where none does but they are few."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=4, cutoff=0.5) or (
        by_lower if len(known) <= 20 else []
    )
    return f" Did you mean {', '.join(by_lower[name] for name in close)}?" if close else ""


def _check_length(length: int, name: str, longest: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or not 2 <= length <= longest:
        raise SettingError(
            f"length={length!r}: {name} takes a whole number of positions from 2 (start and end of text) to {longest}."
        )


def _check_device(device: str | torch.device) -> str:
    try:
        return str(torch.empty(0, device=device).device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"device={device!r} cannot be used here ({reason}). Choose 'cpu' or 'cuda'."
        ) from None


def _check_captions(captions: str | Iterable[str]) -> list[str]:
    if isinstance(captions, str):
        return [captions]
    try:
        captions = list(captions)
    except TypeError:
        raise SettingError(f"Captions are a list of strings, not {captions!r}.") from None
    if not captions:
        raise SettingError(
            "There is no caption to encode: give at least one; the empty string is a caption too."
        )
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise SettingError(
                f"Caption {index} must be a string, but is {caption!r} ({type(caption).__name__})."
            )
    return captions
