"""The text tower against transformers' `CLIPTextModel` and tokenizer, and what can go wrong on the way there."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import default_bpe
from open_clip.transformer import QuickGELU, TextTransformer
from torch import nn

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.text import TextTower, text_tower
from taco_nb.text.clip import UNTRAINED_SEED

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
START, END, VOCABULARY = 49406, 49407, 49408
WIDTH, HEADS, LAYERS = 64, 4, 3

PARAGRAPH = (
    "A weathered red barn stands at the edge of a snow-covered field, its doors half open; two dogs chase each other "
    "past a wooden fence while, farther back, the low winter sun turns the bare birches orange. It's 4 o'clock, and smoke "
    "rises from a chimney to the left of the frame."
)
CAPTIONS = {
    "short": "a red barn",
    "capitals, punctuation, white space": " It's  a RED barn,\n isn't it?\t(3.5 m high) ",
    "long": PARAGRAPH,
    "far too long": PARAGRAPH * 4,
    "empty": "",
    "white space only": " \n ",
    "accents": "un café déjà fermé, naïve façade, Köln",
    "combining accent": "a cafe\u0301",
    "CJK": "一只红色的猫坐在窗边 雪の中の赤い納屋 빨간 헛간",
    "emoji": "🐶🌈 a dog 👩\u200d🚀 in space ❤️",
    "Arabic and Cyrillic": "حظيرة حمراء, красный сарай",
    "one endless word": "x" * 400,
}


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    """transformers' CLIP tokenizer, out of the byte pairs that open_clip bundles."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    words = list(open_clip.SimpleTokenizer().encoder)[:-2] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    bundled = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    merges = bundled[
        1 : 1 + VOCABULARY - 2 * 256 - 2
    ]  # without the header; bytes and special tokens are no merges
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf_model():
    """transformers' CLIP text model, small, with weights so large that a wrong mask or activation shows at once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=77, hidden_act="quick_gelu",
        bos_token_id=START, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.add_(0.3 * noise)
            elif "embedding" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * (0.3 if weight.ndim == 1 else 1.5 * weight.shape[1] ** -0.5))
    return model


@pytest.fixture(scope="module")
def copied(hf_model):
    """open_clip's text transformer with the weights of transformers' model."""
    module = TextTransformer(width=WIDTH, heads=HEADS, layers=LAYERS, output_dim=None, act_layer=QuickGELU)
    module.load_state_dict(_open_clip_weights(hf_model))
    return module


def _open_clip_weights(hf_model):
    hf = {name.removeprefix("text_model."): weight for name, weight in hf_model.state_dict().items()}
    weights = {
        "token_embedding.weight": hf["embeddings.token_embedding.weight"],
        "positional_embedding": hf["embeddings.position_embedding.weight"],
    }
    pairs = [("ln_final", "final_layer_norm")]
    for layer in range(LAYERS):
        here, there = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        pairs += [
            (f"{here}.ln_1", f"{there}.layer_norm1"),
            (f"{here}.ln_2", f"{there}.layer_norm2"),
            (f"{here}.attn.out_proj", f"{there}.self_attn.out_proj"),
            (f"{here}.mlp.c_fc", f"{there}.mlp.fc1"),
            (f"{here}.mlp.c_proj", f"{there}.mlp.fc2"),
        ]
        for kind in ("weight", "bias"):
            projections = [hf[f"{there}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            weights[f"{here}.attn.in_proj_{kind}"] = torch.cat(projections)
    for here, there in pairs:
        weights |= {f"{here}.{kind}": hf[f"{there}.{kind}"] for kind in ("weight", "bias")}
    return weights


def _hf_inputs(hf_tokenizer, captions, length):
    inputs = hf_tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return inputs.input_ids, inputs.attention_mask


# --- The same numbers as transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 5, 38, 77])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_hidden_states_are_those_of_transformers(hf_model, hf_tokenizer, copied, kind, length):
    tower = TextTower(copied, "copied", length, trained=False)
    ids, attention_mask = _hf_inputs(hf_tokenizer, [CAPTIONS[kind]], length)
    own_ids, mask = tower.tokenize([CAPTIONS[kind]])
    assert torch.equal(own_ids, ids)
    assert torch.equal(mask, attention_mask.bool())
    with torch.no_grad():
        expected = hf_model(ids, attention_mask).last_hidden_state
    torch.testing.assert_close(tower([CAPTIONS[kind]]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [38, 77])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_captions_that_just_fit_and_just_do_not(hf_model, hf_tokenizer, copied, length, beyond):
    caption = (
        " ".join(["dog"] * (length - 3) + ["barn"] + ["cat"] * beyond)
        if beyond >= 0
        else "dog " * (length - 3)
    )
    tower = TextTower(copied, "copied", length, trained=False)
    ids, mask = tower.tokenize([caption])
    hf_ids, attention_mask = _hf_inputs(hf_tokenizer, [caption], length)
    assert torch.equal(ids, hf_ids) and torch.equal(mask, attention_mask.bool())
    assert mask.sum() == length + min(beyond, 0)
    assert ids[0, -1] == END
    with torch.no_grad():
        expected = hf_model(hf_ids, attention_mask).last_hidden_state
    torch.testing.assert_close(tower([caption]), expected, atol=1e-5, rtol=1e-5)


def test_the_comparison_would_notice_a_missing_padding_mask_and_the_other_gelu(hf_model, copied):
    tower = TextTower(copied, "copied", 38, trained=False)
    ids, mask = tower.tokenize(["a red barn"])
    with torch.no_grad():
        unmasked = hf_model(ids, torch.ones_like(ids)).last_hidden_state
    assert (tower(["a red barn"]) - unmasked)[~mask].abs().max() > 0.1

    gelu = TextTransformer(width=WIDTH, heads=HEADS, layers=LAYERS, output_dim=None, act_layer=nn.GELU)
    gelu.load_state_dict(copied.state_dict())
    assert (
        TextTower(gelu, "GELU", 38, trained=False)(["a red barn"]) - tower(["a red barn"])
    ).abs().max() > 1e-3


def test_published_captions_have_the_ids_of_transformers(hf_tokenizer):
    files = [SHARED / "kodak" / "captions_ofa.json", SHARED / "reference" / "clic_ofa.json"]
    if not all(file.is_file() for file in files):
        pytest.skip("../shared with TACO's published captions is absent")
    captions = [caption for file in files for caption in json.loads(file.read_text()).values()]
    ids, mask = text_tower("untrained-64").tokenize(captions)
    hf_ids, attention_mask = _hf_inputs(hf_tokenizer, captions, 38)
    assert torch.equal(ids, hf_ids) and torch.equal(mask, attention_mask.bool())


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ("the dog’s “red” barn", 'the dog\'s "red" barn'),
        ("black &amp; white", "black & white"),
        ("ﬁve ｂａｒｎｓ", "five barns"),
        ("a\ufeff barn\0", "a barn"),
    ],
)
def test_text_is_cleaned_as_openai_did_and_transformers_does_not(hf_tokenizer, caption, cleaned):
    tower = text_tower("untrained-64")
    hf_ids, _ = _hf_inputs(hf_tokenizer, [caption, cleaned], tower.length)
    assert torch.equal(tower.tokenize([caption])[0], tower.tokenize([cleaned])[0])
    assert torch.equal(tower.tokenize([cleaned])[0][0], hf_ids[1])
    assert not torch.equal(hf_ids[0], hf_ids[1])


# --- What holds for every tower ---------------------------------------------------------------------------------------


@pytest.fixture(params=["copied", "untrained-64"])
def tower(request):
    if request.param == "copied":
        return TextTower(request.getfixturevalue("copied"), "copied", 38, trained=False)
    return text_tower("untrained-64", length=38)


def test_end_of_text_state_is_what_open_clip_itself_pools(tower):
    captions = list(CAPTIONS.values())[:3]
    ids, mask = TextTower(tower.module, "full length", 77, trained=False).tokenize(captions)
    with torch.no_grad():
        pooled = tower.module(ids * mask)  # open_clip pads with 0
    states = TextTower(tower.module, "full length", 77, trained=False)(captions)
    torch.testing.assert_close(states[range(3), mask.sum(1) - 1], pooled, atol=1e-5, rtol=1e-5)


def test_shapes_types_and_layout(tower):
    captions = list(CAPTIONS.values())
    ids, mask = tower.tokenize(captions)
    assert ids.shape == mask.shape == (len(captions), 38)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert (ids[:, 0] == START).all() and (ids[:, -1] == END).all()
    assert (ids[~mask] == END).all()
    assert (mask[:, :-1] >= mask[:, 1:]).all()  # real tokens first, padding after
    states = tower(captions)
    assert states.shape == (len(captions), 38, tower.dim) and states.dtype == torch.float32
    assert states.isfinite().all()


def test_a_caption_does_not_depend_on_its_batch(tower):
    captions = list(CAPTIONS.values())
    together = tower(captions)
    for index, caption in enumerate(captions):
        torch.testing.assert_close(tower([caption])[0], together[index], atol=1e-5, rtol=0)


def test_attention_is_causal_and_length_only_adds_padding(tower):
    first, second = tower(["a red barn in the snow", "a red barn on a hill"])
    torch.testing.assert_close(first[:4], second[:4], atol=1e-5, rtol=0)
    assert (first[4] - second[4]).abs().max() > 0.1

    longer = TextTower(tower.module, "longer", 77, trained=False)
    _, mask = longer.tokenize(["a red barn"])
    torch.testing.assert_close(longer(["a red barn"])[:, :38], tower(["a red barn"]), atol=1e-5, rtol=0)
    assert mask.sum() == 5


def test_a_single_string_is_one_caption(tower):
    assert torch.equal(tower("a red barn"), tower(["a red barn"]))
    assert torch.equal(tower(np.array(["a red barn"])), tower(("a red barn",)))


def test_frozen_and_float32_wherever_it_is_called(tower):
    expected = tower(["a red barn"])
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        states = tower(["a red barn"])
    assert torch.equal(states, expected) and not states.requires_grad
    assert not tower.module.training and not any(weight.requires_grad for weight in tower.module.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_states():
    captions = list(CAPTIONS.values())
    states = text_tower("untrained-64", device="cuda")(captions)
    torch.testing.assert_close(states.cpu(), text_tower("untrained-64")(captions), atol=1e-3, rtol=0)


# --- The untrained tower ----------------------------------------------------------------------------------------------


def test_untrained_tower_says_so():
    tower = text_tower("untrained-64", length=20)
    assert (tower.dim, tower.length, tower.trained) == (64, 20, False)
    assert "untrained" in tower.name and "untrained" in repr(tower)
    assert text_tower("untrained-128").dim == 128


def test_untrained_weights_follow_from_the_seed_alone_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    module = text_tower("untrained-32").module
    assert torch.equal(torch.get_rng_state(), state)
    # torch's CPU generator is MT19937 and keeps 24 bits of each draw; numpy's is written independently of it.
    drawn = torch.cat([module.positional_embedding / 0.25, module.token_embedding.weight]).double()
    bits = np.random.RandomState(UNTRAINED_SEED).randint(2**32, size=drawn.shape, dtype=np.uint32) % 2**24
    torch.testing.assert_close(drawn, torch.from_numpy(bits / 2**24 - 0.5) * 12**0.5, atol=1e-6, rtol=0)


def test_untrained_states_tell_words_and_their_order_apart():
    words = ["barn", "dog", "snow", "river", "guitar", "child", "red", "mountain"]
    states = nn.functional.normalize(text_tower("untrained-64")([f"a {word}" for word in words]), dim=-1)
    at_word, at_end = (states[:, position] @ states[:, position].T for position in (2, 3))
    others = ~torch.eye(len(words), dtype=torch.bool)
    assert at_word[others].mean() < 0.5  # another word in the same position is another vector
    assert at_end[others].mean() < 0.95  # and the end of text has heard of it

    sentences = ["a dog and a barn", "a barn and a dog"]
    first, second = nn.functional.normalize(text_tower("untrained-64")(sentences), dim=-1)
    same_word = first[2] @ second[5] + first[5] @ second[2]
    same_position = first[2] @ second[2] + first[5] @ second[5]
    assert same_word > same_position + 0.3
    assert (first[6] - second[6]).norm() > 0.1


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [-1, 0, 1, 78, 38.0, "38", True, None])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(SettingError, match="length"):
        text_tower("untrained-64", length=length)
    with pytest.raises(SettingError, match="length"):
        text_tower("ViT-B-32-quickgelu/openai", length=length)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("ViT-B-32", "model/pretrained"),
        ("", "model/pretrained"),
        ("untrained", "untrained-64"),
        ("untrained-", "untrained-64"),
        ("untrained-65", "multiple of 16"),
        ("untrained-0", "multiple of 16"),
        ("untrained-1000000000", "multiple of 16"),
        ("vit-b-32-quickgelu/openai", "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu/openapi", "openai"),
        ("ViT-B-32-quickgelu/", "openai"),
        ("ViT-B-32-quickgelu/no/such/file.bin", "nor a file"),
        ("no such model/openai", "no such model"),
        ("ViT-B-16-SigLIP/webli", "not read text as CLIP"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "not read text as CLIP"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "not read text as CLIP"),
        ("MobileCLIP-S1/datacompdr", "not read text as CLIP"),
        ("PE-Core-B-16/meta", "to 32"),
        (None, "string"),
        (["untrained-64"], "string"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(name, hint):
    with pytest.raises(SettingError, match=hint):
        text_tower(name)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_a_device_that_cannot_be_used_is_refused(device):
    with pytest.raises(SettingError, match="device"):
        text_tower("untrained-64", device=device)


@pytest.mark.parametrize(
    "captions, hint", [([], "no caption"), (None, "list of strings"), (7, "list of strings")]
)
def test_captions_must_be_a_list_that_is_not_empty(captions, hint):
    with pytest.raises(SettingError, match=hint):
        text_tower("untrained-64").tokenize(captions)


@pytest.mark.parametrize("wrong", [None, float("nan"), b"bytes", ["a nested caption"], 3])
def test_a_caption_that_is_not_a_string_is_named(wrong):
    with pytest.raises(SettingError, match="Caption 1 "):
        text_tower("untrained-64")(["a red barn", wrong])


# --- Weights: from a file, from the cache, and missing ----------------------------------------------------------------

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"width": WIDTH, "heads": HEADS, "layers": LAYERS},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, hf_model):
    """A whole small CLIP whose text half is transformers' model: its name in open_clip, configuration and weights."""
    folder = tmp_path_factory.mktemp("tiny")
    config = folder / "taco-test-tiny.json"
    config.write_text(json.dumps(TINY | {"quick_gelu": True}))
    open_clip.add_model_config(config)
    model = open_clip.create_model("taco-test-tiny")
    missing = model.load_state_dict(_open_clip_weights(hf_model), strict=False).missing_keys
    assert all(key.startswith(("visual.", "logit_scale", "text_projection")) for key in missing)
    torch.save(model.state_dict(), folder / "weights.pt")
    return config.stem, config, folder / "weights.pt"


