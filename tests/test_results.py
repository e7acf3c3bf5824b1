"""Results remake themselves: they are measured, kept, filled in, and called out of date when what they rest on changes."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from taco_nb.errors import DataError, SettingError
from taco_nb.files import REPOSITORY
from taco_nb.tools import results
from taco_nb.tools.cli import main

PAGE = """# A page
<!-- results: sums -->
typed by hand
<!-- end of results -->
and what follows, which stays.
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with one page, one quick result and one slow; `measured` counts how often each was measured."""
    measured = {"sums": 0, "slow": 0}

    def of(name, quick):
        def measure():
            measured[name] += 1
            return {name: pd.DataFrame({"a": [1, 2], "b": [0.1, 1 / 3]})}

        def write(table):
            return f"sum {table['b'].sum():.3f}"

        return results.Result(measure, {name: ("page.md", write)}, ("*.txt",), ("errors.py",), quick)

    monkeypatch.setattr(results, "RESULTS", {"sums": of("sums", True), "slow": of("slow", False)})
    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    monkeypatch.setattr(results, "BUNDLED", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    (tmp_path / "weights.txt").write_text("one")
    (tmp_path / "page.md").write_text(PAGE + PAGE.replace("sums", "slow"))
    return tmp_path, measured


def test_what_is_missing_is_measured_and_filled_in(house):
    folder, measured = house
    results.fill()
    assert measured == {"sums": 1, "slow": 1}
    page = (folder / "page.md").read_text()
    assert "typed by hand" not in page and page.count("sum 0.433") == 2
    assert page.count("and what follows, which stays.") == 2
    assert "`taco-nb results sums`, commit " in page and "Out of date" not in page
    assert (folder / "results/sums.csv").read_text() == "a,b\n1,0.1\n2,0.333333\n"
    results.fill()
    assert measured == {"sums": 1, "slow": 1} and (folder / "page.md").read_text() == page
    assert results.check() == []


def test_other_weights_make_it_out_of_date_and_the_page_has_to_say_so(house):
    folder, measured = house
    results.fill()
    (folder / "weights.txt").write_text("two")
    (wrong,) = results.check()
    assert "page.md does not show" in wrong and "taco-nb results" in wrong
    results.fill(["sums"])
    page = (folder / "page.md").read_text()
    assert measured["slow"] == 1 and page.count("Out of date: the weights and data changed since.") == 1
    assert results.check() == []
    results.fill()
    assert measured["slow"] == 2 and "Out of date" not in (folder / "page.md").read_text()


def test_other_code_makes_it_out_of_date_too(house, monkeypatch):
    results.fill()
    monkeypatch.setattr(results, "code_digest", lambda *sources: "another")
    assert results.stale("slow") == "the code changed since"


def test_a_check_finds_a_number_typed_by_hand_and_a_quick_result_that_comes_out_otherwise(house):
    folder, _ = house
    results.fill()
    page = folder / "page.md"
    page.write_text(page.read_text().replace("sum 0.433", "sum 0.999", 1))
    assert len(results.check()) == 1
    (folder / "results/sums.csv").write_text("a,b\n1,0.5\n2,0.333333\n")
    assert any("sums comes out otherwise" in wrong for wrong in results.check())


def test_what_cannot_be_is_said_in_a_sentence(house):
    folder, _ = house
    with pytest.raises(SettingError, match="There is no result 'sum'. Did you mean 'sums'"):
        results.fill(["sum"])
    with pytest.raises(DataError, match="sums.json is missing. Measure it: taco-nb results sums"):
        results.check()
    (folder / "page.md").write_text(PAGE)
    with pytest.raises(DataError, match="must have the marker '<!-- results: slow -->' once"):
        results.fill()


def test_the_command_fails_where_a_page_is_stale(house, capsys):
    folder, _ = house
    assert main(["results", "sums", "slow"], standalone_mode=False) in (0, None)
    (folder / "page.md").write_text((folder / "page.md").read_text().replace("0.433", "0.1"))
    assert main(["results", "--check"], standalone_mode=False) == 1
    assert "page.md does not show what is kept" in capsys.readouterr().err


# --- The repository's own ---------------------------------------------------------------------------------------------


def test_every_result_is_kept_and_has_its_place():
    """Whether they are out of date is for `make results CHECK=1` to say."""
    pages = results._pages()
    assert {path.relative_to(REPOSITORY).as_posix() for path in pages} == {
        "README.md",
        "data/checkpoints/README.md",
    }
    for text in pages.values():
        assert text.count("<!-- results: ") == text.count("<!-- end of results -->")


def test_the_codecs_table_is_that_of_the_cards():
    assert not results._differs(results.RESULTS["codecs"].measure(), results._tables("codecs"))


def bd(points, *gaps):
    rows = [
        {"peer": peer, "BD-rate (PSNR), %": gap, "points": points}
        for peer, gap in zip(("JPEG", "AVIF"), gaps)
    ]
    return pd.DataFrame(rows)


def test_a_bd_rate_says_on_how_many_points_it_rests():
    assert results._bd_sentence(bd(3, -41.52, 13.4)) == (
        "The BD-rate (PSNR) of the three baselines is 41.5 % below JPEG and 13.4 % above AVIF. It rests on three points, "
        "fewer than the four that Bjøntegaard's measure wants."
    )
    assert "rests" not in results._bd_sentence(bd(4, -41.52, 13.4))
    assert "no BD-rate" in results._bd_sentence(bd(1, math.nan, math.nan))


def test_a_rate_that_has_no_equal_is_a_dash():
    assert [results._than(x) for x in (-41.5, 7.5, math.nan)] == ["42 % less", "8 % more", "–"]
