"""Small models of many architectures: a text is that of `generate`, whatever the draft, in no more passes."""

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.generation import CandidateGenerator

import server.targets.huggingface_decoding as decoding
from server.targets.huggingface_loading import TargetError
from server.targets.huggingface_model import MAX_TOKENS, HuggingFaceModel, Job, prove
from server.targets.phrases import PhraseMemory
from server.targets.target import Answer
from server.verify import Text, verify
from tests.server.targets.tiny_models import (
    LANGUAGE_MODELS,
    VISION_MODELS,
    WORDS,
    Folder,
    blip2,
    language_model,
    never_written,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

LIMIT = 12
PROMPTS = ("describe the photo", "what is unusual here", "the dog is running")
OF_ONE_LENGTH = ("the dog is running", "the cat is sitting", "a man with hat")
# The prompt's processor cuts it into other words, or the tokenizer has no such token: all are texts for a draft.
HOSTILE = (
    "",
    " \n\t",
    "<image> <image> <image>",
    "</s> the dog",
    "<pad><s></s><unk><|endoftext|><|im_end|>",
    "the dog \ud800\udfff\x00\x07 is",
    "\u202e\u200b\ufeff\U0001f415 {{ 7 * 7 }} %s",
    "a dog " * 2_000_000,
)


def load(folder: Path, save: Folder) -> HuggingFaceModel:
    save(folder)
    return HuggingFaceModel.load(str(folder))


@pytest.fixture(scope="module", params=[*LANGUAGE_MODELS, *VISION_MODELS])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    save = {**LANGUAGE_MODELS, **VISION_MODELS}[request.param]
    return load(tmp_path_factory.mktemp(request.param), save)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    return load(tmp_path_factory.mktemp("llama"), LANGUAGE_MODELS["llama"])


def jobs(target: HuggingFaceModel, **changes) -> list[Job]:
    random = np.random.default_rng(7)
    pictures = [random.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in PROMPTS]
    return [
        Job(prompt, pixels if target.takes_pictures else None, max_tokens=LIMIT, **changes)
        for prompt, pixels in zip(PROMPTS, pictures, strict=True)
    ]


def of_generate(target: HuggingFaceModel, job: Job, **more) -> tuple[int, ...]:
    """The text of transformers itself, without the end token."""
    inputs = target.inputs(job)
    model = target.loaded.model
    asked = {"max_new_tokens": job.max_tokens, "do_sample": False, "num_beams": 1, **more}
    sequence = model.generate(**inputs, **asked)[0].tolist()
    length = inputs["input_ids"].shape[1]
    # BLIP leaves out the last token of the prompt. Of a model with an encoder, the text begins with its start token.
    shorter = {"BlipForConditionalGeneration": length - 1, "Florence2ForConditionalGeneration": 1}
    written = sequence[shorter.get(target.loaded.architecture, length) :]
    ends = model.generation_config.eos_token_id
    return tuple(written[:-1] if written[-1:] == [ends] else written)


def own_answers(target: HuggingFaceModel) -> list[Answer]:
    return target.answer(jobs(target))


def test_without_a_draft_a_text_is_that_of_generate_in_one_pass_per_token(target: HuggingFaceModel) -> None:
    assert target.proof.strict, target.proof.reason
    answers = own_answers(target)
    for job, answer in zip(jobs(target), answers, strict=True):
        assert not answer.error
        assert answer.tokens == of_generate(target, job)
        assert answer.text == target.loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()
        assert answer.passes == min(len(answer.tokens) + 1, LIMIT)
        assert (answer.proposed, answer.accepted, answer.accepted_again) == (0, 0, 0)
        assert 0 < answer.confidence <= 1
    assert len({answer.tokens for answer in answers}) > 1


def test_a_draft_that_the_target_would_have_written_takes_one_pass(target: HuggingFaceModel) -> None:
    for job, own in zip(jobs(target), own_answers(target), strict=True):
        target.answer([job])  # it has just written the same text, so it knows how its texts begin
        answer = target.answer([replace(job, draft=own.text)])[0]
        assert answer.tokens == own.tokens
        assert answer.passes == 1
        # An end token is chosen in the same pass; at the limit, the last token is.
        assert answer.accepted == answer.proposed == min(len(own.tokens), LIMIT - 1)
        assert answer.confidence == pytest.approx(own.confidence, rel=1e-3)


def test_wrong_drafts_change_no_token_and_cost_no_pass(target: HuggingFaceModel) -> None:
    for job, own in zip(jobs(target), own_answers(target), strict=True):
        words = own.text.split()
        middle = len(words) // 2
        wrong = [
            [*words[:middle], "dog", *words[middle + 1 :]],
            words[:middle] + words[middle + 1 :],
            [*words[:middle], "a", "dog", *words[middle:]],
            [*words[:middle], "and", "a", "dog"],
            list(reversed(words)),
        ]
        for draft in wrong:
            answer = target.answer([replace(job, draft=" ".join(draft))])[0]
            assert (answer.error, answer.tokens) == ("", own.tokens)
            assert answer.passes <= own.passes
            assert len(own.tokens) <= answer.accepted + answer.accepted_again + answer.passes


def test_hostile_drafts_change_no_token_and_cost_no_pass(target: HuggingFaceModel) -> None:
    job, own = jobs(target)[0], own_answers(target)[0]
    for draft in HOSTILE:
        answer = target.answer([replace(job, draft=draft)])[0]
        assert (answer.error, answer.tokens) == ("", own.tokens)
        assert answer.passes <= own.passes
        assert answer.proposed < LIMIT


@pytest.fixture
def ending(llama: HuggingFaceModel) -> Iterator[tuple[HuggingFaceModel, Answer, int]]:
    """A model that ends its first text early, this text before that, and how many of its tokens are left."""
    long = own_answers(llama)[0]
    settings = llama.loaded.model.generation_config
    before, at = settings.eos_token_id, max(long.tokens.index(token) for token in long.tokens[3:])
    settings.eos_token_id = [2, long.tokens[at]]
    yield llama, long, at
    settings.eos_token_id = before


def test_a_text_ends_at_the_first_of_several_end_tokens_even_if_the_draft_goes_on(ending) -> None:
    target, long, at = ending
    job = jobs(target)[0]
    for draft in (None, long.text, " ".join(long.text.split()[:at])):
        answer = target.answer([replace(job, draft=draft)])[0]
        assert answer.tokens == long.tokens[:at]
        assert answer.passes == (at + 1 if draft is None else 1)
        assert answer.accepted <= at


def test_penalties_see_the_same_history_with_and_without_a_draft(llama: HuggingFaceModel) -> None:
    generation = llama.loaded.model.generation_config
    before = {"repetition_penalty": generation.repetition_penalty, "no_repeat_ngram_size": None, "min_new_tokens": None}
    unpenalised = [answer.tokens for answer in own_answers(llama)]
    generation.update(repetition_penalty=1.5, no_repeat_ngram_size=2, min_new_tokens=8, do_sample=True, temperature=0.1)
    try:
        answers = own_answers(llama)
        assert [answer.tokens for answer in answers] != unpenalised
        for job, own in zip(jobs(llama), answers, strict=True):
            assert own.tokens == of_generate(llama, job)
            for draft in (own.text, "the dog is the dog is the dog", ""):
                assert llama.answer([replace(job, draft=draft)])[0].tokens == own.tokens
    finally:
        generation.update(**before, do_sample=None, temperature=None)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_draft_gives_the_text_of_none(llama: HuggingFaceModel, data) -> None:
    job = jobs(llama)[data.draw(st.integers(0, len(PROMPTS) - 1))]
    job = replace(job, max_tokens=data.draw(st.integers(1, 24)))
    own = llama.answer([job])[0]
    near = [data.draw(st.sampled_from((word, word, word, "dog", ""))) for word in own.text.split()]
    draft = data.draw(st.one_of(st.just(" ".join(near)), st.lists(st.sampled_from(WORDS)).map(" ".join), st.text()))
    answer = llama.answer([replace(job, draft=draft)])[0]
    assert (answer.error, answer.tokens, answer.is_cut) == ("", own.tokens, own.is_cut)
    assert own.is_cut is (len(own.tokens) == job.max_tokens)
    assert answer.passes <= own.passes


def test_accepting_one_token_after_a_mismatch_would_be_found(llama: HuggingFaceModel, monkeypatch) -> None:
    def careless(text: Text, choices: list[int]) -> Text:
        after = verify(text, choices)
        n = len(after.tokens) - len(text.tokens)
        return after if after.is_done or n == len(choices) else replace(after, tokens=(*after.tokens, choices[n]))

    monkeypatch.setattr(decoding, "verify", careless)
    assert not prove(llama).strict


def test_a_cache_that_is_not_rolled_back_would_be_found(llama: HuggingFaceModel, monkeypatch) -> None:
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, tokens: None)
    proof = prove(llama)
    assert not proof.strict
    assert "differ" in proof.reason


