"""Data sets give every image with its own captions, or name the file that stands in the way."""

import hashlib
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PLAIN
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import CenterCrop

from taco_nb.data import CaptionedFolder, Coco, TrainPairs, datasets, training_pairs
from taco_nb.data.captioned import NO_PICTURES, image_extensions
from taco_nb.data.images import pixels, to_rgb
from taco_nb.errors import DataError, SettingError
from taco_nb.evaluation.protocol import PUBLISHED_CAPTIONS
from taco_nb.files import BUNDLED, REPOSITORY, sha256

SHARED = Path(__file__).resolve().parents[2] / "shared"
SAMPLE = REPOSITORY / "data" / "sample" / "annotations"


def shared(*names: str) -> Path:
    for name in names:
        if not (SHARED / name).is_dir():
            pytest.skip(f"../shared/{name} is not on this machine")
    return SHARED


def picture(path: Path, size=(40, 30), seed=0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def folder(root: Path, **captions) -> CaptionedFolder:
    """A folder with b.png and a.JPG; `captions` replace or extend their entries."""
    for seed, name in enumerate(("b.png", "a.JPG")):
        picture(root / name, seed=seed)
    return CaptionedFolder(
        root, write(root / "captions.json", {"b.png": "b", "a.JPG": ["a", "A"], **captions})
    )


# ---- a folder with captions


def test_folder_gives_each_image_with_its_captions(tmp_path):
    pixels = picture(tmp_path / "b.png")
    dataset = folder(tmp_path, **{"b.png": ""})
    for stray in ("README.md", "._b.png", "sub/c.png"):
        write(tmp_path / stray, "not one of the images")
    again = CaptionedFolder(tmp_path, tmp_path / "captions.json", name="mine")
    assert (dataset.name, again.name) == (tmp_path.name, "mine")
    assert dataset.names == again.names == ("a.JPG", "b.png")
    assert [dataset.captions(i) for i in range(len(dataset))] == [("a", "A"), ("",)]
    name, image, captions = dataset[1]
    assert (name, captions) == ("b.png", ("",)) and np.array_equal(np.asarray(image), pixels)
    assert [sample.name for sample in dataset] == list(dataset.names)
    with pytest.raises(IndexError):
        dataset[2]


def test_folder_may_be_a_link_and_may_hold_links_within(tmp_path):
    picture(tmp_path / "real" / "b.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "c.png").symlink_to("b.png")
    folder(tmp_path / "real", **{"c.png": "c"})
    dataset = CaptionedFolder(tmp_path / "link", tmp_path / "link" / "captions.json")
    assert dataset.names == ("a.JPG", "b.png", "c.png") and dataset[2].image == dataset[1].image


def test_an_unreadable_image_is_named_when_it_is_asked_for(tmp_path):
    dataset = folder(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:1000])
    assert dataset[0].name == "a.JPG" and dataset.captions(1) == ("b",)
    with pytest.raises(DataError, match="b.png cannot be read"):
        dataset[1]
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match="b.png"):
        dataset[1]


@pytest.mark.parametrize(
    "captions, complaint",
    [
        ({"c.png": "x"}, r"not in .*: c\.png"),
        ({"../c.png": "x"}, r"leads out of the folder .*: \.\./c\.png"),
        ({"/etc/c.png": "x"}, r"leads out of the folder .*: /etc/c\.png"),
        ({"..\\c.png": "x"}, r"leads out of the folder"),
        ({"b.png": []}, r"captions\.json: .* b\.png is empty"),
        ({"b.png": 3}, r"captions\.json: .* b\.png must be"),
        ({"b.png": None}, r"captions\.json: .* b\.png must be"),
        ({"b.png": ["x", 3]}, r"captions\.json: .* b\.png must be"),
    ],
)
def test_bad_captions_are_named(tmp_path, captions, complaint):
    with pytest.raises(DataError, match=complaint):
        folder(tmp_path, **captions)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"b.png": "b",\n "a.JPG" "a"}', "line 2, column 10"),
        ("", "line 1, column 1"),
        ("[]", "not a list"),
        ('{"b.png": "b", "a.JPG": "a", "b.png": "c"}', "more than once: b.png"),
        ("[" * 100000, "cannot be read as JSON"),
    ],
)
def test_a_bad_captions_file_is_named(tmp_path, text, complaint):
    folder(tmp_path)
    with pytest.raises(DataError, match=f"captions.json.*{complaint}"):
        CaptionedFolder(tmp_path, write(tmp_path / "captions.json", text))


