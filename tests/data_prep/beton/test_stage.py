"""stage: one copy for all processes, verified chunk by chunk, resumed where it stopped."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from data_prep.beton import stage as module
from data_prep.beton.digest import CHUNK_BYTES
from data_prep.beton.manifest import load_manifest, manifest_path
from data_prep.beton.stage import stage
from data_prep.errors import Fault, UserError

WAIT_LIMIT_S = 120.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, convert_here) -> Path:
    """A beton of five chunks."""
    beton = tmp_path_factory.mktemp("shared") / "train.beton"
    convert_here("synthetic", "n=120,size=250,format=png", beton, encode="raw")
    assert len(load_manifest(beton).chunks) == 5
    return beton


def folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_staged_beton_is_the_same_and_is_copied_once(shared: Path, tmp_path: Path) -> None:
    copied: list[tuple[int, int]] = []
    path = stage(shared, tmp_path / "cache", on_copied=lambda done, total: copied.append((done, total)))
    assert path.read_bytes() == shared.read_bytes()
    assert load_manifest(path) == load_manifest(shared)
    assert path.parent.name == load_manifest(shared).digest.partition(":")[2][:32]
    assert folder_names(path.parent) == [
        "lock",
        "train.beton",
        "train.manifest.json",
        "train.paths.txt.gz",
        "train.samples.bin",
    ]
    assert len(copied) == 5
    assert copied[-1] == (shared.stat().st_size, shared.stat().st_size)
    assert stage(shared, tmp_path / "cache", on_copied=lambda *_: pytest.fail("copied again")) == path


class Killed(Exception):
    pass


def test_an_interrupted_copy_resumes_and_replaces_damaged_chunks(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= 3 * CHUNK_BYTES:
            raise Killed

    with pytest.raises(Killed):
        stage(shared, tmp_path, on_copied=interrupt)
    (unfinished,) = tmp_path.glob("*/*.unfinished")
    assert not list(tmp_path.glob("*/*.beton"))
    with unfinished.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(b"X")
    fetched = []
    read_chunk = module._read_chunk

    def spy(file, source, start, *rest):
        fetched.append(start // CHUNK_BYTES)
        return read_chunk(file, source, start, *rest)

    monkeypatch.setattr(module, "_read_chunk", spy)
    path = stage(shared, tmp_path)
    assert path.read_bytes() == shared.read_bytes()
    assert fetched == [1, 3, 4]


def test_eight_processes_at_once_make_one_copy(shared: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from data_prep.beton.stage import stage\n"
        "copied = []\n"
        "path = stage(sys.argv[1], Path(sys.argv[2]), on_copied=lambda done, total: copied.append(done))\n"
        "print(len(copied), path)\n"
    )
    command = [sys.executable, "-c", script, str(shared), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    told = [process.communicate(timeout=WAIT_LIMIT_S)[0].split(" ", 1) for process in processes]
    assert sorted(int(count) for count, _ in told) == [0] * 7 + [5]
    (path,) = {Path(path.strip()) for _, path in told}
    assert path.read_bytes() == shared.read_bytes()


def test_a_url_is_staged_through_fsspec(shared: Path, tmp_path: Path) -> None:
    import fsspec

    base = f"memory://{uuid.uuid4().hex}"
    for path in (shared, manifest_path(shared)):
        with fsspec.open(f"{base}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    path = stage(f"{base}/train.beton", tmp_path)
    assert path.read_bytes() == shared.read_bytes()
    with pytest.raises(UserError, match=r"none\.manifest\.json: does not exist"):
        stage(f"{base}/none.beton", tmp_path)


def test_a_damaged_source_is_refused(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "shared"
    shutil.copytree(shared.parent, source)
    with (source / "train.beton").open("r+b") as file:
        file.seek(2 * CHUNK_BYTES)
        file.write(b"XXXX")
    with pytest.raises(Fault, match=r"bytes 16777216\.\.25165823 are not what its manifest says, read 3 times"):
        stage(source / "train.beton", tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*.beton"))


def test_waiting_for_another_process_has_an_end(shared: Path, tmp_path: Path) -> None:
    import fcntl

    place = stage(shared, tmp_path).parent
    (place / "train.manifest.json").unlink()
    with (place / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Fault, match="another process has copied for more than 0 s"):
            stage(shared, tmp_path, wait_limit_s=0.0)


def test_missing_files_are_named(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.manifest\.json: does not exist"):
        stage(tmp_path / "none.beton", tmp_path / "cache")
    shutil.copy(manifest_path(shared), tmp_path)
    with pytest.raises(UserError, match=r"train\.beton: does not exist, though its manifest does"):
        stage(tmp_path / "train.beton", tmp_path / "cache")


def test_a_cache_open_to_others_is_refused_and_copies_are_this_users_alone(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(UserError, match=r"cache: may be written to by others; choose a folder of your own"):
        stage(shared, tmp_path / "cache")
    (tmp_path / "cache").chmod(0o1777)  # as /tmp: others cannot replace what is ours
    place = stage(shared, tmp_path / "cache").parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    place.chmod(0o755)  # as an earlier version left it
    stage(shared, tmp_path / "cache")
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(stage(shared, tmp_path / "new").parent.parent.stat().st_mode) == 0o700
    shutil.rmtree(place)
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link or a file"):
        stage(shared, tmp_path / "cache")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_planted_by_another_user_are_refused(shared: Path, tmp_path: Path) -> None:
    other_uid = 12345
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", other_uid, other_uid)
    with pytest.raises(UserError, match=r"cache: belongs to another user \(uid 12345\)"):
        stage(shared, tmp_path / "cache")
    os.chown(tmp_path / "cache", 0, 0)
    (tmp_path / "cache").chmod(0o1777)
    place = module.staged_path(shared, load_manifest(shared), tmp_path / "cache").parent
    place.mkdir()
    os.chown(place, other_uid, other_uid)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 12345\)"):
        stage(shared, tmp_path / "cache")


@pytest.mark.parametrize("name", ["train.beton", "train.beton.unfinished", "lock", "train.manifest.json"])
def test_a_link_in_the_cache_is_not_followed(shared: Path, tmp_path: Path, name: str) -> None:
    place = module.staged_path(shared, load_manifest(shared), tmp_path / "cache").parent
    place.mkdir(parents=True, mode=0o700)
    place.parent.chmod(0o700)
    target = tmp_path / "target"
    target.write_text("mine")
    (place / name).symlink_to(target)
    if name.startswith("train.") and not name.endswith(".unfinished"):
        stage(shared, tmp_path / "cache")
        assert not (place / name).is_symlink()
    else:
        with pytest.raises(Fault, match="is a symbolic link"):
            stage(shared, tmp_path / "cache")
    assert target.read_text() == "mine"


def test_a_digest_that_is_a_path_makes_no_folder(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared, tmp_path)
    text = manifest_path(shared).read_text().replace(load_manifest(shared).digest, f"x:{tmp_path}/y")
    (tmp_path / "train.manifest.json").write_text(text)
    with pytest.raises(UserError, match="is not a digest"):
        stage(tmp_path / "train.beton", tmp_path / "cache")
    assert folder_names(tmp_path) == ["train.beton", "train.manifest.json"]


def test_a_manifest_behind_a_url_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr("data_prep.beton.manifest.MAX_MANIFEST_BYTES", 1000)
    url = f"memory://{uuid.uuid4().hex}/train.beton"
    with fsspec.open(url.replace(".beton", ".manifest.json"), "wb") as file:
        file.write(b" " * 1001)
    with pytest.raises(UserError, match="cannot be read: has more than 1,000 bytes"):
        stage(url, tmp_path)
