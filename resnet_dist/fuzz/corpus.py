"""`python -m resnet_dist.fuzz.corpus FOLDER`: do all tools agree about the files in a folder, of whatever kind?

Each file is converted in every way, inspected, read by the picture reader, verified, and decoded by training's
decoders, in processes of limited memory; then the entire folder is converted, verified, and read by the stock ffcv
`Loader`. Prints the outcome for the files, and where two tools disagree; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from data_prep.beton import layout
from data_prep.beton.manifest import load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.converter.encode import Encoded, encode
from data_prep.converter.picture import MAX_OFF, BadSample
from data_prep.converter.settings import ConvertSettings, Encoding
from data_prep.jpeg import turbojpeg
from data_prep.jpeg.check import why_unfit
from data_prep.pixels import BadPicture, PictureSettings, picture_format, read_header, to_rgb
from resnet_dist.fuzz.jpegs import made_kinds
from resnet_dist.fuzz.verdicts import Judge

ENCODINGS: tuple[Encoding, ...] = tuple(kind for kind in get_args(Encoding) if kind != "mixed")
PAGE_BYTES = 256 << 20
FILES_AT_A_TIME = 50
MEMORY_MIB = 3072
"""Address space of a process. Libraries take most of it; one picture may take `pixels.LIMITS.decoded_bytes`."""
SECONDS_A_FILE = 120


@dataclass(frozen=True)
class FileResult:
    """How one file was treated."""

    path: str
    format: str
    result: str
    """`kept`, `encoded` or `refused`."""
    reason: str = ""
    """Why it was refused."""
    disagreements: tuple[str, ...] = ()


def examine(path: str, data: bytes, judge: Judge) -> FileResult:
    stored = {kind: _stored(data, ConvertSettings(encode=kind, page_bytes=PAGE_BYTES)) for kind in ENCODINGS}
    file_format = picture_format(data) or "other"
    refusals = {kind: str(result) for kind, result in stored.items() if isinstance(result, BadSample)}
    if refusals:
        reason = next(iter(refusals.values()))
        return FileResult(path, file_format, "refused", reason, tuple(_differ_in_refusal(data, file_format, refusals)))
    kept = [result for result in stored.values() if isinstance(result, Encoded)]
    found = [
        *_differ_in_pixels(data, kept[ENCODINGS.index("raw")]),
        *(
            f"{kind}: {what}"
            for kind, one in zip(ENCODINGS, kept, strict=True)
            for what in _differ_in_store(one, judge)
        ),
    ]
    return FileResult(path, file_format, "kept" if kept[0].untouched else "encoded", "", tuple(found))


def _stored(data: bytes, settings: ConvertSettings) -> Encoded | BadSample:
    try:
        return encode(data, settings)
    except BadSample as error:
        return error


def _differ_in_refusal(data: bytes, file_format: str, refusals: dict[Encoding, str]) -> Iterator[str]:
    if len(refusals) < len(ENCODINGS):
        yield f"refused with --encode {', '.join(refusals)} only: {next(iter(refusals.values()))}"
    if any("object at 0x" in reason or not reason.isprintable() for reason in refusals.values()):
        yield "the reason is not a readable line"
    if file_format != "JPEG":  # Pillow does not report a JPEG's damage, conversion does
        try:
            to_rgb(data)
            yield "convert refuses it, the picture reader reads it"
        except BadPicture:
            pass


def _differ_in_pixels(data: bytes, raw: Encoded) -> Iterator[str]:
    shape = raw.height, raw.width, 3
    try:
        header = read_header(data)
    except BadPicture as error:
        yield f"convert stores it, inspect says that it {error}"
        return
    if (header.height, header.width) != shape[:2]:
        yield f"inspect says {header.width} x {header.height} px, {raw.width} x {raw.height} are stored"
    try:
        seen = np.asarray(to_rgb(data))
    except BadPicture as error:
        yield f"convert stores it, the picture reader says that it {error}"
        return
    if seen.shape != shape or seen.tobytes() != raw.data:
        yield "the picture reader shows other pixels than those that are stored"
    chosen = PictureSettings("apply", (255, 0, 255))
    other = _stored(data, ConvertSettings("raw", None, 95, "4:4:4", PAGE_BYTES, 0.0, 0, chosen.exif, chosen.background))
    if not isinstance(other, Encoded) or other.data != np.asarray(to_rgb(data, chosen)).tobytes():
        yield "with a turn and a background, the picture reader shows other pixels than those that are stored"


def _differ_in_store(stored: Encoded, judge: Judge) -> Iterator[str]:
    if stored.mode == layout.MODE_RAW:
        return
    unfit = why_unfit(stored.data, stored.height, stored.width)
    if unfit is not None:
        yield f"convert stores what verify refuses: {unfit}"
    verdict = judge.verdict(stored.data, np.random.default_rng(len(stored.data)))
    if verdict.disagreement is not None:
        yield verdict.disagreement
    pixels = np.asarray(to_rgb(stored.data))
    if not np.array_equal(judge.behind_another(stored.data, stored.height, stored.width), pixels):
        yield "libjpeg-turbo and the picture reader show different pixels"


def examine_all(paths: Sequence[str], memory_mib: int) -> Iterator[FileResult]:
    """In child processes; one that dies names the file that killed it."""
    for start in range(0, len(paths), FILES_AT_A_TIME):
        few = paths[start : start + FILES_AT_A_TIME]
        while few:
            done = 0
            for outcome in _in_a_child(few, memory_mib):
                yield outcome
                done += 1
            if done < len(few):
                reason = "ended the process (memory, time, or a crash)"
                yield FileResult(few[done], "?", "refused", reason, (reason,))
                done += 1
            few = few[done:]


def _in_a_child(paths: Sequence[str], memory_mib: int) -> Iterator[FileResult]:
    command = [sys.executable, "-m", "resnet_dist.fuzz.corpus", "--child", "--memory-mib", str(memory_mib)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(list(paths)).encode(),
            stdout=subprocess.PIPE,
            timeout=SECONDS_A_FILE * len(paths),
            check=False,
        )
        lines = done.stdout
    except subprocess.TimeoutExpired as error:
        lines = error.stdout or b""
    for line in lines.splitlines():
        values = json.loads(line)
        yield FileResult(**{**values, "disagreements": tuple(values["disagreements"])})


def _be_the_child() -> None:
    judge = Judge(before=next(iter(made_kinds().values())))
    for path in json.load(sys.stdin):
        print(json.dumps(asdict(examine(path, Path(path).read_bytes(), judge))), flush=True)


def convert_as_a_whole(paths: Sequence[str], outcomes: Sequence[FileResult], memory_mib: int) -> Iterator[str]:
    """Differences between a conversion of all files by the command and the results for each file."""
    expected = {f"all/{number:06}.jpg": outcome for number, outcome in enumerate(outcomes)}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree" / "all"
        tree.mkdir(parents=True)
        for name, path in zip(expected, paths, strict=True):
            (tree.parent / name).symlink_to(Path(path).absolute())
        for encoding in ENCODINGS:
            beton = Path(folder) / encoding / "all.beton"
            beton.parent.mkdir()
            options = ["--encode", encoding, "--workers", "0", "--on-error", "quarantine", "--max-bad", "100%"]
            source = ["--source", "image-folder", "--input", str(tree.parent), "--output", str(beton)]
            failure = _run(["convert", *source, *options, "--page-mib", str(PAGE_BYTES >> 20)], memory_mib)
            if failure is not None:
                if any(outcome.result != "refused" for outcome in outcomes):
                    yield f"convert --encode {encoding}: {failure}"
                continue
            left_out = {entry["key"] for entry in load_manifest(beton).quarantined}
            for name, outcome in expected.items():
                if (name in left_out) != (outcome.result == "refused"):
                    yield f"convert --encode {encoding}: {outcome.path} is {outcome.result} only when alone"
            failure = _run(["verify", str(beton), "--decode", "all"], memory_mib)
            if failure is not None:
                yield f"verify of --encode {encoding}: {failure}"
            files = [outcome.path for name, outcome in expected.items() if name not in left_out]
            yield from (f"--encode {encoding}: {file}: {what}" for file, what in _by_ffcv(beton, files))
            beton.unlink()


def _run(arguments: Sequence[str], memory_mib: int) -> str | None:
    """The last lines of a command that failed; None if it did not."""
    code = "import sys; from data_prep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
        env={**os.environ, "COLUMNS": "400"},
        preexec_fn=lambda: _limit_memory(memory_mib),
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return None if done.returncode == 0 else f"exit code {done.returncode}: {' | '.join(lines[-3:])}"


def _by_ffcv(beton: Path, files: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Images that the stock loader shows wrongly, and how. `files`: the source file of each sample."""
    from resnet_dist.fuzz.ffcv_pixels import read_with_ffcv

    reader = BetonReader(beton)
    small = np.flatnonzero(reader.heights.astype(np.int64) * reader.widths <= 4_000_000)  # buffers fit the largest
    if not len(small):
        return
    for sample, (shown, _) in zip(small.tolist(), read_with_ffcv(beton, reader, small), strict=True):
        data, height, width = bytes(reader.image_bytes(sample)), *shown.shape[:2]
        if reader.mode(sample) == layout.MODE_RAW:
            pixels = np.frombuffer(data, np.uint8).reshape(shown.shape)
        else:
            pixels = turbojpeg.decode_as_ffcv(data, height, width)
        if not np.array_equal(shown, pixels):
            yield files[sample], "the stock loader shows other pixels than libjpeg-turbo with the fast DCT"
        # The fast DCT overflows in blocks far beyond full contrast, which some of `made_kinds` have. The source's own
        # bytes are kept all the same: exact decoders, training's among them, show them right.
        is_own = data == Path(files[sample]).read_bytes()
        if reader.mode(sample) == layout.MODE_JPEG and not is_own:
            off = int(np.abs(shown.astype(np.int16) - np.asarray(to_rgb(data))).max())
            if off > MAX_OFF:
                yield files[sample], f"the stock loader is off by {off} grey levels in an image that was encoded again"


