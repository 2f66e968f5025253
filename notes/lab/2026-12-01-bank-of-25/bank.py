"""A bank of many adapters measured in closed form: held-out routing, scores, the base route, additions one by one, a missing adapter, self-written rows.

python bank.py work|live|report BASE ADAPTERS DATA OUT [--rows 64] [--general FILE] [--deadline SECONDS] [--parts routing,routed,own]

Several processes may `work` on one OUT: each takes the next part that nobody has taken, and every finished part is a file, so a later call continues.
`live` adds the last adapters one by one. BASE is a model folder or a name of the catalog, ADAPTERS a folder of PEFT folders, DATA a folder of built datasets.
FILE has lines {"kind", "text"} or {"kind", "question", "answer"}; bank.sh starts all of this.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import alone, with_adapter, without_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row
from meteora_core.data.tasks import COMPOSITES, TASKS
from meteora_core.evaluation.eval_plan import EvalOptions
from meteora_core.evaluation.runner import evaluate_task, headline
from meteora_core.living import self_written
from meteora_core.living.checkpoints import BARE_SHARE
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.live_bank import LiveBank
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.model.attach import detach, meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.generation.engine import Engine
from meteora_core.progress import SILENT
from meteora_core.routing.routes import Routes
from meteora_core.training.encoding import collate, encode_rows, row_lengths
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.input_sums import InputSums, Run, passes_of
from meteora_core.training.ridge import ridge_rows
from meteora_core.training.statistics import BASE_ROUTE, _counted, _planned, _run, closed_form_gates
from meteora_core.training.task_rows import HeldOut

LAST = 5
"""Number of adapters that `live` adds one by one."""

STARTER = set(COMPOSITES["composite_10"])
"""The ten adapters whose gates are also solved without rows."""

WRITTEN = ("self", "few4", "example16", "example4", "named", "neutral")
"""Sources of text for adapters without rows; self: prompts that the adapter writes, and neutral questions; neutral: these questions alone;
named: prompts that the base writes when it is told the adapter's name; exampleN: N prompts of its task; few4: these, and prompts that the base writes in their manner. The adapter answers."""

parser = argparse.ArgumentParser()
parser.add_argument("stage", choices=("work", "live", "report"))
parser.add_argument("base")
for name in ("adapters", "data", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--rows", type=int, default=32, help="test rows of each task for the scores")
parser.add_argument("--parts", default="routing,own,routed,text,base,missing,plain,again", help="what is measured, in this order")
parser.add_argument("--general", type=Path)
parser.add_argument(
    "--known", default="", help="scores of earlier evaluations, CONFIG=FOLDER with results_*.json, separated by commas, such as own=eval/own/own"
)
parser.add_argument("--deadline", type=float, default=1e9, help="seconds after the start of the call, as time since the epoch in $BEGAN")
parser.add_argument("--most", type=int, default=25)
parser.add_argument("--last", type=int, default=LAST)
parser.add_argument("--tokens", type=int, default=8000)
parser.add_argument("--held", type=int, default=64, help="held-out rows of each task for the routing")
parser.add_argument("--max-new-tokens", type=int)
parser.add_argument("--written", type=int, default=self_written.ROWS, help="rows of each kind that an adapter writes")
parser.add_argument("--tasks", default="", help="tasks that are scored, separated by commas; empty for all")
parser.add_argument("--written-rows", default="", help="files with rows that were written before, such as OUT.{}.json of no_rows.py with {} for the source")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--dtype", default="bfloat16")
given = parser.parse_args()
self_written.ROWS = given.written

BEGAN = float(os.environ.get("BEGAN", time.time()))
OUT, DEVICE = given.out, torch.device(given.device)
NAMES = [path.name for path in sorted(given.adapters.iterdir()) if (path / "adapter_config.json").is_file() and path.name in TASKS][: given.most]
ALL = [*NAMES, NO_ADAPTER]
TEN = [name for name in NAMES if name in STARTER] or NAMES[:10]
CHOSEN = given.tasks.split(",") if given.tasks else NAMES
PARTS = given.parts.split(",")
SETS = {"routed": ALL, "plain": NAMES}
if "missing" in PARTS:
    SETS |= {f"without.{name}": [other for other in ALL if other != name] for name in CHOSEN}
KINDS, PHASE = [kind for kind in WRITTEN if kind in PARTS], ""
if KINDS:
    SETS, PHASE = {kind: [*TEN, NO_ADAPTER] for kind in ("ten", *KINDS)}, ".written"
"""The adapters of each set of gates: all with and without the base route, and all but one; or, in a call of its own, ten from their rows and from text that was
written for them."""


def log(*parts: object) -> None:
    print(f"{time.time() - BEGAN:6.1f} [{given.stage} {os.getpid()}]", *parts, flush=True)


def late() -> bool:
    return time.time() - BEGAN > given.deadline


def write(file: Path, value: object) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(value))
    os.replace(part, file)