def test_captions_files_in_other_encodings(tmp_path):
    folder(tmp_path)
    path = tmp_path / "captions.json"
    path.write_text('{"b.png": "b", "a.JPG": "été 夏"}', encoding="utf-8-sig")
    assert CaptionedFolder(tmp_path, path).captions(0) == ("été 夏",)
    path.write_text('{"b.png": "b", "a.JPG": "été"}', encoding="latin-1")
    with pytest.raises(DataError, match="captions.json cannot be read as JSON"):
        CaptionedFolder(tmp_path, path)


def test_missing_captions_name_five_images(tmp_path):
    for n in range(7):
        picture(tmp_path / f"{n}.png")
    with pytest.raises(DataError, match="Missing captions: .* 0.png, 1.png, 2.png, 3.png, 4.png and 2 more"):
        CaptionedFolder(tmp_path, write(tmp_path / "captions.json", {}))


def test_missing_files_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="absent"):
        CaptionedFolder(tmp_path / "absent", write(tmp_path / "captions.json", {}))
    with pytest.raises(DataError, match="holds no image"):
        CaptionedFolder(tmp_path, tmp_path / "captions.json")
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="no captions file .*absent.json"):
        CaptionedFolder(tmp_path, tmp_path / "absent.json")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    picture(tmp_path / "secret.png")
    folder(tmp_path / "in")
    (tmp_path / "in" / "b.png").unlink()
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"in/b\.png is a link that leads out"):
        CaptionedFolder(tmp_path / "in", tmp_path / "in" / "captions.json")


def test_checksum_changes_with_names_pixels_and_captions_only(tmp_path):
    first = folder(tmp_path / "1").checksum()
    assert first == folder(tmp_path / "2").checksum() and len(first) == 64
    changed = [folder(tmp_path / "3", **{"b.png": "c"}), folder(tmp_path / "4", **{"a.JPG": ["aA"]})]
    picture(tmp_path / "3" / "c.png")
    changed.append(folder(tmp_path / "3", **{"c.png": "c"}))
    dataset = folder(tmp_path / "5")
    picture(tmp_path / "5" / "b.png", seed=9)
    assert changed[-1].head(2).checksum() == first  # a view's is that of the images in it
    sums = [first, dataset.checksum(), *(other.checksum() for other in changed)]
    assert len(set(sums)) == len(sums)


def test_views(tmp_path):
    picture(tmp_path / "c.png", size=(20, 60))
    dataset = folder(tmp_path, **{"c.png": "c"})
    assert (
        dataset.head(1).names == ("a.JPG",) and dataset.head(9).names == dataset.names and len(dataset) == 3
    )
    view = dataset.centre_crop(25)
    assert (view.names, view.skipped, dataset.skipped) == (("a.JPG", "b.png"), 1, 0)
    assert np.array_equal(np.asarray(view[1].image), np.asarray(dataset[1].image)[2:27, 8:33])
    for size in ((25, 26), (26, 27), (27, 28), (28, 25)):
        image = Image.fromarray(picture(tmp_path / "c.png", size))
        assert same(dataset.centre_crop(25)[2].image, CenterCrop(25)(image))
    assert view.head(1)[0].image.size == (25, 25) and view.head(1).skipped == 1
    for bad in (0, -1, 2.5, "3"):
        with pytest.raises(SettingError):
            dataset.head(bad)
        with pytest.raises(SettingError):
            dataset.centre_crop(bad)
    with pytest.raises(DataError, match="No image"):
        dataset.centre_crop(100)


# ---- what other people's files are like

NFC, NFD = "caf\u00e9.jpg", "cafe\u0301.jpg"


