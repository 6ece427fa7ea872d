"""A pretrained language model that reads features of boards: SmolLM2-135M with a projector (models/language_model.py).

It is a model of transformers like any other, but its picture tokens come from the bundle's own tail, also for pictures
that boards send whole. Its prompt contains the words of the likeliest labels, and its answers have labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edge_runtime.errors import ConfigError
from edge_runtime.inference.bundle import PAD, Bundle
from edge_runtime.wire import EnvelopeError
from models.captions import QUESTION
from models.family import LABEL_WORDS
from models.labels import label_words, with_seen, words_of_labels
from models.language_model import SHIPPED, TOWER_PIXELS, Eyes, installed, question, read_learnt
from server.config import Config, HuggingFaceConfig
from server.engine import Engine
from server.engine import Job as EngineJob
from server.loading import load_engine
from server.prompts import Prompt
from server.received import Received
from server.targets.huggingface_model import HuggingFaceModel
from server.targets.huggingface_prompts import Job
from server.targets.huggingface_target import HuggingFaceTarget, Model
from server.targets.huggingface_tower import Tower
from server.targets.latents import Latents
from server.targets.target import Abilities, Answer, FeaturesError, PictureJob, picture_job


class LanguageTarget(HuggingFaceTarget):
    """For as many threads as its model, except `status`, which is for any."""

    def __init__(
        self,
        model: Model,
        eyes: Eyes,
        engine: Engine,
        bundle: Bundle,
        config: HuggingFaceConfig,
        prompts: Mapping[str, Prompt],
        max_batch: int = 1,
    ) -> None:
        """engine: of the bundle's tail and classifier. Raises ConfigError."""
        if several := [name for name, prompt in prompts.items() if prompt.frames > 1]:
            raise ConfigError(f'prompt {several[0]}: target = "lm" reads one frame at a time: want frames = 1')
        super().__init__(model, config, bundle, prompts, max_batch)
        self.bundle, self.engine, self._eyes, self._latents = bundle, engine, eyes, Latents(bundle)
        self._words = words_of_labels(bundle.manifest.classes, bundle.words)

    @property
    def abilities(self) -> Abilities:
        return replace(
            super().abilities,
            name="lm",
            bundles=(self.bundle.id,),
            pictures=self.engine.head is not None,
            labels=True,
            references=self.bundle.inter_tables is not None,
        )

    def job(self, received: Received) -> PictureJob:
        seen, classes = received.request.seen_labels, self.bundle.manifest.classes
        if max(seen, default=-1) >= len(classes):
            raise EnvelopeError(f"label {max(seen)} of {len(classes)}: want a class of the bundle")
        if received.pixels is None:
            read = EngineJob(*self._latents.symbols(received), labels=seen)
        else:
            read = EngineJob(self.engine.symbols(received.pixels))
        return self.seen(read, picture_job(received, self.bundle))

    @torch.no_grad()
    def seen(self, read: EngineJob, job: PictureJob) -> PictureJob:
        """The job with the picture tokens and labels of these symbols. Raises FeaturesError."""
        features = self.engine.features([read])
        (logits,) = self.engine.label_logits(features)
        tokens = self._eyes(features)[0]
        if not tokens.isfinite().all():
            raise FeaturesError("the features gave picture tokens that are not finite: install the bundle again")
        ids = label_words(with_seen(logits.softmax(-1), read.labels), self._words, LABEL_WORDS)
        told = " ".join(self.bundle.words[i] for i in ids if i != PAD)
        scores = self.engine.likeliest(self.engine.label_shares(logits, read.labels))
        return replace(job, picture=b"", pixels=None, image_tokens=tokens, labels_told=told, scores=scores)

    def answer(self, jobs: Sequence[PictureJob]) -> list[Answer]:
        answers = zip(jobs, super().answer(jobs), strict=True)
        return [answer if answer.error else replace(answer, scores=dict(job.scores)) for job, answer in answers]

    def asked(self, job: PictureJob, draft: str | None = None, repair: tuple[str, str] | None = None) -> Job:
        asked = super().asked(job, draft, repair)
        return replace(asked, prompt=question(asked.prompt, job.labels_told))


def load_language(settings: Config, bundle: Bundle, model: Model) -> LanguageTarget:
    """model: of `load_language_model`. Raises ConfigError."""
    server, config = settings.server, settings.lm
    eyes, _ = read_learnt(_learnt(settings), bundle)
    device = settings.own_device
    engine = load_engine(bundle, (), device, server.threads)
    limits, prompts = HuggingFaceConfig(config.prompt, config.max_tokens, config.dtype), settings.read_prompts()
    return LanguageTarget(model, eyes.to(device), engine, bundle, limits, prompts, server.max_batch)


def load_language_model(settings: Config, bundle: Bundle) -> HuggingFaceModel:
    """At the first time, writes the whole model into a cache, which takes a minute. Raises ConfigError."""
    server, config, learnt = settings.server, settings.lm, _learnt(settings)
    _, changes = read_learnt(learnt, bundle)
    folder = installed(learnt, changes, Path(config.cache) if config.cache else None)
    model = HuggingFaceModel.load(str(folder), config.dtype, server.device, server.threads)
    model.tower = Tower(model.loaded, TOWER_PIXELS, QUESTION)
    return model


def _learnt(settings: Config) -> Path:
    return Path(settings.lm.weights or SHIPPED)
