"""What a board tells people and programs, and what people may change while it runs.

events: what became of each frame; trigger: which answers become an event of their own. remote_settings: values that a
user may change over MQTT. images: small pictures for users. discovery, home_assistant, templates: the board in Home
Assistant. frigate: answers back into Frigate. counters: every number and what it means. metrics.py exports the numbers
to Prometheus; it is not imported here, since its library costs a few megabytes that a board without [metrics] need not
load.
"""

from edge_runtime.reporting.counters import BOARD, Meaning, Values, kinds, not_zero
from edge_runtime.reporting.events import Events
from edge_runtime.reporting.remote_settings import RemoteSettings, Setting, board_settings

__all__ = ["BOARD", "Events", "Meaning", "RemoteSettings", "Setting", "Values", "board_settings", "kinds", "not_zero"]