@pytest.mark.parametrize("disk, key", [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_names_match_however_their_accents_are_encoded(tmp_path, disk, key):
    """In a folder's captions, in other captions for it, in MS-COCO's annotations and in Karpathy's."""
    picture(tmp_path / "images" / disk)
    dataset = CaptionedFolder(tmp_path / "images", write(tmp_path / "captions.json", {key: "a cup"}))
    assert dataset.names == (NFC,) and dataset[0].captions == ("a cup",)
    assert dataset.recaptioned(write(tmp_path / "other.json", {key: "tea"})).captions(0) == ("tea",)
    size = {"width": 40, "height": 30}
    content = {
        "images": [{"id": 1, "file_name": key, **size}],
        "annotations": [{"id": 2, "image_id": 1, "caption": "a"}],
    }
    write(tmp_path / "annotations" / "captions_train.json", content)
    assert Coco(tmp_path, "train").names == (NFC,)
    (tmp_path / "images").rename(tmp_path / "val2014")
    image = {"filepath": "val2014", "filename": key, "cocoid": 1, "split": "val", "sentences": [{"raw": "a"}]}
    write(tmp_path / "dataset_coco.json", {"images": [image]})
    write(tmp_path / "annotations" / "captions_val2014.json", {"images": [{"file_name": disk, **size}]})
    karpathy = Coco(tmp_path, "val", karpathy=True)
    (tmp_path / "val2014" / disk).write_bytes(b"not opened, since the annotations have its size")
    assert karpathy.names == (NFC,) and karpathy.short_side(0) == 30


def test_two_names_that_differ_in_their_accents_encoding_only_are_named(tmp_path):
    picture(tmp_path / NFC)
    with pytest.raises(
        DataError, match="the same key more than once, with its accents encoded in two ways: cafe"
    ):
        CaptionedFolder(tmp_path, write(tmp_path / "captions.json", {NFC: "a", NFD: "b"}))
    picture(tmp_path / NFD)
    if len(list(tmp_path.glob("*.jpg"))) == 2:  # not on macOS, where they are one file
        with pytest.raises(DataError, match="two files that are both called"):
            CaptionedFolder(tmp_path, write(tmp_path / "captions.json", {NFC: "a"}))


def test_every_kind_of_file_that_pillow_reads_is_an_image(tmp_path):
    """Those that it writes too, under each of their extensions, must come back; others it must know by their extension."""
    assert {".png", ".jfif", ".jp2", ".avif", ".gif", ".psd", ".tga", ".webp"} <= image_extensions()
    written = 0
    for extension in sorted(image_extensions()):
        kind = Image.registered_extensions()[extension]
        assert kind not in NO_PICTURES
        for mode in ("RGB", "P", "L", "1") if kind in Image.SAVE else ():
            try:
                Image.new(mode, (64, 64), 1).save(tmp_path / f"{written}{extension.upper()}", kind)
            except (OSError, ValueError):  # not in this mode
                continue
            written += 1
            break
    captions = {path.name: "x" for path in tmp_path.iterdir()}
    dataset = CaptionedFolder(tmp_path, write(tmp_path / "captions.json", captions))
    assert len(dataset) == written > 30 and all(
        sample.image.size == (64, 64) for sample in dataset if not sample.name.endswith(".ICNS")
    )


CUT = '"a cat \\ud83d"'  # an emoji of two halves, as JSON writes them, after the first


@pytest.mark.parametrize(
    "text, complaint",
    [
        (f'{{"b.png": {CUT}, "a.JPG": "a"}}', "b.png"),
        (f'{{"b.png": ["b", {CUT}], "a.JPG": "a"}}', "b.png"),
        ('{"b.png": "b", "a\\uDC00.JPG": "a"}', "dc00.JPG"),
    ],
)
def test_captions_that_no_file_can_hold_are_named_at_opening(tmp_path, text, complaint):
    dataset = folder(tmp_path)
    path = write(tmp_path / "captions.json", text)
    for read in (lambda: CaptionedFolder(tmp_path, path), lambda: dataset.recaptioned(path)):
        with pytest.raises(DataError, match=rf"captions\.json: .*{complaint}.* cannot be written as UTF-8"):
            read()
    write(path, text.replace("\\ud83d", "\\ud83d\\ude00").replace("\\uDC00", ""))
    assert CaptionedFolder(tmp_path, path).captions(1)[-1] in ("a cat \U0001f600", "b")


def test_annotations_that_no_file_can_hold_are_named_at_opening(tmp_path):
    content = coco_files(tmp_path)
    content["annotations"][3]["caption"] = "a cat \ud83d"
    write(tmp_path / "annotations" / "captions_train.json", content)
    with pytest.raises(
        DataError, match=r"captions_train\.json: .*'image_id': 7.* cannot be written as UTF-8"
    ):
        Coco(tmp_path, "train")


def test_what_an_unreadable_image_is_answered_with_helps(tmp_path):
    """Both ways that the error names lead on, in reading; and in training, each as it says."""
    from taco_nb import baseline, fit

    for n in range(4):
        picture(tmp_path / "data" / f"{n}.png", (64, 64), seed=n)
    sound, captions = tmp_path / "data" / "2.png", {f"{n}.png": "noise" for n in range(4)}
    whole = sound.read_bytes()
    write(tmp_path / "data" / "captions.json", captions)
    sizes = {"N": 8, "M": 16, "groups": (4, 12), "text_dim": 16, "heads": 2, "context_widths": (8, 8)}
    exp = baseline(
        "sample", train_data=str(tmp_path / "data"), sizes=sizes, init="", crop=64,
        epochs=1, batch_size=1, **PLAIN | {"text_encoder": "untrained-16"},
    )  # fmt: skip

    def train(out: str):
        return fit(exp, tmp_path / out, device="cpu", save_minutes=0.0)

    sound.write_bytes(whole[:1000])
    advice = "2.png cannot be read .* Replace it with a sound copy, or remove it and its captions from the data set."
    with pytest.raises(
        DataError, match=advice + " With the copy a run that has begun goes on; without .* in another out_dir"
    ):
        train("run")
    shutil.copytree(tmp_path / "run", tmp_path / "early")
    sound.write_bytes(whole)
    assert train("run").steps == 4
    sound.write_bytes(whole[:1000])
    with pytest.raises(DataError, match=advice):
        list(CaptionedFolder(tmp_path / "data", tmp_path / "data" / "captions.json"))
    sound.unlink()
    captions.pop("2.png")
    write(tmp_path / "data" / "captions.json", captions)
    assert len(list(CaptionedFolder(tmp_path / "data", tmp_path / "data" / "captions.json"))) == 3
    with pytest.raises(SettingError, match="another out_dir"):
        train("early")
    assert train("another").steps == 3


# ---- COCO's format


def coco_files(root: Path, sizes=((40, 30), (30, 40), (20, 60)), annotated=True) -> dict:
    """The sample layout with a train split of len(sizes) images, two captions each; returns the annotations."""
    content = {"images": [], "annotations": []}
    for n, (width, height) in enumerate(sizes):
        picture(root / "images" / f"{n}.png", (width, height), seed=n)
        size = {"width": width, "height": height} if annotated else {}
        content["images"].append({"id": 7 * n, "file_name": f"{n}.png", **size})
        content["annotations"] += [
            {"id": 2 * n + k, "image_id": 7 * n, "caption": f"{n}.{k}"} for k in (0, 1)
        ]
    write(root / "annotations" / "captions_train.json", content)
    return content


def test_coco_joins_captions_to_images(tmp_path):
    content = coco_files(tmp_path)
    content["images"].reverse()
    write(tmp_path / "annotations" / "captions_train.json", content)
    dataset = Coco(tmp_path, "train")
    assert dataset.name == "coco-train" and dataset.names == ("0.png", "1.png", "2.png")
    assert [dataset.captions(i) for i in range(3)] == [("0.0", "0.1"), ("1.0", "1.1"), ("2.0", "2.1")]
    assert [sample.image.size for sample in dataset] == [(40, 30), (30, 40), (20, 60)]
    assert [dataset.short_side(i) for i in range(3)] == [30, 30, 20]


def changed(content: dict, list_name: str, n: int, **fields) -> dict:
    content[list_name][n].update(fields)
    return content


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda c: changed(c, "images", 1, id=0), "image ids more than once: 0"),
        (lambda c: changed(c, "images", 1, file_name="0.png"), "file names more than once: 0.png"),
        (lambda c: changed(c, "annotations", 1, id=0), "annotation ids more than once: 0"),
        (lambda c: changed(c, "annotations", 1, image_id=99), "does not list: 99"),
        (lambda c: changed(c, "images", 1, file_name="../0.png"), r"leads out of the folder .*\.\./0.png"),
        (lambda c: changed(c, "images", 1, file_name="9.png"), r"not in .*images: 9.png \(id 7\)"),
        (lambda c: changed(c, "images", 1, id="x"), r"images\[1\] must have 'id' of type int"),
        (lambda c: changed(c, "images", 1, id=True), r"images\[1\] must have 'id' of type int"),
        (lambda c: changed(c, "images", 1, file_name=None), r"images\[1\] must have 'file_name'.*'id': 7"),
        (
            lambda c: changed(c, "annotations", 2, caption=["x"]),
            r"annotations\[2\] must have 'caption' of type str",
        ),
        (lambda c: {**c, "annotations": c["annotations"][:4]}, r"Missing captions: .* 2.png \(id 14\)"),
        (lambda c: {**c, "images": [*c["images"], 3]}, r"images\[3\] must have 'id'"),
        (lambda c: {**c, "images": {}}, "must have 'images' of type list"),
        (lambda c: {**c, "images": [], "annotations": []}, "lists no image"),
        (lambda c: {"images": c["images"]}, "must have 'annotations' of type list"),
        (lambda c: [], "must have 'annotations' of type list"),
        (lambda c: json.dumps(c)[:-9], "not JSON: .* line 1, column"),
    ],
)
def test_bad_annotations_name_file_and_id(tmp_path, spoil, complaint):
    path = tmp_path / "annotations" / "captions_train.json"
    write(path, spoil(coco_files(tmp_path)))
    with pytest.raises(DataError, match=complaint) as raised:
        Coco(tmp_path, "train")
    assert str(path) in str(raised.value)


