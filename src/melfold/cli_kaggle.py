"""The commands that talk to Kaggle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from melfold.errors import MelfoldError
from melfold.files import Home
from melfold.kaggle.client import COMPETITION
from melfold.terminal import HomeOpt, RecipeOpt, RunOpt, SetOpt, bar, command, print_table, refuse_set

if TYPE_CHECKING:
    from melfold.data.competition import Competition
    from melfold.kaggle.built import Built
    from melfold.kaggle.client import Kaggle
    from melfold.kaggle.ledger import Row
    from melfold.kaggle.rehearsal import Rehearsal

kernel_app = typer.Typer(help="Offline Kaggle kernels: build, rehearse, push.", no_args_is_help=True)
build_app = typer.Typer(help="Build a kernel: infer or train.", no_args_is_help=True)
ledger_app = typer.Typer(help="Every submission's OOF score beside its leaderboard scores.", no_args_is_help=True)
kernel_app.add_typer(build_app, name="build")

IdArg = Annotated[str, typer.Argument(metavar="ID", help="A submission's name in submissions/.")]
DirArg = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `kernel build` made.")]
CompetitionOpt = Annotated[str, typer.Option("--competition", help="The competition's name in its address.")]
DataPathOpt = Annotated[Path | None, typer.Option("--data", help="The competition's download (else where `download` put it).")]
OwnerOpt = Annotated[str | None, typer.Option("--owner", help="Your Kaggle user name (else the CLI is asked).")]
GpuOpt = Annotated[bool, typer.Option("--gpu/--cpu", help="Ask Kaggle for two T4s, or for none.")]
BudgetOpt = Annotated[
    float | None, typer.Option("--budget", help="Minutes the kernel may take (else 60 with a GPU, 240 without).")
]
AgainOpt = Annotated[bool, typer.Option("--again", help="Submit although Kaggle has it, or may have it, already.")]
WaitOpt = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for Kaggle.")]


def register(app: typer.Typer) -> None:
    """Put these commands under the main one."""
    app.add_typer(kernel_app, name="kernel")
    app.add_typer(ledger_app, name="ledger")

    @command(app, "download", "melfold download")
    def download(
        to: Annotated[Path | None, typer.Option("--to", help="The folder (else data/<competition>).")] = None,
        competition: CompetitionOpt = COMPETITION,
        home: HomeOpt = None,
        set_: SetOpt = None,
    ) -> None:
        """Download the competition: verified, unpacked, resumable."""
        from melfold.kaggle.download import download as fetch

        refuse_set(set_)
        target = (to or Home.find(home).data / competition).resolve()
        typer.echo(f"{fetch(_client(competition), target, progress=bar())}\nNext: melfold check {target}")

    @command(app, "submit", "melfold submit open --kernel")
    def submit(
        id: IdArg,
        kernel: Annotated[
            bool, typer.Option("--kernel/--file", help="The pushed kernel's output (code form), or the file itself.")
        ] = False,
        again: AgainOpt = False,
        wait: WaitOpt = False,
        competition: CompetitionOpt = COMPETITION,
        home: HomeOpt = None,
        set_: SetOpt = None,
    ) -> None:
        """Submit once: what is in doubt is looked up, never repeated."""
        from melfold.kaggle.built import built_for
        from melfold.kaggle.submit import Kernel, wait_for_score
        from melfold.kaggle.submit import submit as spend

        refuse_set(set_)
        client, place = _client(competition), Home.find(home)
        form = None
        if kernel:
            built = built_for(place, "infer", id)
            pushed = built.pushed
            if not pushed:
                raise MelfoldError(
                    "this kernel was not pushed since it was built", str(built.folder), "Run `melfold kernel push`"
                )
            form = Kernel(pushed["kernel"], pushed["version"])
        row = spend(client, place, id, kernel=form, again=again)
        if wait and row.status == "submitted":
            row = wait_for_score(client, place, row.tag)
        _print_row(row)

    @command(app, "ship", "melfold ship open")
    def ship(
        id: IdArg,
        data: DataPathOpt = None,
        file: Annotated[bool, typer.Option("--file", help="The file form: no kernel, the file alone.")] = False,
        gpu: GpuOpt = True,
        budget: BudgetOpt = None,
        again: AgainOpt = False,
        owner: OwnerOpt = None,
        competition: CompetitionOpt = COMPETITION,
        home: HomeOpt = None,
        set_: SetOpt = None,
    ) -> None:
        """Build, rehearse, push, wait, submit, wait for the score, record; a repeated call goes on where it was."""
        from melfold.kaggle.push import check_output, push, wait_for_kernel
        from melfold.kaggle.submit import Kernel, wait_for_score
        from melfold.kaggle.submit import submit as spend

        refuse_set(set_)
        client, place = _client(competition), Home.find(home)
        form = None
        if not file:
            built = _build_infer(client, place, id, owner, gpu=gpu, budget=budget)
            typer.echo(f"1/5 built {built.folder}")
            download = _competition(place, built, data)
            if not built.passed:
                _print_report(_rehearse(built, download, place), built)
            typer.echo("2/5 rehearsed")
            pushed = built.pushed
            version = pushed["version"] if pushed else push(client, built)
            typer.echo(f"3/5 pushed {built.facts['kernel']} version {version}")
            check_output(wait_for_kernel(client, built), download)
            typer.echo("4/5 the kernel is complete, its output is a valid submission")
            form = Kernel(built.facts["kernel"], version)
        row = spend(client, place, id, kernel=form, again=again)
        if row.status == "submitted":
            row = wait_for_score(client, place, row.tag)
        typer.echo("5/5 submitted and scored" if not file else "submitted and scored")
        _print_row(row)


@command(build_app, "infer", "melfold kernel build infer --submission open")
def kernel_build_infer(
    submission: Annotated[str, typer.Option("--submission", metavar="ID", help="A submission's name in submissions/.")],
    weights_from: Annotated[
        str, typer.Option("--weights-from", metavar="OWNER/KERNEL", help="Take the weights from a training kernel's output.")
    ] = "",
    gpu: GpuOpt = True,
    budget: BudgetOpt = None,
    owner: OwnerOpt = None,
    home: HomeOpt = None,
    set_: SetOpt = None,
    competition: CompetitionOpt = COMPETITION,
) -> None:
    """A kernel that makes a submission anew from its weights, within a time budget."""
    refuse_set(set_)
    built = _build_infer(
        _client(competition), Home.find(home), submission, owner, gpu=gpu, budget=budget, weights_from=weights_from
    )
    typer.echo(f"{built.folder}\nNext: melfold kernel rehearse {built.folder}")


@command(build_app, "train", "melfold kernel build train --recipe scratch")
def kernel_build_train(
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", help="The competition's download (else where `download` put it).")
    ] = None,
    recipe: RecipeOpt = "open",
    folds: Annotated[str, typer.Option("--folds", help="0,1 or all or full.")] = "all",
    run: RunOpt = None,
    session: Annotated[int, typer.Option("--session", min=1, help="2 goes on from the output of session 1, and so on.")] = 1,
    minutes: Annotated[int, typer.Option("--minutes", min=1, help="The session's length; it saves in time.")] = 660,
    gpu: GpuOpt = True,
    owner: OwnerOpt = None,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """A kernel that trains folds, one a GPU, and is continued by the next session."""
    from melfold import pipeline
    from melfold.data.competition import load_competition
    from melfold.kaggle.build import Target, build_train
    from melfold.learn.runs import default_run_name, parse_folds
    from melfold.recipes import load_recipe

    place, resolved = Home.find(home), load_recipe(recipe, set_ or [])
    data = data or place.data / competition
    download = load_competition(data)
    table, _ = pipeline.folds(download, place, resolved)
    name = run or default_run_name(resolved, load_recipe(recipe))
    client = _client(competition)
    built = build_train(
        place,
        resolved,
        name,
        table,
        download,
        Target(owner or client.username(), competition, gpu, minutes),
        folds=parse_folds(folds, resolved),
        session=session,
    )
    typer.echo(f"{built.folder}\nNext: melfold kernel rehearse {built.folder} --data {data}")


@command(kernel_app, "rehearse", "melfold kernel rehearse build/kernels/melfold-infer-open")
def kernel_rehearse(
    folder: DirArg,
    data: DataPathOpt = None,
    minutes: Annotated[float, typer.Option("--minutes", help="How long a training kernel may run before it must save.")] = 5,
    isolation: Annotated[str, typer.Option("--isolation", help="auto, namespaces or prefix.")] = "auto",
    python: Annotated[
        Path | None, typer.Option("--python", help="The python of another environment, such as one with Kaggle's versions.")
    ] = None,
    keep: Annotated[Path | None, typer.Option("--keep", help="Keep the kernel's working folder and log here.")] = None,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Run a built kernel as Kaggle would, with the network cut off; only then may it be pushed."""
    from melfold.kaggle.built import Built

    refuse_set(set_)
    place, built = Home.find(home), Built(folder.resolve())
    report = _rehearse(
        built, _competition(place, built, data), place, minutes=minutes, isolation=isolation, keep=keep, python=python
    )
    _print_report(report, built)
    typer.echo(f"Next: melfold kernel push {folder}")


