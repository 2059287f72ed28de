"""The tokenizer beside a Hugging Face model: text to ids, and ids to what a person reads (extra ``text``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from gradleak.errors import InvalidFile, InvalidInput, reason
from gradleak.integrations.huggingface import quiet

__all__ = ["Tokenizer"]

_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BROKEN = "\ufffd"
"""What stands for the beginning of a character whose end is in the next token."""
_GLUE = "##"


@final
class Tokenizer:
    """The tokenizer of a folder that ``save_pretrained`` wrote; nothing is fetched and no code of the folder is run.

    Attributes:
        special: ids that are no words: padding, beginning, end and separators. The unknown word and the mask stand in
            the place of a word and are not among them.
        mask: id of the mask; None where there is none.

    Raises:
        InvalidInput: the extra ``text`` is not installed.
        InvalidFile: the folder has no tokenizer, or none that can be read.
    """

    def __init__(self, folder: str | Path) -> None:
        if not any((Path(folder) / name).is_file() for name in _FILES):
            raise InvalidFile(
                f"{str(folder)!r} has no tokenizer, so that ids could not be read as words; save it there with "
                "tokenizer.save_pretrained(folder)."
            )
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise InvalidInput("Text needs the extra 'text': pip install 'gradleak[text]'.") from error
        try:
            with quiet():
                found: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # its readers fail in any way on a damaged file
            raise InvalidFile(
                f"The tokenizer in {str(folder)!r} cannot be read ({reason(error)}); save it there again with "
                "tokenizer.save_pretrained(folder)."
            ) from error
        self._tokenizer = found
        self.mask: int | None = found.mask_token_id
        words = {found.mask_token_id, found.unk_token_id} - {found.pad_token_id, found.bos_token_id, found.eos_token_id}
        self.special = tuple(sorted(set(found.all_special_ids) - words))

    def __len__(self) -> int:
        """Return the number of ids, added ones among them."""
        return len(self._tokenizer)

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """Return the ids of ``text`` as a model takes them, special ones included, cut after ``longest``."""
        return list(self._tokenizer(text, truncation=longest is not None, max_length=longest)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the sentence in one line, without special tokens."""
        text = self._tokenizer.decode([t for t in ids if 0 <= t < len(self)], skip_special_tokens=True)
        return " ".join(text.splitlines())

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return what each token adds to the text; "##" continues the word before, and an empty one adds nothing."""
        before, pieces = "", []
        for end in range(1, len(ids) + 1):
            kept = [t for t in ids[:end] if 0 <= t < len(self)]
            text = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
            piece, starts = text[same:], not before or text[same : same + 1].isspace()
            if not piece.strip() or (piece.endswith(_BROKEN) and end < len(ids)):
                pieces.append("")  # the rest of the character, or the word behind the space, is still to come
                continue
            pieces.append(" ".join(piece.split()) if starts else _GLUE + piece.rstrip())
            before = text
        return pieces
