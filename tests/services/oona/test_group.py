from esper.oona.cursor import Cursor
from esper.oona.group import Group, Member, RetryPolicy
from esper.oona.records import GroupPosition, StoredEvent


def group_of(partitions, events=(), *, max_attempts=3, max_in_flight=1000):
    """A group whose cursors have read this many events."""
    cursors = [Cursor(p, GroupPosition(0), limit=10_000) for p in range(partitions)]
    for partition, count in enumerate(events):
        cursors[partition].feed(
            StoredEvent(partition, o, f"{partition}/{o}", f"key-{o % 3}", b"data", 0) for o in range(count)
        )
    policy = RetryPolicy(max_attempts=max_attempts, backoff_s=1.0, backoff_max_s=4.0)
    return Group(cursors, policy, max_in_flight=max_in_flight)


def member(credit=1000, timeout=10.0, name="m"):
    """A member with plenty of credit."""
    return Member(name, timeout, credit)


def poll(group, who, now=0.0, most=1000, most_bytes=1 << 20):
    """What the member gets."""
    return group.poll(who, now, most, most_bytes)


def test_partitions_are_shared_evenly():
    """Nobody has two partitions more than another; a lonely member has all, a member too many has none."""
    group = group_of(4)
    members = [member() for _ in range(5)]
    sizes = []
    for who in members:
        group.join(who)
        sizes.append(sorted(len(group.partitions_of(m)) for m in group.members))
    assert [[4], [2, 2], [1, 1, 2], [1, 1, 1, 1], [0, 1, 1, 1, 1]] == sizes
    shared = sorted(p for m in members for p in group.partitions_of(m))
    assert [0, 1, 2, 3] == shared


def test_sharing_is_sticky():
    """A member that joins takes what fairness gives it; the others keep the rest."""
    group = group_of(6)
    one, two, three = member(), member(), member()
    group.join(one)
    group.join(two)
    before = set(group.partitions_of(one)), set(group.partitions_of(two))
    group.join(three)
    assert set(group.partitions_of(one)) < before[0]
    assert set(group.partitions_of(two)) < before[1]
    group.leave(three, 0.0)
    assert before[0] | before[1] == set(group.partitions_of(one)) | set(group.partitions_of(two))
    assert set(group.partitions_of(one)) & before[0]


def test_partition_moves_only_when_answered():
    """A partition with something in flight stays closed to its new owner until the old one has answered."""
    group = group_of(2, [4, 4])
    group.join(old := member(credit=8))
    everything = poll(group, old)
    assert 8 == len(everything)
    group.join(new := member())
    moved = group.partitions_of(new)
    assert 1 == len(moved)
    group.settle()
    group.cursors[moved[0]].feed([StoredEvent(moved[0], 4, "late", "", b"", 0)])
    assert [] == poll(group, new)
    theirs = [d.delivery_id for d in everything if d.event.partition == moved[0]]
    group.ack(old, theirs[:-1])
    assert not group.settle()
    group.nack(old, theirs[-1:], 0.0, delay_s=0.0)
    assert group.settle()
    assert {"late", f"{moved[0]}/3"} == {d.event.id for d in poll(group, new)}


def test_credit_is_spent_and_granted():
    """A member is given no more than its credit; acknowledging returns none of it."""
    group = group_of(1, [10])
    who = member(credit=3)
    group.join(who)
    first = poll(group, who)
    assert 3 == len(first)
    group.ack(who, [d.delivery_id for d in first])
    assert [] == poll(group, who)
    who.credit += 2
    assert 2 == len(poll(group, who))


def test_in_flight_is_bounded_whatever_the_credit():
    """Deliveries without an answer stop at the bound."""
    group = group_of(1, [10], max_in_flight=4)
    who = member()
    group.join(who)
    first = poll(group, who)
    assert 4 == len(first) == group.in_flight()
    assert 1 == group.ack(who, [first[0].delivery_id])
    assert 1 == len(poll(group, who))


