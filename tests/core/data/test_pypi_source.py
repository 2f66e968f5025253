"""Reading of BIG-bench's source distribution as a stream: the unpacked files, and the refused archives."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from meteora_core import archives
from meteora_core.data import pypi_source
from meteora_core.data.build import build_task
from meteora_core.data.sources import extract
from meteora_core.data.tasks import TASKS
from meteora_core.errors import DataError
from meteora_core.files import sha256

ROOT = "bigbench-1.0.0"


def make_archive(path: Path, repository: Path, *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(repository / "bigbench", f"{ROOT}/bigbench")
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


def test_unpack_only_what_is_wanted(tmp_path: Path, repository: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", repository, member(f"{ROOT}/bigbench/benchmark_tasks/strategyqa/README.md"))
    found = pypi_source.unpack(archive, ["strategyqa", "logical_deduction", "winowhy"], tmp_path / "out")
    assert found == ["logical_deduction", "strategyqa"]
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == [
        "logical_deduction/five_objects/task.json",
        "logical_deduction/task.json",
        "logical_deduction/three_objects/task.json",
        "strategyqa/task.json",
    ]
    assert not list((tmp_path / "out").glob(".unpack*"))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (member("/etc/passwd"), "an absolute path"),
        (member(f"{ROOT}/../../x"), r"a path with '\.\.'"),
        (member("C:/x"), "an absolute path"),
        (member(f"{ROOT}/x", tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (member(f"{ROOT}/x", tarfile.LNKTYPE, f"{ROOT}/setup.py"), "a link"),
        (member(f"{ROOT}/x", tarfile.FIFOTYPE), "neither a file nor a folder"),
    ],
)
def test_unsafe_archives_are_refused(tmp_path: Path, repository: Path, bad: tarfile.TarInfo, reason: str) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", repository, bad)
    with pytest.raises(DataError, match=reason) as caught:
        pypi_source.unpack(archive, ["strategyqa"], tmp_path / "out")
    assert "nothing was extracted" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_huge_member_is_refused(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER", 100)
    with pytest.raises(DataError, match="claims to have"):
        pypi_source.unpack(make_archive(tmp_path / "a.tar.gz", repository), ["strategyqa"], tmp_path / "out")


def test_broken_archives(tmp_path: Path, repository: Path) -> None:
    archive = make_archive(tmp_path / "a.tar.gz", repository)
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a tar", whole[:100] + b"\0" * 50 + whole[150:]):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"not a complete tar\.gz"):
            pypi_source.unpack(archive, ["strategyqa"], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_build_through_the_cache(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_archive(tmp_path / pypi_source.SDIST, repository)
    monkeypatch.setattr(pypi_source, "SDIST_SHA256", sha256(archive))
    fetched = []

    def fetch(progress: object) -> Path:
        fetched.append(archive)
        return archive

    monkeypatch.setattr(pypi_source, "fetch_sdist", fetch)
    manifest = build_task("strategyqa", tmp_path / "data", source="pypi")
    assert manifest.source["kind"] == "pypi"
    assert manifest.rows == {"train": 80, "test": 20}
    build_task("question_selection", tmp_path / "data")
    assert len(fetched) == 1, "all tasks of the table are unpacked in one pass"
    with pytest.raises(DataError, match="has no task 'winowhy'"):
        build_task("winowhy", tmp_path / "data", source="pypi")


def test_cached_archive_needs_no_index(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meteora_core.fetch.download import downloads_dir

    downloads_dir().mkdir(parents=True)
    archive = make_archive(downloads_dir() / pypi_source.SDIST, repository)
    monkeypatch.setattr(pypi_source, "SDIST_SHA256", sha256(archive))
    monkeypatch.setattr(pypi_source, "find_pypi_file", None)
    assert pypi_source.fetch_sdist() == archive


def test_archive_as_the_local_source(tmp_path: Path, repository: Path) -> None:
    archive = make_archive(tmp_path / "mine.tar.gz", repository)
    raw = extract(TASKS["question_selection"], "local", archive)
    assert raw.origin["name"] == "mine.tar.gz"
    assert raw.counts == {"train": 88, "test": 22}
    with pytest.raises(DataError, match="not a BIG-bench task"):
        extract(TASKS["gsm8k"], "local", archive)
    with pytest.raises(DataError, match="has no task"):
        extract(TASKS["winowhy"], "local", archive)
