import hashlib

from vae_torch.seeds import Stream, mix_seed, seeded_generator


def test_a_streams_seed_is_that_of_its_number():
    digest = hashlib.sha256(b"5,17,2").digest()
    assert mix_seed(5, 17, Stream.NOISE) == digest[0] + 256 * (
        digest[1] + 256 * (digest[2] + 256 * digest[3])
    )
    assert seeded_generator("cpu", 5, Stream.BOUND).initial_seed() == mix_seed(5, 3)


def test_no_two_streams_share_a_number():
    assert len(Stream) == len(Stream.__members__)  # __members__ includes aliases


def test_the_numbers_stay_since_every_run_depends_on_them():
    assert {stream.name: int(stream) for stream in Stream} == {
        "PIXELS": 1,
        "NOISE": 2,
        "BOUND": 3,
        "IMPORTANCE": 4,
        "FIT": 5,
        "AGGREGATE": 6,
        "CHOICE": 7,
        "ANNEAL": 8,
        "PROPOSAL": 9,
        "SIMULATED": 10,
        "AUGMENT": 16,
    }
