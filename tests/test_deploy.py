"""deploy/ without a cluster: files load, name what exists, and agree with the server and with one another.

What needs the running server (routes, series, the probe) is in tests/server/test_metrics.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.cli import serve
from jaxpaged.cli.options import Parser, given_fields
from jaxpaged.config import EngineConfig
from jaxpaged.server.options import ServerOptions

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, each on one line."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def entrypoint() -> list[str]:
    return json.loads(dict(instructions())["ENTRYPOINT"])


def options_of(flags: list[str], tmp_path: Path) -> ServerOptions:
    """What `jaxpaged serve` makes of these flags; a file of keys is one of the test's."""
    parser = Parser("jaxpaged serve", serve.DESCRIPTION, serve.EPILOG)
    serve.add_arguments(parser)
    arguments = parser.parse(flags)
    EngineConfig.from_options(**given_fields(arguments, EngineConfig))
    given = given_fields(arguments, ServerOptions)
    if "api_key_file" in given:
        given["api_key_file"] = str(tmp_path / "keys.txt")
    return ServerOptions(**given)


def deployment() -> dict[str, Any]:
    return load("kubernetes/deployment.yaml")["spec"]["template"]["spec"]


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def test_every_file_loads():
    found = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml", ".json")]
    assert len(found) >= 11
    for path in found:
        assert list(yaml.safe_load_all(path.read_text())), path


def test_the_image_is_nobody_in_particular_and_keeps_one_folder():
    found = instructions()
    last = dict(found)  # of those that are there several times, the last
    stages = [value for name, value in found if name == "FROM"]
    assert all(re.fullmatch(r"python:\$\{PYTHON\}-slim-bookworm( AS \w+)?", one) for one in stages)
    assert re.fullmatch(r"\d+:\d+", last["USER"]) and not last["USER"].startswith("0:")
    names = [name for name, _ in found]
    assert names.index("USER") < names.index("ENTRYPOINT") and "ADD" not in names and names.count("ENTRYPOINT") == 1
    environment = dict(pair.split("=", 1) for pair in shlex.split(last["ENV"]))
    assert last["VOLUME"] == environment["XDG_CACHE_HOME"] == "/cache" and environment["HF_HOME"].startswith("/cache/")
    for value in (value for name, value in found if name == "RUN"):
        assert "sudo" not in value and ("pip" not in value or "--no-cache-dir" in value)
        assert "curl" not in value and "wget" not in value
    extras = next(value for name, value in found if name == "ARG" and value.startswith("EXTRAS=")).removeprefix("EXTRAS=")
    known = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2], re.M
    )
    assert set(extras.split(",")) <= set(known)
    allowed = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    for value in (value for name, value in found if name == "COPY" and "--from" not in value):
        for source in value.split()[:-1]:
            assert (ROOT / source).exists() and source in allowed, source
    assert all((ROOT / one).exists() for one in allowed)


def test_the_images_flags_are_the_servers(tmp_path: Path):
    (tmp_path / "keys.txt").write_text("0123456789abcdef\n")
    words = entrypoint()
    compose, container = load("compose/compose.yaml")["services"]["jaxpaged"], deployment()["containers"][0]
    for flags in (compose["command"], container["args"]):
        options = options_of([*words[2:], *flags], tmp_path)
        assert (options.host, options.port, options.log_format) == ("0.0.0.0", 8000, "json") and options.all_keys()
    assert words[:2] == ["jaxpaged", "serve"] and dict(instructions())["EXPOSE"] == "8000"
    probed = re.search(r"^PORT, TIMEOUT_S = (\d+), (\d+)$", (DEPLOY / "probe.py").read_text(), re.M)
    assert probed is not None and probed[1] == "8000" and int(probed[2]) < container["readinessProbe"]["timeoutSeconds"]


def test_there_is_time_to_drain(tmp_path: Path):
    (tmp_path / "keys.txt").write_text("0123456789abcdef\n")
    pod = deployment()
    container = pod["containers"][0]
    drain_s = options_of([*entrypoint()[2:], *container["args"]], tmp_path).drain_s
    sleep, before = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep" and pod["terminationGracePeriodSeconds"] > drain_s + float(before) + 5
    compose = load("compose/compose.yaml")["services"]["jaxpaged"]
    assert seconds(compose["stop_grace_period"]) > options_of([*entrypoint()[2:], *compose["command"]], tmp_path).drain_s + 5


def test_compose_names_what_there_is():
    compose = load("compose/compose.yaml")
    for name, service in compose["services"].items():
        assert set(service.get("secrets", ())) <= compose["secrets"].keys(), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / "compose" / source).is_file(), volume
    build = compose["services"]["jaxpaged"]["build"]
    assert (DEPLOY / "compose" / build["context"]).resolve() == ROOT and (ROOT / build["dockerfile"]).is_file()
    scrape = load("prometheus/prometheus.yml")["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["jaxpaged:8000"]
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/jaxpaged_key"
    board = load("grafana/provider.yaml")["providers"][0]["options"]["path"]
    mounted = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert f"{board}/jaxpaged.json" in mounted
    ignored = (DEPLOY / ".gitignore").read_text().split()
    secrets = [Path(one["file"]).name for one in compose["secrets"].values()]
    assert set(ignored) == {*secrets, "keys.txt"}  # no key is committed by mistake


def test_the_pod_is_careful():
    pod = deployment()
    container, claims = pod["containers"][0], {one["name"]: one for one in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"] and f"{pod['securityContext']['runAsUser']}:" in dict(instructions())["USER"]
    assert container["securityContext"]["readOnlyRootFilesystem"] and container["securityContext"]["capabilities"] == {
        "drop": ["ALL"]
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == claims.keys() and not pod["automountServiceAccountToken"]
    assert claims["cache"]["persistentVolumeClaim"]["claimName"] == load("kubernetes/cache.yaml")["metadata"]["name"]
    kustomization = load("kubernetes/kustomization.yaml")
    assert claims["keys"]["secret"]["secretName"] == kustomization["secretGenerator"][0]["name"]
    keys = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "keys") + "/keys"
    assert kustomization["secretGenerator"][0]["files"] == ["keys=keys.txt"] and keys in container["args"]
    for name in ("startupProbe", "readinessProbe"):
        assert container[name]["exec"]["command"][2:] == ["/ready", keys]
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    assert load("kubernetes/service.yaml")["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


def run(*command: str, cwd: Path) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kustomize_builds_it(tmp_path: Path):
    folder = tmp_path / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", folder)
    (folder / "keys.txt").write_text("0123456789abcdef\n")
    built = list(yaml.safe_load_all(run("kubectl", "kustomize", str(folder), cwd=tmp_path)))
    kinds = {one["kind"]: one for one in built}
    assert kinds.keys() == {"Secret", "Service", "PersistentVolumeClaim", "Deployment"}
    pod = kinds["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == kinds["Service"]["spec"]["selector"]
    secrets = [one["secret"]["secretName"] for one in pod["spec"]["volumes"] if "secret" in one]
    assert secrets == [kinds["Secret"]["metadata"]["name"]]


def test_promtool_takes_the_rules_and_they_fire_when_they_should():
    folder = DEPLOY / "prometheus"
    assert "6 rules found" in run("promtool", "check", "rules", "rules.yml", cwd=folder)
    run("promtool", "test", "rules", "rules_test.yml", cwd=folder)
    run("promtool", "check", "config", "--syntax-only", "prometheus.yml", cwd=folder)
