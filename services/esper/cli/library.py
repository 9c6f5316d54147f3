"""`esper kernels` and `esper blueprints`: what the library holds."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from esper.cli.connection import connect
from esper.cli.state import ExitCode, command, short, state_of
from esper.mesh.errors import InvalidInput
from esper.v1 import signature_pb2, tezzeret_service_pb2, urza_service_pb2
from esper.v1.blueprint_pb2 import BLUEPRINT_STATE_ARCHIVED, Birth
from esper.v1.blueprint_pb2 import Blueprint as StoredBlueprint
from esper.v1.build_pb2 import Tier
from esper.v1.kernel_pb2 import Kernel, KernelState
from esper.v1.signature_pb2 import Layout, Signature
from esper.v1.tensor_pb2 import DataType

__all__ = ["blueprints", "kernels"]

kernels = typer.Typer(no_args_is_help=True, help="Compiled, tested and signed modules.")
blueprints = typer.Typer(no_args_is_help=True, help="Designs of modules.")

JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON for scripts.")]
_PAGE = 500


def signature_text(signature: Signature) -> str:
    """A signature as people write it: image:16->32:float32."""
    layout = Layout.Name(signature.layout).removeprefix("LAYOUT_").lower()
    dtype = DataType.Name(signature.dtype).removeprefix("DATA_TYPE_").lower()
    return f"{layout}:{signature.in_features}->{signature.out_features}:{dtype}"


def parse_signature(text: str) -> Signature:
    """Read the form that `signature_text` writes.

    Raises:
        InvalidInput: another form.
    """
    from esper.kasmina.signature import Signature as Domain

    parsed = Domain.parse(text)
    return signature_pb2.Signature(
        layout=Layout.Value(f"LAYOUT_{parsed.layout.value.upper()}"),
        in_features=parsed.in_features,
        out_features=parsed.out_features,
        dtype=DataType.Value(f"DATA_TYPE_{parsed.dtype.upper()}"),
    )


def _enum(text: str) -> str:
    return text.split("_", 2)[-1].lower()


@kernels.command("list", epilog="Example: esper kernels list --state validated --signature 'image:4->4:float32'")
@command
def list_kernels(
    context: typer.Context,
    state_name: Annotated[
        str, typer.Option("--state", help="staged, validated, rejected, archived or quarantined; all by default.")
    ] = "",
    signature: Annotated[str, typer.Option(help="Only this signature, like 'image:16->32:float32'.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Entries at most.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List kernels, newest first."""
    state = state_of(context).with_json(as_json)
    request = urza_service_pb2.ListKernelsRequest(page_size=min(limit, _PAGE))
    if state_name:
        request.states.append(_state(state_name))
    if signature:
        request.signatures.append(parse_signature(signature))
    found: list[Kernel] = []
    with connect(state, start=True) as mesh:
        while len(found) < limit:
            page = mesh.urza.ListKernels(request, timeout=mesh.timeout)
            found.extend(page.kernels)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    found = found[:limit]
    if state.json:
        state.emit(found)
        return
    rows = [
        (
            short(kernel.id),
            kernel.blueprint_name,
            signature_text(kernel.signature),
            _enum(Tier.Name(kernel.tier)).removeprefix("tier_"),
            KernelState.Name(kernel.state).removeprefix("KERNEL_STATE_").lower(),
            kernel.parameters,
            _ratio(kernel),
            f"{kernel.size_bytes / 1024:.0f} KiB",
        )
        for kernel in found
    ]
    columns = ("ID", "BLUEPRINT", "SIGNATURE", "TIER", "STATE", "PARAMETERS", "STEP/TORCH", "SIZE")
    state.table(
        columns, rows, empty="no kernels: the forge builds them when a run asks, or 'esper train' prepares them"
    )


def _ratio(kernel: Kernel) -> str:
    """Time of a training step over plain torch's, from small inputs to large ones, as the gauntlet measured it."""
    figures = {figure.name: figure.value for figure in kernel.verdict.measurements}
    ratios = [figures.get(f"latency.{name}.step.ratio") for name in ("small", "nominal", "large")]
    return " ".join(f"{ratio:.2f}" for ratio in ratios if ratio is not None) or "-"


def _state(name: str) -> KernelState.ValueType:
    try:
        return KernelState.Value(f"KERNEL_STATE_{name.upper()}")
    except ValueError as error:
        known = ", ".join(n.removeprefix("KERNEL_STATE_").lower() for n in KernelState.keys()[1:])  # an enum wrapper
        raise InvalidInput(f"--state: expected one of {known}, found {name!r}") from error


