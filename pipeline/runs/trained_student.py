"""The student that a run has made of the one it began with."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import StudentConfig
from pipeline.runs.files import TRAINED, check, read_record


def trained_student(student: StudentConfig, directory: Path) -> StudentConfig | None:
    """The student that the run in `directory` trained from this one; the same one if training gained nothing.

    None while the run has not ended, or if its adapter or model has been removed. Raises `DamagedRunError` if what it
    made has changed since.
    """
    record = read_record(directory)
    if record is None or record.result is None:
        return None
    if record.result.step == 0:
        return student
    for name in TRAINED:
        if (directory / name).is_dir():
            check(directory, name, record=record)
            made = str(directory / name)
            changed = {"adapter": made} if name == "adapter" else {"model": made, "revision": None, "adapter": None}
            return student.model_copy(update=changed)
    return None