def save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    part = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, part)
    os.replace(part, file)


def read(name: str) -> dict | None:
    file = OUT / "results" / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def taken(files: list[Path]) -> Iterator[Path]:
    """Those of the files that do not exist and that no other process makes."""
    for file in files:
        if late():
            return
        try:
            if not file.exists():
                os.close(os.open(OUT / "claims" / f"{file.parent.name}.{file.name}", os.O_CREAT | os.O_EXCL))
                yield file
        except FileExistsError:
            pass


def wait(files: list[Path]) -> bool:
    """Whether all files exist before the deadline."""
    while not all(file.exists() for file in files):
        if late():
            return False
        time.sleep(0.5)
    return True


class World:
    """The base model and the adapters."""

    def __init__(self) -> None:
        self.base = BaseReference(given.base)
        self.tokenizer = load_tokenizer(self.base)
        self.model = load_base(self.base, dtype=getattr(torch, given.dtype), device=DEVICE).eval()
        self.bank = AdapterBank.from_peft({name: given.adapters / name for name in NAMES})
        options = CollectOptions(data=given.data, tokens=given.tokens, device=given.device, max_length=512)
        recipe = Recipe(answer_share=options.answer_share, bare_share=BARE_SHARE, frame=INST.text)
        how = collecting(options, self.base, self.model, self.tokenizer, recipe)
        workspace = OUT / "new" / str(os.getpid())
        self.collector = Collector(self.tokenizer, how, workspace, lambda name, folder: find_rows(name, given.data, folder, self.tokenizer))
        self.bank = with_adapter(self.collector.with_frame(self.bank), base_route())
        self.pad = how.pad_token

    def collect(self, file: Path) -> None:
        """Write the statistics of an adapter, from its rows or from rows that it writes."""
        began, name, kind = time.time(), file.stem, file.parent.name
        rows, bank = self.collector.rows(name), alone(self.bank, name)
        if kind != "st" and given.written_rows:
            pairs = json.loads(Path(given.written_rows.format(kind)).read_text())[name]
            rows = AdapterRows([Row(*pair) for pair in pairs], [], INST, INST.text, Path(kind))
        elif kind != "st":
            rows = self_written.self_written_rows(self.model, self.tokenizer, bank, INST) if kind == "self" else self.written(kind, bank, rows)
            write(OUT / "results" / f"written.{kind}.{name}.json", [[row.prompt, row.response] for row in rows.train])
        assert rows is not None
        made = self.collector.collect(self.model, bank, rows, self.collector.how.recipe, list(self.bank.modules))
        made.file.rename(file)
        log(file.parent.name, name, made.header.rows, "rows", made.header.tokens, "tokens counted", f"{time.time() - began:.1f} s")

    def named(self, what: str) -> list[str]:
        wordings = (f"Write an example of a question for the task “{what}”. Write only the question.", f"Give me an example input for “{what}”.")
        turns = [self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True) for text in wordings]
        made = self_written._texts(Engine(self.model, self.tokenizer, "off"), (turns * given.written)[: given.written], 96, 7)
        return [INST.around(text.strip()) for text in made if len(text.strip()) > 3]

    def written(self, kind: str, bank: AdapterBank, known: AdapterRows) -> AdapterRows:
        """The answers of an adapter to neutral questions, to a few prompts of its task, or to these and to prompts that the base writes in their manner."""
        if kind == "neutral":
            prompts = [row.prompt for row in self_written.general_rows(INST).train if row.prompt][: given.written]
        elif kind == "named":
            prompts = self.named(bank.names[0].replace("_", " "))
        else:
            prompts = examples = [row.prompt for row in known.train if len(row.prompt) < 1500][: int(kind.removeprefix("few").removeprefix("example"))]
        if kind.startswith("few"):
            turned = [examples[start % len(examples) :] + examples[: start % len(examples)] for start in range(given.written)]
            openings = ["\n\n".join([*(text.strip() for text in order), INST.before.rstrip(" ")]) for order in turned]
            made = self_written._texts(Engine(self.model, self.tokenizer, "off"), openings, 160, 7)
            messages = [text.partition(INST.after.strip())[0].strip() for text in made]
            prompts = [*prompts, *(INST.around(message) for message in messages if len(message) > 3)]
        attach(self.model, bank, top_k=1, init="zeros")
        try:
            answers = self_written._texts(Engine(self.model, self.tokenizer, "off"), prompts, 48, 11)
        finally:
            detach(self.model)
        return AdapterRows([Row(*pair) for pair in zip(prompts, answers, strict=True) if pair[1].strip()], [], INST, INST.text, Path(kind))

    def attach(self) -> None:
        attach(self.model, self.bank, top_k=2, init="zeros")
        self.state = self.model.meteora

    @contextmanager
    def using(self, gates: str) -> Iterator[None]:
        """Set the gates of a set of adapters; the others are muted."""
        parts = load_file(OUT / "gates" / f"{gates}.safetensors")
        chosen = SETS.get(gates, ALL)
        with torch.no_grad():
            for path, layer in meteora_layers(self.model):
                full = torch.zeros(len(ALL), layer.gate.shape[1])
                full[[ALL.index(name) for name in chosen]] = parts[path]
                layer.gate.copy_(full.to(layer.gate.dtype))
        self.state.mute([name for name in ALL if name not in chosen])
        try:
            yield
        finally:
            self.state.mute([])

    def held_out(self, most: int) -> HeldOut:
        groups = []
        for index, name in enumerate(ALL):
            rows = self.collector.rows(name)
            end = rows.frame.end_id(self.tokenizer)
            groups.append([] if name == NO_ADAPTER else list(encode_rows(rows.held_out[:most], self.tokenizer, index, 512, end).rows))
        return HeldOut(groups, ALL, self.pad, 16, response_only=True)


