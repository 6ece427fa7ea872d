import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.config import (
    MAX_CONFIG_BYTES,
    BoardConfig,
    CameraConfig,
    PolicyConfig,
    RuntimeConfig,
    SamplingConfig,
    convert,
    load_toml,
)
from edge_runtime.errors import ConfigError
from edge_runtime.mqtt import MqttConfig
from edge_runtime.wire.envelope import GREEDY, Options
from firmware_tools.cli import EXIT_CONFIG

BOARD = '[board]\nid = "b1"\nbundle = "models/zoo/small"\n'
CAMERA = '[[cameras]]\nname = "door"\nsource = "photos"\n'
KEYS = ("board", "cameras", "mqtt", "local", "policy", "outbox", "id", "bundle", "name", "source", "motion", "mask")


def load(folder: Path, text: str | bytes) -> RuntimeConfig:
    path = folder / "board.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_toml(path, RuntimeConfig)


def test_id_bundle_and_one_camera_are_enough(tmp_path):
    config = load(tmp_path, BOARD + CAMERA)
    assert (config.board.site, config.board.paradigm, config.board.backend) == ("home", "auto", "auto")
    assert config.cameras == (CameraConfig("door", "photos"),)
    assert config.mqtt.settings("b1").host == "127.0.0.1"


def test_a_text_with_a_zero_byte_is_refused_since_no_path_can_have_one(tmp_path):
    with pytest.raises(ConfigError, match=r"board\.toml: .*a zero byte"):
        load(tmp_path, BOARD + CAMERA + '[mqtt]\nusername = "b"\npassword_file = "/etc/aiflow/\\u0000"\n')


@pytest.mark.parametrize("host", ["", "board..lan", "x" * 64])
def test_metrics_on_a_host_that_no_machine_can_have_are_refused(tmp_path, host):
    with pytest.raises(ConfigError, match=r"board\.toml: .*host in \[metrics\] = .*want an address of this machine"):
        load(tmp_path, BOARD + CAMERA + f'[metrics]\nport = 1\nhost = "{host}"\n')


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        (BOARD + "deadline = 9\n" + CAMERA, "deadline", "deadline_ms"),
        (BOARD + CAMERA + "interval = 9\n", "interval", "interval_s"),
        (BOARD + CAMERA + '[mqtt]\nhostname = "x"\n', "hostname", "host"),
        (BOARD + CAMERA + "[local]\nprot = 1884\n", "prot", "port"),
        (BOARD + CAMERA + '[outbox]\nfile = "x"\nmax_age = 1.0\n', "max_age", "max_age_s"),
        (BOARD + CAMERA + '[metrics]\nport = 1\nhots = "x"\n', "hots", "host"),
        (BOARD + CAMERA + "[policy]\nmay_ofload = true\n", "may_ofload", "may_offload"),
        (BOARD + CAMERA + "[cameras.motion]\nenable = true\n", "enable", "enabled"),
        (BOARD.replace("[board]", "[bord]") + CAMERA, "bord", "board"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, text, key, nearest):
    with pytest.raises(ConfigError, match=rf"board\.toml: .*`{key}`.*did you mean {nearest}\?"):
        load(tmp_path, text)


def test_a_key_in_the_wrong_table_is_refused_with_the_tables_that_know_it(tmp_path):
    said = r"`paradigm` \(in policy\): it is a key of \[board\] or \[\[cameras\]\]; known keys: quality_floor"
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, BOARD + CAMERA + '[policy]\nparadigm = "split"\n')


