"""Profiles and targets: the shipped table, the user's own over it, and estimates by hand."""

from pathlib import Path

import pytest

from r1q.benchmarks.profiles import find_profile, own_table, predict, profiles
from r1q.benchmarks.targets import find_target
from r1q.benchmarks.traffic import Traffic
from r1q.core.errors import InputError, UsageError
from r1q.runtimes.cores import physical_cores

TRAFFIC = Traffic(
    weight_bytes=10**9, touched_weights=2 * 10**9, cache_values=10_000, width=1000, inner=2000, vocab=32_000
)


def own(text: str) -> Path:
    path = own_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_shipped_profile_states_its_facts() -> None:
    table = profiles()
    assert {"laptop-8g", "laptop-16g", "rtx-4090", "rtx-3060", "phone-4g", "phone-8g"} <= set(table)
    for profile in table.values():
        assert profile.source
        assert profile.about != profile.name
        assert 2**31 < profile.memory < 2**40
        assert 1e10 < profile.bandwidth < 2e12
    # 384 bits at 21 Gbit/s.
    assert table["rtx-4090"].bandwidth == 384 / 8 * 21e9


def test_the_users_table_adds_and_replaces() -> None:
    own(
        '[my-box]\nmemory = "64GiB"\nbandwidth = 200.5\nsource = "measured"\n'
        '[phone-4g]\nmemory = "4GiB"\nbandwidth = 9\nsource = "x"\n'
    )
    table = profiles()
    assert table["my-box"].bandwidth == 200.5e9
    assert table["my-box"].memory == 64 << 30
    assert table["phone-4g"].bandwidth == 9e9
    assert "laptop-8g" in table
    target = find_target("my-box")
    assert (target.emulated, target.memory) == (True, int(0.75 * (64 << 30)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a", "is no table of targets"),
        ("a = 3", r"\[a\] is no table"),
        ('[a]\nmemory = "4GiB"\nbandwidth = 3\n', r"\[a\] lacks source"),
        ('[a]\nmemory = "4GB"\nbandwidth = 3\nsource = ""\n', "write it like 8GiB"),
        ('[a]\nmemory = "4GiB"\nbandwidth = -3\nsource = ""\n', "bandwidth is -3"),
        (
            '[a]\nmemory = "4GiB"\nbandwidth = 3\nsource = ""\nshare = 2\n',
            "share is 2; it must be a number above 0, at most 1",
        ),
        ('[a]\nmemory = "4GiB"\nbandwith = 3\nsource = ""\n', "no key named 'bandwith'; did you mean bandwidth"),
        ('[a]\nmemory = "4GiB"\nbandwidth = 3\nsource = ""\ndevice = "npu"\n', "device is 'npu'"),
    ],
)
def test_a_wrong_table_names_its_place(text: str, reason: str) -> None:
    path = own(text)
    with pytest.raises(InputError, match=reason) as caught:
        profiles()
    assert str(path) in str(caught.value)


def test_an_estimate_is_bandwidth_over_bytes() -> None:
    profile = find_profile("laptop-8g")
    found = predict(profile, TRAFFIC, weights=1_100_000_000, context=4096)
    assert found.tokens_per_second == pytest.approx(0.6 * 51.2e9 / 1e9)
    assert found.needed == 1_100_000_000 + 4096 * 10_000 * 2 + 4 * (512 * (4 * 1000 + 3 * 2000) + 32_000)
    assert found.fits
    # Deep in a context its keys and values are read too: 50,000 tokens of 20 kB are as much as the weights.
    deep = predict(profile, TRAFFIC, weights=1, context=1, depth=50_000)
    assert deep.tokens_per_second == pytest.approx(found.tokens_per_second / 2)
    assert not predict(find_profile("phone-4g"), TRAFFIC, weights=3 << 30, context=16).fits


def test_a_phone_has_four_threads_or_fewer_and_a_ceiling() -> None:
    target = find_target("mobile", ram=3 << 30)
    assert (target.memory, target.context, target.threads) == (3 << 30, 2048, min(4, physical_cores()))
    assert find_target("mobile", threads=1).threads == 1
    phone = find_target("phone-8g")
    assert (phone.memory, phone.threads, phone.context) == (4 << 30, min(4, physical_cores()), 2048)
    assert find_target("laptop-8g").context is None


def test_unknown_targets_have_near_names() -> None:
    with pytest.raises(UsageError, match="no target named 'phone-4'; did you mean phone-4g"):
        find_target("phone-4")
