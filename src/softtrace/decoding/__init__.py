"""Early exits that are proven, and lossless decoding with them."""

from softtrace.decoding.calibration import CalibratedConfidence, calibrated_confidence
from softtrace.decoding.exit_checks import (
    EXIT_FIELD,
    ProvenExit,
    check_cache,
    check_early_exit,
    exit_layer_of,
)
from softtrace.decoding.recommend import recommend_exit
from softtrace.decoding.sampling import Sampling
from softtrace.decoding.speculative import Generation, generate, greedy, speculate
from softtrace.decoding.static_decoder import StaticDecoder
from softtrace.decoding.unchecked import EarlyGeneration, agreement_of, exit_early

__all__ = [
    "EXIT_FIELD",
    "CalibratedConfidence",
    "EarlyGeneration",
    "Generation",
    "ProvenExit",
    "Sampling",
    "StaticDecoder",
    "agreement_of",
    "calibrated_confidence",
    "check_cache",
    "check_early_exit",
    "exit_early",
    "exit_layer_of",
    "generate",
    "greedy",
    "recommend_exit",
    "speculate",
]