def test_an_unknown_key_like_no_other_is_refused_with_those_of_its_table(tmp_path):
    with pytest.raises(ConfigError, match=r"`zzz`.*known keys: id, bundle, site, backend, "):
        load(tmp_path, BOARD + "zzz = 1\n" + CAMERA)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (BOARD + "threads = 0\n" + CAMERA, "board.threads"),
        (BOARD + "threads = 17\n" + CAMERA, "board.threads"),
        (BOARD + "deadline_ms = 49\n" + CAMERA, "board.deadline_ms"),
        (BOARD + "resend_ms = 1.5\n" + CAMERA, "board.resend_ms"),
        (BOARD + "open_requests = 0\n" + CAMERA, "board.open_requests"),
        (BOARD + "jpeg_quality = 101\n" + CAMERA, "board.jpeg_quality"),
        (BOARD + 'paradigm = "fast"\n' + CAMERA, "board.paradigm"),
        (BOARD + 'tier = "device"\n' + CAMERA, "board.tier"),
        (BOARD.replace("b1", "B 1") + CAMERA, "board.id"),
        (BOARD + CAMERA + "interval_s = nan\n", r"cameras\[0\].interval_s"),
        (BOARD + CAMERA + "stall_s = inf\n", r"cameras\[0\].stall_s"),
        (BOARD + CAMERA.replace("door", "a/b"), r"cameras\[0\].name"),
        (BOARD + CAMERA + "[mqtt]\nport = 65536\n", "mqtt.port"),
        (BOARD + CAMERA + "[mqtt]\nkeepalive_s = 1\n", "mqtt.keepalive_s"),
        ("cameras = []\n" + BOARD, "cameras"),
        (BOARD + '[[cameras]]\nname = "door"\nsource = ""\n', r"cameras\[0\].source"),
    ],
)
def test_a_value_out_of_bounds_is_refused_and_its_key_named(tmp_path, text, key):
    with pytest.raises(ConfigError, match=rf"board\.toml: {key} = .*, want "):
        load(tmp_path, text)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"required key `bundle` is missing \(in board\)"):
        load(tmp_path, '[board]\nid = "b1"\n' + CAMERA)


@pytest.mark.parametrize(
    ("local", "is_near"),
    [
        ("", False),
        ("[local]\n", False),
        ("[local]\nport = 1884\n", True),
        ('[local]\nhost = "localhost"\n', False),
        ('[local]\nusername = "user"\n', True),
    ],
)
def test_a_near_broker_is_another_broker_or_user_than_the_servers(tmp_path, local, is_near):
    assert (load(tmp_path, BOARD + CAMERA + local).near_broker is not None) == is_near


@pytest.mark.parametrize(("mqtt", "local"), [("localhost", "127.0.0.1"), ("[::1]", "localhost"), ("a.lan", "a.lan")])
def test_two_names_of_this_machine_are_one_broker(tmp_path, mqtt, local):
    text = f'[mqtt]\nhost = "{mqtt}"\n[local]\nhost = "{local}"\n'
    assert load(tmp_path, BOARD + CAMERA + text).near_broker is None


@pytest.mark.parametrize("name", ["Front_Door", "a", "X" * 24])
def test_a_camera_may_have_the_name_that_frigate_gives_it(tmp_path, name):
    assert load(tmp_path, BOARD + CAMERA.replace("door", name)).cameras[0].name == name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOARD.replace("b1", "B_1") + CAMERA, 'board.id = "B_1", want an id: 1 to 32 of the characters a-z, 0-9 and -'),
        (BOARD.replace("b1", "server") + CAMERA, 'board.id = "server", want an id: .* but not "server"'),
        (BOARD.replace('"b1"', '"b1\\n"') + CAMERA, "board.id = .*, want an id"),
        (
            BOARD + CAMERA.replace("door", "a b"),
            r'cameras\[0\].name = "a b", want a name: 1 to 24 of the characters A-Z',
        ),
        (BOARD + "threads = 0\n" + CAMERA, "board.threads = 0, want a whole number from 1 to 16"),
        (BOARD + CAMERA + "[policy]\ncpu_share = 0\n", r"policy.cpu_share = 0, want a number above 0\S*, to 1"),
        (BOARD + 'tier = "device"\n' + CAMERA, 'board.tier = "device", want "cloud" or "edge"'),
        (BOARD + CAMERA + "repeat = 1\n", r"cameras\[0\].repeat = 1, want true or false"),
        ('mqtt = "mqtt://anna:secret@b.lan"\n' + BOARD + CAMERA, r'mqtt = "mqtt://\.\.\.@b\.lan", want a table'),
        ("cameras = []\n" + BOARD, r"cameras = \[\], want a list, at least 1 long, at most 16 long"),
        (BOARD + CAMERA + "[mqtt]\nusername = 1979-05-27\n", 'mqtt.username = "1979-05-27", want text in quotes'),
    ],
)
def test_a_refused_value_is_shown_with_its_rule_in_words(tmp_path, text, found):
    with pytest.raises(ConfigError, match=f"board.toml: {found}"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOARD + CAMERA.replace("[[cameras]]", "[cameras]"), r"write \[\[cameras\]\] with double brackets"),
        (BOARD.replace("[board]", "[[board]]") + CAMERA, r"write \[board\] with single brackets"),
        (BOARD + CAMERA + "[[cameras.motion]]\nenabled = true\n", r"write \[cameras\.motion\] with single"),
    ],
)
def test_brackets_of_the_wrong_number_are_explained(tmp_path, text, found):
    with pytest.raises(ConfigError, match=found):
        load(tmp_path, text)


