"""Captions files, and the words that are trained on and scored."""

import csv
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from edge_runtime.errors import AiflowError

MAX_CAPTION_CHARACTERS = 2000
QUESTION = "Describe the picture in one sentence."  # to which a caption is the answer


def words_of(caption: str) -> list[str]:
    """Lower-cased words without punctuation, for training and for scores."""
    return re.sub(r"[^a-z0-9]", " ", caption.lower()).split()


def read_captions(tsv: Path) -> dict[str, tuple[str, list[str]]]:
    """Photo name to (split, captions). The header line names the columns image and caption, and optionally split.

    Without that column, the split is empty. Raises AiflowError.
    """
    captions: dict[str, tuple[str, list[str]]] = {}
    try:
        with tsv.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if not {"image", "caption"} <= set(rows.fieldnames or ()):
                raise AiflowError(
                    f"{tsv}: its header line names {rows.fieldnames}, wanted image, caption and perhaps split"
                )
            for row in rows:
                split, image, caption = row.get("split", ""), row["image"], row["caption"]
                if None in (split, image, caption) or len(caption) > MAX_CAPTION_CHARACTERS:
                    raise AiflowError(
                        f"{tsv}, line {rows.line_num}: want all columns, captions of at most 2000 letters"
                    )
                first_split, texts = captions.setdefault(image, (split, []))
                if split != first_split:
                    raise AiflowError(
                        f"{tsv}, line {rows.line_num}: {image} is in split {split} and in {first_split}: choose one"
                    )
                texts.append(caption)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AiflowError(f"{tsv}: {error}: name a tab-separated UTF-8 file") from error
    return captions


def captions_of(tsv: Path, split: str | None = None) -> dict[str, list[str]]:
    """Photo name, in Unicode's form NFC, to captions: those of one split, or all. Raises AiflowError."""
    captions = read_captions(tsv)
    splits = {split for split, _ in captions.values()}
    if split is not None and split not in splits:
        raise AiflowError(f"{tsv}: no photo is in split {split}: want one of {', '.join(sorted(splits))}")
    # There are two ways to encode é, and file systems and tables may differ: unicode.org/reports/tr15.
    return {
        unicodedata.normalize("NFC", name): texts for name, (its, texts) in captions.items() if split in (None, its)
    }


def captioned_as(captions: Mapping[str, object], path: str) -> str | None:
    """A picture's name in `captions_of`: its path in the directory or tar, or its file name. None: no caption."""
    path = unicodedata.normalize("NFC", path)
    return next((name for name in (path, PurePosixPath(path).name) if name in captions), None)
