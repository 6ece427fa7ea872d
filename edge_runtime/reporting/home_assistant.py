"""A board in Home Assistant: one device with its entities, in one discovery message. Values in, JSON out.

Home Assistant 2024.12 and newer read it: "MQTT", "Device discovery payload" in its documentation, with the documented
abbreviations as keys. No value is sent a second time: entities read the board's own topics by templates. Names in the
message come from the checked configuration alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from edge_runtime import __version__
from edge_runtime.config import CameraConfig, RuntimeConfig
from edge_runtime.reporting import templates
from edge_runtime.reporting.remote_settings import Setting
from edge_runtime.wire import topics
from edge_runtime.wire.event import EVENT_TYPES, PARADIGMS
from edge_runtime.wire.update import INSTALL

MAX_STATE = 255  # characters of a state in Home Assistant
MAX_PROMPT_NAME = 32  # characters
CAMERA_STATES = ("starting", "waiting", "live", "stalled", "frozen", "lost", "ended", "off")
CAPTION_FIELDS = {"text": templates.shown("text")} | templates.fields(
    "camera", "frame", "captured", final="false", confidence="none", unsure="false", cut="false", answered_by="none"
)
EVENT_FIELDS = (
    {"event_type": "value_json.type", "label": f"{templates.shown('label')} or none"}
    | {name: templates.shown(name) for name in ("trigger", "why")}
    | CAPTION_FIELDS
    | templates.fields(answers="{}", frigate="none")
)
Entity = tuple[str, dict[str, Any]]  # name in the device, which no other entity of it has; its keys


def device_message(
    config: RuntimeConfig, settings: Iterable[Setting], *, has_labels: bool, has_link: bool
) -> dict[str, Any]:
    """The payload of `topics.discovery`, before it becomes JSON.

    has_labels: the bundle classifies. has_link: the status says whether the servers' broker is reached.
    """
    site, board = config.board.site, config.board.id
    device = topics.device_id(site, board)
    has_image = config.homeassistant is not None and config.homeassistant.images
    entities = [*_board_entities(site, board, has_link)]
    if config.updates:
        entities.append(_update_entity(site, board, config.updates.ask))
    entities += [_setting_entity(site, board, setting) for setting in settings]
    for camera in config.cameras:
        entities += _camera_entities(site, board, camera, has_labels, has_image)
    return {
        "dev": {"ids": [device], "name": board, "mdl": "aiflow-edge board", "sw": __version__},
        "o": {"name": "aiflow-edge", "sw": __version__},
        "avty_t": topics.status(site, board),
        "avty_tpl": "{{ value_json.state }}",
        "cmps": {name: {**keys, "uniq_id": f"{device}.{name}"} for name, keys in entities},
    }


def encode_device_message(message: Mapping[str, Any], removed: Mapping[str, str]) -> bytes:
    """JSON. removed: entities of an earlier message that are no more, name to platform.

    Home Assistant removes an entity whose keys are its platform alone. These come first: it skips the rest of a message
    after an entity that is still being set up.
    """
    gone = {name: {"p": platform} for name, platform in removed.items()}
    return msgspec.json.encode({**message, "cmps": gone | message["cmps"]})


def _board_entities(site: str, board: str, has_link: bool) -> Iterator[Entity]:
    status, problems = topics.status(site, board), "value_json.problems | default({})"
    shared = {"p": "binary_sensor", "ent_cat": "diagnostic", "stat_t": status}
    yield (
        "problem",
        shared
        | {
            "name": "Problem",
            "dev_cla": "problem",
            "val_tpl": f"{{{{ 'ON' if {problems} else 'OFF' }}}}",
            "json_attr_t": status,
            "json_attr_tpl": f"{{{{ {templates.as_json({'problems': problems})} }}}}",
        },
    )
    if has_link:
        is_on = f"{{{{ 'OFF' if 'link' in ({problems}) else 'ON' }}}}"
        yield "link", shared | {"name": "Link to servers", "dev_cla": "connectivity", "val_tpl": is_on}


def _update_entity(site: str, board: str, has_install: bool) -> Entity:
    """The board's bundle. has_install: a new one waits until a user installs it."""
    # Not `value_json.update`, which is a method of the object.
    new = "value_json['update']"
    state = {
        "installed_version": "value_json.bundle_version",
        "latest_version": f"{new}.version or value_json.bundle_version",
        "title": "value_json.bundle_name",
        "release_summary": f"{new}.why | {templates.PRINTABLE}",
        "update_percentage": f"{new}.percent if {new}.state == 'receiving' else none",
        "in_progress": f"{new}.state in ('receiving', 'testing', 'installed')",
    }
    keys = {"p": "update", "name": "Bundle", "ent_cat": "config", "stat_t": topics.status(site, board)}
    keys["val_tpl"] = templates.event(f"{new} is mapping", state)
    return "bundle", keys | ({"cmd_t": topics.bundle_install(site, board), "pl_inst": INSTALL} if has_install else {})


