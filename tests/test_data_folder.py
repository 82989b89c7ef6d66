import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.command_lines import start_script
from vae_torch import files, folder_loaders
from vae_torch.config import ConfigError
from vae_torch.data import DataError, image_dataset, pictures, shape_of
from vae_torch.data.folder import folder


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)


def flat_folder(root, n=20, shape=(8, 8, 3)):
    arrays = [noise(*shape, seed=i) for i in range(n)]
    for i, array in enumerate(arrays):
        save(root / f"{i:03}.png", array)
    return np.stack(arrays)


def pixels_of(root, **settings):
    return np.asarray(folder(root, **settings).train.images)


def test_pixels_of_a_flat_folder_are_its_files_in_order_without_labels(tmp_path):
    arrays = flat_folder(tmp_path)
    found = folder(tmp_path)
    np.testing.assert_array_equal(found.train.images, arrays.transpose(0, 3, 1, 2))
    assert (found.train.labels, found.test, found.classes) == (None, None, None)
    train, test = folder_loaders(tmp_path, batch_size=6)
    assert [len(batch) for batch in train] == [1, 1, 1]
    x = torch.cat([x for (x,) in train] + [x for (x,) in test])
    assert (len(image_dataset(train)), len(image_dataset(test))) == (18, 2)
    expected = sorted(map(bytes, (arrays.transpose(0, 3, 1, 2) / np.float32(255))))
    assert sorted(map(bytes, x.numpy())) == expected
    assert shape_of(train) == (3, 8, 8)


def test_sub_folders_are_classes_by_name(tmp_path):
    for i, name in enumerate(["10", "9", "2"]):
        for k in range(3):
            save(tmp_path / name / "deeper" / f"{k}.png", np.full((4, 4), 10 * i + k, np.uint8))
    found = folder(tmp_path)
    assert found.classes == ["2", "9", "10"]  # numbers sort by value
    for image, label in zip(found.train.images, found.train.labels, strict=True):
        assert found.classes[label] == ["10", "9", "2"][image.max() // 10]
    train, test = folder_loaders(tmp_path, classes=[9], hold_out=1)
    labels = torch.cat([y for _, y in train] + [y for _, y in test])
    assert labels.tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match=r"no class is called cat; there are 2, 9, 10"):
        folder_loaders(tmp_path, classes=["cat"])


def test_train_and_test_folders_are_training_and_test_images(tmp_path):
    for part, n in (("train", 5), ("test", 2)):
        for name in ("a", "b"):
            for i in range(n):
                save(tmp_path / part / name / f"{i}.png", np.full((3, 5), i, np.uint8))
    train, test = folder_loaders(tmp_path, hold_out="test")
    assert (len(image_dataset(train)), len(image_dataset(test))) == (10, 4)
    assert shape_of(train) == (1, 3, 5)
    assert torch.cat([y for _, y in test]).tolist() == [0, 0, 1, 1]
    assert (torch.cat([x for x, _ in test])[:, 0, 0, 0] * 255).tolist() == [0, 1, 0, 1]
    held, of_train = folder_loaders(tmp_path, hold_out=0.3)
    assert (len(image_dataset(held)), len(image_dataset(of_train))) == (7, 3)


def test_labels_csv_wins_over_folders(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        save(tmp_path / name, noise(4, 4))
    (tmp_path / "labels.csv").write_text("file,label\na/1.png,dog\na/0.png,cat\nb/2.png,dog\n")
    found = folder(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert found.train.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("0.png,cat\n", "1.png is not in it"),
        ("0.png,cat\n1.png,cat\n0.png,dog\n", "line 3, 0.png,dog: two labels"),
        ("0.png,cat\n1.png,cat\n7.png,dog\n", "line 3, 7.png,dog: no image beside it"),
        ("0.png,cat\n1.png\n", "line 2, 1.png: not FILE,LABEL"),
        ("0.png,cat\n1.png,a,b\n", "line 2, 1.png,a,b: not FILE,LABEL"),
        (b"\xff\xfe", "must be UTF-8 text"),
    ],
)
def test_a_wrong_labels_csv_is_reported_by_its_line(tmp_path, rows, words):
    flat_folder(tmp_path, 2)
    for i in range(2):
        (tmp_path / f"00{i}.png").rename(tmp_path / f"{i}.png")
    content = rows if isinstance(rows, bytes) else rows.encode()
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        folder(tmp_path)


