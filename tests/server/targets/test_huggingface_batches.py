"""Texts that a model of transformers writes in the same passes: those that it writes alone."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import server.targets.huggingface_decoding as decoding
from server.targets import huggingface_model
from server.targets.huggingface_model import HuggingFaceModel, prove
from tests.server.targets.test_huggingface_model import jobs, load, same_question
from tests.server.targets.tiny_models import LANGUAGE_MODELS, VISION_MODELS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    return load(tmp_path_factory.mktemp("llama"), LANGUAGE_MODELS["llama"])


@pytest.fixture
def passes(llama: HuggingFaceModel) -> Iterator[list[int]]:
    """One entry per forward pass of the model."""
    counted: list[int] = []
    hook = llama.loaded.model.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


def test_texts_of_one_length_are_written_in_the_same_passes(llama: HuggingFaceModel, passes: list[int]) -> None:
    asked = [replace(job, max_tokens=48) for job in same_question(llama)]
    own = llama.answer(asked)
    assert len(passes) == max(answer.passes for answer in own) == 48
    passes.clear()
    # The row without a draft decides. One is right at once, and one is soon far ahead and must wait.
    slow, right, ahead = sorted(range(3), key=lambda i: len(own[i].tokens), reverse=True)
    drafts = {slow: None, right: own[right].text, ahead: " ".join([*own[ahead].text.split()[:-1], "dog"])}
    answers = llama.answer([replace(job, draft=drafts[i]) for i, job in enumerate(asked)])
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in own]
    assert len(passes) == answers[slow].passes == 48
    assert answers[right].passes < 5
    assert answers[ahead].passes < len(own[ahead].tokens)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_of_any_drafts_gives_the_texts_of_none(llama: HuggingFaceModel, data) -> None:
    limit = data.draw(st.sampled_from([1, 7, 40]))
    asked, wanted = [], []
    for job in data.draw(st.lists(st.sampled_from(jobs(llama)), min_size=1, max_size=5)):
        own = llama.answer([replace(job, max_tokens=limit)])[0]
        near = [data.draw(st.sampled_from((word, word, word, word, "dog"))) for word in own.text.split()]
        draft = data.draw(st.sampled_from([None, "", own.text, " ".join(near)]))
        asked.append(replace(job, max_tokens=limit, draft=draft))
        wanted.append(own.tokens)
    assert [answer.tokens for answer in llama.answer(asked)] == wanted


def test_rows_that_get_the_picture_of_another_row_would_be_found(tmp_path, monkeypatch) -> None:
    target, right = load(tmp_path, VISION_MODELS["llava"]), huggingface_model.together

    def careless(asked):
        return {name: value.flip(0) if "pixel" in name else value for name, value in right(asked).items()}

    monkeypatch.setattr(huggingface_model, "together", careless)
    proof = prove(target)
    assert (proof.strict, proof.batches) == (True, False)


def test_rows_that_are_not_rolled_back_to_the_shortest_would_be_found(llama: HuggingFaceModel, monkeypatch) -> None:
    monkeypatch.setattr(decoding, "kept", lambda end, lengths: min(end, max(lengths) - 1))
    proof = prove(llama)
    assert (proof.strict, proof.batches) == (True, False)


def test_a_batch_that_fails_is_written_one_by_one(llama: HuggingFaceModel, monkeypatch) -> None:
    asked, right = same_question(llama), huggingface_model.together
    own = [answer.tokens for answer in llama.answer(asked)]

    def fails(inputs):
        if len(inputs) > 1:
            raise RuntimeError("out of memory")
        return right(inputs)

    monkeypatch.setattr(huggingface_model, "together", fails)
    assert [answer.tokens for answer in llama.answer(asked)] == own
