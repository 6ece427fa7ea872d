"""What docs/CASE_STUDY.md tells users to run does what it says."""

import re
import textwrap
from pathlib import Path

from models.captions import read_captions
from testbed.shaping import parse_trace

PAGE = (Path(__file__).parents[1] / "docs" / "CASE_STUDY.md").read_text()


def test_its_script_makes_a_captions_file_of_flickr8ks_own_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Flickr8k.token.txt").write_text(
        '1.jpg#0\tA dog .\n1.jpg#1\tA "brown" dog .\n2.jpg.1#0\tA .\n3.jpg#0\tA cat .\n'
    )
    Path("Flickr_8k.trainImages.txt").write_text("2.jpg\n3.jpg\n")
    Path("Flickr_8k.devImages.txt").write_text("1.jpg\n")
    script = re.search(r"```python\n(.*?)\n *```", PAGE, re.DOTALL)
    assert script
    exec(textwrap.dedent(script[1]), {})
    assert read_captions(Path("flickr8k.tsv")) == {
        "3.jpg": ("train", ["A cat ."]),
        "1.jpg": ("dev", ["A dog .", 'A "brown" dog .']),
    }


def test_its_trace_is_one():
    printed = re.search(r"printf '(.*?)' > trace\.tsv", PAGE)
    assert printed
    trace = parse_trace(printed[1].replace("\\t", "\t").replace("\\n", "\n"), "trace.tsv")
    assert [(seconds, profile.name) for seconds, profile in trace] == [(0, "lte-m"), (20, "wifi"), (40, "3g")]
