"""Secrets of the environment, overrides or a recipe are in no run, page, bundle or command line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from nemo_minitron.api import load_plan, load_recipe
from nemo_minitron.config.compose import write_out
from nemo_minitron.errors import ConfigError
from nemo_minitron.launch.context import ENVIRONMENT_FILE
from nemo_minitron.processes import output
from nemo_minitron.processes.output import without_secrets
from nemo_minitron.system.disclosure import looks_secret, masked, masked_command, public_recipe, secrets_in
from nemo_minitron.system.safe_files import open_log
from tests.conftest import TOY, Cli
from tests.support.fake_slurm import FakeSlurm

MARK = "s3cr3t"
OF_ENVIRONMENT = {"HF_TOKEN": f"hf_{MARK}_environment", "MY_API_KEY": f"{MARK}-of-the-shell-&<'\"", "HTTPS_PROXY": ""}
FOR_THE_OWNER = ("plan.json", "recipe.json", "call.json", ENVIRONMENT_FILE)
"""Files of a run that must contain values."""
STAGES = {
    "teacher": {"kind": "import", "source": "asset:toy-llama"},
    "data": {"kind": "tokenize", "sources": [{"source": "asset:toy-text"}]},
    "export": {"kind": "export", "inputs": {"model": "teacher", "teacher": "teacher", "evaluations": []}},
    "report": {"kind": "report", "inputs": {"stages": ["teacher", "data", "export"]}},
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a recipe with secrets in every possible place, in a separate folder."""
    for name, value in OF_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    notice = ["/bin/sh", "-c", "printenv MINITRON_MESSAGE >>notices; exit 3", f"https://hooks.example/{MARK}"]
    cluster = {"environment": {"WANDB_API_KEY": f"{MARK}_site", "PLAIN": f"{MARK}_plain", "T": "${oc.env:HF_TOKEN}"}}
    execution = {"run_root": str(tmp_path / "runs"), "notify_command": notice, "cluster": cluster}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"stages": STAGES, "execution": execution}, sort_keys=False))
    return file


def _leaks(folder: Path) -> list[str]:
    """Return files that contain the mark, except those that only their owner can read."""
    found = []
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or MARK.encode() not in file.read_bytes():
            continue
        if file.name not in FOR_THE_OWNER or stat.S_IMODE(file.stat().st_mode) != 0o600:
            found.append(str(file.relative_to(folder)))
    return found


def test_no_secret_is_in_a_finished_run(recipe: Path, minitron: Cli, tmp_path: Path) -> None:
    override = f"execution.cluster.environment.GIVEN={MARK}_override"
    code, printed = minitron("run", recipe, override)
    assert code == 0, printed
    run = tmp_path / "runs/mine"
    assert (run / "report.html").is_file()
    assert (run / "export/README.md").is_file()
    assert MARK in (run / "plan.json").read_text(), "the attack: this value is there"
    assert _leaks(run) == []
    assert MARK not in printed
    host = os.uname().nodename
    assert host not in (run / "export/../teacher/manifest.json").read_text()
    assert (run / ".lock").read_text() == "", "who has worked here, and with which words, is gone with the lock"


def test_an_error_with_a_secret_in_it_is_masked_in_notices_and_logs(
    recipe: Path, minitron: Cli, tmp_path: Path
) -> None:
    secret = OF_ENVIRONMENT["HF_TOKEN"]
    code, printed = minitron("run", recipe, f"stages.teacher.source={tmp_path}/{secret}", "--until", "teacher")
    assert code == 2
    assert MARK not in printed
    assert _leaks(tmp_path / "runs") == []