@command(kernel_app, "push", "melfold kernel push build/kernels/melfold-infer-open --wait")
def kernel_push(
    folder: DirArg,
    wait: WaitOpt = False,
    unrehearsed: Annotated[bool, typer.Option("--unrehearsed", help="Push a kernel that was not rehearsed.")] = False,
    competition: CompetitionOpt = COMPETITION,
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Upload the weights, once, and push the kernel; with --wait fetch its log and output."""
    from melfold.kaggle.built import Built
    from melfold.kaggle.push import fetch_run, push, wait_for_kernel

    refuse_set(set_)
    client, built = _client(competition), Built(folder.resolve())
    pushed = built.pushed
    version = pushed["version"] if pushed and wait else push(client, built, unrehearsed=unrehearsed)
    typer.echo(f"{built.facts['kernel']} version {version}")
    if wait:
        output = wait_for_kernel(client, built)
        typer.echo(output)
        if built.facts["kind"] == "train":
            typer.echo(f"{fetch_run(built, output, Home.find(home))}\nNext: melfold oof {built.facts['id']}")


@command(ledger_app, "sync", "melfold ledger sync")
def ledger_sync(competition: CompetitionOpt = COMPETITION, home: HomeOpt = None, set_: SetOpt = None) -> None:
    """Fetch statuses and scores from Kaggle; look again for what is unknown."""
    from melfold.kaggle.submit import sync

    refuse_set(set_)
    lines = sync(_client(competition), Home.find(home))
    for line in lines or ["Nothing new."]:
        typer.echo(line)


@command(ledger_app, "show", "melfold ledger show --sort public_score")
def ledger_show(
    sort: Annotated[str, typer.Option("--sort", metavar="COLUMN", help="Any column of ledger.csv.")] = "time",
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Every submission, and the two to select."""
    import pandas as pd

    from melfold.kaggle.ledger import COLUMNS, Ledger, choose_two

    refuse_set(set_)
    if sort not in COLUMNS:
        raise MelfoldError("no such column", sort, f"Use one of {', '.join(COLUMNS)}")
    rows = Ledger.of(Home.find(home)).rows()
    numeric = sort.endswith(("score", "lwlrap"))
    rows.sort(key=lambda row: float(getattr(row, sort) or "-inf") if numeric else getattr(row, sort), reverse=numeric)
    shown = ["time", "track", "oof_lwlrap", "public_score", "private_score", "status", "ref", "kernel", "version", "tag", "note"]
    table = pd.DataFrame([[getattr(row, c) for c in shown] for row in rows], columns=shown, index=[row.id for row in rows])
    for column in ("oof_lwlrap", "public_score", "private_score"):
        table[column] = [f"{float(v):.4f}" if v else "-" for v in table[column]]
    print_table(table, "id")
    for number, choice in enumerate(choose_two(rows), 1):
        typer.echo(f"select {number}: {choice.row.id} ({choice.row.ref}), {choice.reason}")


@command(ledger_app, "plot", "melfold ledger plot -o ledger.png")
def ledger_plot(
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("ledger.png"),
    home: HomeOpt = None,
    set_: SetOpt = None,
) -> None:
    """Draw OOF against Public and Private scores."""
    from melfold.kaggle.ledger import Ledger
    from melfold.report.ledger import plot_ledger

    refuse_set(set_)
    plot_ledger(Ledger.of(Home.find(home)).rows(), output)
    typer.echo(output)


def _client(competition: str) -> Kaggle:
    from melfold.kaggle.client import Kaggle

    return Kaggle(competition)


def _build_infer(
    client: Kaggle, home: Home, id: str, owner: str | None, *, gpu: bool, budget: float | None, weights_from: str = ""
) -> Built:
    from melfold.kaggle.build import Target, build_infer

    return build_infer(home, id, Target(owner or client.username(), client.competition, gpu, budget), source=weights_from)


def _competition(home: Home, built: Built, data: Path | None) -> Competition:
    from melfold.data.competition import load_competition

    facts = built.facts
    places = [data] if data else [home.data / facts["competition_slug"], home.data / facts["competition"]]
    found = next((place for place in places if place.exists()), None)
    if not found:
        raise MelfoldError("where is the competition's download?", f"not at {places[0]}", "Give --data")
    return load_competition(found)


def _rehearse(built: Built, competition: Competition, home: Home, **options: object) -> Rehearsal:
    from melfold.kaggle.rehearsal import rehearse

    typer.echo("melfold: rehearsing; this takes as long as the kernel does", err=True)
    return rehearse(built, competition, home, **options)  # type: ignore[arg-type]


def _print_report(report: Rehearsal, built: Built) -> None:
    how = {
        "namespaces": "in user, network and mount namespaces: no network, inputs read-only",
        "prefix": "under a path prefix, an audit hook refusing the network and writes to the inputs",
    }
    typer.echo(f"rehearsed {how[report.isolation]}")
    typer.echo(f"{report.seconds:.0f} s, {report.peak_mib:.0f} MiB at the peak")
    if report.equality:
        typer.echo(report.equality)
    for clips, seconds in report.predicted_seconds.items():
        typer.echo(f"expected for {int(clips):,} clips of the real length on this machine: {seconds:.0f} s")
    if report.failures:
        raise MelfoldError.many(
            MelfoldError("the rehearsal failed", failure, f"Its report is in {built.folder}") for failure in report.failures
        )


def _print_row(row: Row) -> None:
    private = f", private {float(row.private_score):.4f}" if row.private_score else ""
    public = f"public {float(row.public_score):.4f}{private}" if row.public_score else "no score yet: `melfold ledger sync`"
    oof = f"OOF {float(row.oof_lwlrap):.4f}, " if row.oof_lwlrap else ""
    typer.echo(f"{row.id}: {row.status}, {oof}{public} (ref {row.ref or '-'}, melfold:{row.tag})")
