"""The end of a run: the test set once, the figures, the files.

Order matters: everything that a person may want is written before the result says that the run succeeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.tolaria.core import Result, to_json
from esper.tolaria.growing import weights_digest
from esper.tolaria.networks import write_modules
from esper.tolaria.rundir import write_json
from esper.tolaria.task import evaluate

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.kasmina.cache import Fetched
    from esper.tolaria.config import RunConfig
    from esper.tolaria.rundir import RunDir
    from esper.tolaria.trainer import Trainer

__all__ = ["finish"]


def finish(
    run_dir: RunDir,
    config: RunConfig,
    trainer: Trainer,
    say: Callable[[str], None],
    bundle: Callable[[str], Fetched | None],
) -> Result:
    """Measure, write, and return the final figures.

    Args:
        run_dir: the run.
        config: its configuration.
        trainer: after its last step.
        say: takes the phase, for progress.
        bundle: gives the bundles of the kernels in use.
    """
    network, dataset = trainer.network, trainer.data
    seconds = trainer.seconds
    say("testing")
    validation = evaluate(network.model, dataset.validation())
    test = evaluate(network.model, dataset.test())
    grown = network.grown()
    result = Result(
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        validation_loss=validation.loss,
        validation_accuracy=validation.accuracy,
        host_parameters=network.host_parameters,
        final_parameters=network.host_parameters + sum(p.numel() for _, module in grown for p in module.parameters()),
        training_flops=trainer.flops,
        training_time_s=seconds,
        kernel_ids=tuple(sorted({attached.kernel_id for attached, _ in grown})),
        weights_digest=weights_digest(network.weights()),
        preparation_time_s=trainer.preparation_s,
    )
    facts = {"data": {"digest": dataset.digest, **dataset.sizes}, "rollbacks": trainer.rollbacks}
    write_json(run_dir.path / "history.json", trainer.history)
    write_json(run_dir.path / "lineage.json", network.lineage())
    write_json(run_dir.path / "result.json", {**to_json(result), **facts})
    if network.grows:
        write_modules(run_dir, grown, bundle)
    if config.artifacts.export:
        from esper.tolaria.export import export_run

        say("exporting")
        export_run(run_dir, config, network, dataset)
    from esper.tolaria.report import write_run_report

    say("writing the report")
    write_run_report(run_dir.path, html=config.artifacts.html)
    return result