def test_a_launch_passes_values_to_its_jobs_in_a_file_that_only_the_owner_can_read(
    recipe: Path, minitron: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    fake.set("sbatch", f'tr "\\0" " " </proc/$$/cmdline >>{tmp_path}/cmdline; cp "${{@: -1}}" {tmp_path}; echo 7')
    fake.set("squeue", "exit 0")
    code, printed = minitron("launch", recipe, "launcher=slurm", f"execution.cluster.environment.GIVEN={MARK}_override")
    assert code == 0, printed
    run = tmp_path / "runs/mine"
    assert _leaks(run) == []
    assert MARK not in printed + (tmp_path / "cmdline").read_text()
    assert stat.S_IMODE((run / "logs/slurm").stat().st_mode) == 0o700, "what Slurm writes there is masked by nobody"
    script = run / "launch/001/teacher.sh"
    assert MARK not in script.read_text()
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    values = f'. {run}/launch/001/{ENVIRONMENT_FILE}; printf "%s %s" "$WANDB_API_KEY" "$GIVEN"'
    done = subprocess.run(["sh", "-c", values], capture_output=True, text=True, check=True)
    assert done.stdout == f"{MARK}_site {MARK}_override"
    code, shown = minitron("launch", recipe, "launcher=slurm", "--dry-run")
    assert code == 0
    assert MARK not in shown


@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_a_container_gets_values_but_no_command_line_has_them(
    runtime: str, recipe: Path, minitron: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    look = f'tr "\\0" "\\n" </proc/$$/cmdline >>{tmp_path}/cmdline; env >{tmp_path}/env'
    # Apptainer runs what follows the image; docker takes variables from its own environment.
    inner = 'while [ "$1" != env ]; do shift; done; "${@:1:$#-4}" env >>' + f"{tmp_path}/env"
    (programs / runtime).write_text(f"#!/bin/bash\n{look}\n{inner if runtime == 'apptainer' else ''}\nexit 0\n")
    (programs / runtime).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    image = "docker://x/y:z" if runtime == "apptainer" else "x/y:z"
    where = [f"execution.cluster.container={{runtime: {runtime}, core_image: '{image}'}}"]
    where += ["execution.cluster.environment.PATH=/in/the/image"] if runtime == "docker" else []
    code, printed = minitron("launch", recipe, *where)
    assert code == 0, printed
    assert MARK not in printed + (tmp_path / "cmdline").read_text()
    assert _leaks(tmp_path / "runs") == []
    assert f"WANDB_API_KEY={MARK}_site" in (tmp_path / "env").read_text()
    if runtime == "docker":
        assert "--env=WANDB_API_KEY\n" in (tmp_path / "cmdline").read_text()
        assert "--env=PATH=/in/the/image\n" in (tmp_path / "cmdline").read_text(), "docker itself needs its own"


def test_a_bundle_has_no_secret_no_command_and_no_config(recipe: Path, minitron: Cli, tmp_path: Path) -> None:
    site = tmp_path / "configs/cluster/mine.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(f"environment: {{OTHER: {MARK}_config}}\n")
    words = [f"execution.cluster.environment.GIVEN={MARK}_override", "--out", tmp_path / "b.tar", "--no-wheels"]
    code, printed = minitron("bundle", recipe, *words)
    assert code == 0, printed
    assert MARK not in printed
    assert "execution.cluster.environment.WANDB_API_KEY" in printed, "what is left out is told"
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    assert _leaks(tmp_path / "there") == []
    text = (tmp_path / "there/b/recipes/mine.yaml").read_text()
    assert yaml.safe_load(text)["execution"]["cluster"]["environment"] == {"T": "${oc.env:HF_TOKEN}"}
    assert str(tmp_path) not in (tmp_path / "there/b/manifest.json").read_text()


def test_a_bundle_keeps_references_of_a_named_cluster_to_the_environment(recipe: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "account: ${oc.env:HF_TOKEN}\nqos: ${account}\nsetup_script: ${oc.env:MY_API_KEY}/env.sh\n"
        "environment: {S: '${oc.env:HF_TOKEN}'}\ncommand: env T=${oc.env:HF_TOKEN} minitron\n"
    )
    text = write_out(recipe, [f"cluster={site}"], {})
    assert MARK not in text
    written = yaml.safe_load(text)["execution"]["cluster"]
    assert written == {
        "account": "${oc.env:HF_TOKEN}",
        "qos": "${execution.cluster.account}",
        "setup_script": "${oc.env:MY_API_KEY}/env.sh",
        "environment": {"S": "${oc.env:HF_TOKEN}", "T": "${oc.env:HF_TOKEN}"},
        "command": "env T=${oc.env:HF_TOKEN} minitron",
    }


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HF_TOKEN}",
        "a ${oc.env:HF_TOKEN,x} b",
        "${oc.decode:${oc.env:HF_TOKEN}}",
        "${execution.wandb_project}",
        "${execution.cluster.environment.WANDB_API_KEY}",
        "${oc.select:execution.cluster.environment.WANDB_API_KEY}",
        "${execution.notify_command.3}",
    ],
)
def test_a_recipe_cannot_publish_values_of_the_environment(recipe: Path, text: str) -> None:
    overrides = ["execution.wandb_project=${oc.env:HF_TOKEN}", f"stages.report.title='{text}'"]
    with pytest.raises(ConfigError, match=r"stages\.report\.title takes its value from") as refused:
        load_recipe(recipe, overrides)
    assert MARK not in str(refused.value)
    assert "on the command line" in str(refused.value)


def test_in_execution_a_variable_is_read(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["execution.wandb_project=${oc.env:HF_TOKEN}"])
    assert loaded.execution.wandb_project == OF_ENVIRONMENT["HF_TOKEN"]
    assert loaded.execution.cluster is not None
    assert loaded.execution.cluster.environment["T"] == OF_ENVIRONMENT["HF_TOKEN"]


@pytest.mark.parametrize(
    "override",
    [
        f"execution.cluster.environment={MARK}",
        f"execution.notify_command={MARK}",
        f"execution.cluster={MARK}",
    ],
)
def test_a_message_about_a_wrong_value_does_not_repeat_it(recipe: Path, override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, [override])
    assert MARK not in str(refused.value)
    assert "execution." in str(refused.value)


def test_pages_show_an_allowed_list_of_execution() -> None:
    recipe = load_plan(TOY, ["cluster=slurm"], checked=False).recipe.model_dump(mode="json")
    shown = public_recipe(recipe)["execution"]
    assert {"device", "parallel", "launcher"} <= set(shown)
    assert not {"cluster", "notify_command", "run_root", "assets_dir", "wandb_project"} & set(shown)


