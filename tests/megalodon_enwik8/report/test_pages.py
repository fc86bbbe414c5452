"""Pages are filled between their markers and nowhere else, and the committed ones are as filled."""

import json
import shutil
from pathlib import Path

import pytest

from megalodon_enwik8.config import MODELS
from megalodon_enwik8.report import pictures
from megalodon_enwik8.report.__main__ import FILLERS, main
from megalodon_enwik8.safety import UserError

from ..programs import refused
from .run_folders import make_group

ROOT = Path(__file__).parents[3]

PAGE = """# By hand\r
<!-- a comment of one's own -->
<!-- compare: runs/megalodon_* | runs/llama_* -->
what stood here before
<!-- /compare -->
 - trailing  spaces  stay \n
<!-- curves: curves.svg | runs/megalodon_* runs/llama_* -->
<!-- /curves -->
no newline at the end"""


@pytest.fixture
def page(tmp_path):
    make_group(tmp_path / "runs", "megalodon", {7: 1.40, 8: 1.41})
    make_group(tmp_path / "runs", "llama", {7: 1.44, 8: 1.46})
    path = tmp_path / "PAGE.md"
    path.write_bytes(PAGE.encode())
    return path


def prose(text):
    """What a page says outside its markers, and the markers."""
    kept, inside = [], False
    for line in text.split("\n"):
        inside = inside and not line.startswith("<!-- /")
        kept += [] if inside else [line]
        inside = inside or (": " in line and line.startswith("<!-- "))
    return kept


def test_a_page_is_filled_between_its_markers_alone(page):
    assert main(["--fill", str(page)]) == 0
    filled = page.read_bytes().decode()
    assert prose(filled) == prose(PAGE)
    assert "| loss after 400 steps | 1.4050 ± 0.0071 | 1.4500 ± 0.0141 |" in filled
    assert "what stood here before" not in filled
    assert "a step, s" not in filled  # in a run's own seconds the machine did other things as well
    alt = "BPC of Megalodon and Llama against steps"
    assert f"\n![{alt}](curves.svg)\n" in filled
    assert "<svg" in (page.parent / "curves.svg").read_text()


def test_filling_again_changes_nothing(page, capsys):
    main(["--fill", str(page)])
    before = {path: path.stat().st_mtime_ns for path in (page, page.parent / "curves.svg")}
    capsys.readouterr()
    main(["--fill", str(page)])
    main(["--check", str(page)])
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_page_or_picture_that_is_behind_its_runs_is_told(page, capfd):
    assert f"curves.svg: is not what the report makes of it: --fill {page}" in refused(
        capfd, main, "--check", page
    )
    main(["--fill", str(page)])
    page.write_text(page.read_text().replace("1.4050", "1.4049"))
    assert f"{page}: is not what the report makes of it" in refused(capfd, main, "--check", page)
    main(["--fill", str(page)])
    shutil.rmtree(page.parent / "runs" / "llama_8")
    assert "curves.svg: is not" in refused(capfd, main, "--check", page)


@pytest.mark.parametrize(
    ("marker", "line", "message"),
    [
        ("<!-- compair: runs/* -->\n<!-- /compair -->", 2, "compair: no such marker; there are"),
        ("<!-- runs: runs/none_* -->\n<!-- /runs -->", 2, "runs: runs/none_*: matches nothing"),
        ("\n<!-- runs: runs/* -->\n", 3, "runs is not closed"),
        ("<!-- runs: runs/* -->\n<!-- /compare -->", 3, "<!-- /compare --> stands in the wrong"),
        ("<!-- runs: runs/* -->\n<!-- runs: runs/* -->", 3, "stands in the wrong place"),
        ("<!-- /runs -->", 2, "<!-- /runs --> stands in the wrong place"),
        ("<!-- compare: runs/* -->\n<!-- /compare -->", 2, "takes group | group | [timing], not 1"),
        ("<!-- compare: runs/* | runs/* -->\n<!-- /compare -->", 2, "two recipes"),
        ("<!-- curves: a.txt | runs/* -->\n<!-- /curves -->", 2, "must end in .svg"),
        ("<!-- measured: PAGE.md -->\n<!-- /measured -->", 2, "PAGE.md: is not JSON"),
        ("<!-- scaling: 4e14 5e10 -->\n<!-- /scaling -->", 2, "5e10: holds no such figures"),
        ("<!-- scaling: 4e14 0 1 -->\n<!-- /scaling -->", 2, "4e14 0 1: holds no such figures"),
        (
            "<!-- measured: other.json -->\n<!-- /measured -->",
            2,
            "other.json: holds no such figures",
        ),
    ],
)
def test_a_marker_that_cannot_be_filled_is_refused_with_its_line(
    page, marker, line, message, capfd
):
    (page.parent / "other.json").write_text("[1, 2]")
    text = f"# Title\n{marker}\n"
    page.write_text(text)
    said = refused(capfd, main, "--fill", page)
    assert f"{page}, line {line}: " in said
    assert message in said
    assert page.read_text() == text


def test_no_page_is_written_unless_all_can_be(page, capfd):
    assert "none.md: No such file" in refused(
        capfd, main, "--fill", page, page.with_name("none.md")
    )
    assert page.read_bytes().decode() == PAGE


def test_all_markers_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{word}: " in text for word in FILLERS)


def test_the_committed_pages_are_what_the_report_makes_of_the_committed_results():
    pages = ("RESULTS.md", "README.md", "docs/scaling.md", "docs/speed.md")
    assert main(["--check", *(str(ROOT / page) for page in pages)]) == 0


def test_a_context_picture_shows_every_figure_that_was_measured():
    measured = json.loads((ROOT / "results/benchmarks/context.json").read_text())
    figure = pictures.draw_contexts(measured)
    drawn = sum(len(line.get_xdata()) for axes in figure.axes for line in axes.get_lines())
    figures = [row.get(model, {}) for row in measured["rows"] for model in MODELS]
    assert drawn == sum(map(len, figures))


def test_a_picture_in_no_folder_is_refused_before_it_is_drawn(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*none: make it first"):
        pictures.check_can_draw(tmp_path / "none" / "a.svg")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'drawing needs matplotlib: pip install -e "\.\[report\]"'):
        pictures.check_can_draw("a.svg")
