"""Writes ``results/paper.md``, its pictures and the raw results in JSON from the results of the steps."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.paper.claims import averages, claims, goals, shown
from examples.paper.engine import Engine
from examples.paper.figures import composite, headlines, own_share, slim
from examples.paper.plan import Experiment, fill
from examples.paper.plots import draw_all
from examples.paper.routers import load_routers, routers_section
from meteora_core.checkpoints.native import CONFIG_FILE
from meteora_core.errors import MeteoraError
from meteora_core.evaluation.results import load_results
from meteora_core.files import atomic_write
from meteora_core.json_files import read_json, write_json

PAGE = "paper.md"


def write_report(engine: Engine) -> Path:
    """Write the page, pictures and raw results into the experiment's ``docs`` folder; the page names steps that were not run.

    Raises:
        MeteoraError: No evaluation is finished, or matplotlib is not installed; the hint is the command that helps.
    """
    documents = load_documents(engine)
    if not documents:
        raise MeteoraError("no evaluation is done yet, so there is nothing to report", hint=engine.call)
    titles, folder = engine.experiment.titles, engine.experiment.docs
    gates = {role: held_out_of(engine, document) for role, document in documents.items()}
    routed: list[str] = [role for role in ("meteora", "extension", "starter") if role in documents]
    heat_maps = {role: path for role in routed if (path := heat_map(engine, role)) is not None}
    pictures = draw_all(documents, titles, heat_maps, folder)
    for role, document in documents.items():
        write_json(folder / f"{role}.json", slim(document))
    write_json(folder / "gates.json", {role: held_out for role, held_out in gates.items() if held_out})
    page = folder / PAGE
    text = "\n\n".join(sections(engine, documents, gates, {name: path.name for name, path in pictures.items()})) + "\n"
    with atomic_write(page) as handle:
        handle.write(text)
    return page


def load_documents(engine: Engine) -> dict[str, dict[str, Any]]:
    """The results of finished steps, by role; each is checked by :meth:`Engine.is_done`."""
    made: dict[str, dict[str, Any]] = {}
    for role, place in engine.experiment.roles.items():
        folder = engine.experiment.work / "eval" / place
        step = next((each for each in engine.experiment.steps if folder in engine.makes(each)), None)
        if step is None or not engine.is_done(step):
            continue
        outputs = read_json(engine.record_file(step))["outputs"]
        made[role] = load_results(next(Path(path) for path in outputs if Path(path).name.startswith("results_")))
    return made


def held_out_of(engine: Engine, document: Mapping[str, Any]) -> dict[str, float]:
    """Measurements on held-out train rows from the training of the document's gates; empty for other models."""
    checkpoint = document.get("config", {}).get("checkpoint")
    file = Path(checkpoint) / CONFIG_FILE if checkpoint else None
    return dict(read_json(file).get("training", {}).get("held_out", {})) if file is not None and file.is_file() else {}


def heat_map(engine: Engine, role: str) -> Path | None:
    """The newest picture that `meteora eval --routing` drew of a role."""
    found = sorted((engine.experiment.work / "eval" / engine.experiment.roles[role]).glob("routing_*.png"))
    return found[-1] if found else None


