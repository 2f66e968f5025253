"""quiet.py SECONDS OUT [ENGINES]: engines of vLLM in one GPU's memory, of which one at a time works; sizes are measured in turn, so that a drift of the machine is in all of them.

All engines start at the same time; met256 later, if there are all others. When they are ready (or some are given up), for every round and size: base, met, lora, one run of each; then fp8 and metfp8; then base and met256.
After `ROUNDS` rounds come the base once more and the times of captured graphs. Then a later met256, which has only imported its modules so far, takes the memory of lora and is measured in
turn with the base. Profiles come last, because a profiler that was used once may slow an engine down. Saves OUT/results.json after every step of this, OUT/log.txt at the end. MODELS: folder of make.py's models with 28 adapters; LARGE: the one with 256. EAGER=1 and SIZES: a dry run on a CPU.
"""
import atexit, ctypes, json, os, selectors, signal, statistics, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
START, LIMIT, OUT = time.time(), float(sys.argv[1]), Path(sys.argv[2])
TEMP = Path(os.environ.get("LEASE_TEMP", "/tmp/quiet"))
EAGER, LAYERS, ROUNDS = bool(os.environ.get("EAGER")), os.environ.get("LAYERS", "32"), int(os.environ.get("ROUNDS", 3))
SMALL = {"CAPS": "1 8 64", "CACHE": "2.1", "TOKENS": "8192"}
ENGINES = {  # kind, adapters, environment
    "base": ("base", 28, {}),
    "met": ("met", 28, {}),
    "metplain": ("met", 28, {"METEORA_EARLY": "0", "METEORA_AHEAD": "0"}),  # with the patches of 2026-12-01-vllm-ahead alone
    "lora": ("lora", 28, {"CAPS": "1 8 64 256"}),
    "metfp8": ("metfp8", 28, SMALL),
    "fp8": ("fp8", 28, SMALL),
    "met256": ("met", 256, {**SMALL, "CAPS": "1 64", "MODELS": os.environ.get("LARGE", os.environ.get("MODELS", "/tmp"))}),
}
ALL = [tuple(int(part) for part in size.split("x")) for size in os.environ.get("SIZES", "1x128x128 8x128x128 64x128x128 256x128x128 16x2048x1").split()]
TWO = [size for size in ALL if size[0] in (8, 64)] if not EAGER else ALL[:1]
SEQUENCES = [(["base", "met", "metplain", "lora"], ALL), (["fp8", "metfp8"], TWO)]
TURNS = {"base": ALL, "met": ALL, "metplain": ALL, "lora": ALL, "fp8": TWO, "metfp8": TWO, "met256": TWO[-1:]}
found = {"runs": {}, "engines": {}, "graph": {}, "profile": {}}


def left():
    return LIMIT - (time.time() - START)


def say(*parts):
    print(f"[{time.time() - START:.0f} s]", *parts, flush=True)


def save():
    (OUT / "results.json").write_text(json.dumps(found))