def test_a_byte_order_mark_is_read_over(tmp_path):
    assert load(tmp_path, b"\xef\xbb\xbf" + (BOARD + CAMERA).encode()).board.id == "b1"


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = BOARD.replace("models", "~/models") + CAMERA.replace("photos", "~/photos")
    text += '[outbox]\nfile = "~/outbox.sqlite"\n[mqtt]\nca_file = "~/ca.pem"\nusername = "a~b"\n'
    config = load(tmp_path, text)
    assert config.outbox is not None
    assert config.board.bundle == "/home/somebody/models/zoo/small"
    assert config.cameras[0].source == "/home/somebody/photos"
    assert (config.outbox.file, config.mqtt.ca_file) == ("/home/somebody/outbox.sqlite", "/home/somebody/ca.pem")
    assert config.mqtt.username == "a~b"


@pytest.mark.parametrize(("source", "device"), [("0", "/dev/video0"), ("12", "/dev/video12"), ("./0", "./0")])
def test_a_number_is_the_camera_of_that_number(tmp_path, source, device):
    assert load(tmp_path, BOARD + CAMERA.replace("photos", source)).cameras[0].source == device


@pytest.mark.parametrize(
    ("board", "camera", "place"),
    [('paradigm = "offload"\n', "", r"\[board\]"), ("", 'paradigm = "offload"\n', "camera door")],
)
def test_who_forbids_that_pictures_leave_cannot_ask_to_send_them(tmp_path, board, camera, place):
    text = BOARD + board + CAMERA + camera
    load(tmp_path, text)
    with pytest.raises(ConfigError, match=f'{place} has paradigm = "offload", but .policy. has may_offload = false'):
        load(tmp_path, text + "[policy]\nmay_offload = false\n")


def test_a_board_without_a_head_has_nothing_to_keep_in_an_outbox(tmp_path):
    text = BOARD + 'paradigm = "offload"\n' + CAMERA + '[outbox]\nfile = "x"\n'
    with pytest.raises(ConfigError, match=r"loads no head, and .outbox. keeps features: remove .outbox."):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "key", ["a - at `$.cameras.foo", "bundle - at `$.cameras[9]", "a\n\x1b[2J", "$.board", "`", "cameras[0]"]
)
def test_a_key_may_be_called_anything_and_is_refused_by_name(key):
    least = {"board": {"id": "b1", "bundle": "b"}, "cameras": [{"name": "door", "source": "photos"}]}
    for tables in (least | {key: 1}, least | {"mqtt": {key: 1}}, least | {"board": least["board"] | {"id": key}}):
        with pytest.raises(ConfigError) as refused:
            convert(Path("board.toml"), tables, RuntimeConfig)
        assert str(refused.value).isprintable()


@settings(max_examples=300)
@given(
    st.recursive(
        st.one_of(st.text(max_size=9), st.integers(), st.floats(), st.booleans()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=9), inner),
        max_leaves=12,
    )
)
def test_any_tables_are_a_configuration_or_a_config_error(data):
    with suppress(ConfigError):
        convert(Path("board.toml"), {"board": data} if not isinstance(data, dict) else data, RuntimeConfig)


def test_the_caller_tells_whose_file_is_wanted_and_no_order_of_tables_does(tmp_path):
    class Tables(msgspec.Struct, forbid_unknown_fields=True):
        mqtt: MqttConfig | None = None
        board: dict[str, str] | None = None

    path = tmp_path / "server.toml"
    path.write_text('[server]\nid = "s1"\n')
    with pytest.raises(ConfigError, match="this is a server's configuration, for `aiflow serve`: name a board's"):
        load_toml(path, Tables, "board")
    with pytest.raises(ConfigError, match="unknown key `server`"):
        load_toml(path, Tables)


def test_two_cameras_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="two cameras have the same name among door, door"):
        load(tmp_path, BOARD + 2 * CAMERA)


@pytest.mark.parametrize("source", ["watch:{0}", "watch:{0}/kept", "watch:{0}/kept/door", "{0}/kept", "watch:{0}/link"])
def test_a_camera_that_would_read_kept_frames_is_refused(tmp_path, source):
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    camera = f'[[cameras]]\nname = "door"\nsource = "{source.format(tmp_path)}"\n'
    table = f'[kept_frames]\nfolder = "{tmp_path}/kept"\n'
    with pytest.raises(ConfigError, match=r"keeps frames in .*/kept/door, which camera door reads"):
        load(tmp_path, BOARD + camera + table)
    for other in ("kept/uploads", "kept/door/uploads", "keptdoor"):
        load(tmp_path, BOARD + camera.replace(source.format(tmp_path), f"watch:{tmp_path}/{other}") + table)


