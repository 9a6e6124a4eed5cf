import gzip
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from rlhf_jax.data.readers import ReadError, parse_line, read_records
from rlhf_jax.data.records import Prompt, RecordError


def write(path, lines):
  data = b"\n".join(
      line if isinstance(line, bytes) else json.dumps(line).encode()
      for line in lines
  )
  path.write_bytes(data + b"\n")
  return path


def prompts(*names):
  return [{"prompt": name} for name in names]


def test_jsonl_gz_bom_blank_lines_and_crlf_are_read(tmp_path):
  plain = tmp_path / "a.jsonl"
  plain.write_bytes(
      b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "\xe2\x98\x83"}'
  )
  zipped = tmp_path / "b.jsonl.gz"
  zipped.write_bytes(gzip.compress(b'{"prompt": "c"}\n'))
  assert read_records(plain, "prompt") == [Prompt("a"), Prompt("\u2603")]
  assert read_records(zipped, "prompt") == [Prompt("c")]
  everything = read_records(tmp_path / "*.jsonl*", "prompt")
  assert [r.prompt for r in everything] == ["a", "\u2603", "c"]


def test_a_file_whose_name_is_a_glob_is_that_file(tmp_path):
  write(tmp_path / "a[1].jsonl", prompts("x"))
  assert read_records(tmp_path / "a[1].jsonl", "prompt") == [Prompt("x")]


