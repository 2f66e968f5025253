"""The judge of the campaigns finds what it is there to find, and the reference agrees with PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from . import reference
from .campaign import judge
from .cases import Case, finite_numbers
from .forks import Outcome
from .mutate import Raw, dumps
from .world import write_adapter

FINE = {"work": "d", "work/a": "1"}


def said(err: str, code: int = 1, out: bytes = b"") -> Outcome:
    return Outcome(code, out, err.encode(), False, 0.1)


@pytest.mark.parametrize(
    ("case", "outcome", "after", "fault"),
    [
        (Case("", []), said("error: no\nhint: do this\n"), FINE, None),
        (Case("", []), said("Usage: meteora eval [OPTIONS]\nbad\n", 2), FINE, None),
        (Case("", []), said("Traceback (most recent call last)\nKeyError: 'x'\n"), FINE, "traceback"),
        (Case("", []), said("something\n"), FINE, "error line"),
        (Case("", []), said("error: one\nerror: two\n"), FINE, "error line"),
        (Case("", []), said("error: one\nmore\n"), FINE, "error line"),
        (Case("", []), said("", -9), FINE, "killed"),
        (Case("", []), said("", 3), FINE, "exit code"),
        (Case("", []), Outcome(-9, b"", b"", True, 21.0), FINE, "hang"),
        (Case("", []), said("error: \x1b]0;x\n"), FINE, "raw control character"),
        (Case("", [], terminal=True), said("\x1b[2mfine\x1b[0m\r\n", 0), FINE, None),
        (Case("", [], terminal=True), said("\x1b]8;;http://x\n", 0), FINE, "raw control character"),
        (Case("", []), said("error: http://user:hunter2@x\n"), FINE, "password"),
        (Case("", [], expect="fail"), said("", 0), FINE, "accepted"),
        (Case("", [], expect="pass"), said("error: no\n"), FINE, "refused"),
        (Case("", ["--json"]), said("", 0, b"{}\n{}"), FINE, "json"),
        (Case("", ["--json"]), said("", 0, b'{"a": NaN}'), FINE, "json"),
        (Case("", ["--json"]), said("error: no\n", 1, b"{}"), FINE, "stdout"),
        (Case("", [], check=lambda outcome: "other rows"), said("", 0), FINE, "wrong"),
        (Case("", [], check=lambda outcome: 1 / 0), said("", 0), FINE, "wrong"),  # type: ignore[arg-type, return-value]
        (Case("", []), said("", 0), {**FINE, "outside": "2"}, "written elsewhere"),
        (Case("", []), said("", 0), {"work": "d"}, "written elsewhere"),
        (Case("", [], writes=("b",)), said("", 0), {**FINE, "work/b": "d", "work/b/c": "1"}, None),
        (Case("", [], writes=("b",)), said("error: no\n"), {**FINE, "work/b": "d", "work/b/c": "1"}, "half done"),
        (Case("", [], writes=("b",)), said("", 0), {**FINE, "work/.b.x1.tmp": "d"}, "left behind"),
        (Case("", []), said("", 0), {**FINE, "work/tmp/x": "1"}, "left behind"),
    ],
)
def test_judge(case: Case, outcome: Outcome, after: dict[str, str], fault: str | None) -> None:
    found = judge(case, outcome, FINE, after)
    assert [each.partition(":")[0] for each in found] == ([fault] if fault else [])


def test_documents_may_hold_what_json_has_no_word_for() -> None:
    assert dumps({"a": Raw("NaN"), "b": [Raw("1e400"), "x"]}) == '{\n "a": NaN,\n "b": [\n  1e400,\n  "x"\n ]\n}'
    assert not finite_numbers({"a": [1.0, json.loads("1e400")]})


def test_the_reference_is_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken for right answers of an adapter is what PEFT computes."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    from support.tiny_models import make_tiny_llama

    from .world import SIZES

    monkeypatch.chdir(tmp_path)
    make_tiny_llama(initializer_range=0.3, **SIZES).save_pretrained("base")
    write_adapter(Path("a"), 0, 4)
    file = Path("a/adapter_config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_rslora": True, "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5.5}}))
    ids = reference.encode("say 7")
    written, whole = reference.answer(Path("base"), reference.one_adapter(reference.read_adapter(Path("a"))), ids, 6)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base", dtype=torch.float64), "a", autocast_adapter_dtype=False)
    with torch.no_grad():
        for number in range(len(written)):
            logits = model(input_ids=torch.tensor([[*ids, *written[:number]]])).logits[0, -1]
            assert int(logits.argmax()) == written[number]
    assert whole
    file.write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(reference.Invalid):
        reference.read_adapter(Path("a"))