def karpathy_files(root: Path) -> dict:
    content = {"images": []}
    for n, split in enumerate(("train", "restval", "restval", "val", "test")):
        part = "train2014" if split == "train" else "val2014"
        picture(root / part / f"{n}.jpg", (40 - 5 * n, 30), seed=n)
        sentences = [{"raw": f"{n}.{k}"} for k in range(3)]
        image = {
            "filepath": part,
            "filename": f"{n}.jpg",
            "cocoid": n,
            "split": split,
            "sentences": sentences,
        }
        content["images"].append(image)
    write(root / "dataset_coco.json", content)
    return content


def test_karpathys_splits_are_told_apart(tmp_path):
    karpathy_files(tmp_path)
    splits = {split: Coco(tmp_path, split, karpathy=True) for split in ("train", "restval", "val", "test")}
    assert [dataset.names for dataset in splits.values()] == [
        ("0.jpg",),
        ("1.jpg", "2.jpg"),
        ("3.jpg",),
        ("4.jpg",),
    ]
    assert splits["restval"].captions(1) == ("2.0", "2.1", "2.2")
    assert splits["restval"].centre_crop(30).names == ("1.jpg", "2.jpg")  # 30 wide, read from the header
    assert splits["val"][0].image.size == (25, 30)
    sizes = {"images": [{"file_name": "1.jpg", "width": 40, "height": 29}]}
    write(tmp_path / "annotations" / "captions_val2014.json", sizes)
    view = Coco(tmp_path, "restval", karpathy=True).centre_crop(30)
    assert (
        view.names == ("2.jpg",) and view.skipped == 1
    )  # COCO's own file, where there is one, knows the sizes


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"filepath": "../val2014"}, r"images\[1\] \(id 1\): filepath"),
        ({"filename": "../val2014/1.jpg"}, "leads out of the folder"),
        ({"filename": "7.jpg"}, r"7.jpg \(id 1\)"),
        ({"cocoid": 2}, "image ids more than once: 2"),
        ({"cocoid": None}, r"images\[1\] must have 'cocoid'"),
        ({"sentences": []}, r"Missing captions: .*1.jpg \(id 1\)"),
        ({"sentences": [{"tokens": []}]}, r"images\[1\], sentences\[0\] must have 'raw'"),
        ({"split": None}, r"images\[1\] must have 'split'"),
    ],
)
def test_bad_karpathy_files_are_named(tmp_path, fields, complaint):
    path = write(tmp_path / "dataset_coco.json", changed(karpathy_files(tmp_path), "images", 1, **fields))
    with pytest.raises(DataError, match=complaint) as raised:
        Coco(tmp_path, "restval", karpathy=True)
    assert str(path) in str(raised.value)