def test_a_model_whose_cache_cannot_be_rolled_back_decodes_plainly_and_says_so(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        target = load(tmp_path, language_model("Mamba", state_size=4))
    assert not target.proof.strict
    assert "MambaForCausalLM" in target.proof.reason
    assert any("MambaForCausalLM" in record.getMessage() for record in caplog.records)
    for job in jobs(target):
        alone, drafted = target.answer([job, replace(job, draft="the dog is running")])
        assert alone.tokens == drafted.tokens == of_generate(target, job)
        assert (drafted.proposed, drafted.passes) == (0, alone.passes)


def test_a_draft_that_cannot_be_read_with_the_prompt_is_verified_in_the_second_pass(tmp_path) -> None:
    target = load(tmp_path, blip2)  # its language model gets the prompt as embeddings
    assert target.proof.strict
    assert not target.proof.reads_draft_with_prompt
    inner = target.loaded.model.language_model.generation_config
    inner.suppress_tokens = never_written(target.loaded.tokenizer)
    job = jobs(target)[0]
    alone = target.answer([job])[0]
    assert alone.tokens == of_generate(target, job)
    for draft, passes in ((alone.text, 2), ("a dog", LIMIT), ("", LIMIT)):
        answer = target.answer([replace(job, draft=draft)])[0]
        assert answer.tokens == alone.tokens
        assert answer.passes <= passes


def test_two_words_that_are_always_equally_likely_do_not_make_texts_depend_on_drafts(tmp_path) -> None:
    target = load(tmp_path, language_model("Llama"))
    words, best = target.loaded.model.lm_head.weight, own_answers(target)[0].tokens
    with torch.no_grad():
        words[best[1]] = words[best[0]]
    for job, own in zip(jobs(target), own_answers(target), strict=True):
        assert own.tokens == of_generate(target, job)
        assert target.answer([replace(job, draft=own.text)])[0].tokens == own.tokens
    assert target.rewritten > 0


def test_a_job_without_finite_numbers_fails_by_name_and_alone(tmp_path) -> None:
    target = load(tmp_path, language_model("Llama"))
    good, own = jobs(target)[0], own_answers(target)[0]
    snow = target.loaded.tokenizer.convert_tokens_to_ids("snow")
    with torch.no_grad():
        target.loaded.model.model.embed_tokens.weight[snow] = float("nan")
    # In one pass with the good ones.
    bad = replace(good, prompt="describe the snow")
    bad, after, drafted = target.answer([bad, good, replace(good, draft="a dog snow")])
    assert "no finite numbers" in bad.error
    assert (bad.text, bad.tokens) == ("", ())
    assert after.tokens == drafted.tokens == own.tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0: want 1"),
        ({"max_tokens": MAX_TOKENS + 1}, "max_tokens"),
        ({"prompt": "dog " * 10_000}, "40000 characters"),
        ({"prompt": "dog " * 1_000}, "reads 512 at most"),
        ({"pixels": np.zeros((4, 4, 3), np.uint8)}, "takes no picture"),
        ({"prompt": "\ud800"}, "cannot read this prompt"),
    ],
)
def test_a_job_that_cannot_be_answered_fails_by_name_and_alone(llama: HuggingFaceModel, changes, message: str) -> None:
    good = jobs(llama)[0]
    first, bad, last = llama.answer([good, replace(good, **changes), good])
    assert message in bad.error
    assert first.tokens == last.tokens
    assert not first.error + last.error


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "want one"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (np.broadcast_to(np.uint8(0), (10**5, 10**5, 3)), "pixels"),
    ],
)
def test_a_picture_that_cannot_be_read_fails_by_name(tmp_path_factory, pixels, message: str) -> None:
    target = vision_target(tmp_path_factory)
    (answer,) = target.answer([Job("describe the photo", pixels)])
    assert re.search(message, answer.error)


