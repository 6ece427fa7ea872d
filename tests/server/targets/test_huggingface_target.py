"""A small vision-language model behind a server: pictures and drafts in, replies out."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from edge_runtime.app import run_board
from edge_runtime.config import BoardConfig, CameraConfig, RuntimeConfig
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire import (
    AnsweredBy,
    CheckedObject,
    ContentKind,
    Options,
    Status,
    decode_event,
    decode_request,
    topics,
)
from server.app import load_target, run_server
from server.config import Config, HuggingFaceConfig, ServerConfig
from server.pictures import PictureDecoder
from server.prompts import PromptConfig, read_prompts
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets import PictureJob, prompted
from server.targets.huggingface_loading import load
from server.targets.huggingface_model import HuggingFaceModel
from server.targets.huggingface_prompts import Job, model_inputs
from server.targets.huggingface_target import HuggingFaceTarget
from server.targets.target import Answer, EarlierPicture
from tests.brokers import Mosquitto
from tests.listener import Listener
from tests.server.boards import Lane, board_of, config, is_balanced
from tests.server.targets.test_target import picture
from tests.server.targets.tiny_models import LANGUAGE_MODELS, SMOLVLM_MARKS, VISION_MODELS, language_model, words

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

PATIENCE_S = 60.0
ASKED = HuggingFaceConfig(prompt="photo", max_tokens=8)
SCHEMA = {"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"]}
TABLES = {
    "photo": PromptConfig("describe the photo"),
    "cat": PromptConfig("what is the cat", system="here is a cat", max_tokens=5),
    "count": PromptConfig("what is in the photo", schema=SCHEMA),
    "moves": PromptConfig("what is running", frames=3),
}
PROMPTS = read_prompts(TABLES)
GOOD, BAD = '{"people": 2}', "two"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smolvlm")
    VISION_MODELS["smolvlm"](path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> HuggingFaceModel:
    return HuggingFaceModel.load(str(folder))


def replies(service: Service, *requests: object) -> list[object]:
    lane = Lane()
    with PictureDecoder() as decoder:
        for request in requests:
            service.receive(lane.arrival(request))
            service.decode_picture(decoder)
    while len(service.target_queue):
        service.answer(service.target_queue.take(0))
    assert is_balanced(service)
    return lane.replies


def test_a_picture_is_answered_with_the_models_own_text_whatever_the_draft(model, bundle: Bundle) -> None:
    service = Service(config(bundle).server, HuggingFaceTarget(model, ASKED, bundle, PROMPTS), ReplyCache())
    plain, drafted = replies(service, picture(bundle, 0), picture(bundle, 0, draft=(5, 6, 9)))
    assert (plain.status, drafted.status) == (Status.OK, Status.OK)
    assert plain.text == drafted.text != ""
    assert (plain.token_ids, plain.proposed) == ([], 0)
    assert 0 < plain.confidence < 1
    target = service.status()["target"]
    assert (target["name"], target["verified"], target["drafts"]) == (f"hf:{model.loaded.name}", "server", True)
    assert (target["latents"], target["pictures"]) == (False, True)
    assert target["limits"]["max_tokens"] == 8
    assert service.status()["bundles"] == {bundle.id.hex(): bundle.manifest.name}  # whose drafts it reads
    assert "passes" in drafted.hops[0].stages_ms


def test_a_boards_draft_that_the_model_would_have_written_costs_one_pass(
    model, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(config(bundle).server, HuggingFaceTarget(model, ASKED, bundle, PROMPTS), ReplyCache())
    (alone,) = replies(service, picture(bundle, 0))
    words = alone.text.split(" ")
    monkeypatch.setitem(vars(bundle), "words", ("<pad>", "<start>", "<end>", "<unknown>", *words))
    draft = tuple(range(4, 4 + len(words)))
    asked = msgspec.structs.replace(picture(bundle, 0, draft), id=bytes(7) + b"\1")
    (verified,) = replies(service, asked)
    assert verified.text == alone.text
    assert (verified.passes, verified.accepted == verified.proposed > 1) == (1, True)


def test_a_request_may_want_a_shorter_text_and_never_gets_a_longer_one(model, bundle: Bundle) -> None:
    service = Service(config(bundle).server, HuggingFaceTarget(model, ASKED, prompts=PROMPTS), ReplyCache())
    texts = [
        reply.text
        for reply in replies(service, *(picture(bundle, 0, options=Options(max_tokens=n)) for n in (2, 8, 100)))
    ]
    assert texts[1].startswith(texts[0])
    assert texts[1] == texts[2]


def test_without_a_bundle_no_draft_is_used_and_the_status_says_so(model) -> None:
    assert not HuggingFaceTarget(model, ASKED, prompts=PROMPTS).abilities.drafts


def test_a_language_model_without_eyes_is_refused_by_name(tmp_path: Path) -> None:
    LANGUAGE_MODELS["llama"](tmp_path)
    with pytest.raises(ConfigError, match="takes no pictures: want an image-text-to-text model"):
        HuggingFaceTarget(HuggingFaceModel.load(str(tmp_path)), ASKED, prompts=PROMPTS)


def job(prompt: str, left_s: float = PATIENCE_S, **changes: object) -> PictureJob:
    jpeg = cv2.imencode(".jpg", np.full((40, 50, 3), 90, np.uint8))[1].tobytes()
    return PictureJob(
        jpeg, "image/jpeg", np.zeros((224, 224, 3), np.uint8), time.monotonic() + left_s, **changes, prompt=prompt
    )


@pytest.fixture
def target(model) -> HuggingFaceTarget:
    return HuggingFaceTarget(model, ASKED, prompts=PROMPTS)


@pytest.fixture
def says(model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Job]]:
    """Lets the model say these texts; the jobs that it is asked."""

    def begin(*texts: str) -> list[Job]:
        asked, left = list[Job](), list(texts)

        def answer(jobs):
            asked.extend(jobs)
            return [Answer((5,), text=left.pop(0), passes=1, confidence=0.5) for _ in jobs]

        monkeypatch.setattr(model, "answer", answer)
        return asked

    return begin


def test_a_request_is_asked_in_the_words_of_its_prompt(target, says) -> None:
    assert target.abilities.prompts == ("cat", "count", "door", "moves", "photo")
    asked = says("one", "two", "three")
    answers = target.answer([job("cat"), job(""), job("cat", max_tokens=3)])
    assert [answer.text for answer in answers] == ["one", "two", "three"]
    assert [(each.system, each.prompt, each.max_tokens) for each in asked] == [
        ("here is a cat", "what is the cat", 5),
        ("", "describe the photo", 8),
        ("here is a cat", "what is the cat", 3),
    ]


def test_a_prompt_may_show_the_last_pictures_in_order(target, says) -> None:
    earlier = [cv2.imencode(".jpg", np.full((40, 50, 3), grey, np.uint8))[1].tobytes() for grey in (10, 50)]
    shown = tuple(EarlierPicture(each, "image/jpeg", s) for each, s in zip(earlier, (8.0, 3.0), strict=True))
    asked = says("one")
    target.answer([job("moves", earlier=shown)])
    assert [round(float(each.mean())) for each in (*asked[0].earlier, asked[0].pixels)] == [10, 50, 90]
    assert asked[0].prompt.endswith("in the order of time: 8.0 s, 3.0 s before the last one.")


@pytest.mark.parametrize("kind", ["smolvlm", "qwen2-vl", "internvl", "llava", "paligemma"])
def test_words_and_pictures_reach_the_model_in_their_order(tmp_path: Path, kind: str) -> None:
    """The first three have a chat template."""
    VISION_MODELS[kind](tmp_path)
    loaded = load(str(tmp_path))
    black, white = (np.full((32, 32, 3), grey, np.uint8) for grey in (0, 255))
    asked = Job("what is red", white, system="here is a cat", earlier=(black,), repair=("a dog", "the man"))
    inputs = model_inputs(loaded, asked)
    written = loaded.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert written.split() == ["here", "is", "a", "cat", "what", "is", "red", "a", "dog", "the", "man"]
    one = model_inputs(loaded, Job("what is red", white))
    token = loaded.model.config.image_token_id
    seen, alone = ((each["input_ids"] == token).sum() for each in (inputs, one))
    assert seen == 2 * alone > 0
    values = inputs["pixel_values"].flatten()
    assert values[0] < 0 < values[-1]  # black, then white


def test_a_prompt_with_more_pictures_than_the_model_reads_is_refused_at_start(tmp_path: Path) -> None:
    VISION_MODELS["blip"](tmp_path)
    model = HuggingFaceModel.load(str(tmp_path))
    HuggingFaceTarget(model, ASKED, prompts=read_prompts({"photo": PromptConfig("a photo")}))
    with pytest.raises(ConfigError, match=r"prompt moves: .* 2 pictures, it reads one: want frames = 1"):
        HuggingFaceTarget(model, ASKED, prompts=read_prompts({**TABLES, "moves": PromptConfig("a photo", frames=2)}))


def test_a_prompt_that_the_model_cannot_read_is_refused_at_start(model) -> None:
    with pytest.raises(ConfigError, match=r"prompt long: .* reads 512 at most"):
        HuggingFaceTarget(model, ASKED, prompts=read_prompts({**TABLES, "long": PromptConfig("a dog " * 300)}))


def test_an_object_that_matches_is_valid_and_alone_in_the_text(target, says) -> None:
    asked = says(f"```json\n{GOOD}\n```")
    (answer,) = target.answer([job("count", draft="a man")])
    assert (answer.text, answer.checked) == (GOOD, CheckedObject("count", True))
    assert (asked[0].draft, asked[0].is_prose) == ("", False)  # a caption is no draft of an object


@pytest.mark.parametrize(("second", "text", "valid"), [(GOOD, GOOD, True), ("still two", BAD, False)])
def test_one_more_try_repairs_an_object_and_the_first_text_is_its_draft(
    target, says, second: str, text: str, valid: bool
) -> None:
    asked = says("a dog", BAD, second)
    other, answer = target.answer([job("photo"), job("count")])
    assert (other.text, other.checked) == ("a dog", None)
    assert (answer.text, answer.error, answer.checked) == (text, "", CheckedObject("count", valid))
    first, again = asked[1:]
    assert (again.prompt, again.draft) == (first.prompt, BAD)
    assert again.repair[0] == BAD
    assert "there is no JSON object in it" in again.repair[1]
    assert answer.stages_ms.keys() == {"passes", "repair"}


def test_without_time_for_it_there_is_no_second_try(target, says) -> None:
    asked = says(BAD)
    (answer,) = target.answer([job("count", left_s=0.5 * prompted.REPLY_S)])
    assert (answer.text, answer.checked) == (BAD, CheckedObject("count", False))
    assert len(asked) == 1


def test_requests_that_wait_together_share_their_passes_and_a_reply_says_whether_its_object_is_valid(
    model, bundle: Bundle
) -> None:
    target = HuggingFaceTarget(model, ASKED, bundle, PROMPTS, max_batch=8)
    service, passes = Service(config(bundle).server, target, ReplyCache()), list[int]()
    hook = model.loaded.model.register_forward_hook(lambda *_: passes.append(1))
    asked = [picture(bundle, 0), picture(bundle, 1, draft=(5, 6, 9)), picture(bundle, 2)]
    asked = [msgspec.structs.replace(each, id=bytes(7) + bytes([i])) for i, each in enumerate(asked)]
    together = replies(service, *asked)
    hook.remove()
    assert [reply.status for reply in together] == [Status.OK] * 3
    assert len(passes) == max(reply.passes for reply in together)
    for i, reply in enumerate(together):
        fresh = msgspec.structs.replace(asked[i], id=bytes(6) + bytes([1, i]), draft=b"")
        assert replies(service, fresh)[0].text == reply.text
    (counted,) = replies(service, picture(bundle, 3, options=Options(prompt="count")))
    assert counted.checked == CheckedObject("count", False)  # such a small model writes no JSON
    assert service.counts["prompts", "invalid"] == 1


def test_the_configuration_names_the_model(folder: Path, bundle: Bundle) -> None:
    server = ServerConfig("s1", str(bundle.path), target=f"hf:{folder}")
    target, _ = load_target(Config(server, hf=ASKED, prompts=TABLES))
    assert (target.abilities.name, target.abilities.drafts) == (f"hf:{folder}", True)


def test_the_status_counts_what_its_assistant_proposed(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    language_model("Llama", words(SMOLVLM_MARKS))(tmp_path)
    server = ServerConfig("s1", str(bundle.path), target=f"hf:{folder}")
    target, _ = load_target(Config(server, hf=msgspec.structs.replace(ASKED, assistant=str(tmp_path)), prompts=TABLES))
    service = Service(config(bundle).server, target, ReplyCache())
    (reply,) = replies(service, picture(bundle, 0))
    assert reply.status is Status.OK
    status = service.status()["assistant"]
    assert list(status) == ["model", "proposed", "accepted", "passes", "failed"]
    assert (status["model"], status["failed"]) == (str(tmp_path), 0)
    assert status["passes"] >= status["proposed"] > 0


def test_its_table_without_its_target_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match=r"\[hf\] is of no use with target"):
        Config(ServerConfig("s1", str(bundle.path)), hf=ASKED).check_target()


def test_a_board_sends_its_draft_with_the_picture_if_the_server_verifies_it(
    broker: Mosquitto, folder: Path, board_bundle: Bundle
) -> None:
    """Board, Mosquitto, server and model. Frames come until the board has read the server's status."""
    mqtt, stop = MqttConfig(port=broker.port), threading.Event()
    server = ServerConfig("s1", str(board_bundle.path), target=f"hf:{folder}", tier="cloud")
    board = RuntimeConfig(
        BoardConfig("b2", str(board_bundle.path), deadline_ms=5000), (CameraConfig("door", "mqtt"),), mqtt
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    frame = cv2.imencode(".jpg", pixels)[1].tobytes()
    threads = [
        threading.Thread(target=run_server, args=(Config(server, mqtt, hf=ASKED, prompts=TABLES), stop)),
        threading.Thread(target=run_board, args=(board, stop)),
    ]
    with (
        board_of(broker, "b1") as watcher,
        Listener(broker.port, topics.state("home", "b2", "paradigm")) as switch,
        Listener(broker.port, topics.request("home", "b2")) as asked,
        Listener(broker.port, topics.event("home", "b2")) as user,
    ):
        try:
            threads[0].start()
            watcher.wait_for_status(state="online", share_proven=True)
            threads[1].start()
            assert switch.next() == b"auto"  # the board takes frames
            for _ in range(20):
                user.client.publish(topics.frame("home", "b2", "door"), frame)
                while not (event := decode_event(user.next())).final:
                    pass
                if event.paradigm == "offload":
                    break
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)
    assert (event.paradigm, event.answered_by) == ("offload", AnsweredBy("cloud", "s1"))
    assert event.why.startswith("offload: draft")
    while (request := decode_request(asked.next())).id.hex() != event.frame:
        pass
    assert request.content_kind is ContentKind.JPEG
    assert request.draft_ids
