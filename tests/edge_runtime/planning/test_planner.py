"""Whose setting counts: the camera's, the switch's, the board's; and what the policy makes of "auto"."""

from typing import Any

import pytest

from edge_runtime.capture import Cameras
from edge_runtime.config import BoardConfig, CameraConfig, OutboxConfig, PolicyConfig, RuntimeConfig
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.mqtt.client import Message
from edge_runtime.planning.measurements import Estimates
from edge_runtime.planning.planner import BoardPlanner
from edge_runtime.planning.policy import Policy
from edge_runtime.reporting.remote_settings import Switches, board_switches
from edge_runtime.wire import Tier, topics
from edge_runtime.wire.event import Explain

SURE = Calibration(((0.5, 0.5), (0.9, 0.95)))


class Told:
    """Takes what a switch publishes."""

    def publish(self, *_: Any, **__: Any) -> bool:
        return True


class Board:
    """What plans are made of, without a head, a broker and a camera."""

    def __init__(self, outbox: OutboxConfig | None = None, has_room: bool = True, **board: Any) -> None:
        own = CameraConfig("own", "mqtt", deadline_ms=100, paradigm="split", tier="edge")
        cameras = CameraConfig("plain", "mqtt"), own
        config = RuntimeConfig(BoardConfig("b1", "bundle", **{"tier": "cloud", **board}), cameras, outbox=outbox)
        self.estimates = Estimates()
        self.switches = Switches("home", "b1", board_switches(config, Cameras(cameras)))
        self.planner = BoardPlanner(
            config,
            Cameras(cameras),
            self.switches,
            lambda: Policy(PolicyConfig(), calibration=SURE),
            self.estimates,
            lambda: has_room,
        )

    def set(self, name: str, value: str) -> None:
        topic = topics.setting("home", "b1", name)
        assert self.switches.heard(Message(topic, value.encode(), 1, False, None, lambda: None), Told())


def test_a_configured_paradigm_is_the_plan_and_says_so():
    plan = Board(paradigm="speculative", jpeg_quality=60).planner.plan("plain")
    assert (plan.paradigm, plan.why, plan.explain) == (
        "speculative",
        "configured",
        Explain("speculative", "configured"),
    )
    assert (plan.budget_ms, plan.tier, plan.jpeg_quality, plan.keeps) == (5000, Tier.CLOUD, 60, False)


def test_a_cameras_own_settings_come_before_the_boards():
    plan = Board(paradigm="speculative").planner.plan("own")
    assert (plan.paradigm, plan.budget_ms, plan.tier) == ("split", 100, Tier.EDGE)


def test_a_switch_takes_the_place_of_the_boards_setting():
    board = Board(paradigm="speculative")
    board.set("paradigm", "device")
    assert board.planner.plan("plain").paradigm == "device"
    assert board.planner.plan("own").paradigm == "split"


def test_where_the_policy_chooses_every_plan_explains_itself():
    plan = Board().planner.plan("plain")
    assert plan.explain is not None
    assert (plan.paradigm, plan.why) == (plan.explain.chosen, plan.explain.reason)
    assert plan.explain.expected_ms.keys() == {"split", "speculative", "offload"}


def test_only_where_the_policy_chooses_may_the_server_propose_words_to_itself():
    board = Board(paradigm="split")
    assert not board.planner.plan("plain").proposes
    board.set("paradigm", "offload")
    assert not board.planner.plan("plain").proposes
    board.set("paradigm", "auto")
    board.estimates.took("speculative", {"head": 1.0, "draft": 500.0}, 0.0)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.proposes) == ("split", True)


def test_a_link_that_is_away_leaves_the_frame_to_the_device():
    board = Board()
    board.estimates.connected(False)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.keeps) == ("device", False)
    assert "link offline, next try in" in plan.why


def test_with_an_outbox_what_the_link_cannot_take_is_kept(tmp_path):
    board = Board(OutboxConfig(str(tmp_path / "outbox")))
    board.estimates.connected(False)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.keeps) == ("speculative", True)
    assert plan.why.endswith("; kept until there is room")


@pytest.mark.parametrize("paradigm", ["auto", "split", "speculative", "offload"])
def test_where_as_many_requests_wait_as_may_the_device_answers_or_the_outbox_keeps(paradigm, tmp_path):
    board = {} if paradigm == "offload" else {"paradigm": paradigm}
    plans = [Board(outbox, has_room=False, **board) for outbox in (None, OutboxConfig(str(tmp_path / "outbox")))]
    if paradigm == "offload":  # by a switch: the board has a head
        for each in plans:
            each.set("paradigm", "offload")
    alone, kept = (each.planner.plan("plain") for each in plans)
    assert (alone.paradigm, alone.keeps) == ("device", False)
    assert alone.why == "device: 64 requests wait already"
    assert (kept.paradigm, kept.keeps) == ("speculative", True)


def test_a_camera_whose_deadline_cannot_be_met_does_not_hold_up_another():
    board = Board()
    board.estimates.connected(False)
    now = {camera: board.planner.plan(camera).why for camera in ("plain", "own")}
    assert "next try in 1 s" in now["plain"]
    policies = board.planner._policies
    assert policies["plain"]._trying is not None
    assert policies["own"]._trying is None


@pytest.mark.parametrize(("confidence", "stands"), [(0.95, True), (0.8, False), (float("nan"), False)])
def test_a_draft_stands_when_it_is_sure_enough(confidence, stands):
    board = Board(tier=None)
    assert (board.planner.stands(board.planner.plan("plain"), confidence) is not None) == stands


def test_the_floor_of_what_is_sure_enough_is_a_switch():
    board = Board(tier=None)
    board.set("quality_floor", "0.5")
    assert board.planner.stands(board.planner.plan("plain"), 0.6) == "the draft is sure enough: confidence 0.60"


@pytest.mark.parametrize("settings", [{"paradigm": "speculative", "tier": None}, {"tier": "edge"}])
def test_who_configures_speculative_or_a_tier_gets_every_draft_verified(settings):
    planner = Board(**settings).planner
    assert planner.stands(planner.plan("plain"), 1.0) is None


def test_what_is_told_is_taken_in_and_forgotten_where_nothing_is_to_be_chosen_too(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    board = Board(paradigm="speculative")
    for number in range(2000):
        now += 1.0
        board.estimates.sent(number.to_bytes(8, "big"), "speculative", 400, now)
        board.planner.took(board.planner.plan("plain"), {"head": 5.0})
    assert not board.estimates.counts.total()
