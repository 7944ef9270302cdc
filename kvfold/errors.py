"""What can go wrong because of what a user gave us, as one tree of ValueErrors.

KvfoldError
├── RecipeError       a preset, method, field or value that does not exist or does not fit
├── CheckpointError   a model folder that cannot be read: type, files, shards, numbers
├── DataError         calibration or evaluation text that is missing or too short
├── PlanError         a cache plan that contradicts itself or that no runtime serves
│   └── BudgetError   a byte budget that no width reaches
├── HealError         a training run that cannot go on
└── OutputError       an output folder that exists, or a disk that is full

Every message says what is wrong, what was found, and what to do. Faults that only kvfold itself can cause are asserts.
"""


class KvfoldError(ValueError):
    """Base of every error that a user can cause and mend."""


class RecipeError(KvfoldError):
    """A preset, method, field or value does not exist or does not fit."""


class CheckpointError(KvfoldError):
    """A model folder cannot be read or holds what kvfold cannot fold."""


class DataError(KvfoldError):
    """Text for calibration or evaluation is missing or too short."""


class PlanError(KvfoldError):
    """A cache plan contradicts itself, or no runtime serves it."""


class BudgetError(PlanError):
    """No width of the chosen method reaches the byte budget."""


class OutputError(KvfoldError):
    """The result cannot be written where it was asked for."""


class HealError(KvfoldError):
    """A training run cannot go on."""


def one_line(error: Exception, most: int = 200) -> str:
    """What another library says, as part of a message of ours: without line breaks, and no more than so many letters."""
    return " ".join(str(error).split())[:most]
