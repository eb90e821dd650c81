"""Tables that are measured row by row: what is stored in a JSON file is not measured again, and a Markdown file shows it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dyncomp.whole import replacing

DOCS = Path(__file__).resolve().parent.parent / "docs"
T = TypeVar("T")
Results = dict[str, Any]


def main(
    description: str | None, file: str, rows: Mapping[str, T], measure: Callable[[T], Results], markdown: Callable[[Results], str],
    arguments: Sequence[str] | None = None, parents: Sequence[argparse.ArgumentParser] = (),
) -> None:  # fmt: skip
    """Measure the rows that were not measured yet, and write what there is after each.

    Args:
        description: its first line is what ``--help`` says.
        file: of the results, in docs.
        rows: key -> row.
        measure: row -> what is stored under ``rows`` and the row's key.
        markdown: all that is stored -> the text of the Markdown file beside it.
        arguments: of the command line.
        parents: what else the command line may say, which the caller has read: for ``--help``.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0], parents=list(parents))
    parser.add_argument("--out", type=Path, default=DOCS / file)
    parser.add_argument("--only", nargs="*", default=[], help="rows that contain one of these")
    parser.add_argument("--minutes", type=float, help="begin no row later")
    parser.add_argument("--again", action="store_true", help="measure rows again that were measured before")
    parser.add_argument("--list", action="store_true", help="print the rows and whether they were measured")
    options = parser.parse_args(arguments)
    results: Results = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    wanted = {key: row for key, row in rows.items() if not options.only or any(t in f"{key} {row}" for t in options.only)}
    if options.list:
        for key in wanted:
            print("measured " if key in results["rows"] else "missing  ", key)
        return
    started = time.perf_counter()
    for key, row in wanted.items():
        if key in results["rows"] and not options.again:
            continue
        if options.minutes is not None and time.perf_counter() - started > options.minutes * 60:
            break
        print(key, file=sys.stderr, flush=True)
        results["rows"][key] = measure(row)
        write(results, options.out, markdown)
    write(results, options.out, markdown)


def write(results: Results, out: Path, markdown: Callable[[Results], str]) -> None:
    with replacing(out) as part:
        part.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(results))
