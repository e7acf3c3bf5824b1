"""Experiments: what they refuse, how they are told apart, and which baseline this machine gets."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch

from taco_nb.errors import DataError, SettingError
from taco_nb.experiment import ABLATIONS, Experiment, baseline, choose_profile
from taco_nb.files import REPOSITORY
from taco_nb.model import ModelConfig
from taco_nb.settings import Sizes

CHOICES = {
    "profile": ["paper", "sample"],
    "attention": ["softmax", "linformer"],
    "linformer_sharing": ["none", "key-value", "layerwise"],
    "captions": ["published", "context", "constant"],
    "perceptual": ["lpips", "mini_distance"],
    "text_length": ["truncate", "windows"],
    "text_pooling": ["none", "keywords", "keywords-tokens"],
    "optimizer": ["adam", "muon"],
    "schedule": ["steps", "cosine", "constant"],
    "precision": ["float32", "bfloat16"],
}
needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a machine with CUDA the answer is another"
)


def test_the_defaults_are_the_published_baseline():
    exp = Experiment()
    assert (exp.lmbda, exp.k_P, exp.k_J) == (0.0004, 3.5, 0.0025)
    assert (exp.epochs, exp.batch_size, exp.crop, exp.seed) == (50, 8, 256, 100)
    assert (exp.learning_rate, exp.aux_learning_rate, exp.gradient_clip) == (1e-4, 1e-3, 1.0)
    assert (exp.text_encoder, exp.text_tokens) == ("ViT-B-32-quickgelu/openai", 38)
    assert (exp.train_data, exp.init, exp.precision) == ("coco", "", "float32")
    assert (exp.attention, exp.captions, exp.text_length, exp.text_pooling) == (
        "softmax",
        "published",
        "truncate",
        "none",
    )
    assert exp.model_config() == ModelConfig()
    assert ModelConfig() == ModelConfig(192, 320, (16, 16, 32, 64, 192), 512, 8, (224, 128))
    assert baseline("paper") == exp


def test_the_sample_baseline_needs_no_download():
    exp = baseline("sample")
    assert (exp.profile, exp.init, exp.train_data) == ("sample", "demo-trunk", "sample")
    assert (exp.text_encoder, exp.perceptual) == ("mini/flickr8k", "mini_distance")
    assert exp.k_P > 0 and exp.k_J == baseline("paper").k_J


def test_json_round_trip():
    for exp in (
        Experiment(),
        baseline("sample", lmbda=1 / 3, epochs=7, init="runs/café", seed=(1 << 32) - 1),
        Experiment(learning_rate=5e-324, k_P=1e308),
    ):
        again = Experiment.from_json(exp.to_json())
        assert again == exp and not again.diff(exp)
        assert again.sizes.groups == exp.sizes.groups and isinstance(again.sizes.groups, tuple)


def test_the_keys_of_runs_and_the_json_of_cards_have_not_changed():
    """Folders are named with a digest of it, so that a change would part runs from their notebooks."""
    assert (Experiment().key, baseline("sample").key) == ("44136fa3", "41878d2e")
    cards = sorted((REPOSITORY / "data" / "checkpoints").glob("*.json"))
    assert cards
    for card in cards:
        told = json.loads(card.read_text(encoding="utf-8"))["experiment"]
        assert json.loads(Experiment.from_json(json.dumps(told)).to_json()) == {
            **json.loads(Experiment().to_json()),
            **told,
        }


def test_json_of_an_older_version_gets_the_defaults_of_fields_it_lacks():
    assert Experiment.from_json('{"epochs": 3}') == Experiment(epochs=3)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", '{"epochs": 3'])
def test_text_that_is_no_experiment(text):
    with pytest.raises(SettingError, match="not an experiment's JSON"):
        Experiment.from_json(text)


def test_json_is_checked_like_every_other_input():
    with pytest.raises(SettingError, match="'epoch'.*'epochs'"):
        Experiment.from_json('{"epoch": 3}')
    with pytest.raises(SettingError, match="lmbda must be above 0"):
        Experiment.from_json('{"lmbda": NaN}')


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("lambda", "lmbda"),
        ("epoch", "epochs"),
        ("k_p", "k_P"),
        ("learning_rat", "learning_rate"),
        ("Seed", "seed"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_right_one(misspelt, meant):
    for make in (Experiment().replace, lambda **changes: baseline("sample", **changes)):
        with pytest.raises(SettingError, match=f"'{misspelt}'.*'{meant}'"):
            make(**{misspelt: 1})


def test_a_setting_like_no_other_is_refused_with_all_of_them():
    with pytest.raises(SettingError) as error:
        Experiment().replace(xyzzy=1)
    assert all(field.name in str(error.value) for field in dataclasses.fields(Experiment))


WRONG = {
    str: ("text", [None, 3, True, ["coco"], b"coco"]),
    int: ("a whole number", [None, "64", 64.0, True, [64]]),
    float: ("a number", [None, "0.1", True, False, [0.1], 1j]),
    Sizes: ("a dictionary", [None, "N=192", [("N", 192)], 192]),
}


@pytest.mark.parametrize(
    "name, wanted, wrong",
    [
        (name, WRONG[type(value)][0], w)
        for name, value in vars(Experiment()).items()
        for w in WRONG[type(value)][1]
    ],
)
def test_values_of_the_wrong_type_name_their_field(name, wanted, wrong):
    wanted = " or ".join(f'"{choice}"' for choice in CHOICES[name][-2:]) if name in CHOICES else wanted
    with pytest.raises(SettingError) as caught:
        Experiment().replace(**{name: wrong})
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(f"{wanted}, but is {wrong!r}.")


NOT_ABOVE_0 = [0, -1, float("nan"), float("inf")]
OUT_OF_RANGE = {
    "lmbda": NOT_ABOVE_0,
    "learning_rate": NOT_ABOVE_0,
    "aux_learning_rate": NOT_ABOVE_0,
    "gradient_clip": NOT_ABOVE_0,
    "keyword_weight": NOT_ABOVE_0,
    "k_P": [-1e-9, float("nan"), float("inf")],
    "k_J": [-1, float("nan"), float("-inf")],
    "epochs": [0, -5],
    "batch_size": [0, -1],
    "linformer_k": [0, -1],
    "seed": [-1, 1 << 32],
    "text_tokens": [1, 78],
    "crop": [0, 63, 100, -64],
    **{name: ["", "other", choices[0].upper()] for name, choices in CHOICES.items()},
}


@pytest.mark.parametrize("name, wrong", [(n, w) for n, values in OUT_OF_RANGE.items() for w in values])
def test_values_out_of_range_name_their_field(name, wrong):
    with pytest.raises(SettingError, match=rf"^{name} must be .*, but is "):
        Experiment().replace(**{name: wrong})


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"lmbda": -1}, "lmbda must be above 0, but is -1."),
        ({"k_P": float("nan")}, "k_P must be 0 or above, but is nan."),
        ({"seed": -1}, "seed must be from 0 to 4294967295, but is -1."),
        ({"crop": 100}, "crop must be a multiple of 64, but is 100."),
        ({"captions": "own"}, """captions must be "published", "context" or "constant", but is 'own'."""),
        ({"text_pooling": 1}, 'text_pooling must be "none", "keywords" or "keywords-tokens", but is 1.'),
        ({"epoch": 1}, "An Experiment has no setting 'epoch'. Did you mean 'epochs'?"),
        ({"sizes": {"grups": (4, 4)}}, "The sizes have no setting 'grups'. Did you mean 'groups'?"),
        ({"sizes": {"N": 1}}, "sizes: N must be 2 or above, but is 1."),
        ({"sizes": {"groups": [3.5]}}, "Each of the groups must be a whole number, but one is 3.5."),
        ({"sizes": {"M": 5}}, "groups=(16, 16, 32, 64, 192) add up to 320, but must add up to M=5."),
        ({"text_length": "windows", "text_pooling": "keywords"}, "Keyword weights weigh one window: text_pooling needs "
         'text_length="truncate".'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(wrong, sentence):
    for make in (Experiment().replace, lambda **settings: Experiment(**settings)):
        with pytest.raises(SettingError) as caught:
            make(**wrong)
        assert str(caught.value) == sentence


def test_the_ends_of_the_ranges_are_allowed():
    Experiment(k_P=0, k_J=0, epochs=1, batch_size=1, seed=0, text_tokens=2, crop=64)
    Experiment(text_tokens=77, seed=(1 << 32) - 1, crop=1024)


def test_whole_numbers_pass_for_numbers():
    exp = Experiment(k_P=3, lmbda=1)
    assert type(exp.k_P) is type(exp.lmbda) is float
    assert exp == Experiment(k_P=3.0, lmbda=1.0)
    assert exp.to_json() == Experiment(k_P=3.0, lmbda=1.0).to_json()


def test_sizes_take_lists_and_check_names_and_types():
    exp = Experiment(sizes={"N": 192, "groups": [16, 16, 32, 64, 192], "context_widths": [224, 128]})
    assert exp == Experiment()
    with pytest.raises(SettingError, match="^The sizes have no setting 'n'.*N, M, groups"):
        exp.replace(sizes={"n": 64})
    for wrong in ({"N": "64"}, {"N": 64.0}, {"N": True}, {"groups": 5}, {"context_widths": None}):
        with pytest.raises(SettingError, match=f"^sizes: {next(iter(wrong))} must be"):
            exp.replace(sizes=wrong)


def test_an_experiment_is_frozen_and_shares_no_state():
    exp = baseline("sample")
    with pytest.raises(dataclasses.FrozenInstanceError):
        exp.lmbda = 1.0
    changed = exp.replace(lmbda=1.0)
    assert (changed.lmbda, exp.lmbda) == (1.0, baseline("sample").lmbda)
    with pytest.raises(dataclasses.FrozenInstanceError):
        exp.sizes.N = 8
    assert pickle.loads(pickle.dumps(exp)) == exp != changed
    assert len({exp, changed, baseline("sample")}) == 2


def test_diff_is_what_was_replaced():
    exp = Experiment()
    assert exp.diff(exp.replace(lmbda=0.0004)) == {}
    assert exp.diff(exp.replace(lmbda=0.0016, init="demo")) == {
        "lmbda": (0.0004, 0.0016),
        "init": ("", "demo"),
    }
    smaller = exp.replace(sizes={"N": 64})
    assert exp.diff(smaller) == {"sizes": (vars(exp.sizes), vars(exp.sizes) | {"N": 64})}
    assert smaller.diff(exp) == {"sizes": (vars(smaller.sizes), vars(exp.sizes))}


def test_every_choice_is_allowed_and_tells_experiments_apart():
    exp = Experiment()
    others = [exp.replace(**{name: choice}) for name, choices in CHOICES.items() for choice in choices]
    assert all(len(exp.diff(other)) <= 1 for other in others)
    assert len({other.key for other in others}) == 1 + sum(len(choices) - 1 for choices in CHOICES.values())
    assert Experiment.from_json(others[0].to_json()).key == others[0].key
    assert all(f"{field.name} " in str(exp) for field in dataclasses.fields(exp))


def test_ablations_are_named_by_what_they_change_to():
    exp = Experiment(lmbda=1, linformer_k=8)
    assert exp.ablations == {}
    changed = exp.replace(attention="linformer", captions="context", text_pooling="keywords")
    assert list(changed.ablations.items()) == [
        ("captions", "context"), ("attention", "linformer"), ("text_pooling", "keywords"),
    ]  # fmt: skip
    assert tuple(changed.ablations) == ABLATIONS


@pytest.mark.parametrize("profile", ["paper", "sample"])
def test_a_profile_asked_for_is_given(profile):
    assert choose_profile(profile) == (profile, f'Profile "{profile}", as asked for.')
    assert baseline(profile).profile == profile


@needs_no_cuda
def test_auto_says_what_is_missing_and_how_to_get_the_other(tmp_path):
    profile, why = choose_profile("auto", tmp_path)
    assert profile == "sample"
    assert (
        "no CUDA device and no MS-COCO in" in why
        and str(tmp_path / "coco") in why
        and 'profile="paper"' in why
    )

    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    profile, why = choose_profile("auto", tmp_path)
    assert profile == "sample" and "no CUDA device" in why and "MS-COCO" not in why
    assert baseline(data_dir=tmp_path) == baseline("sample")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_auto_is_paper_where_cuda_and_coco_are(tmp_path):
    assert choose_profile("auto", tmp_path)[0] == "sample"
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    profile, why = choose_profile("auto", tmp_path)
    assert profile == "paper" and 'profile="sample"' in why
    assert baseline(data_dir=tmp_path) == Experiment()


def test_the_data_folder_is_named_as_it_is_seen_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.resolve())
    (tmp_path / "data").mkdir()
    assert "no MS-COCO in data/coco:" in choose_profile("auto", "data")[1].replace("\\", "/")
    with pytest.raises(DataError, match="missing"):
        choose_profile("auto", tmp_path / "missing")


@pytest.mark.parametrize("profile", ["", "Auto", "demo", None, 3])
def test_an_unknown_profile(profile):
    with pytest.raises(SettingError, match='"auto", "paper" or "sample"'):
        choose_profile(profile)


def test_settings_are_at_hand_without_waiting_for_torch():
    code = "import sys, taco_nb; taco_nb.baseline('paper'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
