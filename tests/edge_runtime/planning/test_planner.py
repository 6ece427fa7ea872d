"""Which setting counts: the camera's, the switch's or the board's; and the plans of the policy."""

import json
import time
from typing import Any

import pytest

from edge_runtime.capture.cameras import Cameras
from edge_runtime.config import BoardConfig, CameraConfig, OutboxConfig, RuntimeConfig
from edge_runtime.inference.draft_calibration import Calibration
from edge_runtime.mqtt import Message
from edge_runtime.planning import BoardPlanner, Measurements
from edge_runtime.reporting import RemoteSettings, board_settings
from edge_runtime.wire import Options, Tier, topics
from edge_runtime.wire.envelope import GREEDY
from edge_runtime.wire.event import Explain

CALIBRATION = Calibration(((0.5, 0.5), (0.9, 0.95)))


class Publisher:
    """Receives what a switch publishes."""

    def publish(self, *_: Any, **__: Any) -> bool:
        return True


class Board:
    """A planner and what it needs, without a head, a broker and a camera."""

    def __init__(
        self,
        outbox: OutboxConfig | None = None,
        has_room: bool = True,
        sampling: Options = GREEDY,
        **board: Any,
    ) -> None:
        own = CameraConfig("own", "mqtt", deadline_ms=100, paradigm="split", tier="edge", prompt="drive")
        cameras = CameraConfig("plain", "mqtt"), own
        config = RuntimeConfig(BoardConfig("b1", "bundle", **{"tier": "cloud", **board}), cameras, outbox=outbox)
        self.measurements = Measurements()
        self.settings = RemoteSettings("home", "b1", board_settings(config))
        self.planner = BoardPlanner(
            config,
            Cameras(cameras),
            self.settings,
            self.measurements,
            CALIBRATION,
            has_room=lambda: has_room,
            sampling={"plain": sampling},
        )

    def server_says(self, server: str = "s1", **status: Any) -> None:
        payload = json.dumps({"state": "online", "server": server, **status}).encode()
        self.measurements.status_arrived(topics.server_status("home", server), payload, time.monotonic())

    def set(self, name: str, value: str) -> None:
        topic = topics.setting("home", "b1", name)
        self.settings.message_arrived(Message(topic, value.encode(), 1, False, None, lambda: None), Publisher())


def test_a_configured_paradigm_is_the_plan_and_says_so():
    plan = Board(paradigm="speculative", jpeg_quality=60).planner.plan("plain")
    assert (plan.paradigm, plan.why, plan.explain) == (
        "speculative",
        "configured",
        Explain("speculative", "configured"),
    )
    assert (plan.budget_ms, plan.tier, plan.jpeg_quality, plan.keep) == (5000, Tier.CLOUD, 60, False)


def test_a_cameras_own_settings_take_precedence_over_the_boards():
    plan = Board(paradigm="speculative").planner.plan("own")
    assert (plan.paradigm, plan.budget_ms, plan.tier) == ("split", 100, Tier.EDGE)


def test_a_switch_replaces_the_boards_setting():
    board = Board(paradigm="speculative")
    board.set("paradigm", "device")
    assert board.planner.plan("plain").paradigm == "device"
    assert board.planner.plan("own").paradigm == "split"


def test_a_cameras_prompt_is_planned_for_and_can_be_switched():
    board = Board(tier=None)
    assert (board.planner.plan("plain").prompt, board.planner.plan("own").prompt) == ("", "drive")
    board.set("plain_prompt", "gate")
    board.set("own_prompt", "none")
    plan = board.planner.plan("plain")
    assert (plan.prompt, board.planner.plan("own").prompt) == ("gate", "")
    assert plan.min_confidence is None  # a draft answers no prompt
    assert plan.camera == "plain"  # one of two
    status = {"state": "online", "server": "s1", "target": {"latents": False, "prompts": ["gate"]}}
    board.measurements.status_arrived(topics.server_status("home", "s1"), json.dumps(status).encode(), time.monotonic())
    assert board.planner.plan("plain").paradigm == "offload"
    board.set("plain_prompt", "drive")
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.why) == ("device", "device: no server has the prompt drive")


