"""Damaged or malicious files: refused by name, or loaded exactly.

The campaigns of 2,000 files are `slow`; the suite takes a sample of each.
"""

import copy
import gzip
import hashlib
import math
import os
import random
import re
import resource

import numpy as np
import pytest
import torch

from tests.command_lines import run_script
from vae_torch import VAE, load_run
from vae_torch.checkpoint import CheckpointError, Checkpoints, load_checkpoint, save_checkpoint
from vae_torch.data import DataError, idx_bytes, load_images, read_idx

CAMPAIGN = [pytest.param(100, id="sample"), pytest.param(2000, id="all", marks=pytest.mark.slow)]
FEWER = [pytest.param(30, id="sample"), CAMPAIGN[1]]  # where each takes long


def damaged(content, dice):
    """Flipped bits, a cut, a hole, zeros, or bytes of its own in another place."""
    bad = bytearray(content)
    at = dice.randrange(len(bad))
    size = dice.randint(1, 64)
    kind = dice.randrange(5)
    if kind == 0:
        for _ in range(dice.randint(1, 8)):
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
    elif kind == 1:
        del bad[at:]
    elif kind == 2:
        del bad[at : at + size]
    elif kind == 3:
        bad[at : at + size] = bytes(len(bad[at : at + size]))
    else:
        start = dice.randrange(len(bad))
        bad[at:at] = bad[start : start + size]
    return bytes(bad)


@pytest.mark.parametrize("files", CAMPAIGN)
def test_a_damaged_checkpoint_is_refused_or_exact(tmp_path, config, files):
    config.model.intermediate_dim = 4
    weights = VAE.from_config(config).state_dict()
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save({"epoch": 1, "model": weights})
    path = tmp_path / "last.pt"
    good = path.read_bytes()
    dice = random.Random(files)
    refused = 0
    for _ in range(files):
        path.write_bytes(damaged(good, dice))
        if path.read_bytes() == good:  # the damage replaced zeros by zeros
            state = load_checkpoint(path)["model"]
            assert all(torch.equal(state[name], weights[name]) for name in weights)
            continue
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_checkpoint(path)
        refused += 1
    assert refused > 0.9 * files
    print(f"{refused} of {files} refused")


def sealed(content):
    return content + b"VAETORCH" + hashlib.sha256(content).digest()


@pytest.mark.parametrize("files", FEWER)
def test_a_checkpoint_that_somebody_damaged_and_sealed_loads_or_is_refused(tmp_path, config, files):
    """The seal detects damage, not authors: no error of torch's own reaches the user."""
    config.model.intermediate_dim = 4
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    checkpoints.save({"epoch": 1, "model": VAE.from_config(config).state_dict()})
    path = tmp_path / "checkpoints" / "last.pt"
    good = path.read_bytes()[:-40]
    assert sealed(good) == path.read_bytes()
    dice = random.Random(files)
    refused = []
    for _ in range(files):
        path.write_bytes(sealed(damaged(good, dice)))
        for load in (load_run, lambda _: checkpoints.load("cpu")):
            try:
                load(tmp_path)
            except CheckpointError as error:
                refused.append(str(error))
    assert all(said.startswith(str(path.parent)) for said in refused)
    assert files / 2 < len(refused) < 2 * files
    print(f"{len(refused)} of {2 * files} loads refused")


ODD = [None, "x", -1, math.nan, 2**70, True, [], {"a": 1}, torch.ones(2)]


@pytest.mark.parametrize(
    ("odd", "every"),
    [
        pytest.param(1, 3, id="sample"),
        pytest.param(len(ODD), 1, id="all", marks=pytest.mark.slow),
    ],
)
def test_a_sealed_checkpoint_with_odd_values_loads_or_is_refused(tmp_path, config, odd, every):
    config.model.intermediate_dim = 4
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    weights = VAE.from_config(config).state_dict()
    checkpoints.save({"epoch": 1, "step": 0, "best": 0.0, "model": weights, "optimizer": {}})
    path = tmp_path / "checkpoints" / "last.pt"

    def places(branch, above=()):
        for key, leaf in branch.items():
            yield (*above, key)
            yield from places(leaf, (*above, key)) if isinstance(leaf, dict) else ()

    good = load_checkpoint(path)
    dice = random.Random(0)
    refused, loads = [], 0
    for *above, key in list(places(good))[::every]:
        for value in dice.sample(ODD, odd):
            state = copy.deepcopy(good)
            branch = state
            for name in above:
                branch = branch[name]
            branch[key] = value
            save_checkpoint(state, path)
            for load in (load_run, lambda _: checkpoints.load("cpu")):
                loads += 1
                try:
                    load(tmp_path)
                except CheckpointError as error:
                    refused.append(str(error))
    assert all(said.startswith(str(path.parent)) and "\n" not in said for said in refused)
    assert loads / 2 < len(refused) < loads
    print(f"{len(refused)} of {loads} loads refused")


