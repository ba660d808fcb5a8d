"""Early exits that are proven, and lossless decoding with them."""

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

__all__ = [
    "EXIT_FIELD",
    "Generation",
    "ProvenExit",
    "Sampling",
    "StaticDecoder",
    "check_cache",
    "check_early_exit",
    "exit_layer_of",
    "generate",
    "greedy",
    "recommend_exit",
    "speculate",
]
