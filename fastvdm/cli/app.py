"""The Typer application with which the commands register."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

app = typer.Typer(
    help="Video diffusion with factorized space-time 3D U-Nets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
echo = typer.echo


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"fastvdm {importlib.metadata.version('fastvdm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show errors with their traceback; may stand anywhere.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show devices, kernels and optional packages found here."""
    from fastvdm import info as report

    raise typer.Exit(report.main(["--json"] if json else []))