def _setting_entity(site: str, board: str, setting: Setting) -> Entity:
    """A run-time setting. The values on its topics are those that Home Assistant expects."""
    kinds: dict[str, dict[str, Any]] = {
        "paradigm": {"p": "select", "name": "Paradigm setting", "ops": setting.words},
        "quality_floor": {"p": "number", "name": "Quality floor", "min": 0, "max": 1, "step": 0.01, "mode": "box"},
        "paused": {"p": "switch", "name": "Paused"},
        "enabled": {"p": "switch", "name": f"{setting.camera} enabled"},
        "motion": {"p": "switch", "name": f"{setting.camera} only with motion"},
        "prompt": {"p": "text", "name": f"{setting.camera} prompt", "max": MAX_PROMPT_NAME},
    }
    return f"setting.{setting.name}", kinds[setting.kind] | {
        "ent_cat": "config",
        "cmd_t": topics.setting(site, board, setting.name),
        "stat_t": topics.state(site, board, setting.name),
    }


def _camera_entities(
    site: str, board: str, camera: CameraConfig, has_labels: bool, has_image: bool
) -> Iterator[Entity]:
    last, status = topics.last(site, board), topics.status(site, board)
    is_own = f"value_json.camera == {templates.quoted(camera.name)}"

    def entity(kind: str, platform: str, title: str, **keys: Any) -> Entity:
        return f"camera.{camera.name}.{kind}", {"p": platform, "name": f"{camera.name} {title}", **keys}

    def text_sensor(kind: str, title: str, condition: str, value: str, attributes: Mapping[str, str]) -> Entity:
        condition = f"{is_own} and {condition}"
        return entity(
            kind,
            "sensor",
            title,
            stat_t=last,
            val_tpl=templates.text(condition, f"({value} | {templates.PRINTABLE})[:{MAX_STATE}]"),
            json_attr_t=last,
            json_attr_tpl=templates.attributes(condition, attributes),
        )

    def number_sensor(kind: str, title: str, condition: str, value: str, device_class: str, unit: str) -> Entity:
        template = templates.number(f"{is_own} and {condition}", value)
        keys = {"dev_cla": device_class, "unit_of_meas": unit, "stat_cla": "measurement"}
        return entity(kind, "sensor", title, stat_t=last, val_tpl=template, **keys)

    def choice_sensor(kind: str, title: str, topic: str, condition: str, value: str, words: Iterable[str]) -> Entity:
        keys = {"dev_cla": "enum", "ops": tuple(words), "ent_cat": "diagnostic"}
        return entity(kind, "sensor", title, stat_t=topic, val_tpl=templates.text(condition, value), **keys)

    # Home Assistant ignores retained messages for an event, so it reads the topic that has none.
    template, topic = templates.event(is_own, EVENT_FIELDS), topics.event(site, board)
    yield entity("event", "event", "event", evt_typ=EVENT_TYPES, stat_t=topic, val_tpl=template, qos=1)
    yield text_sensor("caption", "caption", "value_json.text is defined", "value_json.text", CAPTION_FIELDS)
    if has_labels:
        scores = templates.fields(scores="{}")
        yield text_sensor("label", "label", "value_json.label is defined", "value_json.label", scores)
    for question in camera.questions:
        shares = f"(value_json.answers | default({{}})).get({templates.quoted(question)})"
        likeliest = f"({shares} | dictsort(false, 'value') | last)[0]"
        yield text_sensor(f"question.{question}", question, shares, likeliest, {"probabilities": shares})
    has_paradigm = f"{is_own} and value_json.paradigm is defined"
    yield choice_sensor("paradigm", "paradigm", last, has_paradigm, "value_json.paradigm", PARADIGMS)
    is_verified = "value_json.type == 'update' and value_json.final | default(false)"
    yield number_sensor("bytes", "bytes sent", "true", "value_json.bytes_up | default(0)", "data_size", "B")
    yield number_sensor(
        "after", "time to verified text", is_verified, "value_json.after_ms | default(0)", "duration", "ms"
    )
    state = f"(value_json.cameras | default({{}})).get({templates.quoted(camera.name)})"
    yield choice_sensor("state", "state", status, state, state, CAMERA_STATES)
    if has_image:
        yield entity(
            "image", "image", "last frame", img_t=topics.image(site, board, camera.name), cont_type="image/jpeg"
        )
