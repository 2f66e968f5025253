"""The comparison of routers in the report: average scores and shares of the oracle's, with every adapter present and with the asked task's removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.paper.claims import shown
from examples.paper.engine import Engine
from examples.paper.figures import average, headlines
from meteora_core.errors import DataError
from meteora_core.evaluation.oracle_shares import ORACLE, OracleShare, interval, oracle_shares, plot_shares, shares_document
from meteora_core.evaluation.report import model_name
from meteora_core.evaluation.results import load_results
from meteora_core.evaluation.router_names import ROUTERS, WITHOUT_ASKED, RouterName
from meteora_core.json_files import read_json, write_json

STAGE = "routers"
PICTURE = "routers.png"


def load_routers(engine: Engine) -> list[dict[str, Any]]:
    """The results of the finished steps of the stage, in the order of :data:`meteora_core.evaluation.router_names.ROUTERS`."""
    found = []
    for step in engine.experiment.steps:
        if step.stage == STAGE and engine.is_done(step):
            outputs = read_json(engine.record_file(step))["outputs"]
            found += [load_results(Path(path)) for path in outputs if Path(path).name.startswith("results_")]
    return sorted(found, key=lambda document: list(ROUTERS).index(RouterName.parse(model_name(document)).name))


def routers_section(documents: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The table of routers, or an empty text without results of the oracle and of another router; writes ``routers.json`` and a picture to ``folder``.

    Args:
        documents: Results documents of routers, one or several (of different seeds) for each name.
        folder: The folder of the report.
    """
    names = [str(RouterName.parse(model_name(document)).without_seed) for document in documents]
    if ORACLE not in names or len(set(names)) < 2:
        return ""
    try:
        shares = {share.model: share for share in oracle_shares(documents)}
    except DataError:  # the oracle has a score of 0 in every task
        shares = {}
    scores: dict[str, list[Mapping[str, Any]]] = {}
    for name, document in zip(names, documents, strict=True):
        scores.setdefault(name, []).append(document)
    common = [task for task in headlines(documents[0]) if all(task in headlines(document) for document in documents)]
    averages = {name: average(headlines(each)[task] for each in found for task in common) for name, found in scores.items()}
    write_json(
        folder / "routers.json",
        shares_document(list(shares.values()), ORACLE)
        | {"averages": {name: {"score": figure.value, "stderr": figure.stderr, "tasks": len(common)} for name, figure in averages.items()}},
    )
    if shares:
        plot_shares(list(shares.values()), ORACLE, folder / PICTURE)
    rows = []
    for name, description in ROUTERS.items():
        present, removed = f"router:{name}", f"router:{name}:{WITHOUT_ASKED}"
        if present in scores or removed in scores:
            cells = [text for model in (present, removed) for text in (_score(averages, model), _share(shares, model))]
            rows.append(f"| {name}: {description} | " + " | ".join(cells) + " |")
    size = max(document["n-samples"][task]["effective"] for document in documents for task in common)
    return "\n".join(
        [
            f"Average of {len(common)} single tasks with at most {size} rows each, and the mean over tasks of the score as a share of the oracle's, with its"
            " 95 % interval. Every router chooses among the same adapters.",
            "",
            "| router | average | share of the oracle | asked adapter removed: average | share of the oracle |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            *(["", f"![Scores of routers as a share of the oracle's]({PICTURE})"] if shares else []),
        ]
    )


def _score(averages: Mapping[str, Any], model: str) -> str:
    return shown(averages[model]) if model in averages else "–"


def _share(shares: Mapping[str, OracleShare], model: str) -> str:
    return f"{shares[model].share:.1%} ({interval(shares[model])})" if model in shares else "–"
