"""Drafts become the tokens that the model itself would have written."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from server.targets.draft_style import MAX_DRAFT
from server.targets.huggingface_drafts import DraftTokenizer
from tests.server.targets.tiny_models import TEXT, byte_pairs, words

TOKENIZERS = {"words": words(), "bytes": byte_pairs("bytes"), "metaspace": byte_pairs("metaspace")}


def drafts_of(name: str) -> DraftTokenizer:
    return DraftTokenizer(TOKENIZERS[name], LlamaConfig(**TEXT))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("before", ["describe the photo", "describe\n"])
def test_a_draft_has_the_tokens_of_the_models_last_text_after_any_prompt(name: str, before: str) -> None:
    tokenizer, drafts = TOKENIZERS[name], drafts_of(name)

    def written(text: str) -> tuple[int, ...]:
        prompt = tokenizer.encode(before, add_special_tokens=False)
        whole = tokenizer.encode(before + (text if before[-1].isspace() else f" {text}"), add_special_tokens=False)
        return tuple(whole[len(prompt) :])

    drafts.learn(written("the dog is running"))
    assert drafts.tokens("a man on the beach") == written("a man on the beach")
    assert drafts.text(drafts.tokens("a man on the beach")) == "a man on the beach"


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
def test_a_draft_gets_the_models_capital_letter_and_full_stop(name: str) -> None:
    drafts = drafts_of(name)
    plain = drafts.tokens("a dog on the beach")
    drafts.learn(TOKENIZERS[name].encode(" A man is here.", add_special_tokens=False))
    assert drafts.text(plain) == "a dog on the beach"
    assert drafts.text(drafts.tokens("a dog on the beach")) == "A dog on the beach."
    assert drafts.text(drafts.tokens("A dog on the beach.")) == "A dog on the beach."


@pytest.mark.parametrize("text", ["<image> a dog", "</s> a dog", "<s>a dog", "<pad>"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_draft_ends_before_its_first_special_token(name: str, text: str) -> None:
    drafts = drafts_of(name)
    assert drafts.tokens(text) == ()
    assert drafts.text(drafts.tokens(f"the dog {text}")) == "the dog"


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_text_has_only_tokens_that_may_be_proposed(text: str) -> None:
    for name in TOKENIZERS:
        drafts = drafts_of(name)
        assert all(0 <= token < TEXT["vocab_size"] and token not in drafts.special for token in drafts.tokens(text))


def test_a_long_draft_is_cut_before_it_is_read() -> None:
    drafts = drafts_of("words")
    assert drafts.tokens("dog " * 10_000_000) == drafts.tokens(("dog " * 10_000_000)[:MAX_DRAFT])


def test_tokens_that_the_configuration_names_are_never_proposed() -> None:
    tokenizer = words()
    config = LlamaConfig(**TEXT, image_token_id=tokenizer.convert_tokens_to_ids("dog"))
    assert DraftTokenizer(tokenizer, config).tokens("the dog is") == DraftTokenizer(tokenizer, config).tokens("the")


def test_a_text_without_words_teaches_nothing(tmp_path: Path) -> None:
    drafts = drafts_of("bytes")
    before = drafts.tokens("a dog")
    drafts.learn(())
    drafts.learn((2,))
    assert drafts.tokens("a dog") == before