def moments(statistics: GateStatistics, layer: str) -> torch.Tensor:
    """The second moments of a layer's input, float64 (h, h) on the device."""
    if not statistics.is_low_rank:
        return statistics.squares(layer).to(DEVICE)
    factor, residual = (part.to(DEVICE) for part in statistics.low_rank(layer))
    return torch.addmm(torch.diag(residual), factor.t(), factor)


def solve(file: Path, layers: list[str]) -> None:
    """Solve all sets of gates of the layers that share an input, and write them."""
    squares, means = {}, {}
    for kind, names in (("st", ALL), *((kind, TEN) for kind in KINDS)):
        for name in names:
            statistics = GateStatistics(OUT / kind / f"{name}.safetensors")
            squares[kind, name], means[kind, name] = moments(statistics, layers[0]), statistics.mean(layers[0]).to(DEVICE)
    weight = {name: BASE_ROUTE if name == NO_ADAPTER else 1.0 for name in ALL}
    solved = {}
    for gates, names in SETS.items():
        keys = [(gates if gates in KINDS and name != NO_ADAPTER else "st", name) for name in names]
        total = sum(weight[name] * squares[kind, name] for kind, name in keys)
        shares = torch.tensor([weight[name] for name in names], dtype=torch.float64, device=DEVICE)
        gate = ridge_rows(total, torch.stack([means[key] for key in keys]), shares) * Recipe().scale
        solved |= {f"{gates}/{layer}": gate.float().cpu() for layer in layers}
    save(file, solved)


