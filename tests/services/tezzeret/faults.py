"""A worker that does what the name of its blueprint says: builds, or crashes, hangs, lies, eats memory."""

import json
import os
import sys
import time

from esper.tezzeret import worker


def job(order, report):
    """Build an order, or misbehave by name."""
    name = json.loads(order["ir"])["name"] if order else ""
    action = ACTIONS.get(name.partition("_")[0])
    if action is not None:
        report({"phase": "compiling"})
        answer = action(order)
        if answer is not None:
            return answer
    return worker.compile_job(order, report)


def _crash(_):
    os._exit(3)


def _segfault(_):
    os.kill(os.getpid(), 11)


def _hang(_):
    time.sleep(600)


def _slow(_):
    time.sleep(2.5)


def _raise(_):
    raise RuntimeError("a defect of the toolchain")


def _refuse(_):
    text = "undefined reference to `main'\n" + "x" * 50_000 + "\ncollect2: error: ld returned 1 exit status"
    return {"refused": text, "reason": "COMPILER_FAILED"}


def _eat(_):
    return {"bundle": b"0" * (8 << 30)}


def _garbage(_):
    return {"bundle": b"this is no bundle"}


def _nothing(_):
    return {"reason": "?"}


def _swap(order):
    return worker.compile_job(order | {"signature": "vector:5->5:float32"}, lambda _: None)


def _chatter(_):
    sys.stdout.write("\x00\xff garbage on the wire\n" * 1000)
    sys.stdout.flush()


ACTIONS = {
    "crash": _crash,
    "segfault": _segfault,
    "hang": _hang,
    "slow": _slow,
    "raise": _raise,
    "refuse": _refuse,
    "eat": _eat,
    "garbage": _garbage,
    "nothing": _nothing,
    "swap": _swap,
    "chatter": _chatter,
}
