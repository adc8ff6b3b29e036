import pytest

from aquila_jax.errors import UserError
from aquila_jax.evaluation.stopping import TextStream, check_stops

from .letters import Letters


class Bytes(Letters):
    """Ids are bytes of UTF-8."""

    eos_id = 256

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def said(text, stops=(), max_new_tokens=100):
    """The stream after the bytes of a text, and what it showed after each of them."""
    stream = TextStream(Bytes(), [], stops=stops, max_new_tokens=max_new_tokens)
    shown = []
    for token in text.encode():
        stream.push(token)
        shown.append(stream.news())
    return stream, shown


def test_a_stop_string_across_tokens_ends_the_text_before_it():
    stream, shown = said("one\n\ntwo", ["\n\n"])
    assert (stream.text, stream.reason) == ("one", "stop")
    assert shown == ["o", "n", "e", "", "", "", "", ""]


def test_what_only_began_like_a_stop_string_is_shown_late():
    stream, shown = said("a##b", ["###"])
    assert (stream.text, shown) == ("a##b", ["a", "", "", "##b"])


def test_the_first_of_several_stop_strings_counts():
    assert said("abcd", ["d", "cd", "bc"])[0].text == "a"


def test_characters_are_shown_whole():
    stream, shown = said("é中")
    assert shown == ["", "é", "", "", "中"]
    assert stream.text == "é中"


def test_length_and_end_of_document():
    stream, _ = said("abcdef", max_new_tokens=3)
    assert (stream.text, stream.reason) == ("abc", "length")
    stream, _ = said("ab")
    stream.push(256)
    stream.push(ord("c"))
    assert (stream.text, stream.reason, stream.ids) == ("ab", "eos", [97, 98])


@pytest.mark.parametrize("stops", ["abc", [""], [3]])
def test_stop_strings_are_a_list(stops):
    with pytest.raises(UserError, match="list of strings"):
        check_stops(stops)
