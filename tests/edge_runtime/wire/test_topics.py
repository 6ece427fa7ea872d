"""Topics: the scheme, and that no id can escape its level."""

import pytest

from edge_runtime.wire import TopicError, topics


def test_the_scheme():
    assert topics.request("home", "b1") == "aiflow/home/b1/up/request"
    assert topics.request_share("gpu", "home") == "$share/gpu/aiflow/home/+/up/request"
    assert topics.reply("home", "b1") == "aiflow/home/b1/down/reply"
    assert topics.event("home", "b1") == "aiflow/home/b1/up/event"
    assert topics.last("home", "b1") == "aiflow/home/b1/up/last"
    assert topics.status("home", "b1") == "aiflow/home/b1/up/status"
    assert topics.server_status("home", "e1") == "aiflow/home/server/e1/status"
    assert topics.frame("home", "b1") == "aiflow/home/b1/down/frame"
    assert topics.setting("home", "b1", "fps") == "aiflow/home/b1/down/set/fps"
    assert topics.state("home", "b1", "min_confidence") == "aiflow/home/b1/up/state/min_confidence"


def test_a_reply_goes_where_its_request_came_from():
    topic = topics.request("home", "b1")
    assert topics.board_of(topic) == "b1"
    assert topics.reply_topic_for(topic) == topics.reply("home", "b1")


@pytest.mark.parametrize("bad", ["", "B1", "a/b", "+", "#", "a b", "x" * 33, "ä", "b1\n", "$share"])
def test_an_id_that_is_no_level_is_refused(bad: str):
    for build in (
        lambda: topics.request(bad, "b1"),
        lambda: topics.reply("home", bad),
        lambda: topics.request_share(bad, "home"),
        lambda: topics.server_status("home", bad),
        *([] if bad == "B1" else [lambda: topics.setting("home", "b1", bad)]),
    ):
        with pytest.raises(TopicError, match="must match"):
            build()


def test_a_setting_may_have_the_name_of_a_camera_of_frigate():
    assert topics.setting("home", "b1", "Front_Door_enabled") == "aiflow/home/b1/down/set/Front_Door_enabled"


def test_no_board_may_stand_where_the_servers_are():
    with pytest.raises(TopicError, match="rename"):
        topics.status("home", "server")
    with pytest.raises(TopicError):
        topics.board_of("aiflow/home/server/up/request")


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "aiflow/home/b1/up/requests",
        "aiflow/home/b1/up/request/",
        "aiflow/home/b1/up/request\n",
        "x/aiflow/home/b1/up/request",
        "aiflow/home/b/1/up/request",
        "aiflow/+/b1/up/request",
        "aiflow/home/B1/up/request",
        "aiflow/home/b1/down/reply",
    ],
)
def test_a_topic_that_is_no_request_is_refused(topic: str):
    for function in (topics.board_of, topics.reply_topic_for):
        with pytest.raises(TopicError, match="no request"):
            function(topic)
