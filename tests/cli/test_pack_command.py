"""``meteora ckpt pack`` and ``meteora ckpt card`` on a tiny model."""

from __future__ import annotations

import pytest

from meteora_core import AdapterBank, attach, save_checkpoint
from meteora_core.checkpoints.native import read_config
from meteora_core.errors import UsageError
from meteora_core.evaluation.card import write_card
from meteora_core.json_files import write_json, write_jsonl
from support.tiny_models import declare_trained, make_tiny_llama


@pytest.fixture
def source(tmp_path, make_adapter):
    """A checkpoint of gates over two adapters in folders."""
    folders = {name: make_adapter(name, seed) for seed, name in enumerate("ab")}
    model = declare_trained(attach(make_tiny_llama(), AdapterBank.from_peft(folders), seed=3))
    return save_checkpoint(model, tmp_path / "source", training={"steps": 3, "held_out": {"gate_accuracy": 0.5}})


def test_the_card_says_what_is_known(meteora, source, tmp_path) -> None:
    folder, data = tmp_path / "packed", tmp_path / "datasets"
    assert meteora("ckpt", "pack", source, folder, "--rank", "2", "--json").json["adapters"] == ["a", "b"]
    write_jsonl(data / "a" / "train.jsonl", [{"prompt": "p", "response": "r"}])
    files = {"train.jsonl": {"rows": 1, "bytes": 2, "sha256": "ab" * 32}}
    write_json(
        data / "a" / "manifest.json",
        {"task": "a", "metric": "exact", "source": {"kind": "local"}, "split_rule": "x", "seed": None, "files": files, "format": 1},
    )
    sha = read_config(folder)["weights_sha256"]
    write_json(
        tmp_path / "results_1.json",
        {
            "results": {"a": {"alias": "a", "acc,none": 0.75, "acc_stderr,none": 0.1}},
            "config": {"model_args": {"weights_sha256": sha}},
            "meteora": {"routing": {"a": {"own_top1": {"answer": 0.9}}}},
        },
    )
    assert meteora("ckpt", "card", folder, "--results", tmp_path / "results_1.json", "--data", data, "--licence", "a=CC0", "--title", "Mine").code == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("# Mine\n")
    assert "| a | local rows | CC0 | 1 (`abababababab`) | 2.0 |" in text
    assert "| a | acc | – | 0.750 ± 0.100 |" in text
    assert "a 90.0%" in text
    assert sha in text
    assert "50.0%" in text
    write_json(tmp_path / "results_1.json", {"results": {}, "config": {"model_args": {"weights_sha256": "other"}}})
    with pytest.raises(UsageError, match="another checkpoint"):
        write_card(folder, results=tmp_path / "results_1.json")
    assert meteora("ckpt", "card", folder, "--licence", "nonsense").code == 2
