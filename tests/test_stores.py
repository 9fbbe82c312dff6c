"""Where kept states lie without torch: memory, one file with checks; what goes wrong says so and leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from revolve_cases import chain, members

from revolve import Binomial, Cast, Disk, Memory, Multistage, Run, Schedule, StoreAll, StoreError, verify
from revolve.files import SlotFile
from revolve.places import Index, Space
from revolve.trees import pack, to_bytes, unpack
from revolve.zfp import Zfp

DTYPES = st.one_of(
    arrays.scalar_dtypes(),
    arrays.array_dtypes(max_size=3),
).filter(lambda dtype: not dtype.hasobject and dtype.itemsize > 0)
LEAVES = st.one_of(
    arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)),
    st.floats(width=64),
    st.complex_numbers(),
    st.integers(),
    st.text(),
    st.binary(),
    st.booleans(),
    st.none(),
    st.floats(width=32).map(np.float32),
)
TREES = st.recursive(
    LEAVES,
    lambda trees: st.one_of(
        st.lists(trees, max_size=3),
        st.lists(trees, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), trees, max_size=3),
    ),
    max_leaves=5,
)


def same(a: Any, b: Any) -> bool:
    """The same types, shapes and bits, and for arrays the same order of the axes in memory."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.tobytes() == b.tobytes()
    return a == b or repr(a) == repr(b)


@settings(deadline=None, max_examples=50)
@given(TREES)
def test_a_tree_comes_back_from_its_bytes_as_it_was(tree: Any) -> None:
    assert same(unpack(to_bytes(tree)), tree)


@given(st.permutations(range(3)))
def test_an_array_keeps_the_order_of_its_axes(order: list[int]) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(order)
    assert unpack(to_bytes(array)).strides == array.strides


@pytest.mark.parametrize(
    "tree", [object(), np.array([None]), {1.5: 2}, np.ma.ones(3), {1, 2}], ids=lambda x: type(x).__name__
)
def test_what_is_no_tree_is_refused_by_name(tree: Any) -> None:
    with pytest.raises(TypeError, match="cannot be kept in a file; give "):
        to_bytes(tree)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60))
def test_parts_of_a_file_never_overlap_and_none_is_lost(wishes: list[tuple[bool, int]]) -> None:
    space, taken, most = Space(), [], 0
    for take, size in wishes:
        if take:
            if size > space.free:
                space.extend(size - space.free)
            taken.append(space.take(size))
            assert sum(length for _, length in taken[-1]) == size
        elif taken:
            space.give(taken.pop(size % len(taken)))
        spots = [spot for parts in taken for place, length in parts for spot in range(place, place + length)]
        assert len(spots) == len(set(spots)) and all(spot < space.end for spot in spots)
        most = max(most, len(spots))
        assert space.free == space.end - len(spots)
    assert space.end == most
    other = Space()
    for parts in taken:
        other.reserve(parts)
    assert sum(length for parts in taken for _, length in parts) == other.end - other.free
    for parts in taken:
        space.give(parts)
    assert space.take(space.end) == (((0, space.end),) if space.end else ())  # whole again


def run_with(schedule: Schedule, stores: dict[int, Any], steps: int = 20) -> tuple[bytes, ...]:
    stepper, state, cotangent = chain(steps)
    run = Run(schedule, stepper, stores)
    end = run.forward(state, steps)
    return end.tobytes(), run.backward(cotangent).tobytes(), stepper.gradient.tobytes()


@pytest.mark.parametrize("schedule", members(), ids=str)
def test_the_gradient_does_not_depend_on_the_store(schedule: Schedule, tmp_path: Path) -> None:
    wanted = run_with(StoreAll(), {})
    stores: dict[int, Any] = {tier: Disk(tmp_path) for tier in range(3)}
    assert run_with(schedule, stores) == wanted
    assert run_with(schedule, stores | {0: Memory()}) == wanted  # and the stores can be used again
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_as_large_as_the_slots_that_are_planned(tmp_path: Path) -> None:
    schedule = Multistage(2, 5)
    disk = Disk[np.ndarray](tmp_path, slots=5)
    run_with(schedule, {0: Memory(), 1: disk}, 40)
    assert verify(schedule, 40).tiers[1].peak_slots == 5
    assert disk.peak_bytes == 5 * to_bytes(np.zeros(3)).nbytes
    growing = Disk[np.ndarray](tmp_path)
    run_with(schedule, {0: Memory(), 1: growing}, 40)
    assert growing.peak_bytes == disk.peak_bytes