def sections(engine: Engine, documents: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]], pictures: Mapping[str, str]) -> list[str]:
    """The sections of the page."""
    experiment, titles = engine.experiment, engine.experiment.titles
    first = next(iter(documents.values()))
    config = first["config"]
    missing = [titles[role] for role in experiment.roles if role not in documents]
    intro = (
        f"# The paper's experiment\n\nThe experiment of the MeteoRA paper on `{config['model_args']['base']}`,"
        f" with at most {experiment.values['limit']} test rows for each task."
        f" Every figure was made by the `meteora` commands at the end of this page. The page is written by [examples/paper]({readme_from(experiment.docs)})"
        " from the raw results in the same folder."
    )
    date = time.strftime("%Y-%m-%d", time.gmtime(max(document["date"] for document in documents.values())))
    method = [
        f"- Sizes `{experiment.name}`, {config['dtype']} on {config['device']}, on {date}.",
        f"- Test rows were held out from all training. Decoding is greedy, scoring is `{config['scoring']}`.",
        "- ± is one standard error. Errors of two models on the same rows are taken as independent, which overstates the error of their difference.",
        "- The figure of a single task is its accuracy, or BLEU / 100 or ROUGE-L where it has no accuracy.",
        f"- Seeds: gates {experiment.settings.get('train_gates', {}).get('seed', 42)}"
        + (f" and {experiment.values['second_seed']}" if "seed2" in documents else "")
        + f"; adapters {experiment.settings.get('train_adapters', {}).get('seed', 42)}.",
        "- Versions: " + ", ".join(f"{name} {value}" for name, value in config["versions"].items()) + ".",
        *(f"- {fill(note, engine.values(), 'notes')}" for note in experiment.notes),
    ]
    if missing:
        method.append(f"- Not run: {'; '.join(missing)}.")
    made = [intro, "## Overview\n\n" + overview(documents, titles), "## The paper's claims\n\n" + claims_table(documents, trained_rows(experiment))]
    singles = singles_table(documents, titles)
    if singles:
        made.append("## Single tasks\n\n" + singles + picture(pictures, "singles", "Single tasks"))
    counted = composites_table(documents, titles)
    if counted:
        made.append("## Composites: sub-tasks attempted and correct per prompt\n\n" + counted + picture(pictures, "composites", "Composites"))
    made.append("## Routing\n\n" + routing_table(documents, gates, titles) + picture(pictures, "depth", "Gate accuracy by layer"))
    for role in ("meteora", "extension"):
        if f"heat_map_{role}" in pictures:
            made.append(f"### {titles[role]}: tasks by adapters" + picture(pictures, f"heat_map_{role}", f"Which adapters {titles[role]} chose"))
    if routed := routers_section(load_routers(engine), experiment.docs):
        made.append("## Routers\n\n" + routed)
    made.append("## Goals\n\n" + goals_table(documents, gates.get("meteora", {})))
    made.append("## How the figures were made\n\n" + "\n".join(method))
    made.append("## Commands\n\n" + commands(engine))
    return made


def readme_from(folder: Path) -> str:
    """The relative path from the folder of the report to the README.md of this example, or its path in the repository for a folder elsewhere."""
    readme = Path(__file__).parent / "README.md"
    inside = folder.resolve().is_relative_to(readme.parents[2])
    return Path(os.path.relpath(readme, folder.resolve())).as_posix() if inside else "examples/paper/README.md"


def picture(pictures: Mapping[str, str], name: str, caption: str) -> str:
    """A picture as Markdown, on lines of its own."""
    return f"\n\n![{caption}]({pictures[name]})" if name in pictures else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are text."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * left + " ---: |" * (len(header) - left)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def overview(documents: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """One line per model: the average over the tasks that it shares with the base, and composites."""
    names = sorted({task for document in documents.values() for task in composite(document)}, key=lambda name: int(name.rpartition("_")[2]))
    rows = []
    for role, document in documents.items():
        figures = headlines(document)
        reference = "base" if "base" in documents else role
        (mine, *_), count = averages(documents, role, reference) if figures else ([None], 0)
        counts = composite(document)
        cells = [f"{shown(counts[task]['attempted'], 2)} / {shown(counts[task]['correct'], 2)}" if task in counts else "–" for task in names]
        rows.append([titles[role], f"{shown(mine)} ({count})" if mine is not None else "–", *cells])
    return table(["model", "average of single tasks (how many)", *(f"{task}: attempted / correct" for task in names)], rows)


def trained_rows(experiment: Experiment) -> str:
    """The rows that were trained on where there are no composite rows."""
    if any(experiment.settings.get(section, {}).get("list_rows") for section in ("train_adapters", "train_gates")):
        return "trained on single tasks only, some rows with several questions of the task, which is our extension"
    return "trained on single tasks only, as in the paper"


def claims_table(documents: Mapping[str, Any], rows_trained: str) -> str:
    """The claims, our figures, the verdicts and their rules."""
    listed = claims(documents, rows_trained)
    rows = [[f"{claim.text}", "<br>".join(claim.figures) or "–", f"**{claim.verdict}**"] for claim in listed]
    rules = [f"- {claim.text}: {claim.rule}." for claim in listed if not claim.text.startswith("The same")]
    return table(["claim", "here", "verdict"], rows, left=3) + "\n\nVerdicts are computed:\n\n" + "\n".join(rules)


def goals_table(documents: Mapping[str, Any], held_out: Mapping[str, float]) -> str:
    """The goals and whether they were reached."""
    words = {True: "yes", False: "no", None: "not run"}
    return table(["goal", "here", "reached"], [[goal, value, words[reached]] for goal, value, reached in goals(documents, held_out)], left=3)


def singles_table(documents: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The table of single tasks, with a column for each model."""
    figures = {role: found for role, document in documents.items() if (found := headlines(document))}
    tasks = list(dict.fromkeys(task for found in figures.values() for task in found))
    rows = []
    for task in tasks:
        best = max(found[task].value for found in figures.values() if task in found)
        cells = []
        for found in figures.values():
            text = shown(found[task], 2) if task in found else "–"
            cells.append(f"**{text}**" if task in found and found[task].value == best > 0 else text)
        sizes = {document["n-samples"][task]["effective"] for document in documents.values() if task in document["n-samples"]}
        rows.append([task, "–".join(str(size) for size in sorted(sizes)), *cells])
    return table(["task", "rows", *(titles[role] for role in figures)], rows) if rows else ""


