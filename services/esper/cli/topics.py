"""`esper topics`: what is on the message bus."""

import json
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Annotated

import typer
from google.protobuf import symbol_database
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from rich.markup import escape

from esper.cli.connection import connect
from esper.cli.state import command, state_of
from esper.v1 import event_pb2, oona_service_pb2

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Topics of the message bus.")
_SHOWN_CHARACTERS = 200
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON for scripts, one object a line for tail.")]


@app.command("list", epilog="Example: esper topics list --json")
@command
def list_topics(context: typer.Context, as_json: JsonOption = False) -> None:
    """List topics with their size and consumer groups."""
    state = state_of(context).with_json(as_json)
    found: list[event_pb2.Topic] = []
    request = oona_service_pb2.ListTopicsRequest()
    with connect(state, start=True) as mesh:
        while True:
            page = mesh.oona.ListTopics(request, timeout=mesh.timeout)
            found.extend(page.topics)
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    if state.json:
        state.emit(found)
        return
    rows = [
        (
            topic.name,
            len(topic.partition_statuses),
            sum(p.next_offset - p.first_offset for p in topic.partition_statuses),
            event_pb2.Durability.Name(topic.durability).removeprefix("DURABILITY_").lower(),
            ", ".join(f"{g.group} (lag {g.lag})" for g in topic.groups) or "-",
        )
        for topic in found
    ]
    state.table(("TOPIC", "PARTITIONS", "EVENTS", "DURABILITY", "GROUPS"), rows, empty="no topics")


@app.command("tail", epilog="Example: esper topics tail run-events --last 20")
@command
def tail(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(help="Name of the topic.")],
    last: Annotated[
        int, typer.Option(min=0, max=10_000, help="Begin with so many of the newest events of each partition.")
    ] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show events of a topic; reading changes nothing for its consumer groups."""
    state = state_of(context).with_json(as_json)
    with connect(state, start=not follow) as mesh:
        target = mesh.oona.GetTopic(oona_service_pb2.GetTopicRequest(name=topic), timeout=mesh.timeout).topic
        expected = sum(min(last, p.next_offset - p.first_offset) for p in target.partition_statuses)
        if not follow and expected == 0:
            state.errors.print(f"{topic} holds no events")
            return
        opening = oona_service_pb2.SubscribeOpen(
            topic=topic,
            member="esper-cli",
            start=oona_service_pb2.START_POSITION_LAST if last else oona_service_pb2.START_POSITION_LATEST,
            last=last,
            credit=256,
        )
        requests = _Requests(oona_service_pb2.SubscribeRequest(open=opening))
        seen = 0
        call = mesh.oona.Subscribe(requests)
        try:
            for response in call:
                deliveries = response.deliveries.deliveries
                for delivery in deliveries:
                    state.console.print(_line(delivery, state.json), markup=not state.json, soft_wrap=True)
                seen += len(deliveries)
                if deliveries:
                    requests.grant(len(deliveries))
                if not follow and seen >= expected:
                    break
        finally:
            requests.end()
            call.cancel()


class _Requests(Iterator[oona_service_pb2.SubscribeRequest]):
    """What the command says on the stream: open, then credit for what it has shown."""

    def __init__(self, first: oona_service_pb2.SubscribeRequest) -> None:
        self._queue: SimpleQueue[oona_service_pb2.SubscribeRequest | None] = SimpleQueue()
        self._queue.put(first)

    def grant(self, credit: int) -> None:
        self._queue.put(oona_service_pb2.SubscribeRequest(credit=oona_service_pb2.SubscribeCredit(credit=credit)))

    def end(self) -> None:
        """Say no more: gRPC's thread that reads from here ends."""
        self._queue.put(None)

    def __next__(self) -> oona_service_pb2.SubscribeRequest:
        request = self._queue.get()
        if request is None:
            raise StopIteration
        return request


def _payload(event: event_pb2.Event) -> object:
    """The payload as data: JSON as it is, a contract's message by its type, anything else by its length."""
    if event.type == "application/json":
        try:
            return json.loads(event.payload)
        except ValueError:
            return f"{len(event.payload)} bytes that are not JSON"
    try:
        message = symbol_database.Default().GetSymbol(event.type)()
        message.ParseFromString(event.payload)
        return MessageToDict(message, preserving_proto_field_name=True)
    except (KeyError, DecodeError):
        return f"{len(event.payload)} bytes"


def _line(delivery: oona_service_pb2.Delivery, as_json: bool) -> str:
    event = delivery.event
    if as_json:
        document = MessageToDict(delivery, preserving_proto_field_name=True)
        document["event"]["payload"] = _payload(event)
        return json.dumps(document, ensure_ascii=False)
    moment = delivery.store_time.ToDatetime().isoformat(sep=" ", timespec="milliseconds")
    place = f"{delivery.position.partition}:{delivery.position.offset}"
    text = json.dumps(_payload(event), ensure_ascii=False)
    if len(text) > _SHOWN_CHARACTERS:
        text = f"{text[:_SHOWN_CHARACTERS]}… ({len(event.payload)} bytes; all of it with --json)"
    return f"[dim]{moment} {place:>8}[/] [bold]{escape(event.key or '-')}[/] {escape(event.type)} {escape(text)}"