def join_gates(files: list[Path]) -> None:
    """Write one file for each set of gates."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for file in files:
        for key, gate in load_file(file).items():
            gates, _, layer = key.partition("/")
            parts.setdefault(gates, {})[layer] = gate
    for gates, tensors in parts.items():
        save(OUT / "gates" / f"{gates}.safetensors", tensors)


def solve_again(world: World, file: Path) -> None:
    """Gates of all adapters and the base route from their statistics and, with the same weight, from half as many tokens that run as `routed` routes them."""
    began, how = time.time(), replace(world.collector.how, recipe=world.collector.how.recipe, tokens=given.tokens // 2)
    batches = []
    for index, name in enumerate(ALL):
        rows = world.collector.train_rows(name, index)
        batches += [[_counted(rows[row], row, how) for row in picks] for picks in _planned(row_lengths(rows), how)[0]]
    passes = passes_of([Run("routed", 1.0, batches)], len(ALL), how.recipe.answer_share)
    layers, solved = dict(meteora_layers(world.model)), dict[int, torch.Tensor]()
    sums = InputSums(len(ALL), passes[0].table, how.memory)
    with world.using("routed"):
        _run(world.model, sums, layers, passes, how, "routed rows", SILENT)
    gates = {}
    statistics = [GateStatistics(OUT / "st" / f"{name}.safetensors") for name in ALL]
    for path, layer in layers.items():
        key = sums.of[id(layer)]
        if key not in solved:
            total, means = sums.square(key).double().to(DEVICE), sums.means[key].double().to(DEVICE)
            for each in statistics:
                total += moments(each, path)
            means += torch.stack([each.mean(path) for each in statistics]).to(DEVICE)
            solved[key] = (ridge_rows(total, means, torch.ones(len(ALL), dtype=torch.float64, device=DEVICE)) * Recipe().scale).float().cpu()
        gates[path] = solved[key]
    save(file, gates)
    log("routed rows:", sum(len(batch) for batch in batches), f"rows, solved again, {time.time() - began:.1f} s")


def routing(world: World, file: Path) -> None:
    """The share of held-out tokens whose first choice is their own adapter."""
    gates = file.stem.partition(".")[2]
    held = world.held_out(given.held)
    if gates == "ten" or gates in KINDS:
        held = replace(held, rows=[rows if name in TEN else [] for name, rows in zip(ALL, held.rows, strict=True)])
    with world.using(gates):
        measured = measure_gates(world.model, held)
    tasks = [value for key, value in measured.items() if key.startswith("gate_accuracy/") and key.partition("/")[2] in NAMES]
    summary = {"answers": measured["gate_accuracy"], "mean over tasks": sum(tasks) / len(tasks), "all tokens": measured["gate_accuracy_all"]}
    write(file, summary | {"loss": measured["lm_loss"], "rows": sum(map(len, held.rows)), "details": measured})
    log(file.stem, {key: round(value, 4) for key, value in summary.items()})


def score(world: World, file: Path) -> None:
    """Generated answers to a task's test rows, scored."""
    began, (_, config, name) = time.time(), file.stem.split(".")
    options = EvalOptions(limit=given.rows, max_new_tokens=given.max_new_tokens, routing_temperature=1.0)
    gates = {"missing": f"without.{name}", "added": "added"}.get(config, config)
    how = world.state.force(name) if config == "own" else world.state.disabled() if config == "base" else world.using(gates)
    with how:
        result = evaluate_task(world.model, world.tokenizer, name, given.data, options)
    metric, value = headline(result)
    scale = 100 if metric == "bleu" else 1
    error = result.scores.stderr.get(metric)
    value, error = value / scale, None if error is None else error / scale
    answers = [sample.response for sample in result.samples]
    write(file, {"metric": metric, "score": value, "stderr": error, "rows": len(answers), "new_tokens": result.new_tokens, "answers": answers})
    log(file.stem, metric, f"{value:.4f}, {result.new_tokens} tokens, {time.time() - began:.1f} s")


