"""Segments: lines that are whole or known not to be, chains that hold or say where they do not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agentkit_tracking.runlog.segments import (
    START,
    Chain,
    Finding,
    Line,
    LogUnwritable,
    Segment,
    erase,
    frame,
    is_live,
    lines,
    scan,
)

EVENTS = [
    ({"type": "tool", "name": f"t{i}", "usd": i / 7}, {"inputs": {"text": f'é {i} \n,"private":x'}}) for i in range(6)
]


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    segment = Segment(tmp_path)
    segment.append(EVENTS)
    return segment


def content_of(count: int = 6) -> bytes:
    before, made = START, []
    for i, (event, private) in enumerate(EVENTS[:count]):
        line, before = frame({"id": f"{'0' * 20}-{i}", **event}, private, before, b"%032x" % i)
        made.append(line)
    return b"".join(made)


def wrong(content: bytes) -> list[tuple[int | None, str]]:
    """What a slow walk finds, which must be what the fast one finds."""
    chain, found = Chain(), []
    for item in lines(content):
        one = item if isinstance(item, Finding) else chain.add(item)
        if isinstance(item, Finding):
            chain.skip()
        if one is not None:
            found.append(one)
    quick = scan(content, 0, Chain(), check=True)[1]
    shown = [(f.n, f.fault) for f in found]
    assert [(f.n, f.fault) for f in quick] == [f for f in shown if f[1] != "private part changed"]
    return shown


# ---- writing


def test_every_event_is_a_line_of_json_with_its_id_and_time(segment: Segment) -> None:
    made = [json.loads(line) for line in segment.path.read_bytes().splitlines()]
    assert [m["event"]["id"] for m in made] == [f"{segment.id}-{i}" for i in range(7)]
    assert [m["event"]["type"] for m in made] == ["segment"] + ["tool"] * 6
    assert [(m["private"]) for m in made[1:]] == [private for _, private in EVENTS]
    assert made[0]["event"]["pid"] == os.getpid()


def test_events_of_one_call_are_written_by_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment, writes, write = Segment(tmp_path), [], os.write
    monkeypatch.setattr(os, "write", lambda fd, content: writes.append(len(content)) or write(fd, content))
    segment.append(EVENTS)
    segment.append(EVENTS[:1])
    assert len(writes) == 2


def test_a_segment_rolls_over_and_both_files_are_whole(tmp_path: Path) -> None:
    segment = Segment(tmp_path, roll_bytes=2_000)
    for _ in range(10):
        segment.append(EVENTS)
    segment.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        assert wrong(content) == []
        assert json.loads(content.splitlines()[-1])["event"]["name"] == "closed"


@pytest.mark.parametrize("fails", ["write", "short", "truncate"])
def test_a_write_that_fails_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    segment = Segment(tmp_path)
    segment.append(EVENTS[:2])
    write = os.write

    def failing(fd: int, content: bytes) -> int:
        if fails == "write":
            raise OSError(28, "No space left on device")
        return write(fd, content[:50])

    def refused(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        if fails == "truncate":
            patch.setattr(os, "ftruncate", refused)
        with pytest.raises(LogUnwritable, match="No space left on device; free space"):
            segment.append(EVENTS[2:4])
    segment.append(EVENTS[4:])
    names = []
    for file in sorted(tmp_path.iterdir()):
        assert wrong(file.read_bytes()) == []
        names += [json.loads(i.event).get("name") for i in lines(file.read_bytes()) if isinstance(i, Line)]
    assert [n for n in names if n and n.startswith("t")] == ["t0", "t1", "t4", "t5"]
    assert len(list(tmp_path.iterdir())) == (2 if fails == "truncate" else 1)  # a torn file is not gone on with


def test_an_interrupt_while_writing_costs_no_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = Segment(tmp_path)
    write = os.write

    def interrupted(fd: int, content: bytes) -> int:
        write(fd, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            segment.append(EVENTS[:1])
    segment.append(EVENTS[1:2])
    assert all(wrong(file.read_bytes()) == [] for file in tmp_path.iterdir())
    found = [
        json.loads(i.event)["id"] for f in tmp_path.iterdir() for i in lines(f.read_bytes()) if isinstance(i, Line)
    ]
    assert len(found) == len(set(found)) == 4  # two began, two events


def test_a_disk_that_does_not_take_it_is_said(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", refused)
        with pytest.raises(LogUnwritable, match="Input/output error"):
            segment.sync()
    first = segment.path
    segment.append(EVENTS[:1])
    assert segment.path != first


def test_whether_a_writer_lives_can_be_told(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from agentkit_tracking.runlog.segments import Segment\n"
        "s = Segment(Path(sys.argv[1])); print(s.path, flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    path = Path(writer.stdout.readline().strip())
    assert is_live(path)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not is_live(path)
    assert not is_live(tmp_path / "none.jsonl")


# ---- the chain


def swap(made: list[bytes]) -> list[bytes]:
    return [*made[:2], made[3], made[2], *made[4:]]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m: m, []),
        (lambda m: m[:3] + m[4:], [(4, "out of order")]),
        (lambda m: m[:3] + m[2:], [(2, "out of order")]),
        (lambda m: m[1:], [(1, "out of order")]),
        (swap, [(3, "out of order"), (2, "out of order"), (4, "out of order")]),
    ],
    ids=["nothing", "missing", "twice", "first", "swapped"],
)
def test_missing_doubled_and_moved_events_are_found(
    change: Callable[[list[bytes]], list[bytes]], found: list[tuple[int, str]]
) -> None:
    made = content_of().splitlines(keepends=True)
    assert wrong(b"".join(change(made))) == found


def test_an_event_that_was_changed_with_its_checksum_is_found() -> None:
    made = content_of().splitlines(keepends=True)
    line = next(iter(lines(made[2])))
    assert isinstance(line, Line)
    event = json.loads(line.event)
    sealed = event.pop("private_sha256")
    event["usd"] = 0
    forged, _ = frame(event, json.loads(line.private), START, line.salt)  # its own hash is made anew
    assert sealed.encode() in forged
    kept = forged.replace(forged[42:106], line.digest)
    _resealed = Line(0, 0, 2, line.digest, line.salt, forged[158 : forged.index(b',"private":')], line.private)
    chain = Chain()
    [chain.add(i) for i in lines(b"".join(made[:2])) if isinstance(i, Line)]
    assert chain.add(_resealed).fault == "changed"  # type: ignore[union-attr]
    assert wrong(b"".join([*made[:2], kept, *made[3:]]))[0][0] in (None, 2)
    assert (3, "changed") in wrong(b"".join([*made[:2], forged, *made[3:]])) or (2, "changed") in wrong(
        b"".join([*made[:2], forged, *made[3:]])
    )


def test_a_private_part_that_was_changed_is_found_and_one_taken_out_leaves_the_chain(tmp_path: Path) -> None:
    segment = Segment(tmp_path)
    segment.append(EVENTS)
    found = [i for i in lines(segment.path.read_bytes()) if isinstance(i, Line)]
    erase(segment.path, found[3].offset, found[3].size)
    segment.append(EVENTS[:1])  # its writer goes on
    again = [i for i in lines(segment.path.read_bytes()) if isinstance(i, Line)]
    assert [line.is_erased for line in again] == [i == 3 for i in range(8)]
    assert wrong(segment.path.read_bytes()) == []
    assert b"2 \\n" not in segment.path.read_bytes()
    erase(segment.path, found[3].offset, found[3].size)  # a second time changes nothing
    assert [i for i in lines(segment.path.read_bytes()) if isinstance(i, Line)] == again
    # Another text in its place is not a gap:
    event = {k: v for k, v in json.loads(found[4].event).items() if k != "private_sha256"}
    forged, _ = frame(event, {"inputs": "other"}, START, found[4].salt)
    other = forged[forged.index(b',"private":') + 11 : -2]
    chain = Chain(3, found[3].digest)
    assert chain.add(Line(0, 0, 4, found[4].digest, found[4].salt, found[4].event, other)).fault == (  # type: ignore[union-attr]
        "private part changed"
    )


# ---- fuzz


@settings(max_examples=400, deadline=None)
@given(cut=st.integers(0, len(content_of())))
def test_a_cut_file_loses_only_what_is_behind_the_cut(cut: int) -> None:
    content = content_of()[:cut]
    found = list(lines(content))
    assert all(isinstance(item, Line) for item in found)
    assert len(found) == content.count(b"\n")
    assert wrong(content) == []


FLIPS = st.lists(st.tuples(st.integers(0, len(content_of()) - 1), st.integers(1, 255)), min_size=1, max_size=4)


@settings(max_examples=1_000 if not os.environ.get("AGENTKIT_SOAK") else 200_000, deadline=None)
@given(flips=FLIPS)
@example(flips=[(372, 41)])  # a tab where the length is padded with blanks
def test_flipped_bytes_are_found_and_cost_only_their_own_lines(flips: list[tuple[int, int]]) -> None:
    content = bytearray(content_of())
    for place, by in flips:
        content[place] ^= by
    if bytes(content) == content_of():
        return
    made = content_of().splitlines(keepends=True)
    hit = set()
    for place, _ in flips:
        start = 0
        for number, line in enumerate(made):
            if start <= place < start + len(line):
                hit |= {number, number + 1} if place == start + len(line) - 1 else {number}
            start += len(line)
    good = {item.n for item in lines(bytes(content)) if isinstance(item, Line)}
    assert good >= {n for n in range(6) if n not in hit}  # the others can be read
    assert wrong(bytes(content)) or not content.endswith(b"\n")  # and it is seen


@settings(max_examples=500, deadline=None)
@given(noise=st.binary(max_size=400), at=st.integers(0, 6))
def test_any_bytes_between_lines_are_passed_over(noise: bytes, at: int) -> None:
    made = content_of().splitlines(keepends=True)
    content = b"".join(made[:at]) + noise + b"\n" + b"".join(made[at:])
    good = [item.n for item in lines(content) if isinstance(item, Line)]
    assert good == list(range(6))
    if noise.count(b"\n") < len(noise):
        assert any(fault == "damaged" for _, fault in wrong(content))
