"""How the parts of a server meet."""

import logging
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.cores import usable_cores
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.mqtt import connection_text
from edge_runtime.packages import require
from edge_runtime.reporting.metrics import exported
from edge_runtime.sd_notify import Notifier
from server.config import Config, ServerConfig
from server.counters import SERVER, values
from server.gateway import Gateway
from server.reply_cache import MAX_AGE_S, ReplyCache
from server.service import Service
from server.serving import serve
from server.targets import Target
from server.upstream import Upstream
from server.watchdog import Watchdog

if TYPE_CHECKING:
    from server.engine import Engine
    from server.targets.bundle import BundleTarget
    from server.targets.features import FeatureReader
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_target import Model

logger = logging.getLogger(__name__)

# Seconds that a thread which reads requests may keep Python to itself while a network wants to start its next layer.
# With Python's usual 5 ms, a server under load answers a fifth fewer requests.
SWITCH_S = 0.0005

Loaded = tuple[Target[Any], Any]  # the target, and what hears of a message that sets its questions, if anything does


def check(config: Config) -> str:
    """Finds mistakes of server.toml without a connection, and before networks are loaded. Says what the bundles are.

    Raises ConfigError, of which BundleError and MissingPackageError are kinds.
    """
    server = config.server
    config.mqtt_settings()
    config.check_target()
    if config.upstream:
        config.upstream.settings(server.id)
    if config.ray:
        require("ray")  # first: its extra brings PyTorch, too
    if server.target == "lm" or server.target.startswith("hf:"):
        require("transformers")
    if config.openai is None or config.tail:
        require("torch", "safetensors")
        if server.device != "cpu" and not config.ray:  # the machines of a cluster have devices of their own
            from server.loading import check_device  # takes seconds

            check_device(server.device)
    bundles = [open_bundle(Path(folder)) for folder in (server.bundle, server.second_bundle) if folder]
    if len({bundle.id for bundle in bundles}) < len(bundles):
        raise ConfigError("bundle and second_bundle are the same bundle: remove second_bundle")
    found = []
    for bundle in bundles:
        is_read = server.target in ("bundle", "lm") or config.tail is not None
        found.append(f"{bundle.path}: bundle {bundle.check(for_server=is_read)}")
        targets = bundle.manifest.targets
        if server.target == "bundle" and server.tier not in targets:
            raise ConfigError(f'tier = "{server.tier}", but the bundle {bundle.path} has {", ".join(targets)}')
        if config.tail:
            from models.tower_tail import read_tower_tail

            read_tower_tail(Path(config.tail), bundle)
        if server.target == "lm":
            from models.language_model import SHIPPED, read_learnt

            read_learnt(Path(config.lm.weights or SHIPPED), bundle)
    if config.questions:
        from server.questions import Questions

        Questions(bundles[0], config.questions)
    return "\n".join(found)


def load(config: ServerConfig, folder: str | None) -> "tuple[Bundle, Engine]":
    """Opens a bundle, loads the tier's networks and runs the start test. Raises BundleError."""
    from server.engine import SIZES
    from server.loading import ready_engine

    bundle = opened(folder)
    sizes = [size for size in SIZES if size <= config.max_batch]
    return bundle, ready_engine(bundle, (config.tier,), config.device, config.threads, sizes)


def opened(folder: str | None) -> Bundle:
    """The bundle, with its small files. Raises BundleError, and ConfigError without a folder."""
    if folder is None:
        raise ConfigError("required key `bundle` is missing (in server)")
    bundle = open_bundle(Path(folder))
    _ = bundle.tables, bundle.inter_tables, bundle.words  # a mistake in them is found at the start
    return bundle


def run_server(
    config: Config, stop: threading.Event, notifier: Notifier | None = None, loaded: Loaded | None = None
) -> None:
    """Serves until `stop` is set, then finishes what was accepted and says offline.

    notifier: to the service manager; None: there is none. loaded: by `load_target`; None: it is loaded now.

    Raises ConfigError if it cannot start, and RuntimeError for whatever ends it later:
    that is no mistake in the configuration, and the server is worth starting again.
    """
    settings, server, notifier = config.mqtt_settings(), config.server, notifier or Notifier()
    sys.setswitchinterval(SWITCH_S)
    target, on_questions = loaded or load_target(config)
    upstream, bounds = None, None
    if config.upstream:
        upstream, bounds = Upstream(config.upstream, server.id), config.upstream.bounds()
    # A repeat that counted as new while the first copy waits for another model would be computed, or paid for, twice.
    replies = ReplyCache() if server.target == "bundle" else ReplyCache(max_flight_s=MAX_AGE_S)
    service = Service(server, target, replies, upstream, bounds)
    logger.info("server ready id=%s target=%s tokenizer=%s", server.id, server.target, target.abilities.tokenizer)
    with ExitStack() as stack:
        stack.callback(target.close)  # ends a probe of another server, too
        gateway = Gateway(
            settings,
            server.site,
            server.id,
            server.pool,
            service.receive,
            service.status,
            on_questions,
            lambda state, reason: notifier.status(connection_text(settings, state, reason)),
        )
        stack.enter_context(
            exported(
                config.metrics,
                "server",
                SERVER,
                lambda: values(service.status() | {"gateway": gateway.summary()}),
                partial(setattr, service, "metrics_problem"),
            )
        )
        stack.enter_context(gateway)
        if upstream:  # ends before the gateway, so that the boards of requests that it leaves open can still be told
            stack.enter_context(upstream)
        stack.enter_context(Watchdog(service, gateway))
        try:
            notifier.ready()
            serve(
                service, stop, notifier, lambda: gateway.client.hangs() or (upstream is not None and upstream.hangs())
            )
        except Exception as error:
            raise RuntimeError("the server broke while it served") from error
    logger.info("server stopped id=%s counts=%s", server.id, service.status()["counts"])


