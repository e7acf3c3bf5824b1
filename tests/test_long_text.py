"""Whole paragraphs for the adapter: windows of CLIP's tower, the mask that hides their padding, what truncation loses."""

import json
import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import make_net
from open_clip import SimpleTokenizer

from taco_nb.errors import SettingError
from taco_nb.text import text_tower
from taco_nb.text.long import BATCH, split_windows, surviving, tower_windows

DATA = Path(__file__).resolve().parents[1] / "data"
KODAK = json.loads((DATA / "kodak" / "captions_context.json").read_text(encoding="utf-8"))
SAMPLE = json.loads((DATA / "sample" / "captions_context.json").read_text(encoding="utf-8"))
TOKENIZER = SimpleTokenizer()

TEXTS = {
    "empty": "",
    "white space": " \n\t ",
    "one word": "barn",
    "paragraph": next(iter(KODAK.values())),
    "no sentence end": "a barn with two dogs and a fence " * 30,
    "abbreviations": "Dr. Jones, of St. Paul, met Mr. O'Neill at 4 p.m. in the U.S., e.g. near Mt. Hood. "
    * 8,
    "ellipses": "He waited... Then he left… \u201cGone?!\u201d she asked (twice.) " * 12,
    "line ends": "A title\n\nA red barn.\r\nTwo dogs,\none\u2028cat.\n" * 20,
    "no space after a full stop": "It ends.Next costs .$5 or so?!Yes." * 30,
    "accents": "Un café déjà fermé. Ça va? Straße ÖDE, İstanbul, ΣΊΣΥΦΟΣ! " * 12,
    "ligatures and entities": "ﬁne &amp; dandy; &amp;amp;amp; it&#39;s &nbsp; ｆｕｌｌ width. " * 12,
    "CJK": "一只红色的猫坐在窗边。雪の中の赤い納屋！빨간 헛간。" * 12,
    "emoji": "🐶🌈 a dog 👩\u200d🚀 in space ❤️. " * 20,
    "special tokens": "<start_of_text>a barn</w> <end_of_text>. <|endoftext|> " * 12,
    "one enormous word": "x" * 3000,
    "one enormous emoji word": "🐶" * 500,
    "enormous word inside": "A red barn. " + "ab" * 300 + " stands here. Two dogs run.",
    "control characters": "a\x00barn\x1b[0m \x1c red\x85. \ufeffdogs\u200b. \ud83d lone. " * 12,
}


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    parts = [
        "barn",
        "Dr.",
        " ",
        " ",
        "\n",
        ".",
        "...",
        "!?",
        "it's",
        "&amp;",
        "é",
        "Ω",
        "雪",
        "。",
        "🐶",
        "42",
        ")",
        "”",
        "x" * 90,
    ]
    return "".join(generator.choice(parts) for _ in range(generator.randrange(400)))


@pytest.fixture(scope="module")
def tower():
    return text_tower("untrained-16", length=77)


def spelled(ids: list[int]) -> str:
    """What token ids spell, without white space."""
    return TOKENIZER.decode(ids).replace(" ", "")


def real(tower, caption: str) -> torch.Tensor:
    """The tower's own states at the real tokens of one caption."""
    return tower([caption])[tower.tokenize([caption])[1]]


@pytest.mark.parametrize("limit", [3, 10, 77])
@pytest.mark.parametrize(
    "text", [*TEXTS.values(), *map(random_text, range(40))], ids=[*TEXTS, *map(str, range(40))]
)
def test_windows_lose_nothing(text, limit):
    windows = split_windows(text, limit)
    assert list(chain(*windows)) == TOKENIZER.encode(text)
    assert max(map(len, windows)) <= limit - 2
    assert all(windows) or windows == [[]]


@pytest.mark.parametrize("text", [*KODAK.values(), *SAMPLE.values()])
def test_windows_are_full_of_whole_sentences(text):
    sentences = text.replace("? ", "?\n").replace(". ", ".\n").split("\n")
    windows = [spelled(window) for window in split_windows(text)]
    for window, following in zip(windows, [*windows[1:], None]):
        taken = []
        while sentences and window.startswith(spelled(TOKENIZER.encode(" ".join([*taken, sentences[0]])))):
            taken.append(sentences.pop(0))
        assert spelled(TOKENIZER.encode(" ".join(taken))) == window
        assert following is None or len(TOKENIZER.encode(" ".join([*taken, sentences[0]]))) > 75
    assert not sentences


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("The barn is red. We met Dr. Smith there.", "thebarnisred."),
        ("The barn is red. We met dogs. Smith is there.", "thebarnisred.wemetdogs."),
        ("The barn is red. We met dogs... Smith is there.", "thebarnisred."),
        ('The barn is red. "We go!" So he said.', 'thebarnisred."wego!"'),
        (
            "The barn is no old red barn if it's seen",
            "thebarnisnooldredbarnif",
        ),  # "it" "'s": two tokens, one word
        ("雪の中。赤い納屋。", "雪の中。"),
    ],
)
def test_windows_end_with_a_sentence_or_else_a_word(text, first):
    assert spelled(split_windows(text, limit=11)[0]) == first


