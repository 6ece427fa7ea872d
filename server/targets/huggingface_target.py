"""A model of Hugging Face as what answers a server's requests: from a request's picture to the model's job and back."""

import time
from collections.abc import Sequence
from typing import Any

from edge_runtime.capture.picture_checks import decode_picture
from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import Bundle
from edge_runtime.wire import ContentKind
from server.accepted import Accepted
from server.config import HuggingFaceConfig
from server.targets.huggingface import HuggingFaceTarget, Job
from server.targets.huggingface_features import FeatureReader
from server.targets.target import Abilities, Answer, Limits, PictureJob, Target, Verified, picture_job

SILENT_S = 300.0


class PictureModel(Target[PictureJob]):
    """For one thread, except `status`."""

    # It answers jobs one after the other. A large model writes a long text on a CPU within SILENT_S.
    limits = Limits(batch=1, silent_s=SILENT_S)

    def __init__(
        self,
        model: HuggingFaceTarget,
        config: HuggingFaceConfig,
        bundle: Bundle | None = None,
        features: FeatureReader | None = None,
    ) -> None:
        """bundle: whose vocabulary spells the drafts; None: drafts are not used. features: None: pictures only.

        Raises ConfigError.
        """
        if not model.takes_pictures:
            raise ConfigError(f"{model.loaded.name} takes no pictures: want an image-text-to-text model")
        self.model, self.config, self.bundle, self.features = model, config, bundle, features

    @property
    def abilities(self) -> Abilities:
        uses_drafts = self.model.proof.strict
        # The start test found equal texts. That is less than the bundle's proof, which is to the bit.
        verified: Verified = "server" if uses_drafts else "none"
        name = f"hf:{self.model.loaded.name}"
        return Abilities(
            name,
            verified,
            bundles=(self.features.bundle.id,) if self.features else (),
            drafts=uses_drafts and self.bundle is not None,
            references=self.features is not None and self.features.bundle.inter_tables is not None,
        )

    def job(self, accepted: Accepted) -> PictureJob:
        tokens = None
        if self.features and accepted.request.content_kind is ContentKind.LATENT:
            tokens = self.features.tokens(accepted)
        return picture_job(accepted, self.bundle, tokens)

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        return [self._answer(job) for job in jobs]

    def _answer(self, job: PictureJob) -> Answer:
        # Decoded once before, within limits; here in its own size and proportions.
        pixels = decode_picture(job.picture) if job.image_tokens is None else None
        limit = min(job.max_tokens or self.config.max_tokens, self.config.max_tokens)
        started = time.monotonic()
        (written,) = self.model.answer([Job(self.config.prompt, pixels, job.draft, limit, job.image_tokens)])
        return Answer(
            text=written.text,
            accepted=written.accepted,
            proposed=written.proposed,
            accepted_again=written.accepted_again,
            passes=written.passes,
            confidence=written.confidence,
            error=written.error,
            stages_ms={"passes": 1e3 * (time.monotonic() - started)},  # the first pass reads the picture
        )

    def status(self) -> dict[str, Any]:
        bundles = {self.bundle.id.hex(): self.bundle.manifest.name} if self.bundle else {}
        return {"numerics": self.model.proof.numerics, "bundles": bundles}
