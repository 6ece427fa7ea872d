"""[prompts]: what becomes of the tables, and what is refused at start."""

from pathlib import Path

import pytest

from edge_runtime.config import MAX_CONFIG_BYTES, load_toml
from edge_runtime.errors import ConfigError
from edge_runtime.planning import server_status
from server.config import Config
from server.prompts import MAX_PROMPTS, QUESTION, Prompt, PromptConfig, read_prompts

SERVER = '[server]\nid = "s1"\ntarget = "openai:http://127.0.0.1:8080/v1"\n[openai]\nmodel = "m"\n'


def loaded(folder: Path, text: str) -> Config:
    (folder / "server.toml").write_text(SERVER + text)
    config = load_toml(folder / "server.toml", Config)
    config.check_target()
    return config


def test_a_prompt_for_a_camera_at_a_door_is_there_without_configuration() -> None:
    assert read_prompts({}) == {"door": Prompt(system="", text=QUESTION)}


def test_a_table_adds_its_words_to_the_question(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        '[prompts.drive]\nquestion = "Is a car there?"\nsystem = "You watch."\ncontext = "A red car is parked."\n'
        'language = "German"\nmax_tokens = 30\n',
    )
    prompts = read_prompts(config.prompts)
    assert prompts.keys() == {"door", "drive"}
    drive = prompts["drive"]
    assert (drive.system, drive.max_tokens, drive.schema) == ("You watch.", 30, None)
    assert drive.text.startswith("Is a car there?")
    assert "A red car is parked." in drive.text
    assert "German" in drive.text


def test_a_context_alone_is_enough_and_the_door_may_be_replaced() -> None:
    prompts = read_prompts({"yard": PromptConfig(context="A swing."), "door": PromptConfig("Who is it?")})
    assert prompts["yard"].text.startswith(QUESTION)
    assert prompts["door"].text == "Who is it?"


def test_an_inline_schema_is_part_of_what_is_asked(tmp_path: Path) -> None:
    config = loaded(
        tmp_path, '[prompts.door]\nschema = { type = "object", properties = { people = { type = "integer" } } }\n'
    )
    door = read_prompts(config.prompts)["door"]
    assert door.schema is not None
    assert (door.schema.name, door.schema.object_in('{"people": 2}')) == ("door", '{"people": 2}')
    assert '"people":{"type":"integer"}' in door.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[prompts."a b"]\n', "'a b' is no name"),
        ("[prompts.none]\n", "'none' is no name"),
        (f"[prompts.{'x' * 33}]\n", "is no name"),
        ('[prompts.a]\nquestion = ""\n', r'question = "", want text in quotes, at least 1 long'),
        ("[prompts.good]\n[prompts.a]\nmax_tokens = 0\n", r"max_tokens = 0, want a whole number from 1 to 4096"),
        ('[prompts.a]\nquestoin = "x"\n', "unknown key `questoin` .*did you mean question"),
        (f'[prompts.a]\ncontext = "{"x" * 16_385}"\n', "at most 16384 long"),
        (f'[prompts.a]\nsystem = "{"x" * 10_000_000}"\n', f"larger than {MAX_CONFIG_BYTES} bytes"),
        ('[prompts.a]\nschema = { type = "thing" }\n', "schema of the prompt a: is no JSON Schema"),
        ('[prompts.a]\nschema = "nowhere.json"\n', "nowhere.json: cannot be read"),
        ("".join(f"[prompts.p{n}]\n" for n in range(MAX_PROMPTS)), f"want at most {MAX_PROMPTS}"),
    ],
)
def test_a_mistake_is_named_at_start(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)


def test_the_usual_prompt_must_be_there(tmp_path: Path) -> None:
    loaded(tmp_path, 'prompt = "drive"\n[prompts.drive]\n')
    with pytest.raises(ConfigError, match=r'"drive" in \[openai\] is none of the prompts door'):
        loaded(tmp_path, 'prompt = "drive"\n')


def test_a_board_reads_as_many_names_as_a_server_may_publish() -> None:
    assert server_status.MAX_PROMPTS == MAX_PROMPTS