def test_absent_annotations_are_named(tmp_path):
    with pytest.raises(DataError, match="captions_val2014.json nor .*captions_val.json"):
        Coco(tmp_path, "val")
    with pytest.raises(DataError, match="dataset_coco.json"):
        Coco(tmp_path, "val", karpathy=True)


def test_unknown_splits_name_the_known(tmp_path):
    with pytest.raises(SettingError, match="restval.*train, val"):
        Coco(tmp_path, "restval")
    with pytest.raises(SettingError, match="'dev'.*train, restval, val, test"):
        Coco(tmp_path, "dev", karpathy=True)


# ---- training pairs


@pytest.mark.parametrize("annotated", [True, False])
def test_every_caption_of_every_large_image_is_a_sample(tmp_path, annotated):
    coco_files(tmp_path, annotated=annotated)
    dataset = Coco(tmp_path, "train")
    pairs = TrainPairs(dataset, crop=25)
    assert pairs.skipped == 1 and [caption for _, caption in islice(pairs, len(pairs))] == [
        "0.0",
        "0.1",
        "1.0",
        "1.1",
    ]
    for x, caption in pairs:
        whole = pixels(dataset[int(caption[0])].image)
        windows = whole.unfold(1, 25, 1).unfold(2, 25, 1)  # (3, rows, columns, 25, 25): every crop there is
        assert x.shape == (3, 25, 25) and x.dtype == torch.uint8
        assert (windows == x[:, None, None]).all(-1).all(-1).all(0).sum() == 1