@pytest.mark.parametrize("paradigm", ["split", "speculative", "offload"])
def test_a_request_for_a_prompt_that_no_server_has_is_not_sent_whatever_the_paradigm(paradigm):
    board = Board()
    board.set("paradigm", paradigm)
    board.set("plain_prompt", "Gate")
    assert board.planner.plan("plain").paradigm == paradigm  # nothing is known of the servers
    board.server_says(target={"latents": False, "prompts": ["gate"]})
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.why) == ("device", "device: no server has the prompt Gate")
    assert plan.explain == Explain("device", plan.why)
    board.set("plain_prompt", "gate")
    assert board.planner.plan("plain").paradigm == paradigm


@pytest.mark.parametrize("paradigm", ["auto", "split"])
@pytest.mark.parametrize(
    ("status", "reason"),
    [({"accepting": False, "why": "the budget is spent"}, "the budget is spent"), ({"state": "offline"}, "offline")],
)
def test_a_frame_waits_for_the_server_that_has_its_prompt(paradigm, status, reason):
    board = Board(OutboxConfig("outbox.db"), tier=None)
    board.set("paradigm", paradigm)
    board.set("plain_prompt", "gate")
    target = {"latents": True, "prompts": ["gate"]}
    board.server_says(target=target)
    board.server_says(**({"target": target} if status.get("why") else {}), **status)
    board.server_says("s2")
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.keep) == ("speculative", True)
    assert f"no server with the prompt gate takes requests: s1 ({reason})" in plan.why


def test_while_the_only_server_accepts_no_requests_the_device_answers_every_frame(monkeypatch):
    board = Board(tier=None)
    board.set("plain_prompt", "gate")
    start = time.monotonic()
    for second in range(300):
        monkeypatch.setattr(time, "monotonic", lambda now=start + second: now)
        if second % 10 == 0:
            board.server_says(
                target={"latents": False, "prompts": ["gate"]}, accepting=False, why="the budget is spent"
            )
        plan = board.planner.plan("plain")
        assert plan.paradigm == "device"
        assert plan.why.startswith("device: no server takes requests: s1 (the budget is spent): ")
    board.server_says(target={"latents": False, "prompts": ["gate"]})
    assert board.planner.plan("plain").paradigm == "offload"


def test_a_server_that_died_while_it_accepted_no_requests_is_tried_again(monkeypatch):
    board = Board(tier=None)
    start = time.monotonic()
    board.server_says(accepting=False)
    tries = []
    for second in range(90):
        monkeypatch.setattr(time, "monotonic", lambda now=start + second: now)
        tries += [second] * (board.planner.plan("plain").paradigm != "device")
    assert tries == [62, 64, 68, 76]


def test_a_sampled_text_is_asked_of_a_server_that_samples_and_no_draft_is_final():
    board = Board(tier=None, sampling=Options(temperature=0.7))
    plan = board.planner.plan("plain")
    assert (plan.sampling, plan.min_confidence) == (Options(temperature=0.7), None)
    assert board.planner.plan("own").sampling == GREEDY
    assert Board(tier=None).planner.plan("plain").min_confidence is not None
    status = {"state": "online", "server": "s1", "target": {"sample": False}}
    board.measurements.status_arrived(topics.server_status("home", "s1"), json.dumps(status).encode(), time.monotonic())
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.why) == ("device", "device: no server has a target that samples")


def test_every_plan_of_the_policy_explains_itself():
    plan = Board().planner.plan("plain")
    assert plan.explain is not None
    assert (plan.paradigm, plan.why) == (plan.explain.chosen, plan.explain.reason)
    assert plan.explain.expected_ms.keys() == {"split", "speculative", "offload"}


def test_the_server_may_propose_tokens_itself_only_if_the_policy_chooses():
    board = Board(paradigm="split")
    assert not board.planner.plan("plain").propose
    board.set("paradigm", "offload")
    assert not board.planner.plan("plain").propose
    board.set("paradigm", "auto")
    board.measurements.frame_handled("speculative", {"head": 1.0, "draft": 500.0}, 0.0)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.propose) == ("split", True)


