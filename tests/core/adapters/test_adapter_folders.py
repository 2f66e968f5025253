"""Finding the folders of adapters."""

from __future__ import annotations

import pytest

from meteora_core.adapters.folders import adapter_folders
from meteora_core.errors import AdapterError
from support.adapter_files import write_adapter


def test_weights_without_a_configuration_are_not_left_out_in_silence(tmp_path) -> None:
    """Training over all adapters would otherwise lose one. A folder that holds something else is no adapter, and who names the adapters means only those."""
    write_adapter(tmp_path / "whole")
    (write_adapter(tmp_path / "broken") / "adapter_config.json").unlink()
    (tmp_path / "notes").mkdir()
    with pytest.raises(AdapterError, match=r"broken holds adapter_model\.safetensors, but no adapter_config\.json"):
        adapter_folders(tmp_path, [])
    assert list(adapter_folders(tmp_path, ["whole"])) == ["whole"]
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    assert list(adapter_folders(tmp_path, [])) == ["whole"]


def test_a_folder_of_several_adapters_is_not_left_out_in_silence(tmp_path) -> None:
    """A run's checkpoints are several adapters: which one is meant cannot be known. A trained adapter with checkpoints inside is that adapter."""
    write_adapter(tmp_path / "whole")
    write_adapter(tmp_path / "whole" / "checkpoint-100")
    write_adapter(tmp_path / "run" / "checkpoint-100")
    write_adapter(tmp_path / "run" / "checkpoint-200")
    with pytest.raises(AdapterError, match="run holds several adapters and is none itself: checkpoint-100, checkpoint-200") as caught:
        adapter_folders(tmp_path, [])
    assert "--task" in (caught.value.hint or "")
    assert list(adapter_folders(tmp_path, ["whole"])) == ["whole"]
