"""The command line: one module a command, imported when it is used."""

from __future__ import annotations

import importlib
import os
import sys

import click

from dyncomp import __version__
from dyncomp.errors import DyncompError

COMMANDS = {
    "convert": "Turn a dense model into one with routed experts, with its evidence.",
    "heal": "Train a bundle towards its dense model, with its evidence.",
    "inspect": "Show a model's regions or graph, or what a bundle rewrote.",
    "evaluate": "Quality of a bundle beside its dense model, on any text.",
    "run": "Generate text (or embeddings) with a bundle.",
    "export": "A bundle as a checkpoint that other programs load.",
    "bench": "Speed of a bundle beside its dense model, in one run.",
    "hardware": "What this machine has, and how fast it reads and multiplies.",
    "tune": "Search the parameters of a bundle's TVM kernels on this machine.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"dyncomp.cli.{name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dyncomp")
def cli() -> None:
    """Turn an existing dense transformer into one that spends compute only where a token needs it.

    MODEL is a Hugging Face directory (or hub id), a .gguf file, a .pt2 file, a Python factory module:function, or the name of a
    packaged model (smollm2-135m, minilm, dinov2-small, whisper-tiny.en). Exit codes: 0 done, 1 the work failed, 2 the request was
    wrong.
    """


def main() -> None:
    """Entry point: errors become one message and an exit code, never a traceback."""
    # Large activations on huge pages: on virtual machines page faults cost more than the arithmetic. Read when torch loads.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except DyncompError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\ninterrupted: nothing half-written was left; the same command continues where it was", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