class Noting(Memory[np.ndarray]):
    """A store that notes what it was told, and when."""

    def __init__(self, events: list[tuple[str, int]]) -> None:
        super().__init__()
        self.events = events

    def prefetch(self, step: int) -> None:
        assert step in self._states
        self.events.append(("prefetch", step))

    def load(self, step: int) -> np.ndarray:
        self.events.append(("load", step))
        return super().load(step)


@pytest.mark.parametrize("schedule", members(), ids=str)
def test_the_next_load_is_announced_right_after_the_one_before(schedule: Schedule) -> None:
    events: list[tuple[str, int]] = []
    run_with(schedule, {tier: Noting(events) for tier in range(3)})
    assert events[::2] == [("prefetch", step) for _, step in events[1::2]]
    assert all(what == "load" for what, _ in events[1::2])


def test_what_is_loaded_is_on_its_way_while_steps_are_reversed() -> None:
    events: list[tuple[str, int]] = []
    stepper, state, cotangent = chain(30)
    reverse = stepper.reverse
    stepper.reverse = lambda tape, c: (events.append(("reverse", tape[0][0])), reverse(tape, c))[1]  # type: ignore[method-assign]
    run = Run(Binomial(4), stepper, {0: Noting(events)})
    run.forward(state, 30)
    run.backward(cotangent)
    begun = [i for i, (what, _) in enumerate(events) if what == "prefetch"]
    used = [i for i, (what, _) in enumerate(events) if what == "load"]
    assert all(events[i:j].count(("prefetch", events[i][1])) == 1 for i, j in zip(begun, used, strict=True))
    between = [any(what == "reverse" for what, _ in events[i:j]) for i, j in zip(begun, used, strict=True)]
    assert sum(between) == len(between)  # every load but those right after a load passes a reversal


# -- faults


def kept_on(disk: Disk[Any], steps: int = 12) -> tuple[Run[Any, Any, Any], np.ndarray]:
    """A run in the middle: its states lie in the file."""
    stepper, state, cotangent = chain(steps)
    run = Run(Binomial(3), stepper, {0: disk})
    run.forward(state, steps)
    disk.settle()
    assert disk.path is not None and disk.path.exists()
    return run, cotangent


