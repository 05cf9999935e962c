"""What is in deploy/ is held equal to the code, and to the schemas of those who read it."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import kubernetes_validate
import pytest
import typer.main
import yaml

from indexer import app, cli
from indexer.config import DatabaseSettings, Settings
from indexer.db import Database
from indexer.errors import ConfigError, Halted, Temporary, UsageError
from indexer.settings_sources import load_settings
from indexer.sidecar.api import create_app
from indexer.sidecar.app import CANCEL_SECONDS
from indexer.state import State
from indexer.web import Web

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES, SYSTEMD, DOCKER = DEPLOY / "kubernetes", DEPLOY / "systemd", DEPLOY / "docker"
OVERLAYS = ["base", "overlays/production", "overlays/small"]
# The oldest that is looked after, and the newest that the schemas know.
VERSIONS = ["1.33", "1.37"]
# Kinds of others, whose schemas are not Kubernetes' own.
FOREIGN = {"ServiceMonitor", "Kustomization"}
Manifest = dict[str, Any]


def present(command: str) -> str:
    """The path of a command; without it the test is skipped, or fails where all must be there."""
    found = shutil.which(command)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {command} is at hand")
    return found


def documents(path: Path) -> list[Manifest]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one]


def plain() -> Iterator[tuple[Path, Manifest]]:
    """The manifests as they stand in base and overlays."""
    for folder in OVERLAYS:
        for path in sorted((KUBERNETES / folder).glob("*.yaml")):
            for one in documents(path):
                yield path, one


def built(folder: str) -> list[Manifest]:
    """The manifests as kustomize makes them."""
    kustomize = shutil.which("kustomize")
    command = [kustomize, "build"] if kustomize else [shutil.which("kubectl"), "kustomize"]
    if command[0] is None:
        pytest.skip("neither kustomize nor kubectl is at hand")
    done = subprocess.run([*command, str(KUBERNETES / folder)], capture_output=True, text=True, check=False)  # type: ignore[list-item]
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod's specification of each Deployment and Job, by name."""
    kinds = ("Deployment", "Job")
    return {one["metadata"]["name"]: one["spec"]["template"]["spec"] for one in manifests if one["kind"] in kinds}


def check_schema(one: Manifest) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(one, version, strict=True)


def check_pod(pod: Manifest) -> None:
    """What the restricted standard asks for, and what we ask for."""
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    for container in pod["containers"]:
        secure = container["securityContext"]
        assert secure["readOnlyRootFilesystem"] is True and secure["allowPrivilegeEscalation"] is False
        assert secure["capabilities"] == {"drop": ["ALL"]}
        for amounts in ("requests", "limits"):
            assert set(container["resources"][amounts]) == {"cpu", "memory"}
        check_command(container["args"])
        assert [one["name"] for one in container["env"]] == ["INDEXER_SECRETS_DIR"]
        mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert mounts["secrets"] == container["env"][0]["value"]


def check_command(arguments: list[str]) -> str:
    """The command line is one that the program takes; returns the command."""
    group = typer.main.get_command(cli.app)
    context = group.make_context("indexer", list(arguments))
    name, command, rest = group.resolve_command(context, list(arguments))  # type: ignore[attr-defined]
    with command.make_context(name, rest, parent=context) as made:
        assert str(made.params["config"]) == "/etc/indexer/indexer.toml"
    return str(name)


async def paths_of(name: str, settings: Settings) -> set[str]:
    """Which of the probes' paths a process serves."""
    asked = {"/livez", "/readyz", "/metrics"}
    if name == "sidecar":
        application = create_app(settings, Database("postgresql://", DatabaseSettings()), {})
        return asked & {one.canonical for one in application.router.resources()}
    http = settings.http.model_copy(update={"port": 0, "host": "127.0.0.1"})
    state = State("main")
    web = Web(settings.model_copy(update={"http": http}), Database("postgresql://", DatabaseSettings()), [], [], state)
    async with web.serving(), aiohttp.ClientSession() as session:
        found = set()
        for path in asked:
            async with session.get(web.url.rstrip("/") + path) as answer:
                if answer.status != 404:
                    found.add(path)
        return found


