"""The paper's four claims, each with measured figures and a verdict by a stated rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from examples.paper.figures import Figure, average, composite, headlines

EQUAL = 0.97
"""Share of the individual adapters' average from which MeteoRA counts as equal to them."""

NEARLY = 0.95
"""Target for gates in closed form without a training step: a share of the individual adapters' average."""

Documents = Mapping[str, Mapping[str, Any]]
"""Results documents by role."""


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: The claim.
        figures: The measured figures, one per line.
        verdict: "holds", "partly", "undecided", "fails" or "not run".
        rule: The rule that determines the verdict.
    """

    text: str
    figures: tuple[str, ...]
    verdict: str
    rule: str


def claims(documents: Documents, rows: str = "trained on single tasks only, as in the paper") -> list[Claim]:
    """All claims. The verdict is "not run" if results are missing.

    Two figures count as different if their difference exceeds two of its standard errors.

    Args:
        documents: Results documents by role.
        rows: The rows that were trained on where there are no composite rows.
    """
    return [
        equal_to_adapters(documents),
        equal_to_adapters(documents, "closed", "The same with gates in closed form, without a training step (our extension, not the paper's)", NEARLY),
        equal_to_adapters(documents, "joint", "The same with the adapters trained along with the gates (our extension, not the paper's)"),
        beats_balanced(documents, "meteora", f"On composites MeteoRA beats LoRA-B in attempted and correct ({rows})"),
        beats_balanced(documents, "extension", "The same with composite training rows (our extension, not the paper's)"),
        beats_balanced(documents, "extension_fixed", "The same with composite training rows for the gates alone (our extension, not the paper's)"),
        beats_balanced(documents, "joined", "The same with joined rows for the gates alone, and no composite rows (our extension, not the paper's)"),
        large_temperature(documents, "", "A large T helps composites (trained without composite rows)"),
        large_temperature(documents, "extension", "The same with composite training rows"),
        top_two(documents),
    ]


def common(documents: Documents, *roles: str) -> list[str]:
    """The single tasks for which every role has a headline figure."""
    found = [headlines(documents[role]) for role in roles]
    return [task for task in found[0] if all(task in each for each in found)]


def averages(documents: Documents, *roles: str) -> tuple[list[Figure], int]:
    """Each role's average over their common single tasks, and the number of these tasks."""
    tasks = common(documents, *roles)
    return [average(headlines(documents[role])[task] for task in tasks) for role in roles] if tasks else [], len(tasks)


def equal_to_adapters(
    documents: Documents,
    role: str = "meteora",
    text: str = "MeteoRA's average over single tasks equals that of the individual adapters",
    share: float = EQUAL,
) -> Claim:
    """Claim 1 for the model with this role, which counts as equal from a share of the adapters' average."""
    rule = f"holds from {share:.0%} of the adapters' average on; below, fails where the gap to {share:.0%} is more than two standard errors, else undecided"
    if not {role, "own"} <= documents.keys() or not common(documents, role, "own"):
        return Claim(text, (), "not run", rule)
    (ours, own), count = averages(documents, role, "own")
    gap = own.times(share) - ours
    verdict = "undecided" if not own.value else "holds" if gap.value <= 0 else "fails" if gap.sign > 0 else "undecided"
    of_it = f", {ours.value / own.value:.1%} of it" if own.value else ""
    return Claim(text, (f"{shown(ours)} against {shown(own)} over {count} tasks{of_it}",), verdict, rule)


def with_composites(documents: Documents, role: str) -> tuple[dict[str, dict[str, Figure]], str]:
    """A role's counts on composites, and T if it is not the paper's. If the evaluation at the paper's T was not run, the counts are those at T = 1."""
    counted = composite(documents[role]) if role in documents else {}
    at_one = composite(documents[f"{role}_T1"]) if not counted and f"{role}_T1" in documents else {}
    return (at_one, " (T = 1)") if at_one else (counted, "")


def beats_balanced(documents: Documents, role: str, text: str) -> Claim:
    """Claim 2: MeteoRA beats one LoRA on all tasks on composites."""
    rule = "holds where both counts of every composite are higher than LoRA-B's by more than two standard errors, fails where none is, else partly"
    ours, heat = with_composites(documents, role)
    if not ours or "lora_b" not in documents:
        return Claim(text, (), "not run", rule)
    theirs, base = (composite(documents.get(name, {"results": {}})) for name in ("lora_b", "base"))
    lines, signs = [], []
    for task in (task for task in ours if task in theirs):
        for name in ("attempted", "correct"):
            signs.append((ours[task][name] - theirs[task][name]).sign)
            of_base = f", base {shown(base[task][name], 2)}" if task in base else ""
            lines.append(f"{task} {name}{heat}: {shown(ours[task][name], 2)} against LoRA-B's {shown(theirs[task][name], 2)}{of_base}")
    verdict = "not run" if not signs else "holds" if min(signs) > 0 else "fails" if max(signs) <= 0 else "partly"
    return Claim(text, tuple(lines), verdict, rule)


