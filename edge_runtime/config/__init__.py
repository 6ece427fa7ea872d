"""What an operator sets: board.toml, read and checked as a whole at start, then passed on as frozen values.

- `board`: every key of the file, as one tree
- `camera_source`: what a camera's `source` may be, and which keys go with it
- `conditions`: the language of triggers
- `frigate`: the table [frigate]
- `toml_file`: from a file to values, for board.toml and server.toml

Nothing inside the runtime reads the environment.
"""

from edge_runtime.config.board import (
    PROMPT_NAME,
    QUESTION,
    BoardConfig,
    CameraConfig,
    HomeAssistantConfig,
    Id,
    KeptFramesConfig,
    MetricsConfig,
    MotionConfig,
    OutboxConfig,
    PolicyConfig,
    PromptName,
    QuestionName,
    RuntimeConfig,
    SamplingConfig,
    StationId,
    TriggerConfig,
    UpdatesConfig,
)
from edge_runtime.config.frigate import FrigateConfig
from edge_runtime.config.toml_file import MAX_CONFIG_BYTES, convert, load_toml, read_toml

__all__ = [
    "MAX_CONFIG_BYTES",
    "PROMPT_NAME",
    "QUESTION",
    "BoardConfig",
    "CameraConfig",
    "FrigateConfig",
    "HomeAssistantConfig",
    "Id",
    "KeptFramesConfig",
    "MetricsConfig",
    "MotionConfig",
    "OutboxConfig",
    "PolicyConfig",
    "PromptName",
    "QuestionName",
    "RuntimeConfig",
    "SamplingConfig",
    "StationId",
    "TriggerConfig",
    "UpdatesConfig",
    "convert",
    "load_toml",
    "read_toml",
]
