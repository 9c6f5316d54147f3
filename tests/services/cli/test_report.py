"""Reports on the terminal say what the report files say."""

import io

import pytest
from rich.console import Console

from esper.cli.report import print_comparison, print_run

SEED = {
    "seed": 3,
    "site": "body",
    "kind": "parallel",
    "blueprint_name": "conv_bottleneck",
    "kernel_id": "sha256:" + "ab" * 32,
    "outcome": "fossilized",
    "parameters": 236,
    "germinated_boundary": 5,
    "germinated_step": 80,
    "ended_boundary": 9,
    "gain": 0.0625,
    "gain_low": 0.05,
    "reason": "gain above its price [measured]",
}
CULLED = {
    **SEED,
    "outcome": "culled",
    "gain": None,
    "gain_low": None,
    "ended_boundary": None,
    "kernel_id": "",
    "reason": "",
}
RUN = {
    "kind": "run",
    "run_id": "digits-1",
    "recipe": "digits",
    "arm": "grown",
    "seed": 7,
    "verdict": "1 of 2 seeds stayed: use --compare.",
    "result": {
        "test_loss": 0.1234,
        "test_accuracy": 0.9771,
        "host_parameters": 1050,
        "final_parameters": 1286,
        "training_flops": 3.2e9,
        "training_time_s": 59.5,
        "preparation_time_s": 12.0,
        "weights_digest": "sha256:cd",
    },
    "data": {"test": 450},
    "rollbacks": 1,
    "growth": [SEED, CULLED],
}


def spread(mean, low=None, high=None):
    """A mean with its interval, as the report has it."""
    return {"mean": mean, "low": low, "high": high}


def arm(name, accuracy):
    """One arm of a comparison."""
    mean = {
        "test_accuracy": accuracy,
        "test_loss": spread(0.5),
        "final_parameters": spread(1286.0),
        "training_flops": spread(2.5e12),
        "training_time_s": spread(240.0),
    }
    return {"arm": name, "mean": mean}


COMPARISON = {
    "recipe": "digits",
    "seeds": [0, 1, 2],
    "verdict": "Growth did not pay: nothing was kept [really].",
    "arms": [arm("grown", spread(0.97, 0.96, 0.98)), arm("host", spread(0.95)), arm("static", None)],
    "differences": [
        {
            "arm": "grown",
            "against": "host",
            "metric": "test_accuracy",
            "pairs": 3,
            "reads": "better",
            **spread(0.02, 0.01, 0.03),
        },
        {
            "arm": "grown",
            "against": "host",
            "metric": "test_loss",
            "pairs": 3,
            "reads": "not told apart",
            **spread(-0.1),
        },
    ],
    "growth": [
        {"run_id": "digits-1", "seed": 0, "adaptations": [SEED]},
        {"run_id": "digits-2", "seed": 1, "adaptations": []},
    ],
}


@pytest.fixture
def console():
    """A wide console that writes to memory."""
    return Console(file=io.StringIO(), width=240)


def test_a_run(console, tmp_path):
    """Figures, every adaptation with where, when and kernel, the verdict, the page."""
    page = tmp_path / "report.html"
    page.touch()
    print_run(console, RUN, page)
    shown = console.file.getvalue()
    for part in (
        "97.71 % (loss 0.1234) on 450 samples",
        "1050 of the host, 1286 at the end",
        "3.2 GFLOP, 59.5 s, prepared in 12.0 s",
        "rollbacks   1",
        "body (parallel)",
        "boundary 5 (step 80) to 9",
        "fossilized",
        "0.0625, at least 0.0500",
        SEED["kernel_id"],
        "gain above its price [measured]",
        "culled",
        "not measured",
        "kernel never known",
        RUN["verdict"],
        f"report: {page}",
    ):
        assert part in shown, part


def test_a_run_without_accuracy_or_growth(console, tmp_path):
    """A task without accuracy shows its loss; a page that was not written is not promised."""
    result = {**RUN["result"], "test_accuracy": None, "final_parameters": 1050, "training_flops": 5e6}
    print_run(console, {**RUN, "result": result, "growth": [], "rollbacks": 0}, tmp_path / "absent.html")
    shown = console.file.getvalue()
    assert "test        loss 0.1234 on" in shown
    assert "nothing grew" in shown
    assert "5 MFLOP" in shown
    assert "report:" not in shown
    assert "rollbacks" not in shown


def test_the_host_alone_has_no_growth_to_show(console, tmp_path):
    """Other arms do not grow, and are not said to have failed at it."""
    print_run(
        console, {**RUN, "arm": "host", "growth": [], "result": {**RUN["result"], "training_flops": 2e15}}, tmp_path
    )
    shown = console.file.getvalue()
    assert "nothing grew" not in shown
    assert "2 PFLOP" in shown


def test_a_comparison(console, tmp_path):
    """Arms side by side, paired differences with intervals, what grew in each run, the verdict as it was written."""
    print_comparison(console, COMPARISON, tmp_path / "report.html")
    shown = console.file.getvalue()
    for part in (
        "3 seeds (0, 1, 2)",
        "97.00 % [96.00 %, 98.00 %]",
        "the grown network from step 0",
        "2.5 TFLOP",
        "4.0 min",
        "+2.00 points [+1.00 points, +3.00 points]",
        "-0.1000",
        "better",
        "not told apart",
        "seed 0",
        SEED["kernel_id"],
        "nothing grew",
        COMPARISON["verdict"],
    ):
        assert part in shown, part
    print_comparison(console, {**COMPARISON, "seeds": [4]}, tmp_path / "report.html")
    assert "1 seed (4)" in console.file.getvalue()
