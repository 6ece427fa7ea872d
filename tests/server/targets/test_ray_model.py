"""A model of transformers on replicas of a real Ray cluster of this machine: the same answers as in one process.

Ray is no part of the usual environment: without it, these tests are skipped.
"""

import warnings
from collections.abc import Iterator

import msgspec
import pytest

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Reply, Request, Status
from server.app import check, load_target
from server.config import Config, HuggingFaceConfig, RayConfig, ServerConfig
from server.prompts import PromptConfig
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets import Target
from tests.bundles import tiny_bundle
from tests.server.boards import request
from tests.server.targets.seeing_model import language_config
from tests.server.targets.test_huggingface_target import replies
from tests.server.targets.test_ray import replicas
from tests.server.targets.test_target import picture
from tests.server.targets.tiny_models import VISION_MODELS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own libraries
    from server.targets import ray_replicas

pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

PROMPTS = {"photo": PromptConfig("describe the photo"), "moves": PromptConfig("what is running", frames=2)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def config(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("smolvlm")
    VISION_MODELS["smolvlm"](folder)
    server = ServerConfig("s1", str(bundle.path), target=f"hf:{folder}")
    return Config(server, prompts=PROMPTS, hf=HuggingFaceConfig("photo", max_tokens=8))


@pytest.fixture(scope="module")
def language(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return language_config(tmp_path_factory.mktemp("cache"), bundle, {"photo": PROMPTS["photo"]})


@pytest.fixture(scope="module")
def target(config: Config) -> Iterator[Target[object]]:
    target = on_replicas(config)
    yield target
    target.close()


def on_replicas(config: Config) -> Target[object]:
    config = msgspec.structs.replace(config, ray=RayConfig(replicas=1))
    check(config)
    return load_target(config)[0]


def asked(config: Config, target: Target[object], *requests: Request) -> list[Reply]:
    return replies(Service(config.server, target, ReplyCache()), *requests)


def test_replicas_answer_pictures_and_drafts_as_one_process_does(
    config: Config, target: Target[object], bundle: Bundle
) -> None:
    here, _ = load_target(config)
    requests = [picture(bundle, 0), picture(bundle, 1), picture(bundle, 0, draft=(5, 6, 9), id=bytes(8))]
    expected = asked(config, here, *requests)
    found = asked(config, target, *requests)
    assert [reply.status for reply in found] == [Status.OK] * 3
    assert [reply.text for reply in found] == [reply.text for reply in expected]
    assert [reply.accepted for reply in found] == [reply.accepted for reply in expected]
    assert target.abilities == here.abilities
    assert target.status()["numerics"] == here.status()["numerics"]
    assert target.limits.calls == 1


def test_a_prompt_that_the_model_cannot_read_is_refused_by_name(config: Config, target: Target[object]) -> None:
    long = msgspec.structs.replace(config, prompts=PROMPTS | {"long": PromptConfig("a dog " * 300)})
    with pytest.raises(ConfigError, match=r"prompt long: .* reads .* at most"):
        on_replicas(long)


def test_the_request_of_a_replica_that_dies_is_answered_by_the_next_one(
    config: Config, target: Target[object], bundle: Bundle
) -> None:
    (expected,) = asked(config, target, picture(bundle, 0))
    (replica,) = replicas()
    replica.kill()
    replica.wait()
    while (reply := asked(config, target, picture(bundle, 0))[0]).status is not Status.OK:
        assert reply.retry_after_ms == ray_replicas.RETRY_MS  # the board asks again
    assert reply.text == expected.text


def test_a_language_model_on_replicas_reads_features_as_in_one_process(
    language: Config, target: Target[object], bundle: Bundle
) -> None:
    here, _ = load_target(language)
    requests = [request(bundle), picture(bundle, 0)]
    found = asked(language, on_replicas(language), *requests)
    expected = asked(language, here, *requests)
    assert [(reply.text, reply.scores) for reply in found] == [(reply.text, reply.scores) for reply in expected]
    assert found[0].text