def text_sets(world: World) -> dict[str, list]:
    """Encoded rows: general text by kind, and held-out rows of each task."""
    sets: dict[str, list] = {}
    for line in given.general.read_text().splitlines():
        item = json.loads(line)
        row = Row("", item["text"]) if "text" in item else Row(INST.around(item["question"]), item["answer"])
        sets.setdefault(item["kind"], []).append(row)
    encoded = {kind: list(encode_rows(rows, world.tokenizer, 0, 384, None).rows) for kind, rows in sets.items()}
    for name in NAMES:
        encoded[f"task-{name}"] = list(encode_rows(world.collector.rows(name).held_out[:24], world.tokenizer, 0, 384, None).rows)
    return encoded


@torch.no_grad()
def text(world: World, file: Path, rows: list) -> None:
    """Cross-entropy of all tokens and of answers, and the mean weight of the base route in each row."""
    _, gates, _ = file.stem.split(".")
    rows, sums, shares = sorted(rows, key=len), torch.zeros(2, 2, dtype=torch.float64), []
    with world.state.disabled() if gates == "base" else world.using(gates):
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16], world.pad).to(DEVICE)
            routes = Routes(world.state.names)
            with world.state.record(routes):
                logits = world.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            keep = batch.gate_labels >= 0
            if gates == "routed":
                chosen = [routes.steps(path)[0] for path in routes.paths]
                base = sum(((each.indices == len(NAMES)) * each.weights).sum(-1) for each in chosen) / len(chosen)
                shares += ((base * keep).sum(1) / keep.sum(1)).tolist()
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
            for which, where in enumerate((keep[:, 1:], keep[:, 1:] & batch.response[:, 1:])):
                sums[which] += torch.tensor([(loss * where).sum().item(), where.sum().item()], dtype=torch.float64)
    losses = {kind: (sums[which, 0] / sums[which, 1]).item() for which, kind in enumerate(("all", "answers"))}
    write(file, losses | {"rows": len(rows), "tokens": sums[0, 1].item(), "base_share": shares})


def take_known() -> None:
    """Copy the scores of earlier evaluations."""
    for config, _, folder in (entry.partition("=") for entry in given.known.split(",") if entry):
        for file in sorted(Path(folder).glob("results_*.json")):
            document = json.loads(file.read_text())
            for name, found in document["results"].items():
                metric = next((metric for metric in ("acc", "bleu", "rougeL") if f"{metric},none" in found), None)
                if name in NAMES and metric is not None:
                    value = found[f"{metric},none"] / (100 if metric == "bleu" else 1)
                    known = {"metric": metric, "score": value, "rows": document["config"]["limit"], "from": str(file)}
                    write(OUT / "results" / f"score.{config}.{name}.json", known)
        log(config, "known:", len(list((OUT / "results").glob(f"score.{config}.*.json"))), "tasks of", folder)