class TestKubernetes:
    def test_plain_files_are_valid(self) -> None:
        seen = set()
        for path, one in plain():
            seen.add(one["kind"])
            if one["kind"] not in FOREIGN:
                check_schema(one)
            assert one["kind"] != "Secret", f"{path.name}: secrets are named here, never held"
        expected = {"Deployment", "Job", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"}
        assert expected | FOREIGN <= seen
        for one in documents(KUBERNETES / "examples" / "secret.yaml"):
            check_schema(one)
            assert all("change-me" in value for value in one["stringData"].values())
        with pytest.raises(kubernetes_validate.ValidationError):  # strict, so that a typing error is one
            check_schema({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"port": []}})

    @pytest.mark.parametrize("folder", OVERLAYS)
    def test_what_kustomize_builds_is_valid(self, folder: str) -> None:
        manifests = built(folder)
        names = {(one["kind"], one["metadata"]["name"]) for one in manifests}
        for one in manifests:
            if one["kind"] not in FOREIGN:
                check_schema(one)
        for pod in pods(manifests).values():
            check_pod(pod)
            config = next(one["configMap"]["name"] for one in pod["volumes"] if one["name"] == "config")
            assert ("ConfigMap", config) in names and config != "indexer"
        replicas = {
            one["metadata"]["name"]: one["spec"].get("replicas") for one in manifests if one["kind"] == "Deployment"
        }
        wanted = {"base": (2, 2), "overlays/production": (2, None), "overlays/small": (1, 1)}[folder]
        assert (replicas["indexer"], replicas["indexer-sidecar"]) == wanted
        # with a single pod a budget would only keep its node from being drained
        assert ("PodDisruptionBudget", "indexer") in names or folder == "overlays/small"

    async def test_pods_are_those_of_the_code(self) -> None:
        base = [one for _, one in plain()]
        settings = load_settings(KUBERNETES / "base" / "indexer.toml", environ={}).settings
        assert settings.http.host == settings.sidecar.host == "0.0.0.0"
        found = pods(base)
        assert set(found) == {"indexer", "indexer-sidecar", "indexer-migrate"}
        for pod in found.values():
            check_pod(pod)
        assert check_command(found["indexer-migrate"]["containers"][0]["args"]) == "migrate"
        ports = {"indexer": settings.http.port, "indexer-sidecar": settings.sidecar.port}
        for name, port in ports.items():
            container = found[name]["containers"][0]
            command = check_command(container["args"])
            assert command == {"indexer": "run", "indexer-sidecar": "sidecar"}[name]
            assert container["ports"] == [{"name": "http", "containerPort": port}]
            served = await paths_of(command, settings)
            probes = [container[f"{which}Probe"]["httpGet"] for which in ("startup", "liveness", "readiness")]
            assert [one["path"] for one in probes] == ["/livez", "/livez", "/readyz"]
            assert {one["path"] for one in probes} | {"/metrics"} == served
            assert {one["port"] for one in probes} == {"http"}
            service = next(one for one in base if one["kind"] == "Service" and one["metadata"]["name"] == name)
            assert service["spec"]["ports"] == [{"name": "http", "port": port, "targetPort": "http"}]
        assert found["indexer"]["terminationGracePeriodSeconds"] > app.STOP_SECONDS
        drain = app.STOP_SECONDS + settings.sidecar.drain_seconds + CANCEL_SECONDS
        assert found["indexer-sidecar"]["terminationGracePeriodSeconds"] > drain

    def test_pods_are_guarded(self) -> None:
        """Each has a policy for what comes and goes, and those that serve a budget; nobody is left without a leader."""
        base = [one for _, one in plain()]
        policies = {
            one["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]: one["spec"]
            for one in base
            if one["kind"] == "NetworkPolicy"
        }
        assert set(policies) == set(pods(base))
        for policy in policies.values():
            assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
            for rule in [*policy.get("ingress", []), *policy["egress"]]:
                assert rule.get("ports") and (rule.get("from") or rule.get("to"))
        assert "ingress" not in policies["indexer-migrate"]
        deployments = [one for one in base if one["kind"] == "Deployment"]
        budgets = {one["metadata"]["name"]: one["spec"] for one in base if one["kind"] == "PodDisruptionBudget"}
        for one in deployments:
            labels = one["spec"]["template"]["metadata"]["labels"]
            assert one["spec"]["selector"]["matchLabels"] == labels
            assert one["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
            budget = budgets[one["metadata"]["name"]]
            assert budget["minAvailable"] < one["spec"]["replicas"]
            assert budget["selector"]["matchLabels"] == labels

    def test_the_autoscaler_asks_for_a_metric_of_ours(self) -> None:
        from indexer import metrics

        one = documents(KUBERNETES / "overlays" / "production" / "autoscaler.yaml")[0]
        name = one["spec"]["metrics"][0]["external"]["metric"]["name"]
        rule = documents(KUBERNETES / "examples" / "prometheus-adapter.yaml")[0]["rules"]["external"][0]
        assert rule["name"]["as"] == name
        ours = {f"{family.name}" for family in metrics.registry.collect()}
        asked = set(re.findall(r"indexer_\w+", rule["metricsQuery"] + rule["seriesQuery"]))
        assert asked == {"indexer_job_oldest_seconds", "indexer_gate_closed"} and asked <= ours
        assert re.match(r"indexer_job_oldest_seconds\b", rule["seriesQuery"])

    def test_the_examples_secrets_are_settings(self, tmp_path: Path) -> None:
        for one in documents(KUBERNETES / "examples" / "secret.yaml"):
            folder = tmp_path / one["metadata"]["name"]
            folder.mkdir()
            for name, value in one["stringData"].items():
                (folder / name).write_text(value)
            loaded = load_settings(KUBERNETES / "base" / "indexer.toml", folder, environ={})
            assert loaded.settings.database.url is not None
            for name in one["stringData"]:
                assert loaded.origin(name.replace("__", ".")) == f"secret file {name}"


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """A unit's sections: the values of each key, in order."""

    class Many(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: str, value: Any) -> None:
            if isinstance(value, list) and key in self:
                self[key].extend(value)
            else:
                super().__setitem__(key, value)

    parser = configparser.RawConfigParser(dict_type=Many, strict=False, delimiters="=", comment_prefixes="#")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(SYSTEMD / name)
    return {part: {key: value.split("\n") for key, value in parser.items(part)} for part in parser.sections()}


class TestSystemd:
    @pytest.mark.parametrize("name", ["indexer.service", "indexer-sidecar.service"])
    def test_units_say_what_the_code_does(self, name: str) -> None:
        service = unit(name)["Service"]
        program, *arguments = service["ExecStart"][0].split()
        assert program == "/opt/indexer/bin/indexer"
        command = check_command(arguments)
        assert command == {"indexer.service": "run", "indexer-sidecar.service": "sidecar"}[name]
        assert service["Type"] == ["notify"] and service["Restart"] == ["on-failure"]
        stays = {int(code) for code in service["RestartPreventExitStatus"][0].split()}
        assert stays == {UsageError.exit_code, ConfigError.exit_code, Halted.exit_code}
        assert Temporary.exit_code not in stays and 1 not in stays
        stop = float(service["TimeoutStopSec"][0])
        drain = Settings().sidecar.drain_seconds + CANCEL_SECONDS if command == "sidecar" else 0
        assert stop > app.STOP_SECONDS + drain
        assert 10 <= float(service["WatchdogSec"][0]) <= Settings().http.stall_seconds
        # the variables that it sets are none of ours: settings stand in the file, secrets in credentials
        assert not any("INDEXER_" in one for one in service["Environment"])

    def test_verify_and_security(self, tmp_path: Path) -> None:
        """Clean to systemd itself, with this program in place of the one that is installed."""
        analyze = present("systemd-analyze")
        for name in ("indexer.service", "indexer-sidecar.service"):
            text = (SYSTEMD / name).read_text()
            (tmp_path / name).write_text(text.replace("/opt/indexer/bin/indexer", sys.executable))
            done = subprocess.run([analyze, "verify", tmp_path / name], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout + done.stderr) == (0, "")
            done = subprocess.run(
                [analyze, "security", "--offline=yes", "--threshold=20", tmp_path / name],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-300:] + done.stderr

    def test_user_and_folders(self, tmp_path: Path) -> None:
        """What the two snippets make, in a root of their own: a user without a shell, folders that only root reads."""
        sysusers, tmpfiles = present("systemd-sysusers"), present("systemd-tmpfiles")
        for kind in ("sysusers.d", "tmpfiles.d"):
            (tmp_path / "etc" / kind).mkdir(parents=True)
            shutil.copy(SYSTEMD / kind / "indexer.conf", tmp_path / "etc" / kind)
        root = f"--root={tmp_path}"
        subprocess.run([sysusers, root, "indexer.conf"], check=True, capture_output=True)
        assert re.search(r"^indexer:.*:/:/usr/sbin/nologin$", (tmp_path / "etc" / "passwd").read_text(), re.M)
        if os.geteuid() != 0:
            pytest.skip("only root can give folders to root")
        secrets = tmp_path / "etc" / "indexer" / "secrets"
        (secrets / "daemon").mkdir(parents=True)
        (secrets / "daemon" / "database__url").write_text("left open")
        subprocess.run([tmpfiles, root, "--create", "indexer.conf"], check=True, capture_output=True)
        modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in [secrets.parent, *secrets.parent.rglob("*")]}
        wanted = {"indexer": 0o755, "secrets": 0o700, "daemon": 0o700, "sidecar": 0o700, "database__url": 0o600}
        assert modes == wanted

    def test_credentials_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder as LoadCredential hands it on: each file under the folder's name and its own."""
        monkeypatch.chdir(tmp_path)  # where there is no developer's indexer.toml
        for name in ("indexer.service", "indexer-sidecar.service"):
            prefix, _, folder = unit(name)["Service"]["LoadCredential"][0].partition(":")
            assert folder.startswith("/etc/indexer/secrets/")
            (tmp_path / f"{prefix}_database__url").write_text("postgresql://user:secret@host/indexer\n")
            (tmp_path / f"{prefix}_auth__cron_secret").write_text("told to nobody\n")
            loaded = load_settings(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})
            assert loaded.settings.database.url is not None
            assert loaded.settings.database.url.get_secret_value() == "postgresql://user:secret@host/indexer"
            assert loaded.settings.auth.cron_secret is not None


