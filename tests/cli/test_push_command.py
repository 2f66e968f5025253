"""`meteora ckpt push --dry-run` shows the files and the model card of an upload, without a request."""

from __future__ import annotations

import json
from pathlib import Path

from meteora_core.starter import starter_checkpoint


def test_a_dry_run_prints_the_files_and_the_card_line_by_line(meteora) -> None:
    checkpoint = starter_checkpoint()
    assert checkpoint is not None
    ran = meteora("ckpt", "push", checkpoint, "someone/starter", "--dry-run")
    assert ran.code == 0
    lines = ran.out.splitlines()
    begin = lines.index("---")
    assert lines[begin + 1] == "library_name: meteora"
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in lines
    assert "\\n" not in ran.out
    assert any("meteora.safetensors" in line for line in lines[:begin])
    assert lines[-1].startswith("dry run: nothing was uploaded. someone/starter would hold 3 files")


def test_json_lists_the_sizes_of_the_files(meteora) -> None:
    checkpoint = starter_checkpoint()
    assert checkpoint is not None
    ran = meteora("ckpt", "push", checkpoint, "someone/starter", "--dry-run", "--json")
    found = json.loads(ran.out)
    assert found["commit"] is None
    assert found["files"]["meteora.safetensors"] == (Path(checkpoint) / "meteora.safetensors").stat().st_size
