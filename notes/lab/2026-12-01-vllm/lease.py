"""lease.py SECONDS OUT [JOBS]: the engines of one measurement on two GPUs, one at a time on each; results in OUT/results.json as they come, logs in OUT/log.txt.

JOBS: a part of `PLAN`'s names, separated by commas (default: all). While an engine runs, the next one of its GPU imports. The engines with tensor parallelism
start together when both GPUs are free, and measure in turn. Everything that is not done after SECONDS is dropped.
"""
import json, os, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
START, LIMIT, OUT = time.time(), float(sys.argv[1]), Path(sys.argv[2])
ALL = "8x128x128 64x128x128"
PLAN = {  # name: GPU, kind, adapters x layers, environment
    "base": (0, "base", "28x32", {"PROFILE": "1"}),
    "met": (0, "met", "28x32", {"PROFILE": "1"}),
    "met256": (0, "met", "256x32", {"SIZES": "64x128x128", "CAPS": "1 64", "MODELS": os.environ.get("LARGE", "/tmp")}),
    "lora": (1, "lora", "28x32", {}),
    "fp8": (1, "fp8", "28x32", {"SIZES": ALL, "CAPS": "1 8 64"}),
    "metfp8": (1, "metfp8", "28x32", {"SIZES": ALL, "CAPS": "1 8 64", "PROFILE": "1"}),
    "groups": (1, None, "", {}),
    "tpbase": (None, "base", "28x32", {"SIZES": "64x128x128", "CAPS": "1 64"}),
    "tpmet": (None, "met", "28x32", {"SIZES": "64x128x128", "CAPS": "1 64"}),
}
wanted = sys.argv[3].split(",") if len(sys.argv) > 3 else list(PLAN)
TEMP = Path(os.environ.get("LEASE_TEMP", "/tmp/lease"))
TEMP.mkdir(parents=True, exist_ok=True)
failed = []


def left():
    return LIMIT - (time.time() - START)


class Job:
    def __init__(self, name):
        gpu, kind, model, more = PLAN[name]
        self.name, self.file, self.log = name, TEMP / f"{name}.json", TEMP / f"{name}.log"
        self.go, self.ready, self.turn = TEMP / f"{name}.go", TEMP / f"{name}.ready", TEMP / f"{name}.turn"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1" if gpu is None else str(gpu), "VLLM_CACHE_ROOT": str(TEMP / f"cache-{name}"), "GO": str(self.go), **more}
        command = [sys.executable, str(HERE / "groups.py"), str(self.file)]
        if kind:
            command = [sys.executable, str(HERE / "engine.py"), kind, str(self.file), model, *(["2"] if gpu is None else [])]
        if gpu is None:
            environment |= {"READY": str(self.ready), "TURN": str(self.turn)}
        self.begin = time.time()
        self.process = subprocess.Popen(command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def over(self):
        return self.process.poll() is not None

    def end(self):
        """Kill what is left, print the job's own lines, and save all results."""
        if not self.over:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        text = self.log.read_text(errors="replace")
        own = [line for line in text.splitlines() if line.startswith("[")]
        print(*own, sep="\n", flush=True)
        if self.process.returncode:
            failed.append(self.name)
            print(f"{self.name} ended with {self.process.returncode}:", text[-1500:], flush=True)
        with (OUT / "log.txt").open("a") as stream:
            stream.write(f"==== {self.name}\n{text[-400_000:]}\n")
        collect()


def collect():
    found = {}
    for name in PLAN:
        try:
            found[name] = json.loads((TEMP / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    (OUT / "results.json").write_text(json.dumps(found, indent=1))


def queues():
    """Run the jobs of both GPUs."""
    waiting = {gpu: [name for name in PLAN if PLAN[name][0] == gpu and name in wanted] for gpu in (0, 1)}
    running, next_up = {0: None, 1: None}, {0: None, 1: None}
    while left() > 0:
        for gpu in (0, 1):
            job = running[gpu]
            if job is not None and job.over:
                job.end()
                print(f"-- {job.name} took {time.time() - job.began:.0f} s of GPU {gpu}; {left():.0f} s left", flush=True)
                running[gpu] = None
                if len(failed) >= 2 and not (OUT / "results.json").read_text().count("ready"):
                    sys.exit("the first engines failed: ended")
            if running[gpu] is None:
                job = next_up[gpu] or (Job(waiting[gpu].pop(0)) if waiting[gpu] else None)
                next_up[gpu] = None
                if job is not None:
                    job.began = time.time()
                    job.go.touch()
                    running[gpu] = job
            if running[gpu] is not None and next_up[gpu] is None and waiting[gpu] and time.time() - running[gpu].began > 15:
                next_up[gpu] = Job(waiting[gpu].pop(0))
        if not any([*running.values(), *next_up.values(), *waiting.values()]):
            return
        time.sleep(0.2)
    for job in [*running.values(), *next_up.values()]:
        if job is not None:
            job.end()


def parallel(jobs):
    """Two engines with tensor parallelism 2 start together and measure in turn."""
    for job in jobs:
        job.go.touch()
    while left() > 0 and not all(job.over or job.ready.exists() for job in jobs):
        time.sleep(0.2)
    for job in jobs:
        job.turn.touch()
        while left() > 0 and not job.over:
            time.sleep(0.2)
        job.end()


def ratios():
    """The figures of issue 25."""
    found = json.loads((OUT / "results.json").read_text())
    for mine, base, speed in (("met", "base", "1 / "), ("met", "lora", ""), ("met256", "base", ""), ("metfp8", "fp8", ""), ("tpmet", "tpbase", "")):
        first, second = found.get(mine, {}), found.get(base, {})
        shared = [key for key in first if "+" in key and not key.startswith("profile") and key in second]
        if shared:
            print(mine, "to", base, {key: round(second[key][1] / first[key][1], 3) for key in shared}, "ready later by", round(first.get("ready", 0) - second.get("ready", 0), 1), "s", flush=True)
    if "bytes" in found.get("met", {}) and "bytes" in found.get("base", {}):
        own = (Path(os.environ.get("MODELS", "/tmp")) / "m28x32/ck/meteora.safetensors").stat().st_size
        print("memory beyond the base's, as a share of gates and adapters:", round((found["met"]["bytes"] - found["base"]["bytes"]) / own, 3), flush=True)


OUT.mkdir(parents=True, exist_ok=True)
PARALLEL = [name for name in ("tpbase", "tpmet") if name in wanted]
early = [Job(name) for name in PARALLEL] if set(wanted) <= {"groups", *PARALLEL} else []  # nothing else imports or compiles meanwhile
queues()
if PARALLEL and left() > 60:
    parallel(early or [Job(name) for name in PARALLEL])
collect()
ratios()
print("failed:", failed or "none", "after", round(time.time() - START), "s", flush=True)