def test_a_word_longer_than_a_window_fills_windows():
    before, *inside, after = split_windows("A barn. " + "x" * 3000 + " stands. It is red.", limit=20)
    assert spelled(before) == "abarn."
    assert all(len(window) == 18 and set(spelled(window)) == {"x"} for window in inside)
    assert spelled(after).endswith("xstands.itisred.")


@pytest.mark.parametrize("limit", [2, 0, -5, True, 7.0, "77", None])
def test_a_limit_without_room_for_a_word_is_refused(limit):
    with pytest.raises(SettingError, match="limit"):
        split_windows("a barn", limit)


@pytest.mark.parametrize(
    "caption", ["", " \n ", "a red barn", "A barn. Two dogs run.", "x" * 250, "雪の中の赤い納屋。"]
)
def test_one_window_is_the_tower_itself(tower, caption):
    hidden, mask = tower_windows(tower, [caption])
    assert mask.all() and hidden.dtype == torch.float32
    torch.testing.assert_close(hidden[0], real(tower, caption), rtol=0, atol=1e-5)


def test_windows_are_encoded_one_by_one_and_joined(tower):
    sentences = [f"{word} " * 60 + "stands here." for word in ("barn", "dog", "fence")]
    hidden, mask = tower_windows(tower, " ".join(sentences))
    expected = torch.cat([real(tower, sentence) for sentence in sentences])
    assert hidden.shape == (1, *expected.shape) and mask.all()
    torch.testing.assert_close(hidden[0], expected, rtol=0, atol=1e-5)


def test_towers_of_any_length_give_the_same_windows(tower):
    short = text_tower("untrained-16", length=5)
    caption = TEXTS["paragraph"]
    assert torch.equal(tower_windows(short, caption)[0], tower_windows(tower, caption)[0])


def test_a_caption_is_the_same_alone_and_in_a_batch(tower):
    captions = list(TEXTS.values())
    hidden, mask = tower_windows(tower, captions)
    tokens = [sum(len(window) + 2 for window in split_windows(caption)) for caption in captions]
    assert mask.sum(1).tolist() == tokens and mask.shape[1] == max(tokens)
    assert not hidden[~mask].any()
    for row, caption in enumerate(captions):
        alone, every = tower_windows(tower, [caption])
        assert every.all()
        torch.testing.assert_close(hidden[row, : tokens[row]], alone[0], rtol=0, atol=1e-5)
        assert not mask[row, tokens[row] :].any()


def test_thousands_of_sentences_go_through_the_tower_in_batches(tower):
    batches = []
    hook = tower.module.ln_final.register_forward_hook(
        lambda module, inputs, output: batches.append(output.shape)
    )
    hidden, mask = tower_windows(tower, "Two dogs run past the old fence. " * 3000)
    hook.remove()
    assert all(rows <= BATCH and positions <= 77 for rows, positions, _ in batches)
    assert hidden.shape[1] == int(mask.sum()) == 3000 * 8 + 2 * sum(rows for rows, _, _ in batches)


def test_captions_are_checked(tower):
    for captions in ([], None, ["a barn", 7]):
        with pytest.raises(SettingError, match="[Cc]aption"):
            tower_windows(tower, captions)
        with pytest.raises(SettingError, match="[Cc]aption"):
            surviving(captions, 38)


@pytest.mark.parametrize("length", [2, 3, 38, 77, 400])
def test_a_word_survives_where_the_caption_up_to_it_fits(length):
    captions = [*TEXTS.values(), *list(KODAK.values())[:4]]
    table = surviving(captions, length)
    for caption, row in zip(captions, table.itertuples()):
        words = TOKENIZER.clean_fn(caption).split()
        tokens = [len(TOKENIZER.encode(word)) for word in words]
        fits = sum(sum(tokens[:end]) <= length - 2 for end in range(1, len(words) + 1))
        assert row.tokens == len(TOKENIZER.encode(caption)) + 2 and row.words == len(words)
        assert (
            row.words_kept == pytest.approx(fits / len(words)) if words else row.words_kept != row.words_kept
        )


def test_truncation_is_what_the_tower_does(tower):
    caption = TEXTS["paragraph"]
    kept = int(tower.tokenize([caption])[1].sum()) - 2
    words = caption.split()
    survivors = round(surviving(caption, 77)["words_kept"].item() * len(words))
    assert (
        len(TOKENIZER.encode(" ".join(words[:survivors])))
        <= kept
        < len(TOKENIZER.encode(" ".join(words[: survivors + 1])))
    )


