"""How jobs ended, from what Slurm 22.05.8 printed: with accounting, without, and when it has forgotten."""

import pytest

from sparsekv.cluster import slurm

SACCT = """\
1|FAILED|2:0
2|CANCELLED|0:0
3|COMPLETED|0:0
4_0|COMPLETED|0:0
4_1|FAILED|1:0
4_2|FAILED|2:0
5_[0-3]|CANCELLED by 0|0:0
6|CANCELLED by 0|0:0
8|TIMEOUT|0:0
"""
# Parts of the lines; what ended first, task 0 of job 4, is taken out, as if forgotten.
SCONTROL = """\
JobId=1 JobName=x UserId=root(0) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) ExitCode=2:0
JobId=2 JobName=x JobState=CANCELLED Reason=DependencyNeverSatisfied Dependency=afterok:1(failed) ExitCode=0:0
JobId=3 JobName=x JobState=COMPLETED Reason=None Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:0 RunTime=00:00:00
JobId=4 ArrayJobId=4 ArrayTaskId=2 ArrayTaskThrottle=2 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0
JobId=12 ArrayJobId=4 ArrayTaskId=1 ArrayTaskThrottle=2 JobName=x JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0
JobId=5 ArrayJobId=5 ArrayTaskId=0-3 JobName=x JobState=CANCELLED Reason=BeginTime Dependency=(null) ExitCode=0:0
JobId=6 JobName=x JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:15 RunTime=00:00:03
JobId=8 JobName=x JobState=TIMEOUT Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=0 ExitCode=0:15
"""
BOTH = {
    "1": ["1 FAILED (NonZeroExitCode)"],
    "2": ["2 CANCELLED (DependencyNeverSatisfied)"],
    "3": ["3 COMPLETED"],
    "4": ["4_0 COMPLETED", "4_1 FAILED (NonZeroExitCode)", "4_2 FAILED (NonZeroExitCode)"],
    "5": ["5_[0-3] CANCELLED (by user 0)"],
    "6": ["6 CANCELLED (by user 0)"],
    "8": ["8 TIMEOUT (TimeLimit)"],
    "9": [],
}
ONLY_SACCT = BOTH | {
    "1": ["1 FAILED (exit code 2:0)"],
    "2": ["2 CANCELLED"],
    "3": ["3 COMPLETED"],
    "4": ["4_0 COMPLETED", "4_1 FAILED (exit code 1:0)", "4_2 FAILED (exit code 2:0)"],
    "8": ["8 TIMEOUT"],
}
ONLY_SCONTROL = BOTH | {
    "4": ["4_1 FAILED (NonZeroExitCode)", "4_2 FAILED (NonZeroExitCode)"],
    "5": ["5_[0-3] CANCELLED (BeginTime)"],
    "6": ["6 CANCELLED (exit code 0:15)"],
}
NEITHER = {number: [] for number in BOTH}


@pytest.fixture
def site(monkeypatch):
    """Function from the names of the commands that a site has; they answer by job, in the words of Slurm."""

    def lines(words):
        if words[0] == "sacct":
            number = words[words.index("-j") + 1]
            return [line for line in SACCT.splitlines() if line.split("|")[0].split("_")[0] == number]
        number = words[-1]
        known = (f"JobId={number} ", f" ArrayJobId={number} ")
        return [line for line in SCONTROL.splitlines() if any(part in line for part in known)]

    def answer(there):
        def call(words):
            found = lines(words) if words[0] in there else []
            if not found:
                raise slurm.UserError(f"{words[0]}: no")
            return "\n".join(found)

        monkeypatch.setattr(slurm, "call", call)

    return answer


@pytest.mark.parametrize(
    ("there", "expected"),
    [(("sacct", "scontrol"), BOTH), (("sacct",), ONLY_SACCT), (("scontrol",), ONLY_SCONTROL), ((), NEITHER)],
    ids=["both", "sacct", "scontrol", "neither"],
)
def test_how_jobs_ended(site, there, expected):
    site(there)
    found = {number: slurm.history(number) for number in expected}
    assert {number: list(map(str, jobs)) for number, jobs in found.items()} == expected
    failed = {number for number, jobs in found.items() if any(job.failed for job in jobs)}
    assert failed == ({"1", "2", "4", "5", "6", "8"} if there else set())