def test_an_image_of_just_the_crops_size_is_used_whole(tmp_path):
    coco_files(tmp_path, sizes=[(25, 25)])
    dataset = Coco(tmp_path, "train")
    assert torch.equal(TrainPairs(dataset, crop=25)[0][0], pixels(dataset[0].image))
    with pytest.raises(DataError, match="No image of coco-train has both sides >= 26"):
        TrainPairs(dataset, crop=26)


def test_crops_reach_every_position(tmp_path):
    coco_files(tmp_path, sizes=[(10, 9)])
    pairs = TrainPairs(Coco(tmp_path, "train"), crop=8)
    seen = set()
    for epoch in range(60):
        pairs.set_epoch(epoch)
        seen.add(pairs[0][0].numpy().tobytes())
    assert len(seen) == 3 * 2


def test_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    coco_files(tmp_path)
    dataset = Coco(tmp_path, "train")

    def crops(seed, epoch, order=range(6)):
        pairs = TrainPairs(dataset, crop=20, seed=seed)
        pairs.set_epoch(epoch)
        torch.rand(len(order)), np.random.rand(len(order))  # the global generators' state is of no account
        return {i: pairs[i][0] for i in order}

    first = crops(1, 5)
    for again in (crops(1, 5, order=(3, 1, 0, 2)), crops(1, 5, order=(2,)), crops(1, 5, order=(-1,))):
        assert all(torch.equal(x, first[i % 6]) for i, x in again.items())
    for other in (crops(1, 6), crops(2, 5)):
        assert any(not torch.equal(x, first[i]) for i, x in other.items())
    assert not torch.equal(first[0], first[1])  # two captions of one image: two crops of their own


def test_workers_change_nothing_even_when_they_outlive_an_epoch(tmp_path):
    coco_files(tmp_path)
    pairs = TrainPairs(Coco(tmp_path, "train"), crop=20, seed=3)

    def epochs(**workers):
        loader = DataLoader(pairs, batch_size=2, **workers)
        for epoch in range(2):
            pairs.set_epoch(epoch)
            yield from ((x, list(captions)) for x, captions in loader)

    alone, many = list(epochs()), list(epochs(num_workers=2, persistent_workers=True))
    assert len(alone) == len(many) == 2 * 3
    assert all(
        torch.equal(x, x2) and captions == captions2 for (x, captions), (x2, captions2) in zip(alone, many)
    )
    assert any(not torch.equal(x, later) for (x, _), (later, _) in zip(alone[:3], alone[3:]))


def test_an_annotation_that_overstates_an_image_is_an_error(tmp_path):
    content = coco_files(tmp_path, sizes=[(40, 30)])
    write(
        tmp_path / "annotations" / "captions_train.json", changed(content, "images", 0, width=900, height=900)
    )
    dataset = Coco(tmp_path, "train")
    with pytest.raises(DataError, match="0.png .* 40x30"):
        TrainPairs(dataset, crop=100)[0]
    with pytest.raises(DataError, match="0.png is 40x30"):
        dataset.centre_crop(100)[0]


@pytest.mark.parametrize("setting", [{"crop": 0}, {"crop": 2.5}, {"seed": -1}, {"seed": 1.5}])
def test_bad_settings_of_pairs_are_named(tmp_path, setting):
    with pytest.raises(SettingError, match=next(iter(setting))):
        TrainPairs(folder(tmp_path), **{"crop": 20, **setting})


# ---- data sets by name


@pytest.fixture
def minicoco(tmp_path):
    (tmp_path / "coco").symlink_to(shared("minicoco") / "minicoco")
    return tmp_path