def test_batch_ends_at_its_bytes():
    """No event passes the bytes, from whichever partition, except one that comes alone."""
    group = group_of(2, [100, 100])
    who = member()
    group.join(who)
    assert 2 == len(poll(group, who, most_bytes=11))
    assert 1 == len(poll(group, who, most_bytes=1))
    assert 5 == len(poll(group, who, most=5))
    assert 192 == len(poll(group, who, most_bytes=4 * 192))


def test_backoff_doubles_up_to_its_limit():
    """Each failure waits longer than the one before, until the limit."""
    policy = RetryPolicy(max_attempts=9, backoff_s=0.5, backoff_max_s=3.0)
    assert [0.5, 1.0, 2.0, 3.0, 3.0] == [policy.delay_s(n) for n in (1, 2, 3, 4, 50)]


def test_unanswered_delivery_comes_again():
    """After timeout and backoff an event is delivered again, and a late answer to the first delivery is void."""
    group = group_of(1, [1])
    who = member(timeout=10.0)
    group.join(who)
    first = poll(group, who, 0.0)[0]
    assert 0 == group.expire(9.9)
    assert 1 == group.expire(10.0)
    assert 0 == group.ack(who, [first.delivery_id])
    assert [] == poll(group, who, 10.5)
    second = poll(group, who, 11.0)[0]
    assert (2, first.event) == (second.attempt, second.event)
    assert second.delivery_id != first.delivery_id
    assert 1 == group.redelivered
    assert 1 == group.ack(who, [second.delivery_id])
    assert 0 == group.lag([1])


def test_a_member_that_hangs_loses_its_partitions():
    """What a silent member let pass goes to one that answers, though the silent one has no credit left for it."""
    group = group_of(2, [2, 2])
    hung, idle = member(credit=2, timeout=10.0), member()
    group.join(hung)
    group.join(idle)
    assert 2 == len(poll(group, hung))
    group.ack(idle, [d.delivery_id for d in poll(group, idle)])
    assert 2 == group.expire(10.0)
    assert group.settle()
    assert [0, 1] == group.partitions_of(idle)
    assert [2, 2] == [d.attempt for d in poll(group, idle, 11.0)]


def test_a_silent_member_that_speaks_again_gets_its_share():
    """A late answer, a refusal and a grant of credit each bring a member back; so does everybody's silence."""
    for speak in (
        lambda group, who: group.ack(who, [1]),
        lambda group, who: group.nack(who, [], 10.0),
        lambda group, who: group.grant(who, 1),
    ):
        group = group_of(2, [1, 1])
        slow, other = member(), member(timeout=20.0)
        group.join(slow)
        group.join(other)
        poll(group, slow)
        poll(group, other)
        assert 1 == group.expire(10.0)
        assert [] == group.partitions_of(slow)
        speak(group, slow)
        assert 1 == len(group.partitions_of(slow)) == len(group.partitions_of(other))
        assert 1 == group.expire(20.0)
        assert [0, 1] == group.partitions_of(slow)
        assert 2 == len(poll(group, slow, 30.0))
        assert 2 == group.expire(40.0)
        assert 1 == len(group.partitions_of(slow)) == len(group.partitions_of(other))


def test_answered_deliveries_do_not_expire():
    """Only what is unanswered is taken back, also when its batch was larger."""
    group = group_of(1, [4])
    who = member(timeout=1.0)
    group.join(who)
    batch = poll(group, who, 0.0)
    group.ack(who, [batch[0].delivery_id, batch[2].delivery_id])
    assert 2 == group.expire(1.1)
    assert 0 == group.in_flight()


def test_deadlines_stay_few():
    """Many small batches under a long timeout share their deadlines in tenths of a second."""
    group = group_of(1, [500])
    who = member(timeout=3600.0)
    group.join(who)
    for step in range(500):
        assert 1 == len(poll(group, who, step / 1000, most=1))
    assert len(who.deadlines) <= 7
    assert 500 == group.expire(3601.0)