@kernels.command("show", epilog="Example: esper kernels show 3fa94c21d07e")
@command
def show_kernel(
    context: typer.Context,
    kernel: Annotated[str, typer.Argument(help="Id, or at least its first 8 digits.")],
    as_json: JsonOption = False,
) -> None:
    """Show one kernel: its verdict, what was measured, and where it comes from."""
    state = state_of(context).with_json(as_json)
    with connect(state, start=True) as mesh:
        request = urza_service_pb2.GetKernelRequest(kernel=full_id(kernel))
        found = mesh.urza.GetKernel(request, timeout=mesh.timeout).kernel
        lineage = mesh.urza.GetLineage(urza_service_pb2.GetLineageRequest(kernel_id=found.id), timeout=mesh.timeout)
    if state.json:
        state.emit(lineage)
        return
    out = state.console
    out.print(f"[bold]{escape(found.blueprint_name)}[/]  {found.id}")
    out.print(f"  signature   {signature_text(found.signature)}", markup=False)
    out.print(
        f"  tier        {Tier.Name(found.tier).removeprefix('TIER_').lower()} for {found.target or 'any machine'}"
    )
    out.print(f"  state       {KernelState.Name(found.state).removeprefix('KERNEL_STATE_').lower()}")
    out.print(f"  parameters  {found.parameters}")
    out.print(f"  blueprint   {found.blueprint_id}")
    if found.HasField("verdict"):
        out.print(f"  signed by   key {found.verdict.key_id}, gauntlet {found.verdict.gauntlet_version}")
        out.print(f"  tags        {', '.join(found.verdict.tags) or '-'}", markup=False)
        out.print("[bold]checks[/]")
        for check in found.verdict.checks:
            mark = "[green]passed[/]" if check.passed else "[red]failed[/]"
            out.print(f"  {mark}  {check.name:<24} {escape(check.finding)}")
        out.print("[bold]measured[/]")
        for measurement in found.verdict.measurements:
            out.print(f"  {measurement.name:<32} {measurement.value:.4g} {measurement.unit}", markup=False)
    out.print("[bold]lineage[/]")
    if lineage.build.error:
        out.print(f"  build error: {lineage.build.error}", markup=False)
    for step in lineage.transitions:
        name = KernelState.Name(step.to_state).removeprefix("KERNEL_STATE_").lower()
        moment = step.occur_time.ToDatetime().isoformat(sep=" ", timespec="seconds")
        out.print(f"  {moment}  {name:<12} by {step.identity}  {step.reason}", markup=False)


def full_id(text: str) -> str:
    """An id or its first digits, with the algorithm's name in front."""
    return text if text.startswith("sha256:") else f"sha256:{text}"


@blueprints.command("list", epilog="Example: esper blueprints list --layout image")
@command
def list_blueprints(
    context: typer.Context,
    layout: Annotated[str, typer.Option(help="vector, sequence or image; all by default.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List blueprints, newest first."""
    state = state_of(context).with_json(as_json)
    request = urza_service_pb2.ListBlueprintsRequest(page_size=_PAGE)
    if layout:
        known = {"vector", "sequence", "image"}
        if layout not in known:
            raise InvalidInput(f"--layout: expected one of {', '.join(sorted(known))}, found {layout!r}")
        request.layout = Layout.Value(f"LAYOUT_{layout.upper()}")
    found: list[StoredBlueprint] = []
    with connect(state, start=True) as mesh:
        while True:
            page = mesh.urza.ListBlueprints(request, timeout=mesh.timeout)
            found.extend(page.blueprints)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    if state.json:
        state.emit(found)
        return
    rows = [
        (
            short(blueprint.id),
            blueprint.name,
            ", ".join(Layout.Name(value).removeprefix("LAYOUT_").lower() for value in blueprint.layouts),
            Birth.Name(blueprint.birth).removeprefix("BIRTH_").lower(),
            "yes" if blueprint.causal else "no",
            blueprint.description,
        )
        for blueprint in found
    ]
    state.table(("ID", "NAME", "LAYOUTS", "BIRTH", "CAUSAL", "DESCRIPTION"), rows, empty="no blueprints")


@blueprints.command("show", epilog="Example: esper blueprints show bottleneck_mlp > mine.json")
@command
def show_blueprint(
    context: typer.Context,
    blueprint: Annotated[str, typer.Argument(help="Name, id, or at least the first 8 digits of the id.")],
) -> None:
    """Write the IR of one blueprint as JSON: a good start for one of your own."""
    state = state_of(context)
    with connect(state, start=True) as mesh:
        request = urza_service_pb2.GetBlueprintRequest(blueprint=blueprint)
        found = mesh.urza.GetBlueprint(request, timeout=mesh.timeout).blueprint
    import json

    typer.echo(json.dumps(json.loads(found.ir), indent=2, ensure_ascii=False))


@blueprints.command("submit", epilog="Example: esper blueprints submit mine.json --signature 'image:4->4:float32'")
@command
def submit_blueprint(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="IR as JSON (docs/blueprints.md).", exists=True, dir_okay=False)],
    signature: Annotated[str, typer.Option(help="Check it for this signature too.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Check a blueprint and store it in the library."""
    from esper.kasmina.blueprints import Blueprint

    state = state_of(context).with_json(as_json)
    ir = file.read_bytes()
    request = tezzeret_service_pb2.CheckBlueprintRequest(ir=ir)
    if signature:
        request.signature.CopyFrom(parse_signature(signature))
    with connect(state, start=True) as mesh:
        verdict = mesh.tezzeret.CheckBlueprint(request, timeout=mesh.timeout)
        if not verdict.ok:
            if state.json:
                state.emit(verdict)
            for problem in verdict.problems:
                where = f"node '{problem.node}': " if problem.node else ""
                state.errors.print(f"[bold red]error[/] {escape(where + problem.message)}")
            raise typer.Exit(ExitCode.REFUSED)
        # People write with spaces; the library keeps the one canonical spelling, which names the blueprint.
        canonical = Blueprint.from_json(ir).canonical_json().encode()
        submit = urza_service_pb2.SubmitBlueprintRequest(ir=canonical)
        answer = mesh.urza.SubmitBlueprint(submit, timeout=mesh.timeout)
    if state.json:
        state.emit(answer)
        return
    word = "stored" if answer.created else "was there already"
    state.console.print(f"{escape(answer.blueprint.name)} {word}: {answer.blueprint.id}")
    if answer.blueprint.state == BLUEPRINT_STATE_ARCHIVED:
        state.console.print("It is archived, so it will not be built: an operator who submits it brings it back.")
