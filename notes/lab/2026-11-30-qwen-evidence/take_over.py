"""Takes over scores from the results of an earlier run (the untrained base's, or LoRA-B's), if the rows are the same, so that they need not be measured again.

    python REPOSITORY/notes/lab/2026-11-30-qwen-evidence/take_over.py RESULTS.json [SIZES [STEP]]     # in the folder of the experiment, after --only datasets
"""

from __future__ import annotations

import sys
from pathlib import Path

from examples.paper.engine import Engine
from examples.paper.plan import load_experiment
from meteora_core.data.rows import read_rows
from meteora_core.files import sha256
from meteora_core.json_files import read_json, write_json
from meteora_core.model.base import BaseReference, load_tokenizer


def main() -> None:
    document = read_json(Path(sys.argv[1]))
    experiment = load_experiment(sys.argv[2] if len(sys.argv) > 2 else "qwen", raw_dir=Path("raw"), docs=Path("docs"))
    engine = Engine(experiment, "", lambda arguments, seconds: 1, print)
    step = experiment.step(sys.argv[3] if len(sys.argv) > 3 else "eval-base")
    [made] = engine.makes(step)
    limit = experiment.values["base_limit" if step.name == "eval-base" else "limit"]
    config, base = document["config"], experiment.values["base"]
    assert (config["model"], config["model_args"]["base"], config["limit"]) == (made.name, base, limit)
    tokenizer = load_tokenizer(BaseReference(base))
    for task, counted in document["meteora"]["counts"].items():
        tokens = sum(len(tokenizer(row.prompt)["input_ids"]) for row in read_rows(experiment.data, task, "test", config["limit"]))
        assert tokens == counted["prompt_tokens"], f"the rows of {task} are others"
    file = made / "results_earlier.json"
    write_json(file, document)
    began, ended = float(document["start_time"]), float(document["end_time"])
    record = {"step": step.name, "command": engine.command_line(step), "seconds": round(ended - began, 1), "parts": 1, "jobs": 1}
    record |= {"spans": [{"began": began, "ended": ended}], "settings": experiment.relevant_settings(step), "outputs": {str(file): sha256(file)}}
    write_json(engine.record_file(step), {**record, "data": {name: known for name, known in engine.data_hashes().items() if engine.uses(step, name)}})
    assert engine.is_done(step)


if __name__ == "__main__":
    main()
