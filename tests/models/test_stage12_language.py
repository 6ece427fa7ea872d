"""The recipe's stage that teaches a language model to see, with a small model and hardly any training."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from edge_runtime.inference.bundle import BOS, EOS, PAD
from models.family import LABEL_WORDS, Tail
from models.recipe import stage12_language
from models.recipe.stage1_photos import SPECIAL
from models.recipe.stage3_bottleneck import GAINS
from models.recipe.stage12_language import Lessons, Settings, train
from models.recipe.workspace import Workspace
from tests.server.targets.seeing_model import pretrained

WORDS = [*SPECIAL, "a", "dog", "cat", "running", "red"]
DOG, CAT = WORDS.index("dog"), WORDS.index("cat")
PHOTOS = 4


def row(*words: int, length: int) -> list[int]:
    return [*words, *[PAD] * (length - len(words))]


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """What earlier stages leave: photos of dogs with a caption each, and one without captions."""
    work = Workspace(tmp_path)
    (work / "vocabulary.txt").write_text("\n".join(WORDS) + "\n")
    np.save(work / "nouns.npy", np.array([word in ("dog", "cat") for word in WORDS]))
    caption = row(BOS, WORDS.index("a"), DOG, EOS, length=8)
    for part, photos in (("train", PHOTOS), ("unlabelled", 1), ("dev", 2)):
        np.save(work / f"maps-{part}.npy", np.random.default_rng(0).random((photos, 7, 7, 320)).astype(np.float16))
        np.save(work / f"labels-{part}.npy", np.array([row(DOG, length=LABEL_WORDS)] * photos, np.int16))
        np.save(work / f"texts-{part}.npy", np.array([caption] * photos, np.int16))
        np.save(work / f"captions-{part}.npy", np.array([[caption, row(length=8)]] * photos, np.int16))
        np.save(work / f"collections-{part}.npy", np.zeros(photos, np.int16))
    (work / "collections.txt").write_text("photos\n")
    work.save("3-bottleneck", {"average": {f"tail.{k}": v for k, v in Tail(len(GAINS)).state_dict().items()}})
    return work


def test_only_projector_and_changes_learn(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage12_language, "PHOTOS", 2)
    model = pretrained()
    before = {name: weight.clone() for name, weight in model.model.named_parameters()}
    train(work, Settings(steps=2), model)
    learnt = work.averaged(stage12_language.NAME)
    assert any(weight.any() for name, weight in learnt.items() if name.endswith("/up"))  # they began as zeros
    after = {name.replace(".linear.", "."): weight for name, weight in model.model.named_parameters()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    figures = work.figures(stage12_language.NAME)
    assert {"cider_photos", "questions_right"} <= figures.keys()


def test_lessons_are_captions_the_clouds_text_and_a_question_with_its_answer(work: Workspace) -> None:
    tokenizer = pretrained().tokenizer
    lessons, rng = Lessons(work, tokenizer), np.random.default_rng(0)
    answers = set()
    for _ in range(20):
        photo, asked, caption, text, *question = lessons.segments("train", 0, lessons.captions[0], rng)
        assert (photo.parent, asked.parent, caption.parent, text.parent) == (None, 0, 1, 1)
        assert caption.tokens == text.tokens == [*tokenizer.encode("a dog", add_special_tokens=False), lessons.end]
        if question:  # none, if the thing that it would be about is there and should not be
            words, answer = (tokenizer.decode(each.tokens) for each in question)
            answers.add((("dog" in words), answer))
    assert len(answers) == 1  # about the dog, and the answer is yes: there are only dogs


def test_questions_ask_about_a_thing_that_is_there_and_about_one_that_is_not(work: Workspace) -> None:
    lessons = Lessons(work, pretrained().tokenizer)
    lessons.all_nouns = np.array([DOG, CAT])
    rows, words, answers = lessons.questions(lessons.captions)
    assert sorted(rows) == [0, 0, 1, 1, 2, 2, 3, 3]
    asked = {"yes": "Is there a dog in the picture?", "no": "Is there a cat in the picture?"}
    assert all(question.startswith(asked[answer]) for question, answer in zip(words, answers, strict=True))


def test_photos_without_captions_teach_the_clouds_text(work: Workspace) -> None:
    lessons = Lessons(work, pretrained().tokenizer)
    found = lessons.segments("unlabelled", 0, None, np.random.default_rng(0))
    assert [segment.is_learnt for segment in found] == [False, False, True]
