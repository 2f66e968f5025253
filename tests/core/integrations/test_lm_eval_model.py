"""MeteoRA in lm-evaluation-harness: loading, and a run of the harness on a local task if it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from meteora_core import load_checkpoint
from meteora_core.checkpoints.convert import ConvertOptions, convert_authors
from meteora_core.checkpoints.opening import OpeningOptions, open_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.exports.peft_adapter import export_adapter
from meteora_core.integrations import lm_eval as integration
from support.authors_files import Authors, write_authors

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(92))]
TASK = """
task: meteora_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@pytest.fixture
def authors(tmp_path: Path) -> Authors:
    made = write_authors(tmp_path, count=4)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>").save_pretrained(made.base)
    return made


def test_both_layouts_open_as_the_same_model(authors: Authors, tmp_path: Path) -> None:
    native = tmp_path / "native"
    convert_authors(authors.checkpoint, native, str(authors.base), adapter_dir=authors.adapters, options=ConvertOptions(1, 15))
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    opened, reference = open_checkpoint(native, OpeningOptions(device="cpu"))
    assert (reference.name, opened.meteora.top_k, opened.meteora.temperature) == (str(authors.base), 1, 15.0)
    options = OpeningOptions(base=str(authors.base), adapters_dir=authors.adapters, top_k=1, routing_temperature=15, device="cpu")
    foreign, _ = open_checkpoint(authors.checkpoint, options)
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, foreign(**batch).logits)
    with pytest.raises(UsageError, match="does not name its base model"):
        open_checkpoint(authors.checkpoint)
    with pytest.raises(CheckpointError, match="is neither a native checkpoint"):
        open_checkpoint(authors.base)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere")


def test_the_harness_arguments_reach_the_model(authors: Authors) -> None:
    options = OpeningOptions(str(authors.base), device="cpu")
    asked = replace(options, adapters_dir=str(authors.adapters), top_k=3, routing_temperature=20, dtype="bfloat16", backend="reference")
    model, tokenizer = integration.load_for_harness(str(authors.file), asked)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.meteora.top_k, model.meteora.temperature, model.meteora.backend, model.dtype) == (3, 20.0, "reference", torch.bfloat16)
    assert tokenizer("w3 w4")["input_ids"] == [7, 8]
    with pytest.raises(UsageError, match="top_k is 9"):
        integration.load_for_harness(str(authors.file), replace(options, top_k=9))


def expected_accuracy(native: Path, rows: list[dict[str, object]]) -> float:
    """The share of rows whose labelled choice has the highest log-likelihood, computed with one forward pass per choice."""
    model = load_checkpoint(native, device="cpu")
    hits = []
    for row in rows:
        scores = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            ids = [WORDS.index(word) for word in f"{row['text']} {choice}".split()]
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[ids[-1]].item())
        hits.append(scores.index(max(scores)) == row["label"])
    return sum(hits) / len(hits)


@pytest.mark.slow
def test_the_harness_scores_a_local_task_or_says_what_to_install(authors: Authors, tmp_path: Path) -> None:
    native = tmp_path / "native"
    convert_authors(authors.checkpoint, native, str(authors.base), adapter_dir=authors.adapters)
    task = tmp_path / "tasks"
    task.mkdir()
    rows = [{"text": f"w{i} w{i + 1} w{2 * i}", "choices": [f"w{i}", f"w{i + 30}", f"w{90 - i}"], "label": i % 3} for i in range(12)]
    (task / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "meteora_words.yaml").write_text(TASK.format(file=task / "rows.jsonl"))
    line = [sys.executable, "-m", "meteora_core.integrations.lm_eval", "--model", "meteora", "--device", "cpu", "--batch_size", "5"]
    line += [
        "--model_args",
        f"checkpoint={native},dtype=float32",
        "--tasks",
        "meteora_words",
        "--include_path",
        str(task),
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=900, check=False)
    if find_spec("lm_eval") is None:
        assert ran.returncode == 1
        assert ran.stderr.splitlines()[-2:] == ["error: lm-evaluation-harness is not installed", "hint: pip install 'meteora-lora[lm-eval]'"]
        with pytest.raises(UsageError, match="is not installed"):
            integration.model_class()
        return
    assert ran.returncode == 0, ran.stderr
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert results["results"]["meteora_words"]["acc,none"] == pytest.approx(expected_accuracy(native, rows))
    assert results["config"]["meteora_adapters"] == list(authors.names)
    assert (results["config"]["meteora_top_k"], results["config"]["meteora_T"]) == (2, 1.0)


BOTH = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
import meteora_core.integrations.lm_eval
native, base, peft, name, tasks = sys.argv[1:]
models = {"hf": {"pretrained": base, "peft": peft}, "meteora": {"checkpoint": native, "adapter": name}, "gates": {"checkpoint": native}}
found = {}
for label, arguments in models.items():
    kind = "hf" if label == "hf" else "meteora"
    done = simple_evaluate(kind, model_args={**arguments, "dtype": "float32"}, tasks=["meteora_words"], device="cpu", batch_size=4,
                           task_manager=TaskManager(include_path=tasks), log_samples=True)
    samples = sorted(done["samples"]["meteora_words"], key=lambda sample: sample["doc_id"])
    found[label] = [done["results"]["meteora_words"]["acc,none"], [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_forced_adapter_scores_as_the_harness_does_with_peft(authors: Authors, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    native, tasks, name = tmp_path / "native", tmp_path / "tasks", authors.names[1]
    convert_authors(authors.checkpoint, native, str(authors.base), adapter_dir=authors.adapters)
    export_adapter(native, tmp_path / "exported", name)
    tasks.mkdir()
    rows = [{"text": f"w{i} w{i + 1} w{2 * i}", "choices": [f"w{i}", f"w{i + 30}", f"w{90 - i}"], "label": i % 3} for i in range(12)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "meteora_words.yaml").write_text(TASK.format(file=tasks / "rows.jsonl"))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", BOTH, str(native), str(authors.base), str(tmp_path / "exported"), name, str(tasks)]
    ran = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    (accuracy, wanted), (own_accuracy, own), (_, gates) = found["hf"], found["meteora"], found["gates"]
    assert own_accuracy == accuracy
    torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (torch.tensor(gates) - torch.tensor(own)).abs().max() > 1e-2
