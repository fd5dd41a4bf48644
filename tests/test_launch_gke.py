"""gke.sh: its manifest, and its runs against a stand-in kubectl."""

import pathlib
import re
import shlex
import shutil

import pytest
import yaml
from launch_desk import TOP, Desk

IMAGE = "us-docker.pkg.dev/p/r/topd:1"
RUN = [
    *["run", "--name=t1", f"--image={IMAGE}", "--claim=runs"],
    *["--config=tiny"],
]
GKE = "launch/gke.sh"


@pytest.fixture
def desk(tmp_path: pathlib.Path) -> Desk:
    return Desk(tmp_path)


def render(desk: Desk, *args: str) -> dict:
    """The manifest that a dry run prints; kubectl was not called."""
    result = desk.run(GKE, *RUN, "--dry-run", *args)
    assert result.returncode == 0, result.stderr
    assert not desk.calls_file.exists()
    assert "#?" not in result.stdout
    return yaml.safe_load(result.stdout)


def job_of(manifest: dict) -> dict:
    (jobs,) = manifest["spec"]["replicatedJobs"]
    assert jobs["replicas"] == 1
    return jobs["template"]["spec"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]


def container_of(manifest: dict) -> dict:
    (container,) = pod_of(manifest)["containers"]
    return container


def expanded(argument: str) -> str:
    """What Kubernetes makes of an argument; "?" is a variable's value."""
    return re.sub(
        r"\$\$|\$\(\w+\)", lambda m: "$" if m[0] == "$$" else "?", argument
    )


# GKE's page "Plan TPUs": accelerator, topology, hosts and chips of each.
@pytest.mark.parametrize(
    ("topology", "more", "accelerator", "hosts", "chips"),
    [
        ("v5e:1x1", [], "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x2", [], "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", [], "tpu-v5-lite-podslice", 2, 4),
        ("v5e:2x4", ["--chips=8"], "tpu-v5-lite-podslice", 1, 8),
        ("v5e:16x16", [], "tpu-v5-lite-podslice", 64, 4),
        ("v6e:4x8", [], "tpu-v6e-slice", 8, 4),
        ("v4:2x2x4", [], "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", [], "tpu-v5p-slice", 1, 4),
        ("v5p:4x4x4", [], "tpu-v5p-slice", 16, 4),
        ("tpu7x:2x2x2", [], "tpu7x", 2, 4),
    ],
)
def test_hosts_and_chips_make_up_the_topology(
    desk: Desk,
    topology: str,
    more: list[str],
    accelerator: str,
    hosts: int,
    chips: int,
) -> None:
    manifest = render(desk, f"--topology={topology}", *more)
    job, container = job_of(manifest), container_of(manifest)
    shape = topology.partition(":")[2]
    sides = [int(n) for n in shape.split("x")]
    assert job["parallelism"] == job["completions"] == hosts
    for bound in ("requests", "limits"):
        assert container["resources"][bound] == {"google.com/tpu": chips}
    product = 1
    for side in sides:
        product *= side
    assert hosts * chips == product
    assert pod_of(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    several = "--distributed" in container["args"]
    assert several == (hosts > 1)
    assert several == ("annotations" in manifest["metadata"])
    if not several:
        assert container["args"][-6:] == [
            *["--coordinator", "localhost:8482"],
            *["--processes", "1", "--process", "0"],
        ]


def test_manifest_restarts_after_a_preemption(desk: Desk) -> None:
    manifest = render(desk, "--topology=v5e:4x4", "--restarts=3")
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["restartStrategy"] == "BlockingRecreate"
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job, pod = job_of(manifest), pod_of(manifest)
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0
    # Kubernetes allows a podFailurePolicy only with this.
    assert pod["restartPolicy"] == "Never"
    disrupted, signalled = job["podFailurePolicy"]["rules"]
    assert disrupted["action"] == signalled["action"] == "FailJob"
    assert disrupted["onPodConditions"] == [
        {"type": "DisruptionTarget", "status": "True"}
    ]
    assert signalled["onExitCodes"] == {
        "containerName": container_of(manifest)["name"],
        "operator": "In",
        "values": [143],
    }


def test_manifest_mounts_the_claim_and_passes_arguments_on(desk: Desk) -> None:
    odd = [
        *["--config.name=it's $HOME $(A) $$", 'a  "b" \\n & ${IMAGE}', ""],
        *["--", "--dry-run"],
    ]
    manifest = render(desk, "--topology=v5e:4x4", "--", *odd)
    container, pod = container_of(manifest), pod_of(manifest)
    assert container["image"] == IMAGE
    assert container["command"] == ["topd", "train"]
    args = container["args"]
    assert args[:5] == [
        *["--config", "tiny", "--workdir", "/runs/t1", "--distributed"]
    ]
    assert [expanded(a) for a in args[5:]] == odd
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/runs"}
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}
    assert not {"tolerations", "serviceAccountName"} & set(pod)
    assert "envFrom" not in container


