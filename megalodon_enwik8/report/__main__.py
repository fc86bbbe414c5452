"""Tables and pictures of runs, on the terminal or in pages:

python -m megalodon_enwik8.report RUN... [--picture FILE] [--timing train.json]
python -m megalodon_enwik8.report --fill PAGE...      in Markdown pages, between markers
python -m megalodon_enwik8.report --check PAGE...     whether the pages are as filled

A page is written by hand; between <!-- WORD: ARGUMENT | ... --> and <!-- /WORD -->, each on a line
of its own, the program puts a table or, drawn to an SVG file, a picture. Runs and files are globs
from the page's folder, several with spaces between; a GROUP is of runs that differ in their seed.

  compare: GROUP | GROUP            two groups, at the end and at every validation
  headline: TITLE | GROUP | GROUP | ...    a row for each title and two groups
  runs: RUNS                        a line for each group
  sample: GROUP                     what the first run of the group wrote
  search: search.jsonl              the tries of a search
  measured: FILE                    what a benchmark measured
  scaling: FLOPS BYTES SHARE        for a device: flop/s, bytes/s sent, share of the time to send
  curves: SVG | RUNS                contexts: SVG | context.json   distances: SVG | EVALUATIONS
  recall: SVG | recall.jsonl

With | train.json at their end (in a command, --timing), compare, headline and curves take seconds
and memory from what `benchmark train` measured. Without it there are no seconds: a run's own clock
has in it what else the machine did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon_enwik8.report import pictures, tables
from megalodon_enwik8.report.runs import find_groups, match, one_group, timed
from megalodon_enwik8.safety import Parser, UserError, atomic_write, run_main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKER = re.compile(r"<!-- (?:/(?P<end>[a-z]+)|(?P<word>[a-z]+): (?P<arguments>.*)) -->")

# By the marker's word: the function, and what the arguments are. With a picture as the first, the
# function takes the others and returns the figure.
FILLERS: dict[str, tuple[Callable[..., Any], str]] = {
    "compare": (tables.compare, "group group [timing]"),
    "headline": (tables.headline, "title group group ... [timing]"),
    "runs": (tables.runs, "runs"),
    "sample": (tables.sample, "group"),
    "search": (tables.search, "files"),
    "measured": (tables.measured_tables, "file"),
    "scaling": (tables.scaling, "numbers"),
    "curves": (pictures.draw_curves, "picture runs [timing]"),
    "contexts": (pictures.draw_contexts, "picture file"),
    "distances": (pictures.draw_distances, "picture files"),
    "recall": (pictures.draw_recall, "picture files"),
}


def read_argument(kind: str, text: str, root: Path) -> Any:
    """An argument of a marker: text, groups, or what JSON files (or the lines of a .jsonl) hold."""
    if kind in ("title", "numbers"):
        return text
    if kind == "group":
        return one_group(text.split(), root)
    if kind == "runs":
        return find_groups(text.split(), root)
    found: list[Any] = []
    patterns = text.split() if kind == "files" else [text]
    for path in (root / name for pattern in patterns for name in match(pattern, root)):
        content = path.read_text(encoding="utf-8", errors="replace")
        # Whole lines end in a newline; another may be on its way.
        parts = content.split("\n")[:-1] if path.suffix == ".jsonl" else [content]
        try:
            found += [json.loads(part) for part in parts]
        except ValueError:
            raise UserError(f"{path}: is not JSON") from None
    if not found:
        raise UserError(f"{text}: is empty")
    return found if kind == "files" else found[0]


def make(word: str, texts: list[str], root: Path, drawn: dict[Path, Figure]) -> str:
    """What stands below a marker; a picture is added to `drawn`."""
    if word not in FILLERS:
        raise UserError(f"no such marker; there are {', '.join(FILLERS)}")
    function, kinds = FILLERS[word][0], FILLERS[word][1].split()
    if "..." in kinds:
        kinds = kinds[:3] * max(1, len(texts) // 3) + kinds[4:]
    if len(texts) not in (len(kinds), len(kinds) - (kinds[-1] == "[timing]")):
        raise UserError(f"takes {' | '.join(kinds)}, not {len(texts)} of those")
    named = list(zip(kinds, texts, strict=False))
    arguments = [read_argument(*each, root) for each in named if each[0] != "picture"]
    if kinds[0] == "picture":
        pictures.check_can_draw(texts[0], [".svg"])
    try:
        made = function(*arguments)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{texts[-1]}: holds no such figures") from None
    if kinds[0] != "picture":
        return str(made).strip()
    drawn[root / texts[0]] = made
    return f"![{made.get_label()}]({texts[0]})"


def render(page: Path) -> tuple[str, dict[Path, Figure]]:
    """The page as it should be, and the pictures that it shows."""
    try:
        written = page.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{page}: is not UTF-8 text") from None
    lines: list[str] = []
    drawn: dict[Path, Figure] = {}
    opened = None
    for number, line in enumerate(written.split("\n"), start=1):
        marker = MARKER.fullmatch(line.strip())
        if opened and marker and marker["end"] == opened[0]:
            opened = None
        elif marker and not opened and marker["word"]:
            opened = (marker["word"], number)
            try:
                texts = [text.strip() for text in marker["arguments"].split("|")]
                made = make(opened[0], texts, page.parent, drawn)
            except UserError as error:
                raise UserError(f"{page}, line {number}: {opened[0]}: {error}") from None
            lines += [line, "", made, ""]
            continue
        elif marker:
            raise UserError(f"{page}, line {number}: {line.strip()} stands in the wrong place")
        if not opened:
            lines.append(line)
    if opened:
        raise UserError(f"{page}, line {opened[1]}: {opened[0]} is not closed")
    return "\n".join(lines), drawn


def fill(pages: Sequence[Path], *, check: bool) -> None:
    """Write all pages and pictures that are not as they should be; with `check`, raise UserError
    for the first. Nothing is written unless all can be made."""
    for page, (text, drawn) in [(page, render(page)) for page in pages]:
        changed = [
            path for path in drawn if pictures.digest_of(path) != pictures.digest(drawn[path])
        ]
        if page.read_bytes() != text.encode():
            changed.append(page)
        if check and changed:
            raise UserError(f"{changed[0]}: is not what the report makes of it: --fill {page}")
        for path in changed:
            if path in drawn:
                pictures.save_picture(drawn[path], path)
            else:
                with atomic_write(path) as file:
                    file.write(text.encode())
            print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__, "python -m megalodon_enwik8.report")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder, or a glob")
    parser.add_argument("--picture", metavar="FILE", help="for the curves: .png, .svg, .pdf")
    parser.add_argument("--timing", metavar="FILE", help="of `benchmark train`: seconds, memory")
    parser.add_argument("--fill", nargs="+", type=Path, metavar="PAGE")
    parser.add_argument("--check", nargs="+", type=Path, metavar="PAGE")
    options = parser.parse_intermixed_args(argv)
    if sum(map(bool, (options.runs, options.fill, options.check))) != 1:
        parser.error("name run folders, or pages after --fill or --check")
    if not options.runs:
        if options.picture or options.timing:
            parser.error("--picture and --timing go with run folders, not with pages")
        fill(options.fill or options.check, check=bool(options.check))
        return 0
    if options.picture:
        pictures.check_can_draw(options.picture)
    groups = find_groups(options.runs)
    timing = read_argument("timing", options.timing, Path()) if options.timing else None
    ours, theirs = groups[0], groups[-1]
    two = len(groups) == 2 and all(tables.with_same_seeds(ours, theirs))
    print(tables.compare(ours, theirs, timing) if two else tables.runs(timed(groups, timing)))
    if options.picture:
        pictures.save_picture(pictures.draw_curves(groups, timing), options.picture)
        print(f"drawn: {options.picture}")
    return 0


if __name__ == "__main__":
    run_main(main)