def test_weights_from_a_file(tiny, copied):
    model, _, weights = tiny
    state = torch.get_rng_state()
    tower = text_tower(f"{model}/{weights}", length=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert tower.trained and "untrained" not in repr(tower)
    assert not hasattr(tower.module, "visual")
    assert torch.equal(tower([PARAGRAPH]), TextTower(copied, "copied", 10, trained=False)([PARAGRAPH]))


def test_damaged_and_foreign_weights_name_the_file(tiny, tmp_path):
    model, _, weights = tiny
    whole = weights.read_bytes()
    torch.save({"token_embedding.weight": torch.zeros(3, 3)}, tmp_path / "foreign.pt")
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"no weights at all")
    for file in ("foreign.pt", "truncated.pt", "empty.pt", "noise.safetensors"):
        with pytest.raises(CheckpointError, match=file):
            text_tower(f"{model}/{tmp_path / file}")


def _run(code, home, **environment):
    """Run Python in a process of its own, whose Hugging Face cache is `home` and whose hub refuses connections."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9", **environment}
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(variable, None)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_missing_weights_fail_fast_in_one_sentence_and_leave_nothing_behind(tmp_path):
    """For adapter and loss alike, and whether the hub was told to be offline or refuses."""
    code = (
        "import time\n"
        "from huggingface_hub import constants\n"
        "from taco_nb.errors import MissingWeightsError\n"
        "from taco_nb.text import clip_model, text_tower\n"
        "for constants.HF_HUB_OFFLINE in (False, True):\n"
        "    for load in (text_tower, clip_model):\n"
        "        start = time.monotonic()\n"
        "        try: load('ViT-B-32-quickgelu/openai')\n"
        "        except MissingWeightsError as error: print(time.monotonic() - start, error)\n"
    )
    done = _run(code, tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert float(line.split()[0]) < 10
        for part in (
            "ViT-B-32-quickgelu/openai",
            "open_clip_model.safetensors",
            "timm/vit_base_patch32_clip_224.openai",
            "605 MB",
            "run: taco-nb fetch ViT-B-32-quickgelu/openai",
        ):
            assert part in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_cached_weights_are_found_offline_and_get_the_gelu_they_were_trained_with(tiny, tmp_path):
    model, config, weights = tiny
    _cache(tmp_path, "taco-test/tiny", "open_clip_pytorch_model.bin", weights.read_bytes())
    _cache(tmp_path, "timm/resnet50_clip.openai", "open_clip_model.safetensors", b"half a file")
    config = config.with_stem("taco-test-gelu")
    config.write_text(json.dumps(TINY))  # without quick_gelu, as open_clip's own ViT-B-32 is
    code = (
        "import open_clip\n"
        "from open_clip import pretrained\n"
        "from taco_nb.errors import CheckpointError\n"
        "from taco_nb.text import text_tower\n"
        f"open_clip.add_model_config({str(config)!r})\n"
        "tags = {'quick': pretrained._pcfg(hf_hub='taco-test/tiny/', quick_gelu=True),\n"
        "        'exact': pretrained._pcfg(hf_hub='taco-test/tiny/')}\n"
        "pretrained._PRETRAINED['taco-test-gelu'] = tags\n"
        "for tag in tags:\n"
        "    tower = text_tower(f'taco-test-gelu/{tag}')\n"
        "    print(type(tower.module.transformer.resblocks[0].mlp.gelu).__name__, tower.trained)\n"
        "try: text_tower('RN50/openai')\n"
        "except CheckpointError as error: print('resnet50_clip.openai' in str(error))\n"
    )
    done = _run(code, tmp_path)
    assert done.stdout.split() == ["QuickGELU", "True", "GELU", "True", "True"], done.stderr


def _cache(home, repository, file, content):
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / file).write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
