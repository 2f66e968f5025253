"""together.py SECONDS OUT JOBS: engines of one GPU that start at the same time and measure one after the other; results in OUT/results.json, logs in OUT/log.txt.

JOBS: names of `PLAN`, separated by commas. All engines import and start together; then each measures alone while the others wait (an engine that is ten seconds later than all
others is stopped meanwhile, and measures last). So the times until an engine
is ready are not those of an engine that starts alone. "beside" is MeteoRA over FP8 weights without one launch for both. What is not done after SECONDS is dropped. MODELS and LARGE: folders of make.py's models with 28 and with 256 adapters.
"""
import atexit, ctypes, json, os, signal, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent
START, LIMIT, OUT = time.time(), float(sys.argv[1]), Path(sys.argv[2])
TEMP = Path(os.environ.get("LEASE_TEMP", "/tmp/together"))
TWO = {"SIZES": "8x128x128 64x128x128", "CAPS": "1 8 64", "CACHE": "3"}
BESIDE = TEMP / "beside.toml"
BESIDE_ROWS = '[[group]]\npath = "packed"\ntokens = [1, 256]\npieces = 1\n'  # no row for one launch
PLAN = {  # name: kind, adapters x layers, environment
    "base": ("base", "28x32", {}),
    "met": ("met", "28x32", {"PROFILE": "8x4x21 256x4x9"}),
    "lora": ("lora", "28x32", {"SIZES": "8x128x128 64x128x128 256x128x128", "CAPS": "1 8 64 256"}),
    "fp8": ("fp8", "28x32", {**TWO, "PROFILE": "8x4x21"}),
    "metfp8": ("metfp8", "28x32", {**TWO, "PROFILE": "8x4x21"}),
    "beside": ("metfp8", "28x32", {**TWO, "METEORA_KERNEL_TABLE": str(BESIDE)}),
    "met256": ("met", "256x32", {"SIZES": "64x128x128", "CAPS": "1 64", "CACHE": "3", "PROFILE": "64x4x9", "MODELS": os.environ.get("LARGE", "/tmp")}),
}
MEASURE = {"base": 26, "met": 32, "lora": 22, "fp8": 12, "metfp8": 12, "beside": 10, "met256": 12}
"""Seconds that must be left for an engine's turn."""


def with_parent():
    """An engine ends when this script does, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def left():
    return LIMIT - (time.time() - START)


class Job:
    def __init__(self, name):
        kind, model, more = PLAN[name]
        self.name, self.file, self.log = name, TEMP / f"{name}.json", TEMP / f"{name}.log"
        self.ready, self.turn = TEMP / f"{name}.ready", TEMP / f"{name}.turn"
        environment = {"CACHE": "9", "UTIL": "0.1", **os.environ, **more, "VLLM_CACHE_ROOT": str(TEMP / f"cache-{name}"), "READY": str(self.ready), "TURN": str(self.turn)}
        self.process = subprocess.Popen([sys.executable, str(HERE / "engine.py"), kind, str(self.file), model], env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=with_parent)

    @property
    def over(self):
        return self.process.poll() is not None

    def end(self):
        """Kill what is left, print the job's own lines, and save all results."""
        killed = not self.over
        if killed:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        text = self.log.read_text(errors="replace")
        print(*(line for line in text.splitlines() if line.startswith("[")), sep="\n", flush=True)
        if self.process.returncode:
            print(f"{self.name}", "was stopped" if killed else f"ended with {self.process.returncode}: {text[-1500:]}", flush=True)
        with (OUT / "log.txt").open("a") as stream:
            stream.write(f"==== {self.name}\n{text[-400_000:]}\n")
        found = {}
        for name in PLAN:
            try:
                found[name] = json.loads((TEMP / f"{name}.json").read_text())
            except (OSError, ValueError):
                continue
        (OUT / "results.json").write_text(json.dumps(found))
        return found


def ratios(found):
    """The figures of issue 25, by throughput."""
    for mine, base in (("met", "base"), ("met", "lora"), ("met256", "base"), ("metfp8", "fp8"), ("beside", "fp8")):
        first, second = found.get(mine, {}), found.get(base, {})
        shared = [key for key in first if "+" in key and " " not in key and key in second]
        if shared:
            print(mine, "to", base, {key: round(second[key][1] / first[key][1], 3) for key in shared}, flush=True)
    if "bytes" in found.get("met", {}) and "bytes" in found.get("base", {}):
        own = (Path(os.environ.get("MODELS", "/tmp")) / "m28x32/ck/meteora.safetensors").stat().st_size
        print("memory beyond the base's, as a share of gates and adapters:", round((found["met"]["bytes"] - found["base"]["bytes"]) / own, 3), flush=True)


OUT.mkdir(parents=True, exist_ok=True)
TEMP.mkdir(parents=True, exist_ok=True)
BESIDE.write_text(BESIDE_ROWS)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda *_: sys.exit("interrupted"))
jobs = [Job(name) for name in sys.argv[3].split(",")]
atexit.register(lambda: [os.killpg(job.process.pid, signal.SIGKILL) for job in jobs if not job.over])
enough = None  # when all but one were ready
while left() > sum(MEASURE[job.name] for job in jobs) * 0.6 and not all(job.over or job.ready.exists() for job in jobs):
    if sum(job.over or job.ready.exists() for job in jobs) >= max(1, len(jobs) - 1):
        enough = enough or time.time()
        if time.time() - enough > 10:
            break
    time.sleep(0.2)
print("ready:", [job.name for job in jobs if job.ready.exists()], "after", round(time.time() - START), "s", flush=True)
found, late = {}, [job for job in jobs if not job.over and not job.ready.exists()]
for job in late:  # they would disturb the others
    os.killpg(job.process.pid, signal.SIGSTOP)
for job in sorted(jobs, key=lambda job: job in late):
    if job in late:
        os.killpg(job.process.pid, signal.SIGCONT)
        while left() > MEASURE[job.name] / 2 and not job.over and not job.ready.exists():
            time.sleep(0.2)
    if left() > MEASURE[job.name] / 2:
        job.turn.touch()
    begin = time.time()
    while left() > 0 and not job.over and job.turn.exists():
        time.sleep(0.2)
    found = job.end()
    print(f"-- {job.name} measured for {time.time() - begin:.0f} s; {left():.0f} s left", flush=True)
ratios(found)
