"""Finding the folders of adapters."""

from __future__ import annotations

import pytest

from meteora_core import AdapterBank, attach
from meteora_core.adapters.folders import adapter_folders, check_bases
from meteora_core.errors import AdapterError
from support.adapter_files import DOWN, lora_tensors, write_adapter
from support.tiny_models import make_tiny_llama


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


def test_all_adapters_that_do_not_fit_are_named_at_once(tmp_path) -> None:
    """In the configuration, in the tensors' names, and in the base model."""
    good = write_adapter(tmp_path / "good")
    torn = write_adapter(tmp_path / "torn", text="{")
    kind = write_adapter(tmp_path / "kind", peft_type="IA3")
    pair = write_adapter(tmp_path / "pair", {key: tensor for key, tensor in lora_tensors().items() if "lora_B" not in key})
    folders = {folder.name: folder for folder in (good, torn, kind, pair)}
    for check in (lambda: check_bases(folders, "base"), lambda: AdapterBank.from_peft(folders)):
        with pytest.raises(AdapterError, match=r"^3 of 4 adapters cannot be used: .*torn.*; adapter 'kind' is a 'IA3' adapter.*; adapter 'pair'") as caught:
            check()
        assert "--task good;" in str(caught.value.hint)
    less = {key: tensor for key, tensor in lora_tensors().items() if DOWN not in key}
    bank = AdapterBank.from_peft({"good": good, "one": write_adapter(tmp_path / "one", less), "two": write_adapter(tmp_path / "two", less)})
    with pytest.raises(AdapterError, match=r"^2 of 3 adapters cannot be used: adapter 'one' has no weights for .*; adapter 'two' has no weights for"):
        attach(make_tiny_llama(), bank)
