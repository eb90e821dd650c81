"""``dyncomp inspect``."""

from __future__ import annotations

from typing import Any

import click

from dyncomp.cli import options


@click.command("inspect")
@click.argument("target", metavar="MODEL|BUNDLE")
@click.option("--graph", is_flag=True, help="Print the graph as a readable program.")
@click.option("--diff", is_flag=True, help="Print what changed between the dense graph and the bundle's, as a unified diff.")
@click.option("--experts", is_flag=True, help="Print how often each expert of each layer was used on the held-out text.")
@click.option("--routers", is_flag=True, help="Fit every kind of router and of gates to the model and compare them (takes minutes).")
@click.option("--active", type=options.Fraction(), default=0.75, show_default="75%", help="With --routers: active fraction.")
@click.option("--carve", type=click.IntRange(min=2), default=16, show_default=True, help="With --routers: experts per FFN.")
@click.option("--tokens", type=click.IntRange(min=512), default=8_192, show_default=True, help="With --routers: calibration tokens.")
@click.option(
    "--windows", type=click.IntRange(min=1), default=4, show_default=True, help="With --routers: windows or images to measure on."
)
@click.option("--calibrate", metavar="TEXT|IMAGES|SOUND", help=f"With --routers: {options.CALIBRATE}")
@click.option(
    "--depth",
    is_flag=True,
    help="Print a text coloured by how much of the model each token computed, and the KV bytes that needs (with --text).",
)
@click.option("--text", help="What --depth shows.")
@click.option(
    "--html", type=click.Path(dir_okay=False), help="Write what is shown of a BUNDLE as a page as well, with a plot of the search."
)
@options.as_json
def command(
    target: str, graph: bool, diff: bool, experts: bool, routers: bool, depth: bool, text: str | None, html: str | None, json_: bool,
    **choices: Any,
) -> None:  # fmt: skip
    """Show what dyncomp sees in a MODEL (its FFNs, attentions, head), or what it rewrote in a BUNDLE, where, and what it refused."""
    from dyncomp.bundle import is_bundle, open_bundle
    from dyncomp.errors import RequestError

    if text is not None and not depth:
        raise RequestError("--text belongs to --depth")
    if html is not None and (graph or diff or experts or routers or not is_bundle(target)):
        raise RequestError("--html writes what is shown of a bundle, alone or with --depth", hint="dyncomp inspect BUNDLE --html FILE")
    if routers:
        if is_bundle(target):
            raise RequestError(f"{target} is a bundle, and --routers needs a dense model", hint="give the model it was made from")
        _routers(target, json_=json_, **choices)
    elif depth:
        if not is_bundle(target) or text is None:
            raise RequestError("--depth shows a text in a bundle", hint='dyncomp inspect BUNDLE --depth --text "…"')
        _depth(open_bundle(target), text, html, json_=json_)
    elif is_bundle(target):
        _bundle(open_bundle(target), graph=graph, diff=diff, experts=experts, html=html, json_=json_)
    elif diff or experts:
        raise RequestError(f"{target} is not a bundle, and --diff and --experts need one", hint="convert the model first")
    else:
        _model(target, graph=graph, json_=json_)


def _model(source: str, *, graph: bool, json_: bool) -> None:
    from dyncomp.models import load_for_inspection
    from dyncomp.regions import find_regions
    from dyncomp.report.inspection import regions_as_dict, regions_tables
    from dyncomp.report.tables import show
    from dyncomp.trace import trace_model

    traced = trace_model(load_for_inspection(source))
    if graph:
        click.echo(traced.text(), nl=False)
        return
    regions = find_regions(traced)
    if json_:
        options.print_json(regions_as_dict(traced, regions))
    else:
        show(*regions_tables(traced, regions))


def _routers(source: str, *, active: float, carve: int, tokens: int, windows: int, calibrate: str | None, json_: bool) -> None:
    from dataclasses import asdict

    from dyncomp.models import load_model
    from dyncomp.report.progress import ProgressReporter
    from dyncomp.report.tables import router_table, show
    from dyncomp.router_table import RouterRow, compare_routers

    loaded = load_model(source)
    with ProgressReporter() as progress:

        def done(row: RouterRow) -> None:
            progress.say(f"{row.router}{f', {row.gates}' if row.gates else ''}: loss {row.loss:.4f}, {row.seconds:.0f} s")

        rows = compare_routers(
            loaded, active=active, experts=carve, tokens=tokens, count=windows, text=calibrate, progress=progress, done=done
        )
    plain = [asdict(row) for row in rows]
    if json_:
        options.print_json({"schema": 1, "model": loaded.name, "active": active, "experts": carve, "tokens": tokens, "routers": plain})
        return
    title = (
        f"{loaded.name}: {active:.0%} active, {carve} experts, fitted to {tokens} tokens, measured on {windows} windows or images held out"
    )
    show(router_table(plain, title, loaded.task))


def _bundle(opened: Any, *, graph: bool, diff: bool, experts: bool, html: str | None, json_: bool) -> None:
    from dyncomp.report.frontier import report_html
    from dyncomp.report.inspection import bundle_as_dict, bundle_tables, experts_table, graph_diff
    from dyncomp.report.tables import show

    if html is not None:
        _write(html, report_html(opened.manifest.source.name, bundle_tables(opened), opened.report().get("search")))
    if graph:
        click.echo(opened.graph().text(), nl=False)
    elif diff:
        from dyncomp.trace import trace_model

        for line in graph_diff(trace_model(opened.dense()), opened.graph()):
            click.echo(line)
    elif json_:
        options.print_json(bundle_as_dict(opened))
    elif experts:
        show(experts_table(opened))
    else:
        show(*bundle_tables(opened))


def _write(file: str, page: str) -> None:
    from pathlib import Path

    from dyncomp.whole import replacing

    with replacing(Path(file)) as part:
        part.write_text(page, encoding="utf-8")


def _depth(opened: Any, text: str, html: str | None, *, json_: bool) -> None:
    from dyncomp.report.depth import depth_html, depth_items, depth_of
    from dyncomp.report.tables import show

    depth = depth_of(opened.graph(), opened.tokenizer(), text)
    if html is not None:
        _write(html, depth_html(depth))
    if json_:
        options.print_json(depth.as_dict())
    else:
        show(*depth_items(depth))