@pytest.mark.parametrize(
    "text", ["[board\n", b"\xff\xfe", "x = " + "[" * 100_000], ids=["syntax", "encoding", "nesting"]
)
def test_what_is_not_toml_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"board\.toml: not TOML"):
        load(tmp_path, text)


@pytest.mark.parametrize("value", ["porch", "192.168.1.5", "/dev/video0", "True"])
def test_a_value_that_is_none_is_refused_with_its_line_and_what_is_wanted(tmp_path, value):
    with pytest.raises(ConfigError, match=r"not TOML: .* \(at line 2, .*text wants quotes.*small letters"):
        load(tmp_path, f"[board]\nid = {value}\n")


@pytest.mark.parametrize(
    ("table", "header"),
    [
        ("[cameras.triggers]\nwhen = 'label == cat'\n", r"write \[\[cameras\.triggers\]\] .* each of the triggers$"),
        ("[[cameras.motion]]\nenabled = true\n", r"write \[cameras\.motion\] with single brackets"),
    ],
)
def test_a_table_of_the_wrong_kind_is_named_as_toml_has_it(tmp_path, table, header):
    with pytest.raises(ConfigError, match=header):
        load(tmp_path, BOARD + CAMERA + table)


def test_a_file_too_large_for_a_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="larger than"):
        load(tmp_path, "#" * (MAX_CONFIG_BYTES + 1))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.toml"):
        with pytest.raises(ConfigError, match="name a configuration file that can be read"):
            load_toml(path, RuntimeConfig)


def test_plain_text_to_another_machine_must_be_asked_for(tmp_path):
    remote = BOARD + CAMERA + '[mqtt]\nhost = "broker.example"\n'
    with pytest.raises(ConfigError, match="insecure = true"):
        load(tmp_path, remote).mqtt.settings("b1")
    assert load(tmp_path, remote + "insecure = true\n").mqtt.settings("b1").host == "broker.example"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (BOARD + "thread = 2\n" + CAMERA, "did you mean threads?"),
        (BOARD.replace("models/zoo/small", "/nowhere") + CAMERA, "/nowhere holds no manifest.json"),
    ],
)
def test_aiflow_run_exits_78_and_says_why(tmp_path, text, found):
    path = tmp_path / "board.toml"
    path.write_text(text)
    code = "import sys; from firmware_tools.cli import main; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code, "run", path], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_CONFIG
    assert found in result.stderr
    assert "Traceback" not in result.stderr


def test_a_camera_cannot_want_the_head_that_a_board_does_not_load(tmp_path):
    with pytest.raises(ConfigError, match=r"camera door wants split, but a board that offloads .*: give the board"):
        load(tmp_path, BOARD + 'paradigm = "offload"\n' + CAMERA + 'paradigm = "split"\n')


GATE = 'questions = ["gate"]\n'
TRIGGER = '[[cameras.triggers]]\nwhen = "{}"\n'


@pytest.mark.parametrize(
    ("camera", "said"),
    [
        (TRIGGER.format("gate == open"), r"trigger on 'gate'.*want questions = \[\"gate\"\] \(in cameras\[0\]\)"),
        (GATE + TRIGGER.format("gate == open or dor == open"), r"'dor'.*want questions = \[\"gate\", \"dor\"\]"),
        (GATE + TRIGGER.format("gate = open"), r"is no condition: at '= open' want == or != \(in cameras\[0\]\.trigg"),
        (GATE + TRIGGER.format("confidence > 0.9"), "compares no question"),
        (GATE + 'paradigm = "device"\n', "asks none"),
        ('paradigm = "device"\n' + TRIGGER.format("label == cat"), "asks none"),
        ('questions = ["a b"]\n', "want a name: 1 to 32"),
        ('prompt = "Is the gate open?"\n', "want a name: 1 to 32"),
        ('prompt = "none"\n', 'but not "none"'),
        ('prompt = "gate"\nparadigm = "device"\n', "asks none"),
        (GATE + 'prompt = "gate"\n', "camera yard has a prompt and questions, but no server answers both"),
        ('prompt = "gate"\n[cameras.sampling]\ntemperature = 0.7\n', r"a prompt and \[cameras\.sampling\]"),
        ('prompt = "gate"\n[cameras.sampling]\nmin_tokens = 3\n', r"a prompt and \[cameras\.sampling\]"),
        ('questions = ["label"]\n', 'but not "label"'),
        (f"questions = {[f'q{i}' for i in range(17)]}\n".replace("'", '"'), "at most 16 long"),
    ],
)
def test_a_question_or_trigger_that_cannot_work_is_named_with_its_fix(tmp_path, camera, said):
    path = tmp_path / "board.toml"
    path.write_text(f'[board]\nid = "b1"\nbundle = "x"\n[[cameras]]\nname = "yard"\nsource = "0"\n{camera}')
    with pytest.raises(ConfigError, match=said) as refused:
        load_toml(path, RuntimeConfig)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ("temperature = -1", "want a number from 0 to 100"),
        ("temperature = 0.7, top_k = 0", "want a whole number from 1 to 1048575"),
        ("temperature = 0.7, top_p = 1.1", "want a number from 0 to 1"),
        ("temperature = 0.7, seed = -1", "want a whole number from 0 to 9223372036854775807"),
        ("repetition_penalty = 0.5", "want a number from 1 to 10"),
        ("temprature = 0.7", "temperature"),
        ("top_p = 0.9", "change nothing without a temperature"),
        ("seed = 0", "change nothing without a temperature"),
    ],
)
def test_sampling_that_cannot_work_is_named(tmp_path, sampling, said):
    path = tmp_path / "board.toml"
    path.write_text(
        f'[board]\nid = "b1"\nbundle = "x"\n[[cameras]]\nname = "yard"\nsource = "0"\nsampling = {{ {sampling} }}\n'
    )
    with pytest.raises(ConfigError, match=said):
        load_toml(path, RuntimeConfig)


