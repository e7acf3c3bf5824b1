"""Where the data sets of the profile "paper" come from: addresses, sizes, checksums, and what becomes of each file."""

from __future__ import annotations

from dataclasses import dataclass

from taco_nb.tools.download import Remote


@dataclass(frozen=True)
class Part:
    """A download, and what it becomes in its data set's folder.

    A plain file becomes `place`. Of a zip archive the `count` files whose names match `members` (as of a shell, hidden
    ones aside) go into the folder `place`, without the folders they have in the archive; `unpacked` is how many bytes
    they may have at most. The archive itself is not kept.
    """

    remote: Remote
    place: str
    members: str = ""
    count: int = 1
    unpacked: int = 0

    @property
    def name(self) -> str:
        return self.remote.name


TFDS = "TensorFlow Datasets, url_checksums"
TACO = "https://raw.githubusercontent.com/effl-lab/TACO/c5e9e999e78b62ae7f9490674b1450921b8e67d3/materials"

_COCO = "http://images.cocodataset.org"
_CLIC = "https://data.vision.ee.ethz.ch/cvl/clic/test"
_KODAK = (  # bytes and SHA-256 of kodim01.png to kodim24.png
    (736501, "a56e27cbf5f843c048b6af1d6e090760e9c92fadba88b7dee0205918a37523bd"),
    (617995, "4f4b74a79237e311d72cad958237b5f7088d8bce1c82305ebefe1a70e3022dfd"),
    (502888, "e25ca1ff2f0c0cb5fdfd5f9b0a0bb21ac4c3de3c84a67f35b09a85d3306249db"),
    (637432, "e3b946107c5d3441c022f678d0c3caf1e224d81b1604ba840a4f88e562de61aa"),
    (785610, "10349e963c5c813d327852f82c1795fa4148d69fedffc4c589bee458e3ac3d53"),
    (618959, "363510303b715d4cbc384e1ce227e466b613a09e1b71ae985882bf8e7fbd9b18"),
    (566322, "b77d3f006f42414bb242222e0482e750c0fb9e5ee8d4bed2f6f11c5605fe54a4"),
    (788470, "ba23983c76b4832ee0e8af0592664756841a16779acd69f792e268fb6d13d6e7"),
    (582899, "6a4361c2fc194feb4edaa9f9a4a0620fb9943e460ac7fdf037fb0f6dd6607a7d"),
    (593463, "9dfb70f5867c29ff9ed6313683f19b3d867849e40fbc0c4c54a4a89df341cf23"),
    (621023, "7936814b58b5387fce2e4e2488b4ec830dadd95fa9520f358ddb30990b50f2b6"),
    (531024, "d78c37c2f04f23761ed2367dd77e2db584ddd4c3950833fecf89f199a8126980"),
    (822712, "bc34a3ce58dea09dce1704c997171602de90cb34d0c8503a988b77f473d39b08"),
    (692201, "55a94550ff18f3246c4074fd32b77b0c74447c26b6ad274d564d999c0450ba6e"),
    (612582, "7538cbb80cb9103606c48b806eae57d56c885c7f90b9b3be70a41160f9cbb683"),
    (534247, "a89c7268ccd4718ba424a99fc4643c572cf692ca6eae887185ceb4e9f11d2e54"),
    (602078, "37afcc89fbdcb76d9518e04b2fc011027e2f4cd14b3b2f83cefd721641a47c5b"),
    (780947, "1a9258c365988961d87a0598725b609139c303ad48a5aad6c503c3b1a87849aa"),
    (671476, "b7450b264b1b0a411390d8931b112c27905a992520fc90569dc4b920aa32bbdc"),
    (492462, "3b46c71e3b92a563820ba32936be8330c586c41f938efd94be938386aae4328a"),
    (637051, "ac958597c82073f6bb65129c68f72b651db5b9efd82e11547d07350214bc268b"),
    (701970, "1cee58eb1f2d9c7ebb254d208a03c783ce6cf2c4d8c2cf45e235dd23b4ce1b29"),
    (557596, "e3111a2fd4da24af15d6459ef9eacfe54106b38e27b4a21821b75c3f5d2d5baf"),
    (706397, "1071c68372cc5a01435c2c225a5cf7d4bb803846ec08bb6b3d6721b156d7cb96"),
)

SOURCES: dict[str, tuple[Part, ...]] = {
    "coco": (
        Part(
            Remote(
                f"{_COCO}/zips/train2014.zip",
                13_510_573_713,
                "md5:0da8c0bd3d6becc4dcb32757491aca88 "
                "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
                TFDS,
            ),
            "train2014", "train2014/*.jpg", 82_783, 13_800_000_000,
        ),
        Part(
            Remote(
                f"{_COCO}/zips/val2014.zip",
                6_645_013_297,
                "md5:a3d79f5ed8d289b7a7554ce06a5782b3 "
                "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                TFDS,
            ),
            "val2014", "val2014/*.jpg", 40_504, 6_800_000_000,
        ),
        Part(
            Remote(
                "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
                36_745_453,
                "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
                TFDS,
            ),
            "", "dataset_coco.json", 1, 144_186_139,
        ),
        Part(Remote(f"{TACO}/mscoco_30k_list.json", 1_128_650), "mscoco_30k_list.json"),
        # last, because the profile "auto" takes these captions as the sign that MS-COCO is there
        Part(
            Remote(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                252_872_794,
                "md5:0a379cfc70b0e71301e0f377548639bd "
                "sha256:031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009",
                TFDS,
            ),
            "annotations", "annotations/captions_*2014.json", 2, 99_203_174,
        ),
    ),
    "clic": (
        Part(
            Remote(
                f"{_CLIC}/CLIC2020Mobile_test.zip",
                721_789_976,
                "sha256:2025f07a6c652270e534640de4271feef3b3dd3260beed4ac4821064837aa732",
                TFDS,
            ),
            "", "*.png", 178, 900_000_000,
        ),
        Part(
            Remote(
                f"{_CLIC}/CLIC2020Professional_test.zip",
                891_643_809,
                "sha256:857df244fc2bfa5da28d4c66bf0db16ee99bfc79eb807be8afa89cd507852884",
                TFDS,
            ),
            "", "*.png", 250, 1_100_000_000,
        ),
        Part(
            Remote(
                f"{TACO}/clic_ofa.json",
                39_415,
                "sha256:e629a6f74a6b85c0850fb6f6dd956f0e32b076ebf18aed4394e2b2b625cee9a5",
                "computed from the published file",
            ),
            "captions_ofa.json",
        ),
    ),
    "kodak": (
        *(
            Part(
                Remote(
                    f"https://r0k.us/graphics/kodak/kodak/kodim{number:02}.png",
                    size,
                    f"sha256:{sha256}",
                    "computed from the published files",
                ),
                f"kodim{number:02}.png",
            )
            for number, (size, sha256) in enumerate(_KODAK, start=1)
        ),
        Part(
            Remote(
                f"{TACO}/kodak_ofa.json",
                1_553,
                "sha256:31c1757490e7a5a1400656374beea38705525c89d3292cc6bd7f9f370ef93a63",
                "computed from the published file",
            ),
            "captions_ofa.json",
        ),
    ),
}  # fmt: skip
"""By data set, in the order in which they are fetched; what makes a set readable comes last."""