def composites_table(documents: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The table of composites, with a row for each model."""
    rows = []
    for role, document in documents.items():
        for task, counts in composite(document).items():
            skipped = document["meteora"]["counts"][task].get("skipped_prompts", 0)
            size = f"{document['n-samples'][task]['effective']}" + (f" ({skipped} too long)" if skipped else "")
            heat = document["configs"][task].get("temperature")
            rows.append([task, titles[role], "–" if heat is None else f"{heat:g}", size, shown(counts["attempted"], 2), shown(counts["correct"], 2)])
    rows.sort(key=lambda row: int(row[0].rpartition("_")[2]))
    return table(["composite", "model", "T", "rows", "attempted", "correct"], rows, left=2) if rows else ""


def routing_table(documents: Mapping[str, Any], gates: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    """Share of tokens per task whose likeliest adapter is the task's own."""
    held = {role: values for role, values in gates.items() if values and role in documents}
    counted = {role: documents[role] for role in documents if documents[role].get("meteora", {}).get("routing")}
    lines = ["Share of answer tokens whose top-1 adapter is the task's own, all decoder layers but the first.", ""]
    overall = [[titles[role], f"{values['gate_accuracy']:.1%}"] for role, values in held.items() if "gate_accuracy" in values]
    if overall:
        lines += [table(["gates", "held-out train rows, all tasks"], overall), ""]
    tasks = list(dict.fromkeys(task for document in counted.values() for task in headlines(document)))
    rows = [[task, *(f"{share:.1%}" if (share := own_share(document, task)) is not None else "–" for document in counted.values())] for task in tasks]
    if rows:
        lines.append(table(["task, test rows", *(titles[role] for role in counted)], rows))
    return "\n".join(lines)


def commands(engine: Engine) -> str:
    """The commands in order, with their times."""
    files = [engine.record_file(step) for step in engine.experiment.steps]
    records = [record for file in files if file.is_file() and "command" in (record := read_json(file))]
    rows = []
    for record in records:
        parts = f", in {record['parts']} parts" if record["parts"] > 1 else ""
        rows.append(f"{record['command']}  # {record['seconds']:.0f} s{parts}")
    text = "```bash\n" + "\n".join(rows) + f"\n```\n\nIn all {sum(record['seconds'] for record in records) / 60:.1f} minutes."
    jobs = max((record.get("jobs", 1) for record in records), default=1)
    if jobs > 1:
        gpus = max((record.get("gpus", 1) for record in records), default=1)
        text += f" Up to {jobs} commands ran side by side{f' on {gpus} GPUs' if gpus > 1 else ''}, so these seconds are not what each takes alone"
        clock = clock_seconds(records)
        text += "." if clock is None else f"; by the clock it was {clock / 60:.1f} minutes, the pauses between calls left out."
    return text


def clock_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The time during which at least one command ran; None if a record lacks the times of a part."""
    if any(len(record.get("spans", ())) != record["parts"] for record in records):
        return None
    total, reached = 0.0, float("-inf")
    for began, ended in sorted((span["began"], span["ended"]) for record in records for span in record["spans"]):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
