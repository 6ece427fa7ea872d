"""What Home Assistant's documentation says of device discovery, as JSON Schema, and its templates, as far as used here.

Sources: "MQTT" (Device discovery payload, supported abbreviations), "MQTT Event", "MQTT Sensor", "MQTT Binary sensor",
"MQTT Switch", "MQTT Select", "MQTT Number", "MQTT Image", "MQTT Update" and
"Templating" in Home Assistant's documentation of 2024.12.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jsonschema import Draft202012Validator

TOPIC = {"type": "string", "minLength": 1, "pattern": "^[^+#\\u0000]+$"}
TEXT = {"type": "string", "minLength": 1}
WORDS = {"type": "array", "minItems": 1, "uniqueItems": True, "items": TEXT}
# Keys that each entity may have. One in a device message needs a unique id.
ENTITY = {
    "p": TEXT,
    "name": TEXT,
    "uniq_id": TEXT,
    "ent_cat": {"enum": ["config", "diagnostic"]},
    "json_attr_t": TOPIC,
    "json_attr_tpl": TEXT,
    "qos": {"enum": [0, 1, 2]},
}
READS = {"stat_t": TOPIC, "val_tpl": TEXT}
WRITES = {"cmd_t": TOPIC, "stat_t": TOPIC}


def _entity(platform: str, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "properties": {**ENTITY, **required, **(optional or {}), "p": {"const": platform}},
        "required": ["p", "uniq_id", *required],
        "additionalProperties": False,
    }


ENTITIES = [
    _entity("event", READS | {"evt_typ": WORDS}),
    _entity("sensor", READS),
    _entity("sensor", READS | {"dev_cla": {"const": "enum"}, "ops": WORDS}),
    # The units that the documentation of sensors allows for these classes.
    *(
        _entity(
            "sensor",
            READS | {"dev_cla": {"const": kind}, "unit_of_meas": {"enum": units}, "stat_cla": {"const": "measurement"}},
        )
        for kind, units in (("data_size", ["B", "kB", "MB"]), ("duration", ["ms", "s", "min", "h", "d"]))
    ),
    _entity("binary_sensor", READS | {"dev_cla": {"enum": ["problem", "connectivity"]}}),
    _entity("switch", WRITES),
    _entity("update", READS, {"cmd_t": TOPIC, "pl_inst": TEXT}),
    _entity("select", WRITES | {"ops": WORDS}),
    _entity("text", WRITES | {"max": {"type": "integer", "minimum": 1, "maximum": 255}}),
    _entity(
        "number",
        WRITES,
        {
            "min": {"type": "number"},
            "max": {"type": "number"},
            "step": {"type": "number", "minimum": 0.001},
            "mode": {"enum": ["auto", "box", "slider"]},
        },
    ),
    _entity("image", {"img_t": TOPIC, "cont_type": {"enum": ["image/jpeg", "image/png"]}}),
    {"properties": {"p": TEXT}, "required": ["p"], "maxProperties": 1},  # removes the entity
]
VALIDATOR = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "dev": {
                "type": "object",
                "properties": {"ids": WORDS, "name": TEXT, "mdl": TEXT, "sw": TEXT},
                "required": ["ids"],
                "additionalProperties": False,
            },
            "o": {
                "type": "object",
                "properties": {"name": TEXT, "sw": TEXT, "url": {"type": "string", "pattern": "^https?://"}},
                "required": ["name"],
                "additionalProperties": False,
            },
            "avty_t": TOPIC,
            "avty_tpl": TEXT,
            "cmps": {"type": "object", "additionalProperties": {"type": "object", "oneOf": ENTITIES}},
        },
        "required": ["dev", "o", "cmps"],
        "additionalProperties": False,
    }
)
# Of "MQTT Update". The fields that are used here; versions are text or, as Home Assistant reads them, numbers.
UPDATE = Draft202012Validator(
    {
        "type": "object",
        "properties": {
            "installed_version": {"type": "integer"},
            "latest_version": {"type": "integer"},
            "title": {"type": "string"},
            "release_summary": {"type": "string"},
            "update_percentage": {"type": ["integer", "null"], "minimum": 0, "maximum": 100},
            "in_progress": {"type": "boolean"},
        },
        "required": ["installed_version", "latest_version"],
        "additionalProperties": False,
    }
)
DISCOVERY_TOPIC = re.compile(r"homeassistant/device/[a-zA-Z0-9_-]+/config")
MAX_STATE = 255


def check(payload: bytes) -> dict[str, Any]:
    """The message. Raises AssertionError if Home Assistant would refuse it."""
    message = json.loads(payload)
    faults = [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(message)]
    assert not faults, "\n".join(faults)
    ids = [entity["uniq_id"] for entity in message["cmps"].values() if len(entity) > 1]
    assert len(set(ids)) == len(ids)
    return message


class LoudUndefined(jinja2.Undefined):
    """Home Assistant writes a line to its log whenever a template uses an undefined value: here it is an error."""

    __str__ = __iter__ = __bool__ = __eq__ = __len__ = jinja2.Undefined._fail_with_undefined_error  # type: ignore


def _regex_replace(value: str, find: str, replace: str) -> str:
    return re.sub(find, replace, value)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=LoudUndefined)
ENVIRONMENT.filters |= {"regex_replace": _regex_replace, "to_json": _to_json}


def render(template: str, payload: bytes, state: str = "unknown", attributes: Mapping[str, Any] | None = None) -> str:
    """A template over the payload of a message, for an entity with this state and these attributes."""
    this = {"state": state, "attributes": dict(attributes or {})}
    values = {"value": payload.decode(), "value_json": json.loads(payload), "this": this}
    return _compiled(template).render(values).strip()


_compiled = functools.cache(ENVIRONMENT.from_string)


class Entity:
    """What Home Assistant makes of an entity's messages: its state and attributes, or the events that it has fired."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config, self.state = config, "unknown"
        self.attributes: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []

    def receive(self, topic: str, payload: bytes) -> None:
        """A message that is not retained."""
        config, attributes = self.config, self.attributes
        if topic == config.get("json_attr_t"):
            self.attributes = json.loads(render(config["json_attr_tpl"], payload, self.state, attributes))
            assert isinstance(self.attributes, dict)
        if topic != config.get("stat_t"):
            return
        value = render(config["val_tpl"], payload, self.state, attributes)
        if config["p"] == "event":
            if value:
                event = json.loads(value)
                assert event["event_type"] in config["evt_typ"]
                self.events.append(event)
        elif config["p"] == "update":
            if value:
                UPDATE.validate(found := json.loads(value))
                self.attributes |= found
                self.state = "on" if found["latest_version"] > found["installed_version"] else "off"
        elif value == "None":
            self.state = "unknown"
        elif "unit_of_meas" in config:
            self.state = value or self.state
            float(value or 0)
        else:
            assert len(value) <= MAX_STATE
            assert "ops" not in config or value in config["ops"], value
            self.state = value