def test_an_entity_survives_as_a_whole_or_not_at_all():
    caption = "In  İzmir near the Golden Gate Bridge with Émile Zola"
    names = ["İzmir", "Golden Gate Bridge", "Émile Zola"]

    def entities(text):
        return [(text.index(name), text.index(name) + len(name)) for name in names]

    shares = [surviving(caption, length, entities)["entities_kept"].item() for length in range(2, 30)]
    assert shares == sorted(shares) and set(shares) == {0, 1 / 3, 2 / 3, 1}
    through_gate = len(TOKENIZER.encode("In İzmir near the Golden Gate")) + 2
    assert shares[through_gate - 2] == pytest.approx(1 / 3) and shares[through_gate - 1] == pytest.approx(
        2 / 3
    )
    nothing = surviving(["", caption], 38, lambda text: [])
    assert (nothing["entities"] == 0).all() and nothing["entities_kept"].isna().all()


def test_context_paragraphs_do_not_fit():
    paragraphs = [*KODAK.values(), *SAMPLE.values()]
    at_38, at_77 = surviving(paragraphs, 38), surviving(paragraphs, 77)
    assert (at_38["tokens"] > 77).all() and (at_38["words_kept"] < at_77["words_kept"]).all()
    assert (at_77["words_kept"] < 1).all() and (surviving(paragraphs, 300)["words_kept"] == 1).all()


@pytest.mark.parametrize("length", [1, 0, False, 38.0, "38", None])
def test_a_length_without_room_for_start_and_end_is_refused(length):
    with pytest.raises(SettingError, match="length"):
        surviving("a barn", length)


def test_every_kodak_image_has_a_paragraph(shared):
    assert list(KODAK) == [f"kodim{number:02d}.png" for number in range(1, 25)]
    assert json.loads((shared / "kodak" / "captions_context.json").read_text(encoding="utf-8")) == KODAK
    assert "not GPT-4o's" in (DATA / "kodak" / "README.md").read_text(encoding="utf-8")


# The mask in the model


LENGTHS = (7, 4)


@pytest.fixture(scope="module")
def net():
    return make_net()


@pytest.fixture
def padded():
    """Images, two captions of unlike length in one batch, and its mask; what stands at the padding is noise."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    return torch.rand(2, 3, 64, 64, generator=generator), torch.randn(2, 9, 16, generator=generator), mask


def test_masked_text_is_text_without_its_padding(net, padded):
    x, text, mask = padded
    with torch.inference_mode():
        y = net.g_a(x, text, mask)
        for row, length in enumerate(LENGTHS):
            alone = net.g_a(x[row, None], text[row, None, :length])
            torch.testing.assert_close(y[row, None], alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())


def test_nothing_reads_masked_positions(net, padded):
    x, text, mask = padded
    other = torch.where(mask[..., None], text, 100.0)
    with torch.inference_mode():
        first, second = net(x, text, mask), net(x, other, mask)
        assert torch.equal(first["x_hat"], second["x_hat"])
        assert torch.equal(first["likelihoods"]["y"], second["likelihoods"]["y"])
        assert not torch.equal(net.g_a(x, text), net.g_a(x, other))
    strings = net.compress(x, text, mask)["strings"]
    assert strings == net.compress(x, other, mask)["strings"] != net.compress(x, text)["strings"]


def test_a_mask_that_hides_nothing_changes_nothing(net, padded):
    x, text, mask = padded
    with torch.inference_mode():
        y = net.g_a(x, text)
        torch.testing.assert_close(
            net.g_a(x, text, mask | True), y, rtol=1e-5, atol=1e-5 * y.abs().max().item()
        )


def test_no_gradient_reaches_masked_positions(net, padded):
    x, text, mask = padded
    text.requires_grad_(True)
    net.g_a(x, text, mask).square().mean().backward()
    net.zero_grad()
    assert not text.grad[~mask].any()
    assert text.grad[mask].isfinite().all() and text.grad[mask].any(-1).all()


def test_attention_matrices_are_zero_at_masked_keys(net, padded):
    x, text, mask = padded
    injector = net.g_a.analysis_transform[8]
    with torch.inference_mode():
        queries, keys = injector.sequences(torch.randn(2, 8, 3, 5), text)
        weights = injector.cross_attn.weights(queries, keys, (1, 9), mask)
        assert not weights.transpose(1, 3)[~mask].any()
        for row, length in enumerate(LENGTHS):
            alone = injector.cross_attn.weights(queries[row, None], keys[row, None, :length], (1, length))
            torch.testing.assert_close(weights[row, None, :, :, :length], alone, rtol=0, atol=1e-5)


def test_a_paragraph_conditions_the_codec_alike_alone_and_in_a_batch(net, tower, padded):
    x = padded[0][:1]
    paragraph, short = TEXTS["paragraph"], "a barn"
    with torch.inference_mode():
        alone = net.g_a(x, *tower_windows(tower, short))
        text, mask = tower_windows(tower, [short, paragraph])
        batch = net.g_a(x.expand(2, -1, -1, -1), text, mask)
    torch.testing.assert_close(batch[:1], alone, rtol=1e-5, atol=1e-5 * alone.abs().max().item())
    assert not torch.allclose(batch[1], batch[0], rtol=1e-3)
