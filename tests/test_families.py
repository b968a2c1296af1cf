"""What every family of models does in every step is what docs/models.md says: right, or refused with a reason."""

from pathlib import Path

import pytest

from helpers.families import FAMILIES, PAGE, config_of, line, try_model


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:fan_in_fan_out is set")  # of peft
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused(family: str, tmp_path: Path) -> None:
    expected = next(x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(f"| {family} |"))
    assert line(family, try_model(config_of(family), tmp_path)) == expected, "cd tests && python -m helpers.families"
