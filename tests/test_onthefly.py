"""Images that are neither resident nor cached are decoded again, and are the same to the bit."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from cnnjax import fit
from cnnjax.config import Config, DataConfig, DeviceConfig
from cnnjax.data.batches import Feeder, in_batches, load
from cnnjax.data.cache import Decoded
from cnnjax.data.decode import decode
from cnnjax.data.index import read_index
from cnnjax.data.onthefly import Films
from cnnjax.data.prepare import training_data
from cnnjax.errors import InputError
from cnnjax.machine import devices

KINDS = ("NORMAL", "PNEUMONIA")


@pytest.fixture
def copy(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "copy"))


def prepared(root: Path, folder: Path, cache_mib: int, **more: object) -> Decoded:
    config = DataConfig(root=str(root), size=16, cache=folder, cache_mib=cache_mib, **more)
    return training_data(config, 0, lambda _: None, devices.make_mesh(DeviceConfig())).decoded


@pytest.mark.parametrize("frame", ["whole", "lungs"])
def test_what_is_decoded_again_is_what_was_cached(copy: Path, tmp_path: Path, frame: str) -> None:
    broken = next((copy / "train" / "NORMAL").iterdir())
    broken.write_bytes(b"no image")
    cached = prepared(copy, tmp_path / "a", 100, frame=frame)
    again = prepared(copy, tmp_path / "b", 0, frame=frame)
    assert isinstance(cached.images, np.ndarray)
    assert isinstance(again.images, Films)
    assert not list((tmp_path / "b").rglob("images.npy"))
    np.testing.assert_array_equal(np.asarray(again.images), cached.images)
    for name in ("examples", "quarantine", "fingerprint"):
        assert getattr(again, name) == getattr(cached, name)
    for name in ("labels", "brightness", "thumbnails", "boxes", "found"):
        np.testing.assert_array_equal(getattr(again, name), getattr(cached, name))
    assert len(cached.quarantine) == 1
    for at in (3, -1, slice(90, 1, 1), slice(5, 20, 3), np.array([4, 4, 0]), np.array([], int)):
        np.testing.assert_array_equal(np.asarray(again.images[at]), cached.images[at])
    np.testing.assert_array_equal(again.images[2:][[0, 3]], cached.images[2:][[0, 3]])
    with pytest.raises(IndexError):
        again.images[len(cached.images)]


def test_workers_feed_the_batches_that_an_array_gives(copy: Path, tmp_path: Path) -> None:
    cached = prepared(copy, tmp_path / "a", 100, frame="lungs")
    again = prepared(copy, tmp_path / "b", 0, frame="lungs")
    mesh = devices.make_mesh(DeviceConfig())
    feeders = [
        Feeder(images, cached.labels, mesh, resident, workers=workers)
        for images, resident, workers in (
            (cached.images, 100, 0),
            (cached.images, -1, 0),
            (again.images, -1, 2),
        )
    ]
    assert [feeder.data is None for feeder in feeders] == [False, True, True]
    orders = [
        np.random.default_rng(k).permutation(len(cached.labels))[: 8 * steps].reshape(steps, 8)
        for k, steps in enumerate((7, 1, 5))
    ]
    orders += [in_batches(np.arange(20), 8)]
    fetch = jax.jit(load)
    try:
        for order in orders:
            ways = [list(feeder.feed(order)) for feeder in feeders]
            for resident, cache, workers in zip(*ways, strict=True):
                resident = fetch(feeders[0].data, resident)
                assert cache.images.sharding == workers.images.sharding
                for one in (cache, workers):
                    np.testing.assert_array_equal(one.images, resident.images)
                    np.testing.assert_array_equal(one.labels, resident.labels)
        for _ in feeders[2].feed(orders[0]):
            break  # a feed that is left early is no part of the next
        assert not multiprocessing.active_children()
    finally:
        feeders[2].close()


@pytest.mark.slow
def test_films_that_go_and_workers_that_die_are_told(copy: Path, tmp_path: Path) -> None:
    again = prepared(copy, tmp_path / "cache", 0)
    feeder = Feeder(again.images, again.labels, devices.make_mesh(DeviceConfig()), -1, workers=1)
    order = np.random.default_rng(0).permutation(len(again.labels))[:40].reshape(5, 8)
    whole = np.asarray(again.images)
    film = copy / again.examples[order[0, 0]].name
    try:
        film.rename(tmp_path / "away")
        with pytest.raises(InputError, match=rf"{film.name} can no longer be read \(No such file"):
            list(feeder.feed(order))
        (tmp_path / "away").rename(film)
        feed = feeder.feed(order)
        np.testing.assert_array_equal(next(feed).images, whole[order[0]])
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(InputError, match=r"a worker process .* has ended, perhaps because"):
            list(feed)
        assert not multiprocessing.active_children()
    finally:
        feeder.close()


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed(copy: Path, tmp_path: Path) -> None:
    """And they do not run its script, which does not guard its work."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys, time\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import numpy as np\n"
        "from test_onthefly import prepared\n"
        "from cnnjax.data.onthefly import Workers\n"
        "again = prepared(Path(sys.argv[2]), Path(sys.argv[3]), 0)\n"
        "batches = Workers(again.images, 1).batches(np.zeros((9, 2), int))\n"
        "next(batches)\n"
        "print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, script, Path(__file__).parent, copy, tmp_path / "cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        (pid,) = process.stdout.readline().split()  # one line: the script ran once
        os.kill(int(pid), 0)
        process.kill()
        assert process.stdout.read() == ""
    for _ in range(300):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_a_film_that_has_changed_is_no_other_film(copy: Path, tmp_path: Path) -> None:
    again = prepared(copy, tmp_path / "cache", 0)
    a, b = (copy / e.name for e in again.examples[3:5])
    shutil.copy(b, a)
    with pytest.raises(InputError, match=rf"{a.name} has changed since the data set was first"):
        again.images[np.array([2, 3])]
    np.testing.assert_array_equal(again.images[4], decode(b.read_bytes(), 16))
    # A new start reads the data set as it is.
    assert prepared(copy, tmp_path / "cache", 0).fingerprint != again.fingerprint


