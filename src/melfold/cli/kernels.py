"""Commands about Kaggle kernels, and the one that does everything from a submission to its score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melfold.cli.ledger import AgainOpt, CompetitionOpt, OwnCompetitionOpt, print_row
from melfold.cli.options import (
    DEFAULT_RECIPE,
    FoldsOpt,
    HomeOpt,
    IdArg,
    RecipeOpt,
    RunOpt,
    SetOpt,
    resolve_recipe,
    resolve_run_name,
)
from melfold.cli.output import bar, command
from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.built import Built, Kernel
from melfold.kaggle.client import COMPETITION, Kaggle
from melfold.kaggle.standings import fetch_table

if TYPE_CHECKING:
    from melfold.data.competition import Competition
    from melfold.kaggle.training import Training

app = typer.Typer()
kernel_app = typer.Typer(help="Offline Kaggle kernels: build, rehearse, push.", no_args_is_help=True)
build_app = typer.Typer(help="Build a kernel: infer or train.", no_args_is_help=True)
kaggle_app = typer.Typer(help="Work on Kaggle's machines.", no_args_is_help=True)
app.add_typer(kernel_app, name="kernel")
app.add_typer(kaggle_app, name="kaggle")
kernel_app.add_typer(build_app, name="build")

DirArg = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `kernel build` made.")]
DownloadOpt = Annotated[
    Path | None, typer.Option("--data", help="The competition's download (default: where `download` put it).")
]
OwnerOpt = Annotated[str | None, typer.Option("--owner", help="Your Kaggle user name (default: the kaggle command is asked).")]
GpuOpt = Annotated[bool, typer.Option("--gpu/--cpu", help="Ask Kaggle for two T4s, or for none.")]
BudgetOpt = Annotated[
    float | None, typer.Option("--budget", help="Minutes the kernel may take (default: the competition's limit).")
]
KernelOpt = Annotated[
    str,
    typer.Option("--weights-from", metavar="OWNER/KERNEL", help="Take the weights from a training kernel's output: no upload."),
]
WaitOpt = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for Kaggle.")]

ISOLATION = {
    "namespaces": "in namespaces of its own: no network, everything read-only but /kaggle/working and /tmp",
    "prefix": "under a path prefix, with an audit hook that refuses the network and writes to other folders",
}


@command(app, "ship", "melfold ship audioset", continues=True)
def ship(
    id: IdArg,
    data: DownloadOpt = None,
    file: Annotated[bool, typer.Option("--file", help="Submit the file itself, where a competition takes files.")] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Submit the file by a small kernel that copies it: minutes instead of an hour.")
    ] = False,
    gpu: GpuOpt = True,
    budget: BudgetOpt = None,
    weights_from: KernelOpt = "",
    again: AgainOpt = False,
    owner: OwnerOpt = None,
    competition: OwnCompetitionOpt = None,
    home: HomeOpt = None,
) -> None:
    """Build, rehearse and push a kernel, submit its output, wait for the score and record it."""
    from melfold.combine.submission import open_submission
    from melfold.kaggle.build import Target, build_copy, build_infer
    from melfold.kaggle.push import check_output, push, wait_for_kernel
    from melfold.kaggle.reconcile import alone, find_row, wait_for_score
    from melfold.kaggle.submit import competition_for, submit

    place, form, row = Home.find(home), None, None
    if file and copy:
        raise MelfoldError("--file and --copy are two ways", "both were given", "Give one of them")
    manifest = open_submission(place, id)
    client = Kaggle(competition_for(manifest, competition))
    if not (file or again):  # before a kernel is built; `submit` looks once more
        with alone(place):
            row = find_row(client, place, manifest)
    if not (row or file):
        target = Target(owner or client.username(), client.competition, gpu, budget)
        built = build_copy(place, id, target) if copy else build_infer(place, id, target, source=weights_from)
        typer.echo(f"1/5 built {built.folder}")
        download = _download(place, built, data)
        if not built.passed:
            _rehearse(built, download, place)
        typer.echo("2/5 rehearsed")
        version = built.pushed or push(client, built, progress=bar())
        typer.echo(f"3/5 pushed {built.facts['kernel']} version {version}")
        check_output(wait_for_kernel(client, built), download)
        typer.echo("4/5 the kernel is complete and its output is a valid submission")
        form = Kernel(built.facts["kernel"], version)
    row = wait_for_score(client, place, row or submit(client, place, id, kernel=form, again=again))
    typer.echo("submitted and scored" if file else "5/5 submitted and scored")
    fetch_table(client, place)
    print_row(row, place)


@command(build_app, "infer", "melfold kernel build infer --submission audioset")
def kernel_build_infer(
    submission: Annotated[str, typer.Option("--submission", metavar="ID", help="A submission's name in submissions/.")],
    weights_from: KernelOpt = "",
    gpu: GpuOpt = True,
    budget: BudgetOpt = None,
    owner: OwnerOpt = None,
    competition: OwnCompetitionOpt = None,
    home: HomeOpt = None,
) -> None:
    """Build a kernel that makes a submission again from its weights, within a time budget."""
    from melfold.combine.submission import open_submission
    from melfold.kaggle.build import Target, build_infer
    from melfold.kaggle.submit import competition_for

    place = Home.find(home)
    client = Kaggle(competition_for(open_submission(place, submission), competition))
    target = Target(owner or client.username(), client.competition, gpu, budget)
    built = build_infer(place, submission, target, source=weights_from)
    typer.echo(f"{built.folder}\nNext: melfold kernel rehearse {built.folder}")


WeightsFromOpt = Annotated[
    str,
    typer.Option(
        "--weights-from",
        metavar="SOURCE",
        help="Where the file of model.weights=file:NAME is: OWNER/KERNEL (its output), dataset:OWNER/NAME, or "
        "model:OWNER/MODEL/FRAMEWORK/VARIATION/VERSION (default: it is here, and is uploaded).",
    ),
]
TablesArg = Annotated[
    Path | None,
    typer.Argument(metavar="[DATA]", help="The competition's tables (default: where `download --tables` put them)."),
]
MinutesOpt = Annotated[int, typer.Option("--minutes", min=1, help="Length of a session; it saves in time.")]


@command(build_app, "train", "melfold kernel build train --recipe scratch")
def kernel_build_train(
    data: TablesArg = None,
    recipe: RecipeOpt = DEFAULT_RECIPE,
    folds: FoldsOpt = "all",
    run: RunOpt = None,
    session: Annotated[int, typer.Option("--session", min=1, help="2 continues from the output of session 1, and so on.")] = 1,
    minutes: MinutesOpt = 660,
    gpu: GpuOpt = True,
    weights_from: WeightsFromOpt = "",
    owner: OwnerOpt = None,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Build a kernel that trains folds, one per GPU. The next session continues it."""
    from melfold.kaggle.build import Target
    from melfold.kaggle.training import build_train

    place = Home.find(home)
    data = data or place.data / competition
    training = _training(place, data, recipe, folds, run, weights_from, set_)
    target = Target(owner or Kaggle(competition).username(), competition, gpu, minutes)
    built = build_train(place, training, target, session=session)
    typer.echo(f"{built.folder}\nNext: melfold kernel rehearse {built.folder} --data {data}")


