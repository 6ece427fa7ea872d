"""Messages reach the function of their topic, or are counted and logged."""

import logging
from collections import Counter

from edge_runtime.mqtt import Message
from edge_runtime.mqtt.routes import Rejection, Route, Router
from edge_runtime.mqtt.settings import MAX_PACKET


def message(topic: str, retained: bool = False) -> Message:
    return Message(topic, b"x", 1, retained, None, lambda: None)


class Taken:
    """A router with three routes, and what they took."""

    def __init__(self) -> None:
        self.replies, self.statuses, self.pictures = list[str](), list[str](), list[str]()
        self.router = Router(
            [
                Route("b1/down/reply", lambda m: self.replies.append(m.topic)),
                Route("server/+/status", lambda m: self.statuses.append(m.topic), qos=0, accepts_retained=True),
                Route("b1/down/frame/#", self.picture),
            ]
        )

    def picture(self, message: Message) -> Rejection | None:
        self.pictures.append(message.topic)
        return ("no_camera", "use another topic") if message.topic.endswith("unknown") else None

    def arrive(self, topic: str, retained: bool = False) -> None:
        self.router.message_arrived(message(topic, retained))


def test_a_client_subscribes_to_what_has_a_route():
    assert Taken().router.subscriptions == [("b1/down/reply", 1), ("server/+/status", 0), ("b1/down/frame/#", 1)]


def test_a_client_takes_the_largest_packets_that_a_route_expects_and_can_do_without_its_optional_ones():
    routes = [
        Route("reply", print),
        Route("frame", print, max_packet=MAX_PACKET + 1),
        Route("status", print, optional=True),
    ]
    router = Router(routes)
    assert (router.max_packet, router.optional) == (MAX_PACKET + 1, ["status"])
    assert Router(routes[:1]).max_packet == MAX_PACKET


def test_a_message_goes_to_the_function_of_its_topic():
    taken = Taken()
    for topic in ("b1/down/reply", "server/s1/status", "b1/down/frame", "b1/down/frame/door"):
        taken.arrive(topic)
    assert (taken.replies, taken.statuses) == (["b1/down/reply"], ["server/s1/status"])
    assert taken.pictures == ["b1/down/frame", "b1/down/frame/door"]
    assert not any(taken.router.rejected().values())


def test_what_the_broker_had_kept_is_used_only_where_it_still_says_something_true(caplog):
    taken = Taken()
    for topic in ("b1/down/reply", "b1/down/frame/door", "server/s1/status"):
        taken.arrive(topic, retained=True)
    assert (taken.replies, taken.statuses, taken.pictures) == ([], ["server/s1/status"], [])
    assert taken.router.rejected()["retained"] == 2
    assert "topic=b1/down/reply reason=retained count=1: publish it without the retain flag" in caplog.text


def test_what_has_no_route_or_is_rejected_by_its_function_is_counted_and_logged_rarely(caplog):
    taken = Taken()
    for _ in range(100):
        taken.arrive("somewhere\nelse")
        taken.arrive("b1/down/frame/unknown")
    assert +Counter(taken.router.rejected()) == {"no_camera": 100, "no_route": 100}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 * 7
    assert not any("\n" in line for line in warnings)
