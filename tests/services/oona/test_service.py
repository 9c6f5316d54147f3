"""Settings and metrics of the bus."""

from prometheus_client import generate_latest

from esper.oona.service import Config
from tests.services.oona.conftest import make_event, receive


async def test_metrics_tell_what_happened(bus):
    """Published, duplicate, delivered, redelivered, lag, in flight and members stand on the server's metrics page."""
    await bus.publish("decisions", [make_event(n) for n in range(5)])
    await bus.publish("decisions", [make_event(0)])
    call = await bus.open("decisions", group="g", credit=3)
    await receive(call, 3, ack=False)
    page = generate_latest(bus.server.registry).decode()
    for line in (
        'esper_oona_published_total{topic="decisions"} 5.0',
        'esper_oona_duplicates_total{topic="decisions"} 1.0',
        'esper_oona_delivered_total{group="g",topic="decisions"} 3.0',
        'esper_oona_lag{group="g",topic="decisions"} 5.0',
        'esper_oona_in_flight{group="g",topic="decisions"} 3.0',
        'esper_oona_members{group="g",topic="decisions"} 1.0',
    ):
        assert line in page
    await call.done_writing()
    await call.read()
    again = await bus.open("decisions", group="g", credit=3)
    await receive(again, 3)
    page = generate_latest(bus.server.registry).decode()
    assert 'esper_oona_redelivered_total{group="g",topic="decisions"} 3.0' in page


async def test_names_that_do_not_exist_are_not_counted(bus):
    """A stranger cannot fill the metrics with invented topics."""
    await bus.publish("nope", [make_event(1)])
    assert "nope" not in generate_latest(bus.server.registry).decode()


def test_every_setting_is_documented():
    """Each field says what it means."""
    assert [] == [name for name, field in Config.model_fields.items() if not field.description]
