"""Verdicts: is it right?"""

from .evidence import Evidence, Kind, bits_per_dim, log_evidence, monte_carlo_evidence
from .psis import effective_sample_size, khat_threshold, psis
from .representation import (
    InformationVerdict,
    ProbeVerdict,
    active_units,
    linear_probe,
    mutual_information,
)
from .two_sample import (
    ClassifierVerdict,
    MMDVerdict,
    classifier_test,
    mmd_test,
    wilson_interval,
)

__all__ = [
    "ClassifierVerdict",
    "Evidence",
    "InformationVerdict",
    "Kind",
    "MMDVerdict",
    "ProbeVerdict",
    "active_units",
    "bits_per_dim",
    "classifier_test",
    "effective_sample_size",
    "khat_threshold",
    "linear_probe",
    "log_evidence",
    "mmd_test",
    "monte_carlo_evidence",
    "mutual_information",
    "psis",
    "wilson_interval",
]
