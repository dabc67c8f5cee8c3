"""The script for TPU VMs: sound shell, its gcloud commands, and its restarts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import TPU_VM, Launch

# Stand-ins for what only a cloud has: each notes how it was called and answers as told.
NOTES = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$NOTES"
"""
DOCKER = (
    NOTES
    + '[[ $1 == rm ]] && exit 0\nread -r code < "$CODES"\nsed -i 1d "$CODES"\nexit "$code"\n'
)
GCLOUD = (
    NOTES
    + '[[ $* == *describe* ]] && echo "${STATE:-ACTIVE}"\n[[ $* == *"cp -"* ]] && cat >> "$NOTES"\nexit 0\n'
)


@pytest.fixture
def script(launch: Launch, tmp_path: Path) -> Path:
    code, out, err = launch("--dry-run", "--skip-compile", **TPU_VM, max_restarts="2")
    assert code == 0, err
    file = tmp_path / "job.sh"
    file.write_text(out)
    return file


def run(script: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Run the script, and return its exit code and the calls that it made."""
    tools = script.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("docker", DOCKER), ("gcloud", GCLOUD)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    notes = script.parent / "notes"
    notes.write_text("")
    given = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "PAUSE_SECONDS": "0",
    }
    done = subprocess.run(
        ["bash", str(script), *words],
        env=given | environment,
        capture_output=True,
        check=False,
    )
    return done.returncode, notes.read_text().splitlines()


def test_the_script_is_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checker, "the extra dev brings it"
    done = subprocess.run(
        [checker, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_up_asks_for_the_slice_and_starts_every_host(script: Path) -> None:
    code, calls = run(script, "up")
    place = "--project=my-project --zone=us-west4-a"
    assert code == 0
    assert calls[0] == (
        "gcloud compute tpus queued-resources create synthetic --accelerator-type=v5litepod-16 "
        f"--runtime-version=v2-alpha-tpuv5-lite --node-id synthetic {place}"
    )
    assert calls[2].startswith(
        f"gcloud compute tpus queued-resources scp {script} synthetic:synthetic.sh --node=all"
    )
    assert [call for call in calls[3:] if "--node=all --worker=all" in call] == calls[
        3:
    ]
    assert "bash synthetic.sh host-setup" in calls[3]
    assert "sudo systemd-run --collect --unit=synthetic" in calls[4]
    assert "host-train" in calls[4]


def test_several_slices_are_nodes_of_one_resource(
    launch: Launch, tmp_path: Path
) -> None:
    big = ("--config.data.batch_size=128", "--spot", "--dry-run", "--skip-compile")
    account = "trainer@my-project.iam.gserviceaccount.com"
    _, out, _ = launch(
        *big, **TPU_VM, topology="v5p:2x4x4", slices="2", service_account=account
    )
    script = tmp_path / "two.sh"
    script.write_text(out)
    _, calls = run(script, "create")
    assert (
        "--accelerator-type=v5p-64 --runtime-version=v2-alpha-tpuv5 --node-count 2 --node-prefix synthetic"
        in calls[0]
    )
    assert f"--service-account {account} --spot" in calls[0]


def test_a_resource_that_failed_ends_the_wait(script: Path) -> None:
    code, calls = run(script, "up", STATE="FAILED")
    assert code == 1
    assert len(calls) == 2


def test_another_config_goes_to_the_run_s_folder_as_it_stands(
    launch: Launch, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    text = (
        Path(__file__).parents[2] / "configs" / "synthetic.py"
    ).read_text() + "# it's mine: $HOME `date` \\\n"
    own.write_text(text)
    _, out, _ = launch("--dry-run", "--skip-compile", config=str(own), **TPU_VM)
    script = tmp_path / "own.sh"
    script.write_text(out)
    _, calls = run(script, "setup")
    assert calls[0] == "gcloud storage cp - gs://my-bucket/runs/own/launch_config.py"
    assert "\n".join(calls[1 : calls.index(calls[-2])]) + "\n" == text
    assert "--config=gs://my-bucket/runs/own/launch_config.py" in out


@pytest.mark.parametrize(
    ("codes", "ends", "runs"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([3], 3, 1),
        ([4], 4, 1),
        ([1, 2], 2, 2),
        ([1, 0], 0, 2),
        ([1, 137, 1], 1, 3),
        ([75, 75, 75, 75, 1, 75, 1, 0], 0, 8),
        ([75, 1, 75, 1, 75, 1], 1, 6),
        ([74, 0], 0, 2),
        ([74, 5, 74], 74, 3),
        ([143, 143, 143, 143, 75, 0], 0, 6),
    ],
)
def test_a_host_restarts_where_it_can_help(
    script: Path, codes: list[int], ends: int, runs: int
) -> None:
    queue = script.parent / "codes"
    queue.write_text("".join(f"{code}\n" for code in codes))
    devices = script.parent / "devices"
    (devices / "vfio").mkdir(parents=True)
    (devices / "accel0").symlink_to("/dev/null")
    (devices / "vfio" / "7").symlink_to("/dev/null")
    (devices / "accel_log").touch()
    code, calls = run(script, "host-train", CODES=str(queue), DEVICES=str(devices))
    trained = [call for call in calls if call.startswith("docker run")]
    assert (code, len(trained)) == (ends, runs)
    # The chips of this host, and no other rights.
    assert f"--device={devices}/accel0 --device={devices}/vfio/7 " in trained[0]
    assert "--ulimit=memlock=-1" in trained[0]
    assert "privileged" not in trained[0]
    assert "--env=JAX_PLATFORMS=tpu" in trained[0]
    assert trained[0].endswith(
        "tokenrec train --distributed --config=synthetic --data=/gcs/data/synthetic "
        "--workdir=gs://my-bucket/runs/synthetic --quiet"
    )


PACKAGE = b"a package"
INSTALLS = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$NOTES"
[[ $1 == -fsSLo ]] && printf %s "a package" > "$2"
exit 0
"""


def host_setup(
    launch: Launch, tmp_path: Path, digest: str
) -> tuple[int, list[str], str]:
    """Run `host-setup` on a host without gcsfuse; return code, calls and stderr."""
    _, out, _ = launch(
        "--dry-run", "--skip-compile", **TPU_VM | {"gcsfuse_sha256": digest}
    )
    script = tmp_path / "job.sh"
    script.write_text(out)
    tools, notes = tmp_path / "tools", tmp_path / "notes"
    tools.mkdir()
    notes.write_text("")
    for name in ("curl", "sudo"):
        (tools / name).write_text(INSTALLS)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(script), "host-setup"],
        env={
            "PATH": f"{tools}:/usr/bin:/bin",
            "NOTES": str(notes),
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, notes.read_text().splitlines(), done.stderr


def test_a_host_installs_the_package_of_the_digest_from_a_folder_of_its_own(
    launch: Launch, tmp_path: Path
) -> None:
    digest = hashlib.sha256(PACKAGE).hexdigest()
    code, calls, _ = host_setup(launch, tmp_path, digest)
    assert code == 0
    package = calls[0].split()[2]
    # A name that nobody can know before.
    assert re.fullmatch(rf"{tmp_path}/tmp\.\w+/gcsfuse_[\d.]+_amd64\.deb", package)
    assert calls[1] == f"sudo apt-get install -y {package}"
    assert not Path(package).parent.exists()


@pytest.mark.parametrize("digest", ["0" * 64, "installed"])
def test_a_host_installs_no_package_of_another_digest_or_of_none(
    launch: Launch, tmp_path: Path, digest: str
) -> None:
    code, calls, errors = host_setup(launch, tmp_path, digest)
    assert code == 2
    assert "--gcsfuse-sha256" in errors
    assert not [call for call in calls if call.startswith("sudo")]
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        (None, "needs --gcsfuse-sha256, the SHA-256 of gcsfuse_"),
        ("abc", "gcsfuse_sha256='abc' is not a SHA-256"),
    ],
)
def test_a_script_needs_a_digest(
    launch: Launch, digest: str | None, message: str
) -> None:
    flags = TPU_VM | {"gcsfuse_sha256": digest}
    code, _, errors = launch("--dry-run", "--skip-compile", **flags)
    assert code == 2
    assert message in errors


def test_an_unknown_verb_lists_the_known_ones(script: Path) -> None:
    code, calls = run(script, "fly")
    assert (code, calls) == (2, [])