@pytest.mark.parametrize("name", ["HF_TOKEN", "aws_secret_access_key", "DB_PASSWORD", "APIKEY", "MY_KEY", "PGPASS_PWD"])
def test_names_that_hold_secrets(name: str) -> None:
    assert looks_secret(name)
    assert masked("x a-value y", {name: "a-value"}) == "x *** y"


@pytest.mark.parametrize("name", ["PWD", "TOKENIZERS_X", "HF_TOKEN_PATH", "MONKEY", "SSH_AUTH_SOCK", "no_proxy"])
def test_names_that_hold_none(name: str) -> None:
    assert not looks_secret(name)


def test_what_is_masked() -> None:
    assert secrets_in({"A_TOKEN": "12345"}) == [], "so short a text is a word like others"
    assert masked("https://me:pass@host/x") == "https://me:***@host/x"
    odd = {"A_KEY": "a'b\"c\u00e4\nsecond"}
    assert masked(f"{odd} {json.dumps(odd)}", odd) == """{'A_KEY': '***'} {"A_KEY": "***"}"""
    assert masked("long abcdefgh and abcdef", {"A_KEY": "abcdef", "B_KEY": "abcdefgh"}) == "long *** and ***"
    words = ["/home/me/bin/minitron", "run", "/home/me/r.yaml", "stages.x=1", "--rerun", "a", "--html=/x/y"]
    assert masked_command(words) == ["minitron", "run", "r.yaml", "stages.x=***", "--rerun", "a", "--html=***"]


_CHATTY = """
import os, sys, time
secret = os.environ["HF_TOKEN"]
print("one", secret, flush=True)
for part in ("a bar 50%\\r", secret[:5], secret[5:] + "\\n", "\\udcff", "x" * (3 << 20), secret, "y" * (1 << 20)):
    os.write(2, part.encode(errors="surrogateescape"))
    time.sleep(0.05)
print(" https://me:pass@host/", "recipe's own", sys.argv[1])
"""


def test_output_of_processes_is_masked_before_it_reaches_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output like that of ranks and NeMo-Aligner's processes: in parts, in other encodings, in lines without an end."""
    monkeypatch.setenv("HF_TOKEN", OF_ENVIRONMENT["HF_TOKEN"])
    own = f"{MARK}-\u00e4-of-the-recipe"
    with open_log(tmp_path / "log") as log, without_secrets(log, {"SITE_KEY": own, "PLAIN": "recipe's"}) as stream:
        subprocess.run([sys.executable, "-c", _CHATTY, own], stdout=stream, stderr=stream, check=True)
    message = (tmp_path / "log").read_bytes()
    assert MARK.encode() not in message
    assert message.count(b"***") == 5
    assert message.startswith(b"one ***\na bar 50%\r***\n\xffxx")
    assert message.endswith(b"xx***" + b"y" * (1 << 20) + b" https://me:***@host/ recipe's own ***\n")


def test_the_process_that_copies_a_log_outlives_its_runner_and_exits_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "TIMEOUT_S", 0.1)
    late = 'import time; time.sleep(1); print("saved", flush=True)'
    with open_log(tmp_path / "log") as log, without_secrets(log) as stream:
        left = subprocess.Popen([sys.executable, "-c", late], stdout=stream)
    assert (tmp_path / "log").read_text() == ""
    assert left.wait() == 0
    until = time.monotonic() + 10
    while not (tmp_path / "log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert (tmp_path / "log").read_text() == "saved\n"


@pytest.mark.slow
def test_no_secret_is_in_a_whole_toy_run_or_on_a_command_line(tmp_path: Path) -> None:
    """Run two processes, so that ranks get task files too, and inspect every process that runs meanwhile."""
    # Every rank prints its whole environment.
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: print(os.environ, flush=True)\n")
    environment = {**os.environ, **OF_ENVIRONMENT, "PYTHONPATH": str(tmp_path)}
    program = Path(sys.executable).with_name("minitron")
    # A variable of the environment, because typed values are on the command line of `minitron` itself.
    site = tmp_path / "site.yaml"
    site.write_text(f"environment: {{WANDB_API_KEY: {MARK}_site}}\n")
    words = [f"execution.run_root={tmp_path}/runs", f"cluster={site}", "execution.parallel.dp=2"]
    process = subprocess.Popen([str(program), "run", str(TOY), *words], env=environment, stdout=subprocess.DEVNULL)
    seen = ""
    while process.poll() is None:
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen += file.read_bytes().decode(errors="replace") if f"{tmp_path}" in file.read_text() else ""
            except OSError:
                continue
        time.sleep(0.3)
    assert process.returncode == 0
    assert "worker" in seen, "the orders of workers were looked at"
    assert MARK not in seen
    assert _leaks(tmp_path / "runs") == []
    logs = "".join(file.read_text() for file in (tmp_path / "runs").rglob("*.ranks.log"))
    assert "'HF_TOKEN': '***'" in logs
