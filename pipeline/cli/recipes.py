"""`redpen recipes`: the shipped recipes."""

from __future__ import annotations

import click

from pipeline.cli.options import InOrder, show_lines


@click.group(cls=InOrder, invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the shipped recipes.

    \b
    redpen recipes show toy > my.toml
    """
    if ctx.invoked_subcommand is None:
        from pipeline.config import recipe_names, recipe_text

        width = max(len(name) for name in recipe_names())
        for name in recipe_names():
            show_lines(f"{name:{width}}  {recipe_text(name).splitlines()[0].lstrip('# ')}")


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe with its comments."""
    from pipeline.config import recipe_text

    show_lines(recipe_text(name))
