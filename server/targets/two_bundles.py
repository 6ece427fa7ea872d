"""Two bundles on one server, while boards move from one to the other: each request is answered by its own bundle."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from server.engine import Job
from server.received import Received
from server.targets.bundle import BundleTarget
from server.targets.target import Abilities, Answer, Target

OwnedJob = tuple[BundleTarget, Job]


class TwoBundles(Target[OwnedJob]):
    """May be called on as many threads as each of its targets. A batch for both bundles is computed in two parts."""

    def __init__(self, first: BundleTarget, second: BundleTarget) -> None:
        """first: answers the taught questions, and pictures of a bundle that is not here."""
        self.first, self.both, self.limits = first, (first, second), first.limits

    @property
    def abilities(self) -> Abilities:
        """The abilities that both have."""
        each = [target.abilities for target in self.both]
        return replace(
            each[0],
            verified="strict" if all(one.verified == "strict" for one in each) else "none",
            bundles=tuple(target.bundle.id for target in self.both),
            pictures=all(one.pictures for one in each),
            drafts=all(one.drafts for one in each),
            references=all(one.references for one in each),
            max_tokens=min(one.max_tokens for one in each),
        )

    def job(self, received: Received) -> OwnedJob:
        wanted = received.request.bundle
        target = next((each for each in self.both if each.bundle.id == wanted), self.first)
        return target, target.job(received)

    def answer(self, jobs: Sequence[OwnedJob]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for target in self.both:
            rows = [row for row, (owner, _) in enumerate(jobs) if owner is target]
            if rows:
                answers.update(zip(rows, target.answer([jobs[row][1] for row in rows]), strict=True))
        return [answers[row] for row in range(len(jobs))]

    def on_step(self, step: Callable[[], None]) -> None:
        for target in self.both:
            target.on_step(step)

    def request_above(self, received: Received, job: OwnedJob) -> Received:
        target, its_job = job
        return target.request_above(received, its_job)

    def question_names(self) -> Collection[str]:
        return self.first.question_names()

    def load_questions(self) -> bool | None:
        return self.first.load_questions()

    def close(self) -> None:
        for target in self.both:
            target.close()

    def status(self) -> dict[str, Any]:
        """Shapes and questions are those of the first."""
        each = [target.status() for target in self.both]
        bundles = {name: value for status in each for name, value in status["bundles"].items()}
        return {**each[0], "bundles": bundles, "numerics": "+".join(status["numerics"] for status in each)}