def load_target(config: Config) -> Loaded:
    """With a start test, this takes up to a minute. Raises ConfigError and BundleError."""
    config.check_target()
    server = config.server
    logger.info("server loads and tests its target, up to a minute id=%s target=%s", server.id, server.target)
    for warning in filter(None, (config.hidden_frames(), config.short_stop())):
        logger.warning("%s", warning)
    if config.openai:
        from server.targets.openai import OpenAITarget
        from server.targets.vllm import VllmTarget

        kind, _, url = server.target.partition(":")
        bundle, prompts = _boards_bundle(server), config.read_prompts()
        if kind == "openai":
            return OpenAITarget(url, config.openai, prompts=prompts, bundle=bundle), None
        embeds = None
        if reader := _features(config, bundle):
            from server.targets.image_embeds import ImageEmbeds

            embeds = ImageEmbeds(reader)
        return VllmTarget(url, config.openai, prompts=prompts, bundle=bundle, features=embeds), None
    if server.target == "lm" or server.target.startswith("hf:"):
        return _model_target(config), None
    from server.targets.two_bundles import TwoBundles

    first = _bundle_target(config, server.bundle, config.questions)
    on_questions = first.questions.message_arrived if server.questions_folder else None
    if server.second_bundle is None:
        return first, on_questions
    return TwoBundles(first, _bundle_target(config, server.second_bundle, {})), on_questions


def _bundle_target(config: Config, folder: str | None, questions: Mapping[str, str]) -> "BundleTarget":
    from server.questions import Questions
    from server.targets.bundle import BundleTarget

    server = config.server
    if config.ray:
        from server.targets.ray_engine import RayTarget

        bundle = opened(folder)
        asked = Questions(bundle, questions, server.questions_folder)
        # The same path on every machine, wherever the server was started.
        placed = msgspec.structs.replace(server, bundle=str(bundle.path))
        settings = msgspec.structs.replace(config, server=placed)
        target: BundleTarget = RayTarget(bundle, settings, config.ray, asked)
    else:
        bundle, engine = load(server, folder)
        asked = Questions(bundle, questions, server.questions_folder)
        calls = server.calls or (usual_calls(server.threads) if server.device == "cpu" else 1)
        target = BundleTarget(bundle, engine, server.tier, server.max_batch, asked, calls)
    logger.info("bundle loaded id=%s numerics=%s", bundle.id.hex(), target.engine.proof.numerics)
    return target


def usual_calls(threads: int) -> int:
    """Batches at the same time, each on so many threads. Two keep the cores busy while one decodes requests."""
    return max(1, min(2, usable_cores() // threads))


def _model_target(config: Config) -> Target[Any]:
    """A language model that reads features, or a model of Hugging Face, here or on replicas."""
    server, bundle = config.server, _boards_bundle(config.server)
    if config.ray:
        from server.targets.ray_model import RayModel

        model: Model = RayModel(config, config.ray)
    else:
        model = load_model(config)
    if server.target == "lm":
        from server.targets.language import load_language

        return load_language(config, opened(server.bundle), model)
    from server.targets.huggingface_target import HuggingFaceTarget

    features = _features(config, bundle)
    return HuggingFaceTarget(model, config.hf, bundle, config.read_prompts(), server.max_batch, features)


def load_model(config: Config) -> "HuggingFaceModel":
    """The model of the targets "hf:..." and "lm", in this process, after its start test. Raises ConfigError."""
    from server.targets.huggingface_model import HuggingFaceModel
    from server.targets.huggingface_tower import Tower

    server, hf = config.server, config.hf
    if server.target == "lm":
        from server.targets.language import load_language_model

        return load_language_model(config, opened(server.bundle))
    how = (hf.dtype, server.device, server.threads, hf.offline)
    model = HuggingFaceModel.load(server.target.removeprefix("hf:"), *how)
    if hf.assistant:
        model.add_assistant(hf.assistant, *how)
    if hf.tail:
        from models.tower_tail import read_tower_tail

        record, _ = read_tower_tail(Path(hf.tail), opened(server.bundle))
        model.tower = Tower.of_tail(model.loaded, record, config.read_prompts()[hf.prompt].text)
    return model


def _features(config: Config, bundle: Bundle | None) -> "FeatureReader | None":
    if not (config.tail and bundle):
        return None
    from server.targets.features import load_features

    return load_features(Path(config.tail), bundle, config.own_device, config.server.threads)


def _boards_bundle(server: ServerConfig) -> Bundle | None:
    """Whose words the boards' drafts have, for a target that is another model."""
    bundle = open_bundle(Path(server.bundle)) if server.bundle else None
    _ = bundle.words if bundle else None  # a mistake in them is found at the start
    return bundle
