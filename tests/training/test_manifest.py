import os

import pytest

from aquila_jax.training.manifest import (
    MANIFEST_FILE,
    Damaged,
    make_durable,
    read_facts,
    verify,
    write_manifest,
)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "data").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "deep" / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("words")
    write_manifest(tmp_path, {"step": 3}, make_durable(tmp_path))
    return tmp_path


def test_what_was_written_is_found_again(directory):
    assert verify(directory) == read_facts(directory) == {"step": 3}


def test_a_file_too_many_is_damage(directory):
    (directory / "deep" / "new").write_text("")
    with pytest.raises(Damaged, match="deep/new is not of the checkpoint"):
        verify(directory)


def test_a_link_in_place_of_a_file_is_damage(directory, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "text"
    (directory / "text").rename(elsewhere)
    (directory / "text").symlink_to(elsewhere)
    with pytest.raises(Damaged, match="text is damaged"):
        verify(directory)


def test_files_that_change_places_are_damage(directory):
    os.rename(directory / "text", directory / "aside")
    os.rename(directory / "deep" / "empty", directory / "text")
    os.rename(directory / "aside", directory / "deep" / "empty")
    with pytest.raises(Damaged, match=r"is damaged \(and 1 more\)"):
        verify(directory)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"manifest": "0"}', b"\xff"])
def test_a_manifest_that_is_none_is_damage(directory, content):
    (directory / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
        verify(directory)


def test_any_changed_byte_of_the_manifest_is_damage(directory):
    path = directory / MANIFEST_FILE
    whole = path.read_bytes()
    for index in range(0, len(whole), 7):
        if whole[index : index + 1].isspace():
            continue  # what JSON does not read says nothing
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        with pytest.raises(Damaged):
            verify(directory)


def test_a_manifest_that_names_files_elsewhere_opens_none(directory, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("secret")
    for path in directory.rglob("*"):
        if path.is_file():
            path.unlink()
    (directory / "text").write_text("secret")
    write_manifest(directory, {}, make_durable(directory))
    text = (directory / MANIFEST_FILE).read_text()
    (directory / MANIFEST_FILE).write_text(text.replace('"text"', f'"{secret}"'))
    with pytest.raises(Damaged):
        verify(directory)
