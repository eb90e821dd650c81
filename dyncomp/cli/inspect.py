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
@options.as_json
def command(target: str, graph: bool, diff: bool, experts: bool, json_: bool) -> None:
    """Show what dyncomp sees in a MODEL (its FFNs, attentions, head), or what it rewrote in a BUNDLE, where, and what it refused."""
    from dyncomp.bundle import is_bundle, open_bundle
    from dyncomp.errors import RequestError

    if is_bundle(target):
        _bundle(open_bundle(target), graph=graph, diff=diff, experts=experts, json_=json_)
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


def _bundle(opened: Any, *, graph: bool, diff: bool, experts: bool, json_: bool) -> None:
    from dyncomp.report.inspection import bundle_as_dict, bundle_tables, experts_table, graph_diff
    from dyncomp.report.tables import show

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