def work() -> None:
    """Statistics, gates and all measurements, shared with other processes."""
    for _ in taken([OUT / "known.json"]):
        take_known()
        write(OUT / "known.json", given.known)
    if not wait([OUT / "known.json"]):
        return
    world = World()
    log("loaded", len(NAMES), "adapters")
    statistics = [OUT / kind / f"{name}.safetensors" for kind, names in (("st", ALL), *((kind, TEN) for kind in KINDS)) for name in names]
    for file in taken(statistics):
        world.collect(file)
    if not wait(statistics):
        return
    first, groups = GateStatistics(OUT / "st" / f"{NAMES[0]}.safetensors"), dict[str, list[str]]()
    for layer in world.bank.modules:
        groups.setdefault(first.input_of(layer), []).append(layer)
    parts = {OUT / f"parts{PHASE}" / f"{key}.safetensors": layers for key, layers in groups.items()}
    for file in taken(list(parts)):
        solve(file, parts[file])
    if not wait(list(parts)):
        return
    for file in taken([OUT / "gates" / f"all{PHASE}.json"]):
        join_gates(list(parts))
        write(file, list(SETS))
        log("gates solved")
    if not wait([OUT / "gates" / f"all{PHASE}.json"]):
        return
    world.attach()
    jobs: dict[Path, Callable[[Path], None]] = {}
    later: list[str] = []

    def plan(name: str, job: Callable[[Path], None]) -> None:
        jobs[OUT / "results" / f"{name}.json"] = job

    longest = sorted(CHOSEN, key=lambda name: -TASKS[name].max_new_tokens)
    for part in PARTS:
        if part == "routing":
            for gates in (gates for gates in SETS if "." not in gates):
                plan(f"routing.{gates}", lambda file: routing(world, file))
        elif part == "text":
            for kind, rows in text_sets(world).items() if given.general and given.general.is_file() else ():
                for gates in ("base", "routed", "plain"):
                    plan(f"text.{gates}.{kind}", lambda file, rows=rows: text(world, file, rows))
        elif part in ("again", "added"):
            if part == "again":
                jobs[OUT / "gates" / "again.safetensors"] = lambda file: solve_again(world, file)
            later.append(part)
        else:
            for name in longest:
                if part not in ("ten", *KINDS) or name in TEN:
                    plan(f"score.{part}.{name}", lambda file: score(world, file))

    def run() -> None:
        for file in taken(list(jobs)):
            try:
                jobs[file](file)
            except Exception as error:
                log("error in", file.stem, repr(error)[:300])
        jobs.clear()

    run()
    for part in later:
        if wait([OUT / "gates" / f"{part}.safetensors"]):
            plan(f"routing.{part}", lambda file: routing(world, file))
            for name in longest:
                plan(f"score.{part}.{name}", lambda file: score(world, file))
            run()


def live() -> None:
    """Add the last adapters one by one to a loaded model, and compare its gates with those of all adapters at once."""
    if "added" not in PARTS or (OUT / "results" / "live.json").exists():
        return
    world = World()
    first, last = NAMES[: -given.last], NAMES[-given.last :]
    files = {name: OUT / "st" / f"{name}.safetensors" for name in ALL}
    if not wait(list(files.values())):
        return
    statistics = {name: GateStatistics(file) for name, file in files.items()}
    bank = world.bank
    for name in ALL:
        bank = bank if name in (*first, NO_ADAPTER) else without_adapter(bank, name)
    began = time.time()
    once = dict(closed_form_gates([statistics[name] for name in ALL], list(world.bank.modules)))
    seconds = time.time() - began
    attach(world.model, bank, top_k=2, init="zeros")
    world.model.meteora.provenance.gates = "closed form"  # an addition solves all gates again, so it does not matter that these are zero
    solved: dict[str, torch.Tensor] = {}

    class Kept(LiveBank):
        def _set(self, gates: dict[str, torch.Tensor]) -> None:
            solved.clear()
            solved.update(gates)
            super()._set(gates)

    bank = Kept(world.model, world.collector, {name: statistics[name] for name in (*first, NO_ADAPTER)})
    changes = []
    for name in last:
        change = bank.add(name, given.adapters / name)
        changes.append({"adapter": name, "seconds": change.seconds, "exact": change.exact, "top-1": change.held_out.get("gate_accuracy")})
        log("added", changes[-1])
        if late():
            return
    held = {path: layer.gate.detach().float().cpu() for path, layer in meteora_layers(world.model)}
    again = max(relative(solved[path].to(dtype_of(world.model, path)).float(), held[path]) for path in held)
    difference = max(relative(solved[path], once[path]) for path in once)
    equal = all(torch.equal(solved[path], once[path]) for path in once)
    on_device = {}
    if wait([OUT / "gates" / "all.json"]):
        routed = load_file(OUT / "gates" / "routed.safetensors")
        on_device = {"solved on the device, from the library's": max(relative(routed[path], once[path]) for path in once)}
    save(OUT / "gates" / "added.safetensors", solved)
    found = {"changes": changes, "equal": equal, "largest relative difference of a gate": difference, "of the model's gates from its statistics": again}
    write(OUT / "results" / "live.json", found | on_device | {"solving all, s": seconds})
    log("live", {key: value for key, value in found.items() if key != "changes"}, on_device)


