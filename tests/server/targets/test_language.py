"""A language model that reads features, behind a server: latents, drafts and pictures in, texts with labels out."""

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import Status, encode_labels
from server.app import check, load_target
from server.config import Config, LanguageConfig, ServerConfig
from server.prompts import PromptConfig
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets.language import LanguageTarget
from tests.bundles import tiny_bundle
from tests.server.boards import request
from tests.server.targets.seeing_model import language_config
from tests.server.targets.test_huggingface_target import replies as served
from tests.server.targets.test_target import picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

PROMPTS = {"photo": PromptConfig("describe the photo", max_tokens=8)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def config(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return language_config(tmp_path_factory.mktemp("cache"), bundle, PROMPTS)


@pytest.fixture(scope="module")
def target(config: Config) -> LanguageTarget:
    found, _ = load_target(config)
    assert isinstance(found, LanguageTarget)
    return found


def replies(config: Config, target: LanguageTarget, *requests: object) -> list[object]:
    return served(Service(config.server, target, ReplyCache()), *requests)


def test_a_latent_is_answered_with_text_and_labels_whatever_the_draft(config, target, bundle: Bundle) -> None:
    plain, drafted = replies(config, target, request(bundle), request(bundle, draft=(5, 6, 9)))
    assert (plain.status, drafted.status) == (Status.OK, Status.OK)
    assert plain.text == drafted.text != ""
    assert plain.token_ids == []  # its vocabulary is not the boards'
    assert plain.label in bundle.manifest.classes
    assert plain.scores == drafted.scores
    assert plain.label == max(plain.scores, key=plain.scores.get)


def test_it_says_what_it_reads(target: LanguageTarget, bundle: Bundle) -> None:
    can = target.abilities
    assert (can.name, can.verified, can.bundles, can.pictures, can.labels) == ("lm", "server", (bundle.id,), True, True)
    assert set(can.prompts) == {"caption", "door", "photo"}


def test_a_picture_is_read_by_the_bundles_own_head(config, target, bundle: Bundle) -> None:
    whole, latent = replies(config, target, picture(bundle, 0), request(bundle))
    assert whole.status is Status.OK
    assert whole.scores != latent.scores


def test_other_symbols_give_other_texts(config, target, bundle: Bundle) -> None:
    texts = {reply.text for reply in replies(config, target, *(request(bundle, i) for i in range(4)))}
    assert len(texts) > 1


def test_labels_that_the_board_has_seen_are_told_and_answered(config, target, bundle: Bundle) -> None:
    unseen = replies(config, target, request(bundle))[0].label
    other = next(i for i, name in enumerate(bundle.manifest.classes) if name != unseen)
    (told,) = replies(config, target, request(bundle, labels=encode_labels([(other, 0.9)])))
    assert told.label == bundle.manifest.classes[other]


def test_a_damaged_latent_fails_alone(config, target, bundle: Bundle) -> None:
    good = request(bundle)
    bad, fine = replies(config, target, msgspec.structs.replace(good, id=bytes(8), content=good.content[:9]), good)
    assert (bad.status, fine.status) == (Status.BAD_REQUEST, Status.OK)


def test_a_prompt_of_several_frames_is_refused_by_name(config: Config) -> None:
    several = msgspec.structs.replace(config, prompts=PROMPTS | {"moves": PromptConfig("what moves", frames=3)})
    with pytest.raises(ConfigError, match=r"prompt moves: .* reads one frame at a time: want frames = 1"):
        load_target(several)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": ServerConfig("s1", target="lm")}, "required key `bundle` is missing"),
        ({"lm": LanguageConfig("photos")}, r'prompt = "photos" in \[lm\] is none of the prompts caption, door, photo'),
        ({"lm": LanguageConfig("photo", weights="/no/such/file")}, "/no/such/file cannot be read"),
        ({"lm": LanguageConfig("photo")}, "was trained for bundle everyday-lite0"),  # the shipped file
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(config: Config, changes: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(msgspec.structs.replace(config, **changes))
    assert check(config)


def test_settings_of_the_language_model_are_refused_without_it(config: Config, bundle: Bundle) -> None:
    server = ServerConfig("s1", str(bundle.path))
    with pytest.raises(ConfigError, match=r'\[lm\] is of no use with target = "bundle": set target = "lm"'):
        check(msgspec.structs.replace(config, server=server, prompts={}))


def test_a_cache_that_cannot_be_written_is_refused_by_name(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = LanguageConfig("photo", weights=config.lm.weights, cache=str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot be written .* want 300 MB of room there"):
        load_target(msgspec.structs.replace(config, lm=cache))