@pytest.mark.parametrize("line, message", [
    ({"prompt": 4}, r":2: field 'prompt': must be a string, not an integer"),
    ({"text": "a"}, r":2: field 'prompt': missing"),
    (b"{", r":2: not JSON: .* column"),
    (b"[1]", r":2: a record is a JSON object, not a list"),
    (b'{"prompt": "\xff"}', r":2: not UTF-8 at byte 12 of the line"),
    (b'{"prompt": "a", "prompt": "b"}', r":2: field 'prompt': given twice"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", r":2: not usable JSON"),
    (b"[" * 100_000, r":2: not usable JSON"),
    (b'{"prompt": "\\ud800"}', r":2: field 'prompt': lone surrogate"),
])
def test_bad_line_names_file_line_field_and_reason(tmp_path, line, message):
  path = write(tmp_path / "x.jsonl", [{"prompt": "ok"}, line])
  with pytest.raises(ReadError, match="x.jsonl" + message):
    read_records(path, "prompt")


@pytest.mark.parametrize("number, reason", [
    ("NaN", "must be a finite number"),
    ("-Infinity", "must be a finite number"),
    ("1e999", "must be a finite number"),
    ('"0.5"', "must be a number, not a string"),
    ("true", "must be a number, not a boolean"),
    ("null", "must be a number, not null"),
])
def test_bad_number_in_a_file_names_file_line_field_and_reason(
    tmp_path, number, reason
):
  # NaN and Infinity are no JSON, but Python's writers put them there.
  good = '{"prompt": "a", "completion": "b", "score": 1}'
  path = tmp_path / "x.jsonl"
  path.write_text(f"{good}\n{good.replace('1', number)}\n")
  with pytest.raises(ReadError, match=f"x.jsonl:2: field 'score': {reason}"):
    read_records(path, "rating")


def test_line_numbers_count_blank_lines(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('\n\n{"prompt": "a"}\n\n{"prompt": ""}\n')
  with pytest.raises(ReadError, match=":5: field 'prompt': is empty"):
    read_records(path, "prompt")


def test_skip_writes_every_skipped_record_and_its_reason(tmp_path, caplog):
  good = prompts(*map(str, range(40)))
  path = write(tmp_path / "x.jsonl", [*good, {"prompt": ""}, b"\xff{"])
  skipped = tmp_path / "deep" / "skipped.jsonl"
  found = read_records(path, "prompt", on_error="skip", skipped_path=skipped)
  assert len(found) == 40
  lines = [json.loads(line) for line in skipped.read_text().splitlines()]
  assert [(x["file"], x["line"], x["field"]) for x in lines] == [
      (str(path), 41, "prompt"), (str(path), 42, ""),
  ]
  assert lines[0]["text"] == '{"prompt": ""}'
  assert lines[1]["text"] == "\\xff{"
  assert "2 of 42 records skipped" in caplog.text


def test_more_than_the_allowed_fraction_is_an_error(tmp_path):
  path = write(tmp_path / "x.jsonl", [*prompts("a", "b"), {}])
  skipped = tmp_path / "s.jsonl"
  with pytest.raises(ReadError, match="1 of 3 records skipped.*more than 5"):
    read_records(path, "prompt", on_error="skip", skipped_path=skipped)
  assert len(skipped.read_text().splitlines()) == 1
  found = read_records(
      path, "prompt", on_error="skip", skipped_path=skipped, max_skipped=0.34
  )
  assert len(found) == 2


def test_exactly_the_allowed_fraction_is_no_error(tmp_path):
  path = write(tmp_path / "x.jsonl", [*prompts(*"abcdefghijklmnopqrs"), {}])
  found = read_records(
      path, "prompt", on_error="skip", skipped_path=tmp_path / "s.jsonl"
  )
  assert len(found) == 19


def test_skipped_file_is_empty_if_nothing_was_skipped(tmp_path):
  path = write(tmp_path / "x.jsonl", prompts("a"))
  skipped = write(tmp_path / "s.jsonl", [{"from": "an earlier run"}])
  read_records(path, "prompt", on_error="skip", skipped_path=skipped)
  assert skipped.read_text() == ""


def test_sources_that_cannot_be_read(tmp_path):
  write(tmp_path / "train.jsonl", prompts("a"))
  (tmp_path / "empty.jsonl").write_text("\n")
  (tmp_path / "plain.gz").write_text("{}")
  (tmp_path / "zero.gz").write_bytes(b"")
  for source, message in [
      ("trian.jsonl", "no such file. Did you mean .*train.jsonl"),
      ("no/where.jsonl", "The folder .*no does not exist"),
      ("*.json", "no file matches this glob"),
      ("", "is a folder; give a file or a glob"),
      ("empty.jsonl", "holds no records"),
      ("plain.gz", "holds no gzip data"),
      ("zero.gz", "zero.gz: is empty"),
  ]:
    with pytest.raises(ReadError, match=message):
      read_records(tmp_path / source, "prompt")


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_damaged_gzip_is_an_error_even_when_skipping(tmp_path, on_error):
  lines = [json.dumps({"prompt": f"{i} {i * 7919}"}) for i in range(2000)]
  whole = gzip.compress("\n".join(lines).encode())
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  for name, data, message in [
      ("cut.gz", whole[: len(whole) // 2], "ends early, after line"),
      ("bad.gz", bytes(flipped), "gzip"),
  ]:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ReadError, match=message):
      read_records(
          tmp_path / name, "prompt", on_error=on_error,
          skipped_path=tmp_path / "s.jsonl",
      )


def test_bad_arguments(tmp_path):
  path = write(tmp_path / "x.jsonl", prompts("a"))
  with pytest.raises(ValueError, match="on_error='ignore'"):
    read_records(path, "prompt", on_error="ignore")
  with pytest.raises(ValueError, match="needs skipped_path"):
    read_records(path, "prompt", on_error="skip")
  with pytest.raises(ReadError, match="a file has no splits"):
    read_records(path, "prompt", split="train")
  with pytest.raises(ValueError, match="kind='prompts'"):
    read_records(path, "prompts")


@settings(max_examples=200)
@given(line=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_parse_or_raise_a_record_error(line):
  try:
    parse_line(line)
  except RecordError as error:
    assert error.reason


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.binary(max_size=40)
        | st.just(b'{"prompt": "good"}')
        | st.text().map(lambda x: json.dumps({"prompt": x}).encode()),
        max_size=3,
    ),
    zipped=st.booleans(),
)
def test_any_file_is_read_or_refused(tmp_path, lines, zipped):
  data = b"\n".join(lines)
  path = tmp_path / "any.jsonl"
  path.write_bytes(gzip.compress(data) if zipped else data)
  try:
    found = read_records(path, "prompt")
  except ReadError as error:
    assert str(path) in str(error)
    return
  # Nothing was passed over.
  assert len(found) == sum(bool(x.strip()) for x in data.split(b"\n"))
