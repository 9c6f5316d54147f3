"""The group under any order of events: nothing lost, nothing out of order, nothing tried too often."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from esper.oona.cursor import Cursor
from esper.oona.group import Group, Member, RetryPolicy
from esper.oona.records import GroupPosition, StoredEvent

PARTITIONS = 3
MAX_ATTEMPTS = 3
POLICY = RetryPolicy(max_attempts=MAX_ATTEMPTS, backoff_s=1.0, backoff_max_s=4.0)


class GroupMachine(RuleBasedStateMachine):
    """Publishes, delivers, answers, fails, comes, goes and restarts at random, against a plain model."""

    members = Bundle("members")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.log = [[] for _ in range(PARTITIONS)]
        self.done = set()
        self.dead = set()
        self.deliveries = {}
        self.out = {}
        self.failed = set()
        self.start([GroupPosition(0)] * PARTITIONS)

    def start(self, positions):
        self.cursors = [Cursor(p, position, limit=12) for p, position in enumerate(positions)]
        self.group = Group(self.cursors, POLICY, max_in_flight=20)
        self.alive = []

    @rule(partition=st.integers(0, PARTITIONS - 1), keys=st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=6))
    def publish(self, partition, keys):
        log = self.log[partition]
        for key in keys:
            log.append(StoredEvent(partition, len(log), f"{partition}/{len(log)}", key, b"x", 0))

    @rule(target=members, credit=st.integers(0, 20), timeout=st.sampled_from([1.0, 5.0]))
    def join(self, credit, timeout):
        member = Member("", timeout, credit)
        self.group.join(member)
        self.alive.append(member)
        return member

    @rule(member=consumes(members))
    def leave(self, member):
        if member in self.alive:
            self.alive.remove(member)
            self.fail([d for who, d in self.out.values() if who is member])
            self.group.leave(member, self.now)
            self.group.settle()

    @rule(member=members, credit=st.integers(0, 10))
    def poll(self, member, credit):
        if member not in self.alive:
            return
        if credit:
            self.group.grant(member, credit)
        self.receive(member)

    def receive(self, member):
        for cursor in self.group.readable(member):
            end = self.log[cursor.partition]
            cursor.feed(end[cursor.fetch : cursor.fetch + cursor.room()])
        for delivery in self.group.poll(member, self.now, 8, 1 << 20):
            self.received(member, delivery)

    def received(self, member, delivery):
        event = delivery.event
        assert event.id not in self.out, "an event is with one member at a time"
        assert event.id not in self.done, "what was acknowledged does not come again"
        assert event.id not in self.dead
        count = self.deliveries.get(event.id, 0) + 1
        self.deliveries[event.id] = count
        assert delivery.attempt == count <= MAX_ATTEMPTS
        if event.key:
            earlier = [e for e in self.log[event.partition][: event.offset] if e.key == event.key]
            for one in earlier:
                assert one.id in self.done | self.dead | self.out.keys(), "a key goes on only past what is not waiting"
        self.out[event.id] = (member, delivery)

    @rule(member=members, data=st.data())
    def ack(self, member, data):
        for delivery in self.some(member, data):
            assert 1 == self.group.ack(member, [delivery.delivery_id])
            del self.out[delivery.event.id]
            self.done.add(delivery.event.id)
        self.group.settle()

    @rule(member=members, data=st.data(), delay=st.sampled_from([None, 0.0, 2.0]))
    def nack(self, member, data, delay):
        chosen = self.some(member, data)
        self.fail(chosen)
        ids = [d.delivery_id for d in chosen]
        assert len(ids) == self.group.nack(member, ids, self.now, reason="no", delay_s=delay)
        self.group.settle()

    def some(self, member, data):
        own = [d for who, d in self.out.values() if who is member]
        return data.draw(st.lists(st.sampled_from(own), unique_by=id)) if own else []

    def fail(self, deliveries):
        for delivery in deliveries:
            del self.out[delivery.event.id]

    @rule(seconds=st.floats(0.0, 6.0))
    def pass_time(self, seconds):
        self.now += seconds
        self.group.expire(self.now)
        held = {(c.partition, i.offset) for m in self.alive for c, i in m.in_flight.values()}
        self.fail([d for _, d in list(self.out.values()) if (d.event.partition, d.event.offset) not in held])
        self.group.settle()

    @rule(fails=st.booleans())
    def bury(self, fails):
        if fails:
            return  # the dead-letter topic had no room: later
        for exhausted in self.group.exhausted:
            exhausted.cursor.buried(exhausted.item)
            assert MAX_ATTEMPTS == exhausted.item.attempts
            self.dead.add(exhausted.item.event.id)
        self.group.exhausted.clear()

    @rule()
    def crash_and_restart(self):
        """A clean end of the process: positions are saved, members and their deliveries are gone."""
        self.out.clear()
        self.start([cursor.position() for cursor in self.cursors])

    @invariant()
    def lag_is_exact(self):
        ends = [len(log) for log in self.log]
        assert sum(ends) - len(self.done) - len(self.dead) == self.group.lag(ends)

    @invariant()
    def partitions_are_shared(self):
        shared = sorted(p for m in self.group.members for p in self.group.partitions_of(m))
        assert shared == (list(range(PARTITIONS)) if self.group.members else [])

    @invariant()
    def silent_members_have_nothing_while_another_speaks(self):
        if any(not m.silent for m in self.group.members):
            assert [] == [p for m in self.group.members if m.silent for p in self.group.partitions_of(m)]

    def teardown(self):
        """Whatever happened, a patient member gets everything that is left: nothing is lost."""
        self.bury(fails=False)
        for member in list(self.alive):
            self.leave(member)
        self.work_off()

    def work_off(self):
        """A patient member comes and goes on until nothing is left."""
        patient = self.join(credit=0, timeout=5.0)
        for _ in range(10_000):
            if len(self.done) + len(self.dead) == sum(len(log) for log in self.log):
                break
            self.pass_time(10.0)
            self.bury(fails=False)
            self.poll(patient, 10)
            for identity, (member, delivery) in list(self.out.items()):
                if member is patient:
                    self.group.ack(member, [delivery.delivery_id])
                    del self.out[identity]
                    self.done.add(identity)
            for member in self.alive:
                self.receive(member)
        self.lag_is_exact()
        assert not self.done & self.dead
        assert len(self.done) + len(self.dead) == sum(len(log) for log in self.log)


TestGroupMachine = GroupMachine.TestCase
TestGroupMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class HangingMachine(GroupMachine):
    """As above, but at the end no member leaves: all hang, with credit and deliveries, beside the patient one."""

    def teardown(self):
        """Members that never speak again keep nothing from the one that does."""
        for member in self.alive:
            self.poll(member, 3)
        self.work_off()


TestHangingMachine = HangingMachine.TestCase
TestHangingMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
