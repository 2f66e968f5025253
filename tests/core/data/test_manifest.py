"""Manifests of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data.manifest import FileEntry, Manifest, read_manifest, write_manifest
from meteora_core.errors import DataError

MANIFEST = Manifest("mine", "exact", {"kind": "local", "name": "own files"}, "rule", 42, {"test.jsonl": FileEntry(1, 2, "0" * 64)}, {"dropped": 0})


def changed(key: str, value: Any) -> str:
    content = json.loads(json.dumps(MANIFEST.to_json()))
    *parents, last = key.split("/")
    place = content
    for parent in parents:
        place = place[parent]
    place[last] = value
    return json.dumps(content)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    composite = Manifest(
        "c", "composite", {"kind": "composite", "members": [{"task": "a", "sha256": "1" * 64, "source": None}]}, "r", 47, {}, members=("a",), examples=((1, 2),)
    )
    for manifest in (MANIFEST, composite):
        write_manifest(tmp_path, manifest)
        assert read_manifest(tmp_path) == manifest


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(changed("later", 1))
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '"text"',
        "{}",
        changed("format", None),
        changed("format", "1"),
        changed("task", "../../x"),
        changed("task", None),
        changed("task", "all"),
        changed("files", {"../../secret": {"rows": 1, "bytes": 1, "sha256": "0" * 64}}),
        changed("files", []),
        changed("files/test.jsonl/rows", -1),
        changed("files/test.jsonl/rows", "1"),
        changed("files/test.jsonl/rows", True),
        changed("files/test.jsonl/rows", 10**30),
        changed("files/test.jsonl/sha256", "0"),
        changed("files/test.jsonl/sha256", "0" * 63 + "\\n"),
        changed("source", "x"),
        changed("source", {}),
        changed("source", {"kind": "composite", "members": [{"task": "../x", "sha256": "0" * 64}]}),
        changed("source", {"kind": "composite", "members": "abc"}),
        changed("members", "abc"),
        changed("members", ["../x"]),
        changed("examples", [["a"]]),
        changed("examples", 3),
        changed("max_train", 1.5),
        changed("max_new_tokens", 0),
        changed("seed", "x"),
        changed("duplicates", {"dropped": None}),
        changed("metric", None),
        changed("max_train", float("nan")),
    ],
)
def test_broken_manifests_are_named_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert "manifest.json" in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500
