"""The `data-prep` command: words to calls, and ends to exit codes. Heavy libraries are imported where they are used.

Exit codes: 0 done, 2 the user's mistake (one line on stderr), 1 anything else, 130/143 stopped by SIGINT/SIGTERM.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from data_prep.convert.config import DEFAULT_QUALITY, ConvertSettings
from data_prep.convert.stop import Stopped
from data_prep.errors import Fault, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turns image data sets into .beton files that the ffcv Loader reads, and proves that they are whole.",
)

AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON on stdout.")]


@app.command()
def convert(
    source: Annotated[
        str, typer.Option(metavar="NAME", help="digits, hf-parquet, image-folder or synthetic.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE.beton", help="The beton; its manifest goes beside it.", show_default=False)
    ],
    input_: Annotated[
        str | None, typer.Option("--input", metavar="PATH", help="Folder, file or glob that the source reads.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the source.  [default: the output's name, if train, val or test]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Ray tasks at a time; 0: no Ray, in this process.  [default: all CPUs]")
    ] = None,
    encode: Annotated[
        str, typer.Option(help="original (the source's own JPEG bytes where possible), jpeg or raw.")
    ] = "original",
    max_side: Annotated[int | None, typer.Option(help="Shrink images whose longer side is longer, px.")] = None,
    quality: Annotated[
        int | None, typer.Option(help=f"JPEG quality of images encoded anew.  [default: {DEFAULT_QUALITY}]")
    ] = None,
    subsampling: Annotated[
        str | None, typer.Option(help="Their chroma subsampling: 4:4:4, 4:2:2 or 4:2:0.  [default: 4:4:4]")
    ] = None,
    page_mib: Annotated[int, typer.Option(help="Page of the beton, MiB; the largest image must fit in one.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Convert a data set, or go on where an interrupted conversion stands.

    The result is the same, byte for byte, whatever the number of workers and interruptions. With RAY_ADDRESS set the
    work runs on that cluster, else on a Ray of this machine.

    Example: data-prep convert --source image-folder --input imagenet --output data/imagenet/train.beton --max-side 500
    """
    from data_prep.convert.progress import progress_on
    from data_prep.convert.run import convert as run_conversion
    from data_prep.convert.run import encode_in_this_process
    from data_prep.convert.stop import stop_on_signals
    from data_prep.sources import open_source
    from data_prep.sources.splits import requested_split

    started_s = time.monotonic()
    output = output.expanduser().absolute()
    settings = _settings(encode, max_side, quality, subsampling, page_mib)
    with stop_on_signals() as stop, progress_on(sys.stderr) as progress:
        opened = open_source(source, input_, requested_split(split, output))
        if workers == 0:
            encode_units = encode_in_this_process(stop)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            from data_prep.convert.driver import encode_with_ray

            encode_units = encode_with_ray(workers, os.environ.get("RAY_ADDRESS"), progress, stop)
        outcome = run_conversion(opened, settings, output, encode_units=encode_units, progress=progress, stop=stop)
    manifest = outcome.manifest
    seconds = time.monotonic() - started_s
    if outcome.already_done:
        typer.echo(f"{output}: already done, nothing to do")
    left_out = manifest.source["num_left_out"]
    typer.echo(
        f"{output}: {manifest.num_samples:,} images of {manifest.num_classes} classes, "
        f"{manifest.num_untouched:,} with the source's own bytes, {manifest.beton_bytes / 1e6:,.1f} MB, {seconds:.1f} s"
        + (f"; {left_out:,} files of the source are no images by their name and were left out" if left_out else "")
    )
    typer.echo(f"digest {manifest.digest}")
    if as_json:
        _print_json(
            ok=True,
            path=str(output),
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_classes=manifest.num_classes,
            num_untouched=manifest.num_untouched,
            beton_bytes=manifest.beton_bytes,
            already_done=outcome.already_done,
            num_units_taken_over=outcome.num_units_taken_over,
            seconds=round(seconds, 3),
        )


@app.command()
def verify(
    beton: Annotated[Path, typer.Argument(metavar="FILE.beton", show_default=False)],
    decode: Annotated[str, typer.Option(metavar="all|N", help="Images to decode: all, or so many spread evenly.")] = (
        "1000"
    ),
    as_json: AsJson = False,
) -> None:
    """Check a beton against its manifest: size, digests, structure, counts, and that its images decode.

    Exit code 1 when something is wrong; each finding is one line on stderr.

    Example: data-prep verify data/imagenet/train.beton --decode all
    """
    from data_prep.beton.verify import verify as run_verification
    from data_prep.convert.progress import progress_on

    count = _decode_count(decode)
    with progress_on(sys.stderr) as progress:
        report = run_verification(beton, count, on_decoded=progress.decoded)
    manifest = report.manifest
    for problem in report.problems:
        print(f"data-prep: {beton}: {problem}", file=sys.stderr)
    if report.ok:
        typer.echo(f"{beton}: whole; {manifest.num_samples:,} images, {report.num_decoded:,} of them decoded")
        typer.echo(f"digest {manifest.digest}")
    if as_json:
        _print_json(
            ok=report.ok,
            path=str(beton.expanduser().absolute()),
            digest=manifest.digest,
            num_samples=manifest.num_samples,
            num_decoded=report.num_decoded,
            problems=list(report.problems),
        )
    if not report.ok:
        raise typer.Exit(1)


def _settings(
    encode: str, max_side: int | None, quality: int | None, subsampling: str | None, page_mib: int
) -> ConvertSettings:
    if encode == "raw" and (quality is not None or subsampling is not None):
        raise UserError("--quality and --subsampling say how JPEGs are encoded; with --encode raw there are none")
    return ConvertSettings(
        encode=encode,  # type: ignore[arg-type]  # ConvertSettings checks it
        max_side=max_side,
        quality=DEFAULT_QUALITY if quality is None else quality,
        subsampling=subsampling or "4:4:4",  # type: ignore[arg-type]
        page_bytes=page_mib << 20 if page_mib > 0 else 0,
    )


def _decode_count(option: str) -> int | None:
    if option == "all":
        return None
    if not option.isdecimal():
        raise UserError(f"--decode {option}: expected all or a number")
    return int(option)


def main() -> None:
    """Runs the command line and exits; see the module's docstring for the exit codes."""
    try:
        sys.exit(app(standalone_mode=False, prog_name="data-prep"))
    except typer.TyperException as error:
        _fail(error.exit_code, error.format_message() or "see --help")
    except Stopped as error:
        _fail(128 + error.signal_number, f"stopped by {error}; the same command goes on from where it was")
    except (typer.Abort, KeyboardInterrupt):
        _fail(130, "interrupted")
    except UserError as error:
        _fail(2, str(error))
    except Fault as error:
        _fail(1, str(error))
    except OSError as error:  # a full disk, a lost permission, ...
        _fail(1, str(error))
    except Exception as error:  # noqa: BLE001  # the last frame: whatever it was, it is named and --json gets its line
        traceback.print_exc()
        _fail(1, f"{type(error).__name__}: {error}")


def _fail(code: int, message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"data-prep: {line}", file=sys.stderr)
    if "--json" in sys.argv[1:]:
        _print_json(ok=False, exit_code=code, error=line)
    sys.exit(code)


def _print_json(**values: Any) -> None:
    print(json.dumps(values), flush=True)
