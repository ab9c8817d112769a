import math

import pytest

from annotated_src.figures.moving.rope_pair import NUM_POSITIONS, PAIRS, rope_pair_data

PLACES = range(NUM_POSITIONS)
CONTENT = math.degrees(math.atan2(0.6, 0.8))  # the query's angle at position 0


@pytest.fixture(scope="module")
def data():
    return rope_pair_data()


def test_a_product_is_a_wave_over_distance(data):
    for pair in range(PAIRS):
        step = 10_000 ** (-pair / 8)
        for m in PLACES:
            for n in PLACES:
                wave = math.cos((m - n) * step + math.radians(CONTENT))
                assert data["products"][pair][m][n] == pytest.approx(wave, abs=6e-4)


def test_the_table_says_the_same_wherever_the_distance_is_the_same(data):
    for table in data["products"]:
        by_distance = {}
        for m in PLACES:
            for n in PLACES:
                by_distance.setdefault(m - n, set()).add(table[m][n])
        assert all(len(products) == 1 for products in by_distance.values())
        assert len({p for products in by_distance.values() for p in products}) > 20


def test_arrows_go_round_evenly_from_their_content(data):
    for who, start in (("query", CONTENT), ("key", 0.0)):
        for pair, row in enumerate(data[who]):
            step = math.degrees(10_000 ** (-pair / 8))
            for place, degrees in enumerate(row):
                off = (degrees - start - place * step + 180) % 360 - 180
                assert abs(off) < 0.06


def test_a_pair_comes_round_after_its_wavelength(data):
    assert data["wavelengths"] == [6.3, 19.9, 62.8, 198.7]
    assert [round(2 * math.pi * 10 ** (p / 2), 1) for p in range(4)] == data[
        "wavelengths"
    ]
