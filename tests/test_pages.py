"""A changed figure is found in a page, and other words around it are not."""

import pytest

from tests.pages import says

PAGE = "A server keeps 1,024 replies for 60 s.\nA board keeps\n16 of them; nobody keeps 7.\n\n| `rate` | at most 8 |\n"


@pytest.mark.parametrize("facts", [(1024, "server"), ("server", 1024, "60 s"), (16, "board"), (7,), ("`rate`", 8)])
def test_a_sentence_or_row_says_its_facts_in_any_order(facts):
    assert says(PAGE, *facts)


@pytest.mark.parametrize("facts", [(24,), (1,), (1024, "board"), (16, 7), ("serve",), ("rate", 7)])
def test_a_part_of_a_number_or_of_a_word_and_the_facts_of_another_sentence_are_not_said(facts):
    assert not says(PAGE, *facts)
