"""`videollama2 train`."""

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a published recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value for a key of the recipe; repeat for more."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint of the output folder.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Only print the memory that training takes.")] = False,
) -> None:
    """
    Train by a recipe: from data on disk to a checkpoint that transformers load.

    Runs alone, or on several devices by `accelerate launch` or `torchrun`.
    """
    from ..training.recipe import Recipe

    loaded = Recipe.from_yaml(recipe, overrides)
    if estimate:
        from ..training.estimate import describe_memory

        typer.echo(describe_memory(loaded))
        return
    from ..training.run import train as run

    run(loaded, resume=resume)