def test_event_without_attempts_left_is_handed_out_for_burial():
    """After the last attempt an event goes to the exhausted, with the cause of its last failure."""
    group = group_of(1, [1], max_attempts=2)
    who = member()
    group.join(who)
    group.nack(who, [poll(group, who)[0].delivery_id], 0.0, reason="first", delay_s=0.0)
    assert [] == group.exhausted
    group.nack(who, [poll(group, who)[0].delivery_id], 0.0, reason="second", delay_s=0.0)
    (dead,) = group.exhausted
    assert ("second", 2) == (dead.cause, dead.item.attempts)
    assert [] == poll(group, who, 1e9)
    dead.cursor.buried(dead.item)
    assert 0 == group.lag([1])


def test_causes_name_what_happened():
    """A timeout, a departure and a wordless refusal leave their own causes."""
    causes = []
    for fail in (
        lambda g, m, d: g.expire(1e6),
        lambda g, m, d: g.leave(m, 0.0),
        lambda g, m, d: g.nack(m, [d.delivery_id], 0.0),
    ):
        group = group_of(1, [1], max_attempts=1)
        who = member(name="worker-1")
        group.join(who)
        fail(group, who, poll(group, who)[0])
        causes.append(group.exhausted[0].cause)
    assert ["no answer within 10 s", "member worker-1 left without an answer", "refused by the member"] == causes


def test_dead_letter_topics_have_no_dead_letters():
    """Without a bound on attempts an event comes again for ever."""
    group = group_of(1, [1], max_attempts=None)
    who = member()
    group.join(who)
    for attempt in range(1, 50):
        delivery = poll(group, who, 0.0)[0]
        assert attempt == delivery.attempt
        group.nack(who, [delivery.delivery_id], 0.0, delay_s=0.0)
    assert [] == group.exhausted


def test_departed_members_events_go_to_the_others_at_once():
    """What a member leaves behind is delivered to another one, the attempt counted."""
    group = group_of(2, [2, 2])
    old, new = member(), member()
    group.join(old)
    assert 4 == len(poll(group, old))
    group.leave(old, 0.0)
    assert [] == group.members
    group.join(new)
    assert [2, 2, 2, 2] == [d.attempt for d in poll(group, new)]
    assert 0 == group.nack(new, [10_000], 0.0)


def test_service_rotates_over_partitions():
    """With little credit at a time every partition gets its turn."""
    group = group_of(3, [50, 50, 50])
    who = member(credit=0)
    group.join(who)
    seen = set()
    for _ in range(3):
        who.credit += 1
        seen.add(poll(group, who)[0].event.partition)
    assert {0, 1, 2} == seen


def test_last_attempt_before_a_restart_counts():
    """An event whose last attempt was cut off by a restart becomes a dead letter instead of being tried once more."""
    cursor = Cursor(0, GroupPosition(2, ((0, 3), (1, 2))), limit=10)
    cursor.feed(StoredEvent(0, o, str(o), "", b"", 0) for o in range(2))
    group = Group([cursor], RetryPolicy(max_attempts=3), max_in_flight=9)
    group.join(who := member())
    assert [("1", 3)] == [(d.event.id, d.attempt) for d in poll(group, who)]
    (dead,) = group.exhausted
    assert ("0", 3, "no answer before the server restarted") == (dead.item.event.id, dead.item.attempts, dead.cause)
    assert 1 == group.in_flight() == cursor.in_flight


def test_an_event_spent_before_a_restart_blocks_its_key_until_it_is_buried():
    """Later events of its key wait for the dead letter, although they were read in one go with it."""
    cursor = Cursor(0, GroupPosition(3, ((0, 3), (1, 0), (2, 0))), limit=10)
    cursor.feed(StoredEvent(0, o, str(o), key, b"", 0) for o, key in enumerate(("k", "k", "other")))
    group = Group([cursor], RetryPolicy(max_attempts=3), max_in_flight=9)
    group.join(who := member())
    assert ["2"] == [d.event.id for d in poll(group, who)]
    (dead,) = group.exhausted
    assert [] == poll(group, who)
    dead.cursor.buried(dead.item)
    assert ["1"] == [d.event.id for d in poll(group, who)]
