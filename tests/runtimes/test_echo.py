"""Echo by hand, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from r1q.core.errors import InputError, MissingError, UsageError
from r1q.runtimes.base import Options
from r1q.runtimes.echo import Echo


def test_logits_count_what_was_read_and_favour_the_last(tmp_path: Path) -> None:
    path = tmp_path / "four.echo"
    path.write_text('{"vocab": 4, "context": 8}')
    with Echo().open(path, Options()) as session:
        np.testing.assert_array_equal(session.prefill(0, [2, 2, 1]), [0, 9, 2, 0])
        assert session.encode("AB") == [ord("A") % 4, ord("B") % 4]
        assert session.context == 8


@pytest.mark.parametrize(
    "text", ["", "[]", '{"vocab": 4}', '{"vocab": 0, "context": 8}', '{"vocab": "x", "context": 8}']
)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.echo"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.echo"):
        Echo().open(path, Options())


def test_no_gpu_and_no_longer_context(echo_file: Path) -> None:
    with pytest.raises(MissingError, match="no GPU"):
        Echo().open(echo_file, Options(device="gpu"))
    with pytest.raises(UsageError, match="trained for 48"):
        Echo().open(echo_file, Options(context=49))


@pytest.mark.parametrize(
    "arguments",
    [{"threads": 0}, {"context": 0}, {"sequences": 0}, {"gpu_layers": 3}],
    ids=lambda value: next(iter(value)),
)
def test_impossible_options_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"must be at least 1|need the device gpu"):
        Options(**arguments)  # type: ignore[arg-type]
