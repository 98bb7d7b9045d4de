"""A Slurm cluster of two nodes on this machine. Where it cannot be the tests are skipped, but not in CI."""

import os
import shutil
import subprocess

import pytest
from cluster import Cluster  # pytest puts the folder of a conftest.py on the path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NO_SLURM = f"no Slurm here: {', '.join(PACKAGES)} are missing, and only root can install them, where apt-get exists"


def pytest_collection_modifyitems(items):
    for item in items:
        if "slurm_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.slurm)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for reason in sorted({report.longrepr[2] for report in skipped if "tests/slurm/" in report.nodeid}):
        terminalreporter.write_line(f"tests/slurm: {reason}")


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory):
    """The cluster, with GPUs in name only; it is stopped at the end, and with it every job."""
    if reason := missing():
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def missing() -> str | None:
    """Why there can be no cluster, after Debian's packages were installed where that may be."""
    if os.geteuid():
        return f"{NO_SLURM}; its daemons are started by root too"
    if not all(map(shutil.which, PROGRAMS)) and shutil.which("apt-get"):
        print(f"installing {', '.join(PACKAGES)}")
        apt_get("update")
        apt_get("install", "-y", "--no-install-recommends", *PACKAGES)
    return None if all(map(shutil.which, PROGRAMS)) else NO_SLURM


def apt_get(*words: str):
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(
        ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=600", *words], env=environment, timeout=900, check=False
    )
