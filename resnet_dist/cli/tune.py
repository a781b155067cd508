"""`resnet-dist tune`: a sweep over a search space, its report, and the next finer space."""

from __future__ import annotations

import json
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
    help="Search learning rates and other values: tune SPACE.yaml --on PROFILE.",
)
SweepDir = Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep's folder under the profile's storage.")]


@tune_app.command()
def run(
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="A search space's YAML file.")],
    on: ProfileFile,
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the space.")] = [],  # noqa: B006
    profile_set: ProfileSets = [],  # noqa: B006
    name: Annotated[
        str | None,
        typer.Option(help="The sweep's name; the same name resumes the same sweep.  [default: SPACE's file name]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print trials and cost, start nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, or resume it. `tune SPACE` is short for `tune run SPACE`.

    More trials: the same command with a larger --set trials=N. Example: resnet-dist tune tune_spaces/digits_smoke.yaml
    --on cluster/profiles/laptop.yaml
    """
    from resnet_dist.sweeps.prepare import prepare_sweep

    profile = load_profile_file(on, profile_set)
    prepared = prepare_sweep(space, set_, profile, name or space.stem)
    if dry_run:
        from resnet_dist.sweeps.dry_run import describe_sweep

        typer.echo(describe_sweep(prepared), nl=False)
        return
    from resnet_dist.sweeps.driver import run_sweep

    end = run_sweep(prepared, lambda line: typer.echo(line, err=True))
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
    """Ranking, heat map, curves and best recipe of a sweep, also while it runs.

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
    output: Annotated[Path, typer.Option(metavar="FILE.yaml", help="The space to write; must not exist.")],
    keep: Annotated[float, typer.Option(min=0.01, max=1.0, help="The share of points to close in on.")] = 0.25,
) -> None:
    """Write the next, finer space around a sweep's best points; it begins with what this sweep knows.

    Example: resnet-dist tune narrow runs/lr_wd_random --output tune_spaces/lr_wd_2.yaml
    """
    from resnet_dist.sweeps.analysis.next_sweep import next_space_text

    if output.exists():
        raise UserError(f"--output {output}: exists; name another file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it first")
    text, words = next_space_text(sweep, keep, output)
    output.write_text(text, encoding="utf-8")
    for line in words:
        typer.echo(line)
    typer.echo(f"next    resnet-dist tune {output} --on PROFILE")


@tune_app.command()
def compare(
    sweep: SweepDir,
    scheduler: Annotated[
        list[str] | None, typer.Option(metavar="YAML", help="A space's scheduler; may be given again.")
    ] = None,
    draws: Annotated[int, typer.Option(min=10, help="Orders in which the points are tried.")] = 1000,
    at_once: Annotated[int, typer.Option(min=1, help="Trials at once.")] = 1,
) -> None:
    """What early stopping would have cost and picked on the curves of a finished sweep, beside random search.

    That sweep's own scheduler must be fifo. Example: resnet-dist tune compare runs/lr_wd_random --scheduler '{kind:
    asha, first_rung: 0.33, rungs: 1}'
    """
    from resnet_dist.sweeps.analysis.compare import compare as measure
    from resnet_dist.sweeps.ledger import read_ledger, replay

    typer.echo(measure(replay(read_ledger(sweep)), scheduler or ["{kind: asha}"], draws, at_once))