class TestDocker:
    compose: Manifest = yaml.safe_load((DOCKER / "compose.yaml").read_text())

    def test_everybody_is_confined(self) -> None:
        services = self.compose["services"]
        assert set(services) == {"postgres", "indexer", "sidecar", "prometheus", "grafana"}
        for name, one in services.items():
            assert one["cap_drop"] == ["ALL"] and "cap_add" not in one and "privileged" not in one, name
            assert one["security_opt"] == ["no-new-privileges:true"] and one["read_only"] is True, name
            assert re.fullmatch(r"[1-9]\d*:\d+", one["user"]), name
            assert one["tmpfs"] and one["mem_limit"] and one["pids_limit"], name
            assert one["image"] == "indexer:0.1.0" or re.search(r":[\w.-]+@sha256:[0-9a-f]{64}$", one["image"]), name
            assert all(port.startswith("127.0.0.1:") for port in one.get("ports", [])), name
            # secrets are files
            assert not any("password" in key.lower() and "FILE" not in key for key in one.get("environment", {})), name
            assert set(one.get("secrets", [])) <= set(self.compose["secrets"]), name
        internal = {name for name, one in self.compose["networks"].items() if one.get("internal")}
        assert internal == {"database", "metrics"}
        assert services["postgres"]["networks"] == ["database"] and services["prometheus"]["networks"] == ["metrics"]
        assert "database" not in services["grafana"]["networks"]
        assert "chain__endpoints" not in services["sidecar"]["secrets"]

    def test_it_fits_the_program_and_prometheus(self) -> None:
        services = self.compose["services"]
        settings = load_settings(DOCKER / "indexer.example.toml", environ={}).settings
        assert check_command(services["indexer"]["command"]) == "run"
        assert check_command(services["sidecar"]["command"]) == "sidecar"
        ports = {"indexer": settings.http.port, "sidecar": settings.sidecar.port}
        for name, port in ports.items():
            assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert f"127.0.0.1:{settings.sidecar.port}/livez" in services["sidecar"]["healthcheck"]["test"][-1]
        image = (DOCKER / "Dockerfile").read_text()
        assert f"127.0.0.1:{settings.http.port}/livez" in image
        assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+-slim@sha256:[0-9a-f]{64}$", image, re.M)
        assert set(re.findall(r"^FROM (\S+)", image, re.M)) == {"${PYTHON_IMAGE}"} and "\nUSER 10001:10001\n" in image
        variables = dict(re.findall(r"(INDEXER_\w+)=(\S+)", image))
        assert load_settings(DOCKER / "indexer.example.toml", environ=variables).settings.sidecar.host == "0.0.0.0"
        drain = app.STOP_SECONDS + settings.sidecar.drain_seconds + CANCEL_SECONDS
        assert float(services["sidecar"]["stop_grace_period"].rstrip("s")) > drain
        assert float(services["indexer"]["stop_grace_period"].rstrip("s")) > app.STOP_SECONDS

    def test_secrets_are_made_once_and_read(self, tmp_path: Path) -> None:
        script = Path(shutil.copy(DOCKER / "make-secrets.sh", tmp_path))
        assert subprocess.run([script], capture_output=True, check=False).returncode == 2
        for _ in range(2):
            subprocess.run([script, "https://node.example.org/key"], check=True)
            made = {one.name: one.read_text() for one in (tmp_path / "secrets").iterdir()}
            assert set(made) == set(self.compose["secrets"])
        assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
        assert made["postgres_password"] in made["database__url"]
        for name in ("indexer", "sidecar"):
            folder = tmp_path / name
            folder.mkdir()
            for secret in self.compose["services"][name]["secrets"]:
                shutil.copy(tmp_path / "secrets" / secret, folder)
            url = load_settings(DOCKER / "indexer.example.toml", folder, environ={}).settings.database.url
            assert url is not None and url.get_secret_value() == made["database__url"]
        assert len({made[name] for name in made if name.startswith(("auth", "listening", "grafana"))}) == 4


def test_no_secret_stands_in_the_tree() -> None:
    """Nothing that looks like a password in an address, or a key, but the examples' change-me."""
    for path in sorted(DEPLOY.rglob("*")):
        if not path.is_file() or path.parent.name == "secrets":
            continue
        text = path.read_text()
        for found in re.findall(r"://[^\s/:@]+:([^\s/@]+)@", text):
            assert found == "change-me", path
        assert not re.search(r"-----BEGIN|sk_live|eyJ[A-Za-z0-9_-]{10}", text), path


def test_the_toml_files_are_settings() -> None:
    for path in (KUBERNETES / "base" / "indexer.toml", DOCKER / "indexer.example.toml"):
        assert "sidecar" in Settings(**tomllib.loads(path.read_text())).model_fields_set  # its migrations, too
