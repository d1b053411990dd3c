"""How the rows of a step are split, for methods whose rows are longer than the recipe counts."""

import math
from fractions import Fraction

from endprompt import BadInput
from endprompt.recipe.experiment import Experiment


def batch_shape(experiment: Experiment) -> tuple[int, int]:
    """(per_device_train_batch_size, gradient_accumulation_steps) that keep the recipe's tokens a step when
    rows are longer or shared.

    The recipe counts rows of ``physical_length`` a device; a method with rows of ``target_length`` takes
    fewer of them, and N devices that share rows (sequence parallelism) take N times as many together. Raises
    BadInput if the recipe's step holds less than one such row for each of those that share it.
    """
    recipe, length = experiment.recipe, experiment.row_length
    rows, accumulation = (
        recipe.train.get("per_device_train_batch_size", 1),
        recipe.train.get("gradient_accumulation_steps", 1),
    )
    ratio = Fraction(length, recipe.lengths.physical * recipe.sequence_parallel)
    if ratio == 1:
        return rows, accumulation
    total = rows * accumulation / ratio
    if total.denominator != 1:
        raise BadInput(
            f"train: {rows} x {accumulation} rows of {recipe.lengths.physical} tokens are {float(total):g}"
            f" rows of {length}, which {experiment.method.name} trains on; make"
            f" per_device_train_batch_size x gradient_accumulation_steps a multiple of {ratio.numerator}"
        )
    wide = math.gcd(int(total), max(1, int(rows / ratio)))
    return wide, int(total) // wide
