"""The runs of a study: rows x seeds x folds, and the trials that tune a row on a fold before them.

runs/ROW/SEED/FOLD/                 a run whose test images count; FOLD only with folds
runs/ROW/tuning/FOLD/trial-N/inner-M/   a run that tunes
runs/ROW/tuning/FOLD/tuning.json        the scores of the trials, and the chosen one
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from naslora.errors import UserError
from naslora.records import read_record, write_record
from naslora.results import RunNumbers
from naslora.study.design import Launch, Values, values_text, with_values
from naslora.study.protocol import LORA, Fold
from naslora.study.rows import Row
from naslora.study.summary import pooled
from naslora.training.resolve import resolve
from naslora.training.run_config import DataConfig, RunConfig

NUMBERS = "numbers.json"
TUNING = "tuning.json"

Outcome = RunNumbers | Exception
"""What a run gave, or why there are no numbers."""
Outcomes = dict[Path, Outcome]
"""By the run's folder."""


@dataclass(frozen=True)
class Trial:
    """A combination of values for the tuned settings, and its score."""

    values: dict[str, str]
    dice: float | None
    """Of the inner folds' images; None if it is undefined or a run failed."""
    failed: str | None = None
    """Why."""


@dataclass(frozen=True)
class Tuning:
    """How a row's settings were chosen on a fold: tuning.json."""

    trials: list[Trial]
    chosen: int
    """Place of the trial with the highest Dice; of equal ones the first."""


class Run(NamedTuple):
    """A run of a study."""

    row: Row
    seed: int
    fold: Fold
    data: DataConfig
    folder: Path
    tries: Values | None = None
    """Values of the tuned settings; None for a run whose test images count."""

    @property
    def finished(self) -> bool:
        """Whether its numbers are known, or no longer needed."""
        tuned = self.tries is not None and (self.folder.parents[1] / TUNING).is_file()
        return tuned or (self.folder / NUMBERS).is_file()


@dataclass(frozen=True)
class Study:
    """Which runs to make, and where to write their table."""

    command: str
    """The word before the progress messages."""
    title: str
    """Of the report."""
    recipe: RunConfig
    """What the rows share."""
    rows: Sequence[Row]
    seeds: Sequence[int]
    output: Path
    """Folder of the runs."""
    tables: Path
    """Folder of the tables and of the report."""
    costs: bool
    """Whether every run has a process of its own, so that its time and memory can be measured."""
    margin: float
    """As in ``Design``."""
    folds: Sequence[Fold]
    reference: str = LORA
    """The row that the others are compared with."""
    groups: Sequence[str] | None = None
    """The group of each test image, as in ``Images``."""
    grid: Sequence[Values] = ({},)
    """The values to try; one of no values if nothing is tuned."""
    protocol: Sequence[str] = ()
    """For the report."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """The rows that do not fit the encoder, with the reason."""

    launch: Launch = field(default_factory=Launch)

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed and fold by fold. Trials, all with the first seed, come first."""
        fitting = [row for row in self.rows if row.name not in self.refused]
        for seed, fold, row in product(self.seeds, self.folds, fitting):
            if seed == self.seeds[0]:
                yield from self.trials(row, fold)
            yield Run(row, seed, fold, fold.data, self.folder(row, seed, fold))

    def folder(self, row: Row, seed: int | str, fold: Fold) -> Path:
        """The folder of a run whose test images count; of a row's tuning for ``tuning``."""
        return self.output / "runs" / row.name / str(seed) / fold.name

    def trials(self, row: Row, fold: Fold) -> Iterator[Run]:
        """The runs that tune a row on a fold."""
        for trial, values in enumerate(self.grid, 1):
            for inner, data in enumerate(fold.inner, 1):
                folder = self.folder(row, "tuning", fold) / f"trial-{trial}" / f"inner-{inner}"
                yield Run(row, self.seeds[0], fold, data, folder, values)

    def config(self, run: Run, outcomes: Outcomes) -> RunConfig:
        """A run's configuration; ``outcomes`` are those of its trials. Errors as in ``tuning``."""
        values = run.tries or {}
        if run.fold.inner and run.tries is None:
            tuning = self.tuning(run.row, run.fold, outcomes)
            values = tuning.trials[tuning.chosen].values
        config = with_values(run.row.config, values)
        return resolve(replace(config, seed=run.seed, data=run.data))

    def tuning(self, row: Row, fold: Fold, outcomes: Outcomes) -> Tuning:
        """How a row's settings are chosen on a fold: the stored choice, or else it is stored.

        A trial with a run that a setting made impossible, for instance a rate that is too high,
        counts as the worst. Other errors leave the choice open.

        Raises:
            UserError: no trial has a score, or one has an error that is none of its settings.
        """
        path = self.folder(row, "tuning", fold) / TUNING
        if path.is_file():
            return read_record(path, Tuning)
        trials = []
        for values in self.grid:
            own = [outcomes[run.folder] for run in self.trials(row, fold) if run.tries == values]
            errors = [error for error in own if isinstance(error, Exception)]
            for error in errors:
                if not isinstance(error, UserError):
                    raise UserError(
                        f"the trial {values_text(values)} has no result: {reason(error)}"
                    )
            found = [numbers for numbers in own if isinstance(numbers, RunNumbers)]
            dice = None if errors else pooled(found).numbers["dice"]
            trials.append(Trial({**values}, dice, "; ".join(map(reason, errors)) or None))
        scored = [place for place, trial in enumerate(trials) if trial.dice is not None]
        if not scored:
            raise UserError(f"no trial has a score: {trials[0].failed or 'its Dice is undefined'}")
        tuning = Tuning(trials, max(scored, key=lambda place: trials[place].dice or 0.0))
        write_record(path, tuning)
        self.say(f"{values_text(trials[tuning.chosen].values)} is chosen")
        return tuning

    def say(self, text: str) -> None:
        """Prints a progress message to the standard error."""
        print(f"{self.command}: {text}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """The error of a run as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
