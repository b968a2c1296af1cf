"""What a family of models does in every step is what docs/models.md says: right, or refused with a reason."""

from pathlib import Path

import pytest

from helpers.families import FAMILIES, config_of, line, rows_of_page, try_model

#: One of each kind of layer, layout, wrapper and refusal; `python -m helpers.every_family` tries all.
QUICK = (
    *("Qwen3", "Qwen3-MoE", "Qwen3.5", "Mistral 3", "gpt-oss", "Gemma 2", "Gemma 3", "Gemma 4 (text)"),
    *(
        "Llama 4",
        "DeepSeek-V3",
        "OLMo 3",
        "Phi-3 (LongRoPE)",
        "PhiMoE",
        "Granite",
        "LFM2",
        "Bamba",
        "Mamba",
        "Zamba2",
    ),
    *("RWKV", "OPT", "BLOOM", "GPT-2", "Falcon", "Youtu", "CTRL", "Laguna"),
)


def lines() -> dict[str, str]:
    """The families' rows without what vLLM does, which `helpers.vllm_families` tries."""
    return {family: row for family, (row, _) in rows_of_page().items()}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:fan_in_fan_out is set")  # of peft
@pytest.mark.parametrize("family", QUICK)
def test_a_family_is_right_or_refused(family: str, tmp_path: Path) -> None:
    found = line(family, try_model(config_of(family), tmp_path))
    assert found == lines()[family], "python -m helpers.every_family"


def test_every_family_is_on_the_page_and_nothing_there_is_wrong() -> None:
    assert list(lines()) == list(FAMILIES)
    assert not [row for row in lines().values() if "| wrong" in row or "| fails" in row]
