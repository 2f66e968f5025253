"""The files of examples/serving: a container, a Compose file, a systemd unit and a configuration of nginx."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from meteora_cli.tree import command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "serving"


def understood(words: list[str]) -> None:
    """Parse a command of `meteora`; nothing is run."""
    item: Any = command()
    name, found, rest = item.resolve_command(item.make_context("meteora", [], resilient_parsing=True), words)
    context = found.make_context(name, rest)
    assert not context.args


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["meteora"]
    return loaded


def test_the_container_runs_as_nobody_in_particular_and_checks_its_health() -> None:
    service, lines = compose(), (FOLDER / "Dockerfile").read_text().splitlines()
    assert service["user"] == "10001"
    assert any("--uid 10001" in line for line in lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER meteora"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cache:/cache" in service["volumes"]
    variables = dict(word.split("=") for line in lines if line.startswith("ENV ") for word in line.split()[1:])
    assert all(variables[name].startswith("/cache") for name in ("METEORA_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"))
    assert service["ports"][0].startswith("127.0.0.1:")
    assert "METEORA_API_KEY" in service["environment"]
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    entry = next(line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT"))
    understood([*yaml.safe_load(entry)[1:], *service["command"]])
    checks = [service["healthcheck"]["test"][1:], yaml.safe_load(next(line.strip().removeprefix("CMD ") for line in lines if line.strip().startswith("CMD")))]
    assert checks[0] == checks[1]


def test_the_health_check_fails_without_a_server_and_passes_with_one(world_server: str) -> None:
    program = compose()["healthcheck"]["test"][3]
    for url, code in ((world_server, 0), ("http://127.0.0.1:9", 1)):
        done = subprocess.run([sys.executable, "-c", program.replace("http://127.0.0.1:8000", url)], capture_output=True, timeout=60)
        assert done.returncode == code


@pytest.fixture
def world_server() -> Any:
    import http.server
    import threading

    class Healthy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_docker_understands_the_compose_files(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("needs docker compose")
    environment = {**os.environ, "METEORA_API_KEY": "secret"}
    files = [part for name in ("compose.yaml", "compose.gpu.yaml") for part in ("-f", str(FOLDER / name))]
    done = subprocess.run([docker, "compose", *files, "config"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    environment.pop("METEORA_API_KEY")
    refused = subprocess.run([docker, "compose", *files, "config"], env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "set it first" in refused.stderr


def test_the_unit_is_understood(tmp_path: Path) -> None:
    text = (FOLDER / "meteora.service").read_text()
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/meteora")
    understood(words)
    assert unit["Service"]["DynamicUser"] == "yes"
    assert unit["Service"]["EnvironmentFile"] == "/etc/meteora.env"
    analyse = shutil.which("systemd-analyze")
    if analyse is None:
        pytest.skip("needs systemd-analyze")
    here = tmp_path / "meteora.service"
    here.write_text(text.replace(program, sys.executable))
    done = subprocess.run([analyse, "verify", str(here)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "meteora.service" not in done.stderr, done.stderr


def test_the_configuration_of_nginx_keeps_streams() -> None:
    text = (FOLDER / "nginx.conf").read_text()
    assert text.count("{") == text.count("}")
    for setting in ("proxy_buffering off", "proxy_read_timeout 3600s", "proxy_http_version 1.1"):
        assert re.search(rf"^\s*{setting};", text, re.MULTILINE)


def test_nginx_understands_its_configuration(tmp_path: Path) -> None:
    nginx, openssl = shutil.which("nginx"), shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("needs nginx and openssl")
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "pem"), "-subj", "/CN=localhost"]
    subprocess.run([openssl, *made], check=True, capture_output=True, timeout=60)
    text = re.sub(r"(ssl_certificate(?:_key)?) \S+\.(pem|key);", rf"\1 {tmp_path}/\2;", (FOLDER / "nginx.conf").read_text())
    (tmp_path / "meteora.conf").write_text(text)
    whole = f"pid {tmp_path}/pid; error_log {tmp_path}/errors; events {{}} http {{ access_log off; include {tmp_path}/meteora.conf; }}"
    (tmp_path / "nginx.conf").write_text(whole)
    done = subprocess.run([nginx, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