def test_stop_words_become_tokens_of_the_bundle_and_an_unknown_one_is_named():
    words = ("<pad>", "<start>", "<end>", "<unknown>", "a", "dog", "with")
    sampling = SamplingConfig(temperature=0.7, top_k=5, stop=("with", "a"))
    assert sampling.with_tokens(words) == Options(temperature=0.7, top_k=5, stop=(6, 4))
    assert SamplingConfig().with_tokens(words) == GREEDY
    # msgspec compares objects: an equal one that is not the default's own would take bytes of each request.
    asked = msgspec.structs.replace(SamplingConfig(temperature=0.0).with_tokens(words), questions=("gate",))
    assert msgspec.msgpack.encode(asked) == msgspec.msgpack.encode(Options(questions=("gate",)))
    with pytest.raises(ConfigError, match="stop word 'cat' is not in the bundle's vocabulary"):
        SamplingConfig(stop=("a", "cat")).with_tokens(words)


def test_questions_and_triggers_are_of_one_camera(tmp_path):
    path = tmp_path / "board.toml"
    one = '[[cameras]]\nname = "{}"\nsource = "0"\n'
    text = GATE + TRIGGER.format("gate == open and confidence > 0.9 for 2 frames") + TRIGGER.format("label == cat")
    path.write_text('[board]\nid = "b1"\nbundle = "x"\n' + one.format("yard") + text + one.format("door"))
    yard, door = load_toml(path, RuntimeConfig).cameras
    assert (yard.questions, len(yard.triggers)) == (("gate",), 2)
    assert (door.questions, door.triggers) == ((), ())


def test_threads_are_measured_unless_they_or_the_share_of_a_core_are_given():
    camera = (CameraConfig("front", "mqtt"),)
    for board, policy, threads in (({}, {}, None), ({"threads": 3}, {}, 3), ({}, {"cpu_share": 0.5}, 1)):
        assert RuntimeConfig(BoardConfig("b1", "x", **board), camera, policy=PolicyConfig(**policy)).threads == threads


def test_providers_without_onnxruntime_are_refused():
    with pytest.raises(ConfigError, match="providers are of onnxruntime"):
        BoardConfig("b1", "x", backend="litert", providers=("cuda",))


def test_a_prompt_goes_with_sampling_that_changes_nothing() -> None:
    greedy = SamplingConfig(temperature=0.0)
    RuntimeConfig(BoardConfig("b1", "x"), (CameraConfig("yard", "0", prompt="gate", sampling=greedy),))


@pytest.mark.parametrize(("limit", "paradigm", "warns"), [(128, "auto", 1), (129, "auto", 0), (40, "offload", 0)])
def test_a_limit_below_the_coarsest_level_is_a_warning(limit: int, paradigm: str, warns: int) -> None:
    board = BoardConfig("b1", "x", max_bytes=limit, paradigm=paradigm)
    config = RuntimeConfig(board, (CameraConfig("yard", "0"),))
    assert len(config.tight_limits((128.7, 170.9))) == warns
    assert config.tight_limits(()) == []  # the bundle does not say