_vision: list[HuggingFaceModel] = []


def vision_target(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    if not _vision:
        _vision.append(load(tmp_path_factory.mktemp("llava"), VISION_MODELS["llava"]))
    return _vision[0]


class StubbornAssistant(CandidateGenerator):
    """An assistant model that writes one given text, whatever the target has chosen."""

    def __init__(self, draft: tuple[int, ...], prompt: int, length: int) -> None:
        self.draft, self.prompt, self.length = draft, prompt, length

    def get_candidates(self, input_ids, *args, **kwargs):
        at = input_ids.shape[1] - self.prompt
        room = LIMIT - at - 1
        return torch.cat([input_ids, input_ids.new_tensor([self.draft[at : at + min(self.length, room)]])], -1), None

    def update_candidate_strategy(self, *args) -> None:
        pass


def passes_of(target: HuggingFaceModel, job: Job, **more) -> int:
    """Forward passes of transformers' assisted generation, which must write the same text."""
    counted: list[int] = []
    hook = target.loaded.model.register_forward_hook(lambda *_: counted.append(1))
    tokens = of_generate(target, job, **more)
    hook.remove()
    assert tokens == target.answer([job])[0].tokens
    return len(counted)


@pytest.mark.parametrize("wrong", [0, 1, 2, 5])
def test_passes_are_no_more_than_those_of_assisted_generation_with_the_same_draft(
    llama: HuggingFaceModel, monkeypatch, wrong: int
) -> None:
    theirs, ours = 0, 0
    for job, own in zip(jobs(llama), own_answers(llama), strict=True):
        words = own.text.split()
        for at in range(wrong):
            words[(3 * at + 2) % len(words)] = "dog"
        draft = llama.drafts.tokens(" ".join(words))
        assistant = StubbornAssistant(draft, llama.inputs(job)["input_ids"].shape[1], len(draft))
        monkeypatch.setattr(llama.loaded.model, "_get_candidate_generator", lambda *_, made=assistant, **__: made)
        theirs += passes_of(llama, job, prompt_lookup_num_tokens=len(draft))
        monkeypatch.setattr(llama, "phrases", PhraseMemory(1))  # no advantage from earlier texts
        ours += llama.answer([replace(job, draft=" ".join(words))])[0].passes
    assert ours <= theirs
    assert wrong or ours == theirs == len(PROMPTS)


def test_passes_are_no_more_than_those_of_prompt_lookup(llama: HuggingFaceModel, monkeypatch) -> None:
    theirs, ours = 0, 0
    for short in jobs(llama):
        job = replace(short, max_tokens=48)
        theirs += passes_of(llama, job, prompt_lookup_num_tokens=8)
        monkeypatch.setattr(llama, "phrases", PhraseMemory(1))
        ours += llama.answer([replace(job, draft="")])[0].passes
    assert ours <= theirs


def test_what_the_target_has_written_before_is_proposed_again(llama: HuggingFaceModel, monkeypatch) -> None:
    monkeypatch.setattr(llama, "phrases", PhraseMemory(1000))
    job = replace(jobs(llama)[1], draft="")
    (first,), (again,) = llama.answer([job]), llama.answer([job])
    assert again.tokens == first.tokens
    assert again.passes < first.passes
    assert again.accepted_again > 0


def test_numbers_of_passes_are_those_that_the_model_ran(llama: HuggingFaceModel) -> None:
    counted = []
    hook = llama.loaded.model.register_forward_hook(lambda *_: counted.append(1))
    asked = [*jobs(llama), *jobs(llama, draft="the dog is running")]
    answers = [llama.answer([job])[0] for job in asked]
    hook.remove()
    assert llama.proof.strict
    assert len(counted) == sum(answer.passes for answer in answers)


def same_question(target: HuggingFaceModel) -> list[Job]:
    """Jobs that can share passes: of one length, with other pictures, or with other words if it takes none."""
    prompts = PROMPTS[:1] * 3 if target.takes_pictures else OF_ONE_LENGTH
    return [replace(job, prompt=prompt) for job, prompt in zip(jobs(target), prompts, strict=True)]


def test_texts_that_are_written_together_are_those_of_generate_whatever_the_drafts(target: HuggingFaceModel) -> None:
    assert target.proof.batches
    asked = same_question(target)
    own = [target.answer([job])[0] for job in asked]
    together = target.answer(asked)
    assert [answer.tokens for answer in together] == [of_generate(target, job) for job in asked]
    halves = [" ".join([*answer.text.split()[: 2 + 3 * i], "dog"]) for i, answer in enumerate(own)]
    drafts = [own[0].text, halves[1], halves[2]]
    drafted = target.answer([replace(job, draft=draft) for job, draft in zip(asked, drafts, strict=True)])
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in own]
    assert all(a.passes <= b.passes for a, b in zip(drafted, own, strict=True))
    assert drafted[0].accepted == drafted[0].proposed > 0
    short = replace(asked[0], max_tokens=3)  # not in the same passes: at its limit, Florence-2 is made to end
    assert target.answer([*asked, short])[3].tokens == of_generate(target, short)


def test_bfloat16_is_proven_anew_and_never_written_again_for_a_near_tie(tmp_path) -> None:
    language_model("Llama")(tmp_path)
    target = HuggingFaceModel.load(str(tmp_path), dtype="bfloat16")
    assert target.proof.near_tie == 0.0
    assert target.proof.numerics
    (answer,) = target.answer(jobs(target, draft="the dog")[:1])
    assert answer.tokens
    assert target.rewritten == 0


def test_a_model_that_cannot_write_a_first_text_is_no_target(tmp_path) -> None:
    with pytest.raises(TargetError, match="fails at a first text"):
        load(tmp_path, language_model("Llama", max_position_embeddings=4))