def test_every_format_gives_its_pixels(tmp_path):
    grey = noise(6, 7)
    for suffix in ("png", "bmp", "gif"):
        save(tmp_path / suffix / f"0.{suffix}", grey)
    save(tmp_path / "webp" / "0.WEBP", np.repeat(grey[..., None], 3, 2), lossless=True)
    for suffix in ("png", "bmp", "gif", "webp"):
        np.testing.assert_array_equal(pixels_of(tmp_path / suffix, channels=1)[0, 0], grey)
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 4
    save(tmp_path / "jpeg" / "0.jpeg", smooth, quality=95)
    assert np.abs(pixels_of(tmp_path / "jpeg")[0, 0].astype(int) - smooth).max() <= 4


def test_the_first_frame_of_a_gif_is_taken(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (30, 200)]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    assert np.unique(pixels_of(tmp_path, channels=1)).tolist() == [30]


def test_sixteen_bits_and_one_bit_become_the_nearest_eight(tmp_path):
    values = np.array([[0, 128, 129, 255], [256, 32_768, 65_278, 65_535]], np.uint16)
    save(tmp_path / "a" / "0.png", values)
    expected = np.rint(values / 65_535 * 255)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a")[0, 0], expected)
    Image.fromarray(np.eye(4, dtype=bool)).save(str(tmp_path / "a") + "/1.bmp")
    (tmp_path / "a" / "0.png").unlink()
    np.testing.assert_array_equal(pixels_of(tmp_path / "a")[0, 0], 255 * np.eye(4))


def test_transparent_pixels_show_the_background(tmp_path):
    rgba = noise(5, 5, 4)
    save(tmp_path / "0.png", rgba)
    for name, behind in (("white", (255, 255, 255)), ("#ff8000", (255, 128, 0))):
        alpha = rgba[..., 3:] / 255
        expected = alpha * rgba[..., :3] + (1 - alpha) * np.array(behind)
        got = pixels_of(tmp_path, background=name)[0].transpose(1, 2, 0)
        assert np.abs(got - expected).max() <= 1
    with pytest.raises(ConfigError, match=r"data\.background=whitish: must be a colour"):
        pixels_of(tmp_path, background="whitish")


