"""The interface of every target for the path of a request (service.py), and its abilities, known before it is asked.

A target gets jobs and returns answers. It knows nothing of queues, replies and MQTT. Ours reads latents; other people's
models read pictures (`PictureJob`) and answer with a text of a vocabulary that boards do not have.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import AiflowError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import CheckedObject, ContentKind, Usage
from server.received import Received
from server.reply_cache import Key

MediaType = Literal["image/jpeg", "image/webp"]
# How far a text is the target's own, whatever the draft: docs/adr/0019.
# strict: to the bit, as the start test proved. server: by the computation of the server that verified it, up to its
# kernels. none: drafts are not used, the text is what the other server says.
Verified = Literal["strict", "server", "none"]

Job = TypeVar("Job")


class FeaturesError(AiflowError):
    """Features of boards that cannot be given to another model."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a target. The server's status publishes it, and boards offer only what is possible."""

    name: str  # as in the configuration
    verified: Verified
    bundles: tuple[bytes, ...] = ()  # ids of the bundles whose latents it reads
    pictures: bool = True  # it reads JPEG and WebP
    drafts: bool = False  # a draft saves it work
    labels: bool = False  # its answers have labels
    sample: bool = False  # it chooses tokens as a request wants, see Options in wire.envelope
    references: bool = False  # it keeps latents, so that later frames may be coded against them
    prompts: tuple[str, ...] = ()  # names of the prompts that it answers
    max_tokens: int = 0  # of its longest text; 0: nothing says
    tokenizer: str = ""  # identity of the vocabulary of its token ids; empty: it answers with a text alone
    refused: Mapping[str, str] = field(default_factory=dict)  # "drafts", "features" -> why another server takes none

    def status(self, limits: "Limits") -> dict[str, Any]:
        """As the server publishes it."""
        return {
            "name": self.name,
            "latents": bool(self.bundles),
            "pictures": self.pictures,
            "drafts": self.drafts,
            "labels": self.labels,
            "sample": self.sample,
            "verified": self.verified,
            "tokenizer": self.tokenizer,
            "prompts": self.prompts,
            "refused": self.refused,
            "limits": {"batch": limits.batch, "calls": limits.calls, "max_tokens": self.max_tokens},
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """How a target wants to be called."""

    batch: int = 1  # jobs in one call of `answer`, at most
    calls: int = 1  # of `answer` at the same time, each on a thread of its own
    call_s: float = 0.0  # a call that takes longer hangs, if it also takes far longer than usual
    silent_s: float = 0.0  # for so long a call may work without telling of a step, see `Target.on_step`


@dataclass(frozen=True, slots=True)
class EarlierPicture:
    """A picture of the same camera that was taken before the one of a job."""

    picture: bytes  # as the board sent it; it has been decoded once
    media_type: MediaType
    seconds: float  # before that picture


@dataclass(frozen=True)
class PictureJob:
    """A picture and what is wanted of it, for a target that has a vision model of its own."""

    picture: bytes  # as the board sent it; it has been decoded once, so it is a picture; empty with image tokens
    media_type: MediaType
    pixels: NDArray[np.uint8] | None  # the same, RGB [224, 224, 3]; None with image tokens
    deadline: float  # seconds, time.monotonic(): an answer is of no use later
    draft: str = ""  # text of the board or of a lower tier
    max_tokens: int | None = None  # longest text, as the request wants it
    prompt: str = ""  # name of one of the target's prompts; empty: its usual one
    earlier: tuple[EarlierPicture, ...] = ()  # the oldest first; for a prompt that shows several pictures
    image_tokens: Any = None  # of a latent, in place of the picture: a Tensor [N, D], or its text of image_embeds.py
    labels_told: str = ""  # words of the likeliest labels, which the prompt of some models contains
    scores: Mapping[str, float] = field(default_factory=dict)  # of the likeliest labels, as in the answer
    key: Key | None = None  # of its request, whose copies all have the same; None: a probe asks


@dataclass(frozen=True)
class Answer:
    """One text and how it was written. If there is none: an `error`."""

    tokens: tuple[int, ...] = ()  # without the end token; none: the text is of a vocabulary that boards do not have
    accepted: int = 0  # proposed tokens that the target chose as well
    proposed: int = 0  # tokens of the draft that were usable
    accepted_again: int = 0  # of the server's proposals that replaced the draft, tokens that the target chose as well
    passes: int = 0  # forward passes of the target
    confidence: float | None = (
        0.0  # geometric mean of the probabilities of its tokens, end token included; None: unknown
    )
    scores: dict[str, float] = field(default_factory=dict)  # probability of the likeliest labels, best first
    # To each question: the probability of each class.
    answers: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str = ""
    stages_ms: dict[str, float] = field(default_factory=dict)  # of the whole batch, by name
    text: str = ""  # at most envelope.MAX_TEXT characters
    unsure: bool = False  # the confidence is below what is usually right
    retry_after_ms: int | None = None  # with an error: another try may end otherwise, after this time. None: it may not
    usage: Usage | None = None  # what it cost at somebody else's server
    is_cut: bool = False  # it ends because it may have no more tokens
    checked: CheckedObject | None = None  # with a prompt that wants a JSON object: whether the text is one


class Target(ABC, Generic[Job]):
    """Answers requests. `job` and `answer` are called on `limits.calls` threads, everything else on any."""

    limits = Limits()

    @property
    @abstractmethod
    def abilities(self) -> Abilities:
        """Its present abilities."""

    @abstractmethod
    def job(self, received: Received) -> Job:
        """The job for `answer` from a request that the abilities allow.

        Raises WireError for unreadable content, and FeaturesError.
        """

    @abstractmethod
    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """One answer per job, in their order; at most `limits.batch` jobs. An error of one job is in its answer."""

    def request_above(self, received: Received, job: Job) -> Received:
        """The request as the tier above can read it."""
        return received

    def question_names(self) -> Collection[str]:
        """The taught questions that it answers."""
        return ()

    def load_questions(self) -> bool | None:
        """Reads what the newest message to set questions names. None: there is none; False: it was refused."""
        return None

    def why_closed(self, now: float) -> str:
        """Why it answers nothing for a while (now: seconds, time.monotonic()); empty: it does.

        The server then leaves its share, so that other servers get the requests.
        """
        return ""

    def status(self) -> dict[str, Any]:
        """Its part of the server's status besides the abilities; its keys are those of docs/protocol.md."""
        return {}

    def on_step(self, step: Callable[[], None]) -> None:
        """Call `step` on the thread of `answer` whenever a part of the work is done, unless it has only one part."""

    def close(self) -> None:
        """Ends calls of `answer` early: each returns soon, with an error."""


def picture_job(received: Received, bundle: Bundle | None = None, image_tokens: Any = None) -> PictureJob:
    """The job of a request that has a picture, or image tokens in its place.

    bundle: whose vocabulary spells the draft; None: there is no draft.
    """
    request = received.request
    draft = bundle.text(request.draft_ids) if bundle and request.draft and request.bundle == bundle.id else ""
    return PictureJob(
        request.content if image_tokens is None else b"",
        "image/webp" if request.content_kind is ContentKind.WEBP else "image/jpeg",
        received.pixels,
        received.deadline,
        draft,
        request.options.max_tokens if request.options else None,
        request.options.prompt if request.options else "",
        image_tokens=image_tokens,
        key=received.key,
    )
