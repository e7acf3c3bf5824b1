"""TACO's loss, term by term, against arithmetic written a second time, in numpy."""

import json
import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.text import clip_model, text_tower
from taco_nb.training.loss import JointLoss, TacoLoss, bits_per_pixel, clip_input

B, H, W = 3, 64, 128
CAPTIONS = ["a red barn in the snow", "a dog", "two boats on a river at dawn"]


def images(seed, *shape, low=0.0, high=1.0):
    return (
        torch.rand(shape or (B, 3, H, W), generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    )


@pytest.fixture
def out():
    """What a network gives: x_hat beyond [0, 1], as it is before clamping, and likelihoods."""
    return {
        "x_hat": images(1, low=-0.4, high=1.4),
        "likelihoods": {"y": images(2, B, 24, 4, 8, low=1e-3), "z": images(3, B, 16, 1, 2, low=1e-3)},
    }


MEAN_DISTANCE = SimpleNamespace(name="lpips", distance=lambda x_hat, x: (x_hat - x).abs().mean((1, 2, 3)))
"""A distance per picture, in place of LPIPS."""


def numbers(tensor):
    return tensor.detach().double().numpy()


# --- Rate and distortion ----------------------------------------------------------------------------------------------


def test_bits_per_pixel(out):
    bits = -sum(np.log2(numbers(likelihoods)).sum() for likelihoods in out["likelihoods"].values())
    assert bits_per_pixel(out).item() == pytest.approx(bits / (B * H * W), rel=1e-5)


def test_bits_per_pixel_of_coin_tosses():
    """128 latents at probability 1/2 and 64 at 1/8, on two pictures of 16x20."""
    likelihoods = {"y": torch.full((2, 4, 4, 4), 1 / 2), "z": torch.full((2, 8, 2, 2), 1 / 8)}
    bpp = bits_per_pixel({"x_hat": torch.zeros(2, 3, 16, 20), "likelihoods": likelihoods})
    assert bpp.item() == pytest.approx((128 * 1 + 64 * 3) / (2 * 16 * 20))


def test_rate_and_distortion_alone(out):
    x = images(4)
    terms = TacoLoss(lmbda=0.0016)(out, x, CAPTIONS)
    assert list(terms) == TacoLoss(lmbda=0.0016).names == ["loss", "bpp", "mse"]
    mse = (
        (numbers(out["x_hat"]) - numbers(x)) ** 2
    ).mean()  # not clamped: the network is pulled back into range
    assert terms["mse"].item() == pytest.approx(mse, rel=1e-5)
    assert terms["bpp"].item() == bits_per_pixel(out).item()
    assert terms["loss"].item() == pytest.approx(0.0016 * 65025 * mse + terms["bpp"].item(), rel=1e-5)


def test_distortion_of_one_grey_level_costs_lmbda():
    x = torch.full((2, 3, 64, 64), 100 / 255)
    out = {"x_hat": x + 1 / 255, "likelihoods": {"y": torch.ones(2, 1, 1, 1)}}
    assert TacoLoss(lmbda=0.5)(out, x, ["", ""])["loss"].item() == pytest.approx(0.5, rel=1e-4)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def test_lpips_is_weighted_by_k_P_and_fed_what_the_network_gave(out):
    x = images(4)
    plain = TacoLoss(lmbda=0.01)(out, x, CAPTIONS)
    loss = TacoLoss(lmbda=0.01, k_P=3.5, perceptual=MEAN_DISTANCE)
    terms = loss(out, x, CAPTIONS)
    assert list(terms) == loss.names == ["loss", "bpp", "mse", "lpips"]
    distance = np.abs(numbers(out["x_hat"]) - numbers(x)).mean()  # neither clamped nor stretched to [-1, 1]
    assert terms["lpips"].item() == pytest.approx(distance, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(plain["loss"].item() + 3.5 * distance, rel=1e-5)


def test_lpips_gets_x_hat_first_and_one_value_per_picture_is_averaged(out):
    x = images(4)
    lopsided = SimpleNamespace(name="lpips", distance=lambda x_hat, x: (2 * x_hat - x).mean((1, 2, 3)))
    terms = TacoLoss(0.01, k_P=1.0, perceptual=lopsided)(out, x, CAPTIONS)
    assert terms["lpips"].item() == pytest.approx((2 * numbers(out["x_hat"]) - numbers(x)).mean(), rel=1e-4)


def test_lpips_convention_is_that_of_pictures_in_0_to_1(out):
    """With the real network, its AlexNet random: what `lpips` gives when it is fed [0, 1] as they are."""
    lpips = pytest.importorskip("lpips")
    from taco_nb.metrics.perception import Lpips

    torch.manual_seed(0)
    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    x = images(4)
    terms = TacoLoss(0.01, k_P=3.5, perceptual=Lpips(model=model))(out, x, CAPTIONS)
    with torch.no_grad():
        assert terms["lpips"].item() == pytest.approx(model(out["x_hat"], x).mean().item(), rel=1e-5)
        assert terms["lpips"].item() != pytest.approx(
            model(out["x_hat"], x, normalize=True).mean().item(), rel=1e-2
        )


# --- J ----------------------------------------------------------------------------------------------------------------


TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip():
    """A small CLIP, its weights random, its pictures as large as the real one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.model.CLIP(**TINY, quick_gelu=True)


@pytest.fixture
def joint(clip):
    return JointLoss(clip, open_clip.SimpleTokenizer())


def test_clip_is_frozen(clip):
    JointLoss(clip.train().requires_grad_(True), open_clip.SimpleTokenizer())
    assert not clip.training and not any(weight.requires_grad for weight in clip.parameters())


def unit(embeddings):
    embeddings = numbers(embeddings)
    return embeddings / np.sqrt((embeddings**2).sum(1, keepdims=True))


def numpy_joint(clip, x_hat, x, captions):
    """J from CLIP's embeddings: both parts of it."""
    with torch.no_grad():
        text = unit(clip.encode_text(open_clip.SimpleTokenizer()(captions)))
        image, original = (unit(clip.encode_image(clip_input(pictures))) for pictures in (x_hat, x))
    scores = math.exp(2.6592) * image @ text.T
    by_image = np.log(np.exp(scores).sum(1)) - scores.diagonal()
    by_text = np.log(np.exp(scores).sum(0)) - scores.diagonal()
    return (by_image.mean() + by_text.mean()) / 2, 40 * math.sqrt(((image - original) ** 2).sum())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_joint_loss(clip, joint, size):
    x, x_hat = images(4)[:size], images(5, low=-0.5, high=1.5)[:size]
    agreement, distance = numpy_joint(clip, x_hat, x, CAPTIONS[:size])
    assert distance > 1 and (agreement > 0.1 or size == 1)
    assert joint(x_hat, x, CAPTIONS[:size]).item() == pytest.approx(agreement + distance, rel=1e-4)


def test_joint_loss_is_weighted_by_k_J(clip, joint, out):
    x = images(4)
    plain = TacoLoss(lmbda=0.01)(out, x, CAPTIONS)
    loss = TacoLoss(lmbda=0.01, k_J=2.5, joint=joint)
    terms = loss(out, x, CAPTIONS)
    assert list(terms) == loss.names == ["loss", "bpp", "mse", "joint"]
    J = sum(numpy_joint(clip, out["x_hat"], x, CAPTIONS))
    assert terms["loss"].item() == pytest.approx(plain["loss"].item() + 2.5 * J, rel=1e-5)


def test_the_norm_is_one_root_over_the_whole_batch(joint):
    """Twice the same pair: a mean over pictures would stay, one root over both grows by sqrt(2)."""
    x, x_hat = images(4)[:1], images(5)[:1]
    once = joint(
        x_hat, x, ["a dog"]
    ).item()  # among one caption there is nothing to confuse: only the norm is left
    twice = joint(x_hat.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1), ["a dog", "a dog"]).item()
    assert twice == pytest.approx(math.sqrt(2) * once + math.log(2), rel=1e-4)


def test_a_perfect_reconstruction_leaves_the_agreement_alone(clip, joint):
    x = images(4).requires_grad_()
    J = joint(x, x.detach(), CAPTIONS)
    assert J.item() == pytest.approx(numpy_joint(clip, x, x, CAPTIONS)[0], rel=1e-4)
    J.backward()
    assert x.grad.isfinite().all()  # the root's slope at 0 notwithstanding


def test_the_pairing_matters_but_not_its_order(joint):
    x, x_hat = images(4), images(5)
    J = joint(x_hat, x, CAPTIONS).item()
    order = [2, 0, 1]
    assert joint(x_hat[order], x[order], [CAPTIONS[i] for i in order]).item() == pytest.approx(J, rel=1e-5)
    assert joint(x_hat, x, [CAPTIONS[i] for i in order]).item() != pytest.approx(J, rel=1e-3)


def test_gradients_reach_x_hat_alone(clip, out):
    x = images(4).requires_grad_()
    x_hat = out["x_hat"].requires_grad_()
    joint = JointLoss(clip, open_clip.SimpleTokenizer())
    before = {name: weight.clone() for name, weight in clip.state_dict().items()}
    joint(x_hat, x, CAPTIONS).backward()
    assert x_hat.grad.abs().sum() > 0 and x_hat.grad.isfinite().all()
    assert x.grad is None
    assert all(weight.grad is None for weight in clip.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in clip.state_dict().items())


def test_every_term_has_a_gradient(joint, out):
    x_hat = out["x_hat"].requires_grad_()
    out["likelihoods"]["y"].requires_grad_()
    terms = TacoLoss(0.01, 3.5, 0.0025, MEAN_DISTANCE, joint)(out, images(4), CAPTIONS)
    assert list(terms) == ["loss", "bpp", "mse", "lpips", "joint"]
    for name in ("mse", "lpips", "joint"):
        (slope,) = torch.autograd.grad(terms[name], x_hat, retain_graph=True)
        assert slope.abs().sum() > 0, name
    terms["loss"].backward()
    assert out["likelihoods"]["y"].grad.abs().sum() > 0


# --- CLIP's input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width",
    [
        (256, 256), (224, 224), (225, 225), (223, 223),
        (256, 384), (384, 256), (224, 320), (320, 224),
        (257, 391), (333, 251), (220, 330), (428, 214), (171, 513),
        (64, 64), (64, 128), (31, 47), (100, 101), (1, 3),
    ],
)  # fmt: skip
def test_clip_input_is_that_of_torchvision(height, width):
    reference = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BILINEAR, antialias=True),
            CenterCrop(224),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    x = images(6, 2, 3, height, width, low=-0.2, high=1.2)
    torch.testing.assert_close(clip_input(x), reference(x), atol=1e-5, rtol=0)


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"k_P": 3.5}, {"k_J": 0.0025}, {"k_P": 3.5, "k_J": 0.0025}])
def test_a_weight_without_its_term(weights, joint):
    with pytest.raises(SettingError, match="k_P=.*perceptual.*k_J=.*CLIP"):
        TacoLoss(0.01, **weights)
    TacoLoss(0.01, **weights, perceptual=MEAN_DISTANCE, joint=joint)


