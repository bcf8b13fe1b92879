"""Whether a hypergradient can be trusted: `certify` for implicit ones, `spot_check` for all."""

from theria.meta.certificate.certify import certify
from theria.meta.certificate.report import Certificate, Checks, Constants, Fault, Finding, Terms
from theria.meta.certificate.spot_check import SpotCheck, spot_check

__all__ = [
    "Certificate",
    "Checks",
    "Constants",
    "Fault",
    "Finding",
    "SpotCheck",
    "Terms",
    "certify",
    "spot_check",
]