def test_a_palettes_transparent_entry_shows_the_background(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "0.png", transparency=1)
    got = pixels_of(tmp_path, background="black")[0].transpose(1, 2, 0)
    assert got.tolist() == [[[10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_honoured(tmp_path, orientation):
    upright = np.kron(np.array([[0, 90, 180], [255, 40, 130]], np.uint8), np.ones((8, 8), np.uint8))
    # how a camera stores an upright scene under each orientation (the EXIF standard, 4.6.4)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "0.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(pixels_of(tmp_path)[0, 0], upright)


def test_a_smaller_size_is_antialiased_and_cut_from_the_middle(tmp_path):
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # every other pixel
    save(tmp_path / "fine" / "0.png", fine.astype(np.uint8))
    got = pixels_of(tmp_path / "fine", size=16)[0, 0]
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127.5).max() <= 2
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255
    save(tmp_path / "wide" / "0.png", wide)
    assert pixels_of(tmp_path / "wide", size=20).min() == 255
    assert pixels_of(tmp_path / "wide", size=[10, 30]).shape == (1, 1, 10, 30)


def test_colour_is_kept_where_any_file_has_some(tmp_path):
    save(tmp_path / "0.png", noise(4, 4))
    assert pixels_of(tmp_path).shape == (1, 1, 4, 4)
    save(tmp_path / "1.png", noise(4, 4, 3))
    assert pixels_of(tmp_path).shape == (2, 3, 4, 4)
    grey = pixels_of(tmp_path, channels=1)[1, 0].astype(float)
    luma = noise(4, 4, 3) @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(grey - luma).max() <= 1


def test_images_of_several_sizes_need_a_size(tmp_path):
    save(tmp_path / "a.png", noise(4, 6))
    save(tmp_path / "b.png", noise(8, 6))
    with pytest.raises(DataError, match=r"2 sizes, 4x6 \(a.png\) to 8x6 \(b.png\); set data.size"):
        folder(tmp_path)
    assert pixels_of(tmp_path, size=4).shape == (2, 1, 4, 4)


def test_damaged_files_are_all_reported_and_leave_nothing_behind(tmp_path):
    flat_folder(tmp_path, 6)
    whole = (tmp_path / "000.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "003.png").write_text("not an image")
    (tmp_path / "004.png").write_bytes(b"")
    for settings in ({}, {"size": 4, "channels": 1}):
        with pytest.raises(DataError, match=r"of 6 images cannot be read: 00.*003\.png \(no image"):
            folder(tmp_path, **settings)
    with pytest.raises(DataError, match="3 of 6 images"):
        folder(tmp_path, size=4, channels=1)
    for name in ("003.png", "004.png"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"1 of 4 images cannot be read: 001\.png"):
        folder(tmp_path)  # its header is intact
    assert not (tmp_path / ".vae_torch").exists()


def png_that_claims(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(tmp_path, side):
    flat_folder(tmp_path, 2)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(side, side))
    with pytest.raises(DataError, match=r"1 of 3 .*bomb.png \(more than 89,478,485 pixels\)"):
        folder(tmp_path, size=8, channels=1)


def test_text_files_and_hidden_files_are_left_out_and_reported(tmp_path, caplog):
    arrays = flat_folder(tmp_path, 3)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "._000.png").write_text("x")
    with caplog.at_level(logging.INFO, "vae_torch"):
        assert len(pixels_of(tmp_path)) == len(arrays)
    assert "1 files that are not images are left out: README.txt" in caplog.text


def test_a_symlink_loop_is_not_followed_and_a_dead_link_is_reported(tmp_path):
    flat_folder(tmp_path / "data" / "a", 2)
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "data" / "a")  # no loop: images of class b
    found = folder(tmp_path / "data")
    assert found.classes == ["a", "b"]
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    for target in (tmp_path / "gone.png", tmp_path / "data" / "a" / "dead.png"):
        link = tmp_path / "data" / "a" / "dead.png"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(DataError, match=r"dead\.png: cannot be read"):
            folder(tmp_path / "data")


def test_folders_without_use_are_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.root=.*none: no such folder"):
        folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no images, which end in \.bmp"):
        folder(tmp_path)
    flat_folder(tmp_path, 1)
    with pytest.raises(DataError, match=r"leave some of 1 images"):
        folder_loaders(tmp_path)
    flat_folder(tmp_path / "sub", 1)
    with pytest.raises(DataError, match=r"000\.png lies beside sub-folders"):
        folder(tmp_path)


@pytest.mark.slow
def test_a_hundred_thousand_files_are_read_once(tmp_path):
    save(tmp_path / "0.bmp", noise(2, 2))
    content = bytearray((tmp_path / "0.bmp").read_bytes())
    (tmp_path / "0.bmp").unlink()
    for i in range(100_000):
        content[-4:-2] = (i % 65_536).to_bytes(2, "big")  # the two upper pixels: rows rise
        (tmp_path / f"{i:06}.bmp").write_bytes(content)
    numbers = pixels_of(tmp_path)[:, 0, 0].astype(int) @ [256, 1]
    np.testing.assert_array_equal(numbers, np.arange(100_000) % 65_536)


def count_decoded(monkeypatch):
    counted = []
    real = pictures.pixels
    monkeypatch.setattr(pictures, "pixels", lambda *a: counted.append(1) or real(*a))
    return counted


def test_a_warm_start_opens_no_file(tmp_path, monkeypatch):
    arrays = flat_folder(tmp_path, 5)
    folder(tmp_path)
    monkeypatch.setattr(pictures.Image, "open", None)
    np.testing.assert_array_equal(pixels_of(tmp_path), arrays.transpose(0, 3, 1, 2))


def test_images_are_decoded_once_for_each_content_and_setting(tmp_path, monkeypatch):
    arrays = flat_folder(tmp_path, 5)
    counted = count_decoded(monkeypatch)
    for _ in range(2):
        folder(tmp_path, size=4)
    assert len(counted) == 5
    folder(tmp_path, size=8)
    assert len(counted) == 10
    save(tmp_path / "000.png", 255 - arrays[0])
    os.utime(tmp_path / "000.png", ns=(1, 1))
    np.testing.assert_array_equal(
        pixels_of(tmp_path, size=8)[0], 255 - arrays[0].transpose(2, 0, 1)
    )
    assert len(counted) == 15
    caches = (tmp_path / ".vae_torch").glob("*.npy")
    assert sum(cache.stat().st_size > 200 for cache in caches) == 2  # the outdated one is gone


def test_a_torn_cache_is_made_anew(tmp_path):
    flat_folder(tmp_path, 5)
    expected = pixels_of(tmp_path).copy()
    files = list((tmp_path / ".vae_torch").glob("*.npy"))
    assert len(files) == 2  # pixels and form
    for file in files:
        content = file.read_bytes()
        for damaged in (b"", content[:50], content[:-1], b"x" * len(content)):
            file.write_bytes(damaged)
            np.testing.assert_array_equal(pixels_of(tmp_path), expected)


def test_a_folder_that_cannot_be_written_is_cached_elsewhere(tmp_path, monkeypatch):
    flat_folder(tmp_path / "data", 3)
    (tmp_path / "data" / ".vae_torch").write_text("in the way, for root too")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    counted = count_decoded(monkeypatch)
    for _ in range(2):
        folder(tmp_path / "data")
    assert len(counted) == 3
    assert len(list((tmp_path / "user" / "vae_torch").glob("*.npy"))) == 2  # pixels and form


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    flat_folder(tmp_path, 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left.*need .* bytes"):
        folder(tmp_path)
    assert not (tmp_path / ".vae_torch").exists()


def test_many_processes_on_a_cold_folder_decode_once(tmp_path):
    flat_folder(tmp_path / "data", 40)
    script = """
import sys
from vae_torch.data import pictures
from vae_torch.data.folder import folder
from pathlib import Path
real = pictures.pixels
def counted(*order):
    with open(sys.argv[2], "a") as log: log.write("x")
    return real(*order)
pictures.pixels = counted
print(folder(Path(sys.argv[1])).train.images.sum())
"""
    (tmp_path / "reads.py").write_text(script)
    command = (tmp_path / "reads.py", tmp_path / "data", tmp_path / "log")
    with start_script(*command) as one, start_script(*command) as other:
        ended = [one.end(), other.end()]
    assert [(each.status, each.error) for each in ended] == [(0, "")] * 2
    sums = {each.out for each in ended}
    assert len(sums) == 1
    assert (tmp_path / "log").read_text() == "x" * 40


def test_held_out_images_are_the_same_for_every_seed_and_of_all_classes(tmp_path):
    for name in "ab":
        for i in range(30):
            save(tmp_path / name / f"{i}.png", np.full((2, 2), i, np.uint8))
    labels = [
        torch.cat([y for _, y in folder_loaders(tmp_path, hold_out=20, seed=s)[1]]) for s in (0, 1)
    ]
    assert torch.equal(*labels)
    assert set(labels[0].tolist()) == {0, 1}
