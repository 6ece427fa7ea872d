"""A small model that proposes tokens to another one: the texts are those of `generate`, in fewer passes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from server.targets.huggingface_assistant import FIRST_LENGTH, MAX_LENGTH, AssistedText
from server.targets.huggingface_loading import TargetError
from server.targets.huggingface_model import HuggingFaceModel, Job
from server.targets.phrases import PhraseMemory
from tests.server.targets.test_huggingface_model import PROMPTS, jobs, load, of_generate, passes_of, same_question
from tests.server.targets.tiny_models import (
    LANGUAGE_MODELS,
    SMOLVLM_MARKS,
    VISION_MODELS,
    VOCABULARY,
    WORDS,
    byte_pairs,
    language_model,
    words,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")  # of its own calls of numpy

LIMIT = 48
SMALLER = {"hidden_size": 16, "num_hidden_layers": 1}
# A target, and an assistant of other weights.
PAIRS = {
    "llama": (LANGUAGE_MODELS["llama"], language_model("Llama", byte_pairs("metaspace"), **SMALLER)),
    "gpt2": (LANGUAGE_MODELS["gpt2"], language_model("Qwen2", byte_pairs("bytes"), **SMALLER)),
    "mistral-sliding-window": (LANGUAGE_MODELS["mistral-sliding-window"], language_model("Llama")),
    "smolvlm": (VISION_MODELS["smolvlm"], language_model("Llama", words(SMOLVLM_MARKS), **SMALLER)),
    "florence2": (VISION_MODELS["florence2"], language_model("Llama", **SMALLER)),
    "paligemma": (VISION_MODELS["paligemma"], language_model("Mistral", sliding_window=8)),
}
# Caches of full attention, of sliding windows and of convolutions.
COPIES = ("llama", "gpt2", "mistral-sliding-window", "lfm2-convolution", "gemma3-hybrid-window")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    save, save_small = PAIRS[request.param]
    target = load(tmp_path_factory.mktemp("target"), save)
    save_small(small := tmp_path_factory.mktemp("assistant"))
    target.add_assistant(str(small))
    return target


@pytest.fixture(scope="module", params=COPIES)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    return _twins(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceModel:
    return _twins(tmp_path_factory.mktemp("llamas"), "llama")


@pytest.fixture
def llama(llamas: HuggingFaceModel) -> HuggingFaceModel:
    """A model, and its copy as its assistant, as they are at the start."""
    assistant = llamas.assistant
    assert assistant is not None
    assistant.counts, assistant.length = dict.fromkeys(assistant.counts, 0), FIRST_LENGTH
    llamas.phrases = PhraseMemory(1)
    return llamas


def _twins(folder: Path, name: str) -> HuggingFaceModel:
    target = load(folder, LANGUAGE_MODELS[name])
    target.add_assistant(str(folder))
    return target


def long_jobs(target: HuggingFaceModel, **changes) -> list[Job]:
    return [replace(job, max_tokens=LIMIT, **changes) for job in jobs(target)]


def test_a_text_with_an_assistant_is_that_of_generate(pair: HuggingFaceModel) -> None:
    for job in long_jobs(pair, draft=""):
        (alone,), before = pair.answer([replace(job, draft=None)]), pair.rewritten
        pair.phrases = PhraseMemory(1)
        (assisted,) = pair.answer([job])
        assert (assisted.error, assisted.tokens) == ("", of_generate(pair, job))
        assert alone.passes == min(len(alone.tokens) + 1, LIMIT)
        assert assisted.passes <= alone.passes or pair.rewritten > before
    assert pair.assistant.counts["proposed"] > pair.assistant.counts["accepted"]
    assert pair.assistant.counts["passes"] > pair.assistant.counts["failed"] == 0


def test_with_a_copy_of_itself_a_text_takes_about_a_pass_per_block(twins: HuggingFaceModel) -> None:
    twins.phrases, assistant = PhraseMemory(1), twins.assistant
    blocks = tokens = 0
    for job in long_jobs(twins, draft=""):
        before = dict(assistant.counts)
        (answer,) = twins.answer([job])
        assert answer.tokens == of_generate(twins, job)
        tokens += len(answer.tokens)
        blocks += answer.passes
        assert answer.accepted_again >= assistant.counts["accepted"] - before["accepted"] > 0
    assert tokens / blocks > FIRST_LENGTH + 1
    # The few that were not accepted: the last ones of a text that ended, and those after two equally likely words.
    assert assistant.counts["accepted"] > 0.9 * assistant.counts["proposed"]


@pytest.mark.parametrize("small", [None, language_model("Llama", byte_pairs("metaspace"), **SMALLER)])
def test_passes_are_no_more_than_those_of_assisted_generation_with_the_same_assistant(
    llama: HuggingFaceModel, tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        small(tmp_path)
        monkeypatch.setattr(llama, "assistant", llama.assistant)  # put back at the end
        llama.add_assistant(str(tmp_path))
    model, theirs, ours = llama.assistant.loaded.model, 0, 0
    monkeypatch.setattr(PhraseMemory, "longest", lambda *_, **__: (0, ()))
    schedule = {"num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0}
    for job in long_jobs(llama):
        model.generation_config.update(num_assistant_tokens=FIRST_LENGTH, **schedule)
        theirs += passes_of(llama, job, assistant_model=model)
        llama.assistant.length = FIRST_LENGTH
        ours += llama.answer([replace(job, draft="")])[0].passes
    assert ours <= theirs < LIMIT * len(PROMPTS)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_draft_and_any_length_of_proposals_give_the_text_of_none(llama: HuggingFaceModel, data) -> None:
    job = jobs(llama)[data.draw(st.integers(0, len(PROMPTS) - 1))]
    job = replace(job, max_tokens=data.draw(st.integers(1, 40)))
    (own,) = llama.answer([job])
    draft = " ".join(data.draw(st.sampled_from((word, word, word, "dog", ""))) for word in own.text.split())
    llama.assistant.length = data.draw(st.integers(1, MAX_LENGTH))
    (answer,) = llama.answer([replace(job, draft=draft)])
    assert (answer.error, answer.tokens) == ("", own.tokens)
    assert answer.passes <= own.passes


def test_it_is_asked_only_where_nothing_cheaper_proposes(llama: HuggingFaceModel) -> None:
    llama.phrases, counts = PhraseMemory(1000), llama.assistant.counts
    (job, *_) = long_jobs(llama)
    (own,) = llama.answer([job])  # without proposals; its phrases are known from now on
    (right,) = llama.answer([replace(job, draft=own.text)])
    (known,) = llama.answer([replace(job, draft="")])
    assert right.tokens == known.tokens == own.tokens
    assert right.passes == 1
    assert known.passes < own.passes
    llama.answer([replace(each, draft="") for each in same_question(llama)])  # in one batch
    assert not any(counts.values())
    llama.phrases = PhraseMemory(1)
    llama.answer([replace(job, draft="")])
    assert counts["passes"] > 0


def test_after_a_wrong_proposal_it_goes_on_as_if_it_had_never_been_made(twins: HuggingFaceModel) -> None:
    assistant, prompt = twins.assistant, twins.inputs(jobs(twins)[0])["input_ids"][0].tolist()
    text, random = AssistedText(assistant, prompt, LIMIT), torch.Generator().manual_seed(3)
    written, usable = list[int](), sorted(assistant.usable)
    for _ in range(8):
        proposed = text.propose(written, 6)
        assert proposed == AssistedText(assistant, prompt, LIMIT).propose(written, 6)
        right, other = torch.randint(len(usable), (2,), generator=random).tolist()
        written += [*proposed[: right % 4], usable[other]]


def test_it_proposes_more_if_all_was_right_and_less_if_not(llama: HuggingFaceModel) -> None:
    assistant = llama.assistant
    assistant.learn(5, 5)
    assert assistant.length == FIRST_LENGTH + 2
    for _ in range(10):
        assistant.learn(5, 5)
    assert assistant.length == MAX_LENGTH
    for _ in range(20):
        assistant.learn(3, 2)
    assert assistant.length == 1
    assert assistant.status() == {
        "model": assistant.loaded.name,
        "proposed": 115,
        "accepted": 95,
        "passes": 0,
        "failed": 0,
    }


def test_it_reads_the_words_of_a_prompt_and_no_picture(tmp_path: Path) -> None:
    target = load(tmp_path / "target", VISION_MODELS["smolvlm"])
    language_model("Llama", words(SMOLVLM_MARKS))(tmp_path / "assistant")
    target.add_assistant(str(tmp_path / "assistant"))
    seen = list[int]()
    model = target.assistant.loaded.model
    model.register_forward_pre_hook(
        lambda _, args, inputs: seen.extend(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    job = replace(jobs(target)[0], draft="", max_tokens=2)
    prompt = target.inputs(job)["input_ids"][0].tolist()
    target.answer([job])
    place = target.loaded.model.config.image_token_id
    assert place in prompt
    assert seen == [token for token in prompt if token != place]


def break_down(target: HuggingFaceModel) -> None:
    def fails(*_):
        raise RuntimeError("out of memory")

    target.assistant.loaded.model.register_forward_pre_hook(fails)


def compute_nan(target: HuggingFaceModel) -> None:
    with torch.no_grad():
        target.assistant.loaded.model.model.norm.weight.fill_(torch.nan)


@pytest.mark.parametrize(("broken", "why"), [(break_down, "out of memory"), (compute_nan, "no finite numbers")])
def test_an_assistant_that_fails_costs_its_proposals_alone_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken, why: str
) -> None:
    target = _twins(tmp_path, "llama")
    broken(target)
    for job in long_jobs(target, draft=""):
        target.phrases = PhraseMemory(1)
        (answer,) = target.answer([job])
        assert (answer.error, answer.tokens) == ("", of_generate(target, job))
    assert target.assistant.counts["failed"] == len(PROMPTS)
    assert target.assistant.counts["proposed"] == 0
    (line,) = [each.getMessage() for each in caplog.records if "assistant failed" in each.getMessage()]
    assert why in line


def test_a_text_that_is_too_long_for_the_assistant_is_no_fault(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(PhraseMemory, "longest", lambda *_, **__: (0, ()))
    target = load(tmp_path / "target", language_model("Llama"))
    language_model("GPT2", n_embd=32, n_layer=1, n_head=2, max_position_embeddings=8)(tmp_path / "assistant")
    target.add_assistant(str(tmp_path / "assistant"))
    job = replace(jobs(target)[0], draft="", max_tokens=LIMIT)
    assert target.answer([job])[0].tokens == of_generate(target, job)
    assert target.assistant.counts["passes"] > target.assistant.counts["failed"] == 0


@pytest.fixture
def folders(tmp_path: Path) -> tuple[HuggingFaceModel, Path]:
    """A target, and the folder of its assistant, which is not loaded yet."""
    folder = tmp_path / "assistant"
    language_model("Llama", **SMALLER)(folder)
    return load(tmp_path / "target", language_model("Llama")), folder


def test_rows_and_marks_besides_the_words_may_differ(folders, tmp_path: Path) -> None:
    """The vocabularies of a family differ in padding, and in the marks that a vision model adds behind its words."""
    target, _ = folders
    language_model("Llama", vocab_size=VOCABULARY + 64)(tmp_path / "padded")
    language_model("Llama", vocab_size=len(WORDS) + 5)(tmp_path / "tight")
    tokenizer = words()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision|>"]})
    language_model("Llama", tokenizer)(tmp_path / "marked")
    for name in ("padded", "tight", "marked"):
        target.add_assistant(str(tmp_path / name))
        target.phrases = PhraseMemory(1)
        job = replace(jobs(target)[0], draft="", max_tokens=LIMIT)
        assert target.answer([job])[0].tokens == of_generate(target, job)
        assert target.assistant.counts["proposed"] > target.assistant.counts["failed"] == 0


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (language_model("Llama", words(("<mark>",))), "another vocabulary than .*: its token 5 is not 'a'"),
        (language_model("Llama", byte_pairs("bytes")), "another vocabulary"),
        (language_model("Llama", vocab_size=32), r"another vocabulary .* its token 32 is not"),
        (VISION_MODELS["llava"], "describes pictures: want a causal language model"),
        (language_model("Mamba", state_size=4), "MambaForCausalLM cannot be rolled back"),
    ],
)
def test_a_model_that_cannot_propose_for_this_target_is_refused_by_name(folders, tmp_path, save, message) -> None:
    target, _ = folders
    save(tmp_path / "other")
    with pytest.raises(TargetError, match=rf"assistant {tmp_path / 'other'}.*{message}"):
        target.add_assistant(str(tmp_path / "other"))
    assert target.assistant is None


def test_pickles_and_code_are_refused_for_an_assistant_too(folders) -> None:
    target, folder = folders
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "e.E"}}))
    with pytest.raises(TargetError, match="never run"):
        target.add_assistant(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"pytorch_model\.bin, a pickle"):
        target.add_assistant(str(folder))
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match="has NaN"):
        target.add_assistant(str(folder))
