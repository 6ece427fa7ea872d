"""How the parts of a server meet."""

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

from edge_runtime.inference.bundle import Bundle, open_bundle
from edge_runtime.mqtt import connection_text
from edge_runtime.reporting.metrics import exported
from edge_runtime.sd_notify import Notifier
from server.config import Config, ServerConfig
from server.counters import SERVER, values
from server.engine import SIZES, Engine
from server.gateway import Gateway
from server.loading import load_engine
from server.numerics import prove
from server.questions import Questions
from server.reply_cache import ReplyCache
from server.service import Service
from server.upstream import Upstream
from server.watchdog import Watchdog

logger = logging.getLogger(__name__)


def load(config: ServerConfig) -> tuple[Bundle, Engine]:
    """Opens the bundle, loads the tier's networks and runs the start test. Raises BundleError."""
    bundle = open_bundle(Path(config.bundle))
    _ = bundle.tables, bundle.inter_tables, bundle.words  # a mistake in them is found at the start
    engine = load_engine(bundle, (config.tier,), config.device, config.threads)
    engine.proof = prove(engine, [size for size in SIZES if size <= config.max_batch])
    return bundle, engine


def run_server(config: Config, stop: threading.Event, notifier: Notifier | None = None) -> None:
    """Serves until `stop` is set, then finishes what was accepted and says offline.

    notifier: to the service manager; None: there is none.

    Raises ConfigError if it cannot start, and RuntimeError for whatever ends it later:
    that is no mistake in the configuration, and the server is worth starting again.
    """
    settings, server, notifier = config.mqtt_settings(), config.server, notifier or Notifier()
    bundle, engine = load(server)
    questions = Questions(bundle, config.questions, server.questions_folder)
    upstream, bounds = None, None
    if config.upstream:
        upstream, bounds = Upstream(config.upstream, server.id), config.upstream.bounds()
    service = Service(server, bundle, engine, ReplyCache(), upstream, bounds, questions=questions)
    logger.info("server ready id=%s bundle=%s numerics=%s", server.id, bundle.id.hex(), engine.proof.numerics)
    with ExitStack() as stack:
        on_questions = questions.message_arrived if server.questions_folder else None
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
        stack.enter_context(gateway)
        if upstream:  # ends before the gateway, so that the boards of requests that it leaves open can still be told
            stack.enter_context(upstream)
        stack.enter_context(
            exported(
                config.metrics, "server", SERVER, lambda: values(service.status() | {"gateway": gateway.summary()})
            )
        )
        stack.enter_context(Watchdog(service, gateway))
        try:
            notifier.ready()
            service.serve(stop, notifier)
        except Exception as error:
            raise RuntimeError("the server broke while it served") from error
    logger.info("server stopped id=%s counts=%s", server.id, service.status()["counts"])