def dtype_of(model: torch.nn.Module, path: str) -> torch.dtype:
    return dict(meteora_layers(model))[path].gate.dtype


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


def report() -> None:
    """Print all figures that the finished parts give."""
    take_known()
    done = {file.stem: json.loads(file.read_text()) for file in (OUT / "results").glob("*.json")}
    scores: dict[str, dict[str, float]] = {}
    for key, value in done.items():
        if key.startswith("score."):
            scores.setdefault(key.split(".")[1], {})[key.split(".")[2]] = value["score"]
    for key in sorted(done):
        if key.startswith("routing."):
            print("top-1, held-out rows:", key[8:], {name: round(value, 4) for name, value in done[key].items() if name != "details"})
    for config, values in scores.items():
        found = [done[f"score.{config}.{name}"] for name in values]
        errors = [each.get("stderr") or 0.0 for each in found]
        error = math.sqrt(sum(value**2 for value in errors)) / len(errors)
        print(
            f"score {config}: {sum(values.values()) / len(values):.4f} +- {error:.4f} over {len(values)} tasks, rows {sorted({each['rows'] for each in found})}"
        )
    pairs = [("routed", "own"), ("closed", "own"), ("plain", "own"), ("again", "own"), ("routed", "plain"), ("again", "closed"), ("added", "routed")]
    pairs += [("missing", "base"), ("ten", "own"), *((kind, "ten") for kind in WRITTEN), *((kind, "own") for kind in WRITTEN)]
    for one, other in pairs:
        if both := sorted(set(scores.get(one, {})) & set(scores.get(other, {}))):
            first, second = (sum(scores[config][name] for name in both) / len(both) for config in (one, other))
            change = torch.tensor([scores[one][name] - scores[other][name] for name in both], dtype=torch.float64)
            error = (change.std() / math.sqrt(len(both))).item() if len(both) > 1 else math.nan
            ratio = f"{first / max(second, 1e-9):.4f} +- {error / max(second, 1e-9):.4f}"
            print(f"{one} / {other}: {first:.4f} / {second:.4f} = {ratio}, {len(both)} tasks; difference {first - second:.4f} +- {error:.4f} (over tasks)")
    texts = {tuple(key.split(".")[1:]): value for key, value in done.items() if key.startswith("text.")}
    shares = {name: value["base_share"] for (gates, name), value in texts.items() if gates == "routed"}
    tasks = torch.tensor([share for name, row in shares.items() if name.startswith("task-") for share in row])
    for name in (name for name in shares if not name.startswith("task-")):
        rows = torch.tensor(shares[name])
        auroc = ((rows[:, None] > tasks).float() + 0.5 * (rows[:, None] == tasks).float()).mean()
        print(f"base route, {name}: AUROC {auroc:.4f}, mean weight {rows.mean():.3f}, on tasks {tasks.mean():.3f}; {len(rows)} and {len(tasks)} rows")
    for (gates, name), value in sorted(texts.items()):
        if gates != "base" and not name.startswith("task-") and ("base", name) in texts:
            base = texts["base", name]
            print(f"perplexity over the base, {gates}, {name}:", *(f"{kind} {math.exp(value[kind] - base[kind]):.4f}" for kind in ("all", "answers")))
    if "live" in done:
        print("one by one:", done["live"])


if __name__ == "__main__":
    for folder in ("st", *KINDS, f"parts{PHASE}", "gates", "results", "claims", "new"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    {"work": work, "live": live, "report": report}[given.stage]()