@command(kaggle_app, "train", "melfold kaggle train --recipe scratch", continues=True)
def kaggle_train(
    data: TablesArg = None,
    recipe: RecipeOpt = DEFAULT_RECIPE,
    folds: FoldsOpt = "all",
    run: RunOpt = None,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="At most so many, with those before.")] = 3,
    minutes: MinutesOpt = 660,
    gpu: GpuOpt = True,
    weights_from: WeightsFromOpt = "",
    owner: OwnerOpt = None,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Train a run on Kaggle's GPUs, session after session, until all folds are done, and bring it home.

    Each session is built, rehearsed with a few clips, pushed, waited for and fetched. Stop it at any time; the same command
    continues.
    """
    from melfold.kaggle.build import Target
    from melfold.kaggle.training import train_on_kaggle

    place, client = Home.find(home), Kaggle(competition)
    data = data or place.data / competition
    training = _training(place, data, recipe, folds, run, weights_from, set_)
    target = Target(owner or client.username(), competition, gpu, minutes)
    built = train_on_kaggle(client, place, training, target, sessions=sessions, progress=bar())
    typer.echo(f"{place.runs / training.name}\nIts weights are in the output of {built.facts['kernel']} too.")
    typer.echo(f"Next: melfold oof {training.name}; melfold predict {training.name} --data DATA")


def _training(
    home: Home, data: Path, recipe: str, folds: str, run: str | None, weights_from: str, sets: list[str] | None
) -> Training:
    from melfold import stages
    from melfold.data.competition import load_competition
    from melfold.kaggle.training import Training
    from melfold.learn.start import check_name, parse_folds

    if not data.exists():
        fix = "Run `melfold download --tables`, or give the folder of the tables"
        raise MelfoldError("the competition's tables are not here", str(data), fix)
    resolved = resolve_recipe(recipe, sets, home)
    which, name = parse_folds(folds, resolved), resolve_run_name(run, recipe, resolved, home)
    check_name(name)
    competition = load_competition(data, audio=False)
    table, _ = stages.folds(competition, home, resolved)
    return Training(name, resolved, table, competition, which, weights_from)


@command(kernel_app, "rehearse", "melfold kernel rehearse build/kernels/melfold-infer-audioset")
def kernel_rehearse(
    folder: DirArg,
    data: DownloadOpt = None,
    isolation: Annotated[str, typer.Option("--isolation", help="auto, namespaces or prefix.")] = "auto",
    python: Annotated[
        Path | None, typer.Option("--python", help="The python of another environment, such as one with Kaggle's versions.")
    ] = None,
    keep: Annotated[Path | None, typer.Option("--keep", help="Keep the kernel's working folder and log here.")] = None,
    home: HomeOpt = None,
) -> None:
    """Run a built kernel as Kaggle would, without a network. Only a kernel that passed may be pushed."""
    place, built = Home.find(home), Built(folder.resolve())
    _rehearse(built, _download(place, built, data), place, isolation=isolation, keep=keep, python=python)
    typer.echo(f"Next: melfold kernel push {folder}")


@command(kernel_app, "push", "melfold kernel push build/kernels/melfold-infer-audioset --wait", continues=True)
def kernel_push(
    folder: DirArg,
    wait: WaitOpt = False,
    unrehearsed: Annotated[bool, typer.Option("--unrehearsed", help="Push a kernel that was not rehearsed.")] = False,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
) -> None:
    """Upload the weights, once, and push the kernel. With --wait fetch its log and output."""
    from melfold.kaggle.push import fetch_run, push, wait_for_kernel

    client, built = Kaggle(competition), Built(folder.resolve())
    version = (wait and built.pushed) or push(client, built, unrehearsed=unrehearsed, progress=bar())
    typer.echo(f"{built.facts['kernel']} version {version}")
    if wait:
        output = wait_for_kernel(client, built)
        typer.echo(output)
        if built.facts["kind"] == "train":
            typer.echo(f"{fetch_run(built, output, Home.find(home))}\nNext: melfold oof {built.facts['id']}")


def _download(home: Home, built: Built, data: Path | None) -> Competition:
    from melfold.data.competition import load_competition

    facts = built.facts
    places = [data] if data else [home.data / facts["competition_slug"], home.data / facts["competition"]]
    found = next((place for place in places if place.exists()), None)
    if not found:
        raise MelfoldError("the competition's download was not found", f"not at {places[0]}", "Give its folder: --data DATA")
    return load_competition(found, audio=False)


def _rehearse(built: Built, competition: Competition, home: Home, **options: Any) -> None:
    """Rehearse, and say what was found.

    Raises:
        MelfoldError: a line for each failure.
    """
    from melfold.kaggle.rehearsal import rehearse

    typer.echo("melfold: rehearsing; this takes as long as the kernel does", err=True)
    found = rehearse(built, competition, home, **options)
    typer.echo(f"rehearsed {ISOLATION[found.isolation]}")
    typer.echo(f"{found.seconds:.0f} s, at most {found.peak_mib:.0f} MiB of memory")
    for text in filter(None, (found.equality, found.note)):
        typer.echo(text)
    for clips, seconds in found.predicted_seconds.items():
        typer.echo(f"expected for {int(clips):,} clips of the real length on this machine: {seconds:.0f} s")
    if found.failures:
        raise MelfoldError.many(
            MelfoldError("the rehearsal failed", failure, f"Its report is in {built.folder}") for failure in found.failures
        )
