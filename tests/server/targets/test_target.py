"""A model of somebody else in the server's process: pictures and drafts as text in, texts in batches out."""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import msgspec
import numpy as np
import pytest

from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import ContentKind, Options, Paradigm, Request, Status, encode_tokens
from server.pictures import PictureDecoder
from server.reply_cache import ReplyCache
from server.service import Service
from server.targets import Abilities, Answer, Limits, PictureJob, Target, picture_job
from tests.server.boards import Lane, config, is_balanced
from tests.server.boards import request as latent


class Model(Target[PictureJob]):
    """Verifies drafts word by word: its own text is always the same."""

    limits = Limits(batch=4)

    def __init__(self, bundle: Bundle, text: str) -> None:
        self.bundle, self.text, self.batches = bundle, text, list[list[PictureJob]]()

    @property
    def abilities(self) -> Abilities:
        return Abilities(name="model", verified="server", drafts=True)

    def job(self, accepted) -> PictureJob:
        return picture_job(accepted, self.bundle)

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        self.batches.append(list(jobs))
        return [self._verified(job.draft.split()) for job in jobs]

    def _verified(self, draft: list[str]) -> Answer:
        own = self.text.split()
        accepted = next((n for n, (a, b) in enumerate(zip(draft, own, strict=False)) if a != b), len(draft))
        passes = 1 + len(own) - accepted
        return Answer(text=self.text, accepted=accepted, proposed=len(draft), passes=passes, confidence=0.75)


def picture(bundle: Bundle, number: int, draft: tuple[int, ...] = (), **changes: object) -> Request:
    """A WebP, with the draft of a lower tier."""
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 90])[1].tobytes()
    plain = latent(bundle, paradigm=Paradigm.OFFLOAD, content_kind=ContentKind.WEBP, content=content)
    return msgspec.structs.replace(plain, draft=encode_tokens(draft), **changes)


@pytest.fixture
def model(bundle: Bundle) -> Model:
    return Model(bundle, "word5 word6 word7 word8")


@pytest.fixture
def service(bundle: Bundle, model: Model) -> Service:
    return Service(config(bundle).server, model, ReplyCache())


def serve(service: Service, lane: Lane, *requests: Request) -> None:
    """Plays the service's threads until all are answered."""
    for request in requests:
        service.receive(lane.arrival(request))
    with PictureDecoder() as decoder:
        for _ in requests:
            service.decode_picture(decoder)
    while len(service.target_queue):
        service.answer(service.target_queue.take(0))


def test_its_texts_and_counts_are_the_replies(service: Service, model: Model, bundle: Bundle) -> None:
    lane = Lane()
    serve(service, lane, picture(bundle, 0, draft=(5, 6, 9)))
    (reply,) = lane.replies
    assert (reply.status, reply.text, reply.token_ids) == (Status.OK, model.text, [])
    assert (reply.accepted, reply.proposed, reply.passes, reply.confidence) == (2, 3, 3, 0.75)
    assert is_balanced(service)


def test_its_jobs_have_picture_pixels_and_the_draft_in_words(service: Service, model: Model, bundle: Bundle) -> None:
    asked = picture(bundle, 0, draft=(5, 6, 2, 9), options=Options(max_tokens=7))
    foreign = msgspec.structs.replace(picture(bundle, 1, draft=(5, 6)), bundle=bytes(8))  # of another vocabulary
    serve(service, Lane(), asked, foreign)
    one, other = (job for batch in model.batches for job in batch)
    assert (one.picture, one.media_type, one.draft, one.max_tokens) == (asked.content, "image/webp", "word5 word6", 7)
    assert (one.pixels.shape, one.pixels.dtype) == ((224, 224, 3), np.uint8)
    assert other.draft == ""


def test_it_gets_no_more_jobs_at_once_than_it_takes(service: Service, model: Model, bundle: Bundle) -> None:
    lane = Lane()
    serve(service, lane, *(picture(bundle, number) for number in range(6)))
    assert [len(batch) for batch in model.batches] == [4, 2]
    assert [reply.status for reply in lane.replies] == [Status.OK] * 6


def test_a_model_that_breaks_fails_its_batch_and_not_the_server(
    service: Service, model: Model, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = Lane()
    with monkeypatch.context() as patched:
        patched.setattr(model, "text", None)
        serve(service, lane, picture(bundle, 0))
    serve(service, lane, picture(bundle, 0))
    assert [reply.status for reply in lane.replies] == [Status.FAILED, Status.OK]


def test_a_text_longer_than_any_reply_fails_by_name(service: Service, model: Model, bundle: Bundle) -> None:
    lane, model.text = Lane(), "word5 " * 2000
    serve(service, lane, picture(bundle, 0))
    assert (lane.replies[0].status, "wrote 12000 characters" in lane.replies[0].error) == (Status.FAILED, True)


def test_the_bundles_status_says_that_it_is_strict(bundle: Bundle, make_service) -> None:
    assert make_service().status()["target"] == {
        "name": "bundle",
        "latents": True,
        "pictures": True,
        "drafts": True,
        "labels": True,
        "sample": True,
        "verified": "strict",
        "tokenizer": bundle.id.hex(),
        "prompts": (),
        "refused": {},
        "limits": {"batch": 8, "calls": 1, "max_tokens": bundle.manifest.max_tokens},
    }


def test_an_answer_that_no_reply_can_have_fails_alone(service: Service, model: Model, bundle: Bundle) -> None:
    lane, answer = Lane(), model.answer
    model.answer = lambda jobs: [replace(answer(jobs)[0], confidence=float("nan")), *answer(jobs)[1:]]
    serve(service, lane, picture(bundle, 0), picture(bundle, 1))
    assert [reply.status for reply in lane.replies] == [Status.FAILED, Status.OK]
    assert "cannot be sent" in lane.replies[0].error
    assert is_balanced(service)


def test_a_target_with_too_few_answers_has_failed(service: Service, model: Model, bundle: Bundle) -> None:
    lane = Lane()
    model.answer = lambda jobs: []
    serve(service, lane, picture(bundle, 0), picture(bundle, 1))
    assert [reply.status for reply in lane.replies] == [Status.FAILED] * 2
    assert is_balanced(service)
