"""``python -m tests.robustness``: run a campaign of malformed inputs, or one case of it again."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .campaign import Campaign, Verdict
    from .chaos import Trial


def main() -> int:
    """Returns the exit code: 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all cases (default: 1)")
    parser.add_argument("--cases", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--case", type=int, help="run this one only, show all of it, and leave its folder in ./case-N")
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument("--chaos", action="store_true", help="kills and failing writes instead of malformed inputs")
    parser.add_argument("--moments", type=int, default=8, help="with --chaos: kills of each command at random moments (default: 8)")
    parser.add_argument("--failures", type=int, default=8, help="with --chaos: failing writes of each command (default: 8)")
    parser.add_argument("--every", type=int, default=1, help="with --chaos: kill at every so many renames and fsyncs (default: 1)")
    parser.add_argument("--operations", default="", help="with --chaos: only these, separated by commas")
    parser.add_argument("--kills", action="store_true", help="a few kills and failing writes too, as in the ordinary test suite")
    parser.add_argument("--report", type=Path, help="write counts and failures there, as JSON")
    options = parser.parse_args()
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    from .forks import import_everything, set_environment

    set_environment()
    from .campaign import Campaign, Report, workplace

    started = time.monotonic()
    import_everything()
    with workplace() as root:
        campaign = Campaign(options.seed, root, tuple(filter(None, options.kinds.split(","))))
        report = Report(options.seed)
        if options.chaos:
            return _chaos(campaign, options)
        if options.case is not None:
            verdict = campaign.run_case(options.case, keep=True)
            print(f"changed: {verdict.case.label!a}\ncommand: {verdict.case.argv}\nexpected: {verdict.case.expect} {verdict.case.why}")
            print(f"exit code: {verdict.outcome.code}, {verdict.outcome.seconds:.1f} s")
            print(f"stdout: {verdict.outcome.out[:2000]!a}\nstderr: {verdict.outcome.err[-6000:]!a}")
            target = Path(f"case-{options.case}")
            shutil.copytree(root / target.name, target, symlinks=True, ignore=_pipes)
            print("faults:", verdict.faults or "none")
            return int(bool(verdict.faults))

        def told(verdict: Verdict) -> None:
            report.add(verdict)
            if report.failures and report.failures[-1]["case"] == verdict.number:
                failure = report.failures[-1]
                kinds = f" --kinds {options.kinds}" if options.kinds else ""
                print(f"{failure['kind']}: {failure['changed']}: {'; '.join(failure['faults'])}", flush=True)
                print(f"    meteora {' '.join(failure['command'])}", flush=True)
                print(f"    python -m tests.robustness --seed {options.seed}{kinds} --case {failure['case']}", flush=True)

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        stopped = False
        try:
            campaign.run_all(range(options.first, options.first + options.cases), told)
        except KeyboardInterrupt:
            stopped = True
        wrong = _kills(campaign) if options.kills and not stopped else 0
    print(report.table())
    if stopped:
        print("stopped before all cases had been run")
    print(f"{time.monotonic() - started:.0f} s")
    if options.report:
        options.report.write_text(
            json.dumps({"seed": options.seed, "cases": report.cases, "failures": report.failures, "refused though nothing was found": report.strict}, indent=1)
        )
    return int(bool(report.failures or wrong or stopped))


def _pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_fifo()]


def _chaos(campaign: Campaign, options: argparse.Namespace) -> int:
    from .chaos import run_all

    bad: list[Trial] = []
    names = tuple(filter(None, options.operations.split(",")))
    count = run_all(campaign, options.moments, options.failures, names, partial(_told, bad), every=options.every, seed=options.seed)
    print(f"{count} trials, {len(bad)} with faults")
    return int(bool(bad))


def _kills(campaign: Campaign) -> int:
    from .chaos import run_few

    bad: list[Trial] = []
    count = run_few(campaign, partial(_told, bad))
    print(f"{count} kills and failing writes, {len(bad)} with faults")
    return len(bad)


def _told(bad: list[Trial], trial: Trial) -> None:
    if trial.faults:
        bad.append(trial)
        print(f"{trial.operation}: {trial.disturbance}: {'; '.join(trial.faults)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
