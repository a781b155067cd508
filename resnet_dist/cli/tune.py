"""`resnet-dist tune`: a sweep over a search space, its report, and the next finer space."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from resnet_dist.cli.options import AsJson, ProfileFile, ProfileSets, load_profile_file
from resnet_dist.errors import UserError


class _SpaceOrCommand(TyperGroup):
    """`tune FILE.yaml ...` is `tune run FILE.yaml ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


tune_app = typer.Typer(
    cls=_SpaceOrCommand,
    no_args_is_help=True,
    help="Search for learning rates and other settings: tune SPACE.yaml --on PROFILE.",
)
SweepDir = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's folder under the profile's storage.")]


@tune_app.command()
def run(
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="A search space's YAML file.")],
    on: ProfileFile,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the space.")] = [],
    profile_set: ProfileSets = [],
    name: Annotated[
        str | None,
        typer.Option(help="Name of the sweep; the same name resumes the same sweep.  [default: SPACE's file name]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print trials and cost, start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, or resume it. `tune SPACE` is short for `tune run SPACE`.

    For more trials, repeat the command with a larger --set trials=N.

    Example: resnet-dist tune tune_spaces/digits_smoke.yaml --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.launch.progress_bar import ProgressBar

    profile = load_profile_file(on, profile_set)
    bar = ProgressBar("epochs", line_every_s=30)
    with bar.live("checking the space, its recipe and the data"):
        from resnet_dist.sweeps.prepare import prepare_sweep

        prepared = prepare_sweep(space, set_, profile, name or space.stem)
    if dry_run:
        from resnet_dist.sweeps.dry_run import describe_sweep

        typer.echo(describe_sweep(prepared), nl=False)
        return
    from resnet_dist.sweeps.driver import run_sweep

    end = run_sweep(prepared, bar)
    if as_json:
        typer.echo(json.dumps({key: str(value) for key, value in vars(end).items()}, sort_keys=True))
    else:
        typer.echo((end.report_dir / "ranking.md").read_text(encoding="utf-8"))
        typer.echo(f"ended: {end.why}")
        typer.echo(f"report  {end.report_dir / 'index.html'}")
        if end.best_recipe is not None:
            typer.echo(f"recipe  {end.best_recipe}")
    if end.exit_code:
        raise typer.Exit(end.exit_code)


@tune_app.command()
def report(sweep: SweepDir) -> None:
    """Write a sweep's ranking, heat map, curves and best recipe, even while it is running.

    Example: resnet-dist tune report runs/digits_smoke
    """
    from resnet_dist.sweeps.analysis.report import write_report

    written = write_report(sweep)
    typer.echo(written.text)
    typer.echo(f"report  {written.folder / 'index.html'}")
    if written.best_recipe is not None:
        typer.echo(f"recipe  {written.best_recipe}")


@tune_app.command()
def narrow(
    sweep: SweepDir,
    output: Annotated[Path, typer.Option(metavar="FILE.yaml", help="New file for the space.")],
    keep: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of the points, the best ones, that the new space is drawn around."),
    ] = 0.25,
) -> None:
    """Write a finer search space around the best points of a sweep, to be warm-started with its results.

    Example: resnet-dist tune narrow runs/lr_wd_random --output tune_spaces/lr_wd_2.yaml
    """
    from resnet_dist.sweeps.analysis.next_sweep import next_space_text

    if output.exists():
        raise UserError(f"--output {output}: already exists; give another name")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; create it first")
    text, changes = next_space_text(sweep, keep, output)
    output.write_text(text, encoding="utf-8")
    typer.echo("\n".join(changes))
    typer.echo(f"next    resnet-dist tune {output} --on PROFILE")


@tune_app.command()
def compare(
    sweeps: Annotated[
        list[Path],
        typer.Argument(metavar="SWEEP...", help="Folders of sweeps, or ledger files; several: the same on other data."),
    ],
    scheduler: Annotated[
        list[str] | None,
        typer.Option(metavar="YAML", help="Scheduler, as in a search space; repeatable.  [default: {kind: asha}]"),
    ] = None,
    draws: Annotated[int, typer.Option(min=10, help="Random orders of points to replay.")] = 1000,
    points: Annotated[
        int | None, typer.Option(min=2, help="Points in each draw.  [default: two thirds of those recorded]")
    ] = None,
    orders_seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    at_once: Annotated[int, typer.Option(min=1, help="Trials running at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Replay schedulers on recorded curves: what each would have cost and picked, beside random search.

    The sweeps must have stopped no trial: scheduler fifo, or record for annealed and halving.

    Example: resnet-dist tune compare runs/lr_wd_random --scheduler '{kind: asha, first_rung: 0.33, rungs: 1}'
    """
    from resnet_dist.sweeps.analysis.compare import compare as measure
    from resnet_dist.sweeps.ledger import read_events, read_ledger, replay

    measured = measure(
        [replay(read_events(path) if path.is_file() else read_ledger(path)) for path in sweeps],
        scheduler or ["{kind: asha}"],
        num_draws=draws,
        num_points=points,
        orders_seed=orders_seed,
        at_once=at_once,
    )
    typer.echo(json.dumps(asdict(measured)) if as_json else measured.markdown())