def test_a_link_that_is_down_leaves_the_frame_to_the_device():
    board = Board()
    board.measurements.connected(False)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.keep) == ("device", False)
    assert "no connection to the broker, next try in" in plan.why


def test_with_an_outbox_the_request_is_kept_while_the_link_is_down(tmp_path):
    board = Board(OutboxConfig(str(tmp_path / "outbox")))
    board.measurements.connected(False)
    plan = board.planner.plan("plain")
    assert (plan.paradigm, plan.keep) == ("speculative", True)
    assert plan.why.endswith("; kept until there is room")


@pytest.mark.parametrize("paradigm", ["auto", "split", "speculative", "offload"])
def test_when_too_many_requests_wait_the_device_answers_or_the_outbox_keeps_the_request(paradigm, tmp_path):
    board = {} if paradigm == "offload" else {"paradigm": paradigm}
    plans = [Board(outbox, has_room=False, **board) for outbox in (None, OutboxConfig(str(tmp_path / "outbox")))]
    if paradigm == "offload":  # by a switch: the board has a head
        for each in plans:
            each.set("paradigm", "offload")
    alone, kept = (each.planner.plan("plain") for each in plans)
    assert (alone.paradigm, alone.keep) == ("device", False)
    assert alone.why == "device: 64 requests wait already"
    assert (kept.paradigm, kept.keep) == ("speculative", True)


def test_a_camera_whose_deadline_cannot_be_met_does_not_hold_up_another():
    board = Board()
    board.measurements.connected(False)
    now = {camera: board.planner.plan(camera).why for camera in ("plain", "own")}
    assert "next try in 1 s" in now["plain"]
    policies = board.planner._policies
    assert policies["plain"]._retry is not None
    assert policies["own"]._retry is None


@pytest.mark.parametrize(("confidence", "accepted"), [(0.95, True), (0.8, False), (float("nan"), False)])
def test_a_draft_with_enough_confidence_is_accepted_without_verification(confidence, accepted):
    assert Board(tier=None).planner.plan("plain").accepts(confidence) == accepted


def test_the_quality_floor_is_a_switch():
    board = Board(tier=None)
    board.set("quality_floor", "0.5")
    assert board.planner.plan("plain").min_confidence == 0.5


@pytest.mark.parametrize("settings", [{"paradigm": "speculative", "tier": None}, {"tier": "edge"}])
def test_a_configured_paradigm_or_tier_has_every_draft_verified(settings):
    plan = Board(**settings).planner.plan("plain")
    assert plan.min_confidence is None
    assert not plan.accepts(1.0)


def test_a_later_plan_does_not_change_what_an_earlier_one_accepts():
    board = Board(tier=None)
    plan = board.planner.plan("plain")
    board.set("quality_floor", "0.5")
    board.planner.plan("plain")
    assert not plan.accepts(0.8)


def test_the_share_of_drafts_that_need_no_verification_is_measured_even_if_no_draft_can_be_good_enough():
    board = Board(tier=None)
    for floor, confidence in (("0.9", 0.95), ("0.9", 0.6), ("1", 1.0), ("1", 0.99)):
        board.set("quality_floor", floor)
        board.planner.learn(board.planner.plan("plain"), {}, confidence)
    assert board.measurements.snapshot(0.0).board.accepted_unverified_share == 0.25


@pytest.mark.parametrize("settings", [{"paradigm": "speculative", "tier": None}, {"tier": "edge"}])
def test_drafts_that_must_be_verified_do_not_count_in_this_share(settings):
    board = Board(**settings)
    board.planner.learn(board.planner.plan("plain"), {}, 0.95)
    assert board.measurements.snapshot(0.0).board.accepted_unverified_share is None


def test_the_queue_of_the_measurements_never_fills_while_the_paradigm_is_configured(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    board = Board(paradigm="speculative")
    for number in range(2000):
        now += 1.0
        board.measurements.sent(number.to_bytes(8, "big"), "speculative", 400, now)
        board.planner.learn(board.planner.plan("plain"), {"head": 5.0}, None)
    assert not board.measurements.counts.total()
