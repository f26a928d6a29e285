"""Text files: which are found, what their documents are, and what is refused with which line."""

import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdclimb import text
from kdclimb.config import ConfigError
from kdclimb.text import list_files, read_documents

MIXED = "שלום עולם, naïve 😀\nsecond line"  # right to left, beyond ASCII, beyond 16 bits


def documents(path, field="text", max_chars=100_000) -> list[str]:
    return list(read_documents(path, field, max_chars))


# ---- which files --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """root/texts with files of each kind, of another kind, and hidden ones."""
    for name in ("b.txt", "a.md", "sub/c.jsonl", "sub/d.parquet", "e.TXT.xz", "f.pdf", ".hidden.txt", ".git/g.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(files) -> list[str]:
    return [path.name for path in files]


def test_a_folder_gives_all_of_known_kinds_below_it_in_order(folder):
    found = list_files(["texts"], folder)
    assert names(found.paths) == ["a.md", "b.txt", "e.TXT.xz", "c.jsonl", "d.parquet"]
    assert names(found.ignored) == ["f.pdf"]


def test_files_and_globs_keep_the_configs_order(folder):
    assert names(list_files(["texts/sub/*", "texts/b.txt"], folder).paths) == ["c.jsonl", "d.parquet", "b.txt"]
    assert names(list_files(["texts/**/*.jsonl", str(folder / "texts/a.md")], folder).paths) == ["c.jsonl", "a.md"]


def test_a_linked_folder_is_read_once_even_in_a_circle(folder):
    (folder / "texts/sub/up").symlink_to(folder / "texts")
    (folder / "more").mkdir()
    (folder / "more/h.txt").write_text("h")
    (folder / "texts/more").symlink_to(folder / "more")
    assert sorted(names(list_files(["texts"], folder).paths)) == sorted(
        ["a.md", "b.txt", "e.TXT.xz", "c.jsonl", "d.parquet", "h.txt"]
    )


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["nope.txt"], r"data\.text\.files\[0\]: 'nope\.txt' is not allowed; allowed: a file, a folder, or a glob"),
        (["texts/a.md", "nope*"], r"data\.text\.files\[1\]: 'nope\*'"),
        (["texts/f.pdf"], r"\.parquet files, and f\.pdf is none"),
        (["texts/*"], r"and f\.pdf is none"),
        (["empty"], r"a folder with \.txt.* files below it; this one holds no file"),
        (["others"], r"this one holds only \.docx, \.pdf"),
        (["texts", "texts/b.txt"], r"data\.text\.files\[1\]: 'texts/b\.txt' .* each file once"),
    ],
)
def test_entries_that_give_no_text_are_refused_by_key(folder, entries, said):
    (folder / "empty").mkdir()
    for name in ("x.pdf", "y.docx"):
        (folder / "others").mkdir(exist_ok=True)
        (folder / "others" / name).write_text("x")
    with pytest.raises(ConfigError, match=said) as error:
        list_files(entries, folder)
    assert "\n" not in str(error.value)


# ---- documents ----------------------------------------------------------------------------------


def test_every_kind_gives_the_same_documents(tmp_path):
    wanted = ["one", MIXED, "three"]
    joined = "\n\f\n".join(wanted).encode()
    (tmp_path / "a.txt").write_bytes(joined)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(joined))
    lines = [json.dumps({"id": 1, "text": wanted[0]}), ""]
    lines += [json.dumps({"text": document}, ensure_ascii=False) for document in wanted[1:]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"n": [1, 2, 3], "text": wanted}), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.txt", "a.txt.xz", "a.jsonl", "a.parquet"):
        assert documents(tmp_path / name) == wanted, name
    (tmp_path / "a.md").write_bytes(joined)
    assert documents(tmp_path / "a.md") == ["\n\f\n".join(wanted)]


def test_the_field_is_the_configs(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}')
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert documents(tmp_path / name, field="body") == ["yes"]