def test_manifest_with_every_option(desk: Desk) -> None:
    # Names that YAML would read as something else.
    manifest = render(
        desk, "--topology=v6e:2x4", "--spot", "--account=null",
        "--secret=123", "--name=yes", "--workdir=/runs/a b",
    )  # fmt: skip
    container, pod = container_of(manifest), pod_of(manifest)
    assert manifest["metadata"]["name"] == "yes"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (toleration,) = pod["tolerations"]
    assert toleration["key"] == "cloud.google.com/gke-spot"
    assert pod["serviceAccountName"] == "null"
    assert container["envFrom"] == [{"secretRef": {"name": "123"}}]
    assert container["args"][3] == "/runs/a b"


def test_the_image_has_what_the_manifest_runs() -> None:
    lines = (TOP / "launch" / "Dockerfile").read_text().splitlines()
    manifest = (TOP / "launch" / "jobset.yaml").read_text()
    place = re.search(r"workingDir: (\S+)", manifest)[1]
    assert f"WORKDIR {place}" in lines
    assert "RUN pip install --no-cache-dir -e '.[tpu]'" in lines


def test_run_status_logs_stop(desk: Desk) -> None:
    where = ["--namespace=ml"]
    ran = desk.run(GKE, *RUN, "--topology=v5e:4x4", *where)
    assert ran.returncode == 0, ran.stderr
    printed = desk.run(GKE, *RUN, "--topology=v5e:4x4", "--dry-run").stdout
    assert desk.calls("kubectl") == [
        ["kubectl", "--namespace=ml", "create", "--filename=-"]
    ]
    assert (desk.worker / "stdin").read_text() == printed

    name = "jobset.sigs.k8s.io/jobset-name=t1"
    pod = f"{name},batch.kubernetes.io/job-completion-index=2"
    expected = {
        ("status",): [
            ["get", "jobset", "t1"],
            ["get", "pods", f"--selector={name}"],
        ],
        ("logs", "--host=2"): [
            ["logs", f"--selector={pod}", "--tail=50", "--follow"]
        ],
        ("logs", "--host=2", "--no-follow"): [
            ["logs", f"--selector={pod}", "--tail=50"]
        ],
        ("stop",): [["delete", "jobset", "t1"]],
    }
    for args, calls in expected.items():
        dry = desk.run(GKE, *args, "--name=t1", "--dry-run")
        assert not desk.calls_file.exists()
        lines = [shlex.split(line)[1:] for line in dry.stdout.splitlines()]
        assert lines == calls
        assert desk.run(GKE, *args, "--name=t1").returncode == 0
        assert [c[1:] for c in desk.calls("kubectl")] == calls


@pytest.mark.parametrize("command", ["run", "status", "logs", "stop"])
def test_exit_code_of_kubectl_is_that_of_gke(desk: Desk, command: str) -> None:
    args = [*RUN[1:], "--topology=v5e:4x4"] if command == "run" else RUN[1:2]
    result = desk.run(GKE, command, *args, FAIL="kubectl")
    assert result.returncode == 7
    assert "gke.sh: exit code 7 from: kubectl" in result.stderr


