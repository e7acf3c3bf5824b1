"""Pretrained networks: known by name, found where their libraries keep them, and missing in one line otherwise."""

import hashlib

import pytest
from file_server import FileServer

from taco_nb.errors import DownloadError, MissingWeightsError, SettingError
from taco_nb.pretrained import (
    ALEXNET,
    CLIP_B32,
    CLIP_L14,
    EN_CORE_WEB_SM,
    INCEPTION,
    PRETRAINED,
    Checkpoint,
    OpenClip,
    SpacyModel,
    find_pretrained,
)
from taco_nb.tools.fetch import fetch_network

CHECKPOINTS = (ALEXNET, INCEPTION)


@pytest.mark.parametrize("network", PRETRAINED.values(), ids=list(PRETRAINED))
def test_every_network_says_what_it_is_for_and_how_to_get_it(network):
    assert PRETRAINED[network.name] is network is find_pretrained(network.name)
    assert network.use and network.size > 10**7
    assert network.missing.endswith(f"run: taco-nb fetch {network.name}")
    assert str(network.home) in network.missing


def test_any_model_of_open_clip_and_of_spacy_can_be_asked_for(monkeypatch):
    """The captioner of the tools, too; and a name that is wrong by a letter is answered with those that are right."""
    coca = find_pretrained("coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k")
    assert isinstance(coca, OpenClip) and coca.command == f"taco-nb fetch {coca.name}"
    assert coca.files == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert coca.repository == "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k"
    assert find_pretrained("de_core_news_sm") == SpacyModel("de_core_news_sm")
    assert find_pretrained("kodac") is None
    with pytest.raises(SettingError, match="no pretrained model 'ViT-B-32/openapi': ViT-B-32 has openai, "):
        find_pretrained("ViT-B-32/openapi")
    with pytest.raises(SettingError, match="no pretrained model 'ViT-B-33/openai': .*list_pretrained"):
        find_pretrained("ViT-B-33/openai")


@pytest.mark.parametrize(
    ("name", "millions"),  # of parameters, as open_clip's docs/model_profile.csv has them
    [
        (CLIP_B32.name, 151.28),
        (CLIP_L14.name, 427.94),
        ("coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k", 638.45),
    ],
)
def test_sizes_of_open_clips_models_are_those_of_their_parameters(name, millions):
    assert find_pretrained(name).size == pytest.approx(4e6 * millions, rel=1e-3)


def test_files_of_torch_hub_are_those_their_libraries_look_for():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import AlexNet_Weights

    assert (ALEXNET.url, INCEPTION.url) == (AlexNet_Weights.IMAGENET1K_V1.url, URL_INCEPTION_V3)
    for network in CHECKPOINTS:  # torch.hub has the first digits of the checksum in the name
        assert network.file.stem.rsplit("-", 1)[1] == network.sha256[:8] and len(network.sha256) == 64


@pytest.mark.parametrize("network", CHECKPOINTS, ids=lambda network: network.name)
def test_half_a_file_is_not_there(network, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert network.path is None and "is not there" in network.missing
    network.home.mkdir(parents=True)
    with open(network.file, "wb") as file:
        file.truncate(network.size - 1)
        assert network.path is None and f"has {network.size - 1:,} bytes" in network.missing
        file.truncate(network.size)
    assert network.path == network.file


def test_a_checkpoint_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = bytes(range(256)) * 1000
    with FileServer() as server:
        server.files["net-40d61e29.pth"] = content
        about = "net", "a test", len(content), server.url("net-40d61e29.pth")
        network = Checkpoint(*about, hashlib.sha256(content).hexdigest())
        other = Checkpoint(*about, hashlib.sha256(b"other").hexdigest())
        with pytest.raises(
            MissingWeightsError, match="pth .256,000 bytes. is not there. .*run: taco-nb fetch net"
        ):
            network.require()
        with pytest.raises(
            DownloadError, match="net could not be fetched. .* not the file .* fetch net .or copy"
        ):
            fetch_network(other)
        assert network.path is None
        for _ in range(2):
            fetch_network(network)
            assert network.require() == network.path == tmp_path / "hub" / "checkpoints" / "net-40d61e29.pth"
        assert network.path.read_bytes() == content and len(server.asked) == 2


@pytest.mark.parametrize("network", [CLIP_B32, CLIP_L14], ids=lambda network: network.name)
def test_clip_is_found_in_the_cache_of_the_hub(network, tmp_path, monkeypatch):
    import open_clip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert network.path is None and str(tmp_path) in network.missing
    repository = open_clip.get_pretrained_cfg(*network.name.split("/"))["hf_hub"].strip("/")
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    for name, content in (("refs/main", "abc"), ("snapshots/abc/open_clip_model.safetensors", "weights")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(content)
    assert network.path == network.require() == folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    fetch_network(network)  # which then asks nobody


def test_a_model_that_the_hub_does_not_give_is_a_sentence(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DownloadError, match=f"^{CLIP_B32.name} could not .*open_clip_model.safetensors of timm/"
    ) as raised:
        fetch_network(CLIP_B32)
    assert "\n" not in str(raised.value) and f"run: {CLIP_B32.command} (or copy it" in str(raised.value)


def test_a_spacy_model_is_a_package(tmp_path, monkeypatch):
    import spacy

    assert (EN_CORE_WEB_SM.path is not None) == spacy.util.is_package(EN_CORE_WEB_SM.name)
    model = SpacyModel("en_pretrained_test_sm")
    assert model.path is None
    (tmp_path / model.name).mkdir()
    (tmp_path / model.name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert model.path == model.require() == tmp_path / model.name


def test_a_spacy_model_that_cannot_be_had_is_a_sentence(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    network = SpacyModel("en_absent_test_sm")
    with pytest.raises(
        DownloadError, match="spacy download en_absent_test_sm` says: .*run: taco-nb fetch en_absent"
    ):
        fetch_network(network)
    with pytest.raises(MissingWeightsError, match="run: taco-nb fetch en_absent_test_sm"):
        network.require()
