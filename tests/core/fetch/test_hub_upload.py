"""Uploads to a hub on this machine, which refuses some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from meteora_core.errors import DownloadError, UsageError
from meteora_core.fetch.hub_upload import UploadOptions, upload
from support.hub_server import Hub, serving, use_hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's upload of a file by httpx

FILES: dict[str, Path | bytes] = {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n# Text\n"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        use_hub(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield server


def test_files_arrive_in_one_commit_of_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"w" * 100_000)
    done = upload("someone/mine", {**FILES, "a/w.safetensors": weights})
    assert (done.private, done.created, done.revision) == (True, True, hub.head("someone/mine"))
    assert hub.repositories["someone/mine"] == {**FILES, "a/w.safetensors": b"w" * 100_000}
    assert "someone/mine" in hub.private
    puts = [path for method, path, _ in hub.requests if method == "PUT"]
    again = upload("someone/mine", {"config.json": b"[]", "a/w.safetensors": weights}, UploadOptions(message="Second"))
    assert (again.created, again.private) == (False, True)
    assert again.revision != done.revision
    assert [path for method, path, _ in hub.requests if method == "PUT"] == puts
    assert hub.repositories["someone/mine"]["config.json"] == b"[]"


def test_a_public_repository_needs_the_word(hub: Hub) -> None:
    hub.repositories["someone/open"] = {}
    with pytest.raises(UsageError, match="someone/open is public"):
        upload("someone/open", FILES)
    assert hub.repositories["someone/open"] == {}
    assert not upload("someone/open", FILES, UploadOptions(public=True)).private
    assert not upload("someone/new", FILES, UploadOptions(public=True)).private
    assert "someone/new" not in hub.private


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("/commit/", 401, "does not accept the token"),
        ("/repos/create", 403, "may not write there"),
        ("/preupload/", 404, "no such user, organisation or repository"),
        ("/lfs/objects/batch", 429, "limits the number of requests"),
        ("/commit/", 503, "the hub answered 503"),
    ],
)
def test_refused_uploads_are_one_line_without_the_token(hub: Hub, tmp_path: Path, part: str, status: int, message: str) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"w" * 1000)
    hub.refusals[part] = [status] * 40
    with pytest.raises(DownloadError, match=message) as caught:
        upload("someone/mine", {**FILES, "w.safetensors": weights})
    assert "\n" not in caught.value.message
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"
    assert caught.value.hint


def test_a_busy_hub_is_asked_again(hub: Hub) -> None:
    hub.refusals["/commit/"] = [503, 503]
    assert upload("someone/mine", FILES).revision == hub.head("someone/mine")


def test_what_cannot_be_uploaded_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"may not write there \(status 403\)"):
        upload("stranger/model", FILES)
    for name in ("model", "a/b/c", "a b/c"):
        with pytest.raises(UsageError, match="is not a hub repository"):
            upload(name, FILES)
    with pytest.raises(UsageError, match="names a revision"):
        upload("someone/mine@main", FILES)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DownloadError, match="does not accept the token"):
        upload("someone/mine", FILES)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DownloadError, match="there is no token") as caught:
        upload("someone/mine", FILES)
    assert "hf auth login" in str(caught.value.hint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids requests"):
        upload("someone/mine", FILES)
    assert "someone/mine" not in hub.repositories