@pytest.mark.parametrize(
    ("topology", "tpu_type"),
    [
        ("v5e:4x4", "v5litepod-16"),
        ("v6e:4x4", "v6e-16"),
        ("v5p:2x2x2", "v5p-16"),
        ("tpu7x:4x4x4", "tpu7x-128"),
    ],
)
def test_xpk_prints_its_command(
    desk: Desk, topology: str, tpu_type: str
) -> None:
    result = desk.run(
        GKE, "xpk", *RUN[1:3], "--config=tiny", f"--topology={topology}",
        "--cluster=c", "--", "--config.name=a b",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert f"--tpu-type={tpu_type}" in words
    assert f"--docker-image={IMAGE}" in words
    inner = words[-1].removeprefix("--command=cd /topd_jax && ")
    assert shlex.split(inner) == [
        *["topd", "train", "--config", "tiny", "--workdir", "/runs/t1"],
        *["--distributed", "--config.name=a b"],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: bash launch/gke.sh COMMAND"),
        (["fly"], "unknown command fly: one of run, status"),
        (["logs"], "logs needs --name, for instance --name my-run"),
        (RUN, "run needs --topology, for instance --topology v5e:4x4"),
        (["run", "--name=a", "--topology=v5e:4x4"], "run needs --image"),
        ([*RUN, "--topology=v5e"], "--topology=v5e must have 2 sides"),
        ([*RUN, "--topology=v5e:2x2x2"], "must have 2 sides, as v5e:4x4"),
        ([*RUN, "--topology=v5p:4x4"], "must have 3 sides, as v5p:2x2x2"),
        ([*RUN, "--topology=v9:4x4"], "--topology=v9:4x4 must start with v4:"),
        ([*RUN, "--topology=v5e:0x4"], "--topology=v5e:0x4 must have 2 sides"),
        ([*RUN, "--topology=v5e:1x2"], "no host has 2 of the 2 chips of v5e"),
        ([*RUN, "--topology=v5e:3x3"], "no host has 4 of the 9 chips of v5e"),
        (
            [*RUN, "--topology=v5e:4x4", "--chips=8"],
            "no host has 8 of the 16 chips of v5e:4x4: a host has 4, or all 8",
        ),
        (
            [*RUN, "--topology=v5e:4x4", "--workdir=gs://bucket/t1"],
            "--workdir=gs://bucket/t1 must be below /runs, where the claim",
        ),
        (
            [*RUN, "--topology=v5e:4x4", "--workdir=/runs/../tmp"],
            "--workdir=/runs/../tmp must be below /runs",
        ),
        ([*RUN, "--topology=v5e:4x4", "--restarts=-1"], "--restarts=-1 must"),
        ([*RUN, "--topology=v5e:4x4", "--image=a b"], "--image=a b must be an"),
        ([*RUN, "--topology=v5e:4x4", "--claim=A"], "--claim=A must be a name"),
        ([*RUN, "--topology=v5e:4x4", "--", "a\nb"], "has a line break"),
        (["stop", "--name=T_1"], "--name=T_1 must be 1 to 40 of a-z, 0-9"),
        (["stop", f"--name={'a' * 41}"], "must be 1 to 40 of a-z"),
        (["stop", "--name=a", "--", "x"], "stop takes no arguments after --"),
        (["stop", "--name"], "--name needs a value"),
        (["logs", "--name=a", "--host=all"], "--host=all must be a host's"),
        ([*RUN, "--steps=3"], "unknown argument --steps: see --help"),
        (
            ["xpk", *RUN[1:], "--topology=v5e:4x4"],
            "xpk needs --cluster, for instance --cluster my-cluster",
        ),
    ],
)
def test_wrong_usage_is_told_with_the_way_out(
    desk: Desk, args: list[str], message: str
) -> None:
    result = desk.run(GKE, *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not desk.calls_file.exists()


def test_missing_kubectl(desk: Desk, tmp_path: pathlib.Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname", "basename"):
        (few / tool).symlink_to(shutil.which(tool))
    result = desk.run(GKE, "stop", "--name=a", PATH=str(few))
    assert result.returncode == 2
    assert "kubectl is not on PATH: gcloud components install" in result.stderr
