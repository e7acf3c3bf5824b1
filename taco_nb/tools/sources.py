"""The data sets of the profile "paper" are listed here: addresses, sizes, checksums, and what becomes of each file."""

from __future__ import annotations

import json
from dataclasses import dataclass

from taco_nb.files import BUNDLED
from taco_nb.tools.download import Remote


@dataclass(frozen=True)
class Part(Remote):
    """A download, and what it becomes in its data set's folder.

    A plain file becomes `place`. A zip archive has `members`, a pattern as in a shell: the `count` files in it whose
    names match, hidden ones aside, go into the folder `place`, without the folders that they have in the archive. All of
    them together may have at most `unpacked` bytes. The archive itself is not kept.
    """

    place: str = ""
    members: str = ""
    count: int = 1
    unpacked: int = 0


SOURCES: dict[str, tuple[Part, ...]] = {
    name: tuple(Part(**part) for part in parts)
    for name, parts in json.loads(
        (BUNDLED / "reference" / "downloads.json").read_text(encoding="utf-8")
    ).items()
}
"""The parts of each data set, in the order in which they are fetched. A set without parts is bundled.

What makes a set readable comes last: the profile "auto" takes MS-COCO's annotations as the sign that it is there.
"""
