"""Commands about recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from melfold.cli.options import HomeOpt, SetOpt, resolve_recipe
from melfold.cli.output import command, print_table
from melfold.files import Home

app = typer.Typer(help="Recipes: what decides a run.", no_args_is_help=True)

RECIPE_HELP = "The name of a shipped recipe, a .toml file, or the name of a run."
NameArg = Annotated[str, typer.Argument(metavar="NAME", help=RECIPE_HELP)]


@command(app, "list", "melfold recipe list")
def recipe_list() -> None:
    """List the recipes that come with the kit."""
    from melfold.recipes import load_recipe, recipe_names

    names = recipe_names()
    for name in names:
        recipe = load_recipe(name)
        track = "" if name == "base" else f"[{recipe.track}] "
        typer.echo(f"{name:<{max(map(len, names))}}  {track}{recipe.about}")


@command(app, "show", "melfold recipe show audioset --set train.epochs=10 > mine.toml")
def recipe_show(name: NameArg, home: HomeOpt = None, set_: SetOpt = None) -> None:
    """Print all settings of a recipe as TOML, with the reason where one is given. Save it to a file to make your own."""
    from melfold.recipe_text import recipe_toml
    from melfold.recipes import explain_recipe, parse_set

    place = Home.find(home)
    recipe = resolve_recipe(name, set_, place)
    reasons = {key: reason for key, (_, reason) in explain_recipe(name, place).items()}
    reasons |= {parse_set(item)[0]: "set on the command line" for item in set_ or []}
    typer.echo(f"# {recipe.name}: track {recipe.track}, training settings {recipe.fingerprint()}")
    typer.echo(recipe_toml(recipe, reasons), nl=False)


@command(app, "diff", "melfold recipe diff scratch small")
def recipe_diff(
    a: Annotated[str, typer.Argument(metavar="A", help=RECIPE_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    home: HomeOpt = None,
) -> None:
    """Print the settings in which two recipes differ."""
    from melfold.recipe_text import compare_recipes

    place = Home.find(home)
    one, other = (resolve_recipe(name, None, place) for name in (a, b))
    rows = [{"key": key, a: before or "-", b: after or "-"} for key, before, after in compare_recipes(one, other)]
    if not rows:
        typer.echo(f"{a} and {b} have the same settings.")
    print_table(rows, left=[a, b])
    if rows and one.fingerprint() == other.fingerprint():
        typer.echo("These settings change no weight: both recipes train the same run.")


@command(app, "keys", "melfold recipe keys")
def recipe_keys() -> None:
    """Print a table of all settings: the values they take, their defaults and their meaning."""
    from melfold import recipe_text

    rows = [{"key": k.name, "values": k.allowed, "default": k.default, "meaning": k.meaning} for k in recipe_text.recipe_keys()]
    print_table(rows, left=["values", "default", "meaning"])