def large_temperature(documents: Documents, prefix: str, text: str) -> Claim:
    """Claim 3: a large T helps composites."""
    rule = (
        "of the counts at the paper's T (15, 20, 30) and at T = 60 against T = 1: holds where one is higher by more than two standard errors and none lower, "
    )
    rule += "fails where none is higher, else partly"
    role, low, high = (prefix or "meteora"), f"{prefix}_T1".lstrip("_"), f"{prefix}_T60".lstrip("_")
    if low not in documents or not {role, high} & documents.keys():
        return Claim(text, (), "not run", rule)
    at_one = composite(documents[low])
    lines, signs = [], []
    for name, label in ((role, "the paper's T"), (high, "T = 60")):
        larger = composite(documents[name]) if name in documents else {}
        for task in (task for task in at_one if task in larger):
            for count in ("attempted", "correct"):
                signs.append((larger[task][count] - at_one[task][count]).sign)
                lines.append(f"{task} {count}: {shown(larger[task][count], 2)} at {label}, {shown(at_one[task][count], 2)} at T = 1")
    verdict = "not run" if not signs else "fails" if max(signs) <= 0 else "holds" if min(signs) >= 0 else "partly"
    return Claim(text, tuple(lines), verdict, rule)


def top_two(documents: Documents) -> Claim:
    """Claim 4: top-2 is better than top-1."""
    text = "top-2 is better than top-1 on single tasks"
    rule = "holds where top-2's average is higher by more than two standard errors, fails where it is lower by as much, else undecided"
    if not {"meteora", "top1"} <= documents.keys() or not common(documents, "meteora", "top1"):
        return Claim(text, (), "not run", rule)
    (two, one), count = averages(documents, "meteora", "top1")
    lines = [f"{shown(two)} with top-2, {shown(one)} with top-1 over {count} tasks"]
    twos, ones = composite(documents["meteora"]), composite(documents["top1"])
    for task in (task for task in twos if task in ones):
        parts = [f"{name} {shown(twos[task][name], 2)} / {shown(ones[task][name], 2)}" for name in ("attempted", "correct")]
        lines.append(f"{task}, top-2 / top-1: {', '.join(parts)}")
    sign = (two - one).sign
    return Claim(text, tuple(lines), {1: "holds", 0: "undecided", -1: "fails"}[sign], rule)


def goals(documents: Documents, held_out: Mapping[str, float]) -> list[tuple[str, str, bool | None]]:
    """The goals of the experiment as triples: the goal, the figure, and whether it was reached (None if it was not run)."""
    made: list[tuple[str, str, bool | None]] = []
    for role, label, least in (("meteora", "", EQUAL), ("closed", ", closed form alone", NEARLY), ("joint", ", adapters trained along", EQUAL)):
        ratio = None
        if {role, "own"} <= documents.keys() and common(documents, role, "own"):
            (ours, own), _ = averages(documents, role, "own")
            ratio = ours.value / own.value if own.value else None
        figure = "–" if ratio is None else f"{ratio:.1%}"
        made.append((f"single tasks{label}: at least {least:.0%} of the own adapters' average", figure, None if ratio is None else ratio >= least))
    accuracy = held_out.get("gate_accuracy")
    reached = None if accuracy is None else accuracy >= 0.85
    made.append(
        (
            "top-1 gate accuracy on answer tokens of held-out rows, all layers but the first: at least 85 %",
            "–" if accuracy is None else f"{accuracy:.1%}",
            reached,
        )
    )
    for role, label in (
        ("meteora", "without composite rows"),
        ("joined", "joined rows for the gates"),
        ("extension_fixed", "composite rows for the gates alone"),
        ("extension", "with composite rows"),
    ):
        counted, heat = with_composites(documents, role)
        for task in ("composite_3", "composite_5", "composite_10"):
            known = [counted.get(task), *(composite(documents[name]).get(task) if name in documents else None for name in ("base", "lora_b"))]
            goal = f"{task}, {label}{heat}: more attempted and correct than the base and LoRA-B"
            ours_, *others = known
            if ours_ is None or None in others:
                made.append((goal, "–", None))
                continue
            above = all(ours_[name].value > other[name].value for other in others if other for name in ("attempted", "correct"))
            made.append((goal, f"{ours_['attempted'].value:.2f} attempted, {ours_['correct'].value:.2f} correct", above))
    return made


def shown(figure: Figure, digits: int = 3) -> str:
    """A figure as text."""
    return f"{figure.value:.{digits}f} ± {figure.stderr:.{digits}f}"
