"""Formats of packed numbers that kernels are tried with."""

from kvfold.plan.codecs._codes import BITS
from kvfold.plan.number_format import NumberFormat

FORMS = {
    **{f"{bits}_bits": NumberFormat(tiers=((64, bits),)) for bits in BITS},
    "odd": NumberFormat(tiers=((13, 3),)),
    "tiers": NumberFormat(tiers=((24, 8), (40, 5), (71, 3), (130, 1))),
    "float8": NumberFormat(tiers=((77, 8),), scales="float8"),
}


def distance(found, wanted):
    """Relative, as a root of a sum of squares."""
    return (found.double() - wanted).norm() / wanted.norm()