def _limit_memory(memory_mib: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))


def as_table(outcomes: Iterable[FileResult]) -> str:
    counts = Counter((outcome.format, outcome.result) for outcome in outcomes)
    lines = ["| format | kept as it is | encoded | refused |", "|---|---|---|---|"]
    for file_format in sorted({file_format for file_format, _ in counts}):
        each = (f"{counts[file_format, result]:,}" for result in ("kept", "encoded", "refused"))
        lines.append(f"| {file_format} | {' | '.join(each)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m resnet_dist.fuzz.corpus", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of files of any kind, at any depth")
    parser.add_argument("--memory-mib", type=int, default=MEMORY_MIB, help="of address space for each process")
    parser.add_argument("--each-alone", action="store_true", help="leave out the conversions of the entire folder")
    parser.add_argument("--reasons", action="store_true", help="list why files were refused")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _limit_memory(arguments.memory_mib)
        _be_the_child()
        return 0
    if arguments.folder is None or not arguments.folder.is_dir():
        parser.error("give a folder")
    paths = sorted(str(path) for path in arguments.folder.rglob("*") if path.is_file())
    outcomes = []
    for outcome in examine_all(paths, arguments.memory_mib):
        outcomes.append(outcome)
        for what in outcome.disagreements:
            print(f"{outcome.path}: {what}", flush=True)
    differences = sum(len(outcome.disagreements) for outcome in outcomes)
    if not arguments.each_alone and paths:
        for what in convert_as_a_whole(paths, outcomes, arguments.memory_mib):
            differences += 1
            print(what, flush=True)
    print(as_table(outcomes))
    if arguments.reasons:
        for outcome in outcomes:
            if outcome.reason:
                print(f"{outcome.path} {outcome.reason}")
    print(f"{len(outcomes):,} files, {differences:,} disagreements")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