class Engine:
    def __init__(self, name, go=None):
        kind, adapters, more = ENGINES[name]
        more = {**more, "GO": str(go)} if go else more
        self.name, self.log, self.ready, self.buffer = name, TEMP / f"{name}.log", False, b""
        its_commands, self.commands = os.pipe()
        self.answers, its_answers = os.pipe()
        environment = {**os.environ, **more, "VLLM_CACHE_ROOT": str(TEMP / f"cache-{name}")}
        arguments = [sys.executable, str(HERE / "engine.py"), kind, f"{adapters}x{LAYERS}", str(its_commands), str(its_answers)]
        self.process = subprocess.Popen(arguments, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=with_parent, pass_fds=(its_commands, its_answers))
        os.close(its_commands)
        os.close(its_answers)

    def answer(self, seconds):
        """The next line of the engine, or None if it ended or takes longer."""
        end = time.time() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0.0, end - time.time())):
                    return None
                more = os.read(self.answers, 1 << 20)
                if not more:
                    return None
                self.buffer += more
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def ask(self, *command):
        """The result of a command; None if it failed, after which the engine is not asked again if it did not answer."""
        os.write(self.commands, json.dumps(command).encode() + b"\n")
        reply = self.answer(max(1.0, left()))
        if reply is None:
            say(self.name, "did not answer", command)
            self.end()
        elif "failed" in reply:
            say(self.name, command, reply["failed"])
        return None if reply is None else reply.get("found")

    def end(self):
        self.ready = False
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def with_parent():
    """An engine ends when this script does, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def key(size):
    return "{}x{}+{}".format(*size)


def measure(name, size, number):
    engine = engines.get(name)
    if engine is None or not engine.ready or left() < 6:
        return
    seconds = engine.ask("run", *size, number)
    if seconds is not None:
        found["runs"].setdefault(key(size), []).append((name, number, round(seconds, 4), round(time.time() - START, 1)))


def rounds(numbers, least):
    for number in numbers:
        for names, sizes in SEQUENCES:
            for size in sizes:
                for name in names:
                    if left() > least:
                        measure(name, size, number)
        save()
        say("round", number, "done")


def times(name, size, least=0):
    """Seconds of the runs from round ``least`` on."""
    return [row[2] for row in found["runs"].get(key(size), []) if row[0] == name and row[1] >= least]


def report():
    """Medians, and the figures of the issue by throughput."""
    table = {}
    for size in ALL:
        for name in ENGINES:
            if own := times(name, size):
                table.setdefault(name, {})[key(size)] = statistics.median(own)
                spread = f"{min(own):.3f} to {max(own):.3f}, {len(own)} runs"
                say(f"{name} {key(size)}: {statistics.median(own):.4f} s ({spread}), {size[0] * size[2] / statistics.median(own):.0f} output tokens/s, {size[0] * (size[1] + size[2]) / statistics.median(own):.0f} tokens/s")
    for mine, base in (("met", "base"), ("met", "lora"), ("metfp8", "fp8"), ("met256", "base")):
        shared = [size for size in table.get(mine, {}) if size in table.get(base, {})]
        say(mine, "to", base, {size: round(table[base][size] / table[mine][size], 4) for size in shared})
    for size in TWO[-1:]:
        if times("met256", size, 100) and times("base", size, 100):
            say("met256 to base, the runs in turn with it:", round(statistics.median(times("base", size, 100)) / statistics.median(times("met256", size)), 4))
    facts = found["engines"]
    for mine, base, adapters in (("met", "base", 28), ("met256", "base", 256)):
        file = Path(ENGINES[mine][2].get("MODELS", os.environ.get("MODELS", "/tmp"))) / f"m{adapters}x{LAYERS}/ck/meteora.safetensors"
        if "bytes" in facts.get(mine, {}) and "bytes" in facts.get(base, {}) and file.exists():
            say(mine, "memory beyond the base's, as a share of gates and adapters:", round((facts[mine]["bytes"] - facts[base]["bytes"]) / file.stat().st_size, 4))
            say(mine, "ready later than the base by", round(facts[mine]["ready"] - facts[base]["ready"], 1), "s, all engines starting at once")
    for name, sizes in found["graph"].items():
        say("graph", name, sizes)
    for name, sizes in found["profile"].items():
        for size, result in sizes.items():
            say("profile", name, size, "span", result["span"], "busy", result["busy"], "gaps", result["gaps"], "us")
            for row in result["kernels"][:7]:
                print("   kernel", *row, flush=True)
            for row in result["pairs"][:7]:
                print("   gap", *row, flush=True)


def start(names):
    for name in names:
        engines[name] = engines.get(name) or Engine(name)
    waiting, enough = list(names), None
    while waiting and left() > (60 if len(names) > 1 else 14):
        for name in list(waiting):
            facts = engines[name].answer(0.05)
            if facts is not None:
                found["engines"][name], engines[name].ready = facts, True
                say(name, "ready", {label: value for label, value in facts.items() if label != "paths"})
                waiting.remove(name)
            elif engines[name].process.poll() is not None:
                say(name, "ended:", engines[name].log.read_text(errors="replace")[-1500:])
                waiting.remove(name)
        enough = enough or (time.time() if len(names) > 1 and len(waiting) <= 1 and not {"base", "met"} & set(waiting) else None)
        if enough and time.time() - enough > 40:
            break
    for name in waiting:
        say(name, "is too late")
        engines[name].end()
    save()
    for name, facts in found["engines"].items():
        for shape, path in facts.get("paths", {}).items():
            print("  ", name, shape, path, flush=True)


def close():
    for engine in engines.values():
        engine.end()
    with (OUT / "log.txt").open("w") as stream:
        for name, engine in engines.items():
            stream.write(f"==== {name}\n{engine.log.read_text(errors='replace')[-200_000:]}\n")


OUT.mkdir(parents=True, exist_ok=True)
TEMP.mkdir(parents=True, exist_ok=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: sys.exit("interrupted"))
def warm(names):
    for name in names:
        if engines[name].ready and left() > 10:
            found["engines"][name] |= engines[name].ask("warm", TURNS[name]) or {}
            say(name, "warm; compiled late:", found["engines"][name].get("late"))


def graphs(names):
    for size in [size for size in ALL if size[0] in (1, 8, 64, 256) and size[2] > 8] if not EAGER else ():
        for name in names:
            engine = engines[name]
            if engine.ready and size in TURNS[name] and left() > 6 and (result := engine.ask("graph", size[0])):
                found["graph"].setdefault(name, {})[size[0]] = result
    save()


def profiles(wanted):
    for name, size in wanted:
        engine = engines.get(name)
        if engine is not None and engine.ready and left() > 8 and (result := engine.ask("profile", *size)):
            found["profile"].setdefault(name, {})[key(size)] = result
            save()
    say("profiles done")


PROFILES = [("met", (8, 4, 21)), ("base", (8, 4, 21)), ("metfp8", (8, 4, 21)), ("fp8", (8, 4, 21)), ("met", (256, 4, 9)), ("base", (256, 4, 9)), ("met", (16, 2048, 1)), ("base", (16, 2048, 1)), ("met256", (64, 4, 9)), ("met", (64, 4, 9)), ("base", (64, 4, 9))]
engines = {}
atexit.register(close)
wanted = sys.argv[3].split(",") if len(sys.argv) > 3 else [name for name in ENGINES if name != "metplain"]
late = "met256" in wanted and {"lora", "fp8", "metfp8"} <= set(wanted)  # six engines do not fit into 140 GiB
first = [name for name in wanted if name != "met256" or not late]
go = TEMP / "go"
go.unlink(missing_ok=True)
if not late:
    SEQUENCES.append((["base", "met256"], TWO[-1:]))
else:
    engines["met256"] = Engine("met256", go)
start(first)
warm(first)
rounds(range(ROUNDS), 12)
for size in ALL:
    measure("base", size, 99)
graphs(first)
report()
if late and left() > 75:
    if "lora" in engines:
        engines["lora"].end()
    go.touch()
    start(["met256"])
    warm(["met256"])
    SEQUENCES[:] = [(["base", "met256"], TWO[-1:])]
    rounds(range(100, 100 + ROUNDS), 12)
    graphs(["met256"])
profiles(PROFILES)
report()
