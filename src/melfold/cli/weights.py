"""Commands about the weights that models start from."""

from __future__ import annotations

from typing import Annotated

import typer

from melfold.cli.options import HomeOpt, JsonOpt
from melfold.cli.output import bar, command, note, print_json
from melfold.errors import MelfoldError
from melfold.files import Home

app = typer.Typer(help="Weights that models start from.", no_args_is_help=True)

NameArg = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A recipe, hf:OWNER/REPO or hf:OWNER/REPO/FILE on the Hugging Face hub, or a model's name in timm."
    ),
]


@command(app, "fetch", "melfold weights fetch audioset")
def weights_fetch(name: NameArg, home: HomeOpt = None, json: JsonOpt = False) -> None:
    """Download pretrained weights once, check them, and keep them in the home, for use without a network."""
    from melfold.learn.fetch import fetch, hub_file, recipe_named
    from melfold.learn.provenance import freesound_warning, seen_data

    recipe = recipe_named(name)
    file = hub_file(recipe.model)
    if file is None:
        raise MelfoldError(f"recipe {name} needs no download", f"model.weights = {recipe.model.weights}", "Train it as it is")
    fetched = fetch(file, Home.find(home), bar())
    licence, seen = recipe.model.licence or fetched.licence, seen_data(recipe)
    if warning := freesound_warning(recipe):
        note(warning)
    if json:
        print_json({"path": fetched.path, "source": fetched.source, "sha256": fetched.sha256, "licence": licence, "seen": seen})
        return
    typer.echo(f"{fetched.path}\nlicence {licence}, trained on {', '.join(seen)}, sha256 {fetched.sha256}")
