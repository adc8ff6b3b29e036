"""A tokenizer that a reader can run in the head, for tests of what is done with text."""

from collections.abc import Iterable


class Letters:
    """Ids 2 to 60 are characters from " " on; 0 ends a document and 1 begins one."""

    num_ids = 61
    eos_id = 0
    bos_id: int | None = 1
    pad_id = 0
    unk_id: int | None = None
    is_seqios = False
    digest = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord(" ") + 2 for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join("<end>" if i == 0 else "<begin>" if i == 1 else chr(i + 30) for i in ids)
