"""Captions as people wrote them, and the words that are trained on and scored."""

import csv
import re
from pathlib import Path

MAX_CAPTION_CHARACTERS = 2000


class CaptionsError(ValueError):
    """A captions file that cannot be used."""


def words_of(caption: str) -> list[str]:
    """Lower-cased words without punctuation: what is trained on, and what scores are counted on."""
    return re.sub(r"[^a-z0-9]", " ", caption.lower()).split()


def read_captions(tsv: Path) -> dict[str, tuple[str, list[str]]]:
    """Photo name to (split, captions). A header line names the columns split, image, caption. Raises CaptionsError."""
    captions: dict[str, tuple[str, list[str]]] = {}
    try:
        with tsv.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            if not {"split", "image", "caption"} <= set(rows.fieldnames or ()):
                raise CaptionsError(f"{tsv}: its header line names {rows.fieldnames}, wanted split, image, caption")
            for row in rows:
                split, image, caption = row["split"], row["image"], row["caption"]
                if None in (split, image, caption) or len(caption) > MAX_CAPTION_CHARACTERS:
                    raise CaptionsError(
                        f"{tsv}, line {rows.line_num}: want three columns, captions of at most 2000 letters"
                    )
                first_split, texts = captions.setdefault(image, (split, []))
                if split != first_split:
                    raise CaptionsError(
                        f"{tsv}, line {rows.line_num}: {image} is in split {split} and in {first_split}: choose one"
                    )
                texts.append(caption)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CaptionsError(f"{tsv}: {error}: name a tab-separated UTF-8 file") from error
    return captions