def test_coco_evaluation_is_karpathys_restval_in_centre_crops(minicoco):
    (dataset,) = datasets("coco", data_dir=minicoco)
    entries = json.loads((minicoco / "coco" / "dataset_coco.json").read_text())["images"]
    restval = {
        e["filename"]: tuple(s["raw"] for s in e["sentences"]) for e in entries if e["split"] == "restval"
    }
    sizes = {name: Image.open(minicoco / "coco" / "val2014" / name).size for name in restval}
    assert dataset.names == tuple(sorted(name for name in restval if min(sizes[name]) >= 256))
    assert dataset.skipped == len(restval) - len(dataset)
    assert all(dataset.captions(i) == restval[name] for i, name in enumerate(dataset.names))
    width, height = sizes[dataset.names[0]]
    whole = to_rgb(minicoco / "coco" / "val2014" / dataset.names[0])
    left, top = round((width - 256) / 2), round((height - 256) / 2)
    assert same(dataset[0].image, whole.crop((left, top, left + 256, top + 256)))
    assert all(sample.image.size == (256, 256) for sample in islice(dataset, 8))


def test_coco_training_is_every_caption_of_every_large_image(minicoco):
    pairs = training_pairs("coco", crop=256, data_dir=minicoco, seed=1)
    sizes = [Image.open(path).size for path in (minicoco / "coco" / "train2014").glob("*.jpg")]
    large = sum(min(size) >= 256 for size in sizes)
    assert len(pairs) == 5 * large and pairs.skipped == len(sizes) - large > 0
    x, caption = pairs[7]
    name = pairs.dataset.names[1]
    whole = pixels(to_rgb(minicoco / "coco" / "train2014" / name))
    assert caption == pairs.dataset.captions(1)[2]
    corners = (whole[:, :-255, :-255] == x[:, :1, :1]).all(0).nonzero()
    assert any(torch.equal(whole[:, top : top + 256, left : left + 256], x) for top, left in corners.tolist())


KODAK = tuple(f"kodim{n:02}.png" for n in range(1, 25))


def test_kodak_is_bundled_pixel_by_pixel_under_the_captions_that_taco_published():
    (dataset,) = datasets("kodak")
    sums = json.loads((BUNDLED / "kodak" / "pixels_sha256.json").read_text(encoding="utf-8"))
    assert dataset.names == tuple(sums) == KODAK and {dataset.path(i).suffix for i in range(24)} == {".webp"}
    for name, image, captions in dataset:
        assert hashlib.sha256(image.tobytes()).hexdigest() == sums[name], name
        assert sorted(image.size) == [512, 768] and len(captions) == 1
    assert (
        sha256(BUNDLED / "kodak" / "captions_ofa.json")
        == (
            "31c1757490e7a5a1400656374beea38705525c89d3292cc6bd7f9f370ef93a63"  # of kodak_ofa.json in effl-lab/TACO
        )
    )
    assert dataset.captions_digest() == PUBLISHED_CAPTIONS["kodak"]
    (context,) = datasets("kodak", captions="context")
    assert context.captioned == "context" and all(len(context.captions(i)[0]) > 300 for i in range(24))


def test_kodak_in_a_folder_of_ones_own_is_the_same_data_set():
    (own,) = datasets("kodak", data_dir=shared("kodak"))
    (dataset,) = datasets("kodak")
    assert {own.path(i).suffix for i in range(24)} == {".png"} and own.names == dataset.names
    assert own.captions_digest() == dataset.captions_digest()
    assert all(same(one.image, other.image) for one, other in zip(own, dataset))
    (three,) = datasets("kodak", data_dir=SHARED, limit=3)
    assert three.names == dataset.names[:3] and three.name == "kodak"
    (context,) = datasets("kodak", data_dir=SHARED, captions="context")
    assert context.names == dataset.names


def test_png_files_beside_the_bundled_pictures_are_read_in_their_place(tmp_path):
    """An earlier `taco-nb fetch kodak` left them in the very folder in which Kodak is bundled now."""
    shutil.copytree(BUNDLED / "kodak", tmp_path / "kodak")
    pixels = picture(tmp_path / "kodak" / "kodim02.png")
    (dataset,) = datasets("kodak", data_dir=tmp_path)
    assert dataset.names == KODAK and [dataset.path(i).suffix for i in range(3)] == [".webp", ".png", ".webp"]
    assert np.array_equal(np.asarray(dataset[1].image), pixels)
    picture(tmp_path / "kodak" / "kodim25.webp")
    with pytest.raises(
        DataError, match="Missing captions: .* kodim25.png .*Without this folder, the bundled"
    ):
        datasets("kodak", data_dir=tmp_path)