def test_a_config_that_claims_a_huge_model_takes_no_memory(tmp_path, config):
    config.model.intermediate_dim = 4
    weights = VAE.from_config(config).state_dict()
    config.model.intermediate_dim = 10_000
    config.model.depth = 100
    Checkpoints(tmp_path / "checkpoints", config).save({"epoch": 1, "model": weights})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="does not fit its own config"):
        load_run(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB, of 40 GB


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path, config):
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt: not a file"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"last\.pt: not a file"):
        Checkpoints(tmp_path / "checkpoints", config).load("cpu")


@pytest.mark.parametrize("files", FEWER)
def test_a_damaged_history_is_refused_or_exact(tmp_path, config, files):
    values = np.random.default_rng(0).normal(size=(2, 20)).tolist()
    history = dict(zip(("train/elbo", "test/elbo"), values, strict=True))
    Checkpoints(tmp_path, config).save({"epoch": 20, "history": history, "model": {}})
    path = tmp_path / "history.jsonl"
    good = path.read_bytes()
    dice = random.Random(files)
    refused = []
    for _ in range(files):
        path.write_bytes(damaged(good, dice))
        try:
            got = Checkpoints(tmp_path, config).load("cpu")["history"]
        except CheckpointError as error:
            refused.append(str(error))
        else:
            assert got == history
    assert all(str(path) in said for said in refused)
    assert len(refused) > 0.9 * files
    print(f"{len(refused)} of {files} refused")


@pytest.mark.parametrize("files", CAMPAIGN)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_idx_file_is_refused_or_holds_what_it_says(tmp_path, files, packed):
    """Plain IDX has no checksum: changed pixels are pixels, unless a SHA-256 is known."""
    array = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    content = idx_bytes(array)
    known = hashlib.sha256(content).hexdigest()
    good = gzip.compress(content) if packed else content
    path = tmp_path / ("images.gz" if packed else "images")
    dice = random.Random(files)
    refused = 0
    for _ in range(files // 2):
        bad = damaged(good, dice)
        path.write_bytes(bad)
        for sha256 in (known, None):
            try:
                got = read_idx(path, sha256=sha256)
            except DataError as error:
                said = str(error)
            else:
                said = ""
            if said:
                assert f"{path}: " in said
                assert "delete the file" in said
                refused += sha256 is not None
                continue
            if sha256:
                np.testing.assert_array_equal(got, array)
            else:  # exactly the contents of the file
                raw = gzip.decompress(bad) if packed else bad
                assert (
                    got.astype(">i4" if raw[2] == 0x0C else np.uint8).tobytes()
                    == raw[4 + 4 * raw[3] :]
                )
    assert refused > 0.8 * (files // 2)
    print(f"{refused} of {files // 2} refused")


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_claims_terabytes_takes_no_memory(tmp_path, packed):
    script = """
import resource, sys
from pathlib import Path
from vae_torch.data import DataError, read_idx
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_idx(Path(sys.argv[1]))
except DataError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    header = b"\0\0\x08\x03" + (2**31).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(header + bytes(10**6)) if packed else header + bytes(1000))
    (tmp_path / "read.py").write_text(script)
    refused, kibibytes = run_script(tmp_path / "read.py", path).stdout.splitlines()
    assert "claims 1,683,627,180,048 bytes" in refused
    assert int(kibibytes) < 4096


def test_a_packed_bomb_is_read_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((1, 28, 28), np.uint8)) + bytes(10**8)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="too long"):
        read_idx(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("dimensions", [1, 3, 4, 255])
def test_a_header_of_many_dimensions_is_refused(tmp_path, dimensions):
    content = bytes([0, 0, 8, dimensions]) + (1).to_bytes(4, "big") * dimensions + b"x"
    path = tmp_path / "images"
    path.write_bytes(content)
    if dimensions <= 3:
        assert math.prod(read_idx(path).shape) == 1
    else:
        with pytest.raises(DataError, match=f"images: has {dimensions} dimensions"):
            read_idx(path)


def test_labels_outside_the_classes_are_refused(made_up_root, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (made_up_root / "FashionMNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes())
    (raw / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(600, 200, np.uint8)))
    with pytest.raises(DataError, match=r"train-labels.*200"):
        load_images("fashion_mnist", root=tmp_path)
