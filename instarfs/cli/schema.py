"""`instarfs schema`: what the JSON that this program writes looks like."""

from __future__ import annotations

import click

from instarfs.render.schemas import SUBJECTS, schema
from instarfs.text import json_bytes


@click.command(name="schema")
@click.argument("name", required=False, type=click.Choice(list(SUBJECTS)))
def command(name: str | None) -> None:
    """Print the JSON Schema of that NAME; without one, which there are.

    Every key that can be written is in it, and no other: what is not is no output of this version.
    """
    if name is not None:
        click.echo(json_bytes(schema(name)), nl=False)
        return
    for each, subject in SUBJECTS.items():
        click.echo(f"{each:<10}{subject}")