def test_a_clip_of_another_input_size_is_refused():
    clip = open_clip.model.CLIP(**TINY | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 64}})
    with pytest.raises(SettingError, match="224.*64"):
        JointLoss(clip, open_clip.SimpleTokenizer())


# --- CLIP by its name -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(clip, tmp_path_factory):
    """The small CLIP as a file of weights, and its name in open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "taco-test-joint.json").write_text(json.dumps(TINY | {"quick_gelu": True}))
    open_clip.add_model_config(folder / "taco-test-joint.json")
    torch.save(clip.state_dict(), folder / "weights.pt")
    return f"taco-test-joint/{folder / 'weights.pt'}"


def test_a_named_clip_gives_the_same_loss(clip, named):
    state = torch.get_rng_state()
    model, tokenizer = clip_model(named)
    assert torch.equal(torch.get_rng_state(), state)
    assert tokenizer(CAPTIONS).shape == (3, 77)
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    expected = JointLoss(clip, open_clip.SimpleTokenizer())(images(5), images(4), CAPTIONS)
    torch.testing.assert_close(JointLoss(model, tokenizer)(images(5), images(4), CAPTIONS), expected)
    assert clip_model(named)[0] is model


def test_a_text_tower_of_the_same_name_has_the_same_text_half_and_leaves_the_whole_alone(named):
    model, _ = clip_model(named)
    tower = text_tower(named)
    assert torch.equal(tower.module.token_embedding.weight, model.token_embedding.weight)
    assert hasattr(model, "visual") and not hasattr(tower.module, "visual")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("untrained-64", "untrained"),
        ("ViT-B-32", "model/pretrained"),
        ("ViT-B-32/openapi", "openai"),
        (None, "string"),
    ],
)
def test_names_that_are_no_clip(name, hint):
    with pytest.raises(SettingError, match=hint):
        clip_model(name)


def test_damaged_weights_are_named(tmp_path, named):
    (tmp_path / "noise.pt").write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match="noise.pt"):
        clip_model(f"taco-test-joint/{tmp_path / 'noise.pt'}")
