"""The target "lm" for what measures the bundle's own tiers: it takes the same jobs."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from edge_runtime.inference.bundle import Bundle
from server.config import Config, ServerConfig
from server.engine import Engine, Job
from server.targets import Answer
from server.targets.huggingface_prompts import Job as TextJob
from server.targets.language import load_language, load_language_model
from server.targets.target import PictureJob


class LanguageEngine(Engine):
    """Its answers have tokens of the language model's own vocabulary, and the text."""

    def __init__(self, bundle: Bundle, threads: int = 2) -> None:
        """Raises ConfigError."""
        config = Config(ServerConfig("bench", str(bundle.path), target="lm", threads=threads))
        self.model = load_language_model(config, bundle)
        self.target = load_language(config, bundle, self.model)
        self.bundle, own = bundle, self.target.engine
        super().__init__(own.tail, {}, own.classifier, own.classes, own.head)

    def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The texts of any number of jobs, in their order."""
        return self.model.answer([self.asked(job) for job in jobs])

    def asked(self, job: Job) -> TextJob:
        """A job as the language model reads it. Without a draft, it writes alone."""
        read = self.target.seen(job, PictureJob(b"", "image/jpeg", None, inf))
        draft = None if job.draft is None else self.bundle.text(list(job.draft))
        return replace(self.target.asked(read), draft=draft)