def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nline\r\n\f\r\n  two \r\n\f\r\n \n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": " "}\r\n')
    assert documents(tmp_path / "a.txt") == ["one\nline", "two"]
    assert documents(tmp_path / "a.jsonl") == ["one"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_blocks_change_nothing(tmp_path, monkeypatch, block):
    """Characters, separators and line ends that lie across two blocks."""
    content = "\f\n\f\n" + MIXED + "\n\f\n\f\n" + "word " * 40 + "\r\n\f\r\n" + "x" * 130 + "\n\f"
    (tmp_path / "a.txt").write_bytes(content.encode())
    whole = documents(tmp_path / "a.txt", max_chars=100)
    monkeypatch.setattr(text, "BLOCK", block)
    assert documents(tmp_path / "a.txt", max_chars=100) == whole
    assert max(map(len, whole)) <= 100 and "".join("".join(whole).split()) == "".join(content.split())


def test_long_documents_are_split_where_it_hurts_least(tmp_path):
    (tmp_path / "a.md").write_text("a " * 30 + "\n\n" + "b " * 30 + "\n" + "c" * 150 + "\n\n" + "d e " * 30)
    found = documents(tmp_path / "a.md", max_chars=100)
    assert found[:2] == ["a " * 29 + "a", "b " * 29 + "b"]
    assert found[2:4] == ["c" * 99, "c" * 51]  # a line end lies before them
    assert "".join("".join(found).split()) == "".join((tmp_path / "a.md").read_text().split())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * 1000}))
    assert all(len(piece) <= 100 for piece in documents(tmp_path / "a.jsonl", max_chars=100))


def test_one_huge_line_is_read_at_bounded_memory(tmp_path):
    with (tmp_path / "a.txt").open("w") as file:
        for _ in range(64):
            file.write("word " * 200_000)
    tracemalloc.start()
    count = sum(len(piece) for piece in read_documents(tmp_path / "a.txt", "text", 100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == pytest.approx(64e6, rel=1e-4) and peak < 16e6


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe\x00", "a.txt: not UTF-8 text (byte 0xff at offset 0)"),
        ("a.txt", b"good\n" * 300_000 + b"\xc3(", "a.txt: not UTF-8 text (byte 0xc3 at offset 1500000)"),
        ("a.md", b"cut \xe2\x82", "a.md: not UTF-8 text (byte 0xe2 at offset 4)"),
        ("a.md", b"text\0more", "a.md: a zero byte at offset 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: not UTF-8 text (byte 0xff at offset 24)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}', "a.jsonl:3: no field 'text' (data.text.field); there is body"),
        ("a.jsonl", b"{}", "a.jsonl:1: no field 'text' (data.text.field); there is none"),
        ("a.jsonl", b'{"text": ', "a.jsonl:1: not JSON ("),
        ("a.jsonl", b'["text"]', "a.jsonl:1: a list, not an object with a field 'text'"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: field 'text' holds nothing, not text"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: field 'text' holds a int, not text"),
        ("a.jsonl", b'{"text": "ab\\ud800"}', "a.jsonl:1: field 'text' holds half of a surrogate pair at character 2"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not JSON ("),
        ("a.txt.xz", lzma.compress(b"hello " * 1000)[:-20], "a.txt.xz: not a whole .xz file"),
        ("a.txt.xz", b"hello", "a.txt.xz: not a whole .xz file"),
        ("a.parquet", b"hello", "a.parquet: not a whole .parquet file"),
    ],
)
def test_bad_files_are_refused_by_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        documents(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{said}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"body": ["a"], "id": [1]}, "no column 'text' (data.text.field); there are body, id"),
        ({"text": ["a", None]}, "row 1, column 'text' holds nothing, not text"),
        ({"text": [1, 2]}, "row 0, column 'text' holds a int, not text"),
    ],
)
def test_bad_parquet_columns_are_refused_by_place(tmp_path, table, said):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError) as error:
        documents(tmp_path / "a.parquet")
    assert str(error.value).startswith(f"{tmp_path}/a.parquet: {said}")


def test_a_line_longer_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 100}))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a line of more than 50 bytes"):
        documents(tmp_path / "a.jsonl")
