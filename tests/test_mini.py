"""The bundled CLIP, `mini/flickr8k`: it knows what its card says, and its distance orders pictures as people would."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from taco_nb import datasets
from taco_nb.data.images import to_tensor
from taco_nb.errors import MissingWeightsError, SettingError
from taco_nb.files import sha256
from taco_nb.metrics.graded import graded
from taco_nb.metrics.joint_space import ClipScore, CmmdEmbedding, cmmd
from taco_nb.metrics.perception import MiniDistance
from taco_nb.pretrained import MINI, BundledClip
from taco_nb.text import clip_model, text_tower
from taco_nb.training.loss import JointLoss, TacoLoss

CARD = json.loads(MINI.path.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mini():
    return clip_model(MINI.name)


@pytest.fixture(scope="module")
def sample():
    return [one for dataset in datasets("sample-train", "sample") for one in dataset]


def test_the_file_is_the_one_on_its_card_and_small():
    assert sha256(MINI.path) == CARD["sha256"] and MINI.path.stat().st_size <= 10e6


def test_pictures_rank_their_own_caption_first_nearly_always(mini, sample):
    score = ClipScore(*mini)
    own = []
    for one in sample:
        pictures = torch.as_tensor(np.array(one.image)).permute(2, 0, 1)[None]
        scores = [score(pictures, [other.captions[0]])[0] for other in sample]
        own.append(int(np.argmax(scores)) == len(own))
    assert sum(own) == CARD["results"]["sample pictures whose own caption ranks first"]


def test_open_clip_knows_it_and_its_text_half_is_the_codecs_tower(mini):
    clip, tokenizer = mini
    assert "mini" in open_clip.list_models() and isinstance(clip, open_clip.CLIP)
    captions = ["A red barn in the snow.", "two dogs", ""]
    tower = text_tower(MINI.name, length=38)
    assert tower.trained and tower.dim == 128
    ids, mask = tower.tokenize(captions)
    ends = mask.sum(1) - 1
    states = tower(captions)[torch.arange(3), ends] @ clip.text_projection
    with torch.no_grad():
        expected = clip.encode_text(tokenizer(captions))
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-3)


def test_words_that_training_never_saw_have_the_same_vectors_everywhere():
    tokens = text_tower(MINI.name).module.token_embedding.weight
    unseen = open_clip.SimpleTokenizer().encode("bioluminescence")[0]
    assert tokens[unseen].sum().item() == pytest.approx(
        CARD["sum of an unseen vector"][str(unseen)], abs=1e-6
    )


def test_meaning_not_spelling(mini):
    clip, tokenizer = mini
    said = [
        "A dog runs along the beach.",
        "A puppy is playing at the sea shore.",
        "A man in a suit plays the violin.",
    ]
    with torch.no_grad():
        a, b, c = normalize(clip.encode_text(tokenizer(said)), dim=-1)
    assert a @ b > a @ c + 0.2


def test_the_whole_loss_runs_and_J_prefers_the_right_captions(mini, sample):
    x = torch.stack([to_tensor(one.image.convert("RGB").resize((128, 128))) for one in sample])
    said = [one.captions[0] for one in sample]
    joint = JointLoss(*mini)
    with torch.no_grad():
        assert joint(x, x, said) < joint(x, x, said[1:] + said[:1])
    x_hat = (0.9 * x).requires_grad_()
    out = {"x_hat": x_hat, "likelihoods": {"y": torch.full((len(x), 1), 0.5)}}
    loss = TacoLoss(0.0067, 3.5, 0.0025, MiniDistance(mini[0]), joint)
    terms = loss(out, x, said)
    assert list(terms) == loss.names == ["loss", "bpp", "mse", "mini_distance", "joint"]
    for name in ("mini_distance", "joint"):
        (slope,) = torch.autograd.grad(terms[name], x_hat, retain_graph=True)
        assert slope.isfinite().all() and slope.abs().sum() > 0


# --- The distance -----------------------------------------------------------------------------------------------------


def test_the_distance_grows_with_every_distortion_of_every_picture(mini, sample):
    distance = MiniDistance(mini[0])
    for one in sample:
        table = graded(one.image.convert("RGB").crop((0, 0, 256, 256)), distance)
        for kind, of in table.groupby("kind"):
            values = of["mini_distance"].tolist()
            assert values[0] > 0 and values == sorted(values), (one.name, kind, values)
    x = to_tensor(one.image.convert("RGB"))
    assert distance(x, x) == {"mini_distance": 0}


def test_a_set_is_near_itself_and_far_from_another(mini, sample):
    embed = CmmdEmbedding(mini[0])
    pictures = [torch.as_tensor(np.array(one.image.convert("RGB").resize((224, 224)))) for one in sample]
    x = embed(torch.stack(pictures).permute(0, 3, 1, 2))
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9) and cmmd(x[:4], x[4:]) > 1


def test_distances_refuse_what_they_cannot_compare(mini):
    distance = MiniDistance(mini[0])
    with pytest.raises(SettingError, match="at least 32 pixels"):
        distance.distance(torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64))
    assert np.isnan(distance(torch.zeros(3, 31, 64), torch.zeros(3, 31, 64))["mini_distance"])


def test_a_missing_file_and_a_wrong_name_are_one_sentence(tmp_path):
    gone = BundledClip("mini/gone", "nothing", 1)
    with pytest.raises(MissingWeightsError, match="mini/gone comes with the code, but is not in "):
        gone.require()
    with pytest.raises(SettingError, match="'flickr9k' is neither a pretrained tag of mini"):
        text_tower("mini/flickr9k")
