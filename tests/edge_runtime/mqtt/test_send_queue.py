"""The queue behind the MQTT client, over any order of events."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_runtime.mqtt.send_queue import MAX_SENDS, Outcome, OutgoingMessage, SendQueue


def message(name: str, **options: float) -> OutgoingMessage:
    return OutgoingMessage(name, b"x", 1, False, **options)


def filled(*names: str) -> SendQueue:
    queue = SendQueue(10, 100)
    for name in names:
        queue.accept(message(name))
    return queue


def take_all(queue: SendQueue, window: int) -> list[OutgoingMessage]:
    taken: list[OutgoingMessage] = []
    while len(taken) < window and (one := queue.take(taken)):
        taken.append(one)
    return taken


def test_what_was_in_flight_goes_first_and_in_its_order() -> None:
    queue = filled("1", "2", "3", "4")
    queue.give_back(take_all(queue, window=2), by_broker=False)
    assert [one.topic for one in take_all(queue, window=9)] == ["1", "2", "3", "4"]


def test_what_may_have_cost_the_connection_flies_alone_until_it_is_delivered_or_convicted() -> None:
    queue = filled("poison", "innocent", "new")
    assert queue.give_back(take_all(queue, window=2), by_broker=True) == []
    for _ in range(MAX_SENDS - 2):
        alone = take_all(queue, window=2)
        assert [one.topic for one in alone] == ["poison"]
        assert queue.give_back(alone, by_broker=True) == []
    assert [one.topic for one in queue.give_back(take_all(queue, window=2), by_broker=True)] == ["poison"]
    (innocent,) = take_all(queue, window=2)
    queue.end(innocent, Outcome.DELIVERED)
    assert [one.topic for one in take_all(queue, window=2)] == ["new"]
    assert queue.counts()["refused"] == 1


def test_a_lost_link_convicts_nobody() -> None:
    queue = filled("1")
    for _ in range(2 * MAX_SENDS):
        assert queue.give_back(take_all(queue, window=1), by_broker=False) == []
    assert queue.counts()["pending"] == 1


def test_what_was_taken_makes_room_for_as_many_bytes() -> None:
    queue = SendQueue(max_messages=10, max_bytes=10)
    for number in range(3):
        queue.accept(OutgoingMessage(str(number), b"x" * 8, 1, False))
        assert [one.topic for one in take_all(queue, window=1)] == [str(number)]
    assert queue.counts()["dropped"] == 0


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Every message is told its outcome exactly once; the bounds hold; nothing overtakes."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = SendQueue(max_messages=4, max_bytes=20)
        self.in_flight: list[OutgoingMessage] = []
        self.told: Counter[int] = Counter()
        self.accepted, self.now = 0, 0.0

    def tell(self) -> None:
        while untold := self.queue.next_untold():
            untold[0](untold[1])

    @rule(size=st.integers(0, 12), budget=st.one_of(st.just(float("inf")), st.floats(0, 9)), refused=st.booleans())
    def publish(self, size: int, budget: float, refused: bool) -> None:
        number, self.accepted = self.accepted, self.accepted + 1
        one = OutgoingMessage(
            str(number), b"x" * size, 1, False, self.now + budget, lambda _: self.told.update([number])
        )
        ended = self.queue.accept(one, Outcome.OVERSIZED if refused else None)
        assert ended is not None or not refused

    @rule(window=st.integers(1, 3))
    def fill_the_window(self, window: int) -> None:
        while len(self.in_flight) < window and (one := self.queue.take(self.in_flight)):
            self.in_flight.append(one)
        numbers = [int(one.topic) for one in self.in_flight]
        assert numbers == sorted(numbers)

    @rule()
    def acknowledge(self) -> None:
        if self.in_flight:
            self.queue.end(self.in_flight.pop(0), Outcome.DELIVERED)

    @rule(by_broker=st.booleans())
    def lose_the_connection(self, by_broker: bool) -> None:
        self.queue.give_back(self.in_flight, by_broker)
        self.in_flight = []

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        assert self.queue.sweep(self.now) > self.now

    @rule()
    def close(self) -> None:
        self.queue.close()

    @invariant()
    def each_has_ended_once_or_is_pending(self) -> None:
        self.tell()
        counts = self.queue.counts()
        assert set(self.told.values()) <= {1}
        assert counts["published"] == self.accepted == sum(self.told.values()) + counts["pending"]
        assert counts["pending"] <= 4 + 3

    def teardown(self) -> None:
        self.queue.give_back(self.in_flight, by_broker=False)
        self.queue.end_all()
        self.tell()
        assert self.told == dict.fromkeys(range(self.accepted), 1)


AnyOrderOfEvents.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