def test_zips_are_decoded_again_in_any_process(copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "films.zip", "w") as archive:
        for path in sorted(copy.rglob("*.jpeg")):
            archive.write(path, path.relative_to(copy))
    tree = prepared(copy, tmp_path / "cache", 0)
    zipped = prepared(tmp_path / "films.zip", tmp_path / "cache", 0)
    assert zipped.fingerprint == tree.fingerprint
    other = pickle.loads(pickle.dumps(zipped.images))
    np.testing.assert_array_equal(other[[5, 9]], tree.images[[5, 9]])
    assert len(pickle.dumps(zipped.images)) < 2000


@pytest.fixture
def shards(copy: Path, tmp_path: Path) -> Path:
    """The tree with an ArrayRecord file in each class folder; one of its records is no image."""
    for folder in sorted(copy.glob("*/*")):
        shard = tmp_path / "shards" / folder.relative_to(copy) / "part-0.array_record"
        shard.parent.mkdir(parents=True)
        writer = ArrayRecordWriter(str(shard), "group_size:1")
        for path in sorted(folder.iterdir()):
            writer.write(path.read_bytes())
        if folder.name == "NORMAL":
            writer.write(b"no image")
        writer.close()
    return tmp_path / "shards"


def test_array_records_are_images_of_their_class_folder(
    copy: Path, tmp_path: Path, shards: Path
) -> None:
    files = prepared(copy, tmp_path / "cache", 100)
    records = prepared(shards, tmp_path / "cache", 0)
    np.testing.assert_array_equal(np.asarray(records.images), files.images)
    np.testing.assert_array_equal(records.labels, files.labels)
    assert records.examples[1].name == "train/NORMAL/part-0.array_record/0000001"
    broken = [(f"{s}/NORMAL/part-0.array_record/{n:07}") for s, n in (("train", 48), ("val", 4))]
    assert [name for name, _ in records.quarantine] == broken
    other = pickle.loads(pickle.dumps(records.images))
    np.testing.assert_array_equal(other[[5, 9]], files.images[[5, 9]])


def test_tables_name_records_with_their_patients(shards: Path, tmp_path: Path) -> None:
    rows = [f"{kind}/part-0.array_record/{k},{kind},p{k}" for k in (0, 30) for kind in KINDS]
    table = tmp_path / "table.csv"
    table.write_text("path,label,patient\n" + "\n".join(rows))
    examples = read_index(shards / "train", table=table).examples
    assert [(e.name[-7:], e.patient) for e in examples[:2]] == [
        ("0000000", "p0"),
        ("0000030", "p30"),
    ]
    table.write_text("path,label\n" + "NORMAL/part-0.array_record/49,a\n")
    with pytest.raises(InputError, match=r"row 2: .*/49 is not a record: .* has 49, from 0"):
        read_index(shards / "train", table=table)


def test_a_file_that_is_no_array_record_is_named(shards: Path) -> None:
    (shards / "train" / "NORMAL" / "part-0.array_record").write_bytes(b"hello" * 1000)
    with pytest.raises(InputError, match=r"part-0.array_record cannot be read as an ArrayRecord"):
        read_index(shards)


def test_facts_that_are_damaged_are_made_anew(copy: Path, tmp_path: Path) -> None:
    first = prepared(copy, tmp_path / "cache", 0)
    (home,) = (tmp_path / "cache").glob("facts-*")
    digests = np.load(home / "digests.npy")
    np.save(home / "digests.npy", digests[::-1])
    second = prepared(copy, tmp_path / "cache", 0)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(np.load(home / "digests.npy"), digests)


def test_what_is_missing_to_decode_on_the_fly_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    data = DataConfig(str(tree), size=16, cache=tmp_path, resident_mib=0, cache_mib=0)
    with pytest.raises(InputError, match=r'needs Grain: pip install "cnnjax\[stream\]", or raise'):
        fit(Config(workdir=tmp_path / "run", data=data))
