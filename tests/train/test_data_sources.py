"""Files to records: layouts, places, and everything that is refused."""

import json
import sys

import pytest

from qjax.errors import FormatError, MissingExtraError, SpecError
from qjax.train import data_sources
from qjax.train.data_sources import find_sources, read_records

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
LAYOUTS = {
    "text": {"text": "a", "id": 1},
    "prompt": {"prompt": "a", "completion": "b", "text": "c"},
    "messages": {"messages": TALK},
    "instruction": {"instruction": "a", "input": "", "output": "b"},
}


def read(path, field="text", kind="auto"):
    return [r for s in find_sources(str(path), kind) for r in read_records(s, field)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_layouts(tmp_path, layout, ending):
    """Each is found from the fields, in both kinds of file, with its line."""
    path = tmp_path / f"a.{ending}"
    records = [LAYOUTS[layout]] * 2
    if ending == "jsonl":
        lines = [json.dumps(record) for record in records]
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines).encode())
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    found = read(path)
    assert [r.layout for r in found] == [layout] * 2
    assert found[1].place == (str(path), 3 if ending == "jsonl" else 2)
    kept = {k: v for k, v in records[0].items() if k in found[0].fields}
    assert found[0].fields == kept and len(kept) >= 1


def test_parquet_structs_lose_keys_of_others(tmp_path):
    """Arrow gives every message the keys of all; templates ask which are defined."""
    import pyarrow
    import pyarrow.parquet

    talk = [TALK[0], {"role": "assistant", "content": "Yo", "name": "x"}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), path)
    assert read(path)[0].fields == {"messages": talk}


def test_a_field_asked_for_wins(tmp_path):
    """A name other than "text" is the text, whatever stands beside it."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK, "body": "x"}))
    assert [r.layout for r in read(path, "body")] == ["text"]


def test_text_files(tmp_path):
    """A file is one document, without a byte-order mark."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nb".encode())
    (record,) = read(path)
    assert record.layout == "document" and record.fields == {"text": "é\r\nb"}
    assert str(record.place) == str(path)


def test_paths_and_patterns(tmp_path):
    """Several paths keep their order, a pattern's files are sorted."""
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.jsonl").mkdir()
    paths = (str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl"))
    sources = find_sources(paths)
    assert [s.path[len(str(tmp_path)) + 1 :] for s in sources] == [
        "c.txt",
        "a.jsonl",
        "b.jsonl",
    ]
    assert [s.kind for s in sources] == ["text", "jsonl", "jsonl"]
    assert len({s.sha256 for s in sources}) == 1
    assert {s.kind for s in find_sources(paths, "text")} == {"text"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.jsonl", "names no file"),
        ("*.jsonl", "names no file"),
        ("", "is a folder; name files, as in '.*jsonl'"),
        ("a.csv", r"cannot tell what the ending '\.csv' holds; set kind"),
    ],
)
def test_files_that_are_not_there(tmp_path, path, message):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(SpecError, match=message):
        find_sources(str(tmp_path / path))


def test_no_path():
    with pytest.raises(SpecError, match="no path given"):
        find_sources(())


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: holds no records"),
        ("a.jsonl", b" \n\n", r"a\.jsonl: holds no records"),
        ("a.jsonl", GOOD + b'{"text": "a"', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "a\x00"}', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 at byte 10"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}', r"a\.jsonl:2: .*surrogate"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: the file is one JSON array"),
        ("a.jsonl", GOOD + b"[1]\n", r"a\.jsonl:2: the root is a list"),
        ("a.jsonl", b"[" * 200, r"a\.jsonl:1: "),
        ("a.jsonl", GOOD + b'{"a":' * 9999, r"a\.jsonl:2: "),
        ("a.jsonl", b'{"body": "a"}', r"a\.jsonl:1: .*fields \['body'\]; expected"),
        ("a.jsonl", b"{}", r"a\.jsonl:1: the record has the fields \[\]"),
        (
            "a.jsonl",
            GOOD * 2 + b'{"prompt": "a", "completion": "b"}',
            r"a\.jsonl:3: the record has layout 'prompt', those before it 'text'",
        ),
        ("a.jsonl", GOOD + b"x" * 200, r"a\.jsonl:2: the line is longer than 100 b"),
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b" \n", r"a\.txt: the file is empty"),
        ("a.txt", b"ab\x00", r"a\.txt: holds a NUL character at character 2"),
        ("a.txt", b"a\xff", r"a\.txt: not UTF-8 at byte 1"),
        ("a.parquet", b"PAR1xxxx", r"a\.parquet: not valid parquet"),
        ("a.parquet", b"", r"a\.parquet: not valid parquet"),
    ],
)
def test_broken_files(tmp_path, monkeypatch, name, raw, message):
    """The message names file and line."""
    if b"x" * 200 in raw:
        monkeypatch.setattr(data_sources, "LINE_LIMIT", 100)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        read(tmp_path / name)


def test_parquet_without_the_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    with pytest.raises(FormatError, match=r"has the fields \['body'\]; expected"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "str")}), path)
    with pytest.raises(FormatError, match="holds no records"):
        read(path)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "qjax-llm\[train\]"'):
        read(tmp_path / "a.parquet")