def test_kodaks_centre_crops_are_a_data_set_of_their_own(tmp_path):
    whole, crops = datasets("kodak", "kodak-256")
    assert (crops.name, crops.crop, crops.skipped, crops.names) == ("kodak-256", 256, 0, whole.names)
    assert [crops.captions(i) for i in range(24)] == [whole.captions(i) for i in range(24)]
    for i in (0, 3):  # one lies, one stands
        assert same(crops[i].image, CenterCrop(256)(whole[i].image))
    for data_dir in (None, tmp_path):
        (context,) = datasets("kodak-256", data_dir=data_dir, captions="context", limit=5)
        assert context[4].image.size == (256, 256) and len(context.captions(4)[0]) > 300
    write(tmp_path / "kodak" / "captions_ofa.json", dict.fromkeys(("a.png", "b.png"), "a"))
    picture(tmp_path / "kodak" / "a.png", size=(300, 256))
    picture(tmp_path / "kodak" / "b.png", size=(300, 255))
    (own,) = datasets("kodak-256", data_dir=tmp_path)
    assert own.names == ("a.png",) and own.skipped == 1


def test_clic_needs_its_own_captions_file(tmp_path):
    picture(tmp_path / "clic" / "1.png")
    write(tmp_path / "clic" / "captions.json", {"1.png": "other"})
    with pytest.raises(DataError, match="captions_ofa.json"):
        datasets("clic", data_dir=tmp_path)
    write(tmp_path / "clic" / "captions_ofa.json", {"1.png": "one"})
    (dataset,) = datasets("clic", data_dir=tmp_path)
    assert dataset.name == "clic" and dataset[0].captions == ("one",)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="data/sample is not there")
def test_bundled_sample_is_whole():
    val, train = datasets("sample", "sample-train")
    assert (val.name, train.name) == ("sample", "sample-train")
    assert not set(val.names) & set(train.names) and len(val) + len(train) >= 8
    for dataset in (val, train):
        for sample in dataset:
            assert max(sample.image.size) <= 512 and len(sample.captions) == 5 and all(sample.captions)
    assert len(training_pairs("sample", crop=64)) == 5 * len(train)


def test_training_on_a_folder_of_ones_own(tmp_path):
    folder(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        pairs = training_pairs(name, crop=16)
        assert [caption for _, caption in islice(pairs, 3)] == ["a", "A", "b"]
    (tmp_path / "captions.json").unlink()
    with pytest.raises(DataError, match="captions.json"):
        training_pairs(tmp_path, crop=16)


def test_unknown_names_suggest_a_known_one(tmp_path):
    with pytest.raises(SettingError, match="'kodac'; known: .*clic.* Is 'kodak' meant"):
        datasets("kodac", data_dir=tmp_path)
    with pytest.raises(SettingError, match="'koko'; known: sample, coco, .* Is 'coco' meant"):
        training_pairs("koko", crop=8, data_dir=tmp_path)
    with pytest.raises(SettingError, match="folder"):
        training_pairs(tmp_path / "absent", crop=8, data_dir=tmp_path)


@pytest.mark.parametrize("name", ["clic", "coco"])
def test_a_data_set_that_is_not_there_says_where_it_belongs(name, tmp_path):
    with pytest.raises(DataError) as raised:
        datasets(name, data_dir=tmp_path)
    assert f"The data set {name} " in str(raised.value)
    assert f"{tmp_path / name.removesuffix('-train')} must hold " in str(raised.value)


@pytest.mark.parametrize("limit", [0, -3, 1.5, "2", True])
def test_bad_limits(limit, tmp_path):
    with pytest.raises(SettingError, match="limit"):
        datasets("sample", data_dir=tmp_path, limit=limit)


def test_opening_a_data_set_opens_no_image(tmp_path):
    write(tmp_path / "kodak" / "captions_ofa.json", {"a.png": "a", "b.png": "b"})
    for name in ("a.png", "b.png"):
        write(tmp_path / "kodak" / name, "not an image")
    (dataset,) = datasets("kodak", data_dir=tmp_path, limit=1)
    assert dataset.captions(0) == ("a",)
    with pytest.raises(DataError, match=f"kodak{os.sep}a.png"):
        dataset[0]


def test_what_is_bundled_is_found_from_any_data_folder(tmp_path):
    from taco_nb import load

    for name in ("sample", "kodak", "kodak-256"):
        assert datasets(name, data_dir=tmp_path)[0].names == datasets(name)[0].names
    assert len(training_pairs("sample", 64, data_dir=tmp_path, captions="context")) == 6
    assert load("demo", data_dir=tmp_path).fingerprint == load("demo").fingerprint