@pytest.mark.parametrize("place", [0, 70, 200, -1])
def test_a_file_that_was_altered_is_refused(place: int, tmp_path: Path) -> None:
    disk = Disk[np.ndarray](tmp_path)
    run, cotangent = kept_on(disk)
    assert disk.path is not None
    with disk.path.open("r+b") as file:
        file.seek(place, 2 if place < 0 else 0)
        old = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old[0] ^ 1]))
    with pytest.raises(StoreError, match=r"was altered: the state of step \d+ is not what was written"):
        run.backward(cotangent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", [0, 100, 300])
def test_a_file_that_was_cut_off_is_refused(rest: int, tmp_path: Path) -> None:
    disk = Disk[np.ndarray](tmp_path)
    run, cotangent = kept_on(disk)
    assert disk.path is not None
    os.truncate(disk.path, rest)
    with pytest.raises(StoreError, match="was cut off: the state of step"):
        run.backward(cotangent)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_removed_or_moved_still_serves(tmp_path: Path) -> None:
    disk = Disk[np.ndarray](tmp_path)
    run, cotangent = kept_on(disk)
    assert disk.path is not None
    disk.path.unlink()
    reference, state, _ = chain(12)
    wanted = Run(StoreAll(), reference)
    wanted.forward(state, 12)
    assert np.array_equal(run.backward(cotangent), wanted.backward(cotangent))


def test_a_state_that_does_not_fit_is_refused_at_the_start(tmp_path: Path) -> None:
    disk = Disk[np.ndarray](tmp_path, slots=10**12)
    disk.save(0, np.zeros(10**6))
    with pytest.raises(StoreError, match=r"no room for 8\d* bytes more in .* are free .*give another folder, or fewer"):
        disk.settle()
    disk.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(fd: int, data: Any, place: int) -> int:
        written.append(place)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(fd, data, place)

    put = os.pwrite
    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(StoreError, match=r"no room for \d+ bytes more in .*No space left on device"):
        run_with(Binomial(4), {0: Disk(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_for_the_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    slots, data = SlotFile(tmp_path, name="states", key=b"a run"), np.arange(9, dtype=np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "add", full)
        slots.write(3, lambda: [data])
        with pytest.raises(StoreError, match="No space left on device"):
            slots.settle()
    slots.close()
    again = SlotFile(tmp_path, name="states", key=b"a run")
    assert again.numbers == set()
    again.close(remove=True)


def test_a_limit_of_the_system_is_named(tmp_path: Path) -> None:
    code = f"""
import resource, signal, numpy as np, revolve
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
disk = revolve.Disk({str(tmp_path)!r})
for step in range(3):
    disk.save(step, np.zeros(5000))
disk.settle()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "revolve.files.StoreError: no room for" in done.stderr and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder .*missing to keep states in; make it, or give another"):
        Disk(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="there is no folder"):
        Disk(tmp_path / "file")


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    folder = tmp_path if os.geteuid() else Path("/proc")  # even root may write no files there
    with pytest.raises(StoreError, match="cannot be made and locked"):
        Disk(folder).save(0, np.zeros(3))


class Broken(Exception):
    pass


@pytest.mark.parametrize("call", range(3, 60, 7))
def test_nothing_is_left_after_an_exception(call: int, tmp_path: Path) -> None:
    stepper, state, cotangent = chain(20)
    calls = []

    def broken(method: Any) -> Any:
        def step(*arguments: Any) -> Any:
            calls.append(method)
            if len(calls) == call:
                raise Broken
            return method(*arguments)

        return step

    stepper.record, stepper.reverse = broken(stepper.record), broken(stepper.reverse)  # type: ignore[method-assign]
    stepper.advance = broken(stepper.advance)  # type: ignore[method-assign]
    run = Run(Multistage(1, 3), stepper, {0: Disk(tmp_path), 1: Disk(tmp_path)})
    with pytest.raises(Broken):
        run.forward(state, 20)
        assert list(tmp_path.iterdir())
        run.backward(cotangent)
    assert list(tmp_path.iterdir()) == []


def test_a_reverse_sweep_from_a_given_state_can_be_tried_again_after_an_exception(tmp_path: Path) -> None:
    stepper, state, cotangent = chain(20)
    run = Run(Binomial(3), stepper, {0: Disk(tmp_path)}, given=True)
    run.forward(state, 20)
    wanted = run.backward(cotangent)
    reverse = stepper.reverse
    stepper.reverse = lambda *_: [][0]  # type: ignore[method-assign]
    with pytest.raises(IndexError):
        run.backward(cotangent)
    assert list(tmp_path.iterdir()) == []
    stepper.reverse = reverse  # type: ignore[method-assign]
    assert np.array_equal(run.backward(cotangent), wanted)


def test_a_store_that_nobody_holds_any_more_leaves_nothing(tmp_path: Path) -> None:
    disk = Disk[np.ndarray](tmp_path)
    disk.save(0, np.zeros(3))
    with Disk[np.ndarray](tmp_path) as other:
        other.save(0, np.zeros(3))
        assert len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1
    del disk
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_file_goes_when_the_process_ends_and_after_a_kill_when_the_next_begins(tmp_path: Path) -> None:
    code = f"""
import os, sys, numpy as np, revolve
disk = revolve.Disk({str(tmp_path)!r})
disk.save(0, np.zeros(1000))
disk.settle()
assert os.listdir({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []
    killed = subprocess.run([sys.executable, "-c", f"{code}os.kill(os.getpid(), 9)"], check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    with Disk[np.ndarray](tmp_path) as disk:
        disk.save(0, np.zeros(3))
        disk.settle()
        assert list(tmp_path.iterdir()) == [disk.path] != [left]
        with Disk[np.ndarray](tmp_path) as other:  # the one in use stays
            other.save(0, np.zeros(3))
            assert len(list(tmp_path.iterdir())) == 2


def test_a_lower_precision_halves_the_file_and_shows_in_the_gradient(tmp_path: Path) -> None:
    sizes, errors = {}, {}
    for codec in (None, Cast("float32"), Cast("float16")):
        disk = Disk[np.ndarray](tmp_path, codec=codec)
        stepper, state, cotangent = chain(20, size=100)
        reference = Run(StoreAll(), chain(20, size=100)[0])
        reference.forward(state, 20)
        wanted = reference.backward(cotangent)
        run = Run(Binomial(3), stepper, {0: disk})
        run.forward(state, 20)
        found = run.backward(cotangent)
        sizes[codec], errors[codec] = disk.peak_bytes, np.abs(found - wanted).max() / np.abs(wanted).max()
    none, single, half = sizes
    assert errors[none] == 0 < errors[single] < 1e-5 < errors[half] < 1e-1
    for codec, width in ((none, 8), (single, 4), (half, 2)):
        assert 0 <= sizes[codec] - 3 * 100 * width <= 3 * 128  # what is written beside the numbers


def test_a_number_too_large_for_a_lower_precision_is_refused(tmp_path: Path) -> None:
    disk = Disk[Any](tmp_path, codec=Cast("float16"))
    with pytest.raises(OverflowError, match=r"a state holds 1e\+06, too large for float16; keep it in a higher"):
        disk.save(0, np.array([1e6]))
    mixed = {"a": np.array([1j, np.inf]), "b": np.arange(3), "c": np.float16(1) + np.zeros(2, np.float16)}
    disk.save(0, mixed)
    back = disk.load(0)
    assert all(back[key].dtype == mixed[key].dtype and np.array_equal(back[key], mixed[key]) for key in mixed)
    with pytest.raises(ValueError, match="precision='float8' is unknown; known are 'float32', 'bfloat16', 'float16'"):
        Cast("float8")
    with pytest.raises(ValueError, match="numpy has no bfloat16"):
        Cast("bfloat16").encode(np.zeros(3))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (40,), (8, 9), (4, 5, 6), (3, 4, 5, 6), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16", "f2", "i8", ">f8"])
def test_zfp_loses_nothing_or_as_much_as_it_may(shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    field = np.sin(np.arange(np.prod(shape, dtype=int)) / 7).reshape(shape)
    array = (field * (1 + 1j if dtype[0] == "c" else 1)).astype(dtype)
    assert same(unpack(to_bytes_by(Zfp(), array), Zfp()), array)
    for codec in (Zfp(tolerance=1e-3), Zfp(rate=16), Zfp(precision=20)):
        back = unpack(to_bytes_by(codec, array), codec)
        assert back.dtype == array.dtype and back.shape == array.shape
        assert array.size == 0 or np.abs(back - array).max() < 2e-2
        if codec.tolerance is not None:
            assert array.size == 0 or np.abs(back - array).max() <= 2**0.5 * codec.tolerance


def to_bytes_by(codec: Any, tree: Any) -> np.ndarray:
    packed = pack(tree, codec)
    data = np.empty(packed.size, np.uint8)
    packed.write(data)
    return data


def test_zfp_leaves_what_is_not_finite_as_it_is() -> None:
    for array in (np.array([1.0, np.nan, np.inf]), np.array([np.nan])):
        assert same(unpack(to_bytes_by(Zfp(rate=4), array), Zfp(rate=4)), array)
    smooth = np.sin(np.linspace(0, 6, 32 * 32)).reshape(32, 32)
    assert to_bytes_by(Zfp(tolerance=1e-4), smooth).nbytes < smooth.nbytes / 3
    with pytest.raises(ValueError, match=r"tolerance=0\.1, rate=8: give one of them, or none"):
        Zfp(tolerance=0.1, rate=8)
    with pytest.raises(ValueError, match="rate=-1 keeps nothing; give a positive number"):
        Zfp(rate=-1)


@pytest.fixture
def slots(tmp_path: Path) -> Iterator[SlotFile]:
    file = SlotFile(tmp_path, slots=2)
    yield file
    file.close()


def test_records_of_any_size_come_and_go(slots: SlotFile) -> None:
    random, held = np.random.default_rng(0), {}
    for number in range(60):
        if len(held) == 5:
            gone = int(random.choice(list(held)))
            slots.free(gone)
            del held[gone]
        held[number] = random.integers(0, 256, int(random.integers(0, 3000)), np.uint8)
        slots.write(number, lambda data=held[number]: [data[:7], data[7:]])
        asked = int(random.choice(list(held)))
        (back,) = slots.read(asked, lambda size: [np.empty(size, np.uint8)]).result()
        assert np.array_equal(back, held[asked])
    slots.settle()
    assert slots.path is not None and slots.path.stat().st_size == slots.peak
    with pytest.raises(KeyError):
        slots.read(10**6, lambda size: [])


def test_records_in_parts_are_found_by_the_next_process(tmp_path: Path) -> None:
    random, key = np.random.default_rng(0), b"a run"
    first = SlotFile(tmp_path, name="states", key=key)
    held = {}
    for number in range(40):
        if len(held) == 4:
            first.free(min(held))
            del held[min(held)]
        held[number] = random.integers(0, 256, int(random.integers(1, 3000)), np.uint8)
        first.write(number, lambda data=held[number]: [data])
    first.close()
    second = SlotFile(tmp_path, name="states", key=key)
    assert second.numbers == set(held)
    for number, data in held.items():
        assert np.array_equal(second.read(number, lambda size: [np.empty(size, np.uint8)]).result()[0], data)
    for number in held:
        second.free(number)
    second.write(99, lambda: [np.arange(7, dtype=np.uint8)])
    second.close()
    assert SlotFile(tmp_path, name="states", key=b"another run").numbers == set()
    third = SlotFile(tmp_path, name="states", key=key)
    assert third.numbers == {99}
    third.close(remove=True)
    assert list(tmp_path.iterdir()) == []
