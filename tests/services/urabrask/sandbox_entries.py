"""Stand-ins for the gauntlet in the sandbox: what the engine does when the sandbox fails or lies."""

import os
import signal
import time

TARGET = {"target": "cpu/x86_64/avx2/torch-2.13"}


def crash(job, report):
    """Die by a signal in the middle of a check."""
    if "bundle" not in job:
        return TARGET
    report({"running": "bundle.integrity"})
    report({"done": {"name": "bundle.integrity", "passed": True, "finding": "fine", "elapsed_ms": 1.0}})
    report({"running": "numerics.outputs"})
    report({"unheard": "of"})
    report({"done": {"name": "no.such.check", "passed": True}})
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    return {}


def nonsense(job, report):
    """Claim a pass without its checks."""
    return TARGET if "bundle" not in job else {**TARGET, "checks": [], "measurements": [], "tags": []}


def defect(job, report):
    """Fail as the gauntlet itself never should."""
    if "bundle" not in job:
        return TARGET
    raise KeyError("no such check")


def elsewhere(job, report):
    """Be the wrong machine."""
    return TARGET if "bundle" not in job else {"elsewhere": "the kernel is compiled for the moon"}


def broken():
    """A warm-up that fails."""
    raise ImportError("no torch here")


def slow(job, report):
    """Take long enough to be interrupted."""
    if "bundle" not in job:
        return TARGET
    report({"running": "bundle.integrity"})
    time.sleep(120)
    return {}


def flood(job, report):
    """Say the same thing over and over."""
    if "bundle" not in job:
        return TARGET
    done = {"name": "bundle.integrity", "passed": True, "finding": "fine", "elapsed_ms": 1.0}
    report({"running": "bundle.integrity"})
    while True:
        report({"done": done})


def boast(job, report):
    """Answer with more than anybody can want to know."""
    return TARGET if "bundle" not in job else {**TARGET, "checks": ["x" * (1 << 20)]}
